"""The training loop: epochs, steps, and what happens between them, as in Hugging Face's Trainer."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfall.arguments import GlueArguments, steps_or_share
from bitfall.checkpoints import checkpoint_tag, remove_old_checkpoints
from bitfall.distributed import any_rank
from bitfall.errors import DataError
from bitfall.interrupt import StopRequest
from bitfall.outputs import finite_or_none, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from bitfall._core import Communicator, Engine, StepResult
    from bitfall.batches import BatchPlan
    from bitfall.data import TokenizedData
    from bitfall.recorder import Recorder


@dataclass
class LoopState:
    """Position in the training and its log so far; part of every checkpoint.

    global_step counts global batches, steps skipped for overflow included. interval_* cover the
    steps since the last entry of log_history. Losses that are not finite are left out of means.
    total_steps: how many the run was to have when the checkpoint was written; 0: unknown.
    """

    total_steps: int = 0
    global_step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    interval_loss_sum: float = 0.0
    interval_loss_count: int = 0
    log_offset: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)

    def add_loss(self, loss: float) -> None:
        if math.isfinite(loss):
            self.loss_sum += loss
            self.loss_count += 1
            self.interval_loss_sum += loss
            self.interval_loss_count += 1


@dataclass(frozen=True)
class Intervals:
    """When to log, evaluate and save, in steps."""

    total_steps: int
    logging_steps: int
    eval_strategy: str
    eval_steps: int
    save_strategy: str
    save_steps: int

    @classmethod
    def from_arguments(cls, arguments: GlueArguments, total_steps: int) -> Intervals:
        logging_steps = steps_or_share(arguments.logging_steps, total_steps)
        return cls(
            total_steps,
            logging_steps,
            arguments.eval_strategy,
            steps_or_share(arguments.eval_steps, total_steps)
            if arguments.eval_steps is not None
            else logging_steps,
            arguments.save_strategy,
            steps_or_share(arguments.save_steps, total_steps),
        )

    def logs_at(self, step: int) -> bool:
        return step % self.logging_steps == 0

    def evaluates_at(self, step: int, epoch_ended: bool) -> bool:
        return self._due(self.eval_strategy, self.eval_steps, step, epoch_ended)

    def saves_at(self, step: int, epoch_ended: bool) -> bool:
        return self._due(self.save_strategy, self.save_steps, step, epoch_ended)

    def _due(self, strategy: str, interval: int, step: int, epoch_ended: bool) -> bool:
        if strategy == "no":
            return False
        regular = epoch_ended if strategy == "epoch" else step % interval == 0
        return regular or step == self.total_steps


class Trainer:
    """Drives an Engine through the steps of a BatchPlan. All ranks run it alike."""

    def __init__(
        self,
        engine: Engine,
        data: TokenizedData,
        plan: BatchPlan,
        intervals: Intervals,
        arguments: GlueArguments,
        recorder: Recorder,
        communicator: Communicator,
        evaluate: Callable[[], dict[str, Any]],
        run_identity: dict[str, Any],
    ) -> None:
        """`run_identity` must be equal in a resumed run: data, batch size, seed, task."""
        self.state = LoopState()
        self.timings: dict[str, float] = {}
        self._engine = engine
        self._data = data
        self._plan = plan
        self._intervals = intervals
        self._arguments = arguments
        self._recorder = recorder
        self._communicator = communicator
        self._evaluate = evaluate
        self._run_identity = run_identity
        self._output_dir = Path(arguments.output_dir)

    @property
    def epoch_fraction(self) -> float:
        return self.state.epoch + self.state.step_in_epoch / self._plan.steps_per_epoch

    def train(self) -> bool:
        """Trains to the last step. Returns False if a signal stopped it after a checkpoint."""
        state = self.state
        order_epoch, order = -1, None
        self._recorder.progress.start(self._intervals.total_steps, state.global_step)
        with StopRequest() as stop:
            while state.global_step < self._intervals.total_steps:
                if order is None or order_epoch != state.epoch:
                    order_epoch, order = state.epoch, self._plan.order(state.epoch)
                saved = self._one_step(order)
                if any_rank(self._communicator, stop.requested):
                    if not saved:
                        self._save()
                    return state.global_step == self._intervals.total_steps
        return True

    def _one_step(self, order: npt.NDArray[np.int64]) -> bool:
        """Trains on one global batch; logs, evaluates and saves if due. Returns if it saved."""
        state, intervals = self.state, self._intervals
        result, tokens, seconds = self._train_batch(order)
        state.global_step += 1
        state.step_in_epoch += 1
        epoch_ended = state.step_in_epoch == self._plan.steps_per_epoch
        if epoch_ended:
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
        state.add_loss(result["loss"])
        logs = intervals.logs_at(state.global_step)
        self._recorder.step(state.global_step, self.epoch_fraction, result, tokens, seconds, logs)
        if logs:
            self._add_to_history(result)
        if self._recorder.shows_phases(state.global_step):
            self._recorder.phases(state.global_step, self.take_timings())
        if intervals.evaluates_at(state.global_step, epoch_ended):
            self.add_metrics(self._evaluate())
        saves = intervals.saves_at(state.global_step, epoch_ended)
        if saves:
            self._save()
        return saves

    def _train_batch(self, order: npt.NDArray[np.int64]) -> tuple[StepResult, int, float]:
        """(result, tokens of the global batch, seconds) of one optimizer step."""
        began = time.perf_counter()
        step = self.state.step_in_epoch
        parts = self._plan.micro_batches(
            order, step, self._communicator.rank, self._communicator.world_size
        )
        micro_batches = [self._data.batch(examples, keys) for examples, keys in parts]
        result = self._engine.train_batch(micro_batches)
        size = self._plan.train_batch_size
        examples = order[step * size : (step + 1) * size]
        tokens = int((self._data.starts[examples + 1] - self._data.starts[examples]).sum())
        return result, tokens, time.perf_counter() - began

    def take_timings(self) -> dict[str, float]:
        """Seconds by phase since the last call, which `timings` adds up."""
        seconds = self._engine.timings()
        for phase, value in seconds.items():
            self.timings[phase] = self.timings.get(phase, 0.0) + value
        return seconds

    def _add_to_history(self, result: StepResult) -> None:
        state = self.state
        mean = state.interval_loss_sum / max(state.interval_loss_count, 1)
        state.log_history.append(
            {
                "loss": mean if state.interval_loss_count else None,
                "grad_norm": finite_or_none(result["grad_norm"]),
                "learning_rate": result["learning_rate"],
                "epoch": self.epoch_fraction,
                "step": state.global_step,
            }
        )
        state.interval_loss_sum, state.interval_loss_count = 0.0, 0

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Adds evaluation or training metrics to the history of trainer_state.json."""
        self.state.log_history.append(
            {
                **finite_or_none(metrics),
                "epoch": self.epoch_fraction,
                "step": self.state.global_step,
            }
        )

    def _save(self) -> None:
        """Writes checkpoint-<step>, then removes the oldest beyond --save_total_limit."""
        self.state.log_offset = self._recorder.log_offset
        self.state.total_steps = self._intervals.total_steps
        client_state = {
            "loop": dataclasses.asdict(self.state),
            "run": self._run_identity,
        }
        self._engine.save_checkpoint(
            str(self._output_dir),
            checkpoint_tag(self.state.global_step),
            json.dumps(client_state),
        )
        if self._communicator.rank == 0:
            self.write_state()
            remove_old_checkpoints(self._output_dir, self._arguments.save_total_limit)

    def write_state(self) -> None:
        """trainer_state.json, as Hugging Face's tools read it."""
        write_json(
            self._output_dir / "trainer_state.json",
            {
                "epoch": self.epoch_fraction,
                "global_step": self.state.global_step,
                "max_steps": self._intervals.total_steps,
                "num_train_epochs": math.ceil(
                    self._intervals.total_steps / self._plan.steps_per_epoch
                ),
                "train_batch_size": self._plan.micro_batch_size,
                "logging_steps": self._intervals.logging_steps,
                "eval_steps": self._intervals.eval_steps,
                "save_steps": self._intervals.save_steps,
                "is_local_process_zero": True,
                "is_world_process_zero": True,
                "log_history": self.state.log_history,
            },
        )


def load_position(engine: Engine, checkpoint: Path, run_identity: dict[str, Any]) -> LoopState:
    """Restores `engine` from `checkpoint` and returns where its training stood.

    Raises DataError if the checkpoint belongs to another run, CheckpointError if it is damaged.
    """
    text = engine.load_checkpoint(str(checkpoint.parent), checkpoint.name)
    try:
        client_state = json.loads(text)
        state = LoopState(**client_state["loop"])
        stored = dict(client_state["run"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{checkpoint}: it holds no training of 'bitfall glue'") from None
    for name, value in run_identity.items():
        if stored.get(name) != value:
            raise DataError(
                f"{checkpoint}: it was made with {name} {stored.get(name)}, this run has {value};"
                " resume with the same data and flags, or start anew with --overwrite_output_dir"
            )
    return state

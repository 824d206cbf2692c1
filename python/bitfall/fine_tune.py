"""One run of `bitfall glue`, from the model folder to the results."""

from __future__ import annotations

import json
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from bitfall import _core
from bitfall.announcement import show_plan, start_event
from bitfall.arguments import GlueArguments
from bitfall.batches import BatchPlan
from bitfall.checkpoints import checkpoint_to_resume, clear_earlier_run
from bitfall.cli import INTERRUPTED
from bitfall.data import TokenizedData, tokenize
from bitfall.device import choose_device
from bitfall.distributed import abort_on_error
from bitfall.evaluation import evaluate, run_model
from bitfall.flag_values import complete_config
from bitfall.metrics import predictions_from_logits
from bitfall.model_files import has_classifier, resolve_model
from bitfall.outputs import make_output_dir, read_json_object, write_predictions, write_results
from bitfall.problem import load_problem
from bitfall.progress import make_progress
from bitfall.recorder import Recorder
from bitfall.report import write_report
from bitfall.saving import save_model
from bitfall.tensorboard import TensorBoard, log_directories
from bitfall.tokenization import TextEncoder
from bitfall.trainer import Intervals, LoopState, Trainer, load_position
from bitfall.training_log import LOG_NAME, TrainingLog


def fine_tune(arguments: GlueArguments) -> int:
    """Runs on every rank. Returns 0, or INTERRUPTED after a signal with a checkpoint."""
    communicator = _core.make_communicator()
    if communicator.rank != 0:
        warnings.simplefilter("ignore")
    with abort_on_error(communicator):
        return FineTuning(arguments, communicator).run()


class FineTuning:
    """Holds what the stages of a run share; each stage is one method."""

    def __init__(self, arguments: GlueArguments, communicator: _core.Communicator) -> None:
        self.arguments = arguments
        self.communicator = communicator
        self.is_first = communicator.rank == 0
        self.output_dir = Path(arguments.output_dir)
        self.checkpoint = checkpoint_to_resume(arguments) if arguments.do_train else None
        self.model_dir = resolve_model(arguments.model_name_or_path, communicator)
        self.model_config = read_json_object(self.model_dir / "config.json")
        self.problem = load_problem(arguments, self.model_config, communicator)
        self.data = self._tokenize()
        self.config, self.total_steps = complete_config(
            arguments, communicator.world_size, self._steps_at_batch_size
        )
        self.progress = make_progress(communicator.rank)
        for text in self.config.warnings:
            self.progress.message(f"warning: {text}")
        own = json.loads(self.config.json).get("bitfall", {})
        if own.get("native_encoder") is False:
            self.progress.message(
                "warning: bitfall.native_encoder has no effect here: bitfall glue knows no other"
            )

    def run(self) -> int:
        """Trains, evaluates and predicts as the flags ask."""
        if self.is_first:
            make_output_dir(self.output_dir)
        self.communicator.barrier()
        if not self.arguments.do_train and not has_classifier(self.model_dir):
            warnings.warn(
                f"{self.model_dir}: no classifier in it; its scores will be those of a random one",
                stacklevel=1,
            )
        device, reason = choose_device(self.arguments.device, self.communicator)
        self.progress.message(f"device {device}: {reason}")
        self.engine = _core.Engine(
            str(self.model_dir),
            "regression" if self.problem.is_regression else "classification",
            self.problem.num_labels,
            self.config,
            self.communicator,
            device,
        )
        if self.arguments.do_train:
            return self._train_and_report()
        recorder = Recorder(self.config, self.progress, None, None)
        self._evaluate_and_predict(recorder, None)
        return 0

    def _tokenize(self) -> dict[str, dict[str, TokenizedData]]:
        encoder = TextEncoder(self.model_dir, self.model_config, self.arguments.max_seq_length)
        return {
            split: {
                name: tokenize(examples, encoder, self.communicator, self.problem.is_regression)
                for name, examples in sets.items()
            }
            for split, sets in self.problem.splits.items()
        }

    @property
    def _train_data(self) -> TokenizedData:
        return self.data["train"][self.problem.name]

    def _steps_at_batch_size(self, train_batch_size: int) -> int:
        if not self.arguments.do_train:
            return 1
        plan = BatchPlan(len(self._train_data), train_batch_size, 1, 0)
        return plan.total_steps(self.arguments.num_train_epochs, self.arguments.max_steps)

    def _train_and_report(self) -> int:
        plan = BatchPlan(
            len(self._train_data),
            self.config.train_batch_size,
            self.config.train_micro_batch_size_per_gpu,
            self.config.seed,
        )
        identity = self._run_identity()
        state = LoopState()
        if self.checkpoint is not None:
            state = load_position(self.engine, self.checkpoint, identity)
        recorder = self._open_recorder(state)
        trainer = Trainer(
            self.engine,
            self._train_data,
            plan,
            Intervals.from_arguments(self.arguments, self.total_steps),
            self.arguments,
            recorder,
            self.communicator,
            lambda: self._evaluate_set(recorder, trainer, next(iter(self.data["dev"]))),
            identity,
        )
        trainer.state = state
        try:
            self._announce(recorder, plan, state.total_steps)
            return self._train(trainer, recorder)
        finally:
            recorder.close()

    def _train(self, trainer: Trainer, recorder: Recorder) -> int:
        began, first_step = time.perf_counter(), trainer.state.global_step
        finished = trainer.train()
        self.progress.stop()
        metrics = self._train_metrics(trainer, time.perf_counter() - began, first_step)
        if finished:
            save_model(
                self.engine,
                self.problem,
                self.model_dir,
                self.output_dir,
                self.config.quantize_enabled,
                self.communicator,
            )
            trainer.add_metrics(metrics)
            if self.is_first:
                trainer.write_state()
                write_results(self.output_dir, "train", metrics)
            self._evaluate_and_predict(recorder, trainer)
        trainer.take_timings()
        recorder.event(
            "end",
            step=trainer.state.global_step,
            finished=finished,
            metrics=metrics,
            quantization_error=self.engine.quantization_error(),
            quantized_sizes=self.engine.quantized_sizes(),
            memory_bytes=self.engine.memory_bytes(),
            timings=trainer.timings,
        )
        if self.is_first:
            self.progress.message(f"report: {write_report(self.output_dir)}")
        if finished:
            return 0
        self.progress.message(
            f"interrupted after step {trainer.state.global_step}: the checkpoint is in"
            f" {self.output_dir}; go on with the same command and --resume_from_checkpoint true"
        )
        return INTERRUPTED

    def _train_metrics(self, trainer: Trainer, seconds: float, first_step: int) -> dict[str, Any]:
        """Hugging Face's train_... values; the speed is that of this process's steps."""
        steps = trainer.state.global_step - first_step
        samples = steps * self.config.train_batch_size
        return {
            "epoch": trainer.epoch_fraction,
            "train_loss": trainer.state.loss_sum / max(trainer.state.loss_count, 1),
            "train_runtime": round(seconds, 4),
            "train_samples": len(self._train_data),
            "train_samples_per_second": round(samples / max(seconds, 1e-9), 3),
            "train_steps_per_second": round(steps / max(seconds, 1e-9), 3),
        }

    def _run_identity(self) -> dict[str, Any]:
        data = self._train_data
        checksum = 0
        for array in (data.input_ids, data.starts, data.labels):
            checksum = zlib.crc32(np.ascontiguousarray(array).tobytes(), checksum)
        return {
            "task": self.problem.name,
            "labels": list(self.problem.labels),
            "train samples": len(data),
            "train data checksum": checksum,
            "train_batch_size": self.config.train_batch_size,
            "seed": self.config.seed,
        }

    def _open_recorder(self, state: LoopState) -> Recorder:
        """The log is cut back to the checkpoint; without one everything begins anew."""
        if not self.is_first:
            return Recorder(self.config, self.progress, None, None)
        if self.checkpoint is None:
            clear_earlier_run(self.output_dir)
        log = TrainingLog(self.output_dir / LOG_NAME, state.log_offset)
        directories = log_directories(
            self.config, self.output_dir, self.arguments.uses_tensorboard()
        )
        return Recorder(
            self.config, self.progress, log, TensorBoard(directories, state.global_step + 1)
        )

    def _announce(self, recorder: Recorder, plan: BatchPlan, planned_steps: int) -> None:
        """The plan of bits on the screen, and the start event unless the run is resumed."""
        layers = self.engine.num_layers
        states = show_plan(
            recorder.progress, self.config, self.problem, plan, self.total_steps, layers
        )
        if self.checkpoint is not None:
            recorder.progress.message(f"going on from {self.checkpoint}")
            if planned_steps not in (0, self.total_steps):
                recorder.progress.message(
                    f"that run was to have {planned_steps} steps, this one {self.total_steps}: the"
                    " learning rate goes on along the new schedule"
                )
            return
        model = {
            "path": self.arguments.model_name_or_path,
            "num_layers": layers,
            **self.model_config,
        }
        recorder.event(
            "start",
            **start_event(
                self.config,
                self.problem,
                plan,
                states,
                self.total_steps,
                self.communicator.world_size,
                model,
            ),
        )

    def _evaluate_set(
        self, recorder: Recorder, trainer: Trainer | None, name: str
    ) -> dict[str, Any]:
        metrics = evaluate(
            self.engine,
            self.data["dev"][name],
            self.problem.metrics,
            self.problem.is_regression,
            self.arguments.per_device_eval_batch_size,
            self.communicator,
        )
        step = trainer.state.global_step if trainer else 0
        epoch = trainer.epoch_fraction if trainer else 0.0
        recorder.evaluation(step, epoch, name, metrics)
        return metrics

    def _evaluate_and_predict(self, recorder: Recorder, trainer: Trainer | None) -> None:
        combined: dict[str, Any] = {}
        for name, data in self.data.get("dev", {}).items():
            metrics = self._evaluate_set(recorder, trainer, name)
            if trainer:
                metrics["epoch"] = trainer.epoch_fraction
            metrics["eval_samples"] = len(data)
            suffix = "_mm" if name == "mnli-mm" else ""
            combined |= {f"{key}{suffix}": value for key, value in metrics.items()}
        if combined and self.is_first:
            write_results(self.output_dir, "eval", combined)
        for name, data in self.data.get("test", {}).items():
            batch_size = self.arguments.per_device_eval_batch_size
            logits, _ = run_model(self.engine, data, batch_size, self.communicator)
            predictions = predictions_from_logits(logits, self.problem.is_regression)
            if self.is_first:
                path = write_predictions(self.output_dir, name, predictions, self.problem.labels)
                self.progress.message(f"predictions of {name}: {path}")

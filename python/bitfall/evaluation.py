"""Evaluation and prediction: every rank runs its share, all ranks get all logits."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfall.distributed import gather_concatenated, share
from bitfall.metrics import compute_metrics, predictions_from_logits

if TYPE_CHECKING:
    import numpy.typing as npt

    from bitfall._core import Communicator, Engine
    from bitfall.data import TokenizedData


def run_model(
    engine: Engine, data: TokenizedData, batch_size: int, communicator: Communicator
) -> tuple[npt.NDArray[np.float32], float | None]:
    """logits [N, C] f32 in the order of `data`, and the mean loss (None without labels)."""
    mine = share(len(data), communicator.rank, communicator.world_size)
    engine.prepare_evaluation()  # collective, even for a rank without examples
    logits: list[npt.NDArray[np.float32]] = []
    losses: list[float] = []
    for begin in range(mine.start, mine.stop, batch_size):
        examples = range(begin, min(begin + batch_size, mine.stop))
        loss, values = engine.evaluate(data.batch(examples, range(len(examples))))
        logits.append(values)
        losses += [math.nan if loss is None else loss] * len(examples)
    # A rank without examples does not know the number of classes: it sends no rows of any width.
    rows = np.concatenate(logits) if logits else np.zeros((0, 1), np.float32)
    gathered = gather_concatenated(
        communicator,
        {
            "logits": rows.reshape(-1),
            "losses": np.asarray(losses, dtype=np.float64),
        },
    )
    all_logits = gathered["logits"].reshape(len(data), -1)
    return all_logits, float(gathered["losses"].mean()) if data.labels is not None else None


def evaluate(
    engine: Engine,
    data: TokenizedData,
    metric_names: tuple[str, ...],
    is_regression: bool,
    batch_size: int,
    communicator: Communicator,
) -> dict[str, Any]:
    """GLUE's scores, the loss and the time they took, as eval_... under Hugging Face's names."""
    began = time.perf_counter()
    logits, loss = run_model(engine, data, batch_size, communicator)
    assert data.labels is not None  # the readers demand labels for evaluation
    predictions = predictions_from_logits(logits, is_regression)
    scores = compute_metrics(metric_names, predictions, data.labels)
    seconds = time.perf_counter() - began
    batches = math.ceil(len(data) / (batch_size * communicator.world_size))
    return {
        "eval_loss": loss,
        **{f"eval_{name}": value for name, value in scores.items()},
        "eval_runtime": round(seconds, 4),
        "eval_samples_per_second": round(len(data) / seconds, 3),
        "eval_steps_per_second": round(batches / seconds, 3),
    }

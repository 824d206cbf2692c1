"""GLUE's official scores, under the names that Hugging Face gives them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Score = Callable[[npt.NDArray[Any], npt.NDArray[Any]], float]


def compute_metrics(
    names: tuple[str, ...], predictions: npt.NDArray[Any], labels: npt.NDArray[Any]
) -> dict[str, float]:
    """Scores of predictions [N] (label ids, or values for regression) against labels [N].

    Two scores also give their mean as combined_score. A correlation that is undefined, because all
    predictions are equal, is NaN.
    """
    scores = {name: _SCORES[name](labels, predictions) for name in names}
    if len(scores) > 1:
        scores["combined_score"] = float(np.mean(list(scores.values())))
    return scores


def predictions_from_logits(logits: npt.NDArray[np.float32], is_regression: bool) -> Any:
    """logits [N, C] -> label ids [N] int64, or values [N] float32 for regression."""
    return logits[:, 0] if is_regression else np.argmax(logits, axis=1)


def _accuracy(labels: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> float:
    return float(np.mean(labels == predictions))


def _f1(labels: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> float:
    from sklearn.metrics import f1_score  # type: ignore[import-untyped]

    return float(f1_score(labels, predictions, zero_division=0.0))


def _matthews_correlation(labels: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> float:
    from sklearn.metrics import matthews_corrcoef  # type: ignore[import-untyped]

    return float(matthews_corrcoef(labels, predictions))


def _pearson(labels: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> float:
    from scipy.stats import pearsonr  # type: ignore[import-untyped]

    return _correlation(pearsonr, labels, predictions)


def _spearman(labels: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> float:
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    return _correlation(spearmanr, labels, predictions)


def _correlation(function: Any, labels: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> float:
    if len(labels) < 2:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal predictions: the NaN says it
        return float(function(predictions.astype(np.float64), labels.astype(np.float64))[0])


def _mse(labels: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> float:
    return float(np.mean((predictions.astype(np.float64) - labels.astype(np.float64)) ** 2))


_SCORES: dict[str, Score] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews_correlation,
    "pearson": _pearson,
    "spearmanr": _spearman,
    "mse": _mse,
}

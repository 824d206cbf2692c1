"""GLUE's scores, worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from bitfall.metrics import compute_metrics, predictions_from_logits

LABELS = np.array([1, 1, 1, 0, 0, 1])
PREDICTIONS = np.array([1, 1, 0, 0, 1, 1])  # TP 3, FN 1, FP 1, TN 1


def test_accuracy_and_f1_with_their_mean():
    scores = compute_metrics(("accuracy", "f1"), PREDICTIONS, LABELS)
    assert scores == pytest.approx(
        {"accuracy": 4 / 6, "f1": 0.75, "combined_score": (4 / 6 + 0.75) / 2}
    )


def test_matthews_correlation():
    score = compute_metrics(("matthews_correlation",), PREDICTIONS, LABELS)
    # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN))
    assert score == pytest.approx({"matthews_correlation": (3 * 1 - 1) / math.sqrt(4 * 4 * 2 * 2)})


def test_correlations():
    values = np.array([1.0, 2.0, 3.0, 10.0], np.float32)
    scores = compute_metrics(("pearson", "spearmanr"), values, np.array([0.0, 1.0, 2.0, 3.0]))
    assert scores["spearmanr"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(14 / math.sqrt(5 * 50))
    assert scores["combined_score"] == pytest.approx((1 + scores["pearson"]) / 2)


@pytest.mark.filterwarnings("error")
def test_equal_predictions_are_no_crash():
    constant = np.zeros(4, np.float32)
    labels = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    assert math.isnan(compute_metrics(("pearson",), constant, labels)["pearson"])
    zeros = np.zeros(6, np.int64)
    scores = compute_metrics(("matthews_correlation",), zeros, LABELS)
    assert scores == {"matthews_correlation": 0.0}
    assert compute_metrics(("f1",), zeros, LABELS) == {"f1": 0.0}


def test_mse():
    scores = compute_metrics(("mse",), np.array([1.0, 3.0]), np.array([0.0, 1.0]))
    assert scores == {"mse": 2.5}


def test_predictions_from_logits():
    logits = np.array([[0.1, 0.9], [2.0, -1.0]], np.float32)
    assert predictions_from_logits(logits, is_regression=False).tolist() == [1, 0]
    assert predictions_from_logits(logits[:, :1], is_regression=True).tolist() == pytest.approx(
        [0.1, 2.0]
    )

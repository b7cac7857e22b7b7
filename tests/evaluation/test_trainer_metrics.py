"""`compute_metrics` for Trainer: shapes, the shift of the log-odds, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from ehrseq.evaluation import ComputeTaskMetrics, positive_probabilities


def test_probabilities_are_the_softmax_and_do_not_overflow():
    logits = np.array([[0.0, 0.0], [2.0, -1.0], [-800.0, 800.0], [800.0, -800.0]])
    truth = torch.softmax(torch.tensor(logits), dim=1)[:, 1].numpy()
    assert positive_probabilities(logits) == pytest.approx(truth)


def test_the_shift_is_taken_back_per_task():
    # A score of one half after oversampling to 1:1 is the prevalence it came from.
    shift = np.log(0.5 / 0.5) - np.log(0.1 / 0.9)
    scores = positive_probabilities(np.zeros((2, 2)), [0, 1], [0.0, shift])
    assert scores == pytest.approx([0.5, 0.1])


def test_metrics_are_flat_and_per_task():
    rng = np.random.default_rng(0)
    labels, task_ids = rng.integers(0, 2, 400), np.r_[np.zeros(390, int), np.ones(10, int)]
    logits = np.stack([np.zeros(400), labels + rng.normal(size=400)], axis=1)
    compute = ComputeTaskMetrics(["a", "b"], rng.integers(0, 100, 400), num_resamples=20)
    flat = compute(EvalPrediction(predictions=(logits, None), label_ids=(labels, task_ids)))
    assert flat["auroc_a_low"] < flat["auroc_a"] < flat["auroc_a_high"]
    assert flat["auroc_mean"] == flat["auroc_a"]
    assert "auroc_b" not in flat
    assert flat["labels_b"] == 10
    assert all(np.isscalar(value) for value in flat.values())


def test_the_mean_exists_even_when_nothing_is_estimable():
    flat = ComputeTaskMetrics(["a"])(EvalPrediction(np.zeros((4, 2)), (np.zeros(4, int), np.zeros(4, int))))
    assert flat["auroc_mean"] == 0.5


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (EvalPrediction(np.zeros((4, 2)), np.zeros(4, int)), "label_names"),
        (EvalPrediction(np.zeros((5, 2)), (np.zeros(5, int), np.zeros(5, int))), "subject_ids has 4 entries"),
        (EvalPrediction(np.zeros((4, 3)), (np.zeros(4, int), np.zeros(4, int))), r"logits must be \[n, 2\]"),
    ],
)
def test_bad_predictions_are_clear_errors(prediction, message):
    with pytest.raises(ValueError, match=message):
        ComputeTaskMetrics(["a"], np.arange(4))(prediction)


def test_a_shift_without_tasks_is_a_clear_error():
    with pytest.raises(ValueError, match="task_ids"):
        positive_probabilities(np.zeros((1, 2)), None, [0.0])

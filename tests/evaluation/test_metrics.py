"""Metrics against scikit-learn, bootstrap sanity, reports and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from ehrseq.evaluation import (
    Ranking,
    auroc,
    average_precision,
    best_f1_threshold,
    bootstrap_interval,
    choose_thresholds,
    evaluate_tasks,
    f1_score,
    metrics_table,
    patient_weights,
)
from tests.properties import examples


@st.composite
def rows(draw):
    """Labels of both classes and scores on a coarse grid, so that ties are common; integer weights."""
    size = draw(st.integers(2, 40))
    labels = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size).filter(lambda y: 0 < sum(y) < len(y)))
    scores = draw(st.lists(st.integers(-5, 5), min_size=size, max_size=size))
    weights = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    return np.array(labels), np.array(scores) / 10, np.array(weights, dtype=float)


@given(rows())
@examples(150)
def test_metrics_equal_scikit_learn_weighted_and_unweighted(case):
    labels, scores, weights = case
    assert auroc(labels, scores) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)
    truth = sklearn.metrics.average_precision_score(labels, scores)
    assert average_precision(labels, scores) == pytest.approx(truth, abs=1e-12)
    truth = sklearn.metrics.f1_score(labels, scores >= 0.1, zero_division=0)
    assert f1_score(labels, scores, 0.1)[0] == pytest.approx(truth, abs=1e-12)

    ranking = Ranking(labels, scores)
    both = np.stack([np.ones(len(labels)), weights])
    if (weights * labels).sum() > 0 and (weights * (1 - labels)).sum() > 0:
        drawn = {"sample_weight": weights}
        truth = sklearn.metrics.roc_auc_score(labels, scores, **drawn)
        assert ranking.auroc(both)[1] == pytest.approx(truth, abs=1e-12)
        truth = sklearn.metrics.average_precision_score(labels, scores, **drawn)
        assert ranking.average_precision(both)[1] == pytest.approx(truth, abs=1e-12)
        truth = sklearn.metrics.f1_score(labels, scores >= 0.1, zero_division=0, **drawn)
        assert f1_score(labels, scores, 0.1, both)[1] == pytest.approx(truth, abs=1e-12)


@given(rows())
@examples(100)
def test_best_f1_threshold_is_the_best_of_all_thresholds(case):
    labels, scores, _ = case
    best = f1_score(labels, scores, best_f1_threshold(labels, scores))[0]
    every = [sklearn.metrics.f1_score(labels, scores >= t, zero_division=0) for t in np.unique(scores)]
    assert best == pytest.approx(max(every), abs=1e-12)


def test_one_class_has_no_area():
    assert np.isnan(auroc([1, 1], [0.1, 0.2]))
    assert np.isnan(auroc([0, 0], [0.1, 0.2]))
    assert np.isnan(average_precision([0, 0], [0.1, 0.2]))
    assert np.isnan(auroc([], []))
    assert best_f1_threshold([0, 0], [0.1, 0.2]) == 0.5


def test_patient_weights_draw_whole_patients_and_do_not_depend_on_the_chunk():
    subjects = np.array([7, 7, 3, 3, 3, 9, -4])
    weights = np.concatenate(list(patient_weights(subjects, 200, seed=5)))
    assert weights.shape == (200, 7)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 2:5] == weights[:, 2:3]).all()
    per_patient = weights[:, [0, 2, 5, 6]]
    assert (per_patient.sum(axis=1) == 4).all()  # as many patients as there are, with replacement
    assert per_patient.mean(axis=0) == pytest.approx(1, abs=0.25)
    chunked = np.concatenate(list(patient_weights(subjects, 200, seed=5, chunk_cells=21)))
    assert np.array_equal(weights, chunked)
    assert not np.array_equal(weights, np.concatenate(list(patient_weights(subjects, 200, seed=6))))


def test_bootstrap_of_a_mean_has_the_width_of_the_normal_theory():
    values = np.random.default_rng(0).normal(size=2000)
    interval = bootstrap_interval(
        lambda w: np.atleast_1d(values.mean() if w is None else (w @ values) / w.sum(axis=1)), np.arange(2000)
    )
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(2000), rel=0.08)
    assert interval.low < interval.value < interval.high


def test_repeated_rows_of_a_patient_do_not_narrow_the_interval():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 300)
    scores = labels + rng.normal(size=300)
    once = bootstrap_interval(Ranking(labels, scores).auroc, np.arange(300))
    many = [np.repeat(a, 10) for a in (labels, scores, np.arange(300))]
    repeated = bootstrap_interval(Ranking(many[0], many[1]).auroc, many[2])
    assert (repeated.low, repeated.value, repeated.high) == pytest.approx((once.low, once.value, once.high), abs=1e-9)
    rows_as_patients = bootstrap_interval(Ranking(many[0], many[1]).auroc, np.arange(3000))
    assert rows_as_patients.high - rows_as_patients.low < 0.5 * (once.high - once.low)


def test_interval_covers_the_true_area_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    true_area, covered = 0.7602, 0  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for repeat in range(60):
        labels = np.arange(200) % 2
        scores = labels + rng.normal(size=200)
        interval = bootstrap_interval(Ranking(labels, scores).auroc, np.arange(200), num_resamples=300, seed=repeat)
        covered += interval.low <= true_area <= interval.high
    assert 51 <= covered <= 60  # 95 % of 60 is 57


def _mixed_tasks():
    rng = np.random.default_rng(3)
    task_ids = rng.integers(0, 3, 3000)
    labels = np.where(task_ids == 2, 0, rng.random(3000) < 0.3)
    labels[np.flatnonzero(task_ids == 2)[:19]] = 1  # one too few
    scores = np.clip(0.3 + 0.1 * labels + 0.1 * rng.normal(size=3000), 0, 1)
    return labels, scores, task_ids, rng.integers(0, 500, 3000)


def test_tasks_are_separated_and_a_rare_one_is_not_estimable():
    labels, scores, task_ids, subjects = _mixed_tasks()
    results = evaluate_tasks(labels, scores, task_ids, subjects, ["a", "b", "c", "none"], num_resamples=50)
    rows = task_ids == 1
    assert results["b"].auroc.value == pytest.approx(sklearn.metrics.roc_auc_score(labels[rows], scores[rows]))
    assert results["b"].labels == rows.sum()
    assert results["b"].patients == len(np.unique(subjects[rows]))
    assert results["c"].positives == 19
    assert not results["c"].estimable
    assert results["c"].auroc is None
    assert results["none"].reason == "no labels"
    again = evaluate_tasks(labels, scores, task_ids, subjects, ["a", "b", "c", "none"], num_resamples=50)
    assert again == results
    for table in (metrics_table(results, best_possible={"a": 0.9}), metrics_table(results, markdown=True)):
        assert "not estimable" in table
        assert "19" in table
    assert results["a"].to_dict()["auroc"]["low"] < results["a"].auroc.value


def test_one_more_positive_makes_the_task_estimable():
    labels, scores, task_ids, subjects = _mixed_tasks()
    labels[np.flatnonzero(task_ids == 2)[19]] = 1
    assert evaluate_tasks(labels, scores, task_ids, subjects, ["a", "b", "c"], num_resamples=10)["c"].estimable


def test_thresholds_are_chosen_per_task():
    labels, scores, task_ids, _ = _mixed_tasks()
    chosen = choose_thresholds(labels, scores, task_ids, ["a", "b", "c", "none"])
    rows = task_ids == 0
    assert chosen["a"] == best_f1_threshold(labels[rows], scores[rows])
    assert chosen["none"] == 0.5


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.1], "one length"),
        ([[0, 1]], [[0.1, 0.2]], "one-dimensional"),
        ([0, 2], [0.1, 0.2], "labels must be 0 or 1"),
        ([0, -100], [0.1, 0.2], "-100"),
        ([0, 1], [0.1, float("nan")], "finite"),
        ([0, 1], [0.1, float("inf")], "finite"),
    ],
)
def test_bad_scores_are_clear_errors(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        auroc(labels, scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_ids": [0]}, "one entry per row"),
        ({"subject_ids": [0]}, "one entry per row"),
        ({"task_ids": [0, 5]}, "task ids must lie in"),
        ({"task_ids": [0, -1]}, "task ids must lie in"),
    ],
)
def test_bad_tasks_are_clear_errors(change, message):
    arguments = {"task_ids": [0, 0], "subject_ids": [1, 2]} | change
    with pytest.raises(ValueError, match=message):
        evaluate_tasks([0, 1], [0.1, 0.2], task_names=["a"], **arguments)


def test_weights_of_the_wrong_shape_are_a_clear_error():
    with pytest.raises(ValueError, match="weights must be"):
        Ranking([0, 1], [0.1, 0.2]).auroc(np.ones((3, 5)))

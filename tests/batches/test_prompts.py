"""The balancing sampler and the lazy dataset of prompted rows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from ehrseq.batches.balance import balance_rows, limit_rows
from ehrseq.encode.rows import PromptedDataset
from ehrseq.evaluation import positive_probabilities
from tests.properties import examples

TASKS = ["a", "b", "c"]


@st.composite
def tables(draw):
    size = draw(st.integers(1, 80))
    task_ids = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    labels = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    return np.array(task_ids), np.array(labels)


@given(
    tables(),
    st.integers(1, 300),
    st.booleans(),
    st.one_of(st.none(), st.floats(0.05, 0.95)),
    st.integers(0, 3),
)
@examples(200)
def test_what_the_sampler_reports_is_what_it_draws(table, num_rows, balance_tasks, share, seed):
    task_ids, labels = table
    sample = balance_rows(
        task_ids,
        labels,
        TASKS,
        num_rows=num_rows,
        balance_tasks=balance_tasks,
        positive_share=share,
        seed=seed,
    )
    rows = sample.rows
    assert len(rows) == num_rows
    assert rows.min() >= 0
    assert rows.max() < len(labels)
    for task_id, task in enumerate(sample.tasks):
        drawn = rows[task_ids[rows] == task_id]
        there = task_ids == task_id
        assert (task.sampled, task.sampled_positives) == (len(drawn), labels[drawn].sum())
        assert (task.available, task.available_positives) == (there.sum(), labels[there].sum())
        # No row twice before every row of its (task, class) once.
        for value in (0, 1):
            times = np.bincount(drawn[labels[drawn] == value], minlength=len(labels))[there & (labels == value)]
            assert len(times) == 0 or times.max() - times.min() <= 1
        if share is None:
            assert task.log_odds_shift == 0
        elif 0 < task.sampled_positives < task.sampled:
            odds = [p / (1 - p) for p in (task.sampled_prevalence, task.prevalence)]
            assert task.log_odds_shift == pytest.approx(math.log(odds[0] / odds[1]))
    if balance_tasks:
        sizes = [task.sampled for task in sample.tasks if task.available]
        assert max(sizes) - min(sizes) <= 1
    again = balance_rows(
        task_ids, labels, TASKS, num_rows=num_rows, balance_tasks=balance_tasks, positive_share=share, seed=seed
    )
    assert np.array_equal(rows, again.rows)


def _unequal_tasks():
    rng = np.random.default_rng(0)
    task_ids = np.repeat([0, 1, 2], [9000, 900, 300])
    labels = (rng.random(len(task_ids)) < np.array([0.05, 0.3, 0.5])[task_ids]).astype(int)
    return task_ids, labels


def test_tasks_and_classes_are_balanced_and_mixed():
    task_ids, labels = _unequal_tasks()
    sample = balance_rows(task_ids, labels, TASKS, positive_share=0.5, seed=1)
    assert [task.sampled for task in sample.tasks] == [3400] * 3
    assert [task.sampled_prevalence for task in sample.tasks] == [0.5] * 3
    # Every hundred rows hold about a third of each task: 33 +- 4 standard deviations.
    for first in range(0, len(sample.rows) - 100, 100):
        shares = np.bincount(task_ids[sample.rows[first : first + 100]], minlength=3)
        assert shares.min() > 33 - 20
        assert shares.max() < 33 + 20
    assert not np.array_equal(sample.rows, balance_rows(task_ids, labels, TASKS, positive_share=0.5, seed=2).rows)


def test_without_class_balancing_the_prevalence_stays():
    task_ids, labels = _unequal_tasks()
    sample = balance_rows(task_ids, labels, TASKS)
    for task in sample.tasks:
        assert task.sampled_prevalence == pytest.approx(task.prevalence, abs=1 / 3400)
        assert task.log_odds_shift == 0
    kept = balance_rows(task_ids, labels, TASKS, balance_tasks=False)
    assert [task.sampled for task in kept.tasks] == [9000, 900, 300]
    assert np.array_equal(np.sort(kept.rows), np.arange(len(labels)))


def test_scores_are_probabilities_after_the_shift_is_taken_back():
    """The promise of the shift: a model fitted on the balanced rows has mean score = prevalence on all rows."""
    rng = np.random.default_rng(1)
    task_ids = np.repeat([0, 1], [20000, 5000])
    feature = rng.normal(size=len(task_ids))
    chance = 1 / (1 + np.exp(-(1.5 * feature - np.array([4.0, 1.0])[task_ids])))
    labels = (rng.random(len(task_ids)) < chance).astype(int)
    sample = balance_rows(task_ids, labels, ["rare", "common"], positive_share=0.5)

    inputs = np.stack([feature, task_ids], axis=1)
    model = LogisticRegression(C=1e6).fit(inputs[sample.rows], labels[sample.rows])
    logits = np.stack([np.zeros(len(labels)), model.decision_function(inputs)], axis=1)
    raw = positive_probabilities(logits)
    scores = positive_probabilities(logits, task_ids, sample.log_odds_shifts)
    for task_id in (0, 1):
        rows = task_ids == task_id
        assert scores[rows].mean() == pytest.approx(labels[rows].mean(), rel=0.06)
    assert raw[task_ids == 0].mean() > 4 * labels[task_ids == 0].mean()  # without it the rare task is far off


def test_the_shift_goes_into_the_config_by_name():
    task_ids, labels = _unequal_tasks()
    sample = balance_rows(task_ids, labels, TASKS, positive_share=0.5)
    config_tasks = [{"name": name, "token": f"[{name}]"} for name in ("c", "a", "b", "later")]
    stored = sample.store_in(config_tasks)
    shifts = dict(zip(TASKS, sample.log_odds_shifts, strict=True))
    assert [task["log_odds_shift"] for task in stored] == [shifts["c"], shifts["a"], shifts["b"], 0.0]
    assert "log_odds_shift" not in config_tasks[0]
    with pytest.raises(ValueError, match="not in config"):
        sample.store_in(config_tasks[:2])


def test_a_task_with_one_class_or_no_rows_has_no_shift():
    sample = balance_rows([0, 0, 1, 1], [0, 1, 0, 0], TASKS, num_rows=8, positive_share=0.5)
    assert sample.tasks[1].sampled == 4
    assert sample.tasks[1].log_odds_shift == 0
    assert sample.tasks[2].sampled == 0
    assert math.isnan(sample.tasks[2].prevalence)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_ids": [], "labels": []}, "labels in this split"),
        ({"task_ids": [0]}, "one length"),
        ({"task_ids": [0, 3]}, "task ids must lie in"),
        ({"task_ids": [-1, 0]}, "task ids must lie in"),
        ({"labels": [0, 2]}, "labels must be 0 or 1"),
        ({"labels": [0, -100]}, "labels must be 0 or 1"),
        ({"positive_share": 1.0}, "positive_share"),
        ({"positive_share": 0.0}, "positive_share"),
        ({"num_rows": 0}, "num_rows"),
    ],
)
def test_bad_input_is_a_clear_error(change, message):
    arguments = {"task_ids": [0, 1], "labels": [0, 1], "task_names": TASKS} | change
    with pytest.raises(ValueError, match=message):
        balance_rows(**arguments)


class _Histories:
    """The least that an EncodedHistories offers."""

    subject_ids = np.array([11, 22])

    def prompted_row(self, index, row, max_length):
        return {"input_ids": np.arange(index.end[row])[-max_length:], "labels": int(index.label[row])}


class _Index(SimpleNamespace):
    def __len__(self):
        return len(self.history)

    def subset(self, rows):
        return _Index(**{name: values[rows] for name, values in vars(self).items()})


def test_the_dataset_is_lazy_and_knows_its_patients():
    index = _Index(
        history=np.array([0, 0, 1]), end=np.array([2, 5, 3]), label=np.array([0, 1, 0]), task=np.array([0, 1, 1])
    )
    dataset = PromptedDataset(_Histories(), index, max_length=4)
    assert len(dataset) == 3
    assert dataset[1]["input_ids"].tolist() == [1, 2, 3, 4]
    assert dataset[-1]["input_ids"].tolist() == dataset[2]["input_ids"].tolist()
    assert dataset.subject_ids.tolist() == [11, 11, 22]
    repeated = dataset.subset([2, 2, 1])
    assert repeated.subject_ids.tolist() == [22, 22, 11]
    assert repeated.labels.tolist() == [0, 0, 1]
    assert repeated.task_ids.tolist() == [1, 1, 1]
    with pytest.raises(IndexError, match="outside"):
        dataset[3]


def test_rows_that_are_scored_are_limited_by_task():
    rows = SimpleNamespace(task_ids=np.array([0] * 90 + [2] * 7), subset=lambda kept: kept)
    kept = limit_rows(rows, 60, seed=4)
    assert np.bincount(rows.task_ids[kept]).tolist() == [60, 0, 7]
    assert (np.diff(kept) > 0).all()
    assert limit_rows(rows, None, seed=4) is rows

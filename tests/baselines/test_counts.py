"""Token counts against a naive loop over encoded rows, and the models on them against what was planted."""

import builtins
from functools import lru_cache

import numpy as np
import polars as pl
import pytest

from ehrseq.baselines import BoostedCounts, LogisticCounts, count_tokens, token_counts
from ehrseq.batches.prompts import prompted_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.tasks import label_events, load_task
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

TASKS = ("long_stay_7d", "readmission_30d")


@lru_cache
def cohort():
    simulated = simulate(400, seed=4)
    events = simulated.events()
    labels = dict(label_events(events, [load_task(n) for n in TASKS], end_of_data=simulated.end_of_data).labels)
    tasks = [load_task(name).to_config() for name in TASKS]
    return events, labels, EhrTokenizer.train(events, tasks=tasks, min_count=1)


@lru_cache
def rows_of(first, last, task=0, planted=False):
    """Rows of one task of the subjects from `first` to before `last` of the cohort; planted: each one's first row."""
    events, labels, tokenizer = cohort()
    subjects = events["subject_id"].unique().sort()[first:last].implode()
    events = events.filter(pl.col("subject_id").is_in(subjects))
    if planted:  # a code of the past tells the outcome
        labels = {TASKS[task]: labels[TASKS[task]].sort("prediction_time").unique("subject_id", keep="first")}
        outcome = labels[TASKS[task]].filter(pl.col("subject_id").is_in(subjects))
        marks = outcome.filter("boolean_value").select(
            "subject_id",
            time=pl.col("prediction_time") - pl.duration(minutes=1),
            code=pl.lit(planted_code()),
        )
        events = pl.concat([events, marks], how="diagonal").sort("subject_id", "time", nulls_last=False)
    dataset = prompted_dataset(tokenizer, events, labels, max_length=256)
    return dataset.subset(np.flatnonzero(dataset.task_ids == task))


def planted_code():
    """A medication that is rare in the cohort, so that nearly every one of them was planted."""
    events, _, _ = cohort()
    counts = events.filter(pl.col("code").str.starts_with("MEDICATION//"))["code"].value_counts(sort=True)
    return counts["code"][-1]


def test_counts_are_those_of_a_naive_loop(monkeypatch):
    monkeypatch.setattr(token_counts, "TOKENS_AT_ONCE", 1000)  # several parts
    _, _, tokenizer = cohort()
    dataset = rows_of(0, 40)
    matrix, names = count_tokens(dataset)
    assert matrix.shape == (len(dataset), len(tokenizer) + 2)
    long = rows_of(0, 40)
    long.max_length = 100_000  # the whole history in one row
    types = np.asarray(tokenizer.token_types)
    for row in range(len(dataset)):
        tokens = long[row]
        expected = np.zeros(len(tokenizer))
        for token in tokens["input_ids"]:
            expected[token] += types[token] not in (0, 1, 2, 3, 4, 8)
        np.testing.assert_array_equal(matrix[row, :-2].toarray()[0], expected)
        # The ages of the events, not those of the task tokens at either end.
        of_facts = tokens["ages"][np.isin(tokens["token_type_ids"], (2, 3, 5, 6, 7, 9, 10, 11))]
        assert matrix[row, -2] == pytest.approx(of_facts[0], abs=1e-4)
        assert matrix[row, -1] == pytest.approx(tokens["ages"][tokens["ages"] > 0][-2], abs=0.02)
    assert names[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))


def test_nothing_after_the_prediction_time_is_counted():
    dataset = rows_of(0, 60)
    matrix, _ = count_tokens(dataset)
    order = np.argsort(dataset.prediction_times)
    totals = np.asarray(matrix[:, :-2].sum(axis=1)).ravel()
    for subject in np.unique(dataset.subject_ids):
        own = [row for row in order if dataset.subject_ids[row] == subject]
        assert (np.diff(totals[own]) >= 0).all()
        assert len(own) < 2 or totals[own[0]] < totals[own[-1]]


@pytest.mark.parametrize("model", [BoostedCounts, LogisticCounts])
def test_a_planted_code_is_found_and_scores_are_probabilities(model):
    train, tuning, test = rows_of(0, 250, 1, True), rows_of(250, 320, 1, True), rows_of(320, 400, 1, True)
    fitted = model(num_configurations=2).fit(train, tuning)
    scores = fitted.predict_proba(test)
    assert scores.shape == (len(test), 2)
    np.testing.assert_allclose(scores.sum(axis=1), 1.0)
    positives, negatives = scores[test.labels == 1, 1], scores[test.labels == 0, 1]
    assert np.median(positives) > 0.5 > np.median(negatives)
    assert (positives[:, None] > negatives).mean() > 0.95
    assert len(fitted.tried) == 2
    # The class weights' shift is taken back: on the training rows the mean score is the prevalence.
    assert fitted.predict_proba(train)[:, 1].mean() == pytest.approx(train.labels.mean(), abs=0.05)


@pytest.mark.parametrize("model", [BoostedCounts, LogisticCounts])
def test_a_seed_gives_one_model(model):
    scores = [
        model(num_configurations=1, seed=3).fit(rows_of(0, 80), rows_of(80, 100)).predict_proba(rows_of(100, 120))
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize("number", [0, 9, True])
def test_refuses_budgets_no_row_has(number):
    with pytest.raises(ValueError, match="num_configurations got"):
        LogisticCounts(num_configurations=number)


def test_refuses_rows_it_cannot_learn_from():
    train, tuning = rows_of(0, 80), rows_of(80, 100)
    with pytest.raises(ValueError, match="patients are in the training and in the tuning rows"):
        LogisticCounts().fit(train, train)
    with pytest.raises(ValueError, match="0 positives"):
        LogisticCounts().fit(train.subset(np.flatnonzero(train.labels == 0)), tuning)
    with pytest.raises(ValueError, match="not fitted"):
        LogisticCounts().predict_proba(tuning)
    events, labels, tokenizer = cohort()
    with pytest.raises(ValueError, match="are of 2 tasks"):
        LogisticCounts().fit(prompted_dataset(tokenizer, events, labels, 256), tuning)


def test_refuses_rows_of_another_tokenizer():
    events, labels, _ = cohort()
    fitted = LogisticCounts(num_configurations=1).fit(rows_of(0, 80), rows_of(80, 100))
    tasks = [load_task(name).to_config() for name in TASKS]
    other = prompted_dataset(EhrTokenizer.train(events, tasks=tasks, min_count=50), events, labels, 256)
    with pytest.raises(ValueError, match="encode them with the same tokenizer"):
        fitted.predict_proba(other)


def test_names_the_extra_that_is_missing(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "xgboost":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"ehrseq\[boosting\]"):
        BoostedCounts()

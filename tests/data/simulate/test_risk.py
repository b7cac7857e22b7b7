"""The true risk of simulated patients: an independent reading of the rows, calibration, futures, difficulty."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from scipy.stats import rankdata
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from ehrseq.data.simulate.cohort import SIMULATED_TASKS, Simulation, simulate
from ehrseq.data.simulate.process import DiseaseProcess
from ehrseq.data.simulate.random import PatientStreams
from ehrseq.data.simulate.risk import ORDER_DEPENDENT_TASKS
from ehrseq.data.simulate.tables import block_events
from tests.data.simulate import oracle


@pytest.fixture(scope="module")
def cohort() -> tuple[Simulation, pl.DataFrame, dict[str, pl.DataFrame]]:
    simulation = simulate(2500, seed=21, progress=False)
    events = simulation.events()
    return simulation, events, oracle.labels(events, simulation.end_of_data)


@pytest.mark.parametrize("task", SIMULATED_TASKS)
def test_risk_follows_from_the_rows_recorded_up_to_the_prediction_time(cohort, task):
    simulation, events, labels = cohort
    asked = labels[task].filter(pl.col("subject_id") <= 40)
    rows = {
        key[0]: part.to_dicts()
        for key, part in events.filter(pl.col("subject_id") <= 40).group_by("subject_id", maintain_order=True)
    }
    expected = [
        oracle.risk(rows[subject], task, time) for subject, time in asked.select("subject_id", "time").iter_rows()
    ]
    got = simulation.true_risk(task, asked["subject_id"], asked["time"])
    assert len(asked) > 40
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("task", SIMULATED_TASKS)
def test_mean_true_risk_is_the_observed_rate_in_every_fifth(cohort, task):
    simulation, _, labels = cohort
    table = labels[task]
    risk, positive = simulation.true_risk(task, table["subject_id"], table["time"]), table["positive"].to_numpy()
    assert 0.05 <= positive.mean() <= 0.3
    fifth = np.digitize(risk, np.quantile(risk, [0.2, 0.4, 0.6, 0.8]))
    for part in (*(fifth == k for k in range(5)), np.ones(len(risk), dtype=bool)):
        error = np.sqrt((risk[part] * (1 - risk[part])).sum())
        assert abs(positive[part].sum() - risk[part].sum()) < 4 * error


@pytest.mark.parametrize("at_24h", [True, False])
def test_other_futures_of_the_same_past_come_at_the_true_rate(at_24h):
    """Re-draw 150 futures of each past: a label's frequency is the past's true risk (chi-square over the pasts)."""
    futures, pasts = 150, 14
    simulation = simulate(pasts, seed=5, progress=False)
    events = simulation.events()
    first = simulation.admissions().filter(pl.col("alive")).group_by("subject_id", maintain_order=True).first()
    subjects = first["subject_id"].to_numpy()
    # Phases up to the first day of the first admission (phase 0), or up to its discharge (phase 1), are shared.
    patients = np.repeat(subjects - 1, futures)
    streams = PatientStreams(5, patients, np.full(len(patients), 0 if at_24h else 1), np.arange(len(patients)))
    ids = np.arange(len(patients))
    future = block_events(ids, DiseaseProcess(streams, len(patients)).run())
    drawn = oracle.labels(future, simulation.end_of_data)
    tasks = ["long_stay_7d"] if at_24h else [task for task in SIMULATED_TASKS if task != "long_stay_7d"]
    statistic, freedom = dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, 0)
    seen = ["time", "code", "numeric_value", "unit"]
    for place, row in enumerate(first.iter_rows(named=True)):
        now = row["start"] + timedelta(days=1) if at_24h else row["end"]
        upto = pl.col("time") <= now
        past = events.filter((pl.col("subject_id") == row["subject_id"]) & upto).select(seen)
        for copy in (place * futures, (place + 1) * futures - 1):
            assert future.filter((pl.col("subject_id") == copy) & upto).select(seen).equals(past)
        for task in tasks:
            if row[task] is None:
                continue
            copies = pl.col("subject_id").is_between(place * futures, (place + 1) * futures - 1)
            positive = drawn[task].filter(copies & (pl.col("time") == now))["positive"]
            assert len(positive) == futures
            expected = futures * row[task]
            statistic[task] += (positive.sum() - expected) ** 2 / (expected * (1 - row[task]))
            freedom[task] += 1
    for task in tasks:
        assert freedom[task] >= 6, task
        assert statistic[task] < freedom[task] + 5 * np.sqrt(2 * freedom[task]), (task, statistic[task], freedom[task])


def counts(events: pl.DataFrame, table: pl.DataFrame) -> tuple[np.ndarray, list[str]]:
    """What a model of counts sees: the number of each token (binned per code and unit) up to the time, and the age."""
    edges = events.filter(pl.col("numeric_value").is_not_null()).group_by("code", "unit")
    quantiles = edges.agg(
        pl.col("numeric_value").quantile(q).alias(f"q{k}") for k, q in enumerate((0.2, 0.4, 0.6, 0.8))
    )
    binned = events.join(quantiles, on=["code", "unit"], how="left", maintain_order="left").select(
        "subject_id",
        pl.col("time").fill_null(pl.col("time").min()),
        token=pl.format(
            "{} {} {}",
            "code",
            pl.col("unit").fill_null(""),
            pl.sum_horizontal((pl.col("numeric_value") > pl.col(f"q{k}")).cast(pl.Int8) for k in range(4)),
        ),
    )
    names = binned["token"].unique().sort().to_list()
    ids = binned["token"].cast(pl.Enum(names)).to_physical().to_numpy()
    subjects, times = binned["subject_id"].to_numpy(), binned["time"].to_numpy()
    births = dict(events.filter(pl.col("code") == "MEDS_BIRTH").select("subject_id", "time").iter_rows())
    matrix = np.zeros((len(table), len(names) + 1), dtype=np.float32)
    for k, (subject, time) in enumerate(table.select("subject_id", "time").iter_rows()):
        first, last = np.searchsorted(subjects, [subject, subject + 1])
        last = first + np.searchsorted(times[first:last], np.datetime64(time), side="right")
        matrix[k, :-1] = np.bincount(ids[first:last], minlength=len(names))
        matrix[k, -1] = (time - births[subject]).days / 365.25
    return matrix, [*names, "age"]


def areas(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """AUROC of each column in the better direction, by ranks (ties count half)."""
    ranks = rankdata(scores, axis=0)
    ones = positive.sum()
    found = (ranks[positive].mean(axis=0) - (ones + 1) / 2) / (len(positive) - ones)
    return np.maximum(found, 1 - found)


def best_single_and_pair(matrix: np.ndarray, positive: np.ndarray, tokens: int = 40) -> tuple[float, float]:
    """Largest AUROC of one token (count or presence) and of two (sum, difference, their four cells by rate)."""
    present = matrix[:, :-1] > 0
    common = np.flatnonzero((present.mean(axis=0) > 0.005) & (matrix[:, :-1].std(axis=0) > 0))
    single = np.maximum(areas(positive, matrix[:, common]), areas(positive, present[:, common]))
    top = common[np.argsort(-single)[:tokens]]
    pairs = []
    for place, a in enumerate(top):
        for b in top[place + 1 :]:
            cell = 2 * present[:, a] + present[:, b]
            size = np.bincount(cell, minlength=4)
            rates = np.bincount(cell, weights=positive, minlength=4) / np.maximum(size, 1)
            pairs += [matrix[:, a] + matrix[:, b], matrix[:, a] - matrix[:, b], rates[cell]]
    return float(single.max()), float(areas(positive, np.stack(pairs, axis=1)).max())


def test_no_perturbed_score_beats_the_true_risk(cohort):
    simulation, _, labels = cohort
    rng = np.random.default_rng(0)
    for task, table in labels.items():
        risk, positive = simulation.true_risk(task, table["subject_id"], table["time"]), table["positive"].to_numpy()
        best = roc_auc_score(positive, risk)
        logit = np.log(risk / (1 - risk))
        for scale in (0.5, 1.0, 2.0):
            assert roc_auc_score(positive, logit + scale * rng.normal(size=len(logit))) < best
        assert 0.77 <= best <= 0.9, task


@pytest.mark.parametrize("task", ORDER_DEPENDENT_TASKS)
def test_counts_do_not_tell_what_order_tells(cohort, task):
    """Boosting on counts stays 0.04 below the best, no token or pair reaches 0.75 (full size: the slow test)."""
    simulation, events, labels = cohort
    table = labels[task].sample(3500, seed=0)
    matrix, _ = counts(events, table)
    risk, positive = simulation.true_risk(task, table["subject_id"], table["time"]), table["positive"].to_numpy()
    test = table["subject_id"].to_numpy() % 4 == 0
    common = np.flatnonzero((matrix > 0).mean(axis=0) > 0.05)
    model = HistGradientBoostingClassifier(
        max_iter=40, learning_rate=0.12, max_leaf_nodes=15, max_bins=16, random_state=0
    )
    model.fit(matrix[~test][:, common], positive[~test])
    boosted = roc_auc_score(positive[test], model.predict_proba(matrix[test][:, common])[:, 1])
    assert roc_auc_score(positive[test], risk[test]) - boosted >= 0.04
    single, pair = best_single_and_pair(matrix, positive, tokens=12)
    assert single < 0.75
    assert pair < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("task", SIMULATED_TASKS)
def test_difficulty_at_full_size(task):
    """20,000 patients: boosting on counts is far below the best where order carries the risk."""
    xgboost = pytest.importorskip("xgboost")
    simulation = simulate(20_000, seed=22, progress=False)
    events = simulation.events()
    table = oracle.labels(events, simulation.end_of_data)[task]
    matrix, _ = counts(events, table)
    risk, positive = simulation.true_risk(task, table["subject_id"], table["time"]), table["positive"].to_numpy()
    test = table["subject_id"].to_numpy() % 4 == 0
    model = xgboost.XGBClassifier(
        n_estimators=400, max_depth=5, learning_rate=0.04, subsample=0.8, colsample_bytree=0.5, max_bin=32
    )
    model.fit(matrix[~test], positive[~test])
    boosted = roc_auc_score(positive[test], model.predict_proba(matrix[test])[:, 1])
    best = roc_auc_score(positive[test], risk[test])
    assert 0.05 <= positive.mean() <= 0.25
    assert 0.78 <= best <= 0.88
    assert best - boosted >= (0.1 if task in ORDER_DEPENDENT_TASKS else 0.0)
    single, pair = best_single_and_pair(matrix[test], positive[test])
    assert single < 0.75
    assert pair < 0.75


def test_the_labelling_engine_finds_the_same_labels_and_asks_at_known_times(cohort):
    """The engine also keeps whom a death within a horizon that passes the extraction leaves fully observed; the rest is
    the oracle's table.
    """
    from ehrseq.tasks import label_events, load_task

    simulation, events, labels = cohort
    found = label_events(events, list(SIMULATED_TASKS), end_of_data=simulation.end_of_data).labels
    deaths = events.filter(pl.col("code") == "MEDS_DEATH").select("subject_id", pl.col("time").alias("death"))
    for task, expected in labels.items():
        table = found[task]
        assert np.isfinite(simulation.true_risk(task, table["subject_id"], table["prediction_time"])).all()
        renamed = expected.select("subject_id", prediction_time="time", expected="positive")
        both = renamed.join(table, on=["subject_id", "prediction_time"], how="full", coalesce=True)
        extra = both.filter(pl.col("expected").is_null())
        died = extra.join(deaths, on="subject_id", how="left")
        assert (died["death"] > died["prediction_time"]).all()
        assert (died["death"] <= died["prediction_time"] + load_task(task).horizon).all()
        assert len(extra) < 0.01 * len(table)
        kept = both.filter(pl.col("expected").is_not_null())
        assert kept["boolean_value"].to_list() == kept["expected"].to_list(), task

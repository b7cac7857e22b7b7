"""Which events carry the true risk: against the simulator's own risks, and against its formula by hand."""

from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from ehrseq.data.simulate import simulate
from ehrseq.data.simulate.cohort import SIMULATED_TASKS
from ehrseq.data.simulate.risk import RISK_WEIGHTS
from ehrseq.data.simulate.truth import true_changes, true_deltas, true_risk_of

START = datetime(2015, 3, 1, 8)
CANCER, LACTATE, POTASSIUM = "DIAGNOSIS//ICD10CM//C34.90", "LAB//LOINC//2524-7", "LAB//LOINC//2823-3"


@pytest.fixture(scope="module")
def cohort():
    return simulate(60, seed=5, progress=False)


@pytest.fixture(scope="module")
def events(cohort):
    return cohort.events()


def asked(cohort, events, task):
    """(patient's events, time) of questions that have an answer: at discharges and in between."""
    rng = np.random.default_rng(0)
    moments = events.filter(pl.col("time").is_not_null()).group_by("subject_id").agg(pl.col("time").sample(2, seed=1))
    for subject, times in moments.sort("subject_id").rows():
        for time in times:
            if not np.isnan(cohort.true_risk(task, [subject], [time])[0]) and rng.random() < 0.7:
                yield subject, events.filter(pl.col("subject_id") == subject), time


@pytest.mark.parametrize("task", SIMULATED_TASKS)
def test_the_risk_of_a_table_is_the_simulators(cohort, events, task):
    compared = 0
    for subject, record, time in asked(cohort, events, task):
        truth = cohort.true_risk(task, [subject], [time])[0]
        assert true_risk_of(record, task, time) == pytest.approx(truth, rel=1e-5)
        shuffled = record.sample(fraction=1.0, shuffle=True, seed=3)
        assert true_risk_of(shuffled, task, time) == pytest.approx(truth, rel=1e-5)
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("task", ["mortality_30d", "lipid_disorder", "long_stay_7d"])
def test_changes_are_those_of_a_record_without_the_event(cohort, events, task):
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    compared = 0
    for _, record, time in list(asked(cohort, events, task))[:6]:
        truth = true_changes(record, task, time)
        whole = true_risk_of(record, task, time)
        assert truth.risk == pytest.approx(whole)
        held = record["code"].str.contains("^(MEDS_|VISIT_)").to_numpy()
        late = (record["time"] > time).fill_null(False).to_numpy()
        assert (np.isnan(truth.by_event) == (held | late)).all()
        for row in np.random.default_rng(1).choice(np.flatnonzero(~held & ~late), 25):
            rest = record.with_row_index().filter(pl.col("index") != row)
            change = logit(whole) - logit(true_risk_of(rest, task, time))
            assert truth.by_event[row] == pytest.approx(change, abs=1e-9)
            others = record.filter(pl.col("code") != record["code"][int(row)])
            change = logit(whole) - logit(true_risk_of(others, task, time))
            assert truth.by_code[row] == pytest.approx(change, abs=1e-9)
            compared += 1
    assert compared >= 50


def record_of(*rows):
    """A man of 62 in hospital for two days, with rows (code, days after the admission, value, unit)."""
    birth = START - timedelta(days=62 * 365.25)
    base = [("MEDS_BIRTH", birth, None, None), ("VISIT_START//IMP", START, None, None)]
    extra = [(code, START + timedelta(days=days), value, unit) for code, days, value, unit in rows]
    columns = ("code", "time", "numeric_value", "unit")
    rows = [dict(zip(columns, row, strict=True)) for row in base + extra]
    types = {"numeric_value": pl.Float64, "unit": pl.String}
    return pl.DataFrame(rows, schema_overrides=types).with_columns(subject_id=1, visit_id=pl.lit("1-0"))


def test_by_hand():
    time = START + timedelta(days=2)
    record = record_of(
        (LACTATE, 0.5, 1.8, "mmol/L"),  # an earlier reading: it was the latest once
        (CANCER, 0.6, None, None),
        (LACTATE, 1.0, 1.8 * np.exp(0.4), "mmol/L"),  # z = 1
        (POTASSIUM, 1.5, 5.0, "mmol/L"),  # mortality has no weight on it
        (LACTATE, 2.5, 9.0, "mmol/L"),  # later than the question
    )
    truth = true_changes(record, "mortality_30d", time)
    weights = RISK_WEIGHTS["mortality_30d"]
    # Without the latest lactate the one before is read: z = 0, still measured in this visit.
    latest = weights["lactate"] * np.tanh(1.5) * 2 ** (-1.0 / 120)
    expected = [np.nan, np.nan, 0.0, weights["cancer"], latest, 0.0, np.nan]
    np.testing.assert_allclose(truth.by_event, expected, atol=1e-6)
    assert truth.carries.tolist() == [False, False, False, True, True, False, False]
    both = latest + weights["lactate_measured"]
    np.testing.assert_allclose(truth.by_code, [np.nan, np.nan, both, weights["cancer"], both, 0.0, np.nan], atol=1e-6)


def test_a_disease_recorded_twice_is_carried_by_both_records():
    record = record_of((CANCER, 0.5, None, None), (CANCER, 1.0, None, None))
    truth = true_changes(record, "mortality_30d", START + timedelta(days=2))
    np.testing.assert_allclose(truth.by_event[2:], [0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(truth.by_code[2:], [1.4, 1.4], atol=1e-9)
    assert truth.carries[2:].all()


@pytest.mark.parametrize("task", ["mortality_30d", "lipid_disorder"])
def test_deltas_are_those_of_the_record_as_it_grew(cohort, events, task):
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    compared = 0
    for _, record, time in list(asked(cohort, events, task))[:4]:
        deltas = true_deltas(record, task, time)
        known = record.with_row_index().filter(pl.col("time") <= time)["index"].to_list()
        assert np.isnan(np.delete(deltas, known)).all()
        for before, row in list(pairwise(known))[::7]:
            one, other = (true_risk_of(record[: k + 1], task, record["time"][k]) for k in (before, row))
            assert deltas[row] == pytest.approx(logit(other) - logit(one), abs=1e-9, nan_ok=True)
            compared += np.isfinite(deltas[row])
    assert compared > 20


def test_where_there_is_no_answer_nothing_changes_it():
    record = record_of((CANCER, 0.5, None, None))
    truth = true_changes(record, "mortality_30d", START - timedelta(days=1))
    assert np.isnan(truth.risk)
    assert np.isnan(truth.by_event).all()
    assert not truth.carries.any()


@pytest.mark.parametrize(
    ("change", "task", "message"),
    [
        (lambda e: e, "in_hospital_mortality", "expected one of"),
        (lambda e: e.drop("code"), "mortality_30d", r"lack the columns \['code'\]"),
        (lambda e: e.with_columns(subject_id=pl.int_range(pl.len())), "mortality_30d", "of 3 patients"),
    ],
)
def test_bad_input_is_told(change, task, message):
    with pytest.raises(ValueError, match=message):
        true_changes(change(record_of((CANCER, 0.5, None, None))), task, START + timedelta(days=2))

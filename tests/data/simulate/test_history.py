"""True risks at any time: an independent reading of the rows, what bears on them, calibration, bad questions."""

from __future__ import annotations

import math
import time
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from ehrseq.data.simulate.codes import MEASUREMENTS, VOCABULARY
from ehrseq.data.simulate.cohort import SIMULATED_TASKS, Simulation, simulate
from ehrseq.data.simulate.history import RecordedHistory
from ehrseq.data.simulate.state import NEVER, STATIC, UNITS, minutes_of
from tests.data.simulate import oracle

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
DISCHARGE_TASKS = [task for task in SIMULATED_TASKS if task != "long_stay_7d"]


@pytest.fixture(scope="module")
def cohort() -> tuple[Simulation, pl.DataFrame]:
    simulation = simulate(2500, seed=21, progress=False)
    return simulation, simulation.admissions()


def questions(simulation: Simulation, subjects: int) -> tuple[dict[int, list[dict]], list[tuple[int, datetime]]]:
    """Rows of some patients by subject, and times to ask at: random ones, the edges of stays, lives and the data."""
    rng = np.random.default_rng(1)
    few = simulate(subjects, simulation.seed, progress=False)
    rows = {key[0]: part.to_dicts() for key, part in few.events().group_by("subject_id", maintain_order=True)}
    asked = []
    for subject, own in rows.items():
        timed = [row["time"] for row in own if row["time"] is not None]
        asked += [(subject, timed[k]) for k in rng.integers(0, len(timed), 12)]
        span = (timed[-1] - timed[1]) / MINUTE
        asked += [(subject, timed[1] + int(share * span) * MINUTE) for share in rng.uniform(0, 1.2, 12)]
        edges = [
            row["time"] for row in own if row["code"] in ("VISIT_START//IMP", "MEDS_DEATH", *oracle.DISCHARGE_CODES)
        ]
        asked += [
            (subject, edge + step) for edge in edges[:6] for step in (-MINUTE, 0 * MINUTE, MINUTE, DAY, 90 * HOUR)
        ]
        asked += [(subject, oracle.END_OF_DATA), (subject, oracle.END_OF_DATA + MINUTE), (subject, timed[0])]
    return rows, asked


@pytest.mark.parametrize("task", SIMULATED_TASKS)
def test_risk_at_any_time_follows_from_the_rows_recorded_up_to_then(cohort, task):
    simulation, _ = cohort
    rows, asked = questions(simulation, 20)
    got = simulation.true_risk(task, [subject for subject, _ in asked], [when for _, when in asked])
    expected = np.array([oracle.risk(rows[subject], task, when) for subject, when in asked])
    answered = np.isfinite(expected)
    assert 40 < answered.sum() < len(asked) - 40
    np.testing.assert_array_equal(np.isfinite(got), answered)
    np.testing.assert_allclose(got[answered], expected[answered], atol=2e-5)


@pytest.mark.parametrize("task", SIMULATED_TASKS)
def test_at_a_prediction_time_it_is_the_risk_of_the_label(cohort, task):
    """Equal but for the last bit, which depends on how many rows a matrix product has."""
    simulation, admissions = cohort
    table = admissions.filter(pl.col(task).is_not_null())
    when = table["start"] + DAY if task == "long_stay_7d" else table["end"]
    got = simulation.true_risk(task, table["subject_id"], when)
    np.testing.assert_allclose(got, table[task].to_numpy(), rtol=1e-14)
    # Of who is discharged alive, only the diagnosed have no risk of a new condition.
    without = admissions.filter(pl.col(task).is_null() & pl.col("alive"))
    if task not in ("long_stay_7d", "mortality_30d", "readmission_30d"):
        assert len(without) > 100
        assert np.isnan(simulation.true_risk(task, without["subject_id"], without["end"])).all()


def test_nothing_after_the_time_bears_on_the_risk():
    simulation = simulate(150, seed=8, progress=False)
    _, block = next(simulation.iter_blocks())
    patients, whole = np.arange(150), RecordedHistory(block.events, 150)
    rng = np.random.default_rng(0)
    answered = dict.fromkeys(SIMULATED_TASKS, 0)
    moments = rng.integers(minutes_of("2012-01-01"), minutes_of("2022-01-01"), 25)
    starts = block.admissions["start"]  # else hardly anybody is in hospital
    for now in (*moments, *(rng.choice(starts[starts < minutes_of("2021-12-20")], 25) + 1000)):
        known = block.events["minutes"] <= now
        upto = RecordedHistory({name: column[known] for name, column in block.events.items()}, 150)
        for task in SIMULATED_TASKS:
            risks = whole.risk(task, patients, np.full(150, now))
            np.testing.assert_array_equal(upto.risk(task, patients, np.full(150, now)), risks)
            answered[task] += int(np.isfinite(risks).sum())
    assert min(answered.values()) > 15, answered


def history(*rows: tuple[str, str, float, str]) -> RecordedHistory:
    """One woman born in 1950 with an outpatient visit in May 2014, and further (time, code, value, unit) rows."""
    visit = [("2014-05-01T10:00", "VISIT_START//AMB"), ("2014-05-01T10:30", "VISIT_END//AMB")]
    first = [(None, "GENDER//F"), ("1950-01-01T00:00", "MEDS_BIRTH"), *visit]
    table = [*((when, code, math.nan, "") for when, code in first), *rows]
    encounters = {"AMB": 0, "IMP": 1, "home": 1, "EMER": 2}
    return RecordedHistory(
        {
            "row": np.zeros(len(table), np.int32),
            "minutes": np.array([STATIC if when is None else minutes_of(when) for when, *_ in table]),
            "code": np.array([VOCABULARY.index[code] for _, code, _, _ in table], np.int32),
            "value": np.array([value for *_, value, _ in table]),
            "unit": np.array([UNITS.index(unit) for *_, unit in table], np.int16),
            "encounter": np.array(
                [encounters.get(code.split("//")[1], -1) if "//" in code else -1 for _, code, *_ in table]
            ),
        },
        1,
    )


def at(recorded: RecordedHistory, task: str, *times: str) -> list[float]:
    return recorded.risk(task, np.zeros(len(times), np.int64), np.array([minutes_of(when) for when in times])).tolist()


def logit(risk: float) -> float:
    return math.log(risk / (1 - risk))


def test_a_reading_moves_the_risk_by_its_weight_and_its_age_fades_it():
    """Log-odds by hand: lactate 1.2 tanh(1.5 z) 2^(-days / 120) + 0.4 once measured, z = ln(v / 1.8) / 0.4."""
    admitted = ("2014-06-01T08:00", "VISIT_START//IMP", math.nan, "")
    lactate = ("2014-06-01T12:00", "LAB//LOINC//2524-7", 3.6, "mmol/L")
    home = ("2014-06-03T12:00", "VISIT_END//home", math.nan, "")
    recorded = history(admitted, lactate, home)
    before, then, later, much_later = at(
        recorded, "mortality_30d", "2014-06-01T11:59", "2014-06-01T12:00", "2014-06-03T12:00", "2014-09-29T12:00"
    )
    z = math.log(3.6 / 1.8) / 0.4
    age = 0.8 / 14 / 365.25  # log-odds per day
    jump = 0.4 + 1.2 * math.tanh(1.5 * z)
    assert logit(then) - logit(before) == pytest.approx(jump + age / 1440, abs=1e-9)
    faded = 1.2 * math.tanh(1.5 * z) * (1 - 2 ** (-2 / 120))
    assert logit(later) - logit(then) == pytest.approx(2 * age - faded, abs=1e-9)
    halved = 1.2 * math.tanh(1.5 * z) * 0.5  # at home the risk goes on to fade
    assert logit(much_later) - logit(then) == pytest.approx(120 * age - halved, abs=1e-9)
    # A row that bears on nothing moves nothing; a reading of an outpatient visit does.
    for extra, moves in (("LAB//LOINC//2160-0", False), ("LAB//LOINC//718-7", True)):
        other = history(admitted, lactate, home, ("2014-08-01T10:00", extra, 5.0, "mg/dL" if not moves else "g/dL"))
        changed = at(other, "mortality_30d", "2014-09-29T12:00")[0] != much_later
        assert changed is moves


def test_a_long_stay_is_ever_more_likely_while_the_stay_goes_on():
    """A short stay of 29 + 127 u^1.6 hours goes on at hour h with probability 1 - ((h - 29) / 127)^(1/1.6)."""
    times = ["2014-06-01T20:00", *(f"2014-06-{day:02d}T08:00" for day in range(2, 9))]
    admitted = ("2014-06-01T08:00", "VISIT_START//IMP", math.nan, "")
    risks = at(history(admitted), "long_stay_7d", *times)
    day_one = risks[1]
    hours = 72 + 1 / 60  # still open at 72 h: it does not end before the next minute
    goes_on = 1 - ((hours - 29) / 127) ** (1 / 1.6)
    assert risks[3] == pytest.approx(day_one / (day_one + (1 - day_one) * goes_on), abs=1e-12)
    assert risks[1:7] == sorted(risks[1:7])
    assert risks[-2] < 1
    assert math.isnan(risks[-1])  # after 168 hours nothing is left to foretell
    # What is recorded after 24 hours comes after the draw; a reading of the first day bears on it.
    late, early = (f"2014-06-{day}T12:00" for day in ("02", "01"))
    fast = ("VITAL//LOINC//8867-4", 120.0, "/min")
    assert at(history(admitted, (late, *fast)), "long_stay_7d", *times)[:7] == risks[:7]
    assert all(
        a > b for a, b in zip(at(history(admitted, (early, *fast)), "long_stay_7d", *times)[:6], risks, strict=False)
    )
    over = history(admitted, ("2014-06-03T12:00", "VISIT_END//home", math.nan, ""))
    assert [math.isnan(risk) for risk in at(over, "long_stay_7d", "2014-06-03T11:59", "2014-06-03T12:00")] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("task", "when", "answers"),
    [
        ("mortality_30d", "1949-12-31T23:59", False),  # before birth
        ("mortality_30d", "2014-05-20T00:00", False),  # no admission yet
        ("mortality_30d", "2014-06-01T07:59", False),
        ("mortality_30d", "2014-06-01T08:00", True),  # the admission begins
        ("long_stay_7d", "2014-06-01T07:59", False),
        ("long_stay_7d", "2014-06-01T08:00", True),
        ("long_stay_7d", "2014-06-04T08:00", False),  # discharged
        ("hypertension", "2014-06-01T09:59", True),
        ("hypertension", "2014-06-01T10:00", False),  # diagnosed
        ("fluid_disorder", "2014-06-01T10:00", True),
        ("readmission_30d", "2015-01-01T00:00", True),  # at home
        ("readmission_30d", "2016-02-29T23:58", True),
        ("readmission_30d", "2016-02-29T23:59", False),  # dead
        ("mortality_30d", "2022-01-01T00:00", False),
    ],
)
def test_there_is_no_answer_where_nothing_is_open_or_nothing_known(task, when, answers):
    recorded = history(
        ("2014-06-01T08:00", "VISIT_START//IMP", math.nan, ""),
        ("2014-06-01T10:00", "DIAGNOSIS//ICD10CM//I10", math.nan, ""),
        ("2014-06-03T08:00", "VISIT_END//home", math.nan, ""),
        ("2016-02-29T23:59", "MEDS_DEATH", math.nan, ""),
    )
    assert math.isfinite(at(recorded, task, when)[0]) is answers


def test_a_patient_without_rows_has_no_risk():
    empty = {
        name: np.empty(0, np.float64 if name == "value" else np.int64)
        for name in ("row", "minutes", "code", "value", "unit", "encounter")
    }
    recorded = RecordedHistory(empty, 3)
    assert (recorded.death == NEVER).all()
    for task in SIMULATED_TASKS:
        assert np.isnan(recorded.risk(task, np.arange(3), np.full(3, minutes_of("2015-01-01")))).all()


def assert_calibrated(risk: np.ndarray, positive: np.ndarray) -> None:
    """The number of positives is the sum of the risks, in all and in every fifth by risk."""
    assert np.isfinite(risk).all()
    fifth = np.digitize(risk, np.quantile(risk, [0.2, 0.4, 0.6, 0.8]))
    for part in (*(fifth == k for k in range(5)), np.ones(len(risk), dtype=bool)):
        error = np.sqrt((risk[part] * (1 - risk[part])).sum())
        assert abs(positive[part].sum() - risk[part].sum()) <= 4 * error + 1e-6


def check_calibration(simulation: Simulation, tasks: list[str]) -> None:
    """Where a label exists: between the last reading of a stay and the discharge, and at many hours of long stays."""
    events = simulation.events()
    labels = oracle.labels(events, simulation.end_of_data)
    stays = simulation.admissions().select("subject_id", "start", "end")
    readings = events.filter(pl.col("code").is_in([code for channel in MEASUREMENTS for code in channel.codes]))
    readings = readings.select("subject_id", "time", last="time").sort("time")
    for task in tasks:
        table = labels[task].sort("time")
        positive = table["positive"].to_numpy()
        if task != "long_stay_7d":
            # Half-way: nothing that bears on the draw is recorded any more, but for hours or days of fading.
            last = table.join_asof(readings, on="time", by="subject_id", check_sortedness=False)["last"]
            risk = simulation.true_risk(task, table["subject_id"], last + (table["time"] - last) / 2)
            assert (table["time"] - last).median() > 5 * HOUR
            assert_calibrated(risk, positive)
            continue
        starts = table.with_columns(start=pl.col("time") - DAY)
        ends = starts.join(stays, on=["subject_id", "start"], maintain_order="left")["end"]
        for hours in (23, 30, 48, 72, 100, 130, 150, 160):
            now = starts["start"] + hours * HOUR
            risk = simulation.true_risk(task, table["subject_id"], now)
            goes_on = (ends > now).to_numpy()
            assert_calibrated(risk[goes_on], positive[goes_on])


def test_risks_between_prediction_times_are_calibrated(cohort):
    check_calibration(cohort[0], list(SIMULATED_TASKS))


@pytest.mark.slow
def test_many_questions_on_twenty_thousand_patients_are_calibrated_and_quick():
    simulation = simulate(20_000, seed=23, progress=False)
    check_calibration(simulation, list(SIMULATED_TASKS))
    rng = np.random.default_rng(0)
    subjects = rng.integers(1, 20_001, 100_000)
    times = np.datetime64("2012-01-01", "us") + rng.integers(0, 3650 * 86_400_000_000, 100_000).astype(
        "timedelta64[us]"
    )
    begin = time.process_time()
    risk = simulation.true_risk("readmission_30d", subjects, times)
    assert time.process_time() - begin < 5  # measured: 0.3 s; all patients are simulated by now
    assert np.isfinite(risk).mean() > 0.4


def test_every_form_of_a_time_is_the_same_question(cohort):
    simulation, admissions = cohort
    row = admissions.filter(pl.col("alive")).row(0, named=True)
    subject, when = row["subject_id"], row["end"]
    forms = [
        [when],
        [when.replace(tzinfo=UTC)],
        np.array([when], dtype="datetime64[us]"),
        pl.Series([when]),
        pl.Series([when]).cast(pl.Datetime("ns")),
        pl.Series([when + timedelta(seconds=59)]),
    ]
    for form in forms:
        assert simulation.true_risk("mortality_30d", [subject], form)[0] == pytest.approx(row["mortality_30d"])
    assert simulation.true_risk("mortality_30d", [], []).shape == (0,)


def test_a_cohort_is_simulated_chunk_by_chunk_as_it_is_asked_for():
    whole = simulate(30, seed=4, progress=False)
    pieces = simulate(30, seed=4, chunk_size=7, progress=False)
    tail = simulate(10, seed=4, first_patient=20, progress=False)
    subjects, times = np.repeat(np.arange(30, 20, -1), 2), [datetime(2014, 3, 1), datetime(2017, 8, 1)] * 10
    expected = whole.true_risk("readmission_30d", subjects, times)
    assert np.isfinite(expected).any()
    for other in (pieces, tail):
        np.testing.assert_allclose(other.true_risk("readmission_30d", subjects, times), expected, rtol=1e-12)
    assert sorted(pieces._histories) == [2, 3, 4]


@pytest.mark.parametrize(
    ("task", "subjects", "times", "message"),
    [
        ("sepsis", [1], [datetime(2015, 1, 1)], "task 'sepsis'; expected one of"),
        ("mortality_30d", [1, 2], [datetime(2015, 1, 1)], "2 subject_ids and 1 times"),
        ("mortality_30d", [6], [datetime(2015, 1, 1)], "not in this cohort, the first: 6; expected 1 to 5"),
        ("mortality_30d", [0, -3], [datetime(2015, 1, 1)] * 2, "2 subject_ids that are not in this cohort"),
        ("mortality_30d", [1.5], [datetime(2015, 1, 1)], "subject_ids of type Float64"),
        ("mortality_30d", ["1"], [datetime(2015, 1, 1)], "subject_ids of type String"),
        ("mortality_30d", [None, 1], [datetime(2015, 1, 1)] * 2, "integers without nulls"),
        ("mortality_30d", [1], [None], "times of type Null, 1 of 1 null"),
        ("mortality_30d", [1], ["2015-01-01"], "times of type String"),
        ("mortality_30d", [1], [date(2015, 1, 1)], "a date and a time each"),
        ("mortality_30d", [1], [20150101], "times of type Int64"),
    ],
)
def test_bad_questions_are_refused(task, subjects, times, message):
    with pytest.raises(ValueError, match=message):
        simulate(5, seed=1).true_risk(task, subjects, times)

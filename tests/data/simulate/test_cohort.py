"""The simulated cohort: reproducible whatever its size, and with the traits of real records."""

from __future__ import annotations

import zlib
from datetime import datetime

import numpy as np
import polars as pl
import pytest

from ehrseq.data.schema import EVENT_SCHEMA, validate_events
from ehrseq.data.simulate.codes import VOCABULARY
from ehrseq.data.simulate.cohort import SIMULATED_TASKS, SIMULATOR_VERSION, simulate
from ehrseq.data.simulate.random import PatientStreams, poisson_from_uniform


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    return simulate(1200, seed=31, progress=False).events()


def test_same_seed_gives_the_same_rows_another_seed_others():
    rows = simulate(6, seed=1, progress=False).events()
    assert rows.equals(simulate(6, seed=1, progress=False).events())
    assert not rows.equals(simulate(6, seed=2, progress=False).events())


@pytest.mark.parametrize("options", [{"chunk_size": 3}, {"num_patients": 25}, {"num_patients": 4, "first_patient": 5}])
def test_a_patient_does_not_depend_on_the_cohort(options):
    expected = simulate(9, seed=3, progress=False).events()
    got = simulate(options.pop("num_patients", 9), seed=3, progress=False, **options).events()
    shared = pl.col("subject_id").is_between(6, 9)
    assert got.filter(shared).equals(expected.filter(shared))
    assert got.filter(shared)["subject_id"].n_unique() == 4


def test_a_version_of_the_simulator_is_one_stream_of_patients():
    """If this fails, seeds give other patients than before: raise SIMULATOR_VERSION and say so, or undo the change."""
    rows = simulate(20, seed=0, progress=False).events()
    digest = zlib.crc32("\n".join(rows["code"]).encode())
    assert (SIMULATOR_VERSION, len(rows), digest) == ("1.0", 8066, 4106727091)


def test_random_numbers_are_uniform_and_unrelated():
    streams = PatientStreams(0, np.arange(20_000))
    rows = np.arange(20_000)
    columns = np.concatenate(
        [streams.uniform(rows, 0, "a", 3), streams.uniform(rows, 1, "a", 3), streams.uniform(rows, 0, "b")[:, None]],
        axis=1,
    )
    assert abs(columns.mean() - 0.5) < 0.003
    assert abs(columns.var() - 1 / 12) < 0.002
    correlation = np.corrcoef(columns.T) - np.eye(7)
    assert np.abs(correlation).max() < 0.03
    assert np.abs(np.corrcoef(columns[:-1, 0], columns[1:, 0])[0, 1]) < 0.03
    assert 0 < columns.min() < 1e-3
    assert 1 - 1e-3 < columns.max() < 1


def test_poisson_counts_have_mean_and_variance():
    uniforms = (np.arange(10_000) + 0.5) / 10_000
    counts = poisson_from_uniform(uniforms, np.full(10_000, 3.0), 24)
    assert counts.mean() == pytest.approx(3.0, abs=0.01)
    assert counts.var() == pytest.approx(3.0, abs=0.05)
    assert poisson_from_uniform(uniforms, np.full(10_000, 3.0), 4).max() == 4


def test_rows_are_the_table_of_the_contract(events):
    assert dict(events.schema) == dict(EVENT_SCHEMA)
    assert validate_events(events).equals(events)
    assert not events.is_duplicated().any()
    statics = events.filter(pl.col("time").is_null())
    assert set(statics["code"].str.split("//").list.first()) == {"GENDER", "RACE"}
    born = events.filter(pl.col("code") == "MEDS_BIRTH")
    assert born["subject_id"].to_list() == list(range(1, 1201))
    assert events["time"].max() <= simulate(1).end_of_data == datetime(2022, 1, 1)


def test_nothing_follows_death(events):
    died = events.filter(pl.col("code") == "MEDS_DEATH").select("subject_id", died="time")
    after = events.join(died, on="subject_id").filter(pl.col("time") > pl.col("died"))
    assert len(died) > 100
    assert len(after) == 0
    last = events.group_by("subject_id", maintain_order=True).last().join(died, on="subject_id")
    assert set(last["code"]) == {"MEDS_DEATH"}


def test_histories_are_long_irregular_and_span_years(events):
    sizes = events.group_by("subject_id").len()["len"]
    assert sizes.median() >= 200
    visits = events.filter(pl.col("code").is_in(["VISIT_START//AMB", "VISIT_START//EMER", "VISIT_START//IMP"]))
    years = visits.group_by("subject_id").agg(
        ((pl.col("time").max() - pl.col("time").min()).dt.total_days() / 365.25).alias("years")
    )["years"]
    assert years.median() > 2
    gaps = visits.select(pl.col("time").diff().over("subject_id").dt.total_days().alias("gap")).drop_nulls()["gap"]
    assert gaps.std() > 0.8 * gaps.mean()  # 1 for a Poisson process, 0 for a clock


def test_codes_are_many_and_zipf_distributed(events):
    assert events["code"].n_unique() >= 500
    background = {VOCABULARY.codes[k] for k in VOCABULARY.background}
    sizes = (
        events.filter(pl.col("code").is_in(list(background)))["code"]
        .value_counts()["count"]
        .sort(descending=True)
        .to_numpy()
    )
    ranks = np.arange(1, 301)
    slope = np.polyfit(np.log(ranks), np.log(sizes[:300]), 1)[0]
    assert -1.25 < slope < -0.8


def test_a_laboratory_test_comes_in_several_units(events):
    units = (
        events.filter(pl.col("code") == "LAB//LOINC//2345-7")
        .group_by("unit")
        .agg(pl.len(), pl.col("numeric_value").median())
    )
    found = {unit: (count, median) for unit, count, median in units.iter_rows()}
    assert set(found) == {"mg/dL", "mmol/L"}
    assert 0.15 < found["mmol/L"][0] / found["mg/dL"][0] < 0.6
    assert found["mg/dL"][1] / found["mmol/L"][1] == pytest.approx(18, rel=0.05)


def test_rows_arrive_after_discharge_and_still_name_their_stay(events):
    ends = events.filter(pl.col("code").is_in(["VISIT_END//home", "VISIT_END//snf", "VISIT_END//hosp"])).select(
        "visit_id", end="time"
    )
    late = events.join(ends, on="visit_id").filter(pl.col("time") > pl.col("end"))
    assert len(late) > 200
    assert set(late["text_value"]) == {"positive", "negative"}


def test_emergency_visits_overlap_admissions_and_intensive_care_is_nested(events):
    def spans(name: str, ends: list[str]) -> pl.DataFrame:
        start = events.filter(pl.col("code") == f"VISIT_START//{name}").select("subject_id", "visit_id", start="time")
        end = events.filter(pl.col("code").is_in(ends)).select("visit_id", end="time")
        return start.join(end, on="visit_id")

    stays = spans("IMP", ["VISIT_END//home", "VISIT_END//snf", "VISIT_END//hosp", "VISIT_END//exp"])
    emergency = spans("EMER", ["VISIT_END//EMER"])
    both = stays.join(emergency, on="subject_id", suffix="_er")
    overlapping = both.filter((pl.col("start_er") < pl.col("start")) & (pl.col("end_er") > pl.col("start")))
    assert 0.5 < len(overlapping) / len(stays) < 0.7
    other = both.filter((pl.col("start_er") < pl.col("end")) & (pl.col("end_er") > pl.col("start")))
    assert len(other) == len(overlapping)
    care = (
        events.filter(pl.col("code") == "VISIT_START//ACUTE")
        .select("visit_id", began="time")
        .join(stays, on="visit_id")
    )
    assert len(care) > 100
    assert care.select(((pl.col("began") > pl.col("start")) & (pl.col("began") < pl.col("end"))).all()).item()


def test_what_is_measured_depends_on_how_ill_a_patient_is(events):
    """Informative missingness: lactate is measured in more stays of patients with more coded chronic diseases."""
    chronic = ["I50.9", "J44.9", "E11.9", "N18.30", "C34.90", "I48.91", "F03.90", "K74.60", "E66.9", "F32.9"]
    burden = events.filter(pl.col("code").is_in([f"DIAGNOSIS//ICD10CM//{code}" for code in chronic]))
    burden = burden.group_by("subject_id").agg(burden=pl.col("code").n_unique())
    stays = events.filter(pl.col("code") == "VISIT_START//IMP").select("subject_id", "visit_id")
    measured = (
        events.filter(pl.col("code") == "LAB//LOINC//2524-7")
        .select("visit_id")
        .unique()
        .with_columns(measured=pl.lit(True))
    )
    stays = stays.join(burden, on="subject_id", how="left").join(measured, on="visit_id", how="left")
    stays = stays.with_columns(pl.col("burden").fill_null(0), pl.col("measured").fill_null(False))
    ill, well = (
        stays.filter(pl.col("burden") >= 4)["measured"].mean(),
        stays.filter(pl.col("burden") <= 1)["measured"].mean(),
    )
    assert ill > well + 0.05


def test_every_task_has_dozens_of_positives_among_two_thousand_patients():
    admissions = simulate(2000, seed=32, progress=False).admissions()
    for task in SIMULATED_TASKS:
        assert admissions[task].sum() > 150, task


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_patients": 0}, "num_patients got 0"),
        ({"num_patients": -3}, "num_patients got -3"),
        ({"num_patients": 2.5}, "num_patients got 2.5"),
        ({"num_patients": True}, "num_patients got True"),
        ({"num_patients": 2, "seed": -1}, "seed got -1"),
        ({"num_patients": 2, "seed": "a"}, "seed got 'a'"),
        ({"num_patients": 2, "first_patient": -1}, "first_patient got -1"),
        ({"num_patients": 2, "chunk_size": 0}, "chunk_size got 0"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        simulate(**options)

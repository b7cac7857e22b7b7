"""Numbers of fidelity where they are known: equal patients, and others that share nothing."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from ehrseq.data.simulate.cohort import simulate
from ehrseq.forecasting.fidelity import fidelity, ks_distance, told_apart, transfer
from ehrseq.forecasting.patient_counts import PatientCounts
from ehrseq.tasks.labelling import label_events


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    return simulate(240, seed=9, progress=False).events()


def test_equal_patients_are_alike(events: pl.DataFrame) -> None:
    found = fidelity(events, events)
    assert found.divergence == pytest.approx(0.0, abs=1e-12)
    assert found.prevalence_rank == pytest.approx(1.0)
    assert found.prevalence_difference == 0.0
    assert found.co_occurrence == pytest.approx(1.0)
    assert set(found.distances.values()) == {0.0}
    assert found.values[:2] == (0.0, 0.0)
    assert found.values[2] > 5
    # A tested row's twin stands in training under the other class: what is learned by heart is wrong.
    assert found.apart < 0.52


def test_two_samples_of_one_process_are_nearly_alike(events: pl.DataFrame) -> None:
    halves = [events.filter(pl.col("subject_id") % 2 == part) for part in range(2)]
    found = fidelity(*halves)
    assert found.apart == pytest.approx(0.5, abs=0.1)  # 120 against 120: a standard error of 0.037
    assert found.divergence < 0.05
    assert found.co_occurrence > 0.5
    assert max(found.distances.values()) < 0.25


def test_patients_who_share_no_code_are_told_apart(events: pl.DataFrame) -> None:
    others = events.with_columns(
        pl.when(pl.col("code").str.starts_with("MEDS_")).then("code").otherwise(pl.col("code") + "X").alias("code")
    )
    found = fidelity(others, events)
    assert found.apart > 0.99
    assert found.divergence > 0.95  # births and deaths are the same
    assert found.values[2] == 0


def test_quantities_by_hand() -> None:
    def row(subject: int, time: str | None, code: str, visit: str | None = None) -> dict:  # type: ignore[type-arg]
        return {
            "subject_id": subject,
            "time": time,
            "code": code,
            "visit_id": visit,
            "numeric_value": None,
            "unit": None,
        }

    rows = [
        row(1, "1990-01-01", "MEDS_BIRTH"),
        row(1, "2020-01-01T00:00", "VISIT_START//IMP", "a"),
        row(1, "2020-01-03T00:00", "VISIT_END//home", "a"),
        row(1, "2020-01-08T00:00", "VISIT_START//AMB", "b"),
        row(1, "2020-01-08T01:00", "VISIT_END//AMB", "b"),
        row(1, "2020-01-10T00:00", "MEDS_DEATH"),
    ]
    events = pl.DataFrame(rows, schema_overrides={"numeric_value": pl.Float32, "unit": pl.String}).with_columns(
        pl.col("time").str.to_datetime(strict=False, time_unit="us")
    )
    events = events.with_columns(
        pl.when(pl.col("code") == "MEDS_BIRTH").then(pl.datetime(1990, 1, 1)).otherwise("time").alias("time")
    )
    found = fidelity(events, events).medians
    expected = {
        "age at the first event, years": 30.0,
        "length of the record, days": 9.0,
        "events of a patient": 5.0,
        "encounters of a patient": 2.0,
        "events of an encounter": 2.0,
        "length of an admission, hours": 48.0,
        "days between encounters": 5.0,
        "died": 1.0,
    }
    assert {name: pair[0] for name, pair in found.items()} == pytest.approx(expected, abs=0.01)


def test_distances_of_distributions_by_hand() -> None:
    assert ks_distance(np.asarray([1.0, 2.0, 3.0, 4.0]), np.asarray([3.0, 4.0, 5.0, 6.0])) == 0.5
    assert ks_distance(np.asarray([1.0]), np.asarray([2.0])) == 1.0
    assert np.isnan(ks_distance(np.zeros(0), np.asarray([2.0])))


def test_few_patients_are_not_told_apart(events: pl.DataFrame) -> None:
    few = PatientCounts.of(events.filter(pl.col("subject_id") < 5))
    assert np.isnan(told_apart(few, few))


def test_a_task_is_transferred(events: pl.DataFrame) -> None:
    """Half of the patients carry a code that says the label; who trains on the others cannot know it."""
    end_of_data = simulate(1, seed=9, progress=False).end_of_data
    labels = label_events(events, ["long_stay_7d"], end_of_data=end_of_data, progress=False).labels["long_stay_7d"]
    told = labels.filter("boolean_value").select(
        "subject_id", pl.col("prediction_time").alias("time"), pl.lit("LAB//LOCAL//TOLD").alias("code")
    )
    planted = pl.concat([events, told], how="diagonal")
    parts = [planted.filter(pl.col("subject_id") % 3 == part) for part in range(3)]
    untold = parts[0].filter(pl.col("code") != "LAB//LOCAL//TOLD")
    (found,) = transfer({"synthetic": untold, "real": parts[1]}, parts[2], ["long_stay_7d"], end_of_data=end_of_data)
    assert found.trained["real"] > 0.9
    assert found.trained["synthetic"] < 0.75
    assert found.labels["real"][0] > found.labels["real"][1] > 20
    assert found.tested[1] == labels.filter(pl.col("subject_id") % 3 == 2, "boolean_value").height

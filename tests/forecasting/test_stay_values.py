"""Forecasts of many stays in one table: those of each stay alone, and a row that says why for the others."""

import copy
from collections import Counter
from datetime import timedelta

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from ehrseq.forecasting.stay_values import STAY_VALUES_SCHEMA, forecast_stays, load_stay_forecaster
from ehrseq.pipelines.stay_forecasts import StayForecaster
from tests.checkpoints.complete import complete_checkpoint
from tests.checkpoints.forecaster import events_of, make_forecaster
from tests.checkpoints.stays import make_stay

STAYS = [make_stay(number) for number in range(700, 712)]


@pytest.fixture(scope="module")
def made():
    return make_forecaster(horizons=(120.0, 480.0), stays=60)


@pytest.fixture(scope="module")
def forecaster(made):
    return StayForecaster(made.model, made.extractor)


def ends(stays):
    """A prediction time for each stay: 90 minutes after its last event."""
    rows = [(stay["subject_id"], stay["events"][-1]["time"] + timedelta(minutes=90)) for stay in stays]
    return pl.DataFrame(rows, schema={"subject_id": pl.Int64, "prediction_time": pl.Datetime("us")}, orient="row")


def alone(forecaster, stay, time):
    row = forecaster.rows(stay, prediction_time=time)
    about = row.pop("stay")
    with torch.no_grad():
        return forecaster.answer(forecaster.model(**row).predictions, about)["values"]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_table_is_the_answers_of_each_stay(forecaster, batch_size):
    moments = ends(STAYS)
    table = forecast_stays(forecaster, events_of(STAYS), moments, batch_size=batch_size)
    assert dict(table.schema) == STAY_VALUES_SCHEMA
    assert table.height == len(STAYS) * 2 * 4
    for stay, time in zip(STAYS, moments["prediction_time"], strict=True):
        rows = table.filter(pl.col("subject_id") == stay["subject_id"]).to_dicts()
        answers = alone(forecaster, stay, time)
        assert len(rows) == len(answers)
        for row, answer in zip(rows, answers, strict=True):
            assert row["prediction_time"] == time
            last = None if row["last_time"] is None else row["last_time"].isoformat()
            assert last == answer["last_time"]
            for name in ("variable", "horizon", "last_value"):
                assert row[name] == answer[name]
            assert row["unit"] in (answer["unit"], None)
            assert row["reason"] == answer.get("reason")
            for name in ("value", "low", "high"):
                assert (row[name] is None) == (answer[name] is None)
                assert row[name] is None or row[name] == pytest.approx(answer[name], rel=1e-4)
    assert table["low"].count() > 0


def test_without_times_every_stay_is_asked_at_the_end_of_its_window(forecaster):
    table = forecast_stays(forecaster, events_of(STAYS))
    assert table["subject_id"].n_unique() == len(STAYS)
    starts = {stay["subject_id"]: stay["events"][1]["time"] for stay in STAYS}
    for subject, time in table.select("subject_id", "prediction_time").unique().iter_rows():
        assert time == starts[subject] + timedelta(hours=48)
    assert table.filter(pl.col("variable") != "never")["reason"].unique().to_list() == ["window_over"]


def test_stays_that_have_no_forecast_say_why_and_are_counted(forecaster):
    """One is dead, one died at a time that nobody knows, one holds nothing known, one is asked before it begins."""
    stays = copy.deepcopy(STAYS[:5])
    stays[0]["events"].append({"time": stays[0]["events"][-1]["time"], "code": "MEDS_DEATH"})
    stays[1]["events"].append({"time": None, "code": "MEDS_DEATH"})
    for event in stays[2]["events"]:
        event["code"] += "//other"
    moments = ends(STAYS[:5])
    first = STAYS[3]["events"][1]["time"]
    early = pl.col("subject_id") == STAYS[3]["subject_id"]
    moments = moments.with_columns(
        prediction_time=pl.when(early).then(pl.lit(first - timedelta(hours=1))).otherwise("prediction_time")
    )
    notes: Counter[str] = Counter()
    table = forecast_stays(forecaster, events_of(stays), moments, notes=notes)
    silent = table.filter(pl.col("variable").is_null())
    assert silent["reason"].to_list() == ["died_before_prediction", "death_time_unknown", "no_triplet", "no_stay"]
    assert silent["subject_id"].to_list() == [stay["subject_id"] for stay in STAYS[:4]]
    assert silent.select("value", "low", "high", "last_value").null_count().row(0) == (4, 4, 4, 4)
    living = table.filter(pl.col("variable").is_not_null())
    assert living["subject_id"].unique().to_list() == [STAYS[4]["subject_id"]]
    expected = forecast_stays(forecaster, events_of(STAYS[4:5]), ends(STAYS[4:5]))
    assert_frame_equal(living, expected)
    given = {name: count for name, count in notes.items() if name.startswith("forecasts not given") and count}
    assert sum(given.values()) == 4
    assert any("the patient died at or before" in name for name in given)
    assert not [name for name in notes if "risk" in name]


def test_a_part_of_a_dataset_may_have_no_stay(forecaster):
    events = events_of([{"subject_id": 1, "events": [{"time": None, "code": "GENDER//F", "numeric_value": None}]}])
    table = forecast_stays(forecaster, events, is_part=True)
    assert table.is_empty()
    assert dict(table.schema) == STAY_VALUES_SCHEMA
    with pytest.raises(ValueError, match="no stay begins"):
        forecast_stays(forecaster, events)


def test_a_checkpoint_is_loaded_from_its_folder(made, forecaster, tmp_path):
    made.model.save_pretrained(tmp_path)
    made.extractor.save_pretrained(tmp_path)
    moments = ends(STAYS)
    table = forecast_stays(tmp_path, events_of(STAYS), moments)
    assert table.equals(forecast_stays(forecaster, events_of(STAYS), moments))
    wider = forecast_stays(tmp_path, events_of(STAYS), moments, alpha=0.5)
    assert wider["low"].count() >= table["low"].count()
    with pytest.raises(ValueError, match=r"alpha got 0\.3"):
        load_stay_forecaster(tmp_path, alpha=0.3)


def test_a_table_of_events_needs_no_more_than_its_columns(forecaster):
    rows = [{"subject_id": stay["subject_id"], **event} for stay in STAYS for event in stay["events"]]
    plain = pl.DataFrame(rows, schema_overrides={"numeric_value": pl.Float32})
    assert_frame_equal(
        forecast_stays(forecaster, plain, ends(STAYS)), forecast_stays(forecaster, events_of(STAYS), ends(STAYS))
    )


@pytest.mark.parametrize(
    ("family", "message"), [("ehrmamba", "holds a model of events; expected HyMaTE"), ("hymate", "drawn at random")]
)
def test_checkpoints_that_do_not_forecast_stays_are_refused(family, message, tmp_path):
    folder = complete_checkpoint(family, tmp_path / family)
    with pytest.raises(ValueError, match=message):
        load_stay_forecaster(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        load_stay_forecaster(tmp_path / "nowhere")

"""Forecasts of many patients: tables, datasets in files, whoever works and wherever they stopped; trajectories."""

from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import AutoTokenizer, pipeline

from ehrseq.data.dataset import write_dataset
from ehrseq.forecasting import datasets
from ehrseq.forecasting.datasets import FORECAST_SCHEMA, forecast_dataset, forecast_patients
from ehrseq.forecasting.prompts import ForecastSettings, load_forecaster
from ehrseq.forecasting.trajectory_files import TRAJECTORY_SCHEMA, TokenRows, write_trajectories
from ehrseq.work.engine import get_engine
from tests.checkpoints.complete import complete_checkpoint
from tests.checkpoints.forecast import forecast_checkpoint, mortal_patient
from tests.checkpoints.patients import LAB, make_table

PATIENTS = [mortal_patient(number) for number in range(8)]
EVENTS = make_table(PATIENTS)
OUTCOMES = {"admission": "any_admission", "clinic": "VISIT_START//AMB"}
FEW = ForecastSettings(num=3, steps=3, trajectories=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forecast_checkpoint(tmp_path_factory.mktemp("forecast") / "checkpoint")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "dataset"
    splits = pl.DataFrame({"subject_id": range(8), "split": ["train"] * 5 + ["held_out"] * 3})
    write_dataset(EVENTS, folder, dataset_name="test", splits=splits, shard_size=40)
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Any:
    return forecast_patients(checkpoint, EVENTS, outcomes=OUTCOMES, horizon="60d", settings=FEW, progress=False)


def test_a_table_gives_what_the_pipeline_gives(whole: Any, checkpoint: Path) -> None:
    forecast = pipeline("ehr-forecast", model=str(checkpoint), device="cpu", n=3, grid=3)
    for patient, answer in zip(PATIENTS, forecast(PATIENTS, outcomes=OUTCOMES, horizon="60d"), strict=True):
        rows = whole.forecasts.filter(pl.col("subject_id") == patient["subject_id"]).sort("task")
        assert rows["score"].to_list() == [entry["probability"] for entry in answer["outcomes"]]
        assert rows["standard_error"].to_list() == [entry["standard_error"] for entry in answer["outcomes"]]
        assert set(rows["reason"].to_list()) == {answer.get("reason")}
        curve = whole.incidence.filter(pl.col("subject_id") == patient["subject_id"])
        expected = [point["probability"] for entry in answer["outcomes"] for point in entry.get("incidence", [])]
        assert curve["probability"].to_list() == expected


def test_the_columns_and_what_is_counted(whole: Any) -> None:
    assert whole.forecasts.schema == FORECAST_SCHEMA
    assert whole.forecasts.height == 16
    dead = [patient["subject_id"] for patient in PATIENTS if patient["subject_id"] % 3 == 0]
    assert whole.forecasts.filter(pl.col("score").is_null())["subject_id"].unique().to_list() == dead
    assert whole.report.notes["forecasts not given: the patient died at or before the prediction time"] == 2 * len(dead)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_dataset_gives_the_same_bytes(
    whole: Any, checkpoint: Path, dataset: Path, tmp_path: Path, workers: int
) -> None:
    engine = get_engine("local", num_workers=workers)
    settings: dict[str, Any] = {"outcomes": OUTCOMES, "horizon": "60d", "settings": FEW}
    tables = forecast_dataset(
        checkpoint, dataset, tmp_path / "parts", **settings, trajectories=tmp_path / "futures", engine=engine
    )
    assert tables.forecasts.equals(whole.forecasts)
    assert tables.incidence.equals(whole.incidence)
    assert not (tmp_path / "parts").exists()
    write_trajectories(whole.trajectories, tmp_path / "whole", 3)
    for number in range(3):
        files = [tmp_path / folder / f"{number}.parquet" for folder in ("futures", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_killed_run_goes_on(
    whole: Any, checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"outcomes": OUTCOMES, "horizon": "60d", "settings": FEW}
    engine = get_engine("local", num_workers=1)
    forecast, made = datasets.forecast_events, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        made.append(len(made))
        if len(made) == 3:
            raise KeyboardInterrupt
        return forecast(*args, **kwargs)

    monkeypatch.setattr(datasets, "forecast_events", killed)
    with pytest.raises(KeyboardInterrupt):
        forecast_dataset(checkpoint, dataset, tmp_path / "parts", **settings, engine=engine)
    before = len(made)
    tables = forecast_dataset(checkpoint, dataset, tmp_path / "parts", **settings, engine=engine)
    shards = len(list((dataset / "data").rglob("*.parquet")))
    assert len(made) - before == shards - 2
    assert tables.forecasts.equals(whole.forecasts)


def test_other_company_changes_nothing(whole: Any, checkpoint: Path) -> None:
    alone = forecast_patients(
        checkpoint,
        make_table(PATIENTS[4:5]),
        outcomes={"clinic": OUTCOMES["clinic"]},
        horizon="60d",
        settings=ForecastSettings(num=3),
        progress=False,
    )
    row = whole.forecasts.filter((pl.col("subject_id") == 4) & (pl.col("task") == "clinic"))
    assert alone.forecasts.equals(row)
    assert alone.incidence.is_empty()
    assert alone.trajectories.is_empty()


def test_tasks_at_their_own_times(checkpoint: Path) -> None:
    """Each task where its labels say, with its own horizon."""
    ends = EVENTS.filter(pl.col("code") == "VISIT_END//HOME").select("subject_id", prediction_time="time")
    labels = {
        "readmission_30d": ends.head(3).with_columns(boolean_value=pl.lit(False)),
        "mortality_30d": ends.head(1).with_columns(boolean_value=pl.lit(True)),
    }
    tables = forecast_patients(
        checkpoint, EVENTS, tasks=list(labels), labels=labels, settings=ForecastSettings(num=2), progress=False
    )
    for name, table in labels.items():
        rows = tables.forecasts.filter(pl.col("task") == name)
        assert rows.select("subject_id", "prediction_time").equals(
            table.select("subject_id", "prediction_time").sort("subject_id", "prediction_time")
        )
        assert set(rows["horizon_days"]) == {30.0}
    with pytest.raises(ValueError, match="none of the tasks"):
        forecast_patients(checkpoint, EVENTS, labels=labels, progress=False)


def test_what_evaluate_reads(checkpoint: Path, tmp_path: Path) -> None:
    from ehrseq.evaluation.predictions import match_predictions, read_predictions

    ends = EVENTS.filter(pl.col("code") == "VISIT_END//HOME").select("subject_id", prediction_time="time")
    labels = ends.with_columns(boolean_value=pl.col("subject_id") % 2 == 0)
    tables = forecast_patients(
        checkpoint,
        EVENTS,
        tasks=["readmission_30d"],
        labels={"readmission_30d": labels},
        settings=ForecastSettings(num=2),
        progress=False,
    )
    tables.forecasts.write_parquet(tmp_path / "forecasts.parquet")
    read = read_predictions(tmp_path / "forecasts.parquet")
    matched = match_predictions(read, labels, task="readmission_30d")
    assert matched.height == labels.height
    assert matched["score"].to_list() == tables.forecasts["score"].to_list()


def test_trajectories_are_meds_files(whole: Any, checkpoint: Path, tmp_path: Path) -> None:
    folder = write_trajectories(whole.trajectories, tmp_path / "futures", 3)
    assert sorted(file.name for file in folder.iterdir()) == ["0.parquet", "1.parquet", "2.parquet"]
    table = pl.read_parquet(folder / "1.parquet")
    assert table.schema == TRAJECTORY_SCHEMA
    assert table.equals(table.sort("subject_id", "prediction_time", "time", maintain_order=True))
    span = table.select(since=pl.col("time") - pl.col("prediction_time"))["since"]
    assert span.min() >= timedelta(0)
    assert span.max() <= timedelta(days=60)
    ends = table.filter(pl.col("code").str.starts_with("TRAJECTORY_END//"))
    living = [patient["subject_id"] for patient in PATIENTS if patient["subject_id"] % 3]
    assert ends["subject_id"].to_list() == living
    assert table.group_by("subject_id", maintain_order=True).last()["code"].equals(ends["code"])
    # A value is the middle of its bin, or the edge of an outer one; no mark of a visit is an event.
    every = pl.concat([pl.read_parquet(file) for file in sorted(folder.iterdir())])
    values = every.filter(pl.col("code") == LAB)["numeric_value"]
    assert values.null_count() == 0
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    edges = tokenizer.vocabulary.value_bins[LAB]["mg/dL"]
    middles = [edges[0], *((low + high) / 2 for low, high in pairwise(edges)), edges[-1]]
    assert all(min(abs(value - middle) for middle in middles) < 1e-3 for value in values)
    rows = TokenRows(tokenizer.token_meanings(), len(tokenizer))
    bins = [tokenizer.vocabulary.token_ids[f"{LAB}//mg/dL_{k}"] for k in range(len(edges) + 1)]
    assert rows.values[bins].tolist() == pytest.approx(middles)
    assert not table.filter(pl.col("code").str.contains(r"^\[(VS|VE|REG|CLS|W_|M_|LT)")).height


def test_trajectories_agree_with_the_pipeline(whole: Any, checkpoint: Path) -> None:
    forecast = pipeline("ehr-forecast", model=str(checkpoint), device="cpu", n=3)
    answer = forecast(PATIENTS[1], outcomes=OUTCOMES, horizon="60d", trajectories=True)
    own = whole.trajectories.filter(pl.col("subject_id") == 1)
    for number, events in enumerate(answer["trajectories"]):
        rows = own.filter((pl.col("trajectory") == number) & ~pl.col("code").str.starts_with("TRAJECTORY_END"))
        assert rows["code"].to_list() == [event["code"] for event in events]
        assert [time.isoformat() for time in rows["time"]] == [event["time"] for event in events]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"tasks": ["no_such_task"]}, "no_such_task"),
        ({"tasks": ["readmission_30d"], "horizon": "30d"}, "a task has its own horizon"),
        ({"tasks": ["readmission_30d"], "outcomes": {"readmission_30d": "any_admission"}}, "asked for twice"),
        ({"outcomes": {"x": "NOTHING"}}, "no token for 'NOTHING'"),
        ({"horizon": "soon"}, "horizon got 'soon'"),
        ({"settings": ForecastSettings(num=0)}, "num got 0"),
        ({"settings": ForecastSettings(estimator="guess")}, "estimator got 'guess'"),  # type: ignore[arg-type]
        ({"settings": ForecastSettings(seed="x")}, "seed got 'x'"),  # type: ignore[arg-type]
        ({"settings": ForecastSettings(standard_error=2)}, "standard_error got 2"),
        ({"prediction_times": EVENTS.select("subject_id", prediction_time="time").head(0)}, "has no row"),
        ({"labels": {"a": EVENTS}, "prediction_times": "x.csv"}, "give one of them"),
    ],
)
def test_what_is_refused(checkpoint: Path, asked: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        forecast_patients(checkpoint, EVENTS, progress=False, **asked)


def test_nobody_to_forecast(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="hold no event"):
        forecast_patients(checkpoint, EVENTS.head(0), progress=False)
    static = EVENTS.head(1).with_columns(time=pl.lit(None, pl.Datetime("us")))
    with pytest.raises(ValueError, match="nobody to forecast"):
        forecast_patients(checkpoint, static, progress=False)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("hymate", "reads stays"), ("ehrmamba", "finetuned on outcomes"), ("cehrbert", "no forecasting head")],
)
def test_models_that_forecast_no_events(kind: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why):
        load_forecaster(complete_checkpoint(kind, tmp_path / kind))

"""`ehrseq forecast` with a model of stays: the table of the library, file by file, resumed, and what it refuses."""

from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from ehrseq.data.dataset import write_dataset
from ehrseq.forecasting import stay_datasets
from ehrseq.forecasting.stay_datasets import forecast_stay_dataset, forecast_stay_records
from ehrseq.forecasting.stay_values import forecast_stays
from ehrseq.work.engine import get_engine
from tests.checkpoints.complete import complete_checkpoint
from tests.checkpoints.forecaster import events_of, make_forecaster
from tests.checkpoints.stays import make_stay
from tests.in_process import run_ehrseq

STAYS = [make_stay(number) for number in range(800, 830)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("values") / "model"
    made = make_forecaster(stays=60)
    made.model.save_pretrained(folder)
    made.extractor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("values") / "dataset"
    subjects = [stay["subject_id"] for stay in STAYS]
    splits = pl.DataFrame({"subject_id": subjects, "split": ["tuning"] * 6 + ["held_out"] * 24})
    write_dataset(events_of(STAYS), folder, dataset_name="stays", splits=splits, shard_size=90)
    return folder


@pytest.fixture(scope="module")
def times(tmp_path_factory):
    file = tmp_path_factory.mktemp("values") / "times.parquet"
    rows = [(stay["subject_id"], stay["events"][-1]["time"]) for stay in STAYS[::2]]
    schema = {"subject_id": pl.Int64, "prediction_time": pl.Datetime("us")}
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(file)
    return file


def same(table, other):
    """Batches of other stays change the last digits of a forecast, and nothing else."""
    assert_frame_equal(table, other, rel_tol=1e-4)


@pytest.mark.parametrize("at", ["times", "window"])
def test_file_by_file_is_the_whole_table(model, dataset, times, tmp_path, at):
    times = times if at == "times" else None
    table, report = forecast_stay_dataset(
        model, dataset, tmp_path / "parts", prediction_times=times, engine=get_engine("local", num_workers=1)
    )
    moments = None if times is None else pl.read_parquet(times)
    same(table, forecast_stays(model, events_of(STAYS), moments))
    assert report.subjects == 30
    assert table["subject_id"].n_unique() == (15 if times else 30)
    assert not list(tmp_path.iterdir())


def test_a_split_alone(model, dataset, tmp_path):
    table, _ = forecast_stay_dataset(
        model, dataset, tmp_path / "parts", splits=["tuning"], engine=get_engine("local", num_workers=1)
    )
    assert table["subject_id"].unique().sort().to_list() == [stay["subject_id"] for stay in STAYS[:6]]


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(model, dataset, times, tmp_path, monkeypatch):
    here = get_engine("local", num_workers=1)
    expected, _ = forecast_stay_dataset(model, dataset, tmp_path / "whole", prediction_times=times, engine=here)
    made: list[Path] = []
    make = stay_datasets.StayForecastPart.make

    def stops(self):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(self.record)
        return make(self)

    monkeypatch.setattr(stay_datasets.StayForecastPart, "make", stops)
    with pytest.raises(KeyboardInterrupt):
        forecast_stay_dataset(model, dataset, tmp_path / "parts", prediction_times=times, engine=here)
    before = len(made)
    monkeypatch.setattr(stay_datasets.StayForecastPart, "make", lambda self: made.append(self.record) or make(self))
    table, _ = forecast_stay_dataset(model, dataset, tmp_path / "parts", prediction_times=times, engine=here)
    assert table.equals(expected)
    assert len(made) == len(set(made))
    assert before == 2 < len(made)


def test_the_command_writes_the_table(model, dataset, times, tmp_path):
    held_out = [stay["subject_id"] for stay in STAYS[6:]]
    moments = pl.read_parquet(times).filter(pl.col("subject_id").is_in(held_out))
    moments.write_csv(tmp_path / "times.csv")
    out = tmp_path / "values.parquet"
    done = run_ehrseq(
        "forecast", "--model", model, "--data", dataset, "--out", out, "--split", "held_out",
        "--times", tmp_path / "times.csv",
        "--alpha", "0.5", "--workers", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same(pl.read_parquet(out), forecast_stays(model, events_of(STAYS[6:]), moments, alpha=0.5))
    assert f"12 stays, 48 rows in {out}" in done.stdout
    assert "of them with an interval" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"times.csv", "values.parquet"}


def test_records_that_are_no_dataset_are_read_at_once(model, times, tmp_path):
    file = tmp_path / "events.parquet"
    events_of(STAYS).write_parquet(file)
    out = tmp_path / "values.parquet"
    done = run_ehrseq("forecast", "--model", model, "--data", file, "--times", times, "--out", out)
    assert done.returncode == 0, done.stderr
    same(pl.read_parquet(out), forecast_stays(model, events_of(STAYS), pl.read_parquet(times)))


BAD_COMMANDS = {
    "outcomes": (["--outcome", "x=death", "--horizon", "30d"], "it has no use for --outcome, --horizon"),
    "a page": (["--page", "p.html"], "no use for --page"),
    "no such share": (["--alpha", "0.3"], "alpha got 0.3"),
    "an unknown split": (["--split", "other"], "other"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_what_the_command_refuses(model, dataset, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    words, message = BAD_COMMANDS[case]
    done = run_ehrseq("forecast", "--model", model, "--data", dataset, "--out", "v.parquet", "--workers", "1", *words)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "v.parquet").exists()


def test_an_event_model_has_no_alpha(dataset, tmp_path):
    done = run_ehrseq("forecast", "--data", dataset, "--out", tmp_path / "v.parquet", "--alpha", "0.5")
    assert done.returncode != 0
    assert "--alpha is for models of stays" in done.stderr


def test_a_finetuned_model_is_refused(dataset, tmp_path):
    folder = complete_checkpoint("hymate", tmp_path / "risk")
    done = run_ehrseq("forecast", "--model", folder, "--data", dataset, "--out", tmp_path / "v.parquet")
    assert done.returncode != 0
    assert "drawn at random" in done.stderr


@pytest.mark.parametrize("data", ["nothing", "strangers"])
def test_data_without_a_stay_are_refused(model, data):
    nobody = {"subject_id": 1, "events": [{"time": None, "code": "GENDER//F", "numeric_value": None}]}
    events = events_of([nobody])
    with pytest.raises(ValueError, match=r"no event|no stay begins"):
        forecast_stay_records(model, events.clear() if data == "nothing" else events)

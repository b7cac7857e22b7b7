"""The table of next medications on simulated patients, and its command."""

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from ehrseq.benchmark.medications import recommend_medications
from ehrseq.cli.app import app
from ehrseq.data.dataset import write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.hub.families import STARTER_FORECAST

EHRMAMBA = Path(__file__).parents[1] / "checkpoints" / "ehrmamba"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dataset"
    events = simulate(60, seed=3, progress=False).events()
    splits = pl.DataFrame({"subject_id": range(1, 61), "split": ["train"] * 30 + ["tuning"] * 10 + ["held_out"] * 20})
    write_dataset(events, path, dataset_name="test", splits=splits)
    return path


def test_the_command(dataset, tmp_path):
    out = tmp_path / "out"
    command = ["medications", "--data", str(dataset), "--model", str(EHRMAMBA), "--resamples", "9", "--out", str(out)]
    done = CliRunner().invoke(app, [*command, "--workers", "1", "--most", "40"])
    assert done.exit_code == 0, done.output
    assert "| ehrmamba, line |" in done.output
    assert "held-out visits that were not drawn" in done.output
    measures = json.loads((out / "medications.json").read_text())["measures"]
    assert {each["system"] for each in measures} == {"frequency", "last visit", "ehrmamba, line"}
    lists = pl.read_parquet(out / "recommendations.parquet")
    assert lists.group_by("system", "subject_id", "start").len()["len"].unique().to_list() == [20]


def test_futures_of_the_starting_checkpoint_stand_beside_what_counts(dataset):
    report = recommend_medications(dataset, {}, pretrained=STARTER_FORECAST, num=1, most_questions=4, num_resamples=3)
    assert {each.system for each in report.measures} == {"frequency", "last visit", "futures"}
    assert report.notes["tuning visits that were not drawn"] > 0


BAD = [
    ({"context": "visit", "pretrained": "x"}, "futures are drawn from a visit's start"),
    ({"num": 0}, "num got 0"),
    ({"most_questions": 0}, "most_questions 0"),
    ({"context": "day"}, "context got 'day'"),
    ({"pretrained": "nothing/here/at all"}, "no checkpoint folder"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_requests_are_refused(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        recommend_medications(dataset, {}, **options)


def test_a_folder_of_something_else_stays(dataset, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="something other than a report"):
        recommend_medications(dataset, {}, out=tmp_path)

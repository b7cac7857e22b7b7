"""`ehrseq evaluate` from files to files."""

import json

import polars as pl
import pytest
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.data.dataset import write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.evaluation import match_predictions, read_predictions
from tests.evaluation.tables import scored_table


@pytest.fixture
def files(tmp_path):
    """(predictions, labels) of two tasks on disk; labels of more patients than are scored."""
    rows = scored_table(300, 100)
    frames = [rows.select("subject_id", "prediction_time", "score", task=pl.lit(task)) for task in ("one", "two")]
    pl.concat(frames).write_parquet(tmp_path / "scores.parquet")
    other = rows.tail(20).with_columns(pl.col("subject_id") + 1000)
    for task in ("one", "two"):
        folder = tmp_path / "labels" / task
        folder.mkdir(parents=True)
        labels = pl.concat([rows, other]).select("subject_id", "prediction_time", boolean_value="label")
        labels.write_parquet(folder / "labels.parquet")
    return tmp_path / "scores.parquet", tmp_path / "labels"


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_a_report_its_numbers_and_meds_predictions(files, tmp_path):
    predictions, labels = files
    out = tmp_path / "out"
    done = run(predictions, "--labels", labels, "--out", out, "--resamples", 20)
    assert done.exit_code == 0, done.output
    text = (out / "evaluation.md").read_text()
    assert text in done.output
    assert "### one" in text
    assert "### two" in text
    assert "year: 2020" in text
    found = json.loads((out / "evaluation.json").read_text())["tasks"]
    assert found["one"]["labels"] == 300
    assert match_predictions(read_predictions(out / "predictions" / "two.parquet")).height == 300
    again = run(out / "predictions" / "two.parquet", "--out", tmp_path / "again", "--resamples", 20)
    assert again.exit_code == 0, again.output
    second = json.loads((tmp_path / "again" / "evaluation.json").read_text())["tasks"]["two"]
    assert second["metrics"]["auroc"]["value"] == pytest.approx(found["two"]["metrics"]["auroc"]["value"], abs=1e-6)


def test_subgroups_come_from_the_dataset(tmp_path):
    events = simulate(60, seed=0, progress=False).events()
    write_dataset(events, tmp_path / "dataset", dataset_name="simulated")
    rows = scored_table(400, 60).with_columns(boolean_value="label")
    rows.select("subject_id", "prediction_time", "score", "boolean_value").write_parquet(tmp_path / "p.parquet")
    out = tmp_path / "out"
    done = run(tmp_path / "p.parquet", "--data", tmp_path / "dataset", "--out", out, "--resamples", 10)
    assert done.exit_code == 0, done.output
    groups = json.loads((out / "evaluation.json").read_text())["tasks"]["p"]["subgroups"]
    assert {"sex", "ethnicity", "age", "year"} <= {group["attribute"] for group in groups}
    by_sex = [group for group in groups if group["attribute"] == "sex"]
    assert sum(group["labels"] for group in by_sex) == 400


def test_the_threshold_may_come_from_tuning_patients(files, tmp_path):
    predictions, labels = files
    options = ("--labels", labels, "--tuning", predictions, "--task", "one", "--out", tmp_path / "out")
    done = run(predictions, *options, "--resamples", 5)
    assert "best F1 of the tuning rows" in done.output
    assert "### two" not in done.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--task", "three"), r"\['three'\] is in both"),
        (("--labels", "nowhere"), "nowhere is no folder"),
        (("--data", "nowhere"), "nowhere"),
        (("--tuning", "nowhere.parquet"), "nowhere.parquet holds no predictions"),
    ],
)
def test_bad_input_is_told(files, tmp_path, change, message):
    predictions, labels = files
    done = run(predictions, "--labels", labels, "--out", tmp_path / "out", *change)
    assert done.exit_code != 0
    with pytest.raises(ValueError, match=message):
        raise done.exception
    assert not (tmp_path / "out").exists()


def test_scores_without_labels_are_told(files, tmp_path):
    done = run(files[0], "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="holds no `boolean_value`; give the labels"):
        raise done.exception

"""`ehrseq predict --labels`: each task at its own labelled times, and `ehrseq evaluate` of what it wrote."""

import json
from datetime import timedelta

import polars as pl
import pytest
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.data.dataset import EventDataset, write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.prediction.datasets import predict_dataset
from ehrseq.prediction.risks import predict_risks
from ehrseq.tasks import label_events, load_task, read_labels, write_labels
from ehrseq.work.engine import get_engine

TASKS = ["long_stay_7d", "mortality_30d", "hypertension"]
KEYS = ["subject_id", "prediction_time", "task"]
ONE = get_engine(num_workers=1)


@pytest.fixture(scope="module")
def events():
    return simulate(60, seed=5, progress=False).events()


@pytest.fixture(scope="module")
def dataset(events, tmp_path_factory):
    """Labels of the checkpoint's first two tasks and of one that it does not know."""
    path = tmp_path_factory.mktemp("data") / "dataset"
    write_dataset(events, path, dataset_name="test", shard_size=4000)
    write_labels(label_events(events, [load_task(name) for name in [*TASKS[:2], "readmission_30d"]]), path)
    return path


@pytest.fixture(scope="module")
def labels(dataset):
    return read_labels(dataset)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_each_task_is_scored_at_its_own_times(events, dataset, checkpoint, labels):
    risks, report = predict_risks(checkpoint, events, labels=dataset, progress=False)
    expected = pl.concat([labels[name].with_columns(task=pl.lit(name)) for name in TASKS[:2]])
    assert risks.height == expected.height
    assert expected.join(risks, on=KEYS, how="anti").is_empty()
    assert not labels[TASKS[0]]["prediction_time"].equals(labels[TASKS[1]]["prediction_time"])
    assert report.notes["labels of readmission_30d, a task that is not scored"] == labels["readmission_30d"].height
    assert report.notes["tasks of the checkpoint without labels, not scored: hypertension"] == 1
    for name in TASKS[:2]:
        alone, _ = predict_risks(checkpoint, events, tasks=name, prediction_times=labels[name], progress=False)
        joined = risks.filter(pl.col("task") == name).join(alone, on=KEYS, suffix="_alone")
        assert joined.height == alone.height
        assert (joined["score"] - joined["score_alone"]).abs().max() < 1e-6
        assert joined["reason"].equals(joined["reason_alone"], null_equal=True)


def test_the_answers_are_not_read(events, checkpoint, labels):
    tables = {name: labels[name] for name in TASKS[:2]}
    turned = {name: table.with_columns(~pl.col("boolean_value")) for name, table in tables.items()}
    one, _ = predict_risks(checkpoint, events, labels=tables, progress=False)
    other, _ = predict_risks(checkpoint, events, labels=turned, progress=False)
    assert one.equals(other)


def test_files_give_the_risks_of_the_whole_table(events, dataset, checkpoint, tmp_path):
    whole, _ = predict_risks(checkpoint, events, labels=dataset / "labels", progress=False)
    risks, _ = predict_dataset(checkpoint, dataset, tmp_path / "parts", labels=dataset, engine=ONE)
    assert risks.sort(KEYS).drop("score").equals(whole.sort(KEYS).drop("score"))
    assert (risks.sort(KEYS)["score"] - whole.sort(KEYS)["score"]).abs().max() < 1e-6


def test_the_commands_fit_together(dataset, checkpoint, labels, tmp_path):
    out = tmp_path / "held_out.parquet"
    options = ("--labels", dataset, "--split", "held_out", "--workers", 1)
    said = run("predict", "--model", checkpoint, "--data", dataset, "--out", out, *options).output
    patients = EventDataset(dataset).splits.filter(pl.col("split") == "held_out")["subject_id"]
    assert set(pl.read_parquet(out)["subject_id"]) <= set(patients)
    assert "labelled times of other patients" in said
    done = run("evaluate", out, "--labels", dataset, "--out", tmp_path / "evaluation", "--resamples", 5)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    reported = {name: entry["labels"] for name, entry in report["tasks"].items()} | report["not_evaluated"]
    assert set(reported) == {*TASKS[:2], "readmission_30d"}
    assert (
        reported["long_stay_7d"] == labels["long_stay_7d"].filter(pl.col("subject_id").is_in(patients.implode())).height
    )


def test_labels_of_one_task_are_a_table(events, dataset, checkpoint, labels):
    (file,) = (dataset / "labels" / TASKS[0]).rglob("*.parquet")
    risks, _ = predict_risks(checkpoint, events, labels=file.parent, progress=False)
    assert risks["task"].unique().to_list() == TASKS[:1]
    assert risks.height == labels[TASKS[0]].height


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_times": "times.csv"}, "labels and prediction times both say when to score"),
        ({"labels": "nowhere"}, "nowhere is no folder"),
        ({"labels": "nowhere.parquet"}, "does not exist"),
        ({"labels": 5}, "labels got int; expected a path, or tables by task"),
        ({"tasks": "hypertension"}, r"no labels of \['hypertension'\]; there are those of"),
        ({"labels": {"sepsis": "mortality_30d"}}, "none of the tasks"),
        ({"labels": {"mortality_30d": pl.DataFrame({"subject_id": [1]})}}, r"lack \['prediction_time'\]"),
        ({"labels": {}}, "none of the tasks"),
    ],
)
def test_bad_labels_are_told(events, dataset, checkpoint, labels, change, message):
    tables = change.get("labels")
    if isinstance(tables, dict):
        change = {"labels": {name: labels[of] if isinstance(of, str) else of for name, of in tables.items()}}
    with pytest.raises(ValueError, match=message):
        predict_risks(**{"checkpoint": checkpoint, "data": events, "labels": dataset, "progress": False, **change})


def test_labels_of_other_patients_are_counted_and_of_nobody_refused(events, checkpoint, labels):
    table = labels[TASKS[0]]
    other = table.head(3).with_columns(pl.col("subject_id") + 10**9)
    mixed = {TASKS[0]: pl.concat([table, other])}
    risks, report = predict_risks(checkpoint, events, labels=mixed, progress=False)
    assert risks.height == table.height
    assert report.notes["labelled times of other patients, not scored"] == 3
    with pytest.raises(ValueError, match="none of the 3 labelled times is of a patient of these data"):
        predict_risks(checkpoint, events, labels={TASKS[0]: other}, progress=False)


def test_an_unknown_split_is_told(dataset, checkpoint, tmp_path):
    with pytest.raises(
        ValueError, match=r"has no split \['tset'\]; it has \['held_out', 'pretrain', 'train', 'tuning'\]"
    ):
        predict_dataset(checkpoint, dataset, tmp_path / "parts", splits=["tset"], engine=ONE)


def test_two_ways_to_say_when_are_refused(dataset, checkpoint, tmp_path):
    options = ("--labels", dataset, "--times", tmp_path / "times.csv", "--out", tmp_path / "risks.parquet")
    with pytest.raises(ValueError, match="--labels and --times both say when to score"):
        run("predict", "--model", checkpoint, "--data", dataset, *options)


def test_a_split_is_one_of_a_dataset_in_files(checkpoint, tmp_path):
    (tmp_path / "records").mkdir()
    with pytest.raises(ValueError, match="--split need a dataset in files"):
        run("predict", "--model", checkpoint, "--data", tmp_path / "records", "--split", "held_out")


def test_a_time_is_scored_once_however_many_labels_name_it(events, checkpoint, labels):
    table = labels[TASKS[0]]
    later = table.with_columns(pl.col("prediction_time") + timedelta(hours=1))
    twice = {TASKS[0]: pl.concat([table, table, later])}
    risks, _ = predict_risks(checkpoint, events, labels=twice, progress=False)
    assert risks.height == 2 * table.height

"""`ehrseq split`: every row in the file of its patient's new split, positives in every split, all or nothing."""

from __future__ import annotations

import shutil

import polars as pl
import pytest
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.data import EventDataset, assign_splits
from ehrseq.data.shards import dataset_shards
from ehrseq.data.simulate.cohort import simulate
from ehrseq.prepare import prepare_dataset, resplit, split_dataset
from ehrseq.tasks import label_events, write_labels
from ehrseq.work.engine import get_engine

ONE = get_engine(num_workers=1)
HALVES = {"train": 0.5, "held_out": 0.5}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    cohort = simulate(120, seed=5, progress=False)
    source = cohort.write_fhir(folder / "fhir")
    prepare_dataset(source, folder / "out", engine=ONE, shard_rows=6000)
    labels = label_events(cohort.events(), ["readmission_30d"], end_of_data=cohort.end_of_data, progress=False)
    write_labels(labels, folder / "out")
    return folder / "out"


@pytest.fixture
def dataset(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "out")


def test_rows_follow_their_patients(dataset):
    before = EventDataset(dataset)
    events, codes = before.events(), before.codes
    sizes = split_dataset(dataset, fractions=HALVES, seed=4, engine=ONE)
    after = EventDataset(dataset)
    assert after.events().equals(events)
    assert after.codes.equals(codes)
    assert (dataset / "labels" / "readmission_30d" / "report.json").is_file()
    assert after.splits.equals(assign_splits(events["subject_id"], fractions=HALVES, seed=4))
    splits = dict(after.splits.iter_rows())
    for shard in dataset_shards(dataset):
        assert {splits[who] for who in pl.read_parquet(shard.path)["subject_id"].to_list()} == {shard.split}
    assert sizes["patients"].sum() == 120
    assert not list(dataset.parent.glob(".*"))


def test_stratified_splits_share_the_positives(dataset):
    labels = pl.read_parquet(dataset / "labels" / "readmission_30d" / "labels.parquet")
    positive = labels.filter("boolean_value")["subject_id"].n_unique()
    sizes = split_dataset(dataset, fractions=HALVES, stratify="readmission_30d", engine=ONE)
    assert sizes["positive"].sum() == positive > 4
    for column in ("patients", "with_labels", "positive"):
        assert abs(sizes[column][0] - sizes[column][1]) <= 3, column  # one a stratum at most
    first = EventDataset(dataset).splits
    split_dataset(dataset, fractions=HALVES, stratify="readmission_30d", engine=ONE)
    assert EventDataset(dataset).splits.equals(first)
    split_dataset(dataset, fractions=HALVES, stratify="readmission_30d", seed=1, engine=ONE)
    assert not EventDataset(dataset).splits.equals(first)


def test_a_run_that_fails_leaves_the_dataset_as_it_was(dataset, monkeypatch):
    before = EventDataset(dataset).splits

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resplit, "write_splits", full)
    with pytest.raises(OSError, match="No space left"):
        split_dataset(dataset, fractions=HALVES, engine=ONE)
    assert EventDataset(dataset).splits.equals(before)
    assert not list(dataset.parent.glob(".*"))


def test_a_run_that_was_stopped_between_the_two_moves_is_completed(dataset, monkeypatch):
    moved = []

    def stop_at_the_second(source, target):
        moved.append(target)
        if len(moved) == 2:
            raise KeyboardInterrupt
        original(source, target)

    original = resplit.os.replace
    monkeypatch.setattr(resplit, "_move", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        split_dataset(dataset, fractions=HALVES, engine=ONE)
    monkeypatch.undo()
    assert not dataset.exists()
    split_dataset(dataset, fractions=HALVES, engine=ONE)
    assert set(EventDataset(dataset).splits["split"]) == set(HALVES)
    assert not list(dataset.parent.glob(".*"))


class KilledError(BaseException):
    """What ends a test's run where a process would be killed."""


@pytest.mark.parametrize(("change", "again"), [({}, False), ({"seed": 1}, True)], ids=["the same", "another seed"])
def test_a_killed_run_is_gone_on_with_unless_the_splits_are_others(dataset, monkeypatch, change, again):
    written = []

    def write(table, path):
        written.append(path)
        original(table, path)

    def killed(*_):
        raise KilledError

    original = resplit.write_table
    monkeypatch.setattr(resplit, "write_table", write)
    with monkeypatch.context() as patch:
        patch.setattr(resplit, "_take_along", killed)
        patch.setattr(resplit, "remove", lambda path: None)  # nothing of a killed process tidies up
        with pytest.raises(KilledError):
            split_dataset(dataset, fractions=HALVES, engine=ONE)
    files = len(written)
    assert files > 4
    split_dataset(dataset, fractions=HALVES, engine=ONE, **change)
    assert (len(written) > files) == again
    ours = EventDataset(dataset)
    assert ours.splits.equals(assign_splits(ours.events()["subject_id"], fractions=HALVES, **change))
    splits = dict(ours.splits.iter_rows())
    for shard in dataset_shards(dataset):
        assert {splits[who] for who in pl.read_parquet(shard.path)["subject_id"].to_list()} == {shard.split}
    assert not list(dataset.parent.glob(".*"))
    assert sorted(path.name for path in dataset.iterdir()) == ["data", "labels", "metadata"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fractions": {"train": 0.5}}, "sum to 1"),
        ({"fractions": {"../x": 1.0}}, "names a folder"),
        ({"stratify": "no_such_task"}, "has no labels of"),
        ({"seed": "a"}, "expected an integer"),
    ],
)
def test_bad_arguments(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        split_dataset(dataset, engine=ONE, **arguments)


def test_a_folder_without_a_dataset(tmp_path):
    with pytest.raises(ValueError, match="holds no data/"):
        split_dataset(tmp_path)


def test_the_command(dataset):
    result = CliRunner().invoke(
        app, ["split", str(dataset), "--fractions", "a=0.5,b=0.5", "--stratify", "readmission_30d", "--workers", "1"]
    )
    assert result.exit_code == 0, result.output
    assert "with a positive one" in result.output
    result = CliRunner().invoke(app, ["split", str(dataset), "--fractions", "a=0.5,b"])
    assert "expected name=share" in str(result.exception)

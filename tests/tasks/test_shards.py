"""Labels of a prepared dataset, file by file: those of the whole table, whatever the files and whoever works."""

import importlib.util
import json
import logging
import shutil

import polars as pl
import pytest

from ehrseq.data.dataset import write_dataset
from ehrseq.data.shards import dataset_shards
from ehrseq.data.simulate.cohort import simulate
from ehrseq.tasks import label_events, list_tasks, read_labels
from ehrseq.tasks import shards as label_shards
from ehrseq.tasks import timeline as timeline_module
from ehrseq.tasks.shards import label_dataset
from ehrseq.work.engine import get_engine
from tests.tasks.timelines import END_OF_DATA, stay
from tests.tasks.timelines import events as timeline

TASKS = list_tasks()


@pytest.fixture(scope="module")
def events():
    return simulate(60, seed=3, progress=False).events()


@pytest.fixture(scope="module")
def prepared(events, tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "dataset"
    write_dataset(events, path, dataset_name="test", shard_size=3000)
    assert len(dataset_shards(path)) > 6
    return path


@pytest.fixture
def dataset(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "dataset")


def assert_same(result, whole):
    assert result.labels.keys() == whole.labels.keys()
    for name, labels in whole.labels.items():
        assert result.labels[name].equals(labels), name
    for name in ("report", "candidates", "competing", "notes", "end_of_data"):
        assert getattr(result, name) == getattr(whole, name), name


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("tasks", [TASKS, list_tasks(retrospective=True)], ids=["tasks", "paper"])
def test_files_give_the_labels_of_the_whole_table(dataset, events, workers, tasks):
    whole = label_events(events, tasks, end_of_data="2025-01-01")
    assert sum(labels.height for labels in whole.labels.values()) > 300
    result = label_dataset(dataset, tasks, end_of_data="2025-01-01", engine=get_engine(num_workers=workers))
    assert_same(result, whole)
    written = read_labels(dataset)
    assert {name: table.equals(whole.labels[name]) for name, table in written.items()} == dict.fromkeys(tasks, True)
    report = json.loads((dataset / "labels" / tasks[0] / "report.json").read_text())
    assert report["dropped"] == whole.report[tasks[0]]


def test_without_end_of_data_the_last_event_of_all_files_ends_follow_up(dataset, events, caplog):
    logging.getLogger("ehrseq").setLevel(logging.WARNING)
    result = label_dataset(dataset, "readmission_30d", engine=get_engine(num_workers=1))
    assert_same(result, label_events(events, "readmission_30d"))
    assert result.end_of_data == events["time"].max()


def test_nothing_but_the_labels_stays_behind(dataset):
    label_dataset(dataset, TASKS[:2], end_of_data="2025-01-01", engine=get_engine(num_workers=1))
    assert sorted(path.name for path in (dataset / "labels").iterdir()) == sorted(TASKS[:2])


def test_a_stopped_run_goes_on_where_it_was(dataset, events, monkeypatch):
    shards = dataset_shards(dataset)
    one = get_engine(num_workers=1)
    labelled = []
    real = label_shards.label_events

    def interrupted(rows, *given, **options):
        labelled.append(1)
        if len(labelled) == 4:
            raise KeyboardInterrupt
        return real(rows, *given, **options)

    monkeypatch.setattr(label_shards, "label_events", interrupted)
    with pytest.raises(KeyboardInterrupt):
        label_dataset(dataset, TASKS, end_of_data="2025-01-01", engine=one)
    assert not [path for path in (dataset / "labels").iterdir() if not path.name.startswith(".")]
    # What a killed process leaves half-written is no part.
    (next((dataset / "labels").iterdir()) / ".held_out-0.parquet.writing-1").write_bytes(b"half")
    result = label_dataset(dataset, TASKS, end_of_data="2025-01-01", engine=one)
    assert len(labelled) == len(shards) + 1
    assert_same(result, label_events(events, TASKS, end_of_data="2025-01-01"))
    assert sorted(path.name for path in (dataset / "labels").iterdir()) == sorted(TASKS)


def test_a_file_that_changed_is_labelled_again(dataset, events, monkeypatch):
    one = get_engine(num_workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(label_shards, "write_labels", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            label_dataset(dataset, TASKS, end_of_data="2025-01-01", engine=one)
    first = dataset_shards(dataset)[0]
    rows = pl.read_parquet(first.path)
    kept = rows.filter(pl.col("subject_id") != rows["subject_id"][0])
    kept.write_parquet(first.path)
    result = label_dataset(dataset, TASKS, end_of_data="2025-01-01", engine=one)
    fewer = events.filter(pl.col("subject_id") != rows["subject_id"][0])
    assert_same(result, label_events(fewer, TASKS, end_of_data="2025-01-01"))


def test_other_end_of_data_other_labels(dataset, events):
    one = get_engine(num_workers=1)
    for end in ("2025-01-01", "2020-01-01"):
        result = label_dataset(dataset, TASKS, end_of_data=end, engine=one)
        assert_same(result, label_events(events, TASKS, end_of_data=end))


@pytest.mark.parametrize("rows", [1, 700])
def test_blocks_make_no_difference(dataset, events, rows, monkeypatch):
    monkeypatch.setattr(label_shards, "BLOCK_ROWS", rows)
    result = label_dataset(dataset, TASKS, end_of_data="2020-01-01", engine=get_engine(num_workers=1))
    assert_same(result, label_events(events, TASKS, end_of_data="2020-01-01"))


def test_late_events_are_counted_and_told_once(dataset, events, monkeypatch):
    told = []
    for module in (label_shards, timeline_module):
        monkeypatch.setattr(module.logger, "warning", told.append)
    result = label_dataset(dataset, TASKS, end_of_data="2020-01-01", engine=get_engine(num_workers=1))
    late = events.filter(pl.col("time") >= pl.datetime(2020, 1, 2)).height
    assert result.notes["events_after_end_of_data"] == late > 0
    assert told == [f"{late} events after end_of_data (2020-01-01 23:59:59.999999) are left out of the labels."]


def test_a_file_without_labels_is_no_trouble(tmp_path):
    rows = pl.concat(
        [timeline(*stay("2020-01-01", "2020-01-11", "a")), timeline(("2020-01-01", "LAB//LOINC//1"), subject=2)]
    )
    splits = pl.DataFrame({"subject_id": [1, 2], "split": ["train", "tuning"]})
    write_dataset(rows, tmp_path / "dataset", dataset_name="test", splits=splits)
    result = label_dataset(tmp_path / "dataset", TASKS, end_of_data=END_OF_DATA, engine=get_engine(num_workers=1))
    assert_same(result, label_events(rows, TASKS, end_of_data=END_OF_DATA))


def _broken(dataset):
    file = dataset_shards(dataset)[2].path
    with open(file, "r+b") as stream:
        stream.truncate(2000)
    return file


def test_an_unreadable_file_is_named(dataset):
    file = _broken(dataset)
    with pytest.raises(ValueError, match="cannot be read as Parquet") as caught:
        label_dataset(dataset, TASKS, end_of_data="2025-01-01", engine=get_engine(num_workers=2))
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("dataset_of", "options", "message"),
    [
        (lambda path: path / "nowhere", {}, r"holds no data/<split>/<n>\.parquet"),
        (lambda path: path, {"tasks": "mortality"}, "Unknown task 'mortality'"),
        (lambda path: path, {"tasks": []}, "at least one"),
        (lambda path: path, {"end_of_data": "soon"}, "end_of_data"),
        (lambda path: path, {"code_map": [["(", "lab"]]}, "no regular expression"),
    ],
)
def test_bad_input(dataset, dataset_of, options, message):
    given = {"tasks": TASKS, "end_of_data": "2025-01-01", "engine": get_engine(num_workers=1), **options}
    with pytest.raises(ValueError, match=message):
        label_dataset(dataset_of(dataset), **given)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ehrseq[ray])")
def test_ray_gives_the_same_labels(dataset, events):
    result = label_dataset(dataset, TASKS, end_of_data="2025-01-01", engine=get_engine("ray", num_workers=2))
    assert_same(result, label_events(events, TASKS, end_of_data="2025-01-01"))

"""Label tables on disk."""

import json

import polars as pl
import pytest

from ehrseq.data.schema import LABEL_SCHEMA
from ehrseq.tasks import label_events, list_tasks, read_labels, write_labels
from ehrseq.tasks.storage import end_of_labels
from ehrseq.tasks.timeline import as_instant
from tests.tasks.timelines import DEATH, END_OF_DATA, events, stay


@pytest.fixture
def result():
    rows = [*stay("2020-01-01", "2020-01-11", "a"), *stay("2020-02-01", "2020-02-03", "b"), ("2020-02-20", DEATH)]
    return label_events(events(*rows), list_tasks(), end_of_data=END_OF_DATA)


def test_written_labels_are_read_back(result, tmp_path):
    folders = write_labels(result, tmp_path)
    assert [folder.relative_to(tmp_path).as_posix() for folder in folders] == [
        f"labels/{name}" for name in list_tasks()
    ]
    back = read_labels(tmp_path)
    assert set(back) == set(list_tasks())
    assert all(back[name].equals(result.labels[name]) for name in back)
    assert list(read_labels(tmp_path, ["hypertension"])) == ["hypertension"]
    assert list(read_labels(tmp_path, "hypertension")) == ["hypertension"]


def test_the_files_hold_exactly_the_columns_of_meds(result, tmp_path):
    write_labels(result, tmp_path)
    for name in list_tasks():
        (file,) = (tmp_path / "labels" / name).glob("*.parquet")
        assert dict(pl.read_parquet_schema(file)) == dict(LABEL_SCHEMA)


def test_meds_own_schema_takes_the_files(result, tmp_path):
    import meds
    import pyarrow.parquet as pq

    write_labels(result, tmp_path)
    (file,) = (tmp_path / "labels" / "mortality_30d").glob("*.parquet")
    meds.LabelSchema.validate(pq.read_table(file))


def test_the_report_lies_beside_the_labels(result, tmp_path):
    write_labels(result, tmp_path)
    report = json.loads((tmp_path / "labels" / "readmission_30d" / "report.json").read_text())
    assert report["task"]["token"] == "[REA_1M]"
    assert report["end_of_data"] == END_OF_DATA
    assert report["candidates"] == report["labels"] + sum(report["dropped"].values()) == 2
    assert (report["positives"], report["competing"]) == (1, {"death": 1})


def test_writing_again_replaces_and_leaves_nothing_behind(result, tmp_path):
    write_labels(result, tmp_path)
    (tmp_path / "labels" / "hypertension" / "stale.parquet").write_bytes(b"old")
    write_labels(result, tmp_path)
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == sorted(list_tasks())
    assert sorted(path.name for path in (tmp_path / "labels" / "hypertension").iterdir()) == [
        "labels.parquet",
        "report.json",
    ]


def test_a_failed_write_keeps_the_old_labels(result, tmp_path):
    write_labels(result, tmp_path)
    broken = result.labels["hypertension"].drop("boolean_value")
    result.labels["hypertension"] = broken
    with pytest.raises(ValueError, match="boolean_value"):
        write_labels(result, tmp_path)
    assert "boolean_value" in read_labels(tmp_path, ["hypertension"])["hypertension"].columns
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == sorted(list_tasks())


def test_labels_of_another_meds_tool_are_read(tmp_path):
    folder = tmp_path / "labels" / "theirs" / "train"
    folder.mkdir(parents=True)
    table = pl.DataFrame(
        {
            "subject_id": [2, 1],
            "prediction_time": [None, None],
            "boolean_value": [True, False],
            "integer_value": [None, None],
        }
    )
    table = table.with_columns(prediction_time=pl.datetime(2020, 1, 1, time_unit="ns"))
    table[:1].write_parquet(folder / "0.parquet")
    table[1:].write_parquet(folder / "1.parquet")
    labels = read_labels(tmp_path)["theirs"]
    assert labels.columns == list(LABEL_SCHEMA)
    assert labels["subject_id"].to_list() == [1, 2]


def _file(tmp_path, content):
    folder = tmp_path / "labels" / "task"
    folder.mkdir(parents=True)
    if isinstance(content, bytes):
        (folder / "0.parquet").write_bytes(content)
    else:
        content.write_parquet(folder / "0.parquet")
    return tmp_path


BAD = [
    (lambda tmp: read_labels(tmp / "nowhere"), "nowhere is no folder; expected a dataset"),
    (lambda tmp: read_labels(tmp), "holds no labels; write them with write_labels"),
    (lambda tmp: read_labels(_file(tmp, b"no parquet")), "0.parquet cannot be read as Parquet"),
    (
        lambda tmp: read_labels(_file(tmp, pl.DataFrame({"subject_id": [1]}))),
        "0.parquet: column\\(s\\) \\['prediction_time'",
    ),
    (
        lambda tmp: read_labels(
            _file(tmp, pl.DataFrame({"subject_id": [1], "prediction_time": ["2020-01-01"], "boolean_value": [None]}))
        ),
        "have no boolean_value",
    ),
    (
        lambda tmp: read_labels(_file(tmp, pl.DataFrame({"subject_id": [1]})), ["other"]),
        "no labels of \\['other'\\]; it has \\['task'\\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_label_folders_say_what_is_wrong(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_writing_into_nothing(result, tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder"):
        write_labels(result, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_the_reports_say_where_follow_up_ended(result, tmp_path):
    write_labels(result, tmp_path)
    assert as_instant(end_of_labels(tmp_path)) == as_instant(END_OF_DATA)
    report = tmp_path / "labels" / "hypertension" / "report.json"
    other = json.loads(report.read_text()) | {"end_of_data": "2031-01-01T00:00:00"}
    report.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"say \['20.*expected one end of the data"):
        end_of_labels(tmp_path)
    for file in (tmp_path / "labels").glob("*/report.json"):
        file.unlink()
    with pytest.raises(ValueError, match="do not say where follow-up ended"):
        end_of_labels(tmp_path)

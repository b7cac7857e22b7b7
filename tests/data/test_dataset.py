"""Datasets on disk."""

import json
from datetime import datetime, timedelta

import polars as pl
import pyarrow.parquet as pq
import pytest
from meds import CodeMetadataSchema, DataSchema, DatasetMetadataSchema, SubjectSplitSchema

from ehrseq.data import EventDataset, load_events, write_dataset
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import EVENT_SCHEMA, validate_events
from ehrseq.data.simulate.cohort import simulate
from tests.data.fhir.samples import encounter, observation, patient, write_ndjson

START = datetime(2020, 1, 1)


def events_of(subjects=20, each=30):
    rows = [
        (subject, None if n == 0 else START + timedelta(hours=n), f"LAB//{n % 7}", float(n), None, f"v{n // 10}", "mg")
        for subject in range(subjects)
        for n in range(each)
    ]
    return pl.DataFrame(rows, schema=EVENT_SCHEMA, orient="row")


def test_round_trip_and_shards(tmp_path):
    events = events_of()
    splits = pl.DataFrame({"subject_id": range(20), "split": ["train"] * 15 + ["held_out"] * 5})
    dataset = write_dataset(events, tmp_path / "d", dataset_name="test", shard_size=100, splits=splits)
    assert dataset.events().equals(validate_events(events))
    assert dataset.scan().collect().height == events.height
    assert dataset.splits.equals(splits)
    assert dataset.metadata["dataset_name"] == "test"
    assert dataset.events("held_out")["subject_id"].unique().to_list() == [15, 16, 17, 18, 19]
    assert dataset.events(["train", "held_out"], columns=["code"]).columns == ["code"]
    files = sorted((tmp_path / "d" / "data" / "train").glob("*.parquet"))
    assert len(files) > 3
    seen: list[int] = []
    for file in files:
        subjects = pl.read_parquet(file)["subject_id"].unique().to_list()
        assert not set(subjects) & set(seen)
        seen += subjects


def test_what_is_written_is_meds(tmp_path):
    dataset = write_dataset(events_of(), tmp_path / "d", dataset_name="test")
    for file in dataset.files:
        DataSchema.validate(pq.read_table(file))
    metadata = tmp_path / "d" / "metadata"
    SubjectSplitSchema.validate(pq.read_table(metadata / "subject_splits.parquet"))
    CodeMetadataSchema.validate(pq.read_table(metadata / "codes.parquet"))
    DatasetMetadataSchema.validate(json.loads((metadata / "dataset.json").read_text()))


def test_the_report_travels_with_the_data(tmp_path):
    (tmp_path / "fhir").mkdir()
    write_ndjson(tmp_path / "fhir" / "a.ndjson", patient(), encounter(), observation(status="entered-in-error"))
    events, report = load_events(tmp_path / "fhir")
    report.code_descriptions["VISIT_START//IMP"] = "Admission"
    dataset = write_dataset(events, tmp_path / "d", dataset_name="x", report=report)
    assert dataset.metadata["conversion_report"]["entered_in_error"] == {"Observation": 1}
    assert pl.read_parquet(tmp_path / "d" / "metadata" / "subject_ids.parquet").rows() == [
        ("p1", events["subject_id"][0])
    ]
    assert dict(dataset.codes.select("code", "description").iter_rows())["VISIT_START//IMP"] == "Admission"
    again, _ = load_events(tmp_path / "d")
    assert again.equals(events)


def test_a_sources_splits_are_respected(tmp_path):
    report = ConversionReport(source_splits=pl.DataFrame({"subject_id": range(20), "split": ["held_out"] * 20}))
    dataset = write_dataset(events_of(), tmp_path / "d", dataset_name="x", report=report)
    assert dataset.splits["split"].unique().to_list() == ["held_out"]


def test_too_few_patients_for_a_split_are_an_error_that_says_how_many_are_needed(tmp_path):
    dataset = write_dataset(events_of(4), tmp_path / "d", dataset_name="few")
    held = dataset.splits["split"].unique().to_list()
    absent = [name for name in ("pretrain", "train", "tuning", "held_out") if name not in held]
    with pytest.raises(ValueError, match=rf"no patient in .*{absent[0]}.*has 4 patients.*about 75 patients"):
        dataset.events(absent)
    with pytest.raises(ValueError, match=r"no patient in the split\(s\) \['test'\].*Name one of these"):
        dataset.events("test")


def test_a_dataset_without_splits_says_so(tmp_path):
    (tmp_path / "data").mkdir()
    validate_events(events_of(3)).write_parquet(tmp_path / "data" / "0.parquet")
    assert EventDataset(tmp_path).events().height == 90
    with pytest.raises(ValueError, match=r"has no splits .*write_dataset"):
        EventDataset(tmp_path).events("train")


def test_a_foreign_dataset(ehr_data):
    dataset = EventDataset(ehr_data / "mimic-iv-demo-meds" / "0.0.1")
    tuning = dataset.events("tuning", columns=["subject_id", "code", "visit_id"])
    assert tuning.height == 69_443  # 69,620 rows, 177 of them equal to an earlier one: as `load_events` reads them
    assert tuning["subject_id"].n_unique() == 10
    assert dataset.metadata["dataset_name"] == "MIMIC-IV"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: {"events": events_of(0)}, "no events to write"),
        (lambda path: {"shard_size": 0}, "shard_size must be"),
        (lambda path: {"splits": pl.DataFrame({"subject_id": [0], "split": ["a"]})}, r"19 subject\(s\) have no split"),
        (lambda path: {"splits": pl.DataFrame({"subject_id": range(20), "split": ["../x"] * 20})}, "cannot be a split"),
        (lambda path: {"splits": pl.DataFrame({"id": [0]})}, "expected subject_id and split"),
        (lambda path: {"splits": {0: "train"}}, "splits got dict; expected a polars DataFrame"),
        (lambda path: {"shard_size": "5"}, "shard_size must be at least 1 event, got '5'"),
        (lambda path: {"shard_size": 1.5}, "got 1.5"),
        (lambda path: {"dataset_name": None}, "dataset_name got None; expected a name"),
        (lambda path: {"dataset_name": " "}, "expected a name"),
        (lambda path: {"events": pl.DataFrame({"a": [1]})}, "are absent"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        write_dataset(**{"events": events_of(), "path": tmp_path / "d", "dataset_name": "x", **make(tmp_path)})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    write_dataset(events_of(), tmp_path / "d", dataset_name="first")
    with pytest.raises(ValueError, match="exists; give another path"):
        write_dataset(events_of(5), tmp_path / "d", dataset_name="second")

    def disk_full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("ehrseq.data.dataset._write_json", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_dataset(events_of(5), tmp_path / "d", dataset_name="second", overwrite=True)
    assert [item.name for item in tmp_path.iterdir()] == ["d"]
    assert EventDataset(tmp_path / "d").metadata["dataset_name"] == "first"
    monkeypatch.undo()
    write_dataset(events_of(5), tmp_path / "d", dataset_name="second", overwrite=True)
    assert EventDataset(tmp_path / "d").events()["subject_id"].n_unique() == 5


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        EventDataset(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no MEDS data"):
        EventDataset(tmp_path)
    dataset = write_dataset(events_of(), tmp_path / "d", dataset_name="x")
    with pytest.raises(ValueError, match="Name one of these splits"):
        dataset.events("test")
    with pytest.raises(ValueError, match="Unknown column"):
        dataset.events(columns=["hadm_id"])


def test_a_dataset_is_not_written_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file cannot be made \(File exists\); give one in a folder of yours"):
        write_dataset(events_of(), tmp_path / "file" / "d", dataset_name="x")
    with pytest.raises(ValueError, match="file cannot be made"):
        simulate(1, progress=False).write_fhir(tmp_path / "file" / "fhir")


@pytest.mark.parametrize(
    ("file", "content", "ask", "message"),
    [
        ("subject_splits.parquet", b"junk", load_events, "subject_splits.parquet cannot be read as Parquet"),
        ("subject_splits.parquet", b"junk", lambda path: EventDataset(path).splits, "cannot be read as Parquet"),
        ("codes.parquet", b"junk", load_events, "codes.parquet cannot be read as Parquet"),
        ("codes.parquet", b"junk", lambda path: EventDataset(path).codes, "codes.parquet cannot be read as Parquet"),
        ("dataset.json", b"{", load_events, "dataset.json is not JSON"),
        ("dataset.json", b"[]", load_events, "dataset.json holds a list; expected a JSON object"),
        ("dataset.json", b"\xff", lambda path: EventDataset(path).metadata, "dataset.json is not JSON"),
    ],
)
def test_damaged_metadata_name_their_file(tmp_path, file, content, ask, message):
    dataset = write_dataset(events_of(3), tmp_path / "d", dataset_name="x")
    (dataset.path / "metadata" / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ask(dataset.path)


def test_splits_of_wrong_types_name_their_file(tmp_path):
    dataset = write_dataset(events_of(3), tmp_path / "d", dataset_name="x")
    wrong = pl.DataFrame({"subject_id": ["a"], "split": ["train"]})
    wrong.write_parquet(dataset.path / "metadata" / "subject_splits.parquet")
    with pytest.raises(ValueError, match=r"subject_splits.parquet has the types .*String.*expected whole numbers"):
        load_events(dataset.path)


@pytest.mark.parametrize("split", [5, b"train", {"train": 1}])
def test_a_split_is_asked_for_by_name(tmp_path, split):
    dataset = write_dataset(events_of(3), tmp_path / "d", dataset_name="x")
    with pytest.raises(ValueError, match=r"split got .*; expected the name of a split"):
        dataset.events(split)


@pytest.mark.parametrize("path", [None, 5, "", "  ", b"x"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ValueError, match=r"path got .*expected the name of a folder or file"):
        load_events(path)


def test_an_unknown_way_of_errors_is_refused_for_every_format(tmp_path):
    dataset = write_dataset(events_of(3), tmp_path / "d", dataset_name="x")
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        load_events(dataset.path, on_error="ignore")


def test_fhir_files_beside_meds_data_are_counted(tmp_path):
    dataset = write_dataset(events_of(3), tmp_path / "d", dataset_name="x")
    _, report = load_events(dataset.path)
    assert "FHIR files beside the MEDS data, not read" not in report.notes
    write_ndjson(dataset.path / "Patient.ndjson", patient())
    _, report = load_events(dataset.path)
    assert report.notes["FHIR files beside the MEDS data, not read"] == 1

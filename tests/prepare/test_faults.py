"""What cannot be read stops the run with file and line, or is skipped, counted and listed; odd records are no crash."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.data import EventDataset, read_fhir
from ehrseq.data.meds import read_meds_with_report
from ehrseq.prepare import prepare_dataset
from ehrseq.work.engine import get_engine
from tests.data.fhir.samples import bundle, concept, encounter, observation, patient, resource, write_ndjson

ONE = get_engine(num_workers=1)
LINES = [json.dumps(observation(id=f"o{i}", value=float(i))).encode() for i in range(200)]


def cut_gzip(folder):
    packed = gzip.compress(b"\n".join(LINES) + b"\n")
    (folder / "Observation.ndjson.gz").write_bytes(packed[: len(packed) // 2])


def broken_gzip(folder):
    packed = bytearray(gzip.compress(b"\n".join(LINES) + b"\n"))
    packed[len(packed) // 2 :: 7] = b"\0" * len(packed[len(packed) // 2 :: 7])
    (folder / "Observation.ndjson.gz").write_bytes(bytes(packed))


def no_gzip(folder):
    (folder / "Observation.ndjson.gz").write_bytes(b"\n".join(LINES))


def cut_line(folder):
    (folder / "Observation.ndjson").write_bytes(b"\n".join(LINES)[:-30])


def no_json(folder):
    (folder / "Observation.ndjson").write_bytes(b"\n".join([*LINES[:7], b"oops", *LINES[8:]]))


def no_resource(folder):
    (folder / "Observation.ndjson").write_bytes(b"\n".join([*LINES[:7], b"[1, 2]", *LINES[8:]]))


def bad_time(folder):
    bad = json.dumps(observation(id="x", time="yesterday")).encode()
    (folder / "Observation.ndjson").write_bytes(b"\n".join([*LINES[:7], bad, *LINES[8:]]))


def bad_bundle(folder):
    (folder / "Observation.json").write_text(json.dumps(bundle(observation(), {"resourceType": "Observation"}))[:-9])


def unreadable(folder):
    # A regular file whose reading fails, for root too.
    (folder / "Observation.ndjson").symlink_to("/proc/self/mem")


FAULTS = [
    (cut_gzip, r"Observation.ndjson.gz: .*damaged or cut short", "rest of a damaged gzip file"),
    (broken_gzip, r"Observation.ndjson.gz: .*damaged or cut short", "rest of a damaged gzip file"),
    (no_gzip, r"Observation.ndjson.gz: .*damaged or cut short", "rest of a damaged gzip file"),
    (cut_line, r"Observation.ndjson, line 200: not JSON.*cut short", "malformed line"),
    (no_json, r"Observation.ndjson, line 8: not JSON", "malformed line"),
    (no_resource, r"Observation.ndjson, line 8: expected one JSON object", "malformed line"),
    (bad_time, r"Observation.ndjson, line 8: Observation/x: .*not a FHIR date", "malformed line"),
    (bad_bundle, r"Observation.json", "malformed file"),
    (unreadable, r"Observation.ndjson.* cannot be read", "file that cannot be read"),
]


@pytest.mark.parametrize(("damage", "message", "counted"), FAULTS)
def test_faults_stop_the_run_or_are_counted(tmp_path, damage, message, counted):
    folder = tmp_path / "fhir"
    folder.mkdir()
    write_ndjson(folder / "Patient.ndjson", patient(), encounter())
    damage(folder)
    with pytest.raises((ValueError, OSError), match=message):
        prepare_dataset(folder, tmp_path / "out", engine=ONE)
    assert not (tmp_path / "out").exists()
    report = prepare_dataset(folder, tmp_path / "out", engine=ONE, on_error="skip").conversion
    assert report.skipped[counted] == 1
    assert "Observation" in report.errors[0]
    events, expected = read_fhir(folder, on_error="skip", progress=False)
    assert EventDataset(tmp_path / "out").events().equals(events)
    assert report.to_dict() == expected.to_dict()
    stored = json.loads((tmp_path / "out" / "metadata" / "conversion_report.json").read_text())
    assert stored["errors"] == report.errors
    assert stored["skipped"][counted] == 1


@pytest.mark.parametrize("damage", ["cut", "columns"])
def test_faults_of_meds_files(tmp_path, damage):
    data = tmp_path / "meds" / "data"
    data.mkdir(parents=True)
    rows = pl.DataFrame({"subject_id": [1, 2], "time": [None, None], "code": ["A", "B"]})
    rows.cast({"time": pl.Datetime("us")}).write_parquet(data / "0.parquet")
    if damage == "cut":
        (data / "1.parquet").write_bytes((data / "0.parquet").read_bytes()[:-20])
    else:
        rows.select("subject_id", "time").write_parquet(data / "1.parquet")
    with pytest.raises(ValueError, match=r"1.parquet"):
        prepare_dataset(tmp_path / "meds", tmp_path / "out", engine=ONE)
    report = prepare_dataset(tmp_path / "meds", tmp_path / "out", engine=ONE, on_error="skip").conversion
    assert report.skipped == {"file that cannot be read": 1}
    assert "1.parquet" in report.errors[0]
    assert EventDataset(tmp_path / "out").events().height == 2


_FULL_DISK = """
import resource, sys
from ehrseq.cli.app import main
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
sys.argv = ["ehrseq", "prepare", sys.argv[1], sys.argv[2], "--workers", "1", "--on-error", "skip"]
main()
"""


def test_a_full_disk_stops_the_run_and_leaves_no_dataset(tmp_path):
    """Files that may not grow stand for a disk that is full: skipping what cannot be read does not hide it."""
    folder = tmp_path / "fhir"
    folder.mkdir()
    write_ndjson(folder / "all.ndjson", patient(), encounter(), *(json.loads(line) for line in LINES))
    done = subprocess.run(
        [sys.executable, "-P", "-c", _FULL_DISK, str(folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    prepare_dataset(folder, tmp_path / "out", engine=ONE, on_error="skip")
    assert EventDataset(tmp_path / "out").events().height == 204


# Odd records


def both(folder: Path, output: Path):
    """Prepared rows and report, after comparing them with those in memory."""
    events, expected = read_fhir(folder, progress=False)
    report = prepare_dataset(folder, output, engine=ONE, shard_rows=3).conversion
    assert EventDataset(output).events().equals(events)
    assert report.to_dict() == expected.to_dict()
    return events, report


def test_odd_records(tmp_path):
    folder = tmp_path / "fhir"
    folder.mkdir()
    zones = ("2020-01-11T06:00:00+05:30", "2020-01-11T06:00:00-08:00", "2020-01-11", "2020", "2020-01-11T06:00:00")
    write_ndjson(folder / "a.ndjson", patient(), patient("p2"), patient("p3", birthDate="2021-01-01"))
    write_ndjson(
        folder / "b.ndjson",
        encounter("ends-first", "2020-01-15T12:00:00Z", "2020-01-10T08:00:00Z"),
        encounter("open", end=None, subject={"reference": "Patient/p2"}),
        encounter("nobody", subject=None),
        *(observation(id=f"z{i}", time=zone) for i, zone in enumerate(zones)),
        observation(id="early", subject={"reference": "Patient/p3"}, encounter=None),  # before the birth
        observation(id="stray", subject={"reference": "Patient/unknown"}),
        resource("Condition", id="c1", code=concept("1"), encounter={"reference": "Encounter/nobody"}),
        resource("Condition", id="c2", code=concept("2"), encounter={"reference": "Encounter/open"}),
    )
    # Another patient under the id of the first, in another file
    write_ndjson(
        folder / "c.ndjson", patient(birthDate="1999-09-09", gender="male"), observation(id="other", value=9.0)
    )
    events, report = both(folder, tmp_path / "out")
    assert report.notes["encounters that end before they start: end unknown"] == 1
    assert report.notes["encounters without an end"] == 2  # that one, and the open one
    assert report.notes["patients given again with another birth date (two patients under one id?)"] == 1
    assert report.skipped["rows of a subject that was not given"] == 3  # two of them start and end the nobody's visit
    assert report.unresolved_references["Patient (distinct references)"] == 1
    assert events["code"].to_list().count("MEDS_BIRTH") == 3


def test_patients_by_other_names(tmp_path):
    """References by identifier and by fullUrl: the patient's rows lie in several partitions."""
    folder = tmp_path / "fhir"
    folder.mkdir()
    people = [patient(f"p{i}", identifier=[{"system": "urn:mrn", "value": f"{i}"}]) for i in range(12)]
    write_ndjson(folder / "Patient.ndjson", *people)
    write_ndjson(
        folder / "Observation.ndjson",
        *(
            observation(id=f"{kind}{i}", encounter=None, subject=subject, value=float(i), code=kind)
            for i in range(12)
            for kind, subject in (
                ("literal", {"reference": f"Patient/p{i}"}),
                ("logical", {"identifier": {"system": "urn:mrn", "value": f"{i}"}}),
                ("query", {"reference": f"Patient?identifier=urn:mrn|{i}"}),
                ("absolute", {"reference": f"https://any/fhir/Patient/p{i}"}),
            )
        ),
    )
    record = bundle(patient("inside"), observation(id="in", encounter=None, subject={"reference": "urn:uuid:full"}))
    record["entry"][0]["fullUrl"] = "urn:uuid:full"
    (folder / "bundle.json").write_text(json.dumps(record))
    events, report = both(folder, tmp_path / "out")
    assert not report.skipped
    assert (
        events.filter(pl.col("code").str.starts_with("LAB"))["subject_id"].value_counts()["count"].to_list().count(4)
        == 12
    )


def test_duplicates_in_other_files_meet(tmp_path):
    folder = tmp_path / "fhir"
    folder.mkdir()
    people = [patient(f"p{i}") for i in range(9)]
    for number in range(3):
        write_ndjson(
            folder / f"{number}.ndjson",
            *people,
            *(
                observation(subject={"reference": f"Patient/p{i}"}, id=f"o{i}", encounter=None, value=float(number))
                for i in range(9)
            ),
        )
    events, report = both(folder, tmp_path / "out")
    assert report.notes["resources that a later version of them replaces"] == 2 * 18
    assert set(events["numeric_value"].drop_nulls().to_list()) == {2.0}
    # Hashes of ids meet across processes.
    prepare_dataset(folder, tmp_path / "two", engine=get_engine(num_workers=2), shard_rows=3)
    assert EventDataset(tmp_path / "two").events().equals(events)


# MEDS of other versions


@pytest.mark.parametrize("version", ["0.2", "0.3", "0.4", "omop", "csv"])
def test_versions_of_meds(tmp_path, version):
    time = pl.Series(
        "time", ["2020-01-02T03:04:05", None, "2020-01-02T00:00:00", "2020-01-01T00:00:00"]
    ).str.to_datetime(time_unit="us")
    table = pl.DataFrame({"subject_id": [5, 5, 5, 3]}).with_columns(
        time,
        pl.Series("code", ["LAB//a", "GENDER//F", "MEDS_DEATH", "Visit/IP/start"]),
        pl.Series("numeric_value", [1.5, None, float("nan"), None]),
    )
    if version == "0.2":
        table = table.rename({"subject_id": "patient_id", "time": "timestamp"})
    elif version == "0.3":
        table = table.with_columns(pl.col("time").dt.cast_time_unit("ns"), pl.col("code").cast(pl.Categorical))
    elif version == "omop":
        table = table.with_columns(
            pl.Series("visit_occurrence_id", [7, None, None, 8]), pl.Series("unit", ["mg", None, None, None])
        )
    folder = tmp_path / "meds"
    (folder / "data" / "train").mkdir(parents=True)
    if version == "csv":
        folder = tmp_path / "events.csv"
        table.write_csv(folder)
    else:
        # A patient in two files
        table.slice(0, 2).write_parquet(folder / "data" / "train" / "0.parquet")
        table.slice(2).write_parquet(folder / "data" / "train" / "1.parquet")
    expected, _ = read_meds_with_report(folder)
    report = prepare_dataset(folder, tmp_path / "out", engine=ONE, shard_rows=1)
    assert EventDataset(tmp_path / "out").events().equals(expected)
    assert expected.height == 4
    assert report.conversion.notes["deaths known to the day"] == 1
    assert report.conversion.notes["values that are NaN, infinite or beyond float32, read as missing"] == 1


# The challenge of 2012


def test_the_challenge(ehr_data, tmp_path):
    report = prepare_dataset(ehr_data / "physionet2012" / "set-a.tar.gz", tmp_path / "out", engine=ONE)
    assert report.conversion.subjects == 4000
    labels = pl.read_parquet(tmp_path / "out" / "labels" / "in_hospital_mortality" / "labels.parquet")
    assert (labels.height, int(labels["boolean_value"].sum())) == (4000, 554)
    assert pl.read_parquet(tmp_path / "out" / "metadata" / "outcomes.parquet").height == 4000
    assert EventDataset(tmp_path / "out").events()["subject_id"].n_unique() == 4000


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_error": "raise"}, "on_error must be 'stop' or 'skip'"),
        ({"shard_rows": 0}, "shard_rows must be"),
        ({"shard_rows": True}, "shard_rows must be"),
        ({"fractions": {"train": 2.0}}, "sum to 1"),
        ({"fractions": {"a/b": 1.0}}, "names a folder"),
        ({"seed": "x"}, "seed got 'x'"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    write_ndjson(tmp_path / "a.ndjson", patient())
    with pytest.raises(ValueError, match=message):
        prepare_dataset(tmp_path / "a.ndjson", tmp_path / "out", engine=ONE, **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "holds neither FHIR"),
        (lambda folder: (folder.mkdir(), write_ndjson(folder / "o.ndjson", observation())), "holds no Patient"),
        (
            lambda folder: (folder.mkdir(), write_ndjson(folder / "p.ndjson", {"resourceType": "Patient", "id": "x"})),
            "gives no event",
        ),
    ],
)
def test_sources_without_records(tmp_path, make, message):
    make(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        prepare_dataset(tmp_path / "source", tmp_path / "out", engine=ONE)


def test_the_command(tmp_path):
    folder = tmp_path / "fhir"
    folder.mkdir()
    write_ndjson(folder / "a.ndjson", patient(), encounter(), observation())
    run = CliRunner().invoke(app, ["prepare", str(folder), str(tmp_path / "out"), "--workers", "1", "--name", "mine"])
    assert run.exit_code == 0, run.output
    assert "resources read" in run.output
    assert json.loads((tmp_path / "out" / "metadata" / "dataset.json").read_text())["dataset_name"] == "mine"
    again = CliRunner().invoke(app, ["prepare", str(folder), str(tmp_path / "out"), "--workers", "1"])
    assert "exists and is not empty" in str(again.exception)

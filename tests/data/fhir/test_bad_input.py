"""Bad FHIR input: each case a clear error that names its place, or a counted skip."""

import gzip
import json

import polars as pl
import pytest
from transformers.utils import logging

from ehrseq.data import patient_from_bundle, read_fhir
from tests.data.fhir.samples import bundle, observation, patient, write_ndjson


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resourceType": "Patient"}, "Expected a FHIR R4 Bundle.*'Patient'"),
        ({}, "without resourceType"),
        ([], "Expected a FHIR R4 Bundle.*'list'"),
        (bundle(), "no Patient resource"),
        (bundle(observation()), "no Patient resource.*give the whole export folder"),
        (bundle(patient("a"), patient("b")), "holds 2 Patient resources; expected exactly one"),
        (
            bundle(patient(), observation(issued="yesterday")),
            "entry 1 .Observation/o1.: 'yesterday' is not a FHIR date",
        ),
        (
            bundle(patient(), observation(valueQuantity={"value": "high"})),
            "entry 1 .Observation/o1.: could not convert",
        ),
        (bundle(patient(), observation(subject="p1")), "entry 1 .Observation/o1.: an element has a wrong type"),
        (bundle(patient(), {"id": "1"}), "entry 1 .no resourceType/1.: it has no resourceType"),
        (bundle({**patient(), "id": None}), "entry 0 .Patient/None.: it has no id"),
        (bundle(patient(), kind="history"), "type history"),
        (bundle("text"), "entry 0 .str."),
        (bundle([1]), "entry 0 .list.: its resource is list; expected an object"),
        ({"resourceType": "Bundle", "entry": 3}, "Bundle.entry is int; expected a list of objects"),
        ({"resourceType": "Bundle", "entry": {"resource": patient()}}, "Bundle.entry is dict; expected a list"),
        ({"resourceType": "Bundle", "entry": [3]}, "entry 0 .int.: the entry is int; expected an object"),
        ({"resourceType": "Bundle", "entry": [{"resource": patient()}, None]}, "entry 1 .NoneType.: the entry is"),
        ({"resourceType": "Bundle", "entry": [{"resource": patient(), "fullUrl": 3}]}, "its fullUrl is int"),
        ({"resourceType": "Bundle", "entry": [{"response": {"status": "200"}}]}, "no Patient resource"),
    ],
)
def test_a_bad_bundle_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        patient_from_bundle(given)


GOOD = json.dumps(patient()).encode()
LAB = json.dumps(observation()).encode()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, LAB, LAB[:-30]], r"Observation.ndjson, line 3: not JSON .*cut short"),
        (
            [GOOD, LAB.replace(b"mmol", b"\xb5mol")],
            r"Observation.ndjson, line 2: not UTF-8 \(byte 0xb5 at column \d+\)",
        ),
        ([GOOD, b"", b"[1, 2]"], "line 3: expected one JSON object"),
        ([GOOD, b"null"], "line 2: expected one JSON object"),
        ([GOOD, b'{"id": "x"}'], "line 2: no resourceType/x: it has no resourceType"),
        ([GOOD, b"subject_id,time,code"], "line 2: not JSON"),
        ([GOOD, LAB.replace(b"2020-01-11", b"2020-31-11")], "line 2: Observation/o1: .* is not a FHIR date"),
        ([GOOD, LAB.replace(b"5.5", b"NaN")], "line 2: not JSON"),
    ],
)
def test_a_bad_line_names_its_file_and_line_or_is_counted(tmp_path, lines, message):
    path = tmp_path / "Observation.ndjson"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_fhir(path)
    events, report = read_fhir(path, on_error="skip")
    assert report.skipped["malformed line"] == 1
    assert len(report.errors) == 1
    assert "MEDS_BIRTH" in events["code"].to_list()
    assert sum(report.resources_read.values()) == sum(line in (GOOD, LAB) for line in lines)


def test_a_bad_line_in_a_worker_names_its_file_and_line(tmp_path, monkeypatch):
    path = tmp_path / "a.ndjson"
    path.write_bytes(b"\n".join([GOOD, *[LAB] * 500, LAB[:-5], *[LAB] * 500]))
    monkeypatch.setattr("ehrseq.data.fhir.reader._PART_BYTES", 5_000)
    with pytest.raises(ValueError, match=r"a.ndjson, line 502: not JSON"):
        read_fhir(path, num_workers=2)


@pytest.mark.parametrize("name", ["x.ndjson.gz", "x.json.gz"])
def test_a_damaged_gzip_file(tmp_path, name):
    text = GOOD + b"\n" + b"\n".join(json.dumps(observation(id=f"o{n}", value=n * 1.37)).encode() for n in range(2000))
    packed = gzip.compress(text)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    write_ndjson(tmp_path / "Patient.ndjson", patient())
    with pytest.raises(ValueError, match=f"{name}: the gzip file is damaged or cut short"):
        read_fhir(tmp_path)
    _, report = read_fhir(tmp_path, on_error="skip")
    assert sum(report.skipped.values()) >= 1
    assert "damaged" in " ".join(report.errors)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "holds no FHIR files"),
        ({"a.txt": b"x"}, {}, "holds no FHIR files"),
        ({"a.ndjson": b""}, {}, "no Patient resource"),
        ({"a.ndjson": LAB}, {}, "no Patient resource"),
        ({"a.json": b'{"a": 1}'}, {}, "a.json: not a FHIR resource"),
        ({"a.json": b"{"}, {}, "a.json: not JSON"),
        ({"a.json": b"\xff\xfe{"}, {}, "a.json: not UTF-8"),
        ({"a.ndjson": GOOD}, {"on_error": "ignore"}, "on_error must be"),
        ({"a.ndjson": GOOD}, {"num_workers": 0}, "num_workers must be"),
    ],
)
def test_bad_folders(tmp_path, files, options, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_fhir(tmp_path, **options)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_fhir(tmp_path / "none")


@pytest.mark.parametrize(
    "entry", [{"resource": observation(issued="?")}, {"resource": "text"}, "text", None, 3, [patient()]], ids=repr
)
@pytest.mark.parametrize("name", ["b.json", "b.ndjson"])
def test_malformed_entries_of_a_bundle_are_skipped_one_by_one(tmp_path, entry, name):
    record = bundle(patient(), observation(), observation("good"))
    record["entry"][1] = entry
    (tmp_path / name).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"{name}.*entry 1"):
        read_fhir(tmp_path)
    events, report = read_fhir(tmp_path, on_error="skip")
    assert "LAB//LOINC//good" in events["code"].to_list()
    assert report.skipped == {"malformed resource": 1}
    assert f"{name}, entry 1 (" in report.errors[0]


def test_entries_without_a_resource_are_counted(tmp_path, monkeypatch):
    record = bundle(patient(), observation())
    record["entry"] += [{}, {"response": {"status": "204"}}]
    (tmp_path / "b.json").write_text(json.dumps(record))
    _, report = read_fhir(tmp_path)
    assert report.notes["bundle entries without a resource"] == 2
    said = []
    monkeypatch.setattr(logging.get_logger("ehrseq.data.fhir.reader"), "warning", said.append)
    assert patient_from_bundle(record)["events"]
    assert "bundle entries without a resource" in said[0]


def test_a_patient_given_twice_with_another_birth_is_counted(tmp_path):
    first, other = {**patient(), "birthDate": "1950-01-01"}, {**patient(), "birthDate": "1960-01-01"}
    write_ndjson(tmp_path / "Patient.ndjson", first, first, other)
    events, report = read_fhir(tmp_path)
    assert events.filter(pl.col("code") == "MEDS_BIRTH")["time"].dt.year().to_list() == [1960]
    warned = "patients given again with another birth date (two patients under one id?)"
    assert report.notes[warned] == 1
    write_ndjson(tmp_path / "Patient.ndjson", first, first)
    _, report = read_fhir(tmp_path)
    assert warned not in report.notes

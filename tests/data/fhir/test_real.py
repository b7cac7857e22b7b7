"""The FHIR reader on real exports, against what the files say when read in the plainest way, and against other forms
of the same patients.
"""

import gzip
import json
import tarfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from ehrseq.data import load_events, patient_from_bundle, read_fhir

MIMIC_CODE_SYSTEM = "http://mimic.mit.edu/fhir/mimic/CodeSystem/"


def resources(path: Path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None)


@pytest.fixture(scope="module")
def synthea(ehr_data):
    return read_fhir(ehr_data / "synthea-r4" / "ndjson", progress=False)


@pytest.fixture(scope="module")
def mimic(ehr_data):
    return read_fhir(ehr_data / "mimic-iv-fhir-demo" / "2.1.0" / "fhir", progress=False)


def test_synthea_counts(synthea):
    events, report = synthea
    # From the data's own description.
    assert report.subjects == 615
    assert report.resources_read["Encounter"] == 18_098
    assert report.resources_read["Observation"] == 88_674
    assert report.resources_read["Condition"] == 4_546
    assert (events["code"] == "VISIT_START//IMP").sum() == 621
    assert not report.unresolved_references
    assert not report.skipped
    assert dict(report.resources_not_used) == {"AllergyIntolerance": 374}


def test_synthea_observations_are_those_of_a_plain_reader(synthea, ehr_data):
    events, report = synthea
    expected: Counter = Counter()
    for item in resources(ehr_data / "synthea-r4" / "ndjson" / "Observation.ndjson.gz"):
        category = item["category"][0]["coding"][0]["code"]
        kind = {"laboratory": "LAB", "vital-signs": "VITAL", "vital-sign": "VITAL"}.get(category, "OBSERVATION")
        subject = report.subject_ids[item["subject"]["reference"].removeprefix("urn:uuid:")]
        visit = item["encounter"]["reference"].removeprefix("urn:uuid:")
        for part in item.get("component") or [item]:
            quantity = part.get("valueQuantity", {})
            text = part.get("valueString")
            if "valueCodeableConcept" in part:
                text = part["valueCodeableConcept"]["coding"][0]["display"]
            # float32, as the table holds it
            value = None if "value" not in quantity else pl.Series([quantity["value"]], dtype=pl.Float32)[0]
            code = f"{kind}//LOINC//{part['code']['coding'][0]['code']}"
            expected[subject, utc(item["issued"]), code, value, text, visit, quantity.get("unit")] += 1
    rows = events.filter(pl.col("code").str.contains("^(LAB|VITAL|OBSERVATION)//"))
    got = Counter(rows.iter_rows())
    # Texts lose outer spaces and line breaks; equal rows are kept once.
    assert set(got) == {
        tuple(" ".join(x.split()) if i == 4 and x else x for i, x in enumerate(row)) for row in expected
    }
    assert max(got.values()) == 1
    assert report.duplicates_dropped == sum(expected.values()) - len(expected)


def test_bundles_agree_with_ndjson(synthea, ehr_data):
    events, report = synthea
    bundles = sorted((ehr_data / "synthea-r4" / "bundles").glob("*.json.gz"))
    together, _ = read_fhir(ehr_data / "synthea-r4" / "bundles")
    assert len(bundles) == 4
    assert together["subject_id"].n_unique() == 4
    for path in bundles:
        record = json.loads(gzip.decompress(path.read_bytes()))
        made = patient_from_bundle(record)
        subject = report.subject_ids[record["entry"][0]["resource"]["id"]]
        assert made["subject_id"] == subject
        alone = together.filter(pl.col("subject_id") == subject)
        assert len(made["events"]) == alone.height
        order = alone.columns
        # A Bundle is in the order of care, NDJSON in the order of types: within one instant the rows may stand
        # differently.
        assert alone.sort(order).equals(events.filter(pl.col("subject_id") == subject).sort(order))


def test_mimic_counts(mimic, ehr_data):
    events, report = mimic
    assert report.subjects == 100
    assert report.resources_read["Encounter"] == 275 + 222 + 140
    assert report.resources_read["MedicationAdministration"] == 36_131 + 20_404
    assert report.time_from_encounter_end["Condition"] == 4_506 + 545
    assert not report.unresolved_references
    assert (events["code"] == "MEDS_DEATH").sum() == 31
    # Emergency and intensive care stays that are part of a hospital stay carry its id.
    starts = events.filter(pl.col("code").str.starts_with("VISIT_START"))
    assert starts.height == 637
    emergency = resources(ehr_data / "mimic-iv-fhir-demo" / "2.1.0" / "fhir" / "MimicEncounterED.ndjson.gz")
    assert starts["visit_id"].n_unique() == 275 + sum("partOf" not in item for item in emergency)


def test_mimic_fhir_and_mimic_meds_tell_the_same_stays_and_diagnoses(mimic, ehr_data):
    events, report = mimic
    meds, _ = load_events(ehr_data / "mimic-iv-demo-meds" / "0.0.1")
    folder = ehr_data / "mimic-iv-fhir-demo" / "2.1.0" / "fhir"
    mimic_id = {
        report.subject_ids[p["id"]]: int(p["identifier"][0]["value"])
        for p in resources(folder / "MimicPatient.ndjson.gz")
    }
    ours = events.with_columns(pl.col("subject_id").replace_strict(mimic_id))
    # 1. Stays: same subjects, same length (FHIR has the time zone, MEDS the wall clock).
    admitted = meds.filter(pl.col("code").str.starts_with("HOSPITAL_ADMISSION")).group_by("subject_id").len()
    assert (
        ours.filter(pl.col("code") == "VISIT_START//IMP")
        .group_by("subject_id")
        .len()
        .sort("subject_id")
        .equals(admitted.sort("subject_id"))
    )
    local = (
        ours.filter(pl.col("code") == "VISIT_START//IMP").sort("subject_id", "time")["time"].dt.replace_time_zone("UTC")
    )
    local = local.dt.convert_time_zone("America/New_York").dt.replace_time_zone(None)
    wall = meds.filter(pl.col("code").str.starts_with("HOSPITAL_ADMISSION")).sort("subject_id", "time")["time"]
    # Far-future dates are beyond the time zone tables of some systems: daylight saving may differ by an hour.
    assert ((local - wall).dt.total_minutes().is_in([-60, 0, 60])).all()
    # 2. Diagnoses of hospital stays: same codes per subject.
    hospital = {item["id"] for item in resources(folder / "MimicEncounter.ndjson.gz")}
    own = ours.filter(pl.col("code").str.starts_with("DIAGNOSIS//") & pl.col("visit_id").is_in(list(hospital)))
    mine = set(
        own.select(
            "subject_id", pl.col("code").str.split("//").list.last().str.replace(".", "", literal=True)
        ).iter_rows()
    )
    theirs = meds.filter(pl.col("code").str.starts_with("DIAGNOSIS//"))
    assert set(theirs.select("subject_id", pl.col("code").str.split("//").list.last()).iter_rows()) <= mine
    # 3. Nobody is discharged dead before the death.
    dead = ours.filter(pl.col("code") == "MEDS_DEATH").select("subject_id", died="time")
    last = (
        ours.filter(pl.col("code") == "VISIT_END//DIED").select("subject_id", left="time").join(dead, on="subject_id")
    )
    assert last.height == 15
    assert (last["died"] >= last["left"]).all()


def test_medications_of_mimic_are_resolved(mimic):
    events, _ = mimic
    assert not events["code"].str.contains("\0", literal=True).any()
    # A mixture is one row per ingredient, each with a code of its own.
    assert events["code"].str.starts_with("MEDICATION//NDC//").sum() > 10_000


def test_official_hl7_examples(ehr_data, tmp_path):
    archive = next((ehr_data / "fhir-r4-examples").glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    events, report = read_fhir(tmp_path, on_error="skip", progress=False)
    assert report.skipped["malformed file"] + report.skipped["malformed resource"] == 0, report.errors
    assert report.resources_read["Patient"] > 22
    rows = {(row[2], row[1]) for row in events.iter_rows()}
    # Condition/f201: recorded 2013-04-04, of Patient/f201
    assert ("DIAGNOSIS//SNOMED//386661006", datetime(2013, 4, 4, 23, 59, 59, 999_999)) in rows
    # Procedure/f002: performed until 2013-03-08T09:30:10+01:00
    assert ("PROCEDURE//SNOMED//359615001", datetime(2013, 3, 8, 8, 30, 10)) in rows
    # Immunization/protocol: on 2018-06-18, of Patient/example, whose encounters are at +10:00; notGiven is left out
    assert ("IMMUNIZATION//CVX//104", datetime(2018, 6, 18, 13, 59, 59, 999_999)) in rows
    assert not any(code == "IMMUNIZATION//CVX//01" for code, _ in rows)
    assert report.entered_in_error["MedicationAdministration"] == 1
    assert report.notes["encounters that are part of themselves"] == 1


def test_official_example_of_references(ehr_data):
    archive = next((ehr_data / "fhir-r4-examples").glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        member = next(name for name in packed.getnames() if name.endswith("/Bundle-bundle-references.json"))
        record = json.load(packed.extractfile(member))
    # The example's observations have no time: give each one, to see whose row it becomes.
    for entry in record["entry"]:
        if entry["resource"]["resourceType"] == "Observation":
            entry["resource"]["issued"] = "2020-01-01T00:00:00Z"
            entry["resource"]["valueString"] = entry["fullUrl"]
    from ehrseq.data.fhir.reader import events_from_bundle

    events, report = events_from_bundle(record)
    owner = dict(events.filter(pl.col("text_value").is_not_null()).select("text_value", "subject_id").iter_rows())
    base = "http://example.org/fhir/Observation/"
    assert owner[base + "123"] == owner[base + "124"] == report.subject_ids["23"]
    assert owner[base + "12"] == report.subject_ids["04121321-4af5-424c-a0e1-ed3aab1c349d"]
    assert owner[base + "47"] == report.subject_ids["45"]
    assert owner[base + "48"] == report.subject_ids["23"]  # by identifier
    # Another server's Patient/23 and Patient/1 are not in the Bundle.
    assert base + "14" not in owner
    assert "http://example.org/fhir-2/Observation/14" not in owner

"""A resource that is given several times: its last version counts, and what it replaces is counted."""

from __future__ import annotations

import pytest

from ehrseq.data import read_fhir
from ehrseq.data.fhir.reader import events_from_bundle
from tests.data.fhir.samples import bundle, concept, encounter, observation, patient, resource, write_ndjson

REPLACED = "resources that a later version of them replaces"
GONE = "facts that a later version of their resource no longer states"


def stamped(day: int, **more):
    return {"meta": {"lastUpdated": f"2021-01-{day:02d}T00:00:00Z", "versionId": str(day)}, **more}


def values(events):
    return events.filter(events["code"].str.starts_with("LAB"))["numeric_value"].to_list()


@pytest.mark.parametrize(
    ("versions", "kept"),
    [
        ([observation(value=1.0), observation(value=2.0)], [2.0]),
        ([observation(value=1.0, **stamped(2)), observation(value=2.0, **stamped(1))], [1.0]),
        ([observation(value=1.0, **stamped(1)), observation(value=2.0, **stamped(2))], [2.0]),
        ([observation(value=1.0, **stamped(1)), observation(value=2.0)], [1.0]),  # one that says when it was written
        ([observation(value=1.0), observation(value=1.0)], [1.0]),
        ([observation(value=1.0), observation(value=2.0, status="entered-in-error")], []),
        ([observation(value=1.0), observation(value=None, dataAbsentReason={"text": "error"})], []),
        ([observation(value=2.0, status="entered-in-error"), observation(value=1.0)], [1.0]),
        ([observation(value=1.0, id=None), observation(value=2.0, id=None)], [1.0, 2.0]),
        ([observation(value=1.0, id="a"), observation(value=2.0, id="b")], [1.0, 2.0]),
    ],
)
@pytest.mark.parametrize("lines", [True, False])
def test_the_last_version_counts(tmp_path, versions, kept, lines):
    versions = [{name: value for name, value in version.items() if value is not None} for version in versions]
    if lines:  # the quick way of whole blocks, in two files
        (tmp_path / "source").mkdir()
        write_ndjson(tmp_path / "source" / "a.ndjson", patient(), encounter())
        for number, version in enumerate(versions):
            write_ndjson(tmp_path / "source" / f"Observation.{number}.ndjson", version)
        events, report = read_fhir(tmp_path / "source")
    else:
        events, report = events_from_bundle(bundle(patient(), encounter(), *versions))
    assert values(events) == kept
    same = versions[0].get("id") == versions[1].get("id") != None  # noqa: E711
    assert report.notes[REPLACED] == int(same)
    equal = same and versions[0].get("valueQuantity") == versions[1].get("valueQuantity")
    assert report.duplicates_dropped == int(equal)
    assert report.skipped[GONE] == int(same and not equal and versions[0].get("status") != "entered-in-error")


def test_components_of_the_last_version_replace_those_of_the_first():
    def panel(*parts):
        made = [{"code": concept(code), "valueQuantity": {"value": value}} for code, value in parts]
        return observation("panel", value=None, component=made)

    events, report = events_from_bundle(
        bundle(patient(), panel(("1", 1.0), ("2", 2.0), ("3", 3.0)), panel(("1", 1.0), ("2", 5.0)))
    )
    assert sorted(values(events)) == [1.0, 5.0]
    assert (report.duplicates_dropped, report.skipped[GONE]) == (1, 2)


def test_the_last_version_of_encounters_and_medications():
    first, last = encounter(end=None), encounter(**stamped(3))
    drug, other = ({"resourceType": "Medication", "id": "m", "code": concept(code)} for code in ("10", "11"))
    given = resource(
        "MedicationRequest", authoredOn="2020-01-11T01:00:00Z", medicationReference={"reference": "Medication/m"}
    )
    diagnosis = resource("Condition", id="c1", code=concept("38341003"))
    events, _ = events_from_bundle(bundle(patient(), last, first, drug, other, given, diagnosis))
    codes = events["code"].to_list()
    assert codes.count("VISIT_START//IMP") == codes.count("VISIT_END//IMP") == 1
    assert "MEDICATION//SNOMED//11" in codes
    assert "DIAGNOSIS//SNOMED//38341003" in codes  # at the end that the last version states


def test_one_id_of_two_patients_is_no_version():
    events, report = events_from_bundle(
        bundle(
            patient(),
            patient("p2"),
            observation(value=1.0),
            observation(value=2.0, subject={"reference": "Patient/p2"}),
        )
    )
    assert sorted(values(events)) == [1.0, 2.0]
    assert report.notes[REPLACED] == 0


def test_an_encounter_of_another_patient_is_no_visit():
    strange = observation(subject={"reference": "Patient/p2"})
    events, report = events_from_bundle(bundle(patient(), patient("p2"), encounter(), strange))
    assert events.filter(events["code"].str.starts_with("LAB"))["visit_id"].to_list() == [None]
    assert report.unresolved_references == {"Encounter (rows kept, without a visit)": 1}


@pytest.mark.parametrize("died", [{"deceasedBoolean": True}, {"deceasedDateTime": "2031-05-04"}])
def test_a_patient_of_whom_the_later_version_says_nothing_more_is_not_dead(died, tmp_path):
    bare = {"resourceType": "Patient", "id": "p1"}
    versions = [{**bare, **died, "meta": {"lastUpdated": "2031-05-05T00:00:00Z"}}]
    versions += [{**bare, "deceasedBoolean": False, "meta": {"lastUpdated": "2031-06-01T00:00:00Z"}}]
    for order in (versions, versions[::-1]):
        write_ndjson(tmp_path / "Patient.ndjson", *order)
        write_ndjson(tmp_path / "Encounter.ndjson", encounter())
        events, _ = read_fhir(tmp_path, progress=False)
        assert events["code"].to_list() == ["VISIT_START//IMP", "VISIT_END//IMP"]

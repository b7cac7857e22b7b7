"""What hospitals really send of codes, patients and files: each test is a kind of record that was once read wrong, its
name says what is right and why. Values are invented; the truth is the standard, or the calendar.
"""

import json
import logging
import time

import polars as pl
import pytest

from ehrseq.data import patient_from_bundle, read_fhir
from ehrseq.data.fhir.reader import events_from_bundle
from tests.data.fhir.samples import (
    ICD10CM,
    LOCAL,
    LOINC,
    UCUM,
    V3,
    bundle,
    coded,
    codes,
    concept,
    encounter,
    observation,
    patient,
    read,
    resource,
    write_ndjson,
)

# 5. Every coding, and what negates

VERIFICATION = "http://terminology.hl7.org/CodeSystem/condition-ver-status"


@pytest.mark.parametrize(
    ("status", "counted"),
    [
        (coded(("http://snomed.info/sct", "410594000"), (VERIFICATION, "refuted")), "refuted"),
        (coded((LOCAL, "X"), (VERIFICATION, "entered-in-error")), "entered-in-error"),
        (coded(("http://snomed.info/sct", "410516002")), "refuted"),
        (coded(("https://fhir.kbv.de/CodeSystem/KBV_CS_SFHIR_ICD_DIAGNOSESICHERHEIT", "A")), "refuted"),
        ({"text": "Refuted"}, "refuted"),
        ({"coding": [{"display": "x"}], "text": "entered in error"}, "entered-in-error"),
        ({"coding": [{"display": "Refuted"}]}, "refuted"),
        (coded((LOCAL, "X", "Refuted")), "refuted"),
        ({**coded((LOCAL, "X")), "text": "Ruled out"}, "refuted"),
        (coded((LOCAL, "7", "Entered in Error")), "entered-in-error"),
        (coded(("2.16.840.1.113883.6.96", " 410516002")), "refuted"),
        (coded((LOCAL, "X", "Confirmed")), None),
        ({**coded((VERIFICATION, "confirmed")), "text": "Refuted"}, None),
        (coded((VERIFICATION, "confirmed")), None),
        (coded((VERIFICATION, "unconfirmed")), None),
        (coded((VERIFICATION, "differential")), None),
        ({}, None),
    ],
    ids=str,
)
def test_any_coding_of_a_verification_status_negates(status, counted):
    condition = resource(
        "Condition", code=coded((ICD10CM, "I10")), recordedDate="2020-01-11", verificationStatus=status
    )
    events, report = read(patient(), encounter(), condition)
    assert codes(events, "DIAGNOSIS") == ([] if counted else ["DIAGNOSIS//ICD10CM//I10"])
    assert report.skipped["Condition: refuted"] == (counted == "refuted")
    assert report.entered_in_error["Condition"] == (counted == "entered-in-error")


SURE = "http://fhir.de/StructureDefinition/icd-10-gm-diagnosesicherheit"
CERTAINTY = "https://fhir.kbv.de/CodeSystem/KBV_CS_SFHIR_ICD_DIAGNOSESICHERHEIT"


def german(certainty):
    coding = {"system": "http://fhir.de/CodeSystem/bfarm/icd-10-gm", "version": "2031", "code": "I10.90"}
    return {**coding, "extension": [{"url": SURE, "valueCoding": {"system": CERTAINTY, "code": certainty}}]}


@pytest.mark.parametrize(
    ("code", "read_as"),
    [
        ({"coding": [german("A")]}, []),
        ({"coding": [german("G")]}, ["DIAGNOSIS//ICD10GM//I10.90"]),
        (coded(("http://snomed.info/sct", "160245001")), []),
        (coded(("http://snomed.info/sct", "787482006")), []),
        (coded(("urn:oid:2.16.840.1.113883.6.96", "160244002")), []),
        (coded(("http://snomed.info/sct", "428197003")), []),
        (coded(("http://hl7.org/fhir/uv/ips/CodeSystem/absent-unknown-uv-ips|1.1.0", "no-known-problems")), []),
        (coded(("http://snomed.info/sct", "243796009:408729009=410516002,246090004=195967001")), []),
        (coded(("http://hl7.org/fhir/uv/ips/CodeSystem/absent-unknown-uv-ips", "no-known-problems")), []),
        (coded(("http://snomed.info/sct", "195967001")), ["DIAGNOSIS//SNOMED//195967001"]),
    ],
    ids=str,
)
def test_a_finding_that_is_known_to_be_absent_is_left_out_and_counted(code, read_as):
    condition = resource("Condition", code=code, recordedDate="2020-01-11")
    events, report = read(patient(), encounter(), condition)
    assert codes(events, "DIAGNOSIS") == read_as
    assert report.skipped["Condition: known to be absent"] == (not read_as)


@pytest.mark.parametrize("kind", ["Condition", "Procedure", "Observation", "MedicationRequest", "Encounter"])
def test_a_modifier_extension_that_is_not_understood_is_counted_and_its_resource_left_out(kind):
    made = {
        "Condition": resource("Condition", code=concept("1"), recordedDate="2020-01-11"),
        "Procedure": resource("Procedure", code=concept("1"), performedDateTime="2020-01-11"),
        "Observation": observation(),
        "MedicationRequest": resource(
            "MedicationRequest", medicationCodeableConcept=concept("1"), authoredOn="2020-01-11"
        ),
        "Encounter": encounter(),
    }[kind]
    url = "https://hospital.example/fhir/negated"
    before, _ = read(patient(), made)
    events, report = read(patient(), {**made, "modifierExtension": [{"url": url, "valueBoolean": True}]})
    assert set(codes(events)) == {"MEDS_BIRTH", "GENDER//F"} < set(codes(before))
    assert report.skipped[f"{kind}: modifier extension not understood ({url})"] == 1
    assert read(patient(), {**made, "modifierExtension": []})[0].equals(before)


@pytest.mark.parametrize(("flag", "kept"), [(True, 0), ("true", 0), (False, 1), ("false", 1), (None, 1)])
def test_what_must_not_be_given_is_no_medication_whether_the_flag_is_quoted_or_not(flag, kept):
    request = resource("MedicationRequest", medicationCodeableConcept=concept("1"), authoredOn="2020-01-11")
    events, report = read(patient(), request | {"intent": "order", "doNotPerform": flag})
    assert len(codes(events, "MEDICATION")) == kept == 1 - report.skipped["MedicationRequest: doNotPerform"]


def test_a_component_with_a_modifier_extension_is_left_out_alone():
    part = {"code": coded((LOINC, "8480-6")), "valueQuantity": {"value": 120, "unit": "mmHg"}}
    other = {**part, "code": coded((LOINC, "8462-4")), "modifierExtension": [{"url": "http://x.example/m"}]}
    events, report = read(patient(), observation(value=None, component=[part, other]))
    assert codes(events, "LAB") == ["LAB//LOINC//8480-6"]
    assert report.skipped["Observation.component: modifier extension not understood (http://x.example/m)"] == 1


@pytest.mark.parametrize(("intent", "kept"), [
    ("order", True), ("Order", True), ("Original_Order", True), ("PROPOSAL", False),
    ("original-order", True), ("instance-order", True), (None, True),
    ("proposal", False), ("plan", False), ("option", False),
])  # fmt: skip
def test_a_medication_request_that_is_no_order_is_left_out_and_counted(intent, kept):
    request = resource("MedicationRequest", medicationCodeableConcept=concept("1"), authoredOn="2020-01-11")
    events, report = read(patient(), encounter(), {**request, **({"intent": intent} if intent else {})})
    assert bool(codes(events, "MEDICATION")) is kept
    assert report.skipped[f"MedicationRequest: intent {intent}"] == (not kept)


@pytest.mark.parametrize(
    ("category", "kind"),
    [
        ([coded((LOCAL, "K7"), ("http://terminology.hl7.org/CodeSystem/v2-0074", "LAB"))], "LAB"),
        ([coded((LOCAL, "K7"), ("http://terminology.hl7.org/CodeSystem/v2-0074", "HM"))], "LAB"),
        ([coded((LOCAL, "K7")), coded((LOINC, "26436-6"))], "LAB"),
        ([coded(("http://snomed.info/sct", "108252007"))], "LAB"),
        ([coded((LOCAL, "K7", "Laboratory"))], "LAB"),
        ([coded((LOCAL, "K7"), (None, "vital-signs"))], "VITAL"),
        ([{**coded((LOCAL, "K7")), "text": "Vital Signs"}], "VITAL"),
        ([coded((LOCAL, "K7"))], "OBSERVATION"),
    ],
    ids=str,
)
def test_any_coding_of_a_category_tells_the_kind(category, kind):
    events, _ = read(patient(), observation("2160-0", category=category))
    assert codes(events, kind) == [f"{kind}//LOINC//2160-0"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            resource("Condition", code=concept("1"), verificationStatus="confirmed"),
            "verificationStatus is text; FHIR R4",
        ),
        (resource("Condition", code="I10"), "is text; FHIR R4 has a CodeableConcept .is this STU3"),
        (observation(category={"coding": []}), "category is an object; FHIR R4 has a list"),
        (encounter(hospitalization={"dischargeDisposition": "home"}), "dischargeDisposition is text"),
        (resource("Condition", code={"coding": {"code": "1"}}), "coding is dict; FHIR R4 has a list of Codings"),
        (encounter(**{"class": 3}), "class is int; FHIR R4 has a Coding"),
    ],
)
def test_elements_of_other_versions_of_fhir_are_refused_by_name(made, message):
    with pytest.raises(ValueError, match=message):
        read(patient(), made)


# 6. Code systems and units in all their spellings


@pytest.mark.parametrize(
    ("system", "name"),
    [
        ("https://loinc.org", "LOINC"),
        ("HTTP://LOINC.ORG/", "LOINC"),
        ("http://loinc.org|2.77", "LOINC"),
        ("2.16.840.1.113883.6.1", "LOINC"),
        ("urn:oid:2.16.840.1.113883.6.1", "LOINC"),
        ("LN", "LOINC"),
        ("http://snomed.info/sct/731000124108", "SNOMED"),
        ("http://snomed.info/sct/731000124108/version/20250301", "SNOMED"),
        ("http://www.snomed.info/sct", "SNOMED"),
        ("SNOMED-CT", "SNOMED"),
        ("https://hl7.org/fhir/sid/icd-10-cm", "ICD10CM"),
        ("http://hl7.org/fhir/sid/icd-10-cm/2031", "ICD10CM"),
        ("ICD-10-CM", "ICD10CM"),
        ("http://fhir.de/CodeSystem/bfarm/icd-10-gm", "ICD10GM"),
        ("http://fhir.de/CodeSystem/dimdi/icd-10-gm", "ICD10GM"),
        ("http://hl7.org/fhir/sid/icd-10-am", "ICD10AM"),
        ("https://fhir.infoway-inforoute.ca/CodeSystem/icd-10-ca", "ICD10CA"),
        ("http://hl7.org/fhir/sid/icd-10", "ICD10"),
        ("https://hospital.example/codes/icd-10-who", "ICD10"),
        ("urn:oid:2.16.840.1.113883.6.3", "ICD10"),
        ("https://www.nlm.nih.gov/research/umls/rxnorm/", "RXNORM"),
        ("http://id.who.int/icd/release/11", "ICD11"),
        ("http://id.who.int/icd/release/11/mms", "ICD11"),
        ("https://id.who.int/icd/release/11/2024-01/mms", "ICD11"),
        ("http://hl7.org/fhir/sid/icd-11", "ICD11"),
        ("http://id.who.int/icd/release/10", "ICD10"),
        ("http://id.who.int/icd/release/10/2019", "ICD10"),
        ("urn:oid:1.2.276.0.76.5.409", "ICD10GM"),
        ("1.2.276.0.76.5.463", "ICD10GM"),
        ("urn:oid:1.2.276.0.76.5.114", "1.2.276.0.76.5.114"),
        ("I10G2004", "ICD10GM"),
        ("ICD10GM2016", "ICD10GM"),
        ("http://fhir.de/CodeSystem/bfarm/atc", "ATC"),
        ("http://fhir.de/CodeSystem/dimdi/atc", "ATC"),
        ("urn:oid:2.16.840.1.113883.6.2", "ICD9CM"),
        ("2.16.840.1.113883.6.42", "ICD9CM"),
        ("I9", "ICD9"),
        ("I9CDX", "ICD9CM"),
        ("http://hl7.org/fhir/sid/icd-10-cm/version/20310101", "ICD10CM"),
        ("http://hl7.org/fhir/sid/icd-9-cm/diagnosis", "HL7.ORG"),
    ],
)
def test_a_code_system_has_one_name_in_every_spelling(system, name):
    from ehrseq.data.fhir.systems import system_name

    if name == "HL7.ORG":
        assert system_name(system, "DIAGNOSIS") == "ICD-9-CM/DIAGNOSIS"
    else:
        assert system_name(system, "DIAGNOSIS") == name


@pytest.mark.parametrize(
    "system",
    ["https://hl7.org/fhir/sid/icd-10-cm", "http://fhir.de/CodeSystem/bfarm/icd-10-gm",
     "http://hl7.org/fhir/sid/icd-10-am", "http://hl7.org/fhir/sid/icd-10-ca", "http://hl7.org/fhir/sid/icd-10"],
)  # fmt: skip
def test_national_editions_of_icd_10_are_one_family_for_the_tasks(system):
    from ehrseq.tasks import label_events

    first = encounter("a", "2030-05-02T09:00:00Z", "2030-05-08T09:00:00Z")
    second = encounter("b", "2030-09-02T09:00:00Z", "2030-09-08T09:00:00Z")
    link = {"reference": "Encounter/b"}
    code = coded((system, "I10"))
    diagnosis = resource("Condition", code=code, recordedDate="2030-09-03T10:00:00Z", encounter=link)
    events, _ = read(patient(), first, second, diagnosis)
    labels = label_events(events, "hypertension", end_of_data="2034-01-01", progress=False).labels["hypertension"]
    assert labels["boolean_value"].to_list() == [True]


@pytest.mark.parametrize(
    ("quantity", "unit"),
    [
        ({"unit": "micromol/L", "system": UCUM, "code": "umol/L"}, "umol/L"),
        ({"unit": "\u03bcmol/L", "system": "https://unitsofmeasure.org/", "code": "umol/L"}, "umol/L"),
        ({"unit": "pounds", "system": "urn:oid:2.16.840.1.113883.6.8", "code": "[lb_av]"}, "[lb_av]"),
        ({"unit": "mg/100mL"}, "mg/100mL"),
        ({"unit": "\u03bcg"}, "\u00b5g"),
        ({"code": "mg"}, "mg"),
        ({"unit": "Milligramm", "system": LOCAL, "code": "17"}, "Milligramm"),
        ({}, None),
    ],
    ids=str,
)
def test_the_ucum_code_is_the_unit_before_the_text_for_people(quantity, unit):
    events, _ = read(patient(), observation(valueQuantity={"value": 80, **quantity}))
    assert events.filter(pl.col("code").str.starts_with("LAB"))["unit"].to_list() == [unit]


# 7. A dataset that cannot be understood says so

VENDOR = "urn:oid:1.2.840.114350.1.72.1.7.7.10.696784.13260"


@pytest.mark.parametrize(
    ("of_class", "more", "name"),
    [
        ({"system": V3, "code": "IMP"}, {}, "IMP"),
        ({"system": V3, "code": "imp"}, {}, "IMP"),
        ({"system": "http://hl7.org/fhir/v3/ActCode", "code": "ACUTE"}, {}, "ACUTE"),
        ({"coding": [{"system": V3, "code": "IMP"}]}, {}, "IMP"),
        ([{"coding": [{"system": LOCAL, "code": "S"}, {"system": V3, "code": "IMP"}]}], {}, "IMP"),
        ("inpatient", {}, "IMP"),
        ({"system": VENDOR, "code": "1", "display": "Inpatient"}, {}, "IMP"),
        ({"system": VENDOR, "code": "5", "display": "Hospital Outpatient Visit"}, {}, "AMB"),
        ({"display": "Emergency"}, {}, "EMER"),
        ({"text": "Inpatient"}, {}, "IMP"),
        ({"system": LOCAL, "code": "S", "display": "Stationär"}, {}, "IMP"),
        ({"system": LOCAL, "code": "vollstationaer"}, {}, "IMP"),
        ({"system": LOCAL, "code": "S", "display": "Intensivstationär"}, {}, "ICU"),
        ({"system": LOCAL, "code": "S", "display": "Stationaere Behandlung"}, {}, "IMP"),
        ({"system": LOCAL, "code": "H", "display": "Hospitalisation complète"}, {}, "IMP"),
        ({"system": "http://terminology.hl7.org/CodeSystem/v2-0004", "code": "I"}, {}, "IMP"),
        ({"system": "urn:oid:2.16.840.1.113883.12.4", "code": "E"}, {}, "EMER"),
        ({"system": "http://snomed.info/sct", "code": "32485007"}, {}, "IMP"),
        (None, {"type": [coded(("http://snomed.info/sct", "32485007"))]}, "IMP"),
        ({"system": LOCAL, "code": "7"}, {"type": [{"text": "Inpatient"}]}, "IMP"),
        ({"system": LOCAL, "code": "7"}, {"type": [coded((LOCAL, "x", "Emergency department"))]}, "EMER"),
        ({"system": LOCAL, "code": "7", "display": "Inpatient/Outpatient"}, {}, "7"),
        ({"system": LOCAL, "code": "7", "display": "Non-inpatient"}, {}, "7"),
        ({"system": LOCAL, "code": "7", "display": "Emergency contact"}, {}, "7"),
        ({"system": LOCAL, "code": "7", "display": "Inpatient consult"}, {}, "7"),
        ({"system": LOCAL, "code": "7", "display": "Outpatient surgery waiting list"}, {}, "7"),
        ({"system": LOCAL, "code": "7", "display": "akut"}, {}, "7"),
        ({"system": "http://hl7.org/fhir/v2/0007", "code": "7", "display": "Routine"}, {}, "7"),
        ({"system": LOCAL, "code": "7", "display": "Inpatient hospital encounter"}, {}, "IMP"),
        ({"system": LOCAL, "code": "7", "display": "Emergency care visit"}, {}, "EMER"),
        ({"system": LOCAL, "code": "I"}, {}, "I"),
        ({"system": LOCAL, "code": "7", "display": "Kurzlieger"}, {}, "7"),
    ],
    ids=str,
)
def test_a_class_is_told_by_its_system_or_by_unambiguous_words(of_class, more, name):
    stay = {**encounter(), "class": of_class, **more}
    events, report = read(patient(), stay)
    assert codes(events, "VISIT_START") == [f"VISIT_START//{name}"]
    unknown = [note for note in report.notes if note.startswith("encounters of classes not known")]
    assert len(unknown) == (name in ("7", "I"))


def test_a_class_that_is_not_known_is_named_counted_warned_about_and_can_be_mapped(tmp_path, caplog):
    other = {"system": LOCAL, "code": "7", "display": "Kurzlieger"}
    write_ndjson(tmp_path / "Patient.ndjson", patient())
    stays = [encounter(f"e{n}", **{"class": other}) for n in range(3)]
    write_ndjson(tmp_path / "Encounter.ndjson", *stays)
    with caplog.at_level(logging.WARNING):
        events, report = read_fhir(tmp_path, progress=False)
    assert report.notes["encounters of classes not known: 7 (Kurzlieger)"] == 3
    assert "holds encounters but no admission" in caplog.text
    assert "7 (Kurzlieger): 3" in caplog.text
    assert "--encounter-class '7=IMP'" in caplog.text
    for spelling in ("7", f"{LOCAL}|7", "kurzlieger"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            events, report = read_fhir(tmp_path, progress=False, encounter_classes={spelling: "imp"})
        assert codes(events, "VISIT_START") == ["VISIT_START//IMP"] * 3
        assert "no admission" not in caplog.text
        assert report.settings == {"encounter_classes": {spelling.casefold(): "IMP"}}


@pytest.mark.parametrize("mapping", [{"7": "STATIONARY"}, {"7": None}, {" ": "IMP"}])
def test_a_mapping_to_no_class_is_refused(mapping):
    with pytest.raises(ValueError, match="encounter_classes maps"):
        read(patient(), encounter_classes=mapping)


# 8. Identity


@pytest.mark.parametrize("kind", ["replaced-by", "refer", "seealso"])
def test_patients_that_a_link_joins_are_one_subject(kind):
    old = patient("old", link=[{"other": {"reference": "Patient/7"}, "type": kind}])
    lab = observation(subject={"reference": "Patient/old"}, encounter=None)
    events, report = read(old, patient("7"), lab, encounter(subject={"reference": "Patient/7"}))
    assert events["subject_id"].n_unique() == 1
    assert len(codes(events, "LAB")) == len(codes(events, "VISIT_START")) == 1
    assert report.notes["patients that are another one (Patient.link), read as one"] == 1
    if kind != "seealso":
        assert events["subject_id"][0] == 7
        assert report.subject_ids == {"old": 7, "7": 7}
    assert patient_from_bundle(bundle(old, patient("7"), lab))["subject_id"] == events["subject_id"][0]


def test_replaces_points_the_other_way_and_circles_end():
    new = patient("7", link=[{"other": {"reference": "Patient/old"}, "type": "replaces"}])
    old = patient("old", link=[{"other": {"reference": "Patient/7"}, "type": "replaced-by"}])
    assert set(read(new, old)[0]["subject_id"]) == {7}
    circle = patient("7", link=[{"other": {"reference": "Patient/old"}, "type": "replaced-by"}])
    assert set(read(circle, old)[0]["subject_id"]) == {7}


def test_a_link_to_a_patient_that_is_not_there_changes_nothing():
    alone = patient("7", link=[{"other": {"reference": "Patient/8"}, "type": "replaced-by"}])
    events, report = read(alone)
    assert set(events["subject_id"]) == {7}
    assert report.notes["links to patients that were not given"] == 1


def test_a_subject_id_depends_on_the_patients_own_id_alone():
    alone, _ = read(patient("12"))
    beside, _ = read(patient("12", gender="male"), patient("ward-7"))
    assert set(alone["subject_id"]) == {12}
    assert set(beside.filter(pl.col("code") == "GENDER//M")["subject_id"]) == {12}


def deletion(url, **more):
    return {
        "resourceType": "Bundle",
        "type": "transaction",
        "entry": [{"request": {"method": "DELETE", "url": url}, **more}],
    }


@pytest.mark.parametrize("full_url", [None, "https://srv.example/fhir/Observation/o1"])
def test_a_deletion_of_a_bulk_export_is_applied(tmp_path, full_url):
    write_ndjson(tmp_path / "Patient.ndjson", patient())
    write_ndjson(tmp_path / "Observation.ndjson", observation(), observation("718-7", id="o2"))
    more = {"fullUrl": full_url} if full_url else {}
    write_ndjson(tmp_path / "AAA_deleted.ndjson", deletion("Observation/o1", **more), deletion("Observation/none"))
    events, report = read_fhir(tmp_path, progress=False)
    assert codes(events, "LAB") == ["LAB//LOINC//718-7"]
    assert report.skipped["rows of resources that the source deleted"] == 1
    assert report.notes["resources that the source deletes"] == 2


def test_deleted_patients_encounters_and_medications_are_gone(tmp_path):
    gone = bundle(patient("p1"), encounter(), patient("p2"), observation(id="l"))
    gone["entry"].append(deletion("Patient/p2")["entry"][0])
    gone["entry"].append(deletion("Encounter/e1")["entry"][0])
    events, _ = events_from_bundle(gone)
    assert events["subject_id"].n_unique() == 1
    assert codes(events, "VISIT") == []
    assert events.filter(pl.col("code").str.starts_with("LAB"))["visit_id"].to_list() == [None]


def test_what_is_written_again_after_its_deletion_stays():
    first = observation(meta={"lastUpdated": "2031-05-01T00:00:00Z"})
    again = observation("718-7", meta={"lastUpdated": "2031-05-03T00:00:00Z"})
    removal = {**deletion("Observation/o1"), "meta": {"lastUpdated": "2031-05-02T00:00:00Z"}}
    events, _ = events_from_bundle(bundle(patient(), first, removal, again))
    assert codes(events, "LAB") == ["LAB//LOINC//718-7"]


@pytest.mark.parametrize(("name", "reference"), [("#a", "#a"), ("a", "#a")])
def test_a_contained_id_may_carry_its_hash(name, reference):
    medication = {"resourceType": "Medication", "id": name, "code": concept("1191")}
    request = resource(
        "MedicationRequest",
        contained=[medication],
        medicationReference={"reference": reference},
        authoredOn="2020-01-11",
    )
    assert codes(read(patient(), encounter(), request)[0], "MEDICATION") == ["MEDICATION//SNOMED//1191"]


# 10. Nothing is skipped unseen


def test_files_that_are_not_read_are_named_in_the_report(tmp_path):
    write_ndjson(tmp_path / "1.Patient.ndjson", patient())
    log = {"exportId": "e", "timestamp": "2031-05-02T09:00:00Z", "eventId": "kickoff", "eventDetail": {}}
    write_ndjson(tmp_path / "log.ndjson", log)
    write_ndjson(tmp_path / "audit-trail.ndjson", log, log)
    write_ndjson(tmp_path / "Observation.NDJSON", observation())
    (tmp_path / "Condition.xml").write_text("<Condition xmlns='http://hl7.org/fhir'/>")
    (tmp_path / "Device.ndjson.bz2").write_bytes(b"BZh")
    (tmp_path / "._1.Patient.ndjson").write_bytes(b"\x00\x05\x16\x07")
    manifest = {"transactionTime": "2031-05-02T09:00:00Z", "request": "x", "output": [{"type": "Patient", "url": "u"}]}
    (tmp_path / "export-manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "x.ndjson").write_bytes(b"\x00")
    _, report = read_fhir(tmp_path, progress=False)
    assert dict(report.files_not_read) == dict.fromkeys(
        [
            "._1.Patient.ndjson", "Condition.xml", "Device.ndjson.bz2", "Observation.NDJSON", "__MACOSX/x.ndjson",
            "audit-trail.ndjson", "export-manifest.json", "log.ndjson",
        ],
        1,
    )  # fmt: skip
    assert report.files == 1
    assert "Condition.xml" in str(report)


def test_many_files_that_are_not_read_are_counted_by_ending(tmp_path):
    write_ndjson(tmp_path / "Patient.ndjson", patient())
    for number in range(40):
        (tmp_path / f"{number:02d}.xml").write_text("<x/>")
    _, report = read_fhir(tmp_path, progress=False)
    assert report.files_not_read["further files: *.xml"] == 10
    assert sum(report.files_not_read.values()) == 40


def test_a_damaged_file_is_no_by_product(tmp_path):
    write_ndjson(tmp_path / "Patient.ndjson", patient())
    (tmp_path / "Observation.ndjson").write_text('{"resourceTyp')
    with pytest.raises(ValueError, match=r"Observation.ndjson, line 1: not JSON"):
        read_fhir(tmp_path, progress=False)


# 13 and 14. No cost that grows with the square, or faster


def many(patients: int):
    for number in range(patients):
        who = {"reference": f"Patient/p{number}"}
        yield patient(f"p{number}")
        for name in "12":
            yield encounter(name, subject=who)
        yield {
            "resourceType": "Condition",
            "subject": who,
            "encounter": {"reference": "Encounter/1"},
            "code": concept("x"),
        }


def test_encounter_ids_that_repeat_over_patients_cost_no_square():
    def seconds(patients: int) -> float:
        record = bundle(*many(patients))
        began = time.process_time()
        events, _ = events_from_bundle(record)
        assert len(codes(events, "DIAGNOSIS")) == patients
        return time.process_time() - began

    seconds(100)
    small, large = seconds(1000), seconds(8000)
    assert large < 24 * small  # 8 by the number, 64 by its square


def test_ingredients_that_point_at_each_other_cost_no_more_than_their_text():
    names = [f"m{number}" for number in range(24)]
    contained = [
        {
            "resourceType": "Medication",
            "id": name,
            "ingredient": [{"itemReference": {"reference": f"#{other}"}} for other in names if other != name],
        }
        for name in names
    ]
    contained[-1] = {"resourceType": "Medication", "id": names[-1], "code": concept("1191")}
    request = resource(
        "MedicationRequest", contained=contained, medicationReference={"reference": "#m0"}, authoredOn="2020-01-11"
    )
    events, _ = read(patient(), encounter(), request)
    assert codes(events, "MEDICATION") == ["MEDICATION//SNOMED//1191"]
    medications = [{**item, "ingredient": [
        {"itemReference": {"reference": f"Medication/{other}"}} for other in names if other != item["id"]
    ]} for item in contained[:-1]]  # fmt: skip
    request = resource("MedicationRequest", medicationReference={"reference": "Medication/m0"}, authoredOn="2020-01-11")
    events, _ = read(patient(), encounter(), *medications, contained[-1], request)
    assert codes(events, "MEDICATION") == ["MEDICATION//SNOMED//1191"]


def test_a_mixture_of_very_many_is_cut_and_said():
    mixture = [{"itemCodeableConcept": concept(str(number))} for number in range(100)]
    medication = {"resourceType": "Medication", "id": "m", "ingredient": mixture}
    request = resource("MedicationRequest", medicationReference={"reference": "Medication/m"}, authoredOn="2020-01-11")
    events, report = read(patient(), encounter(), medication, request)
    assert len(codes(events, "MEDICATION")) == 64
    assert report.notes["codes of medications beyond the first 64 of one, left out"] == 36


def test_bundles_inside_bundles_are_bounded():
    record = bundle(patient())
    for _ in range(200):
        record = bundle(record)
    with pytest.raises(ValueError, match="Bundles lie inside Bundles"):
        events_from_bundle(record)


def test_a_span_of_any_years_ends_in_no_foreign_panic(tmp_path):
    for text in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "0001", "9999"):
        folder = tmp_path / text[:4] / str(len(text))
        folder.mkdir(parents=True)
        write_ndjson(
            folder / "a.ndjson", patient(birthDate=text, deceasedDateTime=text), encounter(start=text, end=text)
        )
        write_ndjson(folder / "b.ndjson", observation(time=text))
        events, _ = read_fhir(folder, progress=False)
        years = events["time"].drop_nulls().dt.year()
        assert years.is_between(1900, 2998).all()

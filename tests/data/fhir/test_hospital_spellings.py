"""Deaths, classes and systems as hospitals of many countries spell them, and what contradicts itself."""

import pytest

from ehrseq.data.fhir.classes import CONTRADICTIONS
from ehrseq.tasks import label_events
from tests.data.fhir.samples import V3, coded, codes, concept, encounter, patient, read, resource

EXPIRED = {"dischargeDisposition": coded(("http://terminology.hl7.org/CodeSystem/discharge-disposition", "exp"))}


def labels(events, task: str) -> list[bool]:
    result = label_events(events, task, end_of_data="2034-01-01", progress=False)
    return result.labels[task]["boolean_value"].to_list()


# -- deaths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "患者死亡", "院内死亡", "死亡退院", "환자 사망", "ผู้ป่วยเสียชีวิต", "मृत्यु", "Vefat", "Ölüm", "Öldü", "وفاة",
        "وفاة المريض", "נפטר", "פטירה", "Починал", "Tử vong", "Meninggal dunia", "Surnud", "Miris", "Mirė", "فوت",
        "Látinn",
    ],
)  # fmt: skip
def test_a_disposition_says_died_in_the_words_of_many_languages(text):
    events, _ = read(patient(), encounter(hospitalization={"dischargeDisposition": {"text": text}}))
    assert codes(events, "VISIT_END") == ["VISIT_END//exp"]


@pytest.mark.parametrize(
    "text",
    [
        "未死亡", "非死亡", "死亡の可能性", "死亡診断書", "生存退院", "ไม่เสียชีวิต", "ölüm riski", "không tử vong",
        "tidak meninggal", "غير متوفى", "לא נפטר", "فوت نشده", "Latin", "मृत नहीं",
    ],
)  # fmt: skip
def test_a_denied_or_possible_death_is_none_in_any_language(text):
    events, _ = read(patient(), encounter(hospitalization={"dischargeDisposition": {"text": text}}))
    assert codes(events, "VISIT_END") == [f"VISIT_END//{text}"]


@pytest.mark.parametrize(
    ("died", "long_stay", "mortality"),
    [
        ("2031-05-10T04:00:00Z", [True], [True]),
        ("2031-05-05T04:00:00Z", [False], [True]),
        ("2031-06", [True], []),  # every day of it makes the stay a long one
        ("2031-05", [], []),
        (None, [], []),
    ],
)
def test_a_stay_that_ended_in_death_without_an_end_goes_on_until_the_death(died, long_stay, mortality):
    stay = encounter(start="2031-05-02T09:00:00Z", end=None, hospitalization=EXPIRED)
    events, _ = read(patient(deceasedDateTime=died) if died else patient(deceasedBoolean=True), stay)
    assert labels(events, "long_stay_7d") == long_stay
    assert labels(events, "readmission_30d") == []
    if len(died or "") > 7:
        assert labels(events, "hospital_mortality_24h") == mortality


def test_a_stay_in_progress_of_a_patient_dead_at_an_unknown_time_has_no_label():
    stay = encounter(start="2031-05-02T09:00:00Z", end=None, status="in-progress")
    events, _ = read(patient(deceasedBoolean=True), stay)
    result = label_events(events, ["long_stay_7d", "hospital_mortality_24h"], end_of_data="2034-01-01", progress=False)
    assert all(not table.height for table in result.labels.values())
    assert {result.report[task]["no_discharge"] for task in result.labels} == {1}


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_class", "read_as", "contradicts"),
    [
        ({"code": "IMP", "display": "Outpatient"}, "IMP", True),
        ({"system": V3, "code": "AMB", "display": "Inpatient"}, "AMB", True),
        ({"code": "IMP", "display": "inpatient encounter"}, "IMP", False),
        ({"code": "IMP", "display": "inpatient acute"}, "IMP", False),  # an admission, both
        ({"code": "IMP", "display": "Kurzlieger"}, "IMP", False),  # unknown words contradict nothing
        ({"system": "https://vendor.example", "code": "IMP", "display": "Outpatient"}, "AMB", False),
        ({"system": "http://terminology.hl7.org/CodeSystem/v2-0004|2.9", "code": "i"}, "IMP", False),
    ],
)
def test_the_code_of_a_class_counts_before_its_display_and_a_contradiction_is_named(of_class, read_as, contradicts):
    events, report = read(patient(), encounter(**{"class": of_class}))
    assert codes(events, "VISIT_START") == [f"VISIT_START//{read_as}"]
    named = f"{CONTRADICTIONS}{of_class['code']} ({of_class.get('display')})"
    assert (report.notes[named] == 1) == contradicts
    assert any(note.startswith(CONTRADICTIONS) for note in report.notes) == contradicts


def test_two_codes_of_a_class_that_contradict_are_named():
    stay = encounter(**{"class": [coded((V3, "AMB")), coded((V3, "IMP"))]})
    events, report = read(patient(), stay)
    assert codes(events, "VISIT_START") == ["VISIT_START//AMB"]
    assert report.notes[f"{CONTRADICTIONS}IMP"] == 1


@pytest.mark.parametrize(
    ("word", "read_as"),
    [
        ("入院", "IMP"), ("住院", "IMP"), ("입원", "IMP"), ("外来", "AMB"), ("急诊", "EMER"), ("응급실", "EMER"),
        ("Innlagt", "IMP"), ("Døgnopphold", "IMP"), ("Indlagt", "IMP"), ("Vuodeosasto", "IMP"), ("Avohoito", "AMB"),
        ("Szpital", "Szpital"), ("Tagesklinik", "Tagesklinik"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["code", "display"])
def test_a_class_is_told_by_a_word_of_many_languages_else_named(word, read_as, key):
    events, _ = read(patient(), encounter(**{"class": {key: word}}))
    assert codes(events, "VISIT_START") == [f"VISIT_START//{read_as}"]


# -- systems -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "name"),
    [
        ("https://smt.esante.gouv.fr/terminologie-cim-10/", "ICD10"),
        ("CIM-10", "ICD10"),
        ("http://hl7.org/fhir/sid/cim-10-fr", "ICD10FR"),
        ("CIE-10", "ICD10"),
        ("cie10-es", "ICD10ES"),
        ("cid-10", "ICD10"),
        ("http://www.saude.gov.br/fhir/r4/CodeSystem/BRCID10", "ICD10BR"),
        ("urn:oid:2.16.578.1.12.4.1.1.7110", "ICD10NO"),
        ("1.2.246.537.6.1.1999", "ICD10FI"),
        ("urn:oid:1.2.752.116.1.1.1.1.3", "ICD10SE"),
        ("https://termgit.elga.gv.at/CodeSystem/icd-10-bmg-2024", "ICD10BMG"),
    ],
)
def test_icd_10_is_known_by_its_national_names_and_numbers(system, name):
    condition = resource("Condition", code=concept("I10", system), recordedDate="2031-05-02")
    events, _ = read(patient(), condition)
    assert codes(events, "DIAGNOSIS") == [f"DIAGNOSIS//{name}//I10"]


@pytest.mark.parametrize("system", ["http://loinc.org/2.74", "https://loinc.org|2.74", "urn:oid:2.16.840.1.113883.6.1"])
def test_loinc_is_known_with_its_version(system):
    lab = resource("Observation", status="final", code=concept("718-7", system), effectiveDateTime="2031-05-02")
    events, _ = read(patient(), {**lab, "valueQuantity": {"value": 1}})
    assert codes(events, "OBSERVATION") == ["OBSERVATION//LOINC//718-7"]

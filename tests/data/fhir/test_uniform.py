"""Blocks of one resource type: read without building the resources, and yet the rows, counts and messages of the plain
way.
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehrseq.data import read_fhir
from ehrseq.data.fhir import blocks
from ehrseq.data.fhir.resources import Extractor
from ehrseq.data.fhir.uniform import read_uniform
from tests.data.fhir.samples import concept, encounter, observation, patient, resource, write_ndjson
from tests.properties import examples

SUBJECTS = [
    {"reference": "Patient/p1"},
    {"reference": "Patient/p2", "display": "second"},
    {"reference": "urn:uuid:p1"},
    {"identifier": {"system": "s", "value": "v"}},
    {"reference": "#inside"},
    {"reference": "Patient/nobody"},
    {"display": "somebody"},
    None,
    "Patient/p1",
]
ENCOUNTERS = [{"reference": "Encounter/e1"}, {"reference": "Encounter/gone"}, {"reference": "EpisodeOfCare/1"}, None, 3]
RULED_OUT = {
    "url": "http://fhir.de/StructureDefinition/icd-10-gm-diagnosesicherheit",
    "valueCoding": {"system": "https://fhir.kbv.de/CodeSystem/KBV_CS_SFHIR_ICD_DIAGNOSESICHERHEIT", "code": "A"},
}
MODIFIERS = [[{"url": "http://x.example/negated", "valueBoolean": True}], [], None, [{}], 4]
CONCEPTS = [
    concept("73211009"),
    {"coding": [{"system": "http://loinc.org", "code": "1-1"}, {"code": "local"}], "text": "two\ncodings"},
    {"text": "only text, \u00e4"},
    {"coding": []},
    {},
    None,
    "73211009",
    {"coding": {"code": "1"}},
    concept("160245001", "https://snomed.info/sct/900000000000207008"),
    {"coding": [{"system": "http://fhir.de/CodeSystem/bfarm/icd-10-gm", "code": "I10.90", "extension": [RULED_OUT]}]},
]
TIMES = [
    "2020-01-11T06:00:00Z",
    "2020-01-12",
    "2020-01-12T09:30:00",
    "2020-02",
    "9999-12-31",
    "0001-01-01T00:00:00Z",
    "",
    None,
    "yesterday",
    7,
]
PERIODS = [
    {"start": "2020-01-11T06:00:00Z", "end": "2020-01-11T07:00:00+01:00"},
    {"start": "2020-01-11T06:00:00Z"},
    {},
    None,
    [],
]
STATUSES = ["final", "entered-in-error", "cancelled", "not-done", "declined", None, {"text": "not-done"}, 5]
CONTAINED = [{"resourceType": "Patient", "id": "inside", "identifier": [{"system": "s", "value": "v"}]}]
INTENTS = ["order", "plan", "option", "filler-order", "", None, 3]
MEDICATIONS = [
    {"reference": "Medication/m1"},
    {"reference": "Medication/gone", "display": "Aspirin"},
    {"reference": "#m"},
]
VERIFICATIONS = [
    concept("confirmed"),
    concept("refuted"),
    {"text": "entered-in-error"},
    {"coding": [{"code": "x"}, {"code": "refuted"}]},
    concept("410516002"),
    "confirmed",
    {},
    None,
]
V2_SECTIONS = "http://terminology.hl7.org/CodeSystem/v2-0074"
UCUM = "http://unitsofmeasure.org"
QUANTITIES = [
    {"value": 5, "unit": "mmol/L"},
    {"value": 5, "unit": "micromol/L", "code": "umol/L", "system": UCUM},
    {"value": 5, "unit": "\u03bcmol/L", "code": "umol/L"},
    {"value": 5, "unit": "mmol/L", "system": 4, "code": "x"},
    {"value": 5.25, "code": "mg"},
    {"value": "7.5"},
    {"value": 1e39, "unit": "g"},
    {"value": 3, "comparator": "<"},
    {"value": True},
    {"value": None},
    {"unit": "g"},
    {},
    5,
]
COMMON = {
    "subject": SUBJECTS,
    "encounter": ENCOUNTERS,
    "status": STATUSES,
    "contained": [CONTAINED],
    "modifierExtension": MODIFIERS,
}
MEDICATION = {**COMMON, "medicationCodeableConcept": CONCEPTS, "medicationReference": MEDICATIONS}
CATEGORIES = [
    concept("laboratory"),
    [{"coding": [{"system": "http://x.example", "code": "K7"}, {"system": V2_SECTIONS, "code": "CH"}]}],
]
# Type -> field -> values: the usual ones first
FIELDS: dict[str, dict[str, list[Any]]] = {
    "Condition": {**COMMON, "code": CONCEPTS, "recordedDate": TIMES, "verificationStatus": VERIFICATIONS},
    "Procedure": {**COMMON, "code": CONCEPTS, "performedDateTime": TIMES, "performedPeriod": PERIODS},
    "Immunization": {
        **COMMON,
        "patient": SUBJECTS,
        "vaccineCode": CONCEPTS,
        "recorded": TIMES,
        "occurrenceDateTime": TIMES,
    },
    "MedicationRequest": {**MEDICATION, "authoredOn": TIMES, "doNotPerform": [False, True, None], "intent": INTENTS},
    "MedicationAdministration": {
        **MEDICATION,
        "context": ENCOUNTERS,
        "effectiveDateTime": TIMES,
        "effectivePeriod": PERIODS,
    },
    "MedicationDispense": {**MEDICATION, "context": ENCOUNTERS, "whenHandedOver": TIMES, "whenPrepared": TIMES},
    "Observation": {
        **COMMON,
        "code": CONCEPTS,
        "category": [
            [concept("laboratory")],
            [concept("vital-signs")],
            [],
            None,
            [{"text": "Vital Signs"}],
            4,
            *CATEGORIES,
        ],
        "issued": TIMES,
        "effectiveDateTime": TIMES,
        "effectivePeriod": PERIODS,
        "effectiveInstant": TIMES,
        "valueQuantity": QUANTITIES,
        "valueCodeableConcept": CONCEPTS,
        "valueString": ["a text", "two\nlines", "", None, 4],
        "valueBoolean": [True, False],
        "valueInteger": [4, "4"],
        "valueDateTime": TIMES,
        "valueRange": [{"low": {"value": 3}}],
        "component": [[{"code": concept("8480-6"), "valueQuantity": {"value": 120, "unit": "mmHg"}}], [], None],
        "dataAbsentReason": [concept("unknown"), None],
    },
}


def read_both_ways(folder, monkeypatch) -> tuple[Any, Any]:
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "read_uniform", lambda *_: False)
        plain = read_fhir(folder, on_error="skip", progress=False)
    return plain, read_fhir(folder, on_error="skip", progress=False)


def assert_same(plain, uniform) -> None:
    assert uniform[0].equals(plain[0])
    assert uniform[1].to_dict() == plain[1].to_dict()
    assert uniform[1].errors == plain[1].errors


def write_context(folder) -> None:
    """Patients, an encounter and a medication that the resources may refer to."""
    second = patient("p2", identifier=[{"system": "s", "value": "v"}])
    write_ndjson(folder / "Patient.ndjson", patient(), second)
    write_ndjson(folder / "Encounter.ndjson", encounter())
    medication = {"resourceType": "Medication", "id": "m1", "code": concept("860975")}
    write_ndjson(folder / "Medication.ndjson", medication)


CASES = [(kind, name, value) for kind, fields in FIELDS.items() for name, values in fields.items() for value in values]


@pytest.mark.parametrize("kind", FIELDS)
def test_every_odd_element_reads_as_on_the_plain_way(kind, tmp_path, monkeypatch):
    usual = {name: values[0] for name, values in FIELDS[kind].items() if not name.startswith(("value", "medication"))}
    usual.pop("component", None)
    usual.pop("doNotPerform", None)
    usual.pop("modifierExtension", None)
    concepts = {"medicationCodeableConcept": CONCEPTS[0]} if "medicationReference" in FIELDS[kind] else {}
    base = {**resource(kind), **usual, **concepts}
    for number, (_, name, value) in enumerate(case for case in CASES if case[0] == kind):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_context(folder)
        odd = {key: item for key, item in base.items() if not (name.startswith("medication") and key in concepts)}
        # The same element twice: first met, then known
        write_ndjson(folder / f"{kind}.ndjson", base, {**odd, name: value}, {**odd, name: value}, base)
        assert_same(*read_both_ways(folder, monkeypatch))


@examples(150)
@given(data=st.data())
def test_any_mixture_of_elements_reads_as_on_the_plain_way(data, tmp_path_factory):
    kind = data.draw(st.sampled_from(sorted(FIELDS)))
    fields = {name: st.sampled_from(values) for name, values in FIELDS[kind].items()}
    made = data.draw(st.lists(st.fixed_dictionaries({}, optional=fields), min_size=1, max_size=5))
    for item in made:
        if "valueDateTime" in item:  # of two values that are not read, either may be named
            item.pop("valueRange", None)
    folder = tmp_path_factory.mktemp("mixture")
    write_context(folder)
    write_ndjson(folder / f"{kind}.ndjson", *({"resourceType": kind, "id": "r", **item} for item in made))
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert_same(*read_both_ways(folder, monkeypatch))


LAB = json.dumps(observation()).encode()
OTHER = b'{"resourceType": "Specimen", "id": "s"}'


@pytest.mark.parametrize(
    ("lines", "uniform"),
    [
        ([LAB, LAB], True),
        ([OTHER, OTHER.replace(b"Specimen", b"Device")], True),
        ([LAB.replace(b"mmol", "\u00b5mol".encode())], True),
        ([LAB, b""], True),  # one line that ends
        ([LAB, LAB + b"\r"], True),
        ([LAB, b"", LAB], False),
        ([b"", LAB], False),
        ([], False),
        ([LAB, LAB[:-30]], False),
        ([LAB + LAB], False),
        ([LAB[:20], LAB[20:]], False),
        ([b"\xef\xbb\xbf" + LAB], False),
        ([LAB.replace(b"final", b"fin\xff")], False),
        ([LAB.replace(b'"id": "o1"', b'"note": "\xff"')], False),
        ([LAB, OTHER], False),
        ([OTHER, LAB], False),
        ([json.dumps(patient()).encode()], False),
        ([LAB, b'{"id": "x"}'], False),
        ([b'{"id": "x"}'], False),
        ([b"[1]"], False),
        ([LAB.replace(b"5.5", b"1e999")], False),
        ([LAB.replace(b"2020-01-11", b"2020-31-11")], False),
    ],
)
def test_only_whole_good_lines_of_one_type_are_read_here(lines, uniform):
    extractor = Extractor()
    assert read_uniform(b"\n".join(lines), extractor) is uniform
    assert bool(extractor.counts) is uniform
    if not uniform:
        assert not extractor.rows


def test_a_damaged_file_keeps_its_message_and_the_lines_before(tmp_path, monkeypatch):
    import gzip

    write_context(tmp_path)
    packed = gzip.compress(b"\n".join([LAB] * 2000))
    (tmp_path / "Observation.ndjson.gz").write_bytes(packed[:-12])
    plain, uniform = read_both_ways(tmp_path, monkeypatch)
    assert_same(plain, uniform)
    assert uniform[1].skipped["rest of a damaged gzip file"] == 1

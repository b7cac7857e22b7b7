"""Codings as event codes."""

import pytest

from ehrseq.data.fhir.codes import Coder, dotted
from ehrseq.data.fhir.systems import system_name

MIMIC = "http://mimic.mit.edu/fhir/mimic/CodeSystem/"


@pytest.mark.parametrize(
    ("system", "kind", "name"),
    [
        ("http://loinc.org", "LAB", "LOINC"),
        ("http://loinc.org/", "LAB", "LOINC"),
        ("http://snomed.info/sct", "DIAGNOSIS", "SNOMED"),
        ("http://www.nlm.nih.gov/research/umls/rxnorm", "MEDICATION", "RXNORM"),
        ("http://hl7.org/fhir/sid/icd-10-cm", "DIAGNOSIS", "ICD10CM"),
        ("http://hl7.org/fhir/sid/icd-9-cm", "DIAGNOSIS", "ICD9CM"),
        ("http://hl7.org/fhir/sid/icd-9-cm", "PROCEDURE", "ICD9PROC"),
        ("urn:oid:2.16.840.1.113883.6.96", "DIAGNOSIS", "SNOMED"),
        ("http://hl7.org/fhir/sid/cvx", "IMMUNIZATION", "CVX"),
        (MIMIC + "mimic-diagnosis-icd10", "DIAGNOSIS", "ICD10CM"),
        (MIMIC + "mimic-medication-ndc", "MEDICATION", "NDC"),
        (MIMIC + "mimic-d-labitems", "LAB", "MIMIC-D-LABITEMS"),
        ("http://a.example/codes", "LAB", "a.example/codes"),
        ("http://b.example/codes", "LAB", "b.example/codes"),
        ("urn:oid:1.2.36.1.2001.1005.17", "IMMUNIZATION", "1.2.36.1.2001.1005.17"),
        (None, "LAB", "LOCAL"),
    ],
)
def test_system_name(system, kind, name):
    assert system_name(system, kind) == name


@pytest.mark.parametrize(
    ("system", "code", "expected"),
    [
        ("ICD10CM", "E119", "E11.9"),
        ("ICD10CM", "E11.9", "E11.9"),
        ("ICD10CM", "I10", "I10"),
        ("ICD10CM", "s72001a", "S72.001A"),
        ("ICD9CM", "4280", "428.0"),
        ("ICD9CM", "V462", "V46.2"),
        ("ICD9CM", "E8497", "E849.7"),
        ("ICD9CM", "401", "401"),
        ("ICD9PROC", "5491", "54.91"),
        ("ICD10PCS", "5A09557", "5A09557"),
        ("SNOMED", "44054006", "44054006"),
    ],
)
def test_icd_codes_have_their_dot(system, code, expected):
    assert dotted(system, code) == expected


def _coding(system, code, **more):
    return {"system": system, "code": code, **more}


@pytest.mark.parametrize(
    ("kind", "concept", "code"),
    [
        (
            "LAB",
            {"coding": [_coding("http://local", "GLU"), _coding("http://loinc.org", "2345-7")]},
            "LAB//LOINC//2345-7",
        ),
        (
            "DIAGNOSIS",
            {
                "coding": [
                    _coding("http://snomed.info/sct", "44054006"),
                    _coding("http://hl7.org/fhir/sid/icd-10-cm", "E119"),
                ]
            },
            "DIAGNOSIS//ICD10CM//E11.9",
        ),
        ("LAB", {"coding": [_coding("http://a", "1"), _coding("http://b", "2", userSelected=True)]}, "LAB//b//2"),
        ("LAB", {"coding": [_coding("http://a", "1"), _coding("http://b", "2")]}, "LAB//a//1"),
        (
            "LAB",
            {"coding": [{"system": "http://loinc.org", "display": "no code"}, _coding("http://b", "2")]},
            "LAB//b//2",
        ),
        ("LAB", {"coding": [{"code": "GLU"}]}, "LAB//LOCAL//GLU"),
        ("DIAGNOSIS", {"text": " Burnt\n ear "}, "DIAGNOSIS//TEXT//Burnt ear"),
        ("DIAGNOSIS", {"coding": [{"display": "Asthma"}]}, "DIAGNOSIS//TEXT//Asthma"),
        ("LAB", {"coding": [_coding("http://a", "x//y")]}, "LAB//a//x/y"),
        ("LAB", {"coding": []}, None),
        ("LAB", {}, None),
    ],
)
def test_code_of_a_concept(kind, concept, code):
    assert Coder().code(kind, concept) == code


def test_displays_are_kept():
    coder = Coder()
    coder.code("LAB", {"coding": [_coding("http://loinc.org", "2345-7", display="Glucose")]})
    assert coder.displays == {"LAB//LOINC//2345-7": "Glucose"}

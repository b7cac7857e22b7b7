"""FHIR codings as event codes: `KIND//SYSTEM//CODE`.

SYSTEM is a short name for the systems of the table below, else what identifies the system without its scheme, so that
two systems never share a name. A concept without coding becomes `KIND//TEXT//<its text>`, a coding without system
`KIND//LOCAL//<code>`.

Of several codings the one of the kind's standard system is taken (order in `PREFERRED_SYSTEMS`), else the one that the
user selected, else the first. ICD codes without a dot get it back (`I10` stays, `E119` becomes `E11.9`), so that one
diagnosis has one code whoever wrote it.
"""

from __future__ import annotations

from typing import Any

SYSTEM_NAMES: dict[str, str] = {
    "http://loinc.org": "LOINC",
    "http://snomed.info/sct": "SNOMED",
    "http://www.nlm.nih.gov/research/umls/rxnorm": "RXNORM",
    "http://hl7.org/fhir/sid/icd-10-cm": "ICD10CM",
    "http://hl7.org/fhir/sid/icd-10": "ICD10",
    "http://hl7.org/fhir/sid/icd-9-cm": "ICD9CM",
    "http://hl7.org/fhir/sid/icd-10-pcs": "ICD10PCS",
    "http://www.cms.gov/Medicare/Coding/ICD10": "ICD10PCS",
    "http://hl7.org/fhir/sid/cvx": "CVX",
    "http://hl7.org/fhir/sid/ndc": "NDC",
    "http://www.ama-assn.org/go/cpt": "CPT",
    "https://www.cms.gov/Medicare/Coding/HCPCSReleaseCodeSets": "HCPCS",
    "https://www.cms.gov/Medicare/Coding/HCPCSReleaseCodeSets/Alpha-Numeric-HCPCS.html": "HCPCS",
    "http://www.whocc.no/atc": "ATC",
    "http://fdasis.nlm.nih.gov": "UNII",
    "http://unitsofmeasure.org": "UCUM",
    # The same systems by object identifier
    "urn:oid:2.16.840.1.113883.6.1": "LOINC",
    "urn:oid:2.16.840.1.113883.6.96": "SNOMED",
    "urn:oid:2.16.840.1.113883.6.88": "RXNORM",
    "urn:oid:2.16.840.1.113883.6.90": "ICD10CM",
    "urn:oid:2.16.840.1.113883.6.3": "ICD10",
    "urn:oid:2.16.840.1.113883.6.103": "ICD9CM",
    "urn:oid:2.16.840.1.113883.6.104": "ICD9PROC",
    "urn:oid:2.16.840.1.113883.6.4": "ICD10PCS",
    "urn:oid:2.16.840.1.113883.12.292": "CVX",
    "urn:oid:2.16.840.1.113883.6.69": "NDC",
    "urn:oid:2.16.840.1.113883.6.12": "CPT",
    # MIMIC-IV on FHIR: systems of its own that hold standard codes
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-diagnosis-icd9": "ICD9CM",
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-diagnosis-icd10": "ICD10CM",
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-procedure-icd9": "ICD9PROC",
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-procedure-icd10": "ICD10PCS",
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-medication-ndc": "NDC",
}
"""System URI -> short name."""

# Whole families of systems whose last part is the name: mimic-d-labitems -> MIMIC-D-LABITEMS.
_NAMED_FAMILIES = (
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/",
    "http://terminology.hl7.org/CodeSystem/",
    "http://hl7.org/fhir/sid/",
)

PREFERRED_SYSTEMS: dict[str, tuple[str, ...]] = {
    "DIAGNOSIS": ("ICD10CM", "ICD10", "ICD9CM", "SNOMED"),
    "PROCEDURE": ("ICD10PCS", "ICD9PROC", "CPT", "HCPCS", "SNOMED", "LOINC"),
    "MEDICATION": ("RXNORM", "NDC", "ATC", "SNOMED"),
    "IMMUNIZATION": ("CVX", "NDC", "SNOMED"),
    "LAB": ("LOINC", "SNOMED"),
    "VITAL": ("LOINC", "SNOMED"),
    "OBSERVATION": ("LOINC", "SNOMED"),
}
"""Kind -> systems to prefer among several codings, best first."""


def system_name(system: str | None, kind: str) -> str:
    """Short name of a code system: `LOINC`; its own identifier without the scheme where the table has none.

    Args:
        system: URI of the system, None where the coding names none.
        kind: Kind of the event; `icd-9-cm` in a procedure means the procedure volume (`ICD9PROC`).
    """
    if not system:
        return "LOCAL"
    name = SYSTEM_NAMES.get(system) or SYSTEM_NAMES.get(system.rstrip("/"))
    if name is None:
        for family in _NAMED_FAMILIES:
            if system.startswith(family) and len(system) > len(family):
                return _clean(system[len(family) :]).upper()
        for scheme in ("https://", "http://", "urn:oid:", "urn:"):
            if system.startswith(scheme):
                system = system[len(scheme) :]
                break
        return _clean(system).strip("/")
    return "ICD9PROC" if name == "ICD9CM" and kind == "PROCEDURE" else name


def dotted(system: str, code: str) -> str:
    """An ICD code with its dot: `E119` -> `E11.9`, ICD-9 `E8497` -> `E849.7`, ICD-9 procedure `5491` -> `54.91`; other
    codes as they are.
    """
    if system in ("ICD10CM", "ICD10"):
        head = 3
    elif system == "ICD9CM":
        head = 4 if code[:1] in "Ee" else 3
    elif system == "ICD9PROC":
        head = 2
    else:
        return code
    code = code.upper()
    return code if "." in code or len(code) <= head else f"{code[:head]}.{code[head:]}"


class Coder:
    """Event codes of concepts, each worked out once.

    Attributes:
        displays: Code -> display text of its coding, for the codes that were worked out since it was last emptied.
    """

    def __init__(self) -> None:
        self._codes: dict[tuple[str, Any, Any], str] = {}
        self.displays: dict[str, str] = {}

    def code(self, kind: str, concept: dict[str, Any]) -> str | None:
        """Event code of a CodeableConcept, None where it holds neither a code nor text."""
        codings = concept.get("coding")
        if codings:
            coding = codings[0] if len(codings) == 1 else self._choose(kind, codings)
            code = self.coding(kind, coding)
            if code is not None:
                return code
        text = concept.get("text") or (codings and codings[0].get("display"))
        return f"{kind}//TEXT//{_clean(text)}" if text else None

    def coding(self, kind: str, coding: dict[str, Any]) -> str | None:
        """Event code of one Coding, None where it holds no code."""
        code = coding.get("code")
        if not code:
            return None
        key = (kind, coding.get("system"), code)
        made = self._codes.get(key)
        if made is None:
            name = system_name(key[1], kind)
            made = self._codes[key] = f"{kind}//{name}//{dotted(name, _clean(code))}"
            display = coding.get("display")
            if display:
                self.displays[made] = _clean(display)
        return made

    def _choose(self, kind: str, codings: list[dict[str, Any]]) -> dict[str, Any]:
        named = [(system_name(coding.get("system"), kind), coding) for coding in codings if coding.get("code")]
        for system in PREFERRED_SYSTEMS.get(kind, ()):
            for name, coding in named:
                if name == system:
                    return coding
        for _, coding in named:
            if coding.get("userSelected"):
                return coding
        return named[0][1] if named else codings[0]


def _clean(text: str) -> str:
    """Text on one line, without the separator of our codes."""
    if not isinstance(text, str):
        raise TypeError(f"a code or text must be a string, got {text!r}")
    return " ".join(text.split()).replace("//", "/")

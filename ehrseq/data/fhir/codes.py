"""FHIR codings as event codes: `KIND//SYSTEM//CODE`.

SYSTEM is the short name of the system (`ehrseq.data.fhir.systems`), or what identifies the system without its scheme,
so that two systems never share a name. A concept without coding becomes `KIND//TEXT//<its text>`, a coding without
system `KIND//LOCAL//<code>`.

Of several codings the one of the kind's standard systems is taken (order in `PREFERRED_SYSTEMS`), else that of any
other standard system (`ANY_STANDARD`), else the one that the user selected, else the first. ICD codes without a dot
get it back (`I10` stays, `E119` becomes `E11.9`), so that one diagnosis has one code whoever wrote it.
"""

from __future__ import annotations

from typing import Any

from ehrseq.data.fhir.concepts import codings_of, says_absent
from ehrseq.data.fhir.systems import as_code, system_name

PREFERRED_SYSTEMS: dict[str, tuple[str, ...]] = {
    "DIAGNOSIS": ("ICD10CM", "ICD10", "ICD10*", "ICD9CM", "SNOMED"),
    "PROCEDURE": ("ICD10PCS", "ICD9PROC", "CPT", "HCPCS", "SNOMED", "LOINC"),
    "MEDICATION": ("RXNORM", "NDC", "ATC", "SNOMED"),
    "IMMUNIZATION": ("CVX", "NDC", "SNOMED"),
    "LAB": ("LOINC", "SNOMED"),
    "VITAL": ("LOINC", "SNOMED"),
    "OBSERVATION": ("LOINC", "SNOMED"),
}
"""Kind -> systems to prefer among several codings, best first; `*` stands for every national edition."""

ANY_STANDARD = ("LOINC", "SNOMED", "RXNORM", "ICD10CM", "ICD10", "ICD10*", "ICD9CM")
"""Systems to prefer to a local one, whatever the kind."""


def dotted(system: str, code: str) -> str:
    """An ICD code with its dot: `E119` -> `E11.9`, ICD-9 `E8497` -> `E849.7`, ICD-9 procedure `5491` -> `54.91`; other
    codes as they are.
    """
    if system.startswith("ICD10") and system != "ICD10PCS":
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
        codings = codings_of(concept, "a concept")
        if codings:
            coding = codings[0] if len(codings) == 1 else self._choose(kind, codings)
            code = self.coding(kind, coding)
            if code is not None:
                return code
        text = concept.get("text") or next((coding["display"] for coding in codings if coding.get("display")), None)
        return f"{kind}//TEXT//{as_code(text)}" if text else None

    def absent(self, concept: dict[str, Any]) -> bool:
        """Whether a concept says that there is nothing (see `says_absent`)."""
        return says_absent(codings_of(concept, "a concept"))

    def coding(self, kind: str, coding: dict[str, Any]) -> str | None:
        """Event code of one Coding, None where it holds no code."""
        code = coding.get("code")
        if not code:
            return None
        key = (kind, coding.get("system"), code)
        made = self._codes.get(key)
        if made is None:
            name = system_name(key[1], kind)
            made = self._codes[key] = f"{kind}//{name}//{dotted(name, as_code(code))}"
            display = coding.get("display")
            if display:
                self.displays[made] = as_code(display)
        return made

    def _choose(self, kind: str, codings: list[dict[str, Any]]) -> dict[str, Any]:
        named = [(system_name(coding.get("system"), kind), coding) for coding in codings if coding.get("code")]
        for system in (*PREFERRED_SYSTEMS.get(kind, ()), *ANY_STANDARD):
            for name, coding in named:
                if name == system or (system == "ICD10*" and name.startswith("ICD10") and name != "ICD10PCS"):
                    return coding
        for _, coding in named:
            if coding.get("userSelected"):
                return coding
        return named[0][1] if named else codings[0]

"""Elements of FHIR resources that need more than a look-up, and what is wrong with a resource, in words."""

from __future__ import annotations

from typing import Any

from ehrseq.data.fhir.concepts import codings_of, concepts_of
from ehrseq.data.fhir.systems import system_name

MALFORMED = (ValueError, TypeError, KeyError, AttributeError, IndexError)
"""What an extractor raises when a resource is not as FHIR says."""

CATEGORY_KINDS = {
    "laboratory": "LAB",
    "lab": "LAB",
    "laboratory studies": "LAB",
    "vital-signs": "VITAL",
    "vital-sign": "VITAL",
    "vital signs": "VITAL",
    "vitals": "VITAL",
}
"""Code, display or text of a category, in lower case -> kind of the event."""
CATEGORY_CODES = {
    # LOINC: Laboratory studies, Vital signs. SNOMED CT: Laboratory procedure, Taking patient vital signs.
    **{("LOINC", code): kind for code, kind in (("26436-6", "LAB"), ("8716-3", "VITAL"))},
    **{("SNOMED", code): kind for code, kind in (("108252007", "LAB"), ("61746007", "VITAL"))},
    # HL7 version 2 table 0074, the sections of a laboratory
    **{("V2-0074", code): "LAB" for code in ("LAB", "CH", "HM", "MB", "BLB", "SR", "IMM", "TX", "BG", "HPA", "MCB")},
}
"""(System, code) of a category -> kind of the event."""
# LOINC codes of FHIR's vital signs profiles (and their components), for observations that have no category.
# fmt: off
_VITAL_LOINC = frozenset((
    "85353-1", "9279-1", "8867-4", "2708-6", "59408-5", "8310-5", "8302-2", "9843-4", "29463-7",
    "39156-5", "85354-9", "8480-6", "8462-4", "8478-0", "8289-1", "59576-9", "77606-2",
))
# fmt: on
US_CORE = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-"
_OMB_NAMES = {
    "1002-5": "AMERICAN INDIAN OR ALASKA NATIVE",
    "2028-9": "ASIAN",
    "2054-5": "BLACK OR AFRICAN AMERICAN",
    "2076-8": "NATIVE HAWAIIAN OR OTHER PACIFIC ISLANDER",
    "2106-3": "WHITE",
    "2131-1": "OTHER RACE",
    "2135-2": "HISPANIC OR LATINO",
    "2186-5": "NOT HISPANIC OR LATINO",
}


def observation_kind(categories: list[dict[str, Any]] | None, concept: dict[str, Any] | None) -> str:
    """LAB, VITAL or OBSERVATION: by any coding or text of the categories, and without one by FHIR's own list of vital
    signs.

    Raises:
        ValueError: Categories that are no CodeableConcepts.
    """
    for category in concepts_of(categories, "category"):
        codings = codings_of(category, "category")
        for coding in codings:
            code = coding.get("code")
            kind = CATEGORY_KINDS.get(code.lower()) if isinstance(code, str) else None
            kind = kind or CATEGORY_CODES.get((system_name(coding.get("system"), "").upper(), str(code)))
            if kind:
                return kind
        for text in (category.get("text"), *(coding.get("display") for coding in codings)):
            kind = CATEGORY_KINDS.get(text.lower()) if isinstance(text, str) else None
            if kind:
                return kind
    if not categories and concept is not None:
        for coding in codings_of(concept, "code"):
            if coding.get("code") in _VITAL_LOINC and system_name(coding.get("system"), "") == "LOINC":
                return "VITAL"
    return "OBSERVATION"


def describe(resource: object) -> str:
    """`Observation/x`, as far as a resource tells."""
    if not isinstance(resource, dict):
        return type(resource).__name__
    return f"{resource.get('resourceType', 'no resourceType')}/{resource.get('id', '?')}"


def what_is_wrong(error: Exception) -> str:
    """What is wrong with a resource, in words."""
    if isinstance(error, KeyError):
        return "it has no resourceType" if error.args == ("resourceType",) else f"it lacks {error}"
    if isinstance(error, ValueError):
        return str(error)
    return f"an element has a wrong type ({error})"


def read_flag(value: object, element: str) -> bool:
    """A boolean element, False where it is absent; some servers quote flags.

    Raises:
        TypeError: It is something else.
    """
    if value is None or isinstance(value, bool):
        return value is True
    if value in ("true", "false"):
        return value == "true"
    raise TypeError(f"{element} must be true or false, got {value!r}")


def one_line(text: str) -> str:
    """Text without line breaks and outer spaces.

    Raises:
        TypeError: It is no string.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected text, got {text!r}")
    return (
        " ".join(text.split()) if ("\n" in text or "  " in text or text[:1].isspace() or text[-1:].isspace()) else text
    )


def omb_categories(extension: dict[str, Any]) -> list[str]:
    """Names of a US Core race or ethnicity: the OMB categories, else its text."""
    names: list[str] = []
    text = ""
    for part in extension.get("extension") or ():
        coding = part.get("valueCoding")
        if part.get("url") == "ombCategory" and coding:
            names.append(
                _OMB_NAMES.get(coding.get("code"))
                or one_line(coding.get("display") or coding.get("code") or "").upper()
            )
        elif part.get("url") == "text":
            text = one_line(part.get("valueString") or "").upper()
    return [name for name in names if name] or ([text] if text else [])


def birth_time(patient: dict[str, Any]) -> str | None:
    """The dateTime of birth that FHIR's standard extension adds to birthDate, None without it."""
    for extension in (patient.get("_birthDate") or {}).get("extension") or ():
        if extension.get("url") == "http://hl7.org/fhir/StructureDefinition/patient-birthTime":
            stated: str | None = extension.get("valueDateTime")
            return stated
    return None

"""CodeableConcepts: all their codings, the texts that stand beside them, and which of them say that something is not.

The codings of a concept mean the same thing in several systems, so any of them may say what the others cannot: that a
condition was refuted, that a patient died, that an observation is of the laboratory.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from ehrseq.data.fhir.systems import canonical_spelling, system_name

_DEEPEST = 8
"""Levels of extensions inside extensions that are looked into."""

NOT_CONFIRMED: dict[str, frozenset[str]] = {
    "refuted": frozenset(
        (
            "refuted",
            "ruled out",
            "known absent",
            "definitely not present",
            "ausgeschlossen",
            "ausschluss",
        )
    ),
    "entered-in-error": frozenset(("entered-in-error", "entered in error")),
}
"""What a verification status says of a condition that is none -> its codes, displays and texts, in any system."""

_NOT_NEGATING = frozenset(("unconfirmed", "provisional", "differential", "confirmed"))
"""The other codes of FHIR's verification statuses: what stands beside them cannot take them back."""

SNOMED_NOT: dict[str, str] = {
    "410516002": "refuted",  # Known absent
    "410594000": "refuted",  # Definitely NOT present
    "723511001": "refuted",  # Refuted
    "723510000": "entered-in-error",  # Entered in error
}
"""SNOMED CT qualifiers that negate a condition -> the status that they stand for."""

ABSENT_FINDINGS = frozenset((
    "373572006",  # Clinical finding absent
    "160245001",  # No current problems or disability
    "716186003",  # No known allergy
    "409137002",  # No known drug allergy
    "428607008",  # No known environmental allergy
    "429625007",  # No known food allergy
    "1003774007",  # No known latex allergy
    "787481004",  # No known medication
    "787480003",  # No known procedure
    "160243008",  # No significant medical history
    "443508001",  # No history of clinical finding in subject
    "787482006",  # No known immunization
    "428197003",  # No known insect allergy
    "716220001",  # No known animal allergy
    "160244002",  # No known allergies (retired)
))  # fmt: skip
"""SNOMED CT situations that say of something that it is not there."""

_ABSENT_UNKNOWN = "absent-unknown-uv-ips"
"""Last part of the system of the International Patient Summary whose codes say that nothing is known."""

_CERTAINTY_SYSTEMS = "diagnosesicherheit"
"""Last part of the German systems that say how certain a diagnosis is; A (Ausschluss) rules it out."""


def codings_of(concept: Any, element: str) -> list[dict[str, Any]]:
    """All codings of a CodeableConcept; empty where there are none.

    Args:
        concept: The parsed element, None where it is absent.
        element: Its name, for messages.

    Raises:
        ValueError: It is no CodeableConcept (text, as STU3 has it in places, or a list).
    """
    if concept is None:
        return []
    if isinstance(concept, str):
        raise ValueError(f"{element} is text; FHIR R4 has a CodeableConcept (is this STU3?)")
    if not isinstance(concept, dict):
        raise ValueError(f"{element} is {type(concept).__name__}; FHIR R4 has a CodeableConcept")
    codings = concept.get("coding")
    if codings is None:
        return []
    is_list = isinstance(codings, list)
    for coding in codings if is_list else ():
        if not isinstance(coding, dict):
            is_list = False
    if not is_list:
        raise ValueError(f"{element}.coding is {type(codings).__name__}; FHIR R4 has a list of Codings")
    return codings  # type: ignore[no-any-return]


def concepts_of(concepts: Any, element: str) -> list[dict[str, Any]]:
    """The CodeableConcepts of an element that repeats.

    Raises:
        ValueError: It is no list of CodeableConcepts (one object, as DSTU2 has it in places).
    """
    if concepts is None:
        return []
    if isinstance(concepts, dict):
        raise ValueError(f"{element} is an object; FHIR R4 has a list of CodeableConcepts (is this DSTU2?)")
    if not isinstance(concepts, list):
        raise ValueError(f"{element} is {type(concepts).__name__}; FHIR R4 has a list of CodeableConcepts")
    return concepts


def plain_words(text: object) -> str:
    """Text in lower case without accents and punctuation, for looking it up: `Stationär (voll)` -> `stationar voll`."""
    if not isinstance(text, str):
        return ""
    letters = unicodedata.normalize("NFKD", text.casefold())
    kept = ("" if unicodedata.combining(letter) else letter if is_letter(letter) else " " for letter in letters)
    return " ".join("".join(kept).split())


def is_letter(letter: str) -> bool:
    """Whether a sign is part of a word: letters, digits, and the vowels that Thai and Hindi write as marks."""
    return letter.isalnum() or unicodedata.category(letter)[0] == "M"


def negating_status(concept: Any) -> str | None:
    """`refuted` or `entered-in-error` where any coding of a verificationStatus says so, by code or display, or its text
    does, else the first code, None without one.

    Raises:
        ValueError: It is no CodeableConcept.
    """
    codings = codings_of(concept, "verificationStatus")
    for coding in codings:
        code, system = str(coding.get("code")).strip(), coding.get("system")
        if code in SNOMED_NOT and system_name(system, "") == "SNOMED":
            return SNOMED_NOT[code]
        if _says_ruled_out(coding):
            return "refuted"
    codes = [str(coding["code"]) for coding in codings if coding.get("code")]
    spellings = set(map(_spelling, codes))
    if not spellings & _NOT_NEGATING:
        spellings.update(_spelling(coding.get("display")) for coding in codings)
        spellings.add(_spelling((concept or {}).get("text")))
    for status, negating in NOT_CONFIRMED.items():
        if not spellings.isdisjoint(negating):
            return status
    return codes[0] if codes else None


def _spelling(text: object) -> str:
    return " ".join(str(text).casefold().split())


def says_absent(codings: list[dict[str, Any]]) -> bool:
    """Whether any coding of a fact says that there is nothing: a SNOMED CT situation `known absent`, a code of the
    International Patient Summary for `nothing known`, a German diagnosis marked as ruled out.
    """
    for coding in codings:
        code, system = coding.get("code"), coding.get("system")
        if not isinstance(code, str):
            continue
        names = _codes_of_absence(system) if isinstance(system, str) else None
        if names is not None and (not names or code.strip() in names or ("408729009" in code and "410516002" in code)):
            return True
        if "extension" in coding and any(_says_ruled_out(inner) for inner in extension_codings(coding)):
            return True
    return False


@lru_cache(maxsize=4096)
def _codes_of_absence(system: str) -> frozenset[str] | None:
    """Codes of a system that say that there is nothing: empty where all of them do, None where none does."""
    if canonical_spelling(system).endswith(_ABSENT_UNKNOWN):
        return frozenset()
    return ABSENT_FINDINGS if system_name(system, "") == "SNOMED" else None


def _says_ruled_out(coding: dict[str, Any]) -> bool:
    system = coding.get("system")
    return (
        isinstance(system, str)
        and canonical_spelling(system).endswith(_CERTAINTY_SYSTEMS)
        and str(coding.get("code")).strip().upper() == "A"
    )


def extension_codings(holder: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Codings in the extensions of an element, however they are nested (to a bounded depth)."""
    if not isinstance(holder, dict) or depth > _DEEPEST:
        return
    extensions = holder.get("extension")
    for extension in extensions if isinstance(extensions, list) else ():
        if not isinstance(extension, dict):
            continue
        coding, concept = extension.get("valueCoding"), extension.get("valueCodeableConcept")
        if isinstance(coding, dict):
            yield coding
        if isinstance(concept, dict):
            yield from codings_of(concept, "valueCodeableConcept")
        yield from extension_codings(extension, depth + 1)


def modifier_of(element: dict[str, Any]) -> str | None:
    """URL of a modifier extension, which changes what an element means in a way that we do not know; None without."""
    extensions = element.get("modifierExtension")
    if not extensions:
        return None
    first = extensions[0] if isinstance(extensions, list) else extensions
    url = first.get("url") if isinstance(first, dict) else None
    return url if isinstance(url, str) and url else "without url"

"""What a Patient says: who it is, that it died, and which other Patients are the same person.

Death is a fact with or without a time:

| deceased[x] | row |
|---|---|
| dateTime to the day or finer | `MEDS_DEATH` at the last instant of it |
| dateTime of a month or year | `MEDS_DEATH` without time, the month or year as its text |
| dateTime that is absent for a reason (`_deceasedDateTime`), or a placeholder | `MEDS_DEATH` without time |
| true | `MEDS_DEATH` without time |
| dateTime absent as `not-applicable`; false; a flag that is absent | none |
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ehrseq.data.fhir.elements import US_CORE, birth_time, omb_categories, read_flag
from ehrseq.data.fhir.references import key_of
from ehrseq.data.fhir.rows import ON_THE_WALL, TIME_STATIC, TIME_UNKNOWN, Times
from ehrseq.data.instants import is_placeholder, read_instant

_GENDERS = {"female": "F", "male": "M", "other": "O", "unknown": "U"}
_RACE, _ETHNICITY = US_CORE + "race", US_CORE + "ethnicity"
_DAY = len("2031-05-04")
_ABSENT_REASON = "http://hl7.org/fhir/StructureDefinition/data-absent-reason"

LINKS = ("replaced-by", "refer", "replaces", "seealso")
"""Kinds of `Patient.link`, all to the same person; the first two point at the record that counts."""

Fact = tuple[str, int, str]
"""Code, time, text."""


def patient_facts(patient: dict[str, Any], times: Times, counts: Counter[tuple[str, str]]) -> list[Fact]:
    """What a Patient says about the person.

    Args:
        patient: The resource.
        times: Instants of dates.
        counts: Takes what is to be told.

    Raises:
        ValueError: Malformed (or another of `MALFORMED`).
    """
    facts: list[Fact] = []
    gender = patient.get("gender")
    if gender:
        facts.append((f"GENDER//{_GENDERS.get(gender, gender)}", TIME_STATIC, ""))
    for extension in patient.get("extension") or ():
        url = extension.get("url", "")
        if url in (_RACE, _ETHNICITY):
            name = "RACE" if url == _RACE else "ETHNICITY"
            facts += [(f"{name}//{category}", TIME_STATIC, "") for category in omb_categories(extension)]
    birth = patient.get("birthDate")
    if birth:
        stated = birth_time(patient) or birth
        micros, local = read_instant(stated, first=True)
        if is_placeholder(stated, birth=True):
            counts["notes", "birth dates that stand for an unknown one (year 0001, 9999)"] += 1
        else:
            facts.append(("MEDS_BIRTH", micros + ON_THE_WALL if local else micros, ""))
    else:
        counts["notes", "patients without a birth date"] += 1
    death = _death(patient, times)
    if death is not None:
        facts.append(("MEDS_DEATH", *death))
        if death[0] == TIME_STATIC:
            what = "to the month or year" if death[1] else "at an unknown time"
            counts["notes", f"patients known dead, {what}"] += 1
    return facts


def _death(patient: dict[str, Any], times: Times) -> tuple[int, str] | None:
    """Time and text of a death, None where the patient is not known to be dead."""
    died = patient.get("deceasedDateTime")
    if died:
        time = times[died]
        if time == TIME_UNKNOWN:
            return TIME_STATIC, ""
        return (time, "") if len(died) >= _DAY else (TIME_STATIC, died)
    flag = patient.get("deceasedBoolean")
    if flag is not None:
        return (TIME_STATIC, "") if read_flag(flag, "deceasedBoolean") else None
    beside = patient.get("_deceasedDateTime")
    if not isinstance(beside, dict) or not beside.get("extension"):
        return None
    reasons = {
        extension.get("valueCode") for extension in beside["extension"] if extension.get("url") == _ABSENT_REASON
    }
    return None if "not-applicable" in reasons else (TIME_STATIC, "")


def links_of(patient: dict[str, Any], server: str) -> list[str]:
    """Links to other Patients of the same person, each as its kind, a blank and the key of the other."""
    links = []
    for link in patient.get("link") or ():
        kind, key = link.get("type"), key_of(link.get("other"), server)
        if kind in LINKS and key:
            links.append(f"{kind} {key}")
    return links

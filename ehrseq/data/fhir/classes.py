"""What kind of visit an Encounter is: its class as HL7 v3-ActCode names it, however the source spells it.

Looked at in turn: what the user says about a spelling; the codings of the class in systems that are known, and a v3
code that names no system (the element is bound to v3-ActCode); the words beside a foreign code, and the code itself
where it is a word or a v3 code; the type of the encounter. Words count only where the whole text is one that is known.
A display that names another class than the code beside it is not followed, and counted. What is left keeps its own name
and is counted: a dataset whose stays all have a class that nobody knows has no admissions, and no labels.

Sources: HL7 v3-ActCode (ActEncounterCode), HL7 version 2 table 0004, SNOMED CT, DSTU2's `encounter-class`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from ehrseq.data.fhir.concepts import codings_of, plain_words
from ehrseq.data.fhir.elements import one_line
from ehrseq.data.fhir.systems import canonical_spelling, system_name
from ehrseq.tokenization.ehr_codes import INPATIENT_CLASSES

V3_CLASSES = frozenset(("IMP", "ACUTE", "NONAC", "EMER", "OBSENC", "AMB", "SS", "HH", "VR", "FLD", "PRENC"))
"""Classes of v3-ActCode."""

CLASSES = V3_CLASSES | {"ICU"}
"""What a class may be mapped to; ICU is a stay in intensive care."""

_TABLE_0004 = {"I": "IMP", "O": "AMB", "E": "EMER", "P": "PRENC", "R": "AMB"}
CLASS_CODES: dict[str, dict[str, str]] = {
    "http://terminology.hl7.org/CodeSystem/v2-0004": _TABLE_0004,
    "http://hl7.org/fhir/v2/0004": _TABLE_0004,
    "HL70004": _TABLE_0004,
    "urn:oid:2.16.840.1.113883.12.4": _TABLE_0004,
    "http://snomed.info/sct": {
        "32485007": "IMP",  # Hospital admission
        "394656005": "IMP",  # Inpatient care
        "8715000": "IMP",  # Hospital admission, elective
        "183452005": "IMP",  # Emergency hospital admission
        "305351004": "ICU",  # Admission to intensive care unit
        "50849002": "EMER",  # Emergency room admission
        "4525004": "EMER",  # Emergency department patient visit
        "448951000124107": "OBSENC",  # Admission to observation unit
        "371883000": "AMB",  # Outpatient procedure
        "185317003": "VR",  # Telephone encounter
        "448337001": "VR",  # Telemedicine consultation with patient
        "439708006": "HH",  # Home visit
    },
}
"""System -> its code -> class; v3-ActCode stands for itself."""

CLASS_WORDS: dict[str, str] = {
    "inpatient": "IMP", "inpatient encounter": "IMP", "inpatient acute": "ACUTE", "acute inpatient": "ACUTE",
    "inpatient non acute": "NONAC", "non acute inpatient": "NONAC", "inpatient stay": "IMP", "hospitalization": "IMP",
    "hospitalisation": "IMP", "hospital inpatient": "IMP", "hospital admission": "IMP", "inpatient hospital": "IMP",
    "inpatient admission": "IMP", "inpatient visit": "IMP", "inpatient hospitalization": "IMP", "admitted": "IMP",
    "emergency": "EMER", "emergency department": "EMER", "emergency room": "EMER", "emergency visit": "EMER",
    "emergency encounter": "EMER", "emergency room visit": "EMER", "emergency department visit": "EMER", "er": "EMER",
    "ed": "EMER", "a e": "EMER", "accident and emergency": "EMER",
    "outpatient": "AMB", "ambulatory": "AMB", "outpatient visit": "AMB", "outpatient encounter": "AMB",
    "office visit": "AMB", "clinic": "AMB", "clinic visit": "AMB", "hospital outpatient": "AMB",
    "hospital outpatient visit": "AMB", "ambulatory encounter": "AMB", "ambulatory visit": "AMB",
    "observation": "OBSENC", "observation encounter": "OBSENC", "observation stay": "OBSENC",
    "short stay": "SS", "home": "HH", "home health": "HH", "home visit": "HH", "virtual": "VR", "telehealth": "VR",
    "telemedicine": "VR", "telephone": "VR", "video visit": "VR", "field": "FLD", "pre admission": "PRENC",
    "preadmission": "PRENC", "intensive care": "ICU", "intensive care unit": "ICU", "icu": "ICU",
    # German
    "stationar": "IMP", "vollstationar": "IMP", "stationarer aufenthalt": "IMP", "stationare aufnahme": "IMP",
    "stationare behandlung": "IMP", "vollstationare behandlung": "IMP", "krankenhausaufenthalt": "IMP",
    "normalstationar": "IMP", "ambulant": "AMB", "ambulante behandlung": "AMB", "ambulanter besuch": "AMB",
    # ... as the code system Kontaktart-de and systems without umlauts spell it
    "stationaer": "IMP", "vollstationaer": "IMP", "normalstationaer": "IMP", "intensivstationaer": "ICU",
    "stationaerer aufenthalt": "IMP", "stationaere aufnahme": "IMP", "stationaere behandlung": "IMP",
    "vollstationaere behandlung": "IMP",
    "notfall": "EMER", "notaufnahme": "EMER", "intensivstation": "ICU", "intensivstationar": "ICU",
    # French
    "hospitalisation complete": "IMP", "hospitalise": "IMP", "urgences": "EMER", "urgence": "EMER",
    "consultation externe": "AMB", "ambulatoire": "AMB", "soins intensifs": "ICU",
    # Spanish, Portuguese, Italian
    "hospitalizacion": "IMP", "internacion": "IMP", "ingreso hospitalario": "IMP", "hospitalizado": "IMP",
    "urgencias": "EMER", "urgencia": "EMER", "emergencia": "EMER", "ambulatorio": "AMB", "consulta externa": "AMB",
    "internacao": "IMP", "internamento": "IMP", "internado": "IMP", "ricovero": "IMP", "ricovero ordinario": "IMP",
    "pronto soccorso": "EMER", "ambulatoriale": "AMB",
    # Dutch, Nordic
    "klinisch": "IMP", "klinische opname": "IMP", "opname": "IMP", "poliklinisch": "AMB", "polikliniek": "AMB",
    "spoedeisende hulp": "EMER", "seh": "EMER", "slutenvard": "IMP", "oppenvard": "AMB", "akutmottagning": "EMER",
    "innlagt": "IMP", "innleggelse": "IMP", "døgnopphold": "IMP", "heldøgn": "IMP", "poliklinikk": "AMB",
    "poliklinisk": "AMB", "indlagt": "IMP", "indlæggelse": "IMP", "ambulant besøg": "AMB", "skadestue": "EMER",
    "vuodeosasto": "IMP", "osastohoito": "IMP", "vuodeosastohoito": "IMP", "avohoito": "AMB", "poliklinikka": "AMB",
    "paivystys": "EMER",
    # Chinese, Japanese, Korean
    "住院": "IMP", "门诊": "AMB", "門診": "AMB", "急诊": "EMER", "急診": "EMER",
    "入院": "IMP", "外来": "AMB", "救急": "EMER", "救急外来": "EMER",
    "입원": "IMP", "외래": "AMB", "응급": "EMER", "응급실": "EMER",
}  # fmt: skip
"""Words, without accents -> class."""

_WORDS = {plain_words(words): of_class for words, of_class in CLASS_WORDS.items()}

# Words that say nothing about the class where they stand beside one that does.
_NEUTRAL = frozenset((
    "encounter", "visit", "stay", "care", "hospital", "patient", "class", "type", "service", "services",
    "episode", "treatment",
))  # fmt: skip

_MIMIC_HOSPITAL_STAY = "http://mimic.mit.edu/fhir/mimic/identifier/encounter-hosp"
_V3_SYSTEMS = ("/v3-actcode", "/v3/actcode", "oid:2.16.840.1.113883.5.4")
_CODES = {canonical_spelling(system): codes for system, codes in CLASS_CODES.items()}

UNKNOWN_CLASSES = "encounters of classes not known: "
"""Begins the notes of a report that name them."""

CONTRADICTIONS = "encounters whose class has codes or a display that contradict, read by the first code: "
"""Begins the notes of a report that name them."""


def checked_mapping(mapping: Mapping[str, str] | None) -> dict[str, str]:
    """The user's classes: spelling (code, `system|code` or display, whatever its case) -> class, in order.

    Raises:
        ValueError: No mapping, or a class that is none.
    """
    if not isinstance(mapping or {}, Mapping):
        raise ValueError(f"encounter_classes got {mapping!r}; expected spellings and their classes.")
    made: dict[str, str] = {}
    for spelling, of_class in (mapping or {}).items():
        if not isinstance(of_class, str) or of_class.upper() not in CLASSES or not str(spelling).strip():
            raise ValueError(
                f"encounter_classes maps {spelling!r} to {of_class!r}; expected a class of {sorted(CLASSES)}, as in "
                "{'Inpatient stay': 'IMP'}."
            )
        made[str(spelling).strip().casefold()] = of_class.upper()
    return dict(sorted(made.items()))


class _Told(NamedTuple):
    """What a class says: its codings and texts, what the user says about them, what they tell, and a contradiction."""

    codings: list[dict[str, Any]]
    texts: list[str]
    said: str | None
    told: str | None
    contradiction: str | None


class ClassReader:
    """Classes of encounters.

    Args:
        mapping: As `checked_mapping` makes it.
    """

    def __init__(self, mapping: Mapping[str, str]) -> None:
        self._mapping = mapping
        self._known: dict[bytes, _Told] = {}

    def read(self, encounter: Mapping[str, Any], counts: Counter[tuple[str, str]]) -> str:
        """Class of an encounter.

        MIMIC's hospital stays are admissions, whatever class they carry (it says how the patient came).

        Args:
            encounter: The resource.
            counts: Takes what is to be told about it.

        Raises:
            ValueError: Its class or type is none that FHIR has.
        """
        stated = encounter.get("class")
        key = orjson.dumps(stated, default=str)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._of_class(stated)
        codings, texts, said, told, contradiction = known
        if said:
            return said
        if contradiction:
            counts["notes", CONTRADICTIONS + contradiction] += 1
        for identifier in encounter.get("identifier") or ():
            if identifier.get("system") == _MIMIC_HOSPITAL_STAY:
                counts["notes", "MIMIC hospital stays read as class IMP"] += 1
                return "IMP"
        if told:
            return told
        types = encounter.get("type")
        kinds = types if isinstance(types, list) else [types]  # DSTU2 and R5 differ; both are looked at
        of_types = [coding for kind in kinds for coding in codings_of(kind, "type")]
        words = [kind["text"] for kind in kinds if isinstance(kind, dict) and isinstance(kind.get("text"), str)]
        told = self._by_user(of_types, words) or _by_code(of_types) or _by_words(of_types, words, codes=False)
        if told:
            counts["notes", "encounters whose class their type tells"] += 1
            return told
        return _own_name(codings, texts, counts)

    def _of_class(self, stated: Any) -> _Told:
        codings, texts = _codings_of_class(stated)
        told = _by_code(codings) or _by_own_code(codings)
        contradiction = None if told is None else _contradiction(told, codings)
        return _Told(codings, texts, self._by_user(codings, texts), told or _by_words(codings, texts), contradiction)

    def _by_user(self, codings: Sequence[Mapping[str, Any]], texts: Iterable[str]) -> str | None:
        if not self._mapping:
            return None
        spellings = list(texts)
        for coding in codings:
            code, system = coding.get("code"), coding.get("system")
            spellings += [f"{system}|{code}", str(code), str(coding.get("display"))]
        return next((found for text in spellings if (found := self._mapping.get(text.strip().casefold()))), None)


def _codings_of_class(stated: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Codings and texts of `class`: a Coding (R4), a CodeableConcept, a list of those (R5), a code (DSTU2)."""
    if isinstance(stated, str):
        return [{"code": stated}], []
    if isinstance(stated, list):
        pairs = [_codings_of_class(one) for one in stated]
        return [coding for codings, _ in pairs for coding in codings], [text for _, texts in pairs for text in texts]
    if stated is None:
        return [], []
    if not isinstance(stated, dict):
        raise ValueError(f"class is {type(stated).__name__}; FHIR R4 has a Coding")
    codings = codings_of(stated, "class")
    if not codings and ("code" in stated or "display" in stated):
        codings = [stated]
    text = stated.get("text")
    return codings, [text] if isinstance(text, str) else []


def _by_code(codings: Iterable[Mapping[str, Any]]) -> str | None:
    """Class by a code of a system that is known."""
    for coding in codings:
        code, system = coding.get("code"), coding.get("system")
        if not isinstance(code, str) or not isinstance(system, str):
            continue
        spelling = canonical_spelling(system)
        if spelling.endswith(_V3_SYSTEMS) and code.strip().upper() in V3_CLASSES:
            return code.strip().upper()
        codes = _CODES.get("snomed.info/sct" if system_name(system, "") == "SNOMED" else spelling)
        if codes and code.strip().upper() in codes:
            return codes[code.strip().upper()]
    return None


def _by_own_code(codings: Iterable[Mapping[str, Any]]) -> str | None:
    """Class by a v3 code without a system: that is what the element is bound to."""
    codes = [coding.get("code") for coding in codings if not coding.get("system")]
    plain = (code.strip().upper() for code in codes if isinstance(code, str))
    return next((code for code in plain if code in V3_CLASSES), None)


def _contradiction(told: str, codings: Iterable[Mapping[str, Any]]) -> str | None:
    """`IMP (Outpatient)` where a code or a display tells another class than the one that is followed."""
    for coding in codings:
        display = coding.get("display")
        for other in (_by_code([coding]) or _by_own_code([coding]), word_class(display)):
            if other and other != told and not {other, told} <= INPATIENT_CLASSES:
                beside = f" ({one_line(str(display))})" if display else ""
                return f"{one_line(str(coding.get('code')))}{beside}"
    return None


def _by_words(codings: Sequence[Mapping[str, Any]], texts: Sequence[str], *, codes: bool = True) -> str | None:
    """Class by what is unambiguous in displays and texts, and by codes that are words or those of v3-ActCode."""
    displays = [coding.get("display") for coding in codings]
    for text in [*displays, *texts]:
        if told := word_class(text):
            return told
    if not codes:
        return None
    for coding in codings:
        code = coding.get("code")
        if isinstance(code, str):
            if code.strip().upper() in V3_CLASSES:
                return code.strip().upper()
            if (len(code.strip()) > 2 or not code.isascii()) and (told := word_class(code)):
                return told
    return None


def word_class(text: object) -> str | None:
    """Class that a text tells: one that the table knows, alone or with words that say nothing about it.

    Any other word may change what is meant: an emergency contact is no emergency.

    >>> word_class("Inpatient hospital encounter"), word_class("Emergency contact")
    ('IMP', None)
    """
    words = plain_words(text)
    told = _WORDS.get(words)
    if told is None and words:
        told = _WORDS.get(" ".join(word for word in words.split() if word not in _NEUTRAL))
    return told


def _own_name(codings: Sequence[Mapping[str, Any]], texts: Sequence[str], counts: Counter[tuple[str, str]]) -> str:
    coding: Mapping[str, Any] = next(
        (coding for coding in codings if coding.get("code")), codings[0] if codings else {}
    )
    code, display = coding.get("code"), coding.get("display") or (texts[0] if texts else None)
    name = code or display
    if not name:
        counts["notes", "encounters without a class, read as AMB"] += 1
        return "AMB"
    name = one_line(name).replace("//", "/")
    beside = f" ({one_line(display)})" if code and display else ""
    counts["notes", f"{UNKNOWN_CLASSES}{name}{beside}"] += 1
    return name

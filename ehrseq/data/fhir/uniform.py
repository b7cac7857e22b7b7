"""Blocks of lines that all hold one type of resource, as Bulk Data exports write them, read without building them.

Most of a resource is never read, and most of what is read repeats from line to line: the subject, the code, the
category, the status. So msgspec decodes only the fields below, those that repeat as raw bytes, and what these bytes
mean is worked out once a block. Whatever is out of the ordinary goes the plain way (`ehrseq.data.fhir.resources`),
which says what things mean: the line of a resource with components or contained ones is handed to it alone, a block
with a line that is no such resource is handed to it whole. The rows are the same either way.

The fields are as few as tell the ordinary from the rest: msgspec compares each name that it skips with all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import orjson
from msgspec import Raw, Struct, field

from ehrseq.data.fhir.concepts import negating_status
from ehrseq.data.fhir.elements import MALFORMED, observation_kind
from ehrseq.data.fhir.lookups import LEFT_OUT_STATUSES, MAX_FLOAT32
from ehrseq.data.fhir.medications import is_no_order
from ehrseq.data.fhir.periods import plain_status
from ehrseq.data.fhir.resources import Extractor
from ehrseq.data.fhir.rows import END_OF_ENCOUNTER, RESOURCE_TYPES, TIME_UNKNOWN, trace_of

_ABSENT = Raw()
_NAN = float("nan")
_UNUSUAL = -1  # index of what the plain way has to work out


class _Period(Struct, gc=False):
    start: str | None = None
    end: str | None = None


class _Quantity(Struct, gc=False):
    value: float | str | None = None
    unit: str | None = None
    system: Raw = _ABSENT
    code: str | None = None
    comparator: Raw = _ABSENT


class _Meta(Struct, gc=False, rename="camel"):
    last_updated: str | None = None


class _Fact(Struct, gc=False, rename="camel"):
    """What is read of a resource that becomes one row; subclasses say where FHIR keeps it.

    Attributes:
        resource_type: Its type; another one ends the decoding of the block.
        id, meta: Its name, and when this version of it was written.
        status: Its status; raw where FHIR has a CodeableConcept.
        code: Raw CodeableConcept.
        subject, encounter: Raw references.
        time, second_time, period: When the fact was available: the first of these that is there.
        unusual: Raw field that sends a resource the plain way wherever it is there.
        modifier_extension: Likewise, of any resource.
    """

    resource_type: str
    id: str | None = None
    meta: _Meta | None = None
    status: str | None = None
    code: Raw = _ABSENT
    subject: Raw = _ABSENT
    encounter: Raw = _ABSENT
    time: str | None = None
    second_time: str | None = None
    period: _Period | None = None
    unusual: Raw = _ABSENT
    modifier_extension: Raw = _ABSENT


class _Condition(_Fact, rename="camel"):
    resource_type: Literal["Condition"]
    status: Raw = field(default=_ABSENT, name="verificationStatus")  # type: ignore[assignment]
    time: str | None = field(default=None, name="recordedDate")


class _Procedure(_Fact, rename="camel"):
    resource_type: Literal["Procedure"]
    time: str | None = field(default=None, name="performedDateTime")
    period: _Period | None = field(default=None, name="performedPeriod")


class _Immunization(_Fact, rename="camel"):
    resource_type: Literal["Immunization"]
    code: Raw = field(default=_ABSENT, name="vaccineCode")
    subject: Raw = field(default=_ABSENT, name="patient")
    time: str | None = field(default=None, name="recorded")
    second_time: str | None = field(default=None, name="occurrenceDateTime")
    period: _Period | None = field(default=None, name="occurrencePeriod")


class _MedicationFact(_Fact, rename="camel"):
    """Likewise; `medication` is a raw reference in place of a code."""

    code: Raw = field(default=_ABSENT, name="medicationCodeableConcept")
    medication: Raw = field(default=_ABSENT, name="medicationReference")


class _MedicationRequest(_MedicationFact, rename="camel"):
    resource_type: Literal["MedicationRequest"]
    time: str | None = field(default=None, name="authoredOn")
    unusual: Raw = field(default=_ABSENT, name="doNotPerform")
    intent: str | None = None


class _MedicationAdministration(_MedicationFact, rename="camel"):
    resource_type: Literal["MedicationAdministration"]
    encounter: Raw = field(default=_ABSENT, name="context")
    time: str | None = field(default=None, name="effectiveDateTime")
    period: _Period | None = field(default=None, name="effectivePeriod")
    unusual: Raw = field(default=_ABSENT, name="effectiveInstant")


class _MedicationDispense(_MedicationFact, rename="camel"):
    resource_type: Literal["MedicationDispense"]
    encounter: Raw = field(default=_ABSENT, name="context")
    time: str | None = field(default=None, name="whenHandedOver")
    second_time: str | None = field(default=None, name="whenPrepared")


class _Observation(_Fact, rename="camel"):
    resource_type: Literal["Observation"]
    time: str | None = field(default=None, name="issued")
    second_time: str | None = field(default=None, name="effectiveDateTime")
    period: _Period | None = field(default=None, name="effectivePeriod")
    unusual: Raw = field(default=_ABSENT, name="component")
    category: Raw = _ABSENT
    value_quantity: _Quantity | None = None
    value_codeable_concept: Raw = _ABSENT
    value_string: Raw = _ABSENT


class _AnyType(Struct, gc=False, rename="camel"):
    resource_type: str


_KINDS: dict[str, str] = {
    "Condition": "DIAGNOSIS",
    "Procedure": "PROCEDURE",
    "Immunization": "IMMUNIZATION",
    "MedicationRequest": "MEDICATION",
    "MedicationAdministration": "MEDICATION",
    "MedicationDispense": "MEDICATION",
}
_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    "Condition": msgspec.json.Decoder(_Condition),
    "Procedure": msgspec.json.Decoder(_Procedure),
    "Immunization": msgspec.json.Decoder(_Immunization),
    "MedicationRequest": msgspec.json.Decoder(_MedicationRequest),
    "MedicationAdministration": msgspec.json.Decoder(_MedicationAdministration),
    "MedicationDispense": msgspec.json.Decoder(_MedicationDispense),
    "Observation": msgspec.json.Decoder(_Observation),
}
_ANY_TYPE = msgspec.json.Decoder(_AnyType)
_USED = frozenset(RESOURCE_TYPES) | {"Bundle"}


def read_uniform(text: bytes, extractor: Extractor) -> bool:
    """Read whole lines that all hold the same type of resource.

    Args:
        text: A block of lines.
        extractor: Takes the rows; without rows yet.

    Returns:
        Whether they were read; if not, the extractor is as empty as before and the plain way has to read the block.
    """
    try:
        return _read(text, extractor)
    except (*MALFORMED, msgspec.MsgspecError):
        # The plain way finds the line and says what is wrong with it.
        extractor.clear()
        return False


def _read(text: bytes, extractor: Extractor) -> bool:
    kind = orjson.loads(text[: text.find(b"\n") + 1 or None])["resourceType"]
    if kind in _USED and kind not in _DECODERS:
        return False
    if not text.isascii():
        text.decode("utf-8")  # msgspec does not look into the strings that it skips
    resources = _DECODERS.get(kind, _ANY_TYPE).decode_lines(text)
    if len(resources) != text.count(b"\n") + (not text.endswith(b"\n")):
        return False  # an empty line, or a resource on two
    if kind == "Observation":
        _read_observations(resources, extractor, _Lines(text, extractor))
    elif kind in _KINDS:
        _read_facts(resources, kind, extractor, _Lines(text, extractor))
    else:
        kinds = Counter(resource.resource_type for resource in resources)
        if not _USED.isdisjoint(kinds):
            return False
        for name, number in kinds.items():
            extractor.counts["resources_not_used", name] += number
    return True


class _Lines:
    """Reads the lines of a block that the plain way has to read."""

    def __init__(self, text: bytes, extractor: Extractor) -> None:
        self._text, self._extractor = text, extractor
        self._lines: list[bytes] = []
        self.read = 0

    def parsed(self, number: int) -> Any:
        """A line, counted from 0."""
        if not self._lines:
            self._lines = self._text.split(b"\n")
        return orjson.loads(self._lines[number])

    def read_plainly(self, number: int) -> None:
        """Read a line, counted from 0."""
        self._extractor.read(self.parsed(number))
        self.read += 1


class _Memo(dict[bytes, Any]):
    """What the raw bytes of an element mean, worked out at their first appearance.

    Args:
        meaning: Parsed element -> what it means.
        absent: What an absent element means.
    """

    def __init__(self, meaning: Callable[[Any], Any], absent: Any) -> None:
        super().__init__({b"": absent})
        self._meaning = meaning

    def __missing__(self, raw: bytes) -> Any:
        made = self[raw] = self._meaning(orjson.loads(raw))
        return made


class _Statuses(dict[str | None, bool]):
    """Whether a resource of a status (or intent) is read here, worked out at its first appearance."""

    def __init__(self, is_kept: Callable[[str | None], bool]) -> None:
        super().__init__()
        self._is_kept = is_kept

    def __missing__(self, status: str | None) -> bool:
        made = self[status] = self._is_kept(status)
        return made


class _Units(dict[str | tuple[bytes, str, str | None] | None, int]):
    """Index of the unit of a text, or of a (raw system, code, text), worked out at its first appearance."""

    def __init__(self, unit_of: Callable[[str | None, str | None, str | None], int]) -> None:
        super().__init__()
        self._unit_of = unit_of

    def __missing__(self, key: str | tuple[bytes, str, str | None] | None) -> int:
        if isinstance(key, tuple):
            system, code, unit = key
            made = self._unit_of(orjson.loads(system) if system else None, code, unit)
        else:
            made = self._unit_of(None, None, key)
        self[key] = made
        return made


def _read_facts(resources: list[Any], kind: str, extractor: Extractor, lines: _Lines) -> None:
    """Rows of resources that are one row each: all used types but observations."""
    happened, subjects, encounters = _common_memos(kind, extractor)
    codes = _Memo(lambda concept: extractor.find_code(_KINDS[kind], concept), 0)
    medications = _Memo(lambda reference: _medication_code(reference, extractor), 0)
    times, add = extractor.times, extractor.rows.append
    name, update, size = extractor.names.append, extractor.updated.append, extractor.sizes.append
    prefix, end_of_encounter = f"{kind}/", END_OF_ENCOUNTER[kind]
    status_is_raw, may_refer = kind == "Condition", _KINDS[kind] == "MEDICATION"
    ordered = _Statuses(lambda intent: not is_no_order(intent)) if kind == "MedicationRequest" else None
    last_subject, subject, last_encounter, encounter = _ABSENT, subjects[b""], _ABSENT, encounters[b""]
    for number, resource in enumerate(resources):
        # Comparing what is raw is several times as fast as hashing it, and mostly a line has what the last one had.
        if (raw := resource.subject) != last_subject:
            last_subject, subject = raw, subjects[bytes(raw)]
        if (raw := resource.encounter) != last_encounter:
            last_encounter, encounter = raw, encounters[bytes(raw)]
        time = resource.time or resource.second_time or ((span := resource.period) and (span.end or span.start))
        known = times[time] if time else end_of_encounter
        if (
            resource.unusual is _ABSENT
            and resource.modifier_extension is _ABSENT
            and known != TIME_UNKNOWN
            and happened[bytes(resource.status) if status_is_raw else resource.status]
            and (ordered is None or ordered[resource.intent])
        ):
            concept = resource.code
            if may_refer and concept is _ABSENT:
                code = medications[bytes(resource.medication)]
            else:
                code = codes[bytes(concept)]
            if code > 0 and subject >= 0:
                add((subject, encounter, code, known, _NAN, 0, 0))
                name(prefix + resource.id if resource.id else "")
                update(times[meta.last_updated] if (meta := resource.meta) and meta.last_updated else TIME_UNKNOWN)
                size(1)
                continue
        lines.read_plainly(number)
    extractor.counts["resources_read", kind] += len(resources) - lines.read


def _read_observations(resources: list[_Observation], extractor: Extractor, lines: _Lines) -> None:
    happened, subjects, encounters = _common_memos("Observation", extractor)
    codes_of_category = _Memo(
        lambda category: _observation_codes(category, extractor), _observation_codes(None, extractor)
    )
    concepts = _Memo(lambda concept: _text_value("valueCodeableConcept", concept, extractor), _UNUSUAL)
    strings = _Memo(lambda string: _text_value("valueString", string, extractor), _UNUSUAL)
    times, rows, add = extractor.times, extractor.rows, extractor.rows.append
    units = _Units(extractor.unit_of)
    name, update, size = extractor.names.append, extractor.updated.append, extractor.sizes.append
    last_subject, subject, last_encounter, encounter = _ABSENT, subjects[b""], _ABSENT, encounters[b""]
    last_category, codes = _ABSENT, codes_of_category[b""]
    for number, resource in enumerate(resources):
        # Comparing what is raw is several times as fast as hashing it, and mostly a line has what the last one had.
        if (raw := resource.subject) != last_subject:
            last_subject, subject = raw, subjects[bytes(raw)]
        if (raw := resource.encounter) != last_encounter:
            last_encounter, encounter = raw, encounters[bytes(raw)]
        time = resource.time or resource.second_time or ((span := resource.period) and (span.end or span.start))
        known = times[time] if time else TIME_UNKNOWN
        if (
            known != TIME_UNKNOWN
            and resource.modifier_extension is _ABSENT
            and happened[resource.status]
            and subject >= 0
        ):
            # 1. Its value: a number with its unit, or a text; -1: none of both, or several
            quantity = resource.value_quantity
            value, unit, text = _NAN, 0, _UNUSUAL
            if resource.unusual is not _ABSENT:
                pass
            elif quantity is None:
                concept = resource.value_codeable_concept
                text = strings[bytes(resource.value_string)] if concept is _ABSENT else concepts[bytes(concept)]
            elif isinstance(quantity.value, float) and quantity.comparator is _ABSENT:
                value = quantity.value
                code_of_unit, text_of_unit = quantity.code, quantity.unit
                if code_of_unit is None or code_of_unit == text_of_unit:
                    unit = units[text_of_unit]
                else:
                    unit = units[bytes(quantity.system), code_of_unit, text_of_unit]
                text = 0 if -MAX_FLOAT32 <= value <= MAX_FLOAT32 else _UNUSUAL
            # 2. Its row, or rows
            if (raw := resource.category) != last_category:
                last_category, codes = raw, codes_of_category[bytes(raw)]
            if text >= 0 and (code := codes[bytes(resource.code)]) > 0:
                add((subject, encounter, code, known, value, text, unit))
                size(1)
            else:
                before = len(rows)
                extractor.add_observed(lines.parsed(number), subject, encounter, known)
                if resource.id and len(rows) == before:
                    add(trace_of(subject))
                size(len(rows) - before)
            # 3. Its version
            name("Observation/" + resource.id if resource.id else "")
            update(times[meta.last_updated] if (meta := resource.meta) and meta.last_updated else TIME_UNKNOWN)
        else:
            lines.read_plainly(number)
    extractor.counts["resources_read", "Observation"] += len(resources) - lines.read


def _common_memos(kind: str, extractor: Extractor) -> tuple[dict[Any, bool], _Memo, _Memo]:
    """Status -> whether its fact is kept, subject -> index, encounter -> index."""
    left_out = ("entered-in-error", *LEFT_OUT_STATUSES[kind])

    def happened(status: str | None) -> bool:
        return plain_status(status) not in left_out

    def verified(status: Any) -> bool:
        return negating_status(status) not in left_out

    def subject(holder: Any) -> int:
        if holder is not None and str(holder.get("reference")).startswith("#"):
            return _UNUSUAL
        return extractor.subject_of(holder, {})

    return (
        _Memo(verified, True) if kind == "Condition" else _Statuses(happened),
        _Memo(subject, 0),
        _Memo(extractor.encounter_of, 0),
    )


def _observation_codes(category: Any, extractor: Extractor) -> _Memo:
    """Concept -> index of its code, for observations of a category."""
    return _Memo(lambda concept: extractor.find_code(observation_kind(category, concept), concept), 0)


def _medication_code(reference: Any, extractor: Extractor) -> int:
    if reference is None or str(reference.get("reference")).startswith("#"):
        return _UNUSUAL
    (code,) = extractor.referenced_codes(reference, {})
    return extractor.codes[code]


def _text_value(name: str, value: Any, extractor: Extractor) -> int:
    if value is None:
        return _UNUSUAL
    _, text, _, has_value = extractor.value_of({name: value})
    return text if has_value else _UNUSUAL

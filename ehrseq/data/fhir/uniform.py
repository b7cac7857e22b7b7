"""Blocks of lines that all hold one type of resource, as Bulk Data exports write them, read without building them.

Most of a resource is never read, and most of what is read repeats from line to line: the subject, the code, the
category, the status. So msgspec decodes only the fields below, those that repeat as raw bytes, and what these bytes
mean is worked out once a block. Whatever is out of the ordinary goes the plain way (`ehrseq.data.fhir.resources`),
which says what things mean: a resource with components or contained ones is handed to it alone, a block with a line
that is no such resource is handed to it whole. The rows are the same either way.
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
from ehrseq.data.fhir.periods import plain_status
from ehrseq.data.fhir.resources import LEFT_OUT_STATUSES, MAX_FLOAT32, Extractor, is_no_order
from ehrseq.data.fhir.rows import END_OF_ENCOUNTER, RESOURCE_TYPES, TIME_UNKNOWN

_ABSENT = Raw()
_NAN = float("nan")
_UNUSUAL = -1  # index of what the plain way has to work out


class _Period(Struct, gc=False, omit_defaults=True):
    start: str | None = None
    end: str | None = None


class _Quantity(Struct, gc=False, omit_defaults=True):
    value: float | str | None = None
    unit: str | None = None
    system: Raw = _ABSENT
    code: str | None = None
    comparator: Raw = _ABSENT


class _Meta(Struct, gc=False, omit_defaults=True, rename="camel"):
    last_updated: str | None = None


class _Fact(Struct, gc=False, omit_defaults=True, rename="camel"):
    """What is read of a resource that becomes one row; subclasses say where FHIR keeps it.

    Attributes:
        resource_type: Its type; another one ends the decoding of the block.
        id, meta: Its name, and when this version of it was written.
        status: Raw status.
        code: Raw CodeableConcept.
        medication: Raw reference to a Medication, in place of a code.
        subject, encounter: Raw references.
        time, second_time, period: When the fact was available: the first of these that is there.
        unusual: Raw field that sends a resource the plain way wherever it is there.
        intent: Raw intent of a request.
        contained, modifier_extension: Read on the plain way only.
    """

    resource_type: str
    id: str | None = None
    meta: _Meta | None = None
    status: Raw = _ABSENT
    code: Raw = _ABSENT
    medication: Raw = _ABSENT
    subject: Raw = _ABSENT
    encounter: Raw = _ABSENT
    time: str | None = None
    second_time: str | None = None
    period: _Period | None = None
    unusual: Raw = _ABSENT
    intent: Raw = _ABSENT
    contained: Raw = _ABSENT
    modifier_extension: Raw = _ABSENT


class _Condition(_Fact, rename="camel"):
    resource_type: Literal["Condition"]
    status: Raw = field(default=_ABSENT, name="verificationStatus")
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
    code: Raw = field(default=_ABSENT, name="medicationCodeableConcept")
    medication: Raw = field(default=_ABSENT, name="medicationReference")


class _MedicationRequest(_MedicationFact, rename="camel"):
    resource_type: Literal["MedicationRequest"]
    time: str | None = field(default=None, name="authoredOn")
    unusual: Raw = field(default=_ABSENT, name="doNotPerform")


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
    # Read on the plain way only
    effective_instant: Raw = _ABSENT
    data_absent_reason: Raw = _ABSENT
    value_boolean: Raw = _ABSENT
    value_integer: Raw = _ABSENT
    value_range: Raw = _ABSENT
    value_ratio: Raw = _ABSENT
    value_sampled_data: Raw = _ABSENT
    value_time: Raw = _ABSENT
    value_date_time: Raw = _ABSENT
    value_period: Raw = _ABSENT
    value_attachment: Raw = _ABSENT
    value_reference: Raw = _ABSENT


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
_to_json = msgspec.json.Encoder().encode


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
        _read_observations(resources, extractor)
    elif kind in _KINDS:
        _read_facts(resources, kind, extractor)
    else:
        kinds = Counter(resource.resource_type for resource in resources)
        if not _USED.isdisjoint(kinds):
            return False
        for name, number in kinds.items():
            extractor.counts["resources_not_used", name] += number
    return True


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


def _read_facts(resources: list[_Fact], kind: str, extractor: Extractor) -> None:
    """Rows of resources that are one row each: all used types but observations."""
    happened, subjects, encounters = _common_memos(kind, extractor)
    codes = _Memo(lambda concept: extractor.find_code(_KINDS[kind], concept), 0)
    medications = _Memo(lambda reference: _medication_code(reference, extractor), 0)
    times, add, note = extractor.times, extractor.rows.append, _version_notes(kind, extractor)
    end_of_encounter = END_OF_ENCOUNTER[kind]
    plain = 0
    ordered = _Memo(lambda intent: not is_no_order(intent), True) if kind == "MedicationRequest" else None
    for resource in resources:
        time = resource.time or resource.second_time or ((span := resource.period) and (span.end or span.start))
        known = times[time] if time else end_of_encounter
        if (
            resource.unusual is _ABSENT
            and resource.modifier_extension is _ABSENT
            and known != TIME_UNKNOWN
            and happened[bytes(resource.status)]
            and (ordered is None or ordered[bytes(resource.intent)])
        ):
            code = medications[bytes(resource.medication)] if resource.code is _ABSENT else codes[bytes(resource.code)]
            if code > 0 and (subject := subjects[bytes(resource.subject)]) >= 0:
                add((subject, encounters[bytes(resource.encounter)], code, known, _NAN, 0, 0))
                note(resource)
                continue
        _read_plainly(resource, extractor)
        plain += 1
    extractor.counts["resources_read", kind] += len(resources) - plain


def _read_observations(resources: list[_Observation], extractor: Extractor) -> None:
    happened, subjects, encounters = _common_memos("Observation", extractor)
    codes_of_category = _Memo(
        lambda category: _observation_codes(category, extractor), _observation_codes(None, extractor)
    )
    concepts = _Memo(lambda concept: _text_value("valueCodeableConcept", concept, extractor), _UNUSUAL)
    strings = _Memo(lambda string: _text_value("valueString", string, extractor), _UNUSUAL)
    times, unit_of, add = extractor.times, extractor.unit_of, extractor.rows.append
    units = _Units(unit_of)
    note = _version_notes("Observation", extractor)
    plain = 0
    for resource in resources:
        time = resource.time or resource.second_time or ((span := resource.period) and (span.end or span.start))
        known = times[time] if time else TIME_UNKNOWN
        if (
            known != TIME_UNKNOWN
            and resource.unusual is _ABSENT
            and resource.modifier_extension is _ABSENT
            and happened[bytes(resource.status)]
        ):
            # 1. Its value: a number with its unit, or a text; -1: none of both
            quantity = resource.value_quantity
            value, unit, text = _NAN, 0, 0
            if quantity is None:
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
            else:
                text = _UNUSUAL
            # 2. Its row
            code = codes_of_category[bytes(resource.category)][bytes(resource.code)]
            subject = subjects[bytes(resource.subject)]
            if text >= 0 and code > 0 and subject >= 0:
                add((subject, encounters[bytes(resource.encounter)], code, known, value, text, unit))
                note(resource)
                continue
        _read_plainly(resource, extractor)
        plain += 1
    extractor.counts["resources_read", "Observation"] += len(resources) - plain


def _version_notes(kind: str, extractor: Extractor) -> Callable[[_Fact], None]:
    """Notes the version of a resource that was one row."""
    name, update, size = extractor.names.append, extractor.updated.append, extractor.sizes.append
    prefix, times = f"{kind}/", extractor.times

    def note(resource: _Fact) -> None:
        name(prefix + resource.id if resource.id else "")
        stated = (meta := resource.meta) and meta.last_updated
        update(times[stated] if stated else TIME_UNKNOWN)
        size(1)

    return note


def _read_plainly(resource: _Fact, extractor: Extractor) -> None:
    """The fields that were decoded are all that the extractor looks at."""
    extractor.read(orjson.loads(_to_json(resource)))


def _common_memos(kind: str, extractor: Extractor) -> tuple[_Memo, _Memo, _Memo]:
    """Status -> whether its fact is kept, subject -> index, encounter -> index."""
    left_out = ("entered-in-error", *LEFT_OUT_STATUSES[kind])

    def happened(status: Any) -> bool:
        # Not sure is False: then the plain way decides.
        return isinstance(status, str) and plain_status(status) not in left_out

    def verified(status: Any) -> bool:
        return negating_status(status) not in left_out

    def subject(holder: Any) -> int:
        if holder is not None and str(holder.get("reference")).startswith("#"):
            return _UNUSUAL
        return extractor.subject_of(holder, {})

    return (
        _Memo(verified if kind == "Condition" else happened, True),
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

"""What elements of resources are in a block: references, codes, texts and units as small integers, times as instants.

Each is worked out once: what the same reference, coding or text gave before is looked up.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import orjson

from ehrseq.data.fhir.codes import Coder
from ehrseq.data.fhir.concepts import codings_of, negating_status, says_absent
from ehrseq.data.fhir.elements import observation_kind, one_line
from ehrseq.data.fhir.medications import contained_in
from ehrseq.data.fhir.periods import plain_status
from ehrseq.data.fhir.references import NOTHING, identifier_key, key_of
from ehrseq.data.fhir.rows import END_OF_ENCOUNTER, TIME_UNKNOWN, StringTable, Times
from ehrseq.data.fhir.values import unit_spelling

NAN = float("nan")
"""The value of a row without a number."""

MAX_FLOAT32 = 3.4028234663852886e38
LEFT_OUT_STATUSES: dict[str, tuple[str, ...]] = {
    "Encounter": ("planned", "cancelled"),
    "Condition": ("refuted",),
    "Procedure": ("not-done", "preparation"),
    "Observation": ("cancelled",),
    "MedicationRequest": ("doNotPerform",),
    "MedicationAdministration": ("not-done",),
    "MedicationDispense": ("cancelled", "declined"),
    "Immunization": ("not-done",),
    "Medication": (),
}
"""Type -> statuses, beside `entered-in-error`, of facts that did not happen."""

PLACEHOLDERS = "times that stand for an unknown one (year 0001, 9999 ...), not used"
"""Note of a report."""

_TIME_CACHE_SIZE = 500_000

_MOST_STATUSES = 1000
"""Spellings of statuses that are kept in mind."""


def stated_times(resource: dict[str, Any], field: str) -> tuple[str | None, ...]:
    """What a choice element says: its DateTime, the end of its Period (else the start), its Instant."""
    moment, period = resource.get(field + "DateTime"), resource.get(field + "Period")
    if period:
        return moment, period.get("end"), period.get("start")
    return moment, resource.get("effectiveInstant") if field == "effective" else None


class Lookups:
    """Tables of a block, and what stands in them already.

    Attributes:
        subjects, encounters, codes, texts, units: String tables that rows point into (subjects and encounters hold
            keys).
        counts: (table of the report, entry) -> number.
        coder: Gives codes their names; kept from block to block.
        times: Text of a date or time -> instant, the last of a date; kept from block to block.
    """

    def __init__(self) -> None:
        self.coder = Coder()
        self.times = Times()
        self._starts = Times(first=True)
        self._kinds: dict[bytes, str] = {}
        self._happened: set[tuple[str, str]] = set()
        self._verifications: dict[bytes, str | None] = {}

    def clear(self) -> None:
        """Start a new block: empty tables; what was worked out about codes and times stays."""
        self.subjects, self.encounters, self.codes, self.texts, self.units = (StringTable() for _ in range(5))
        self.counts: Counter[tuple[str, str]] = Counter()
        self._server = ""
        # Raw references and codings -> index, without working out the key or code again.
        self._seen_subjects: dict[str | None, int] = {}
        self._seen_encounters: dict[str | None, int] = {}
        self._seen_codes: dict[tuple[str, Any, Any], int] = {}
        self._seen_units: dict[tuple[Any, Any, Any], int] = {}
        for times in (self.times, self._starts):
            if len(times) > _TIME_CACHE_SIZE:
                times.clear()

    # Whether it happened

    def _did_not_happen(self, resource_type: str, status: Any) -> bool:
        if isinstance(status, str) and (resource_type, status) in self._happened:
            return False
        written = status
        if status not in LEFT_OUT_STATUSES[resource_type]:
            status = plain_status(status)
        if status == "entered-in-error":
            self.counts["entered_in_error", resource_type] += 1
            return True
        if status in LEFT_OUT_STATUSES[resource_type]:
            self.counts["skipped", f"{resource_type}: {status}"] += 1
            return True
        if isinstance(written, str) and len(self._happened) < _MOST_STATUSES:
            self._happened.add((resource_type, written))
        return False

    def _verification(self, status: Any) -> str | None:
        """What a verificationStatus says; each is worked out once."""
        if status is None:
            return None
        key = orjson.dumps(status, default=str)
        if key not in self._verifications:
            said = negating_status(status)
            if len(self._verifications) >= _MOST_STATUSES:
                return said
            self._verifications[key] = said
        return self._verifications[key]

    # When

    def _at(self, resource_type: str, *texts: str | None) -> int:
        """Last instant of the first of some dates and times that is there and can be meant, else the end of the
        encounter.
        """
        for text in texts:
            if text:
                time = self.times[text]
                if time != TIME_UNKNOWN:
                    return time
                self.counts["notes", PLACEHOLDERS] += 1
        return END_OF_ENCOUNTER[resource_type]

    def _at_stated(self, resource_type: str, stated: str | None, resource: dict[str, Any], field: str) -> int:
        """The same of a time, and where it is not there or cannot be meant, of a choice element."""
        time = self.times[stated] if stated else TIME_UNKNOWN
        if time != TIME_UNKNOWN:
            return time
        return self._at(resource_type, stated, *stated_times(resource, field))

    # Whose

    def _enter_server(self, server: str) -> None:
        """Relative references mean this server's resources from now on."""
        self._server = server
        self._seen_subjects, self._seen_encounters = {}, {}

    def subject_of(self, holder: dict[str, Any] | None, resource: dict[str, Any]) -> int:
        """Index of the subject that a Reference of a resource names, 0 where there is none."""
        if holder is None:
            return 0
        raw = holder.get("reference")
        number = self._seen_subjects.get(raw)
        if number is None:
            key = (
                self._contained_key(raw, resource)
                if isinstance(raw, str) and raw.startswith("#")
                else key_of(holder, self._server)
            )
            number = self.subjects[key]
            if raw and not raw.startswith("#"):
                self._seen_subjects[raw] = number
        return number

    def _contained_key(self, raw: str, resource: dict[str, Any]) -> str:
        """A contained patient is known to others by its identifier only."""
        contained = contained_in(resource, raw)
        for identifier in (contained or {}).get("identifier") or ():
            if key := identifier_key(identifier):
                return key
        return NOTHING

    def encounter_of(self, holder: dict[str, Any] | None) -> int:
        """Index of the encounter that a Reference names, 0 where there is none."""
        if holder is None:
            return 0
        raw = holder.get("reference")
        number = self._seen_encounters.get(raw)
        if number is None:
            key = key_of(holder, self._server)
            # MedicationAdministration.context may also be an EpisodeOfCare, which is no visit.
            number = self.encounters[NOTHING if "EpisodeOfCare/" in key else key]
            if raw:
                self._seen_encounters[raw] = number
        return number

    # What

    def _kind_of(self, categories: Any, concept: Any) -> str:
        """Kind of an observation; what its categories say is worked out once."""
        if not categories:
            return observation_kind(categories, concept)
        key = orjson.dumps(categories, default=str)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = observation_kind(categories, concept)
        return kind

    def _code(self, kind: str, concept: dict[str, Any] | None, resource_type: str) -> int:
        """Index of a concept's code, 0 where it has none or says that there is nothing (counted)."""
        number = self.find_code(kind, concept)
        if not number:
            absent = concept is not None and self.coder.absent(concept)
            self.counts["skipped", f"{resource_type}: {'known to be absent' if absent else 'no code'}"] += 1
        return number

    def find_code(self, kind: str, concept: dict[str, Any] | None) -> int:
        """Index of a concept's code, 0 where it has none or says that there is nothing."""
        if concept is None:
            return 0
        codings = concept.get("coding") if isinstance(concept, dict) else None
        if isinstance(codings, list) and len(codings) == 1 and "extension" not in codings[0]:
            coding = codings[0]
            key = (kind, coding.get("system"), coding.get("code"))
            number = self._seen_codes.get(key)
            if number is not None:
                return number
            if says_absent(codings):
                return 0
            code = self.coder.coding(kind, coding)
            if code is not None:
                number = self._seen_codes[key] = self.codes[code]
                return number
        elif self.coder.absent(concept):
            return 0
        code = self.coder.code(kind, concept)
        return 0 if code is None else self.codes[code]

    def unit_of(self, system: str | None, code: str | None, unit: str | None) -> int:
        """Index of the unit of a Quantity (see `unit_spelling`)."""
        key = (system, code, unit)
        number = self._seen_units.get(key)
        if number is None:
            number = self._seen_units[key] = self.units[unit_spelling(system, code, unit)]
        return number

    def value_of(self, holder: dict[str, Any]) -> tuple[float, int, int, bool]:
        """(number, text index, unit index, whether there is a value) of an Observation or component."""
        quantity = holder.get("valueQuantity")
        if quantity is not None:
            value = quantity.get("value")
            if value is None:
                return NAN, 0, 0, False
            if "comparator" in quantity:
                self.counts["notes", "values with a comparator (<, >), read as the number"] += 1
            unit = self.unit_of(quantity.get("system"), quantity.get("code"), quantity.get("unit"))
            return self._number(value), 0, unit, True
        concept = holder.get("valueCodeableConcept")
        if concept is not None:
            coding = (codings_of(concept, "valueCodeableConcept") or [{}])[0]
            text = coding.get("display") or concept.get("text") or coding.get("code")
            return (NAN, self.texts[one_line(text)], 0, True) if text else (NAN, 0, 0, False)
        text = holder.get("valueString")
        if text is not None:
            text = one_line(text)
            return NAN, self.texts[text], 0, bool(text)
        if "valueInteger" in holder:
            return self._number(holder["valueInteger"]), 0, 0, True
        if "valueBoolean" in holder:
            return NAN, self.texts["true" if holder["valueBoolean"] else "false"], 0, True
        for name in holder:
            if name.startswith("value"):
                # The row stays (something was observed), its value is of a kind that a table cannot hold.
                self.counts["notes", f"values not read: {name}"] += 1
                return NAN, 0, 0, True
        return NAN, 0, 0, False

    def _number(self, value: Any) -> float:
        if isinstance(value, str):
            value = float(value)  # some servers quote decimals
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"a value must be a number, got {value!r}")
        if not -MAX_FLOAT32 <= value <= MAX_FLOAT32:
            self.counts["notes", "values that are NaN or beyond float32, read as missing"] += 1
            return NAN
        return value

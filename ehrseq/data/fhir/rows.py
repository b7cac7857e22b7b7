"""Rows of FHIR resources as small integers: what their columns are, and what stands for a time that is not there.

Rows hold indices into a block's own string tables, which later meet (`ehrseq.data.fhir.assemble`): a row costs seven
numbers, and references are looked up once per distinct reference, not once per row.
"""

from __future__ import annotations

from typing import NamedTuple

from ehrseq.data.instants import is_placeholder, parse_instant, read_instant

RESOURCE_TYPES = (
    "Patient",
    "Encounter",
    "Condition",
    "Procedure",
    "Observation",
    "MedicationRequest",
    "MedicationAdministration",
    "MedicationDispense",
    "Immunization",
    "Medication",
)
"""Types that are read; others are counted as not used."""

TIME_STATIC = -(2**62)
"""Stands for "no time: static" in a row's time."""

TIME_FROM_ENCOUNTER = TIME_STATIC + 1
"""The first of `END_OF_ENCOUNTER`."""

END_OF_ENCOUNTER = {kind: TIME_FROM_ENCOUNTER + number for number, kind in enumerate(RESOURCE_TYPES)}
"""Type -> stands for "the end of the encounter" in the time of a row of this type."""

TIME_UNKNOWN = TIME_STATIC - 1
"""Stands for an unknown time: the end of an encounter that has none, a placeholder."""

ON_THE_WALL = 2**60
"""Is added to a time that states no zone; times with a zone lie below half of it."""

MEDICATION_REFERENCE = "\0"
"""Starts a code that is still the key of a Medication: `\\0key\\0display`."""

Row = tuple[int, int, int, int, float, int, int]
"""(subject, encounter, code, time, value, text, unit): indices into the tables; time in microseconds or one of the
constants above. A plain tuple: there are millions of them.
"""


def trace_of(subject: int) -> Row:
    """The row without a code of a resource that gives no other: an earlier version may say what this one takes back."""
    return subject, 0, 0, TIME_STATIC, float("nan"), 0, 0


COLUMN_TYPES = {
    "subject": "i",
    "encounter": "i",
    "code": "i",
    "time": "q",
    "value": "f",
    "text": "i",
    "unit": "i",
}
"""The fields of a `Row`, in order -> their types in an `array`."""

TABLE_OF = {"subject": "subjects", "encounter": "encounters", "code": "codes", "text": "texts", "unit": "units"}
"""Column -> the string table that it points into."""


_SURELY_FROM, _SURELY_UNTIL = parse_instant("1900-01-02"), parse_instant("2997")
"""Times between these are placeholders in no zone."""


class Visit(NamedTuple):
    """An Encounter.

    Attributes:
        keys: Keys that name it (`resource_keys`).
        id: Its id.
        subject: Index of its subject.
        start, end: Its period, `TIME_UNKNOWN` where that is open or cannot be meant.
        offset: UTC offset in minutes, None where no time states one.
        part_of: Key of the encounter that it is part of.
        resource: Index of the resource in its block.
    """

    keys: list[str]
    id: str
    subject: int
    start: int
    end: int
    offset: int | None
    part_of: str
    resource: int


class StringTable(dict[str, int]):
    """Distinct strings in order of appearance; 0 is the empty string, which stands for null."""

    def __init__(self) -> None:
        super().__init__({"": 0})

    def __missing__(self, text: str) -> int:
        number = self[text] = len(self)
        return number


class Times(dict[str, int]):
    """Times (see `read_instant`) of date and time texts, each worked out once; `ON_THE_WALL` is added to those without
    a zone, and a placeholder is `TIME_UNKNOWN`.

    Args:
        first: Whether a partial date stands for its first instant.
    """

    def __init__(self, *, first: bool = False) -> None:
        super().__init__()
        self._first = first

    def __missing__(self, text: str) -> int:
        micros, local = read_instant(text, first=self._first)
        if not _SURELY_FROM < micros < _SURELY_UNTIL and is_placeholder(text):
            time = TIME_UNKNOWN
        else:
            time = micros + ON_THE_WALL if local else micros
        self[text] = time
        return time

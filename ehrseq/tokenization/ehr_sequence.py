"""One patient's events -> rows, as a plain state machine: the readable twin of the columnar reader `ehrseq.encode`.

1. Read the patient's events and check them.
2. Order them in time; cut at the prediction time, by each row's own time.
3. Walk over them: which rows take part, which open a visit, and after which a visit is open.

The rows become tokens where those of whole tables do (`ehr_rows.lay_out`). Needs nothing but numpy, so that a
checkpoint can score a patient wherever transformers runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import MAXYEAR, MINYEAR, UTC, date, datetime
from operator import itemgetter
from typing import Any

import numpy as np

from .ehr_codes import DAY_US, INPATIENT_CLASSES, KIND_RANKS, RANK_OTHER, SECOND_US
from .ehr_rows import NO_TIME, HistoryRows
from .ehr_visits import silence_us
from .ehr_vocabulary import EventVocabulary

_TIME_AND_RANK = itemgetter(0, 1)
EPOCH = datetime(1970, 1, 1)
PATIENT_KEYS = {"subject_id", "events", "prediction_time"}
_OPTIONAL = ("numeric_value", "text_value", "visit_id", "unit")
EVENT_KEYS = frozenset({"subject_id", "time", "code", *_OPTIONAL})


@dataclass(slots=True)
class Event:
    """One row of the event table; `time` in microseconds since 1970 (UTC), None = static."""

    time: int | None
    code: str
    value: float | None = None
    text: str | None = None
    visit_id: str | None = None
    unit: str | None = None


# -- 1. reading ------------------------------------------------------------------------------------------------------


def parse_time(value: Any, what: str = "time") -> int | None:
    """Microseconds since 1970 (UTC) of a datetime, date, numpy datetime or ISO 8601 string; None for null.

    Raises:
        ValueError: Anything else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            raise ValueError(
                f"{what} got {value!r}; expected ISO 8601 such as '2024-03-01T08:30:00', a datetime, or None (static)."
            ) from None
    if isinstance(value, datetime):
        if value != value:  # pandas' NaT is a datetime
            return None
        if value.tzinfo is not None:
            try:
                value = value.astimezone(UTC).replace(tzinfo=None)
            except OverflowError:
                raise ValueError(
                    f"{what} got {value.isoformat()!r}, which in UTC lies outside the years 1 to 9999; correct it, or "
                    "give None (static)."
                ) from None
        span = value - EPOCH
        number: int = span.days * DAY_US + span.seconds * SECOND_US + span.microseconds
        return number
    if isinstance(value, np.datetime64):
        if np.isnat(value):
            return None
        if not MINYEAR <= int(value.astype("datetime64[Y]").astype(np.int64)) + 1970 <= MAXYEAR:
            raise ValueError(f"{what} got {value}, outside the years 1 to 9999; correct it, or give None (static).")
        return int(value.astype("datetime64[us]").astype(np.int64))
    if isinstance(value, date):
        return (value - EPOCH.date()).days * DAY_US
    raise ValueError(
        f"{what} got {value!r} ({type(value).__name__}); expected ISO 8601 text, a datetime, or None for static."
    )


def subjects_digest(subject_ids: Iterable[int]) -> str:
    """SHA-256 over the sorted subject ids, one a line: tells whether two fits saw the same subjects, without storing
    them.
    """
    return hashlib.sha256("\n".join(str(s) for s in sorted(subject_ids)).encode()).hexdigest()


def patient_of_table(table: Any) -> Any:
    """A table of one subject (polars, pandas, pyarrow) as a patient dict; anything else as it is.

    Raises:
        ValueError: The table holds several subjects.
    """
    if hasattr(table, "to_pylist"):
        rows: list[dict[str, Any]] = table.to_pylist()
    elif hasattr(table, "to_dicts"):
        rows = table.to_dicts()
    elif hasattr(table, "to_dict") and hasattr(table, "columns"):
        # pandas writes nulls as NaN and NaT
        rows = [
            {key: None if value != value else value for key, value in row.items()} for row in table.to_dict("records")
        ]
    else:
        return table
    subjects = {row.get("subject_id") for row in rows}
    if len(subjects) > 1:
        raise ValueError(
            f"a table of one subject was expected, this one holds {len(subjects)}; split it by subject_id, or read it "
            "whole (EhrTokenizer.encode_table, ehrseq.encode.triplets.build_triplets)."
        )
    return {"subject_id": next(iter(subjects), None), "events": rows}


def read_patient(patient: Any) -> tuple[list[Event], int | None]:
    """Events and prediction time of a patient dict, checked.

    Args:
        patient: `{"subject_id", "events": [{"time", "code", ...}], "prediction_time"?}`.

    Raises:
        ValueError: Not such a dict, an event with a wrong field or without time (the event's position is named), or
            events of several subjects.
    """
    if not isinstance(patient, Mapping) or "events" not in patient:
        got = (
            f"a dict with the keys {sorted(map(str, patient))}"
            if isinstance(patient, Mapping)
            else f"{type(patient).__name__}"
        )
        raise ValueError(
            'a patient must be {"subject_id": ..., "events": [{"time": ..., "code": ...}, ...]}, or a table of one '
            f"subject; got {got}."
        )
    unknown = sorted(map(str, set(patient) - PATIENT_KEYS))
    if unknown:  # a misspelt prediction_time would read the whole record
        raise ValueError(f"a patient has the unknown keys {unknown}; expected {sorted(PATIENT_KEYS)}.")
    rows = patient["events"]
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Sequence):
        raise ValueError(f"a patient's events must be a list of dicts, got {type(rows).__name__}.")
    events = []
    unread: set[Any] = set()
    subjects = set() if patient.get("subject_id") is None else {str(patient["subject_id"])}
    for k, row in enumerate(rows):
        if not isinstance(row, (dict, Mapping)):  # dict first: the abstract class is slow to ask
            raise ValueError(
                f"event {k} is {type(row).__name__}; expected a dict such as "
                '{"time": "2024-03-01T08:30", "code": "LAB//LOINC//2345-7"}.'
            )
        code = row.get("code")
        if not isinstance(code, str) or not code:
            raise ValueError(
                f"event {k} has code {code!r}; expected a non-empty string such as 'DIAGNOSIS//ICD10CM//I10'."
            )
        if "time" not in row:  # as if it were static, it would be known from birth on
            raise ValueError(
                f"event {k} has no 'time', it has the keys {sorted(map(str, row))}; give its time, or None where it "
                "is static."
            )
        if not EVENT_KEYS.issuperset(row):
            unread |= row.keys() - EVENT_KEYS
        if row.get("subject_id") is not None:
            subjects.add(str(row["subject_id"]))
        try:
            time = parse_time(row["time"])
        except ValueError as error:
            raise ValueError(f"event {k}: {error}") from None
        value, text, visit_id, unit = map(row.get, _OPTIONAL)
        events.append(
            Event(
                time,
                code,
                None if value is None else _number(value, k),
                None if text is None else _text(text, k, "text_value"),
                None if visit_id is None else _text(visit_id, k, "visit_id"),
                None if unit is None else _text(unit, k, "unit"),
            )
        )
    if len(subjects) > 1:
        raise ValueError(f"a patient's events are of the subjects {sorted(subjects)[:5]}; expected those of one.")
    if unread:
        from transformers.utils import logging  # here, since it takes as long as all else that a worker process loads

        logging.get_logger(__name__).warning_once(
            f"events have fields that are not read: {sorted(map(str, unread))}; read are {sorted(EVENT_KEYS)}."
        )
    return events, parse_time(patient.get("prediction_time"), "prediction_time")


def _number(value: Any, k: int) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(
            f"event {k}: numeric_value got {value!r} ({type(value).__name__}); expected a number or None "
            "(text goes to text_value)."
        )
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"event {k}: numeric_value is an integer of {int(value).bit_length()} bits, which no float holds; expected "
            "a number below 1e38, or None where it is not known."
        ) from None


def _text(value: Any, k: int, name: str) -> str:
    if isinstance(value, str):
        return value
    if name == "visit_id" and isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"event {k}: {name} got {value!r} ({type(value).__name__}); expected a string or None.")


def asked_at(events: Iterable[Event], cut: int | None) -> int | None:
    """The instant (microseconds) that a record is asked at: its cut, else its last event; None where it has no time."""
    if cut is not None:
        return cut
    return max((event.time for event in events if event.time is not None), default=None)


def count_later(events: Iterable[Event], cut: int | None) -> int:
    """Events after the cut (microseconds), which are not read; 0 where nothing is cut."""
    return 0 if cut is None else sum(event.time is not None and event.time > cut for event in events)


# -- 2. and 3. rows ---------------------------------------------------------------------------------------------------


def patient_rows(events: Sequence[Event], vocabulary: EventVocabulary, cut: int | None = None) -> HistoryRows:
    """The rows of a patient that take part, with their tokens and visits.

    Args:
        events: Any order; sorted here by time, source order kept inside an instant except for starts, ends, birth and
            death.
        vocabulary: Codes to ids.
        cut: Rows later than this instant (microseconds) are left out, before anything else looks at them.

    Returns:
        The rows of one patient, whose subject_id is 0, with the position in `events` that each comes from.
    """
    return OrderedEvents(events, vocabulary, cut).rows()


class OrderedEvents:
    """A patient's events in the order in which they are read: once, or again and again without some of them.

    Args:
        events: As of `patient_rows`; the other arguments too.
        vocabulary: See above.
        cut: See above.
    """

    def __init__(self, events: Sequence[Event], vocabulary: EventVocabulary, cut: int | None = None) -> None:
        self.vocabulary = vocabulary
        self._static: list[tuple[int, int]] = []  # position, id
        timed: list[tuple[int, int, int, Event, str, str | None]] = []
        for position, event in enumerate(events):
            kind, encounter_class = vocabulary.kind(event.code)
            if event.time is not None:
                if cut is None or event.time <= cut:
                    rank = KIND_RANKS.get(kind, RANK_OTHER)
                    timed.append((event.time, rank, position, event, kind, encounter_class))
            # A death or a visit of unknown time would tell the future.
            elif vocabulary.token_type(event.code) and kind not in ("death", "visit_start", "visit_end"):
                token = vocabulary.row_id(event.code, event.value, event.text, event.unit)[0]
                self._static.append((position, token))
        timed.sort(key=_TIME_AND_RANK)
        self._timed = timed
        self._read_before: tuple[int, _Walk] | None = None

    def rows(self, removed: Collection[int] = ()) -> HistoryRows:
        """The rows of these events without some of them (positions).

        What lies before the first of those is read once, if the call before began there or later.
        """
        timed, start, walk = self._timed, 0, _Walk()
        if removed:
            start = next((place for place, row in enumerate(timed) if row[2] in removed), len(timed))
            if self._read_before is None or self._read_before[0] > start:
                walk.go_on(timed[:start], self.vocabulary)
                self._read_before = start, walk
            since, walk = self._read_before
            walk = walk.copy()
            timed = [row for row in timed[since:] if row[2] not in removed]
        walk.go_on(timed, self.vocabulary)
        static = [(position, token) for position, token in self._static if position not in removed]
        kept = (row for row in self._timed if row[2] not in removed)
        births = (row[0] for row in self._timed if row[4] == "birth" and row[2] not in removed)
        return HistoryRows(
            subject_ids=np.zeros(1, np.int64),
            first=np.asarray([next((row[0] for row in kept if row[4] != "birth"), 0)], np.int64),
            birth=np.asarray([next(births, NO_TIME)], np.int64),
            static_offsets=np.asarray([0, len(static)], np.int64),
            static_ids=np.asarray([token for _, token in static], np.int32),
            row_offsets=np.asarray([0, len(walk.times)], np.int64),
            time=np.asarray(walk.times, np.int64),
            ids=np.asarray(walk.ids, np.int32),
            types=np.asarray(walk.types, np.int8),
            opens=np.asarray(walk.opens, bool),
            is_open=np.asarray(walk.is_open, bool),
            static_sources=np.asarray([position for position, _ in static], np.int64),
            sources=np.asarray(walk.sources, np.int64),
            open_until=walk.open_until,
        )


class _Walk:
    """Which of a patient's events take part, as far as they have been read, and where visits open.

    Attributes:
        times, ids, types, sources, opens, is_open: Of each row, as in `HistoryRows`.
    """

    def __init__(self) -> None:
        self.times: list[int] = []
        self.ids: list[int] = []
        self.types: list[int] = []
        self.sources: list[int] = []
        self.opens: list[bool] = []
        self.is_open: list[bool] = []
        self._visits = _Visits()

    def copy(self) -> _Walk:
        """A walk that goes on by itself."""
        other = _Walk()
        for name in ("times", "ids", "types", "sources", "opens", "is_open"):
            setattr(other, name, getattr(self, name).copy())
        other._visits = self._visits.copy()
        return other

    @property
    def open_until(self) -> int | None:
        """See `HistoryRows`."""
        return self._visits.open_until

    def go_on(self, timed: Sequence[tuple[int, int, int, Event, str, str | None]], vocabulary: EventVocabulary) -> None:
        """Read further events, in order."""
        visits = self._visits
        times, ids, types, sources = self.times, self.ids, self.types, self.sources
        opens, is_open = self.opens, self.is_open
        for time, _, position, event, kind, encounter_class in timed:
            token_type = vocabulary.token_type(event.code)
            if kind == "visit_start":
                starts_visit = visits.start(event.visit_id, encounter_class, time)
            elif kind == "visit_end":
                if not visits.end(event.visit_id, encounter_class, time):
                    continue  # an end without a start: `encounters` counts it
                starts_visit = False
            elif token_type:
                starts_visit = visits.content(event.visit_id, time)
            else:
                continue  # it takes no part: the birth, what is ignored, kinds that do not enter
            visits.last_time = time
            times.append(time)
            ids.append(vocabulary.row_id(event.code, event.value, event.text, event.unit)[0] if token_type else 0)
            types.append(token_type)
            sources.append(position)
            opens.append(starts_visit)
            is_open.append(bool(visits.encounters))


class _Visits:
    """The encounters of a patient that are open, row after row; says which rows open a visit.

    Attributes:
        encounters: (visit_id, class) of those that are open, the latest last.
        last_time: Time of the latest row of the previous or current visit, None before the first.
    """

    def __init__(self) -> None:
        self.encounters: list[tuple[str | None, str]] = []
        self.last_time: int | None = None
        self._patience: dict[str | None, int] = {}  # visit_id of open encounters -> silence after which they lapse
        self._until: dict[str | None, int] = {}  # ... -> time until which they last without another row
        self._ended: set[str] = set()  # visit_ids whose encounters have ended
        self._implicit: tuple[str, Any] | None = None  # key of the previous visit, where that is implicit
        self._admission = False  # whether the previous visit holds an inpatient encounter

    def copy(self) -> _Visits:
        """The same, which changes by itself."""
        other = _Visits()
        other.encounters, other.last_time = self.encounters.copy(), self.last_time
        other._patience, other._until, other._ended = self._patience.copy(), self._until.copy(), self._ended.copy()
        other._implicit, other._admission = self._implicit, self._admission
        return other

    @property
    def open_until(self) -> int | None:
        """Instant after which any row of another visit would find no encounter open; None where none is."""
        return max(self._until.values(), default=None)

    def start(self, visit_id: str | None, encounter_class: str | None, time: int) -> bool:
        """An encounter starts; whether it opens a visit."""
        self._lapse(visit_id, time)
        inpatient = encounter_class in INPATIENT_CLASSES
        opens = False
        if not self.encounters:
            same_day = self.last_time is not None and self.last_time // DAY_US == time // DAY_US
            transfer = self._implicit is None and self._admission and inpatient and same_day
            continues = visit_id is not None and self._implicit == ("visit", visit_id)
            opens = not (transfer or continues)
            self._admission = inpatient or transfer
            self._implicit = None
        self._admission = self._admission or inpatient
        self.encounters.append((visit_id, encounter_class or ""))
        patience = max(self._patience.get(visit_id, 0), silence_us(encounter_class))
        self._patience[visit_id], self._until[visit_id] = patience, time + patience
        return opens

    def end(self, visit_id: str | None, encounter_class: str | None, time: int) -> bool:
        """An encounter ends; False where none of this visit_id is open."""
        same_visit = [k for k, (other, _) in enumerate(self.encounters) if other == visit_id]
        if not same_visit:
            return False
        same_class = [k for k in same_visit if self.encounters[k][1] == encounter_class]
        self.encounters.pop((same_class or same_visit)[-1])
        self._until[visit_id] = time + self._patience[visit_id]
        if len(same_visit) == 1:
            self._forget(visit_id)
        return True

    def content(self, visit_id: str | None, time: int) -> bool:
        """A row of any other kind; whether it opens a visit."""
        self._lapse(visit_id, time)
        if visit_id in self._until:
            self._until[visit_id] = time + self._patience[visit_id]
        if self.encounters:
            return False
        late = visit_id is None or visit_id in self._ended
        key = ("day", time // DAY_US) if late else ("visit", visit_id)
        opens = key != self._implicit
        self._implicit, self._admission = key, False
        return opens

    def _lapse(self, row_visit_id: str | None, time: int) -> None:
        """Forget the encounters that have been silent for too long when a row of another visit_id arrives."""
        for visit_id in [lasting for lasting, until in self._until.items() if time > until]:
            if visit_id is not None and visit_id == row_visit_id:
                continue
            self.encounters = [encounter for encounter in self.encounters if encounter[0] != visit_id]
            self._forget(visit_id)
            self._admission = self._admission and bool(self.encounters)  # nothing that lapsed is transferred from

    def _forget(self, visit_id: str | None) -> None:
        del self._until[visit_id], self._patience[visit_id]
        if visit_id is not None:
            self._ended.add(visit_id)

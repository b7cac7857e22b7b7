"""One patient -> one sequence, as a plain state machine: the readable twin of the columnar `ehr_histories.py`.

    [CLS] static* ([VS] events [VE] [REG] interval)* ... [VE] [REG]

1. Read the patient's events, in the order of time; cut at the prediction time, by each row's own time.
2. Walk over them: open visits, close them, give every token its time, age, visit order and segment.
3. Truncate to the context length (the most recent tokens stay), then put the task token in front and at the end.

Needs nothing but numpy, so that a checkpoint can score a patient wherever transformers runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import MAXYEAR, MINYEAR, UTC, date, datetime
from typing import Any

import numpy as np

from .ehr_codes import INPATIENT_CLASSES
from .ehr_visits import KIND_RANKS, RANK_OTHER, RANK_STATIC, silence_us
from .ehr_vocabulary import (
    CLS,
    DAY_US,
    REG,
    SECOND_US,
    TYPE_CLS,
    TYPE_INTERVAL,
    TYPE_REG,
    TYPE_STATIC,
    TYPE_VE,
    TYPE_VS,
    VE,
    VS,
    WEEK_US,
    YEAR_US,
    EventVocabulary,
    interval_token,
)

MIN_CONTEXT = 8
"""Shortest context that holds a prompt, a visit's marks and an event with its interval."""
MAX_STATIC_SHARE = 4
"""Static tokens stay in a truncated sequence while [CLS] and they take at most a quarter of the context."""

EPOCH = datetime(1970, 1, 1)
PATIENT_KEYS = {"subject_id", "events", "prediction_time"}
EVENT_KEYS = frozenset({"subject_id", "time", "code", "numeric_value", "text_value", "visit_id", "unit"})
CHANNELS = ["input_ids", "attention_mask", "token_type_ids", "times", "ages", "visit_orders", "visit_segments"]
CHANNEL_DTYPES = {
    "input_ids": np.int64,
    "attention_mask": np.int64,
    "token_type_ids": np.int64,
    "times": np.float32,
    "ages": np.float32,
    "visit_orders": np.int64,
    "visit_segments": np.int64,
}


def check_context(max_length: int) -> int:
    """The context length, where it is one.

    Raises:
        ValueError: It holds not even the special tokens and an event.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, (int, np.integer)) or max_length < MIN_CONTEXT:
        raise ValueError(
            f"max_length got {max_length!r}; a context holds the special tokens and an event from {MIN_CONTEXT} "
            "tokens on."
        )
    return int(max_length)


@dataclass(slots=True)
class Event:
    """One row of the event table; `time` in microseconds since 1970 (UTC), None = static."""

    time: int | None
    code: str
    value: float | None = None
    text: str | None = None
    visit_id: str | None = None
    unit: str | None = None


@dataclass(slots=True, frozen=True)
class Token:
    """One token before it becomes numbers; `order` counts visits from 1 and is not clamped yet."""

    id: int
    type: int
    time: float = 0.0
    age: float = 0.0
    order: int = 0
    segment: int = 0


@dataclass(slots=True)
class Walk:
    """What the state machine leaves behind.

    Attributes:
        static: Ids of static tokens, in source order.
        body: Tokens of all visits, without the closing marks of the last one.
        closing: [VE] and [REG] of the last visit where it is closed, else nothing.
        clock: (time, age) of an instant, by this patient's first event and birth.
    """

    static: list[int]
    body: list[Token]
    closing: list[Token]
    clock: Clock


@dataclass(slots=True, frozen=True)
class Clock:
    """Turns instants (microseconds) into the channels' units."""

    first: int | None
    birth: int | None

    def time(self, instant: int) -> float:
        """Weeks since the first timed event after birth."""
        return 0.0 if self.first is None else (instant - self.first) / WEEK_US

    def age(self, instant: int) -> float:
        """Age in years, 0 where the birth is unknown or later."""
        return 0.0 if self.birth is None else max(0.0, (instant - self.birth) / YEAR_US)


# -- 1. reading ------------------------------------------------------------------------------------------------------


def parse_time(value: Any, what: str = "time") -> int | None:
    """Microseconds since 1970 (UTC) of a datetime, date, numpy datetime or ISO 8601 string; None for null.

    Raises:
        ValueError: Anything else.
    """
    if value is None:
        return None
    if isinstance(value, np.datetime64):
        if np.isnat(value):
            return None
        if not MINYEAR <= int(value.astype("datetime64[Y]").astype(np.int64)) + 1970 <= MAXYEAR:
            raise ValueError(f"{what} got {value}, outside the years 1 to 9999; correct it, or give None (static).")
        return int(value.astype("datetime64[us]").astype(np.int64))
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
        return span.days * DAY_US + span.seconds * SECOND_US + span.microseconds
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


def patient_of_table(given: Any) -> Any:
    """A table of one subject (polars, pandas, pyarrow) as a patient dict; anything else as it is.

    Raises:
        ValueError: The table holds several subjects.
    """
    if hasattr(given, "to_pylist"):
        rows: list[dict[str, Any]] = given.to_pylist()
    elif hasattr(given, "to_dicts"):
        rows = given.to_dicts()
    elif hasattr(given, "to_dict") and hasattr(given, "columns"):
        # pandas writes nulls as NaN and NaT
        rows = [
            {key: None if value != value else value for key, value in row.items()} for row in given.to_dict("records")
        ]
    else:
        return given
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
        if not isinstance(row, Mapping):
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
        events.append(
            Event(
                parse_time(row["time"], f"event {k}: time"),
                code,
                _number(row.get("numeric_value"), k),
                _text(row.get("text_value"), k, "text_value"),
                _text(row.get("visit_id"), k, "visit_id"),
                _text(row.get("unit"), k, "unit"),
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


def _number(value: Any, k: int) -> float | None:
    if value is None:
        return None
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


def _text(value: Any, k: int, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if name == "visit_id" and isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"event {k}: {name} got {value!r} ({type(value).__name__}); expected a string or None.")


# -- 2. the state machine --------------------------------------------------------------------------------------------


def walk(events: Sequence[Event], vocabulary: EventVocabulary, cut: int | None = None) -> Walk:
    """Segment a patient's events into visits and make their tokens.

    Args:
        events: Any order; sorted here by time, source order kept inside an instant except for starts, ends, birth and
            death.
        vocabulary: Codes to ids.
        cut: Rows later than this instant (microseconds) are left out, before anything else looks at them.
    """
    ids = vocabulary.token_ids
    known = [e for e in events if e.time is None or cut is None or e.time <= cut]
    kinds = [vocabulary.kind(e.code) for e in known]
    birth = min(
        (e.time for e, (kind, _) in zip(known, kinds, strict=True) if kind == "birth" and e.time is not None),
        default=None,
    )
    first = min(
        (e.time for e, (kind, _) in zip(known, kinds, strict=True) if kind != "birth" and e.time is not None),
        default=None,
    )
    clock = Clock(first, birth)
    rows = sorted(
        ((e, kind, cls) for e, (kind, cls) in zip(known, kinds, strict=True)),
        key=lambda row: (
            row[0].time is not None,
            row[0].time or 0,
            RANK_STATIC if row[0].time is None else KIND_RANKS.get(row[1], RANK_OTHER),
        ),
    )
    static: list[int] = []
    body: list[Token] = []
    order = segment = 0
    open_encounters: list[tuple[str | None, str]] = []  # (visit_id, class), latest last
    latest: dict[str | None, int] = {}  # visit_id of open encounters -> time of its latest row
    patience: dict[str | None, int] = {}  # ... -> silence after which they lapse
    ended: set[str] = set()  # visit_ids whose encounters have ended
    implicit_key: tuple[str, Any] | None = None  # of the previous visit, where that is implicit
    admission = False  # whether the previous visit holds an inpatient encounter
    last_time = 0  # of the latest row of the previous or current visit

    def token(name: str, token_type: int, time: int, in_visit: bool = True) -> Token:
        if not in_visit:
            return Token(ids[name], token_type, order=order)
        return Token(ids[name], token_type, clock.time(time), clock.age(time), order, segment)

    def open_visit(time: int) -> None:
        nonlocal order, segment
        if order:
            body.append(token(VE, TYPE_VE, last_time))
            body.append(token(REG, TYPE_REG, last_time))
            interval = interval_token((time - last_time) // DAY_US)
            body.append(token(interval, TYPE_INTERVAL, time, in_visit=False))
        order, segment = order + 1, 1 if segment == 2 or order == 0 else 2
        body.append(token(VS, TYPE_VS, time))

    def lapse(event: Event, time: int) -> None:
        """Forget the encounters that have been silent for too long when a row of somebody else arrives."""
        nonlocal admission
        for visit_id in [v for v, since in latest.items() if time - since > patience[v]]:
            if visit_id is not None and visit_id == event.visit_id:
                continue
            open_encounters[:] = [encounter for encounter in open_encounters if encounter[0] != visit_id]
            forget(visit_id)
            admission = admission and bool(open_encounters)  # nothing that lapsed is transferred from

    def forget(visit_id: str | None) -> None:
        del latest[visit_id], patience[visit_id]
        if visit_id is not None:
            ended.add(visit_id)

    def event_token(event: Event, token_type: int, time: int) -> Token:
        token_id, _ = vocabulary.row_id(event.code, event.value, event.text, event.unit)
        return Token(token_id, token_type, clock.time(time), clock.age(time), order, segment)

    for event, kind, encounter_class in rows:
        time, token_type = event.time, vocabulary.token_type(event.code)
        if time is None:
            # A death or a visit of unknown time would tell the future.
            if token_type and kind not in ("death", "visit_start", "visit_end"):
                static.append(vocabulary.row_id(event.code, event.value, event.text, event.unit)[0])
            continue
        if kind == "visit_start":
            lapse(event, time)
            inpatient = encounter_class in INPATIENT_CLASSES
            if not open_encounters:
                same_day = order > 0 and last_time // DAY_US == time // DAY_US
                transfer = implicit_key is None and admission and inpatient and same_day
                continues = event.visit_id is not None and implicit_key == ("visit", event.visit_id)
                if not (transfer or continues):
                    open_visit(time)
                admission = inpatient or transfer
                implicit_key = None
            admission = admission or inpatient
            open_encounters.append((event.visit_id, encounter_class or ""))
            latest[event.visit_id] = time
            patience[event.visit_id] = max(patience.get(event.visit_id, 0), silence_us(encounter_class))
        elif kind == "visit_end":
            mine = [k for k, (visit_id, _) in enumerate(open_encounters) if visit_id == event.visit_id]
            if not mine:
                continue  # an end without a start: `encounters` counts it
            same_class = [k for k in mine if open_encounters[k][1] == encounter_class]
            open_encounters.pop((same_class or mine)[-1])
            latest[event.visit_id] = time
            if len(mine) == 1:
                forget(event.visit_id)
        elif not token_type:
            continue  # it takes no part: the birth, what is ignored, kinds that do not enter
        else:
            lapse(event, time)
            if event.visit_id in latest:
                latest[event.visit_id] = time
            if not open_encounters:
                late = event.visit_id is None or event.visit_id in ended
                key = ("day", time // DAY_US) if late else ("visit", event.visit_id)
                if key != implicit_key:
                    open_visit(time)
                implicit_key, admission = key, False
        if token_type:
            body.append(event_token(event, token_type, time))
        last_time = time
    closing: list[Token] = []
    if order and not open_encounters:
        closing = [token(VE, TYPE_VE, last_time), token(REG, TYPE_REG, last_time)]
    return Walk(static, body, closing, clock)


# -- 3. truncation and prompt ----------------------------------------------------------------------------------------


def build_row(
    walked: Walk,
    vocabulary: EventVocabulary,
    *,
    max_length: int | None,
    max_num_visits: int,
    task_token: str | None = None,
    prediction_time: int | None = None,
) -> dict[str, np.ndarray]:
    """The channels of one sequence.

    Args:
        walked: What `walk` made of the patient.
        vocabulary: Ids of the special tokens.
        max_length: Context length, None = all tokens. The most recent tokens stay; [CLS], the static tokens (while
            they take at most a quarter) and, inside a visit, [VS] are put back; orders start again at 1.
        max_num_visits: Orders are clamped to `max_num_visits - 1`.
        task_token: Token of the task. It replaces [CLS] and, at the end, the [REG] of a closed visit; in an open
            visit it is appended.
        prediction_time: Time of the task token at the end (microseconds); default: the latest event's.
    """
    ids = vocabulary.token_ids
    body, tail = walked.body, list(walked.closing)
    if task_token is not None:
        latest = body[-1] if body else Token(0, 0)
        if tail:
            latest = tail[-1]
        time, age = latest.time, latest.age
        if prediction_time is not None:
            # where nothing timed is known yet, there is no clock to tell the time by
            time = walked.clock.time(prediction_time) if latest.order else 0.0
            age = walked.clock.age(prediction_time)
        end = Token(ids[task_token], TYPE_REG, time, age, latest.order, latest.segment)
        tail = [*tail[:1], end]
    head = [Token(ids[task_token or CLS], TYPE_CLS), *(Token(i, TYPE_STATIC) for i in walked.static)]
    if max_length is not None and len(head) + len(body) + len(tail) > max_length:
        if len(head) * MAX_STATIC_SHARE > max_length:
            head = head[:1]
        body = truncate(body, max_length - len(head) - len(tail))
        shift = (body[0] if body else tail[0]).order - 1
        body, tail = ([_shifted(t, shift) for t in part] for part in (body, tail))
    return to_channels([*head, *body, *tail], max_num_visits)


def truncate(body: list[Token], budget: int) -> list[Token]:
    """The most recent tokens within the budget, beginning with [VS]: the marks between two visits do not lead.

    A visit that was cut gets its [VS] back, with the time and age of the visit's real start.
    """
    start = max(0, len(body) - budget)
    if start == 0:
        return body
    while start < len(body):
        while start < len(body) and body[start].type in (TYPE_VE, TYPE_REG, TYPE_INTERVAL):
            start += 1
        if start == len(body) or body[start].type == TYPE_VS:
            break
        if len(body) - start < budget:  # room for the [VS] of the visit that was cut
            return [next(t for t in reversed(body[:start]) if t.type == TYPE_VS), *body[start:]]
        start += 1
    return body[start:]


def _shifted(token: Token, shift: int) -> Token:
    if token.order == 0:
        return token
    order = token.order - shift
    return replace(token, order=order, segment=0 if token.segment == 0 else 1 + (order - 1) % 2)


def to_channels(tokens: Sequence[Token], max_num_visits: int) -> dict[str, np.ndarray]:
    """Channels of a list of tokens, each of shape [length]."""
    columns = {
        "input_ids": [t.id for t in tokens],
        "attention_mask": [1] * len(tokens),
        "token_type_ids": [t.type for t in tokens],
        "times": [t.time for t in tokens],
        "ages": [t.age for t in tokens],
        "visit_orders": [min(t.order, max_num_visits - 1) for t in tokens],
        "visit_segments": [t.segment for t in tokens],
    }
    return {name: np.asarray(values, dtype=CHANNEL_DTYPES[name]) for name, values in columns.items()}

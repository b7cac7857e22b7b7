"""One patient's sequence, the long way: token by token, so that the rules of visits and of truncation can be read.

    [CLS] static* ([VS] events [VE] [REG] interval)* ... [VE] [REG]

1. Walk over the events: open visits, close them, give every token its time, age, visit order and segment.
2. Truncate to the context length (the most recent tokens stay), then put the task token in front and at the end.

The independent truth for `EhrTokenizer`: what the package's two readers and its one layout make must equal this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ehrseq.tokenization.ehr_codes import (
    DAY_US,
    INPATIENT_CLASSES,
    KIND_RANKS,
    RANK_OTHER,
    RANK_STATIC,
    WEEK_US,
    YEAR_US,
)
from ehrseq.tokenization.ehr_plans import CHANNEL_DTYPES, MAX_STATIC_SHARE
from ehrseq.tokenization.ehr_sequence import Event, parse_time, read_patient
from ehrseq.tokenization.ehr_visits import silence_us
from ehrseq.tokenization.ehr_vocabulary import (
    CLS,
    REG,
    TYPE_CLS,
    TYPE_INTERVAL,
    TYPE_REG,
    TYPE_STATIC,
    TYPE_VE,
    TYPE_VS,
    VE,
    VS,
    EventVocabulary,
    interval_token,
)
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer


def naive_row(
    tokenizer: EhrTokenizer,
    events: list[dict[str, Any]],
    task: str | None = None,
    prediction_time: Any = None,
    max_length: int | None = None,
) -> dict[str, np.ndarray]:
    """What `tokenizer.encode_patient` must make of a patient's events."""
    cut = parse_time(prediction_time)
    return build_row(
        walk(read_patient({"events": events})[0], tokenizer.vocabulary, cut),
        tokenizer.vocabulary,
        max_length=max_length,
        max_num_visits=tokenizer.max_num_visits,
        task_token=None if task is None else tokenizer.task_tokens[task],
        prediction_time=cut,
    )


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
        shift = (body or tail or [Token(0, 0, order=1)])[0].order - 1
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

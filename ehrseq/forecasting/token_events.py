"""From drawn tokens back to events: the inverse of the tokenizer, with what a record needs beside its tokens.

A token says a code and perhaps a value's bin or a text; the rows of a record also say where its visits end, which the
tokenizer writes as [VE] alone for most of them. So encounters are kept in mind: one ends with its own token where it
has one, an emergency one when the admission begins, and all others with the visit.

What no record can say (an event outside every visit, [UNK], a static fact in the middle) is left out and counted.
Read again by the same tokenizer the rows give the drawn tokens, but for what the notes count, and but for the order
inside one instant.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ehrseq.forecasting.cohort_shape import ValueLaw
from ehrseq.modeling.ehr_intervals import INTERVAL_SPANS
from ehrseq.tokenization.ehr_codes import DAY_US, EXPIRED, INPATIENT_CLASSES, SECOND_US
from ehrseq.tokenization.ehr_vocabulary import (
    REG,
    SPECIAL_TOKENS,
    VE,
    VS,
    EventVocabulary,
    bin_token,
)


class DrawnEvent(NamedTuple):
    """One row of the event table; `time` in microseconds, None = static."""

    subject_id: int
    time: int | None
    code: str
    numeric_value: float | None = None
    text_value: str | None = None
    visit_id: str | None = None
    unit: str | None = None


@dataclass(frozen=True)
class Meaning:
    """What a token says.

    Attributes:
        code: Its code, for special tokens the token.
        kind: Kind of the code; "special" for special and task tokens, "interval" for those between visits.
        encounter_class: Of a visit's start or end.
        unit: Of a value.
        low, high: Edges of the value's bin, the lower one excluded, infinite at the ends; NaN without a value.
        text: A text result.
    """

    code: str
    kind: str
    encounter_class: str | None = None
    unit: str | None = None
    low: float = np.nan
    high: float = np.nan
    text: str | None = None

    @property
    def has_value(self) -> bool:
        """Whether the token is a value's bin."""
        return self.high == self.high


def meanings_of_tokens(vocabulary: EventVocabulary, texts: Iterable[tuple[str, str]]) -> list[Meaning]:
    """What each id of a vocabulary says.

    Args:
        vocabulary: Of a tokenizer.
        texts: (code, text) of the text results that there are: a token's name alone does not tell them from codes.
    """
    meanings: dict[str, Meaning] = {}
    for code, units in vocabulary.value_bins.items():
        kind = vocabulary.kind(code)[0]
        for unit, edges in units.items():
            bounds = [-np.inf, *edges, np.inf]
            for number in range(len(edges) + 1):
                name = bin_token(code, unit, number)
                meanings[name] = Meaning(
                    code, kind, unit=unit or None, low=float(bounds[number]), high=float(bounds[number + 1])
                )
    for code, text in texts:
        meanings.setdefault(f"{code}//{text}", Meaning(code, vocabulary.kind(code)[0], text=text))
    intervals = set(vocabulary.interval_ids.tolist())
    result = [Meaning("", "special")] * (max(vocabulary.token_ids.values()) + 1)
    for token, number in vocabulary.token_ids.items():
        if token in vocabulary.reserved or token in SPECIAL_TOKENS:
            result[number] = Meaning(token, "interval" if number in intervals else "special")
        else:
            result[number] = meanings.get(token) or Meaning(token, *vocabulary.kind(token))
    return result


@dataclass
class _Encounter:
    visit_id: str
    encounter_class: str


@dataclass
class RecordWriter:
    """Writes the events of one patient, token by token.

    Args:
        subject_id: Of the patient.
        start: First instant of the record (microseconds), to which the tokens' days count.
        meanings: Of `meanings_of_tokens`.
        laws: Laws of values.
        random: Draws values inside their bins.

    Attributes:
        events: The rows so far, in the order of their tokens.
        notes: What was left out or mended.
    """

    subject_id: int
    start: int
    meanings: Sequence[Meaning]
    laws: Mapping[tuple[str, str], ValueLaw]
    random: np.random.Generator
    events: list[DrawnEvent] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._now = self.start
        self._open: list[_Encounter] = []
        self._late_ends: list[tuple[str, str]] = []  # code, visit_id: ends whose visit went on
        self._visit = ""  # visit_id of the visit's first encounter; "" outside of visits
        self._encounters = 0
        self._rows_of_visit = 0
        self._first_row = 0  # where the visit's rows begin
        self._has_encounter = False
        self._day_before: int | None = None  # of the visit before, where that was no encounter
        self._closed_at: int | None = None
        self._wait: tuple[float, float] | None = None  # days that the last interval token says

    def static(self, codes: Iterable[str], birth: int | None) -> None:
        """Static rows and the birth."""
        self.events += [DrawnEvent(self.subject_id, None, code) for code in codes]
        if birth is not None:
            self.events.append(DrawnEvent(self.subject_id, birth, "MEDS_BIRTH"))

    def open_visit(self) -> None:
        """[VS]."""
        if self._visit:
            if not self._rows_of_visit:
                self.notes["[VS] in an empty visit: left out"] += 1
                return
            self.notes["[VS] in an open visit: closed before it"] += 1
            self._close_visit()
        if self._wait is not None and self._closed_at is not None:
            low, high = self._wait
            latest = np.inf if np.isinf(high) else self._closed_at + int(high) * DAY_US - SECOND_US
            self._now = int(min(max(self._now, self._closed_at + int(low) * DAY_US), latest))
        elif self._closed_at is not None:
            self.notes["visits without an interval token before them"] += 1
        self._wait = None
        self._encounters += 1
        self._visit = f"{self.subject_id}-{self._encounters}"
        self._rows_of_visit, self._first_row, self._has_encounter = 0, len(self.events), False

    def write(self, tokens: np.ndarray, days: np.ndarray) -> None:
        """The rows of drawn tokens.

        Args:
            tokens: int64 [t].
            days: Since the start, float64 [t]; NaN for interval tokens.
        """
        for place, (token, day) in enumerate(zip(tokens.tolist(), days.tolist(), strict=True)):
            meaning = self.meanings[token]
            if day == day:
                self._now = max(self._now, self.start + round(day * DAY_US / SECOND_US) * SECOND_US)
            if meaning.kind == "interval":
                self._wait = INTERVAL_SPANS[meaning.code]
            elif meaning.kind == "special":
                self._special(meaning.code)
            elif meaning.kind == "death":
                self._die(meaning.code)
                self._count_rest(len(tokens) - place - 1)
                return
            elif meaning.kind in ("static", "birth", "ignore"):
                self.notes["static facts inside a record: left out"] += 1
            elif not self._visit:
                self.notes["events outside of every visit: left out"] += 1
            elif meaning.kind == "visit_start":
                self._start(meaning)
            elif meaning.kind == "visit_end":
                if self._end(meaning, tokens[place + 1 :], days[place + 1 :]):
                    return
            else:
                self._content(meaning)

    def finish(self) -> list[DrawnEvent]:
        """All rows; an encounter that is open stays so, and a row says it, as sources do of one in progress."""
        if self._visit and not self._has_encounter:
            self._close_visit()
        for code, visit_id in self._late_ends:
            self._row(code, visit_id)
        self._late_ends.clear()
        for encounter in self._open:
            self.events.append(DrawnEvent(self.subject_id, None, "VISIT_END//in-progress", visit_id=encounter.visit_id))
            self.notes["encounters that go on when the record ends"] += 1
        return self.events

    # -- tokens --------------------------------------------------------------------------------------------------------
    def _special(self, token: str) -> None:
        if token == VS:
            self.open_visit()
        elif token == VE:
            if self._visit and self._rows_of_visit:
                self._close_visit()
            else:
                self.notes["[VE] of nothing: left out"] += 1
        elif token != REG:
            self.notes[f"{token}: left out"] += 1

    def _start(self, meaning: Meaning) -> None:
        encounter_class = meaning.encounter_class or ""
        if self._open or self._late_ends:
            self._encounters += 1
            visit_id = f"{self.subject_id}-{self._encounters}"
        else:
            visit_id = self._visit
        before = list(self._open)
        self._has_encounter = True
        self._open.append(_Encounter(visit_id, encounter_class))
        self._row(meaning.code, visit_id)
        if encounter_class in INPATIENT_CLASSES:  # who is admitted has left the emergency room
            for encounter in before:
                if encounter.encounter_class not in (*INPATIENT_CLASSES, "ICU"):
                    self._end_encounter(encounter)

    def _end(self, meaning: Meaning, later: np.ndarray, days: np.ndarray) -> bool:
        """A token that ends an encounter; whether the patient has died with it."""
        own = [encounter for encounter in self._open if encounter.encounter_class == meaning.encounter_class]
        inpatient = [encounter for encounter in self._open if encounter.encounter_class in INPATIENT_CLASSES]
        which = (own or inpatient or self._open)[-1:]
        if not which:
            self.notes["ends of no encounter: left out"] += 1
            return False
        encounter = which[0]
        others = [each for each in self._open if each is not encounter]
        kinds = [self.meanings[token] for token in later.tolist()]
        following = kinds[0] if kinds else Meaning(VE, "special")
        if re.search(EXPIRED, meaning.code):
            then = next((each.kind for each in kinds if each.kind not in ("special", "interval")), "nothing")
            if kinds and then != "death":
                self.notes["tokens after a discharge of the dead: left out, a death was written"] += len(kinds)
            self._end_encounter(encounter, meaning.code)
            self._die("MEDS_DEATH")
            return True
        transfer = (
            following.kind == "visit_start"
            and following.encounter_class in INPATIENT_CLASSES
            and encounter.encounter_class in INPATIENT_CLASSES
            and (self.start + days[0] * DAY_US) // DAY_US == self._now // DAY_US
        )
        if others or transfer or following.code in (VE, VS) or following.kind == "death":
            self._end_encounter(encounter, meaning.code)
        else:  # the row would close the visit before what comes next
            self.notes["ends of encounters in the middle of their visit: written at its end"] += 1
            self._open.remove(encounter)
            self._late_ends.append((meaning.code, encounter.visit_id))
        return False

    def _content(self, meaning: Meaning) -> None:
        inpatient = [encounter for encounter in self._open if encounter.encounter_class in INPATIENT_CLASSES]
        waiting = [visit_id for _, visit_id in self._late_ends]
        visit_id = (inpatient or self._open)[-1].visit_id if self._open else (waiting or [self._visit])[-1]
        value = self._value(meaning) if meaning.has_value else None
        self._row(meaning.code, visit_id, value, meaning.text, meaning.unit)

    def _die(self, code: str) -> None:
        if self._open:
            self.notes["encounters that a death ended"] += 1
        if self._visit:
            self._close_visit()
        self.events.append(DrawnEvent(self.subject_id, self._now, code))

    def _close_visit(self) -> None:
        for code, visit_id in self._late_ends:
            self._row(code, visit_id)
        self._late_ends.clear()
        for encounter in reversed(list(self._open)):
            self._end_encounter(encounter)
        if self._has_encounter:
            self._day_before = None
        elif self._rows_of_visit:
            self._without_encounter()
        self._visit, self._closed_at = "", self._now

    def _without_encounter(self) -> None:
        """Facts of no encounter (a late result) have no visit_id; readers see a visit in those of a day."""
        rows = self.events[self._first_row :]
        self.events[self._first_row :] = [row._replace(visit_id=None) for row in rows]
        days = sorted({row.time // DAY_US for row in rows if row.time is not None})
        if len(days) > 1:
            self.notes["visits without an encounter over several days: read as one a day"] += 1
        if days[0] == self._day_before:
            self.notes["visits without an encounter on the day of another: read as one"] += 1
        self._day_before = days[-1]

    def _end_encounter(self, encounter: _Encounter, code: str | None = None) -> None:
        self._open.remove(encounter)
        self._row(code or f"VISIT_END//{encounter.encounter_class}", encounter.visit_id)

    def _row(
        self, code: str, visit_id: str, value: float | None = None, text: str | None = None, unit: str | None = None
    ) -> None:
        self._rows_of_visit += 1
        self.events.append(DrawnEvent(self.subject_id, self._now, code, value, text, visit_id, unit))

    def _count_rest(self, number: int) -> None:
        if number:
            self.notes["tokens after a death: left out"] += number

    # -- values --------------------------------------------------------------------------------------------------------
    def _value(self, meaning: Meaning) -> float:
        """A value of the token's bin: by the law of its code inside it, else evenly."""
        law = self.laws.get((meaning.code, meaning.unit or ""))
        if law is None:
            self.notes["values of codes too rare in the dataset: drawn evenly within their bin"] += 1
        return value_within(meaning.low, meaning.high, law, float(self.random.random()))


def value_within(low: float, high: float, law: ValueLaw | None, uniform: float) -> float:
    """A value of the bin (low, high], single precision.

    Args:
        low, high: Its edges, perhaps infinite.
        law: Law of all values, which also bounds the outer bins; None: evenly, the outer bins as wide as the edges are
            far from 0.
        uniform: In [0, 1).
    """
    if law is not None:
        first = law.knots[0] if np.isinf(low) else low
        last = law.knots[-1] if np.isinf(high) else high
    else:
        first = last = 0.0
    if law is None or first >= last:
        inner = high if np.isinf(low) else low
        reach = 0.5 * abs(inner) if np.isfinite(inner) and inner else 1.0
        first = (0.0 if np.isinf(high) else high - reach) if np.isinf(low) else low
        last = first + reach if np.isinf(high) else high
    value = first + (last - first) * uniform
    if law is not None and len(law.knots) > 1:
        knots, shares = np.asarray(law.knots), np.linspace(0.0, 1.0, len(law.knots))
        below, above = np.interp([first, last], knots, shares)
        if above > below:
            value = float(np.interp(below + (above - below) * uniform, shares, knots))
    rounded = round(value, law.decimals) if law is not None else value
    for candidate in (rounded, value):
        single = float(np.float32(candidate))
        if np.float32(low) < single <= np.float32(high):
            return single
    return float(np.float32(high)) if np.isfinite(high) else float(np.nextafter(np.float32(low), np.float32(np.inf)))


__all__ = ["DrawnEvent", "Meaning", "RecordWriter", "meanings_of_tokens", "value_within"]

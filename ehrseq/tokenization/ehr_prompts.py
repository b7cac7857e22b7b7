"""Rows of one patient that know where they come from: which event made which token, and the steps between."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from .ehr_histories import EncodedHistories
from .ehr_plans import CHANNELS, RowPlan
from .ehr_prefixes import NO_EVENT, RowPrefixes
from .ehr_rows import HistoryRows, lay_out
from .ehr_sequence import Event, OrderedEvents, asked_at, count_later
from .ehr_vocabulary import UNK


@dataclass
class PatientPrompts:
    """Rows of one patient, one for each question; a `SourcedRows`.

    Attributes:
        events: The patient's events, in the order given.
        cut: Prediction time that was given (microseconds); None = the whole record.
        rows: The rows of `events` that take part.
        history: Their tokens.
        plan: How each question's row is cut from them.
    """

    events: list[Event]
    cut: int | None
    rows: HistoryRows
    history: EncodedHistories
    plan: RowPlan

    def __len__(self) -> int:
        return len(self.plan.history)

    @property
    def prediction_time(self) -> int | None:
        """See `SourcedRows`."""
        return asked_at(self.events, self.cut)

    @property
    def notes(self) -> Counter[str]:
        """See `SourcedRows`; of all rows, which are cut alike."""
        sources = {*self._sources.tolist(), *self._static_sources.tolist()}
        known = self.known(0)
        late = count_later(self.events, self.cut)
        unknown = self.history.vocabulary.token_ids[UNK]
        ids, event_of = self.row(0)["input_ids"], self.event_of(0)
        return +Counter(
            {
                "events after the prediction time, not read": late,
                "events that take no part": len(self.events) - late - len(sources),
                "events before the context, not seen": len(sources) - int(known.sum()),
                "events of unknown codes, read as [UNK]": int(((ids == unknown) & (event_of != NO_EVENT)).sum()),
            }
        )

    def row(self, number: int) -> dict[str, Any]:
        """See `SourcedRows`."""
        return self.history.row(self.plan, number)

    def event_of(self, number: int) -> np.ndarray:
        """See `SourcedRows`."""
        _, statics, _, start, end, vs_at, _, tail, *_ = self.plan.row(number)
        begin = 1 + statics + (vs_at >= 0)
        event_of = np.full(begin + end - start + tail, NO_EVENT, np.int64)
        event_of[1 : 1 + statics] = self._static_sources[:statics]
        event_of[begin : begin + end - start] = self._body_sources[start:end]
        return event_of

    def known(self, number: int) -> np.ndarray:
        """See `SourcedRows`."""
        _, statics, _, start, *_ = self.plan.row(number)
        known = np.zeros(len(self.events), bool)
        known[self._static_sources[:statics]] = True
        known[self._sources[self.history.row_end > start]] = True
        return known

    def prefixes(self, number: int) -> RowPrefixes:
        """The row after each event that is in it, from the record without timed events on.

        A prefix is the row of the same record that ends with an event, asked at that event's time (never after the
        question's own): the same first token, static tokens and first visit as the row itself. The baseline holds the
        static tokens alone and is asked at the first of these times, with the birth known. Where the question is asked
        later than the last event, one step more is time that passes.
        """
        history = self.history
        _, statics, first_id, start, _, vs_at, shift, _, last_id, last_time, _, _ = self.plan.row(number)
        begin = 1 + statics + (vs_at >= 0)
        rows = (history.row_end > start).nonzero()[0]
        if not len(rows):  # nothing but the question: it is its own baseline
            whole = {name: channel[1 + statics :] for name, channel in self.row(number).items()}
            nothing = np.full(1, -1)
            return RowPrefixes(
                ends=np.asarray([1 + statics]),
                tails={name: np.resize(whole[name], (1, 2)) for name in CHANNELS},
                tail_lengths=np.ones(1, np.int64),
                sources=nothing,
                tokens=nothing,
                times=np.asarray([last_time]),
                visits=np.zeros(1, np.int64),
            )
        row_end, time = history.row_end[rows], history.row_time[rows]
        is_token = self.rows.types[rows] > 0
        closed, order = ~history.row_open[rows], history.row_order[rows]
        passes = last_time > time[-1]
        steps = np.arange(len(rows))
        if passes:
            steps = np.append(steps, len(rows) - 1)
        asked = np.minimum(time[steps], last_time)
        if passes:
            asked[-1] = last_time
        tails, tail_lengths = self._tails(
            tail=np.concatenate([[1], 1 + closed[steps]]),
            last_time=np.concatenate([asked[:1], asked]),
            close_time=np.concatenate([time[:1], time[steps]]),
            order=np.concatenate([[0], order[steps]]),
            first_id=first_id,
            last_id=last_id,
            shift=shift,
        )
        sources = self._sources[rows][steps]
        tokens = np.where(is_token, begin + row_end - start - 1, -1)[steps]
        if passes:
            sources[-1], tokens[-1] = NO_EVENT, -1
        return RowPrefixes(
            ends=np.concatenate([[1 + statics], (begin + row_end - start)[steps]]),
            tails=tails,
            tail_lengths=tail_lengths,
            sources=np.concatenate([[NO_EVENT], sources]),
            tokens=np.concatenate([[-1], tokens]),
            times=np.concatenate([asked[:1], asked]),
            visits=np.concatenate([[0], (order - shift)[steps]]),
            passes=bool(passes),
        )

    def row_without(self, number: int, removed: np.ndarray, max_length: int | None = None) -> dict[str, Any] | None:
        """See `SourcedRows`.

        A visit of which nothing is left leaves no mark: the interval between its neighbours is that between them, and
        later visits move up by one. A visit whose start is taken out alone is made of the days of its other events; one
        whose end is taken out alone stays open until it lapses (`ehr_visits.py`). Events before the context are read,
        so that visits and the first time are what they were, and then cut away at the same event as in the row.
        """
        _, statics, first_id, start, _, _, _, _, last_id, last_time, _, _ = self.plan.row(number)
        rows = self._ordered.rows({*np.flatnonzero(removed & self.known(number)).tolist()})
        if not statics:  # there are none, or the context had no room for them
            rows.static_offsets, rows.static_ids = np.zeros(2, np.int64), rows.static_ids[:0]
        history = replace(self.history, **lay_out(rows, self.history.vocabulary))
        unseen = int((self.history.row_end <= start).sum())  # a prefix, which is read as before
        if unseen:
            start = int(history.row_end[unseen - 1])
            start = int(history.next_content[start]) if start < len(history.ids) else start
        row: dict[str, Any] = history.row(history.plan_cut(start, first_id, last_id, last_time, max_length), 0)
        return row

    def _tails(
        self, *, first_id: int, last_id: int, shift: int, **columns: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """What follows the body of each of some rows: channels [k, 2] and lengths [k]. Arguments as in `RowPlan`."""
        count = len(columns["tail"])
        nothing = np.zeros(count, np.int64)
        plan = RowPlan(  # of rows without a body, so that the one place that writes a tail writes these too
            history=nothing,
            statics=nothing,
            start=nothing,
            end=nothing,
            vs_at=nothing - 1,
            first_id=nothing + first_id,
            last_id=nothing + last_id,
            shift=nothing + shift,
            **columns,
        )
        rows = [self.history.row(plan, k) for k in range(count)]
        tails = {name: np.zeros((count, 2), rows[0][name].dtype) for name in CHANNELS}
        for name, channel in tails.items():
            for k, row in enumerate(rows):
                channel[k, : columns["tail"][k]] = row[name][1:]
        return tails, columns["tail"]

    @cached_property
    def _ordered(self) -> OrderedEvents:
        return OrderedEvents(self.events, self.history.vocabulary, self.cut)

    @property
    def _sources(self) -> np.ndarray:
        return _given(self.rows.sources)

    @property
    def _static_sources(self) -> np.ndarray:
        return _given(self.rows.static_sources)

    @cached_property
    def _body_sources(self) -> np.ndarray:
        """Event of each body token, [tokens]."""
        array = np.full(len(self.history.ids), NO_EVENT, np.int64)
        own = self.rows.types > 0
        array[self.history.row_end[own] - 1] = self._sources[own]
        return array


def _given(sources: np.ndarray | None) -> np.ndarray:
    if sources is None:
        raise ValueError("these rows do not know their events; read the patient by EhrTokenizer.sourced_rows.")
    return sources

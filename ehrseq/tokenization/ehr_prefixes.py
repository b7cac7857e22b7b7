"""The steps by which a row came to be: what a model would have read after each event of the record.

A record grows event by event, and a row of the model is the same for a while: the row after an event is the first
tokens of the whole row, and behind them the question (a visit's end, and the task's token). `RowPrefixes` says, for
each step, how many tokens that is and what follows them, so that a model can be asked at every step without a row of
its own for each (`prefix_logits` of the classifiers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .ehr_codes import DAY_US, HOUR_US
from .ehr_sequence import Event

NO_EVENT = -1
"""Stands for the event of a token that none made: a question, a visit's mark, an interval."""

STEPS = ("event", "visit", "day", "hour")
"""What may lie between two steps."""


@dataclass(frozen=True)
class RowPrefixes:
    """Prefixes of one row, from the shortest, which is the baseline, to the row itself. One entry a prefix, [k].

    Attributes:
        ends: First tokens of the row that a prefix keeps, ascending, at least one.
        tails: Channel -> [k, 2], what follows them; empty where nothing does (triplets).
        tail_lengths: How much of the two that is, 0 to 2.
        sources: Position among the patient's events of the one that a prefix ends with; `NO_EVENT` for the baseline and
            for time that passes after the last event.
        tokens: Place in the row of the token that this event made, -1 where it made none (a visit's boundary).
        times: Instant of that event (microseconds), of the question for time that passes.
        dated: Whether the instants are known (a stay of bare triplets has none).
        visits: Its visit in the row, from 1 on; 0 where there are no visits.
        passes: Whether the last step is time that passes: the question is asked after the last event.
    """

    ends: np.ndarray
    tails: dict[str, np.ndarray]
    tail_lengths: np.ndarray
    sources: np.ndarray
    tokens: np.ndarray
    times: np.ndarray
    visits: np.ndarray
    dated: bool = True
    passes: bool = False

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def is_passage(self) -> np.ndarray:
        """Bool [k], True at a last step that is time that passes."""
        array = np.zeros(len(self), bool)
        if self.passes:
            array[-1] = True
        return array

    def by(self, step: str) -> RowPrefixes:
        """The baseline, the prefixes at the ends of visits, days or hours, and the row itself.

        Raises:
            ValueError: Another step than `STEPS`, or one that these rows do not have.
        """
        if step not in STEPS:
            raise ValueError(f"by got {step!r}; expected one of {list(STEPS)}.")
        if step == "event" or len(self) == 1:
            return self
        if step == "visit" and not self.visits[1:].all():
            raise ValueError("by='visit' needs visits, and a stay's triplets have none; take 'event', 'day' or 'hour'.")
        if step != "visit" and not self.dated:
            raise ValueError(f"by={step!r} needs dates, and this stay has none; give the patient's events, or 'event'.")
        spans = {"visit": self.visits, "day": self.times // DAY_US, "hour": self.times // HOUR_US}[step]
        last = np.ones(len(self), bool)
        last[1:-1] = spans[1:-1] != spans[2:]
        last[:-1] |= self.is_passage[1:]  # the time that passes is a step of its own
        return RowPrefixes(
            **{name: getattr(self, name)[last] for name in ("ends", "tail_lengths", "sources", "tokens", "times")},
            tails={name: channel[last] for name, channel in self.tails.items()},
            visits=self.visits[last],
            dated=self.dated,
            passes=self.passes,
        )


class SourcedRows(Protocol):
    """Rows of one patient that know which event made which token, as the encoders' `sourced_rows` gives them.

    Attributes:
        events: The patient's events as they were given; for a stay of bare triplets one for each, without time.
        prediction_time: What the rows were cut at (microseconds), the last event where nothing was said; None where
            nothing has a time.
        notes: What was left out or is to be read with care, counted.
    """

    events: Sequence[Event]
    prediction_time: int | None
    notes: Counter[str]

    def row(self, number: int) -> Mapping[str, Any]:
        """Channels of the row for a task."""

    def event_of(self, number: int) -> np.ndarray:
        """Int64 [l], position in `events` of what made each token, `NO_EVENT` where nothing did."""

    def known(self, number: int) -> np.ndarray:
        """Bool [events], whether an event lies in the row: known by then, taking part, and not cut away."""

    def prefixes(self, number: int) -> RowPrefixes:
        """The steps by which a task's row came to be."""

    def row_without(self, number: int, removed: np.ndarray, max_length: int | None = None) -> Mapping[str, Any] | None:
        """A task's row if some events had never been recorded: the record without them, read again from the start and
        asked at the same time.

        What the row has not seen stays unseen: nothing from before the context comes into the place that is left, and
        events that the row does not show cannot be taken out.

        Args:
            number: The row.
            removed: Bool [events], what is taken out.
            max_length: Context length, for a record that grows by what is taken out (a visit without its start falls
                apart into days); None = any.

        Returns:
            Its channels; None where nothing is left that the model could read.
        """

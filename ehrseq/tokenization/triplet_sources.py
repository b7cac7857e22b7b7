"""The row of one stay that knows where it comes from: which event made which triplet, and the steps between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .ehr_codes import MINUTE_US
from .ehr_prefixes import NO_EVENT, RowPrefixes
from .ehr_sequence import Event, asked_at, count_later
from .triplet_stays import Stay


class ReadsStays(Protocol):
    """What reads a stay again (`HyMaTEFeatureExtractor`)."""

    def stay_channels(self, stay: Stay, kept: np.ndarray) -> dict[str, np.ndarray]:
        """Channels of some of a stay's triplets (positions)."""

    def stay_of_events(self, events: Sequence[Event], cut: int | None) -> Stay:
        """The stay of a record, its triplets of known variables."""


@dataclass
class StayRows:
    """The row of one stay of triplets, the same for every task; a `SourcedRows`.

    Attributes:
        events: The patient's events, in the order given.
        cut: Prediction time that was given (microseconds); None = the whole record.
        stay: Their stay.
        kept: Triplets of the stay that are in the row, [l].
        channels: The row.
        reader: What read it.
    """

    events: list[Event]
    cut: int | None
    stay: Stay
    kept: np.ndarray
    channels: dict[str, np.ndarray]
    reader: ReadsStays

    @property
    def prediction_time(self) -> int | None:
        """See `SourcedRows`."""
        return asked_at(self.events, self.cut)

    @property
    def notes(self) -> Counter[str]:
        """See `SourcedRows`."""
        late = count_later(self.events, self.cut)
        cut_away = len(self.stay.minutes) - len(self.kept)
        others = len(self.events) - late - len(self.stay.minutes)
        return +Counter(
            {
                "events after the prediction time, not read": late,
                "events before the context, not seen": cut_away,
                "events that make no triplet of the stay": others,
            }
        )

    def row(self, number: int) -> dict[str, np.ndarray]:
        """See `SourcedRows`."""
        return self.channels

    def event_of(self, number: int) -> np.ndarray:
        """See `SourcedRows`."""
        array: np.ndarray = self.stay.sources[self.kept]
        return array

    def known(self, number: int) -> np.ndarray:
        """See `SourcedRows`; what static values are made of is known beside it."""
        known = np.zeros(len(self.events), bool)
        known[self.event_of(number)] = True
        return known

    def prefixes(self, number: int) -> RowPrefixes:
        """The row after each of its triplets, in their order.

        The window and the static values are those of the whole row throughout, and the model reads no stay without a
        triplet: so the first triplet belongs to the baseline and has no step of its own.
        """
        count = len(self.kept)
        places = np.arange(count)
        minutes = self.stay.minutes[self.kept]
        sources, tokens = self.event_of(number).copy(), places.copy()
        sources[0] = tokens[0] = NO_EVENT
        return RowPrefixes(
            ends=places + 1,
            tails={},
            tail_lengths=np.zeros(count, np.int64),
            sources=sources,
            tokens=tokens,
            times=(self.stay.start or 0) + np.rint(minutes * MINUTE_US).astype(np.int64),
            visits=np.zeros(count, np.int64),
            dated=self.stay.start is not None,
        )

    def row_without(
        self, number: int, removed: np.ndarray, max_length: int | None = None
    ) -> dict[str, np.ndarray] | None:
        """See `SourcedRows`; a triplet that repeats one of these goes with it."""
        stays: np.ndarray = self.known(number) & ~removed
        if not stays.any():
            return None
        stay = self.stay
        if self.stay.start is not None:  # of a record; static values may be made of the same events
            left = np.flatnonzero(stays | ~self.known(number))
            try:
                stay = self.reader.stay_of_events([self.events[k] for k in left.tolist()], self.prediction_time)
            except ValueError:  # what its window began with is gone
                return None
            stays = stays[left]
        kept = np.flatnonzero(stays[stay.sources])
        return self.reader.stay_channels(stay, kept) if len(kept) else None

"""What truly came: the tokens of a record after a prediction time, in the form of a drawn trajectory.

The record is encoded whole, by the model's tokenizer, and cut where the prompt ends: what follows, up to the horizon,
is what a trajectory of that prompt would have to be like. It is followed until the data end, not until the record ends:
of somebody whose last event is years before the end of the data it is known that nothing came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ehrseq.encode.labels import rows_until
from ehrseq.tokenization.ehr_codes import DAY_US, YEAR_US
from ehrseq.tokenization.ehr_histories import EncodedHistories
from ehrseq.tokenization.ehr_rows import NO_TIME
from ehrseq.tokenization.ehr_vocabulary import REG, TYPE_INTERVAL, TYPE_REG, TYPE_VE, VE


@dataclass(frozen=True)
class RecordedFuture:
    """What came after one prediction time.

    Attributes:
        subject_id: The patient.
        tokens: int64 [k], up to the horizon.
        days: float64 [k], days from the prediction time; NaN for interval tokens, which have no time.
        followed_days: Days until the data end, beyond the horizon too.
        known: int64, the tokens that stood in the record up to the prediction time, each once, ascending.
        age: Years at the prediction time, NaN where nobody knows.
    """

    subject_id: int
    tokens: NDArray[np.int64]
    days: NDArray[np.float64]
    followed_days: float
    known: NDArray[np.int64]
    age: float

    def first_day(self, ids: ArrayLike) -> float:
        """Day of the first of some tokens, infinite where none comes."""
        places = np.flatnonzero(np.isin(self.tokens, ids))
        return float(self.days[places[0]]) if len(places) else float("inf")

    def has_known(self, ids: ArrayLike) -> bool:
        """Whether one of some tokens stood in the record before."""
        return bool(np.isin(self.known, ids).any())


def recorded_futures(
    histories: EncodedHistories,
    subject_ids: Sequence[int] | NDArray[np.int64],
    prediction_times: NDArray[np.datetime64],
    *,
    horizon_days: float,
    end_of_data: np.datetime64,
    closed: ArrayLike | None = None,
) -> list[RecordedFuture]:
    """The futures of some patients.

    Args:
        histories: Whole records, `tokenizer.encode_histories(events)`.
        subject_ids: `[n]` patients, of `histories`.
        prediction_times: `[n]` times, UTC; what happens at the instant itself is known.
        horizon_days: How far.
        end_of_data: Until when records were kept.
        closed: `[n]` whether the prompt ends in [VE] [REG]; None: as the records close their visits. (A visit that had
            lapsed by the prediction time is closed in the prompt, though no row had come to close it.)

    Raises:
        ValueError: A patient who is not there, a horizon that is not above 0.
    """
    if not horizon_days > 0:
        raise ValueError(f"horizon_days got {horizon_days}; expected a number above 0.")
    subjects = np.asarray(subject_ids, np.int64)
    history = np.minimum(np.searchsorted(histories.subject_ids, subjects), len(histories) - 1)
    unknown = histories.subject_ids[history] != subjects
    if unknown.any():
        raise ValueError(f"the records lack {int(unknown.sum()):,} patients, the first: {subjects[unknown][0]}.")
    instants = prediction_times.astype("datetime64[us]").astype(np.int64)
    known = rows_until(histories.row_time, histories.row_offsets, history, instants)
    last = int(end_of_data.astype("datetime64[us]").astype(np.int64))
    if closed is None:
        row = histories.row_offsets[history].astype(np.int64) + np.maximum(known - 1, 0)
        is_closed = (known > 0) & ~histories.row_open[row].astype(bool)
    else:
        is_closed = np.asarray(closed, bool)
    return [
        _future(histories, int(k), int(instant), int(rows), bool(ended), horizon_days, last)
        for k, instant, rows, ended in zip(history, instants, known, is_closed, strict=True)
    ]


def _future(
    histories: EncodedHistories, k: int, instant: int, known: int, closed: bool, horizon_days: float, last: int
) -> RecordedFuture:
    base, stop = int(histories.offsets[k]), int(histories.offsets[k + 1])
    rows = slice(int(histories.row_offsets[k]), int(histories.row_offsets[k + 1]))
    times, ends, is_open = histories.row_time[rows], histories.row_end[rows], histories.row_open[rows]
    begin = int(ends[known - 1]) if known else 0
    ids, types = histories.ids[base:stop].astype(np.int64), histories.types[base:stop]
    # 1. The time of each token is that of the row that made it; the marks that close a visit, which come with the next
    #    visit's first row, have the time of what stands before them.
    days = (times[np.searchsorted(ends, np.arange(begin, len(ids)), side="right")] - instant) / DAY_US
    tokens, kinds = ids[begin:], types[begin:]
    # 2. The prompt of a closed visit has its closing marks already.
    if closed:
        marks = int(np.isin(kinds[:2], (TYPE_VE, TYPE_REG)).sum())
        tokens, kinds, days = tokens[marks:], kinds[marks:], days[marks:]
    days = days.astype(np.float64)
    closing = np.isin(kinds, (TYPE_VE, TYPE_REG))
    days[closing] = np.nan
    days = _filled(days)
    # 3. The end of the record closes its last visit.
    if len(tokens) and not is_open[-1]:
        specials = histories.vocabulary.token_ids
        tokens = np.concatenate([tokens, [specials[VE], specials[REG]]])
        kinds, days = np.concatenate([kinds, [TYPE_VE, TYPE_REG]]), np.concatenate([days, days[-1:], days[-1:]])
    # 4. Up to the horizon; an interval token has the day of the visit that it leads to, so far.
    inside = int(np.searchsorted(days, horizon_days, side="right"))
    days[kinds == TYPE_INTERVAL] = np.nan
    statics = histories.static_ids[int(histories.static_offsets[k]) : int(histories.static_offsets[k + 1])]
    birth = int(histories.birth[k])
    return RecordedFuture(
        int(histories.subject_ids[k]),
        tokens[:inside],
        days[:inside],
        max(0.0, (last - instant) / DAY_US),
        np.unique(np.concatenate([statics, ids[:begin]]).astype(np.int64)),
        float("nan") if birth == NO_TIME else (instant - birth) / YEAR_US,
    )


def _filled(days: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN -> the last day before it, 0 where there is none."""
    places = np.where(np.isnan(days), -1, np.arange(len(days)))
    places = np.maximum.accumulate(places) if len(places) else places
    filled: NDArray[np.float64] = np.where(places >= 0, days[places.clip(min=0)], 0.0) if len(days) else days
    return filled

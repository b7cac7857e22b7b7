"""Patients between the event table and their tokens: the rows that take part, and how they are laid out as tokens.

A row knows its instant, its token, whether it opens a visit and whether one is open after it: seven bytes or so, from
which every channel follows. So this is what is kept on disk (`ehrseq.encode`), and `lay_out` is the second half of the
encoding in memory as well: both ways give the same tokens because they go the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .ehr_vocabulary import (
    DAY_US,
    LONG_TERM,
    MONTHS,
    REG,
    TYPE_INTERVAL,
    TYPE_REG,
    TYPE_VE,
    TYPE_VS,
    VE,
    VS,
    WEEK_US,
    WEEKS,
    YEAR_US,
    EventVocabulary,
)

NO_TIME = np.iinfo(np.int64).min
"""Stands for an absent instant (microseconds): a static row, an unknown birth."""


@dataclass
class HistoryRows:
    """Rows of many patients as flat arrays, offsets per patient.

    Attributes:
        subject_ids: [patients], ascending.
        first: First timed event after birth (microseconds), [patients].
        birth: Birth (microseconds; `NO_TIME` where unknown), [patients].
        static_offsets, static_ids: Static tokens.
        row_offsets: Rows of patient k lie at row_offsets[k] .. row_offsets[k + 1].
        time: Instant of each row (microseconds), ascending in a patient.
        ids: Its token, 0 where it makes none of its own (a visit's boundary), int32.
        types: Its token type, 0 where it makes no token, int8.
        opens: Whether it opens a visit.
        is_open: Whether a visit is open after it.
    """

    subject_ids: np.ndarray
    first: np.ndarray
    birth: np.ndarray
    static_offsets: np.ndarray
    static_ids: np.ndarray
    row_offsets: np.ndarray
    time: np.ndarray
    ids: np.ndarray
    types: np.ndarray
    opens: np.ndarray
    is_open: np.ndarray

    def __len__(self) -> int:
        return len(self.subject_ids)


def lay_out(rows: HistoryRows, vocabulary: EventVocabulary) -> dict[str, Any]:
    """The arrays of `EncodedHistories`.

    Every row knows how many tokens stand before it, so that one scatter writes each channel: first what opens its visit
    ([VE] [REG] interval [VS], the first three after an earlier visit), then its own.
    """
    per_subject = np.diff(rows.row_offsets)
    count, time = len(rows), rows.time
    opens = np.flatnonzero(rows.opens)
    # A patient's first row opens a visit, so the running number of openings starts again there.
    order = np.cumsum(rows.opens) - np.repeat(
        np.concatenate([[0], np.cumsum(rows.opens)])[rows.row_offsets[:-1]], per_subject
    )
    own = rows.types > 0
    width = own.astype(np.int32)
    width[opens] += np.where(order[opens] > 1, 4, 1).astype(np.int32)
    through = np.cumsum(width, dtype=np.int64)  # tokens through each row, over all patients
    offsets = np.zeros(count + 1, np.int64)
    if len(time):
        offsets = np.where(rows.row_offsets > 0, through[rows.row_offsets - 1], 0)
    ids = np.empty(int(offsets[-1]), np.int32)
    types = np.empty(len(ids), np.int8)
    times, ages = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.float32)
    orders = np.empty(len(ids), np.int32)
    token_ids = vocabulary.token_ids
    row_times = ((time - np.repeat(rows.first, per_subject)) / WEEK_US).astype(np.float32)
    row_ages = _ages(time, np.repeat(rows.birth, per_subject))

    content = np.flatnonzero(own)
    at = through[content] - 1
    ids[at], types[at] = rows.ids[content], rows.types[content]
    times[at], ages[at], orders[at] = row_times[content], row_ages[content], order[content]

    at = through[opens] - own[opens] - 1
    ids[at], types[at] = token_ids[VS], TYPE_VS
    times[at], ages[at], orders[at] = row_times[opens], row_ages[opens], order[opens]

    again = opens[order[opens] > 1]  # visits after the first: the row before them ended the previous visit
    at = through[again] - own[again] - 1
    for back, token, token_type in ((3, token_ids[VE], TYPE_VE), (2, token_ids[REG], TYPE_REG)):
        ids[at - back], types[at - back] = token, token_type
        times[at - back], ages[at - back] = row_times[again - 1], row_ages[again - 1]
        orders[at - back] = order[again] - 1
    ids[at - 1], types[at - 1] = _interval_ids(token_ids, (time[again] - time[again - 1]) // DAY_US), TYPE_INTERVAL
    orders[at - 1] = order[again] - 1

    through -= np.repeat(offsets[:-1], per_subject)
    return {
        "subject_ids": rows.subject_ids,
        "first": rows.first,
        "birth": rows.birth,
        "static_offsets": rows.static_offsets,
        "static_ids": rows.static_ids,
        "offsets": offsets,
        "ids": ids,
        "types": types,
        "times": times,
        "ages": ages,
        "orders": orders,
        "row_offsets": rows.row_offsets,
        "row_time": time,
        "row_end": through,
        "row_open": rows.is_open,
        "row_order": order,
    }


def _interval_ids(token_ids: dict[str, int], days: np.ndarray) -> np.ndarray:
    """`interval_token` of many."""
    weeks = np.asarray([token_ids[t] for t in WEEKS])
    months = np.asarray([token_ids[t] for t in MONTHS])
    inner = np.where(days < 28, weeks[np.clip(days // 7, 0, 3)], months[np.clip(days // 30, 0, 12)])
    return np.where(days <= 365, inner, token_ids[LONG_TERM])


def _ages(time: np.ndarray, birth: np.ndarray) -> np.ndarray:
    """Ages in years, 0 where the birth is unknown or later."""
    years = (time - np.where(birth == NO_TIME, time, birth)) / YEAR_US
    return np.maximum(years, 0.0, out=years).astype(np.float32)

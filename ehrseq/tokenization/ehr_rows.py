"""Patients between the event table and their tokens: the rows that take part, and how they are laid out as tokens.

A row knows its instant, its token, whether it opens a visit and whether one is open after it: seven bytes or so, from
which every channel follows. So this is what is kept on disk (`ehrseq.encode`), and `lay_out` is the second half of the
encoding in memory as well: both ways give the same tokens because they go the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .ehr_codes import DAY_US, WEEK_US, YEAR_US
from .ehr_vocabulary import (
    INTERVAL_STARTS,
    REG,
    TYPE_INTERVAL,
    TYPE_REG,
    TYPE_VE,
    TYPE_VS,
    VE,
    VS,
    EventVocabulary,
)

NO_TIME = np.iinfo(np.int64).min
"""Stands for an absent instant (microseconds): a static row, an unknown birth."""

OTHER_SEGMENT = np.asarray([0, 2, 1], np.int8)
"""Segment of a visit -> the other one; 0 stands for none."""


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
        static_sources, sources: Position among the patient's events of what made each static token and each row, int64;
            None where that was not asked for (whole tables: rows are kept on disk without it).
        open_until: Of one patient: until which instant (microseconds) the visit that is open after the last row stays
            so without another row, see `ehr_visits`; None where none is open, and of whole tables.
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
    static_sources: np.ndarray | None = None
    sources: np.ndarray | None = None
    open_until: int | None = None

    def __len__(self) -> int:
        return len(self.subject_ids)


def lay_out(rows: HistoryRows, vocabulary: EventVocabulary) -> dict[str, Any]:
    """The arrays of `EncodedHistories`.

    A row becomes what opens its visit ([VE] [REG] interval [VS], the first three after an earlier visit), then its own
    token. Every token has its time, age and visit from one row: that row, or the one before it for the three that
    belong to the earlier visit.
    """
    # One patient is laid out while somebody waits: methods of arrays cost less than numpy's functions.
    per_subject = rows.row_offsets[1:] - rows.row_offsets[:-1]
    time, token_ids = rows.time, vocabulary.token_ids
    # 1. The order of each row's visit: a patient's first row opens one, so the running number of openings starts again.
    openings = _running(rows.opens, np.int32)
    order = openings[1:] - openings[rows.row_offsets[:-1]].repeat(per_subject)
    # 2. Tokens of each row, and where they lie.
    makes_token = rows.types > 0
    opens = rows.opens.nonzero()[0]
    is_later, own = order[opens] > 1, makes_token[opens]
    width = makes_token.astype(np.int32)
    width[opens] = own + np.where(is_later, 4, 1)
    through = _running(width, np.int64)
    offsets = through[rows.row_offsets]
    row_end = through[1:]
    # 3. Ids and types.
    ids, types = np.empty(through[-1], np.int32), np.empty(through[-1], np.int8)
    content = makes_token.nonzero()[0]
    at = row_end[content] - 1
    ids[at], types[at] = rows.ids[content], rows.types[content]
    at = row_end[opens] - own - 1
    ids[at], types[at] = token_ids[VS], TYPE_VS
    at, later = at[is_later], opens[is_later]
    ids[at - 3], types[at - 3] = token_ids[VE], TYPE_VE
    ids[at - 2], types[at - 2] = token_ids[REG], TYPE_REG
    days = (time[later] - time[later - 1]) // DAY_US
    ids[at - 1] = vocabulary.interval_ids[INTERVAL_STARTS.searchsorted(days, "right")]
    types[at - 1] = TYPE_INTERVAL
    # 4. Times, ages and visits; an interval has no time of its own.
    row_of = np.arange(len(time)).repeat(width)
    row_of[at - 3] = row_of[at - 2] = row_of[at - 1] = later - 1
    times = ((time - rows.first.repeat(per_subject)) / WEEK_US).astype(np.float32)[row_of]
    ages = _ages(time, rows.birth.repeat(per_subject))[row_of]
    times[at - 1] = ages[at - 1] = 0
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
        "orders": order[row_of],
        "row_offsets": rows.row_offsets,
        "row_time": time,
        "row_end": row_end - offsets[:-1].repeat(per_subject),
        "row_open": rows.is_open,
        "row_order": order,
    }


def _running(values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """Sums of the values before each, and of all: [n + 1]."""
    sums = np.zeros(len(values) + 1, dtype)
    sums[1:] = values
    return np.add.accumulate(sums, out=sums)


def _ages(time: np.ndarray, birth: np.ndarray) -> np.ndarray:
    """Ages in years, 0 where the birth is unknown or later."""
    years = (time - np.where(birth == NO_TIME, time, birth)) / YEAR_US
    return np.maximum(years, 0.0, out=years).astype(np.float32)

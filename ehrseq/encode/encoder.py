"""The columnar encoder: event table -> `EncodedHistories`, without a Python step per row.

The rules are those of `ehr_sequence.patient_rows`; here each becomes arithmetic on whole columns:

1. Order the rows and look their tokens up (`columns.py`).
2. Visits: count the open encounters after each row (`boundaries.py`); a row that opens a visit is one that finds
   none open and does not continue the last one.
3. Lay the tokens out (`ehr_rows.py`).

Patients are encoded in chunks, side by side on all cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import polars as pl

from ehrseq.data.tables import check_columns, in_threads, subject_chunks
from ehrseq.encode.boundaries import Boundaries, keys
from ehrseq.encode.columns import CONTENT, DROPPED, END, HOWS, REQUIRED, START, EventColumns
from ehrseq.tokenization.ehr_codes import DAY_US, RANK_BIRTH
from ehrseq.tokenization.ehr_histories import EncodedHistories, join_offsets
from ehrseq.tokenization.ehr_rows import NO_TIME, HistoryRows, lay_out
from ehrseq.tokenization.ehr_vocabulary import EventVocabulary
from ehrseq.work.engine import available_cores

T = TypeVar("T")

_CHUNK_ROWS = 600_000  # rows encoded at once: bounds the working memory of a core
_LEAST_ROWS = 100_000  # below, looking the codes up for each chunk costs more than another core saves


class Encoder:
    """Encodes the patients of event tables, in chunks on all cores.

    Args:
        vocabulary: Codes to ids.
        task_names: The tokenizer's tasks.
        task_token_ids: Their tokens.
        max_num_visits: Visit orders are clamped below it when rows are assembled.
    """

    def __init__(
        self, vocabulary: EventVocabulary, task_names: list[str], task_token_ids: list[int], max_num_visits: int
    ) -> None:
        self.vocabulary = vocabulary
        self._common: dict[str, Any] = {
            "vocabulary": vocabulary,
            "task_names": list(task_names),
            "task_token_ids": np.asarray(task_token_ids, np.int64),
            "max_num_visits": max_num_visits,
        }

    def encode(self, events: pl.DataFrame) -> EncodedHistories:
        """Every patient of an event table, see the module's text.

        Args:
            events: Event table; rows in any order, optional columns may be absent.

        Raises:
            ValueError: A required column is absent or has the wrong type.
        """
        encoded = in_threads(
            lambda part: lay_out(read_rows(part, self.vocabulary), self.vocabulary),
            self._parts(events),
            "Encoding patients",
        )
        flat: dict[str, Any] = {}
        for name in encoded[0]:
            join = join_offsets if name.endswith("offsets") else np.concatenate
            flat[name] = join([part[name] for part in encoded])
        return EncodedHistories(**self._common, **flat)

    def encode_parts(self, events: pl.DataFrame, work: Callable[[EncodedHistories], T]) -> list[T]:
        """`work` done on the patients of each chunk right after their encoding: the whole is never put together.

        Args:
            events: As for `encode`.
            work: What to do; called on several threads.
        """

        def encode_and_work(part: pl.DataFrame) -> T:
            return work(self.histories(read_rows(part, self.vocabulary)))

        return in_threads(encode_and_work, self._parts(events), "Encoding patients")

    def histories(self, rows: HistoryRows) -> EncodedHistories:
        """The histories of rows that were read before."""
        flat: dict[str, Any] = lay_out(rows, self.vocabulary)
        return EncodedHistories(**self._common, **flat)

    @staticmethod
    def _parts(events: pl.DataFrame) -> list[tuple[pl.DataFrame]]:
        table = check_columns(events, REQUIRED, "the event table")
        # As many for each core, so that none waits for another's last chunk.
        cores = available_cores()
        rounds = math.ceil(table.height / (cores * _CHUNK_ROWS))
        rows = max(min(_CHUNK_ROWS, _LEAST_ROWS), math.ceil(table.height / max(1, rounds * cores)))
        return [(part,) for part in subject_chunks(table, rows)]


def coverage_of(events: pl.DataFrame, vocabulary: EventVocabulary) -> dict[str, int]:
    """Counts of rows by how they were mapped, and of encounters that lapse, see `EhrTokenizer.coverage`."""
    table = EventColumns(events, vocabulary)
    makes_token = table.token_type > 0
    counts = np.bincount(table.hows()[makes_token], minlength=len(HOWS))
    boundary = (table.role == START) | (table.role == END)
    return dict(zip(HOWS, counts.tolist(), strict=True)) | {
        "visit_boundaries": int(boundary.sum()),
        "not_used": int((~makes_token & ~boundary).sum()),
        "lapsed_encounters": int(Boundaries(table).lapsed.sum()),
    }


def read_rows(events: pl.DataFrame, vocabulary: EventVocabulary) -> HistoryRows:
    """The rows of some patients that take part, with their tokens and visits: all that needs the event table."""
    table = EventColumns(events, vocabulary)
    timed = table.time != NO_TIME
    is_birth = table.rank == RANK_BIRTH
    # A death or a visit of unknown time would tell the future.
    static = np.flatnonzero(~timed & (table.role == CONTENT) & ~table.is_death)
    row_ids = table.token_ids()
    boundaries = Boundaries(table)
    keep = np.flatnonzero(timed & (table.role != DROPPED))
    row_offsets = np.searchsorted(keep, table.begins)
    visits = _Visits(table, keep, row_offsets[:-1][np.diff(row_offsets) > 0], boundaries)
    opens = np.zeros(len(keep), bool)
    opens[visits.opens] = True
    types = table.token_type[keep]
    return HistoryRows(
        subject_ids=table.subject_ids,
        first=_first_of_each(table, timed & ~is_birth, 0),
        birth=_first_of_each(table, timed & is_birth, NO_TIME),
        static_offsets=np.searchsorted(static, table.begins),
        static_ids=row_ids[static],
        row_offsets=row_offsets,
        time=table.time[keep],
        ids=row_ids[keep] * (types > 0),
        types=types,
        opens=opens,
        is_open=visits.open_after > 0,
    )


class _Visits:
    """Which visit each kept row belongs to.

    Attributes:
        opens: Kept rows that open a visit.
        open_after: Encounters that are open after each kept row.
    """

    def __init__(self, table: EventColumns, keep: np.ndarray, begins: np.ndarray, boundaries: Boundaries) -> None:
        role = table.role[keep]
        at = np.searchsorted(keep, boundaries.rows)  # boundaries among the kept rows
        # 1. Open encounters after and before each row. Those that lapse at a row are open after the row before it.
        self.open_after = _running(at, boundaries.open_after, begins, len(keep))
        open_before = np.zeros(len(keep), np.int64)
        open_before[1:] = self.open_after[:-1]
        open_before[begins] = 0
        lapsing = np.flatnonzero(boundaries.lapsed)
        np.subtract.at(open_before, at[lapsing], boundaries.lapsed[lapsing])
        idle = open_before == 0
        # 2. Rows that may open a visit, and the ends that close one: the rows that decide about visits.
        opener = idle & (role == START)
        outside = idle & (role == CONTENT)
        closing = np.zeros(len(keep), bool)
        closing[at[(role[at] == END) & (boundaries.open_after == 0)]] = True
        place = np.flatnonzero(opener | outside | closing)
        opener, outside, closing = opener[place], outside[place], closing[place]
        rows, inpatient = keep[place], table.inpatient[keep[place]]
        visit, late = table.visit[rows], self._late(table, rows, outside, boundaries)
        day = table.time[rows] // DAY_US
        # 3. Which of them continue the visit of the row right before.
        begin = np.zeros(len(keep), bool)
        begin[begins] = True
        follows = (np.diff(place, prepend=-2) == 1) & ~begin[place]
        by_visit = outside & table.has_visit[rows] & ~late
        by_day = outside & ~by_visit
        same_visit, same_day = np.zeros(len(place), bool), np.zeros(len(place), bool)
        np.equal(visit[1:], visit[:-1], out=same_visit[1:])
        np.equal(day[1:], day[:-1], out=same_day[1:])
        continues = (by_visit & _previous(by_visit) & same_visit) | (by_day & _previous(by_day) & same_day)
        continues |= opener & table.has_visit[rows] & _previous(by_visit) & same_visit
        # A transfer: an inpatient start on the day on which the visit before, an admission, closed.
        admission = closing & self._admissions(table, place, keep, boundaries)
        continues |= opener & inpatient & _previous(admission) & same_day
        self.opens = place[(opener | outside) & ~(continues & follows)]

    @staticmethod
    def _late(table: EventColumns, rows: np.ndarray, outside: np.ndarray, boundaries: Boundaries) -> np.ndarray:
        """Whether an outside row comes after an end, or a lapse, of its visit_id."""
        late = np.zeros(len(rows), bool)
        ask = np.flatnonzero(outside & table.has_visit[rows])
        if len(ask) and len(boundaries.ended_rows):
            asked = rows[ask]
            key, first = np.unique(boundaries.ended_keys, return_index=True)
            wanted = keys(table, asked)
            at = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
            late[ask] = (key[at] == wanted) & (boundaries.ended_rows[first[at]] < asked)
        return late

    @staticmethod
    def _admissions(table: EventColumns, place: np.ndarray, keep: np.ndarray, boundaries: Boundaries) -> np.ndarray:
        """Whether an inpatient encounter started in the run of open encounters that each deciding row closes."""
        if not len(boundaries.rows):
            return np.zeros(len(place), bool)
        number = np.arange(len(boundaries.rows))
        is_start = (table.role[boundaries.rows] == START) & (boundaries.lapsed == 0)
        alone = is_start & (boundaries.open_after == 1)  # it found nothing open
        last_alone = np.maximum.accumulate(np.where(alone, number, -1))
        last_inpatient = np.maximum.accumulate(np.where(is_start & table.inpatient[boundaries.rows], number, -1))
        admission = last_inpatient >= last_alone
        at = np.searchsorted(boundaries.rows, keep[place], side="right") - 1
        return np.where(at >= 0, admission[at], False)


def _previous(values: np.ndarray) -> np.ndarray:
    """Each row's predecessor, False for the first."""
    out = np.zeros(len(values), bool)
    out[1:] = values[:-1]
    return out


def _running(at: np.ndarray, level: np.ndarray, begins: np.ndarray, length: int) -> np.ndarray:
    """Fill [length] with the level of the last of the places `at` so far, 0 before a subject's first one."""
    marked = np.zeros(length, bool)
    marked[at] = marked[begins] = True
    places = np.flatnonzero(marked)
    value = np.zeros(len(places), np.int64)
    value[np.searchsorted(places, at)] = level
    return np.repeat(value, np.diff(np.append(places, length)))


def _first_of_each(table: EventColumns, wanted: np.ndarray, missing: int) -> np.ndarray:
    """Time of each subject's first wanted row, `missing` where it has none."""
    rows = np.flatnonzero(wanted)
    at = np.searchsorted(rows, table.begins)
    has = at[1:] > at[:-1]
    out = np.full(len(has), missing, np.int64)
    out[has] = table.time[rows[at[:-1][has]]]
    return out

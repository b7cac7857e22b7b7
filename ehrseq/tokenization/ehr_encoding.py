"""The columnar encoder: event table -> `EncodedHistories`, without a Python step per row.

The rules are those of `ehr_sequence.walk`; here each becomes arithmetic on whole columns:

1. Order the rows; look up kinds, ids and value bins, once for each distinct (code, unit) or (code, text).
2. Visits: count the open encounters after each row; a row that opens a visit is one that finds none open and does not
continue the last one. 3. Lay the tokens out: every row knows how many tokens stand before it, so that one scatter
writes each channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .ehr_codes import INPATIENT_CLASSES
from .ehr_histories import NO_TIME, EncodedHistories
from .ehr_sequence import WEEK_US, YEAR_US
from .ehr_tables import as_column, check_columns, microseconds, require
from .ehr_visits import KIND_RANKS, RANK_BIRTH, RANK_OTHER, RANK_STATIC
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
    WEEKS,
    EventVocabulary,
)

if TYPE_CHECKING:
    try:  # noqa: SIM105  (guarded, or transformers would ask for polars before it loads this file from a checkpoint)
        import polars as pl
    except ImportError:
        pass

_DROPPED, _CONTENT, _START, _END = range(4)
_HOWS = ("exact", "fallback", "lost")
_MAX_DENSE_KEYS = 20_000_000  # (code, unit) pairs up to which a lookup table is indexed directly


def encode_histories(
    events: pl.DataFrame,
    vocabulary: EventVocabulary,
    *,
    task_names: list[str],
    task_token_ids: list[int],
    max_num_visits: int,
) -> EncodedHistories:
    """Encode every patient of an event table, see the module's text.

    Args:
        events: Event table; rows in any order, optional columns may be absent.
        vocabulary: Codes to ids.
        task_names: The tokenizer's tasks.
        task_token_ids: Their tokens.
        max_num_visits: Visit orders are clamped below it when rows are assembled.

    Raises:
        ValueError: A required column is absent or has the wrong type.
    """
    table = _Columns(events, vocabulary)
    subject_ids, subject = np.unique(table.subject, return_inverse=True)
    count = len(subject_ids)
    birth = _min_by(subject[table.rank == RANK_BIRTH], table.time[table.rank == RANK_BIRTH], count)
    timed = (table.time != NO_TIME) & (table.rank != RANK_BIRTH)
    first = _min_by(subject[timed], table.time[timed], count)
    first = np.where(first == NO_TIME, 0, first)

    # A death or a visit of unknown time would tell the future.
    static = (table.time == NO_TIME) & (table.role == _CONTENT) & ~table.is_death
    static_ids = table.token_ids(static)
    static_offsets = _offsets(subject[static], count)

    keep = np.flatnonzero((table.time != NO_TIME) & (table.role != _DROPPED))
    role, open_after = _open_encounters(subject[keep], table.visit[keep], table.role[keep])
    matched = role != _DROPPED
    keep, role, open_after = keep[matched], role[matched], open_after[matched]
    subject, time, visit = subject[keep], table.time[keep], table.visit[keep]
    new, order = _visits(subject, time, visit, role, open_after, table.inpatient[keep])

    # Tokens of a row: what opens its visit ([VE] [REG] interval [VS], the first three after an earlier visit), then
    # its own.
    is_content = table.token_type[keep] > 0
    opening = np.where(new, np.where(order > 1, 4, 1), 0)
    through = np.cumsum(opening + is_content)  # tokens through each row, over all patients
    offsets = np.concatenate([[0], through])[np.concatenate([[0], np.cumsum(np.bincount(subject, minlength=count))])]
    ids = np.empty(int(offsets[-1]), np.int32)
    types = np.empty(len(ids), np.int8)
    times, ages = np.zeros(len(ids), np.float32), np.zeros(len(ids), np.float32)
    orders = np.empty(len(ids), np.int32)
    token_ids = vocabulary.token_ids
    row_times = ((time - first[subject]) / WEEK_US).astype(np.float32)
    row_ages = _ages_of(time, birth[subject])

    own = keep[is_content]
    at = through[is_content] - 1
    content_mask = np.zeros(len(table.role), bool)
    content_mask[own] = True
    ids[at], types[at] = table.token_ids(content_mask), table.token_type[own]
    times[at], ages[at], orders[at] = row_times[is_content], row_ages[is_content], order[is_content]

    opens = np.flatnonzero(new)
    at = through[opens] - is_content[opens] - 1
    ids[at], types[at] = token_ids[VS], TYPE_VS
    times[at], ages[at], orders[at] = row_times[opens], row_ages[opens], order[opens]

    again = opens[order[opens] > 1]  # visits after the first: the row before them ended the previous visit
    at = through[again] - is_content[again] - 1
    for back, token, token_type in ((3, token_ids[VE], TYPE_VE), (2, token_ids[REG], TYPE_REG)):
        ids[at - back], types[at - back] = token, token_type
        times[at - back], ages[at - back] = row_times[again - 1], row_ages[again - 1]
        orders[at - back] = order[again] - 1
    ids[at - 1], types[at - 1] = _interval_ids(token_ids, (time[again] - time[again - 1]) // DAY_US), TYPE_INTERVAL
    orders[at - 1] = order[again] - 1

    return EncodedHistories(
        vocabulary=vocabulary,
        task_names=list(task_names),
        task_token_ids=np.asarray(task_token_ids, np.int64),
        max_num_visits=max_num_visits,
        subject_ids=subject_ids,
        first=first,
        birth=birth,
        static_offsets=static_offsets,
        static_ids=static_ids,
        offsets=offsets,
        ids=ids,
        types=types,
        times=times,
        ages=ages,
        orders=orders,
        row_offsets=_offsets(subject, count),
        row_time=time,
        row_end=through - offsets[subject],
        row_open=open_after > 0,
        row_order=order,
    )


class _Columns:
    """The event table as sorted numpy columns, codes looked up."""

    def __init__(self, events: pl.DataFrame, vocabulary: EventVocabulary) -> None:
        pl = require("polars")
        events = check_columns(events, ("subject_id", "time", "code"), "the event table")
        frame = events.select(
            as_column(events, "subject_id", pl.Int64, "events"),
            microseconds(events, "time", "events").fill_null(NO_TIME),
            as_column(events, "code", pl.String, "events"),
            as_column(events, "numeric_value", pl.Float32, "events"),
            as_column(events, "text_value", pl.String, "events"),
            as_column(events, "unit", pl.String, "events"),
            as_column(events, "visit_id", pl.String, "events"),
        )
        for name in ("subject_id", "code"):
            if frame[name].null_count():
                raise ValueError(
                    f"{frame[name].null_count()} rows of the event table have no {name}; fill or remove them."
                )
        codes, code = _factorize(frame["code"])
        kinds = [vocabulary.kind(c) for c in codes]
        rank_of = np.asarray([KIND_RANKS.get(kind, RANK_OTHER) for kind, _ in kinds], np.int8)
        self.subject = frame["subject_id"].to_numpy()
        self.time = frame["time"].to_numpy()
        self.rank = np.where(self.time == NO_TIME, RANK_STATIC, rank_of[code]) if len(code) else np.zeros(0, np.int8)
        order = _sorting(self.subject, self.time, self.rank)
        if order is not None:
            frame, code = frame[order], code[order]
            self.subject, self.time, self.rank = self.subject[order], self.time[order], self.rank[order]
        type_of = np.asarray([vocabulary.token_type(c) for c in codes], np.int8)
        death_of = np.asarray([kind == "death" for kind, _ in kinds], bool)
        # A birth without a time is still no token, so ranks of static rows keep it out by their role.
        role_of = np.asarray([_role(kind, bool(t)) for (kind, _), t in zip(kinds, type_of, strict=True)], np.int8)
        inpatient_of = np.asarray([kind == "visit_start" and cls in INPATIENT_CLASSES for kind, cls in kinds], bool)
        empty = np.zeros(0, np.int8)
        self.role = role_of[code] if len(code) else empty
        self.is_death = death_of[code] if len(code) else empty.astype(bool)
        self.inpatient = inpatient_of[code] if len(code) else empty.astype(bool)
        self.token_type = type_of[code] if len(code) else empty
        self.visit = _factorize(frame["visit_id"])[1]
        self._frame, self._code, self._codes, self._vocabulary = frame, code, codes, vocabulary

    def token_ids(self, mask: np.ndarray) -> np.ndarray:
        """Token ids of the masked rows, in row order."""
        return self.tokens(mask)[0]

    def tokens(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, how int8: 0 exact, 1 fallback, 2 lost) of the masked rows, in row order."""
        vocabulary, codes = self._vocabulary, self._codes
        code = self._code[mask]
        bare = [vocabulary.code_id(c) for c in codes]
        ids = np.asarray([i for i, _ in bare], np.int32)[code] if len(codes) else np.zeros(0, np.int32)
        how = np.asarray([_HOWS.index(h) for _, h in bare], np.int8)[code] if len(codes) else np.zeros(0, np.int8)

        value = self._frame["numeric_value"].to_numpy()[mask]  # null -> NaN
        number = np.flatnonzero(np.isfinite(value))
        if len(number):
            units, unit = _factorize(self._frame["unit"])
            pair, place = _distinct(code[number], unit[mask][number] + 1, len(units) + 1)
            id_table, how_table, edges = self._bins(pair, units)
            k = (value[number, None] > edges[place]).sum(1)
            ids[number], how[number] = id_table[place, k], how_table[place, k]

        text = self._frame["text_value"]
        if text.null_count() < len(text):
            texts, text_code = _factorize(text)
            text_code = text_code[mask]
            has_text = np.asarray([bool(t) for t in texts], bool)
            with_text = np.flatnonzero((text_code >= 0) & ~np.isfinite(value))
            with_text = with_text[has_text[text_code[with_text]]]
            if len(with_text):
                pair, place = _distinct(code[with_text], text_code[with_text], len(texts))
                found = [vocabulary.text_id(codes[c], texts[t]) for c, t in pair]
                ids[with_text] = np.asarray([i for i, _ in found], np.int32)[place]
                how[with_text] = np.asarray([_HOWS.index(h) for _, h in found], np.int8)[place]
        return ids, how

    def _bins(self, pairs: list[tuple[int, int]], units: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bins of distinct (code, unit + 1) pairs.

        Returns:
            ids and hows [pairs, bins], inner edges [pairs, bins - 1] padded with NaN, which no value reaches.
        """
        bins_of = [self._vocabulary.bins(self._codes[c], units[u - 1] if u else None) for c, u in pairs]
        width = max((len(bins.edges) for bins in bins_of if bins is not None), default=0)
        edges = np.full((len(pairs), width), np.nan, np.float32)
        ids = np.zeros((len(pairs), width + 1), np.int32)
        how = np.zeros((len(pairs), width + 1), np.int8)
        for row, ((c, u), bins) in enumerate(zip(pairs, bins_of, strict=True)):
            inside = [np.inf]  # a value inside bin k stands for all of them
            if bins is not None:
                edges[row, : len(bins.edges)] = bins.edges
                inside = [*bins.edges, np.inf]
            for k, value in enumerate(inside):
                token, name = self._vocabulary.value_id(self._codes[c], units[u - 1] if u else None, value)
                ids[row, k], how[row, k] = token, _HOWS.index(name)
        return ids, how, edges


def _role(kind: str, makes_token: bool) -> int:
    if kind == "visit_start":
        return _START
    if kind == "visit_end":
        return _END
    return _CONTENT if makes_token else _DROPPED


def _factorize(column: pl.Series) -> tuple[list[str], np.ndarray]:
    """Distinct strings, sorted, and each row's position among them (-1 = null)."""
    pl = require("polars")
    if column.null_count() == len(column):
        return [], np.full(len(column), -1, np.int32)
    distinct = column.drop_nulls().unique().sort()
    codes = column.cast(pl.Enum(distinct)).to_physical().cast(pl.Int32).fill_null(-1).to_numpy()
    return distinct.to_list(), codes


def _distinct(left: np.ndarray, right: np.ndarray, width: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Distinct (left, right) pairs, and each row's position among them; 0 <= right < width."""
    key = left.astype(np.int64) * width + right
    size = (int(left.max()) + 1) * width
    if size <= _MAX_DENSE_KEYS:
        seen = np.zeros(size, bool)
        seen[key] = True
        distinct = np.flatnonzero(seen)
        place_of = np.empty(size, np.int32)
        place_of[distinct] = np.arange(len(distinct), dtype=np.int32)
        place = place_of[key]
    else:
        distinct, place = np.unique(key, return_inverse=True)
    return [(int(k) // width, int(k) % width) for k in distinct], place


def _sorting(subject: np.ndarray, time: np.ndarray, rank: np.ndarray) -> np.ndarray | None:
    """Stable order by (subject, time, rank), None where the rows stand so already."""
    if len(subject) < 2:
        return None
    later = (subject[1:] > subject[:-1]) | (
        (subject[1:] == subject[:-1]) & ((time[1:] > time[:-1]) | ((time[1:] == time[:-1]) & (rank[1:] >= rank[:-1])))
    )
    return None if later.all() else np.lexsort((rank, time, subject))


def _open_encounters(subject: np.ndarray, visit: np.ndarray, role: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(roles, ends that close nothing dropped; encounters open after each row, per subject)."""
    role = role.copy()
    boundary = np.flatnonzero(role >= _START)
    change = np.where(role[boundary] == _START, 1, -1)
    clipped = boundary[_unmatched_ends(subject[boundary], visit[boundary], change)]
    role[clipped] = _DROPPED
    step = np.zeros(len(role), np.int32)
    step[boundary] = change
    step[clipped] = 0
    total = np.cumsum(step)
    return role, total - np.concatenate([[0], total])[_begin_of_subject(subject)]


def _unmatched_ends(subject: np.ndarray, visit: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Positions of ends (change -1) before which their visit_id has no open encounter (change 1) in their subject."""
    if not len(subject):
        return np.zeros(0, np.int64)
    # Within one (subject, visit_id) the number of open encounters is a walk that does not go below zero.
    order = np.lexsort((visit, subject))  # stable: rows of one visit_id stay in the order of time
    new_group = np.ones(len(order), bool)
    new_group[1:] = (np.diff(subject[order]) != 0) | (np.diff(visit[order]) != 0)
    group = np.cumsum(new_group) - 1
    total = np.cumsum(change[order])
    begin = np.flatnonzero(new_group)
    balance = total - (total[begin] - change[order][begin])[group]
    unmatched: list[int] = []
    for k in np.unique(group[balance < 0]):  # rare: only these groups are walked
        stop = begin[k + 1] if k + 1 < len(begin) else len(order)
        waiting = 0
        for place in order[begin[k] : stop]:
            waiting += int(change[place])
            if waiting < 0:
                waiting = 0
                unmatched.append(int(place))
    return np.asarray(unmatched, np.int64)


def _begin_of_subject(subject: np.ndarray) -> np.ndarray:
    """For each row the place of its subject's first row; rows of a subject stand together."""
    begins = np.flatnonzero(np.diff(subject, prepend=-1))
    return np.repeat(begins, np.diff(np.append(begins, len(subject))))


def _visits(
    subject: np.ndarray,
    time: np.ndarray,
    visit: np.ndarray,
    role: np.ndarray,
    open_after: np.ndarray,
    inpatient: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(whether a row begins a visit, the visit's order from 1 in its subject)."""
    rows = len(subject)
    if not rows:
        return np.zeros(0, bool), np.zeros(0, np.int64)
    place = np.arange(rows)
    same_subject = np.zeros(rows, bool)
    same_subject[1:] = subject[1:] == subject[:-1]
    open_before = np.zeros(rows, np.int64)
    open_before[1:] = open_after[:-1]
    open_before[~same_subject] = 0
    opener = (role == _START) & (open_before == 0)
    outside = (role == _CONTENT) & (open_before == 0)
    day = time // DAY_US
    # 1. The key of implicit visits: the visit_id, or the day where there is none or its encounters have ended before.
    by_visit = outside & (visit >= 0)
    named = np.flatnonzero(by_visit)
    by_visit[named[_ended_before(named, subject, visit, role)]] = False
    by_day = outside & ~by_visit
    continues = np.zeros(rows, bool)
    previous = slice(0, rows - 1)
    continues[1:] = (
        (by_visit[1:] & by_visit[previous] & (visit[1:] == visit[previous]))
        | (by_day[1:] & by_day[previous] & (day[1:] == day[previous]))
        | (opener[1:] & by_visit[previous] & (visit[1:] == visit[previous]))
    )
    # 2. Transfers: an inpatient start on the day on which the previous visit, an admission, closed.
    last_opener = np.maximum.accumulate(np.where(opener, place, -1))
    last_inpatient = np.maximum.accumulate(np.where((role == _START) & inpatient, place, -1))
    closed_admission = (role == _END) & (open_after == 0) & (last_inpatient >= last_opener)
    continues[1:] |= opener[1:] & inpatient[1:] & closed_admission[previous] & (day[1:] == day[previous])
    new = (opener | outside) & ~(continues & same_subject)
    # 3. Visit orders.
    total = np.cumsum(new)
    return new, total - np.concatenate([[0], total])[_begin_of_subject(subject)]


def _ended_before(named: np.ndarray, subject: np.ndarray, visit: np.ndarray, role: np.ndarray) -> np.ndarray:
    """Which of the rows `named` come after an end with their visit_id in their subject."""
    if not len(named):
        return np.zeros(0, bool)
    ends = np.flatnonzero((role == _END) & (visit >= 0))
    width = int(visit.max()) + 1
    key = subject[ends].astype(np.int64) * width + visit[ends]
    distinct, first = np.unique(
        key, return_index=True
    )  # the first end of each visit_id: ends stand in the order of time
    wanted = subject[named].astype(np.int64) * width + visit[named]
    place = np.minimum(np.searchsorted(distinct, wanted), max(0, len(distinct) - 1))
    return (distinct[place] == wanted) & (ends[first[place]] < named) if len(distinct) else np.zeros(len(named), bool)


def _interval_ids(token_ids: dict[str, int], days: np.ndarray) -> np.ndarray:
    """`interval_token` of many."""
    weeks = np.asarray([token_ids[t] for t in WEEKS])
    months = np.asarray([token_ids[t] for t in MONTHS])
    inner = np.where(days < 28, weeks[np.clip(days // 7, 0, 3)], months[np.clip(days // 30, 0, 12)])
    return np.where(days <= 365, inner, token_ids[LONG_TERM])


def _ages_of(time: np.ndarray, birth: np.ndarray) -> np.ndarray:
    """Ages in years, 0 where the birth is unknown or later."""
    years = np.maximum(0.0, (time - np.where(birth == NO_TIME, time, birth)) / YEAR_US)
    return years.astype(np.float32)


def _min_by(group: np.ndarray, value: np.ndarray, count: int) -> np.ndarray:
    """Smallest non-null value of each group, NO_TIME where it has none."""
    out = np.full(count, np.iinfo(np.int64).max)
    has = value != NO_TIME
    np.minimum.at(out, group[has], value[has])
    return np.where(out == np.iinfo(np.int64).max, NO_TIME, out)


def _offsets(group: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(group, minlength=count))])


def coverage_of(events: pl.DataFrame, vocabulary: EventVocabulary) -> dict[str, Any]:
    """Counts of rows by how they were mapped, see `EhrTokenizer.coverage`."""
    table = _Columns(events, vocabulary)
    makes_token = table.token_type > 0
    _, how = table.tokens(makes_token)
    counts = np.bincount(how, minlength=3)
    boundary = (table.role == _START) | (table.role == _END)
    return {
        "exact": int(counts[0]),
        "fallback": int(counts[1]),
        "lost": int(counts[2]),
        "visit_boundaries": int(boundary.sum()),
        "not_used": int((~makes_token & ~boundary).sum()),
    }

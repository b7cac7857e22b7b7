"""The event table as sorted numpy columns, and the token of every row, looked up once for each distinct code.

Strings are looked at only where they can matter: units on rows with a number, texts on rows without one, visit_ids on
the rows that `ehr_encoding.py` asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .ehr_codes import INPATIENT_CLASSES
from .ehr_tables import as_column, check_columns, microseconds, require
from .ehr_visits import KIND_RANKS, RANK_OTHER, RANK_STATIC
from .ehr_vocabulary import EventVocabulary

if TYPE_CHECKING:
    try:  # noqa: SIM105  (guarded, or transformers would ask for polars before it loads this file from a checkpoint)
        import polars as pl
    except ImportError:
        pass

NO_TIME = np.iinfo(np.int64).min
"""Stands for an absent instant (microseconds): a static row, an unknown birth."""
DROPPED, CONTENT, START, END = range(4)
"""Roles of a row in a visit; a dropped one takes no part."""
HOWS = ("exact", "fallback", "lost")
_MAX_DENSE_KEYS = 20_000_000  # (code, unit) pairs up to which a lookup table is indexed directly


class EventColumns:
    """Columns of an event table in the order of the state machine (subject, time, rank, source order).

    Attributes:
        subject: Position of the row's subject among `subject_ids`, int64.
        subject_ids: Distinct subjects, ascending.
        time: Microseconds, `NO_TIME` = static.
        rank: Order inside an instant, see `ehr_visits`.
        role: DROPPED, CONTENT, START or END.
        token_type: Token type, 0 = the row makes no token of its own.
        is_death: Whether the row is a death.
        inpatient: Whether the row starts an inpatient encounter.
    """

    def __init__(self, events: pl.DataFrame, vocabulary: EventVocabulary) -> None:
        pl = require("polars")
        # 1. Columns of the right types.
        what = "the event table"
        events = check_columns(events, ("subject_id", "time", "code"), what)
        frame = events.select(
            as_column(events, "subject_id", pl.Int64, what),
            microseconds(events, "time", what).fill_null(NO_TIME),
            as_column(events, "code", pl.String, what),
            as_column(events, "numeric_value", pl.Float32, what),
            as_column(events, "text_value", pl.String, what),
            as_column(events, "unit", pl.String, what),
            as_column(events, "visit_id", pl.String, what),
        )
        for name in ("subject_id", "code"):
            if frame[name].null_count():
                raise ValueError(f"{frame[name].null_count()} rows of {what} have no {name}; fill or remove them.")
        # 2. What each distinct code is.
        codes, code = _factorize(frame["code"])
        kinds = [vocabulary.kind(c) for c in codes]
        types = [vocabulary.token_type(c) for c in codes]
        roles = [_role(kind, bool(token_type)) for (kind, _), token_type in zip(kinds, types, strict=True)]
        ranks = np.asarray([KIND_RANKS.get(kind, RANK_OTHER) for kind, _ in kinds], np.int8)
        # 3. The order of the rows.
        subject, time = frame["subject_id"].to_numpy(), frame["time"].to_numpy()
        rank = _take(ranks, code)
        rank[time == NO_TIME] = RANK_STATIC
        order = _sorting(subject, time, rank)
        if order is not None:
            frame, code = frame[order], code[order]
            subject, time, rank = subject[order], time[order], rank[order]
        new = np.ones(len(subject), bool)
        np.not_equal(subject[1:], subject[:-1], out=new[1:])
        self.subject_ids, self.subject = subject[new], np.cumsum(new) - 1
        self.time, self.rank = time, rank
        self.role = _take(np.asarray(roles, np.int8), code)
        self.token_type = _take(np.asarray(types, np.int8), code)
        self.is_death = _take(np.asarray([kind == "death" for kind, _ in kinds], bool), code)
        inpatient = [kind == "visit_start" and of_class in INPATIENT_CLASSES for kind, of_class in kinds]
        self.inpatient = _take(np.asarray(inpatient, bool), code)
        self._frame, self._code, self._codes, self._vocabulary = frame, code, codes, vocabulary

    def visit_ids(self, rows: np.ndarray) -> np.ndarray:
        """Numbers that are equal where the visit_ids of these rows are; -1 = null."""
        return _factorize(self._frame["visit_id"][rows])[1]

    def token_ids(self, rows: np.ndarray) -> np.ndarray:
        """Token ids (int32) of these rows."""
        return self.tokens(rows)[0]

    def tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, how int8: 0 exact, 1 fallback, 2 lost) of these rows (ascending positions)."""
        code = self._code[rows]
        bare = [self._vocabulary.code_id(c) for c in self._codes]
        ids = _take(np.asarray([token for token, _ in bare], np.int32), code)
        how = _take(np.asarray([HOWS.index(name) for _, name in bare], np.int8), code)

        value = self._frame["numeric_value"].to_numpy()[rows]  # null -> NaN
        finite = np.isfinite(value)
        number = np.flatnonzero(finite)
        if len(number):
            units, unit = _factorize(self._frame["unit"])
            pairs, place = _distinct(code[number], unit[rows[number]] + 1, len(units) + 1)
            id_table, how_table, edges = self._bins(pairs, units)
            value = value[number]
            bin_of = np.zeros(len(number), np.int32)
            for column in edges.T:  # a value on an edge belongs to the bin below it
                bin_of += value > column[place]
            cell = place * id_table.shape[1] + bin_of
            ids[number], how[number] = id_table.ravel()[cell], how_table.ravel()[cell]

        text = self._frame["text_value"]
        if text.null_count() < len(text):
            with_text = np.flatnonzero(text.is_not_null().to_numpy()[rows] & ~finite)
            texts, text_code = _factorize(text[rows[with_text]])
            has_text = _take(np.asarray([bool(t) for t in texts], bool), text_code)
            with_text, text_code = with_text[has_text], text_code[has_text]
            if len(with_text):
                pairs, place = _distinct(code[with_text], text_code, len(texts))
                found = [self._vocabulary.text_id(self._codes[c], texts[t]) for c, t in pairs]
                ids[with_text] = np.asarray([token for token, _ in found], np.int32)[place]
                how[with_text] = np.asarray([HOWS.index(name) for _, name in found], np.int8)[place]
        return ids, how

    def _bins(self, pairs: list[tuple[int, int]], units: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bins of distinct (code, unit + 1) pairs.

        Returns:
            ids and hows [pairs, bins], inner edges [pairs, bins - 1] padded with NaN, which no value exceeds.
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
                ids[row, k], how[row, k] = token, HOWS.index(name)
        return ids, how, edges


def coverage_of(events: pl.DataFrame, vocabulary: EventVocabulary) -> dict[str, Any]:
    """Counts of rows by how they were mapped, see `EhrTokenizer.coverage`."""
    table = EventColumns(events, vocabulary)
    makes_token = table.token_type > 0
    counts = np.bincount(table.tokens(np.flatnonzero(makes_token))[1], minlength=3)
    boundary = (table.role == START) | (table.role == END)
    return {
        "exact": int(counts[0]),
        "fallback": int(counts[1]),
        "lost": int(counts[2]),
        "visit_boundaries": int(boundary.sum()),
        "not_used": int((~makes_token & ~boundary).sum()),
    }


def _role(kind: str, makes_token: bool) -> int:
    if kind == "visit_start":
        return START
    if kind == "visit_end":
        return END
    return CONTENT if makes_token else DROPPED


def _take(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """values[places], also where there are none."""
    return values[places] if len(values) else np.zeros(len(places), values.dtype)


def _factorize(column: pl.Series) -> tuple[list[str], np.ndarray]:
    """Distinct strings, and each row's position among them (-1 = null)."""
    pl = require("polars")
    if column.null_count() == len(column):
        return [], np.full(len(column), -1, np.int32)
    coded = column.cast(pl.Categorical(pl.Categories.random()))  # categories of its own: places count from 0
    physical = coded.to_physical().cast(pl.Int32)
    places = (physical.fill_null(-1) if physical.null_count() else physical).to_numpy()
    row_of = np.empty(int(places.max()) + 2, np.int64)
    row_of[places] = np.arange(len(places))  # nulls fall on the last entry
    return column[row_of[:-1]].to_list(), places


def _distinct(left: np.ndarray, right: np.ndarray, width: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Distinct (left, right) pairs, and each row's position among them; 0 <= right < width."""
    size = (int(left.max()) + 1) * width
    if size <= _MAX_DENSE_KEYS:
        key = left * np.int32(width) + right
        seen = np.zeros(size, bool)
        seen[key] = True
        distinct = np.flatnonzero(seen)
        place_of = np.empty(size, np.int32)
        place_of[distinct] = np.arange(len(distinct), dtype=np.int32)
        place = place_of[key]
    else:
        distinct, place = np.unique(left.astype(np.int64) * width + right, return_inverse=True)
    return [(int(k) // width, int(k) % width) for k in distinct], place


def _sorting(subject: np.ndarray, time: np.ndarray, rank: np.ndarray) -> np.ndarray | None:
    """Stable order by (subject, time, rank), None where the rows stand so already."""
    if len(subject) < 2:
        return None
    later = subject[1:] > subject[:-1]
    same = subject[1:] == subject[:-1]
    if (later | same).all():
        within = (time[1:] > time[:-1]) | ((time[1:] == time[:-1]) & (rank[1:] >= rank[:-1]))
        if (later | within).all():
            return None
    return np.lexsort((rank, time, subject))

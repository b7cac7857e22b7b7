"""The event table as sorted numpy columns, and the token of every row, looked up once for each distinct code.

Strings become numbers once, codes and units side by side on two threads; visit_ids are only ever compared, so that
64-bit hashes stand for them, and texts matter on rows without a number alone.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from ehrseq.data.tables import as_column, check_columns, microseconds
from ehrseq.tokenization.ehr_codes import INPATIENT_CLASSES, KIND_RANKS, RANK_OTHER, RANK_STATIC
from ehrseq.tokenization.ehr_rows import NO_TIME
from ehrseq.tokenization.ehr_visits import silence_us
from ehrseq.tokenization.ehr_vocabulary import EventVocabulary

REQUIRED = ("subject_id", "time", "code")
"""Columns that an event table must have."""
DROPPED, CONTENT, START, END = range(4)
"""Roles of a row in a visit; a dropped one takes no part."""
INFO = np.dtype([("role", np.int8), ("type", np.int8), ("death", bool), ("inpatient", bool)])
"""What is known of a code."""
HOWS = ("exact", "fallback", "lost")
_MAX_DENSE_KEYS = 20_000_000  # (code, unit) pairs up to which a lookup table is indexed directly


class EventColumns:
    """Columns of an event table in the order of the state machine (subject, time, rank, source order).

    Attributes:
        subject: Position of the row's subject among `subject_ids`, int64.
        subject_ids: Distinct subjects, ascending.
        begins: First row of each subject, and the number of rows.
        time: Microseconds, `NO_TIME` = static.
        rank: Order inside an instant, see `ehr_visits`.
        role: DROPPED, CONTENT, START or END.
        token_type: Token type, 0 = the row makes no token of its own.
        visit: Hash of the visit_id, uint64: equal where the visit_ids are.
        has_visit: Whether there is a visit_id.
        is_death: Whether the row is a death.
        inpatient: Whether the row starts an inpatient encounter.
    """

    def __init__(self, events: pl.DataFrame, vocabulary: EventVocabulary) -> None:
        # 1. Columns of the right types.
        what = "the event table"
        events = check_columns(events, REQUIRED, what)
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
        coded = frame.lazy().select(_code("code"), _code("unit"), pl.col("visit_id").hash()).collect()
        codes, code = _names(frame["code"], coded["code"])
        self._units, unit = _names(frame["unit"], coded["unit"])
        kinds = [vocabulary.kind(c) for c in codes]
        types = [vocabulary.token_type(c) for c in codes]
        info = np.zeros(len(codes), INFO)
        info["role"] = [_role(kind, bool(token)) for (kind, _), token in zip(kinds, types, strict=True)]
        info["type"] = types
        info["death"] = [kind == "death" for kind, _ in kinds]
        info["inpatient"] = [kind == "visit_start" and of_class in INPATIENT_CLASSES for kind, of_class in kinds]
        self._silence = np.asarray([silence_us(of_class) for _, of_class in kinds], np.int64)
        ranks = np.asarray([KIND_RANKS.get(kind, RANK_OTHER) for kind, _ in kinds], np.int8)
        # 3. The order of the rows.
        subject, time = frame["subject_id"].to_numpy(), frame["time"].to_numpy()
        visit, text = coded["visit_id"].to_numpy(), frame["text_value"]
        has_visit = frame["visit_id"].is_not_null().to_numpy()
        value = frame["numeric_value"].to_numpy()  # null -> NaN
        rank = _take(ranks, code)
        rank[time == NO_TIME] = RANK_STATIC
        order = _sorting(subject, time, rank)
        if order is not None:
            subject, time, rank, code, unit = subject[order], time[order], rank[order], code[order], unit[order]
            visit, has_visit, value, text = visit[order], has_visit[order], value[order], text[order]
        new = np.ones(len(subject), bool)
        np.not_equal(subject[1:], subject[:-1], out=new[1:])
        self.subject_ids, self.subject = subject[new], np.cumsum(new) - 1
        self.begins = np.append(np.flatnonzero(new), len(new))
        self.time, self.rank, self.visit, self.has_visit = time, rank, visit, has_visit
        described = _take(info, code)
        self.role, self.token_type = described["role"].copy(), described["type"].copy()
        self.is_death, self.inpatient = described["death"], described["inpatient"]
        self._code, self._unit, self._value, self._text = code, unit, value, text
        self._codes, self._vocabulary = codes, vocabulary

    def token_ids(self) -> np.ndarray:
        """Token of every row, int32; of no use where a row makes no token."""
        return self._looked_up(0, np.int32)

    def hows(self) -> np.ndarray:
        """How every row found its token, int8: 0 exact, 1 fallback, 2 lost."""
        return self._looked_up(1, np.int8)

    def _looked_up(self, which: int, dtype: type[np.generic]) -> np.ndarray:
        """Of every row the one or the other of what the vocabulary says: token (0), how (1)."""
        code, value, text = self._code, self._value, self._text

        def answers(mapped: list[tuple[int, str]]) -> np.ndarray:
            return np.asarray([HOWS.index(name) if which else token for token, name in mapped], dtype)

        out = _take(answers([self._vocabulary.code_id(c) for c in self._codes]), code)
        finite = np.isfinite(value)
        number = np.flatnonzero(finite)
        if len(number):
            pairs, place = distinct_pairs(code[number], self._unit[number] + 1, len(self._units) + 1)
            in_bins, edges = self._bins(pairs, self._units)
            numbers = value[number]
            cell = place * np.int32(edges.shape[1] + 1)
            for column in edges.T:  # a value on an edge belongs to the bin below it
                cell += numbers > column[place]
            out[number] = answers(in_bins)[cell]

        if text.null_count() < len(text):
            with_text = np.flatnonzero(text.is_not_null().to_numpy() & ~finite)
            texts, text_code = factorize(text[with_text])
            has_text = _take(np.asarray([bool(t) for t in texts], bool), text_code)
            with_text, text_code = with_text[has_text], text_code[has_text]
            if len(with_text):
                pairs, place = distinct_pairs(code[with_text], text_code, len(texts))
                out[with_text] = answers([self._vocabulary.text_id(self._codes[c], texts[t]) for c, t in pairs])[place]
        return out

    def silence(self, rows: np.ndarray) -> np.ndarray:
        """Of rows that start an encounter the silence (microseconds) after which it lapses."""
        return _take(self._silence, self._code[rows])

    def _bins(self, pairs: list[tuple[int, int]], units: list[str]) -> tuple[list[tuple[int, str]], np.ndarray]:
        """Bins of distinct (code, unit + 1) pairs.

        Returns:
            (token, how) of every bin, pair after pair, as many for each; inner edges [pairs, bins - 1] padded with NaN,
            which no value exceeds.
        """
        codes = [self._codes[c] for c, _ in pairs]
        bins_of = [
            self._vocabulary.bins(code, units[u - 1] if u else None) for code, (_, u) in zip(codes, pairs, strict=True)
        ]
        width = max((len(bins.edges) for bins in bins_of if bins is not None), default=0)
        edges = np.full((len(pairs), width), np.nan, np.float32)
        mapped: list[tuple[int, str]] = []
        for row, (code, bins) in enumerate(zip(codes, bins_of, strict=True)):
            inner = 0 if bins is None else len(bins.edges)
            if bins is not None:
                edges[row, :inner] = bins.edges
            # Bins beyond those of the pair hold nothing.
            mapped += [self._vocabulary.bin_id(code, bins, min(number, inner)) for number in range(width + 1)]
        return mapped, edges


def _role(kind: str, makes_token: bool) -> int:
    if kind == "visit_start":
        return START
    if kind == "visit_end":
        return END
    return CONTENT if makes_token else DROPPED


def _take(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """values[places], also where there are none."""
    return values[places] if len(values) else np.zeros(len(places), values.dtype)


def _code(name: str) -> pl.Expr:
    """A string column as numbers from 0 on, in the order of first appearance."""
    categories = pl.Categories.random()  # of its own, so that the numbers are dense
    return pl.col(name).cast(pl.Categorical(categories)).to_physical().cast(pl.Int32)


def _names(column: pl.Series, coded: pl.Series) -> tuple[list[str], np.ndarray]:
    """Distinct strings, and each row's position among them (-1 = null)."""
    places = (coded.fill_null(-1) if coded.null_count() else coded).to_numpy()
    row_of = np.empty(int(places.max(initial=-1)) + 2, np.int64)
    row_of[places] = np.arange(len(places))  # nulls fall on the last entry
    return column[row_of[:-1]].to_list(), places


def factorize(column: pl.Series) -> tuple[list[str], np.ndarray]:
    """Distinct strings of a column, and each row's position among them (-1 = null)."""
    return _names(column, column.to_frame("strings").select(_code("strings"))["strings"])


def distinct_pairs(left: np.ndarray, right: np.ndarray, width: int) -> tuple[list[tuple[int, int]], np.ndarray]:
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

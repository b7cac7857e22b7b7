"""What a vocabulary is selected from: counts of codes and of text results, and quantiles of values, by (code, unit).

Counts are taken block by block, merged, and written down in between, so that a dataset of any size needs one pass and
bounded memory. Blocks hold whole subjects, and no subject stands in two of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from ehrseq.data.tables import as_column
from ehrseq.encode.columns import distinct_pairs, factorize
from ehrseq.encode.sketches import QuantileSketches, ordered
from ehrseq.tokenization.ehr_codes import DEFAULT_CODE_MAP, code_kinds, resolve_input_kinds, split_kind
from ehrseq.tokenization.ehr_vocabulary import MAX_TEXT_LENGTH, enters

_MAX_TEXTS = 1_000_000  # (code, text) pairs that are kept; beyond twice as many the rarest are forgotten
_TEXT_COUNTS = ("rows", "subjects")


class EventCounts:
    """Counts of event tables.

    Args:
        input_kinds: Preset or kinds, see `resolve_input_kinds`; rows of other kinds are not counted.
        code_map: See `code_kinds`.
        max_values: Distinct values of a (code, unit) up to which its quantiles are exact, see `sketches`; None =
            always, with memory for every distinct value and every distinct text.
    """

    def __init__(
        self,
        *,
        input_kinds: str | Iterable[str] | None = None,
        code_map: Sequence[Sequence[str]] | None = None,
        max_values: int | None = None,
    ) -> None:
        self.kinds = resolve_input_kinds(input_kinds)
        self.code_map = [list(pair) for pair in (DEFAULT_CODE_MAP if code_map is None else code_map)]
        code_kinds([], self.code_map)  # says what is wrong with it before anything is counted
        self.num_rows = 0
        self.rows: dict[str, int] = {}
        self.values = QuantileSketches(max_values)
        self.pairs: dict[tuple[str, str], int] = {}
        self.forgotten = dict.fromkeys(_TEXT_COUNTS, 0)
        self._kind_of: dict[str, str | None] = {}
        self._texts: list[pl.DataFrame] = []
        self._subjects: list[np.ndarray] = []

    def kind(self, code: str) -> str | None:
        """Kind of a code whose rows make a token, None of others."""
        if code not in self._kind_of:
            kind, encounter_class = split_kind(code_kinds([code], self.code_map)[0])
            self._kind_of[code] = kind if enters(code, kind, encounter_class, self.kinds) else None
        return self._kind_of[code]

    @property
    def subjects(self) -> np.ndarray:
        """Distinct subjects, ascending, of rows of any kind."""
        return np.unique(np.concatenate(self._subjects)) if self._subjects else np.zeros(0, np.int64)

    def add(self, events: pl.DataFrame) -> None:
        """Count a table of whole subjects; its rows in any order, optional columns may be absent."""
        self.num_rows += events.height
        subject = events["subject_id"].cast(pl.Int64)
        ids = subject.drop_nulls().to_numpy()
        self._subjects.append(
            np.unique(ids) if (ids[1:] < ids[:-1]).any() else ids[np.diff(ids, prepend=~ids[:1]) != 0]
        )
        frame = events.select(
            pl.col("code").cast(pl.String),
            as_column(events, "numeric_value", pl.Float32, "events"),
            as_column(events, "text_value", pl.String, "events"),
            as_column(events, "unit", pl.String, "events").replace("", None),
        )
        # 1. Rows of each code.
        codes, code = factorize(frame["code"])
        used = np.asarray([self.kind(name) is not None for name in codes] + [False])  # the last: rows without code
        for name, count in zip(codes, np.bincount(code[code >= 0], minlength=len(codes)).tolist(), strict=True):
            if self.kind(name) is not None:
                self.rows[name] = self.rows.get(name, 0) + count
        enters_token = used[code]
        # 2. Values.
        value = frame["numeric_value"].to_numpy()
        finite = np.isfinite(value)
        number = np.flatnonzero(finite & enters_token)
        if len(number):
            units, unit = factorize(frame["unit"])
            pairs, place = distinct_pairs(code[number], unit[number] + 1, len(units) + 1)
            names = [(codes[c], units[u - 1] if u else "") for c, u in pairs]
            groups = np.asarray([self.pairs.setdefault(name, len(self.pairs)) for name in names], np.int64)
            self.values.add(groups[place], value[number])
        # 3. Texts of rows without a value.
        text = frame["text_value"]
        if text.null_count() < len(text):
            self._add_texts(text, subject, codes, code, ~finite & enters_token)

    def _add_texts(
        self, text: pl.Series, subject: pl.Series, codes: list[str], code: np.ndarray, wanted: np.ndarray
    ) -> None:
        rows = np.flatnonzero(text.is_not_null().to_numpy() & wanted)
        texts, place = factorize(text[rows])
        is_result = np.asarray([bool(t) and len(t) <= MAX_TEXT_LENGTH for t in texts], bool)
        if not is_result.any():
            return
        of_result = is_result[place]
        rows, place = rows[of_result], place[of_result]
        # Each subject of a pair once: sorted pairs of (pair, subject).
        pairs, pair = distinct_pairs(code[rows], place, len(texts))
        _, person = np.unique(subject[rows].to_numpy(), return_inverse=True)
        both = ordered(pair.astype(np.int64) * (int(person.max()) + 1) + person)
        once = both[np.diff(both, prepend=-1) != 0] // (int(person.max()) + 1)
        self._texts.append(
            pl.DataFrame(
                {
                    "code": [codes[c] for c, _ in pairs],
                    "text": [texts[t] for _, t in pairs],
                    "rows": np.bincount(pair, minlength=len(pairs)),
                    "subjects": np.bincount(once, minlength=len(pairs)),
                }
            )
        )
        self._forget()

    def texts(self) -> pl.DataFrame:
        """(code, text, rows, subjects) of every text result, sorted; counts may be too low by `forgotten`."""
        if len(self._texts) != 1:
            schema = {"code": pl.String, "text": pl.String, **dict.fromkeys(_TEXT_COUNTS, pl.Int64)}
            together = pl.concat([pl.DataFrame(schema=schema), *self._texts])
            self._texts = [together.group_by("code", "text").agg(pl.col(*_TEXT_COUNTS).sum())]
        return self._texts[0].sort("code", "text")

    def _forget(self) -> None:
        """Keep the most frequent texts where there are too many (lossy counting: what it can cost is added up)."""
        if self.values.size is None or sum(frame.height for frame in self._texts) <= 2 * _MAX_TEXTS:
            return
        texts = self.texts()
        if texts.height > _MAX_TEXTS:
            texts = texts.sort("subjects", "rows", "code", "text", descending=[True, True, False, False])
            for name in _TEXT_COUNTS:
                self.forgotten[name] += int(texts[name][_MAX_TEXTS:].to_numpy().max())
            texts = texts[:_MAX_TEXTS]
        self._texts = [texts]

    def merge(self, other: EventCounts) -> None:
        """Add the counts of other subjects, taken with the same settings."""
        self.num_rows += other.num_rows
        for code, count in other.rows.items():
            self.rows[code] = self.rows.get(code, 0) + count
        groups = [self.pairs.setdefault(pair, len(self.pairs)) for pair in other.pairs]
        self.values.merge(other.values, np.asarray(groups, np.int64))
        for name, count in other.forgotten.items():
            self.forgotten[name] += count
        self._texts += other._texts
        self._forget()
        self._subjects += other._subjects

    def state(self) -> dict[str, np.ndarray]:
        """Arrays that `from_state` makes the same counts of."""
        names = {
            "num_rows": self.num_rows,
            "rows": self.rows,
            "pairs": list(self.pairs),
            "forgotten": self.forgotten,
            "texts": self.texts().to_dict(as_series=False),
        }
        return {
            "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
            "subjects": self.subjects,
            **self.values.state(),
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray], **settings: Any) -> EventCounts:
        """The inverse of `state`; the settings are those that it was counted with."""
        counts = cls(**settings)
        names = json.loads(state["names"].tobytes().decode())
        counts.num_rows, counts.rows, counts.forgotten = names["num_rows"], names["rows"], names["forgotten"]
        counts.pairs = {(code, unit): k for k, (code, unit) in enumerate(names["pairs"])}
        schema = {"code": pl.String, "text": pl.String, **dict.fromkeys(_TEXT_COUNTS, pl.Int64)}
        counts._texts = [pl.DataFrame(names["texts"], schema=schema)]
        counts._subjects = [state["subjects"]]
        sketches = {name: array for name, array in state.items() if name not in ("names", "subjects")}
        counts.values = QuantileSketches.from_state(sketches, counts.values.size)
        return counts

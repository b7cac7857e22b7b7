"""From a row of the event table to a token: special tokens, value bins, text results, and the fallbacks of rare codes.

A row becomes the first of these tokens that the vocabulary holds:

    number   `CODE//UNIT_k` (`CODE_k` without a unit), k the value's bin   -> CODE -> its parents -> [UNK]
    text     `CODE//TEXT`                                                  -> CODE -> its parents -> [UNK]
    neither  `CODE`                                                               -> its parents -> [UNK]

A value in a unit that was never seen falls back to its bare code: another unit's bins would say something false. Bins
are bounded by quantiles of the training values (a value on an edge belongs to the bin below it); the outer ones are
open, so that no value lies outside. NaN and infinite values count as missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .ehr_codes import DEFAULT_CODE_MAP, category_and_chapter, code_kinds, code_parents, resolve_input_kinds, split_kind

if TYPE_CHECKING:
    import polars as pl

PAD, UNK, MASK, CLS, VS, VE, REG = "[PAD]", "[UNK]", "[MASK]", "[CLS]", "[VS]", "[VE]", "[REG]"
WEEKS = [f"[W_{k}]" for k in range(4)]
MONTHS = [f"[M_{k}]" for k in range(13)]
LONG_TERM = "[LT]"
SPECIAL_TOKENS = [PAD, UNK, MASK, CLS, VS, VE, REG, *WEEKS, *MONTHS, LONG_TERM]
"""The paper's special tokens (appendix D) in the order of their ids; event tokens follow, task tokens stand last."""

# Token types: 0-8 are the reference implementation's, 9-12 this package's.
TYPE_PAD, TYPE_CLS, TYPE_VS, TYPE_VE, TYPE_INTERVAL, TYPE_LAB, TYPE_MEDICATION, TYPE_PROCEDURE, TYPE_REG = range(9)
TYPE_DIAGNOSIS, TYPE_VITAL, TYPE_OTHER, TYPE_STATIC = range(9, 13)
KIND_TYPES = {
    "lab": TYPE_LAB,
    "medication": TYPE_MEDICATION,
    "procedure": TYPE_PROCEDURE,
    "diagnosis": TYPE_DIAGNOSIS,
    "vital": TYPE_VITAL,
    "other": TYPE_OTHER,
    "static": TYPE_STATIC,
    "death": TYPE_OTHER,
}
SPECIAL_TYPES = {PAD: TYPE_PAD, CLS: TYPE_CLS, VS: TYPE_VS, VE: TYPE_VE, REG: TYPE_REG} | dict.fromkeys(
    [*WEEKS, *MONTHS, LONG_TERM], TYPE_INTERVAL
)

DAY_US = 86_400_000_000
MAX_TEXT_LENGTH = 64
"""Longer text results are prose, not results: the row keeps its bare code."""


def interval_token(days: int) -> str:
    """Token of the time between two visits (paper, section 2.1 and appendix D).

    >>> [interval_token(d) for d in (0, 27, 28, 365, 366)]
    ['[W_0]', '[W_3]', '[M_0]', '[M_12]', '[LT]']
    """
    if days < 28:
        return WEEKS[days // 7]
    return MONTHS[days // 30] if days <= 365 else LONG_TERM


def base_token(code: str, unit: str | None) -> str:
    """What a numeric code is called before its bin: one (code, unit) pair has bins of its own."""
    return f"{code}//{unit}" if unit else code


@dataclass
class EventVocabulary:
    """Everything that turns a row into a token id; saved with the tokenizer as JSON.

    Attributes:
        token_ids: Token -> id, special and task tokens included.
        value_bins: (code or code//unit) -> inner bin edges, ascending, float32 values.
        kinds: Kinds that enter a sequence.
        code_map: [regular expression, kind] pairs that say a code's kind.
    """

    token_ids: dict[str, int]
    value_bins: dict[str, list[float]]
    kinds: list[str]
    code_map: list[list[str]]
    _kind_of: dict[str, tuple[str, str | None]] = field(default_factory=dict, repr=False)
    _id_of_code: dict[str, tuple[int, str]] = field(default_factory=dict, repr=False)
    _edges: dict[str, Any] = field(default_factory=dict, repr=False)

    def kind(self, code: str) -> tuple[str, str | None]:
        """(kind, encounter class or None) of a code."""
        found = self._kind_of.get(code)
        if found is None:
            found = self._kind_of[code] = split_kind(code_kinds([code], self.code_map)[0])
        return found

    def code_id(self, code: str) -> tuple[int, str]:
        """(id, "exact" | "fallback" | "lost") of a bare code."""
        found = self._id_of_code.get(code)
        if found is None:
            exact = self.token_ids.get(code)
            if exact is not None:
                found = (exact, "exact")
            else:
                parent = next((self.token_ids[p] for p in code_parents(code) if p in self.token_ids), None)
                found = (self.token_ids[UNK], "lost") if parent is None else (parent, "fallback")
            self._id_of_code[code] = found
        return found

    def text_id(self, code: str, text: str) -> tuple[int, str]:
        """(id, how) of a text result."""
        exact = self.token_ids.get(f"{code}//{text}")
        return (exact, "exact") if exact is not None else _inexact(self.code_id(code), text)

    def edges(self, base: str) -> Any:
        """Inner edges of a (code, unit) pair as float32 array, or None where it has no bins."""
        if base not in self._edges:
            found = self.value_bins.get(base)
            self._edges[base] = None if found is None else np.asarray(found, dtype=np.float32)
        return self._edges[base]

    def value_id(self, code: str, unit: str | None, value: float) -> tuple[int, str]:
        """(id, how) of a finite numeric value."""
        base = base_token(code, unit)
        edges = self.edges(base)
        if edges is not None:
            k = int(np.searchsorted(edges, np.float32(value), side="left"))
            exact = self.token_ids.get(f"{base}_{k}")
            if exact is not None:
                return exact, "exact"
        found = self.code_id(code)
        return _inexact(found, value)

    def row_id(self, code: str, value: float | None, text: str | None, unit: str | None) -> tuple[int, str]:
        """(id, how) of any row, the whole rule of the module's text."""
        if value is not None and np.isfinite(np.float32(value)):
            return self.value_id(code, unit, value)
        if text:
            return self.text_id(code, text)
        return self.code_id(code)


def _inexact(found: tuple[int, str], _result: object) -> tuple[int, str]:
    """A row whose result is not in the vocabulary is mapped by its bare code, which loses the result: a fallback."""
    return (found[0], "fallback") if found[1] == "exact" else found


def fit_vocabulary(
    events: pl.DataFrame,
    *,
    num_value_bins: int,
    min_count: int,
    min_text_count: int,
    max_vocab_size: int | None,
    task_tokens: Sequence[str],
    input_kinds: str | Iterable[str] | None,
    code_map: Sequence[Sequence[str]] | None,
) -> tuple[EventVocabulary, list[int]]:
    """Count, bin and select; deterministic in the events as a set.

    Args:
        events: Event table, any order.
        num_value_bins: Bins of a (code, unit) pair; fewer where its values have ties.
        min_count: Rows that a token needs.
        min_text_count: Rows that a text result needs: rare free text may identify a patient.
        max_vocab_size: Bound on all tokens; the most frequent event tokens stay.
        task_tokens: Tokens of the tasks; they take the last ids.
        input_kinds: Preset or kinds, see `resolve_input_kinds`.
        code_map: See `code_kinds`.

    Returns:
        The vocabulary, and the token type of each id.
    """
    import polars as pl

    kinds = resolve_input_kinds(input_kinds)
    rules = [list(pair) for pair in (DEFAULT_CODE_MAP if code_map is None else code_map)]
    codes = events["code"].cast(pl.String).unique().drop_nulls().sort().to_list()
    kind_of = {code: split_kind(kind)[0] for code, kind in zip(codes, code_kinds(codes, rules), strict=True)}
    content = {code: kind for code, kind in kind_of.items() if kind in kinds and kind in KIND_TYPES}
    rows = (
        events.lazy()
        .select(
            pl.col("code").cast(pl.String),
            column_or_null(events, "numeric_value", pl.Float32),
            column_or_null(events, "text_value", pl.String),
            column_or_null(events, "unit", pl.String),
        )
        .filter(pl.col("code").is_in(list(content)))
        .with_columns(pl.when(pl.col("numeric_value").is_finite()).then(pl.col("numeric_value")))
        .with_columns(base=base_expression())
    )
    numbers = rows.filter(pl.col("numeric_value").is_not_null())
    quantiles = [k / num_value_bins for k in range(1, num_value_bins)]
    binned = (
        numbers.group_by("base", "code")
        .agg(*(pl.col("numeric_value").quantile(q, "lower").alias(str(k)) for k, q in enumerate(quantiles)))
        .sort("base")
        .collect()
    )
    value_bins: dict[str, list[float]] = {}
    for base, _code, *edges in binned.iter_rows():
        value_bins[base] = sorted({float(np.float32(edge)) for edge in edges})
    value_counts = numbers.group_by("base", "code").len().collect()
    text_counts = (
        rows.filter(pl.col("numeric_value").is_null() & pl.col("text_value").is_not_null())
        .filter((pl.col("text_value").str.len_chars() <= MAX_TEXT_LENGTH) & (pl.col("text_value") != ""))
        .group_by("code", "text_value")
        .len()
        .collect()
    )
    code_counts = rows.group_by("code").len().collect()

    # 1. Candidates: token -> (rows, kind). A quantile bin holds about its share of the rows, which is count enough to
    # select by.
    candidates: dict[str, tuple[int, str]] = {}
    for code, count in code_counts.iter_rows():
        if count >= min_count:
            candidates[code] = (count, content[code])
        for parent in category_and_chapter(code):
            known = candidates.get(parent, (0, ""))[0]
            candidates[parent] = (known + count, content[code])
    for base, code, count in value_counts.iter_rows():
        if count >= min_count:
            share = count // (len(value_bins[base]) + 1)
            for k in range(len(value_bins[base]) + 1):
                candidates[f"{base}_{k}"] = (share, content[code])
        else:
            del value_bins[base]
    for code, text, count in text_counts.iter_rows():
        if count >= max(min_count, min_text_count):
            candidates.setdefault(f"{code}//{text}", (count, content[code]))
    for token in SPECIAL_TOKENS:
        candidates.pop(token, None)

    # 2. Selection by frequency, ids by name: the same rows give the same ids in any order.
    chosen = sorted(candidates)
    if max_vocab_size is not None:
        room = max_vocab_size - len(SPECIAL_TOKENS) - len(task_tokens)
        if room < 0:
            raise ValueError(
                f"max_vocab_size={max_vocab_size} is smaller than the {len(SPECIAL_TOKENS)} special and {len(task_tokens)} task tokens; "
                f"give at least {len(SPECIAL_TOKENS) + len(task_tokens)}."
            )
        chosen = sorted(sorted(chosen, key=lambda token: (-candidates[token][0], token))[:room])
    tokens = [*SPECIAL_TOKENS, *chosen, *task_tokens]
    types = [
        *(SPECIAL_TYPES.get(token, TYPE_OTHER) for token in SPECIAL_TOKENS),
        *(KIND_TYPES[candidates[token][1]] for token in chosen),
        *(TYPE_CLS for _ in task_tokens),
    ]
    token_ids = {token: i for i, token in enumerate(tokens)}
    return EventVocabulary(token_ids, value_bins, kinds, rules), types


def column_or_null(events: pl.DataFrame, name: str, dtype: Any) -> pl.Expr:
    """An optional column of the event table, nulls where the table lacks it."""
    import polars as pl

    return (pl.col(name) if name in events.columns else pl.lit(None)).cast(dtype).alias(name)


def base_expression() -> pl.Expr:
    """`base_token` of the columns `code` and `unit`."""
    import polars as pl

    has_unit = pl.col("unit").is_not_null() & (pl.col("unit") != "")
    return pl.when(has_unit).then(pl.concat_str("code", pl.lit("//"), "unit")).otherwise(pl.col("code"))

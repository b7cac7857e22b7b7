"""From a row of the event table to a token: special tokens, value bins, text results, and the fallbacks of rare codes.

A row becomes the first of these tokens that the vocabulary holds:

    number   `CODE//UNIT_k` (`CODE_k` without a unit), k the value's bin   -> CODE -> its parents -> [UNK]
    text     `CODE//TEXT`                                                  -> CODE -> its parents -> [UNK]
    neither  `CODE`                                                               -> its parents -> [UNK]

Bins are bounded by quantiles of the training values (a value on an edge belongs to the bin below it); the outer ones
are open, so that no value lies outside. NaN and infinite values count as missing. A unit is found in any spelling
(case, spaces); a value without a unit takes the bins of its code's only unit; a value in a unit that was never seen
falls back to its bare code, since another unit's bins would say something false.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .ehr_codes import code_kinds, code_parents, split_kind

PAD, UNK, MASK, CLS, VS, VE, REG = "[PAD]", "[UNK]", "[MASK]", "[CLS]", "[VS]", "[VE]", "[REG]"
WEEKS = [f"[W_{k}]" for k in range(4)]
MONTHS = [f"[M_{k}]" for k in range(13)]
LONG_TERM = "[LT]"
SPECIAL_TOKENS = [PAD, UNK, MASK, CLS, VS, VE, REG, *WEEKS, *MONTHS, LONG_TERM]
"""The paper's special tokens (appendix D) in the order of their ids; event tokens follow, task tokens stand last."""

PAPER_TASK_TOKENS = {
    "mortality_30d": "[MOR_1M]",
    "long_stay_7d": "[LOS_1W]",
    "readmission_30d": "[REA_1M]",
    "hypertension": "[C0]",
    "fluid_disorder": "[C1]",
    "lipid_disorder": "[C2]",
}
"""Task tokens of the paper (section 3.3); other tasks are named with their own token."""

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
    "visit_start": TYPE_OTHER,
    "visit_end": TYPE_OTHER,
}
SPECIAL_TYPES = {PAD: TYPE_PAD, CLS: TYPE_CLS, VS: TYPE_VS, VE: TYPE_VE, REG: TYPE_REG} | dict.fromkeys(
    [*WEEKS, *MONTHS, LONG_TERM], TYPE_INTERVAL
)

_TOO_LARGE = (2 - 2**-24) * 2.0**127  # from here on single precision rounds to infinity
MAX_TEXT_LENGTH = 64
"""Longer text results are prose, not results: the row keeps its bare code."""

TABLES_NEED_PACKAGE = "tables of events need the package: pip install ehrseq. One patient as a dict works without it."
"""What is said where a checkpoint's code is asked for a table and ehrseq is not installed."""


def interval_token(days: int) -> str:
    """Token of the time between two visits (paper, section 2.1 and appendix D).

    >>> [interval_token(d) for d in (0, 27, 28, 365, 366)]
    ['[W_0]', '[W_3]', '[M_0]', '[M_12]', '[LT]']
    """
    if days < 28:
        return WEEKS[days // 7]
    return MONTHS[days // 30] if days <= 365 else LONG_TERM


INTERVAL_STARTS = np.asarray([7, 14, 21, 28, *range(30, 361, 30), 366])
"""Days at which each interval token but the shortest begins."""


def bin_token(code: str, unit: str, k: int) -> str:
    """Name of bin k of a (code, unit) pair, '' standing for no unit.

    >>> bin_token("LAB//LOINC//2345-7", "mg/dL", 4)
    'LAB//LOINC//2345-7//mg/dL_4'
    """
    return f"{code}//{unit}_{k}" if unit else f"{code}_{k}"


def enters(code: str, kind: str, encounter_class: str | None, kinds: Sequence[str]) -> bool:
    """Whether rows of a code make a token of their own.

    A visit's end makes one only where it says more than its class (a discharge disposition): [VE] says the rest.
    """
    if kind not in kinds or kind not in KIND_TYPES:
        return False
    return kind != "visit_end" or code.rpartition("//")[2] != encounter_class


@dataclass
class EventVocabulary:
    """Everything that turns a row into a token id; saved with the tokenizer as JSON.

    Attributes:
        token_ids: Token -> id, special and task tokens included.
        value_bins: Code -> unit ('' = none) -> inner bin edges, ascending, float32 values.
        kinds: Kinds that enter a sequence.
        code_map: [regular expression, kind] pairs that say a code's kind.
        reserved: Tokens that no code may name: special and task tokens.
    """

    token_ids: dict[str, int]
    value_bins: dict[str, dict[str, list[float]]]
    kinds: list[str]
    code_map: list[list[str]]
    reserved: frozenset[str] = frozenset(SPECIAL_TOKENS)
    _kind_of: dict[str, tuple[str, str | None]] = field(default_factory=dict, repr=False)
    _type_of: dict[str, int] = field(default_factory=dict, repr=False)
    _id_of_code: dict[str, tuple[int, str]] = field(default_factory=dict, repr=False)
    _bins_of: dict[tuple[str, str], Bins | None] = field(default_factory=dict, repr=False)

    @cached_property
    def interval_ids(self) -> np.ndarray:
        """Ids of the interval tokens, from the shortest on: weeks, months, [LT]."""
        return np.asarray([self.token_ids[token] for token in [*WEEKS, *MONTHS, LONG_TERM]])

    def kind(self, code: str) -> tuple[str, str | None]:
        """(kind, encounter class or None) of a code."""
        kind = self._kind_of.get(code)
        if kind is None:
            kind = self._kind_of[code] = split_kind(code_kinds([code], self.code_map)[0])
        return kind

    def token_type(self, code: str) -> int:
        """Token type of a code's rows, 0 where they make no token of their own."""
        known = self._type_of.get(code)
        if known is None:
            kind, encounter_class = self.kind(code)
            known = KIND_TYPES[kind] if enters(code, kind, encounter_class, self.kinds) else TYPE_PAD
            self._type_of[code] = known
        return known

    def code_id(self, code: str) -> tuple[int, str]:
        """(id, "exact" | "fallback" | "lost") of a bare code."""
        mapped = self._id_of_code.get(code)
        if mapped is None:
            exact = self._event_id(code)
            if exact is not None:
                mapped = (exact, "exact")
            else:
                parents = (self._event_id(parent) for parent in code_parents(code))
                parent = next((token for token in parents if token is not None), None)
                mapped = (self.token_ids[UNK], "lost") if parent is None else (parent, "fallback")
            self._id_of_code[code] = mapped
        return mapped

    def text_id(self, code: str, text: str) -> tuple[int, str]:
        """(id, how) of a text result."""
        exact = self._event_id(f"{code}//{text}")
        return (exact, "exact") if exact is not None else self._without_result(code)

    def bins(self, code: str, unit: str | None) -> Bins | None:
        """The bins that a value of (code, unit) falls into, None where it has none."""
        key = (code, unit or "")
        if key not in self._bins_of:
            self._bins_of[key] = self._find_bins(*key)
        return self._bins_of[key]

    def value_id(self, code: str, unit: str | None, value: float) -> tuple[int, str]:
        """(id, how) of a finite numeric value."""
        bins = self.bins(code, unit)
        number = 0 if bins is None else bisect_left(bins.cuts, float(np.float32(value)))
        return self.bin_id(code, bins, number)

    def bin_id(self, code: str, bins: Bins | None, number: int) -> tuple[int, str]:
        """(id, how) of a value in the bin of this number; of any value where there are no bins."""
        token = None if bins is None else bins.ids[number]
        return self._without_result(code) if bins is None or token is None else (token, bins.how)

    def row_id(self, code: str, value: float | None, text: str | None, unit: str | None) -> tuple[int, str]:
        """(id, how) of any row, the whole rule of the module's text."""
        if value is not None and is_finite(value):
            return self.value_id(code, unit, value)
        if text:
            return self.text_id(code, text)
        return self.code_id(code)

    def _event_id(self, token: str) -> int | None:
        return None if token in self.reserved else self.token_ids.get(token)

    def _without_result(self, code: str) -> tuple[int, str]:
        """A row whose result is not in the vocabulary is mapped by its bare code, which loses the result."""
        token, how = self.code_id(code)
        return token, "fallback" if how == "exact" else how

    def _find_bins(self, code: str, unit: str) -> Bins | None:
        units = self.value_bins.get(code)
        if units is None:
            return None
        how = "exact"
        if unit not in units:
            how = "fallback"
            alike = [u for u in units if u and _plain(u) == _plain(unit)] if unit else [u for u in units if u]
            if len(alike) != 1:
                return None
            unit = alike[0]
        edges = np.asarray(units[unit], dtype=np.float32)
        return Bins(edges, [self._event_id(bin_token(code, unit, k)) for k in range(len(edges) + 1)], how)


@dataclass(frozen=True)
class Bins:
    """Bins of one (code, unit): inner edges [bins - 1] float32, ids [bins] (None: not in the vocabulary), and how."""

    edges: np.ndarray
    ids: list[int | None]
    how: str

    @cached_property
    def cuts(self) -> list[float]:
        """The edges as Python's numbers, for one value at a time."""
        result: list[float] = self.edges.tolist()
        return result


def is_finite(value: float) -> bool:
    """Whether a value is a number in single precision, in which all values are compared."""
    return abs(value) < _TOO_LARGE


def _plain(unit: str) -> str:
    return "".join(unit.split()).casefold()

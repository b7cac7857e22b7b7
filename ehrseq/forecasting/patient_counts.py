"""Patients as counts of their codes: what synthetic and real ones are compared by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from scipy import sparse

from ehrseq.tokenization.ehr_codes import kind_reader

MOST_COLUMNS = 300
"""Codes that are compared: the most frequent ones."""


@dataclass(frozen=True)
class PatientCounts:
    """Counts of codes.

    Attributes:
        subject_ids: int64 [n], ascending.
        codes: Codes, sorted.
        counts: [n, codes], csr.
        kinds: Code -> kind.
    """

    subject_ids: np.ndarray
    codes: tuple[str, ...]
    counts: Any
    kinds: Mapping[str, str]

    @classmethod
    def of(cls, events: pl.DataFrame, *, code_map: Sequence[Sequence[str]] | None = None) -> PatientCounts:
        """Of an event table; births and what is ignored are left out."""
        kind_of = kind_reader(code_map)
        tally = events.group_by("subject_id", "code").len().sort("subject_id", "code")
        kinds = {code: kind_of(code)[0] for code in tally["code"].unique().sort().to_list()}
        codes = [code for code, kind in kinds.items() if kind not in ("birth", "ignore")]
        subjects = tally["subject_id"].unique().sort()
        kept = tally.filter(pl.col("code").is_in(codes))
        rows = np.searchsorted(subjects.to_numpy(), kept["subject_id"].to_numpy())
        place = {code: number for number, code in enumerate(codes)}
        columns = np.asarray([place[code] for code in kept["code"].to_list()], np.int64)
        matrix = sparse.csr_matrix(
            (kept["len"].to_numpy().astype(np.float32), (rows, columns)), shape=(len(subjects), len(codes))
        )
        return cls(subjects.to_numpy(), tuple(codes), matrix, {code: kinds[code] for code in codes})

    def __len__(self) -> int:
        return len(self.subject_ids)

    @cached_property
    def prevalence(self) -> dict[str, float]:
        """Code -> share of patients who have it."""
        shares = np.asarray((self.counts > 0).mean(axis=0)).ravel()
        return dict(zip(self.codes, shares.tolist(), strict=True))

    @cached_property
    def events(self) -> dict[str, float]:
        """Code -> rows."""
        return dict(zip(self.codes, np.asarray(self.counts.sum(axis=0)).ravel().tolist(), strict=True))

    def shared_columns(self, others: Sequence[PatientCounts]) -> list[str]:
        """The codes that most patients of the others (and of these) have, at most `MOST_COLUMNS`."""
        shares: dict[str, float] = {}
        for counts in (self, *others):
            for code, share in counts.prevalence.items():
                shares[code] = max(share, shares.get(code, 0.0))
        return sorted(sorted(shares, key=lambda code: (-shares[code], code))[:MOST_COLUMNS])

    def vectors(self, columns: Sequence[str]) -> np.ndarray:
        """log(1 + count) of each of these codes, float32 [n, columns]."""
        place = {code: number for number, code in enumerate(self.codes)}
        result = np.zeros((len(self), len(columns)), np.float32)
        here = [(at, place[code]) for at, code in enumerate(columns) if code in place]
        if here:
            own = np.log1p(self.counts[:, [column for _, column in here]].toarray())
            result[:, [at for at, _ in here]] = own
        return result

    def subset(self, rows: np.ndarray) -> PatientCounts:
        """Those of some patients (positions)."""
        return PatientCounts(self.subject_ids[rows], self.codes, self.counts[rows], self.kinds)


__all__ = ["MOST_COLUMNS", "PatientCounts"]

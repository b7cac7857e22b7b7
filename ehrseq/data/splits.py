"""Splits by patient, decided by a hash, so that a patient keeps its split when others join."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

DEFAULT_FRACTIONS: dict[str, float] = {"pretrain": 0.57, "train": 0.22, "tuning": 0.06, "held_out": 0.15}
"""The paper's 57 / 28 (here with a tuning part) / 15; the tokenizer is fitted on pretrain + train."""

SPLIT_SCHEMA: dict[str, pl.DataType] = {"subject_id": pl.Int64(), "split": pl.String()}


def assign_splits(
    subject_ids: pl.Series | np.ndarray | Sequence[int],
    *,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    source_splits: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """One split per subject.

    Each subject draws a uniform number from a hash of (seed, subject_id) and falls where that number falls among the
    cumulated fractions: the splits are disjoint, do not depend on who else is there, and hold their fractions up to the
    chance of the draw.

    Args:
        subject_ids: Integers (a Series, array or list); repeated ones count once.
        fractions: Split name -> share, in order; they sum to 1. Default `DEFAULT_FRACTIONS`.
        seed: Another seed, other splits.
        source_splits: A source's own splits (subject_id, split), kept: `tuning`, `held_out` and any other name stay,
            and a source that knows no `pretrain` has its `train` divided into `pretrain` and `train` in the proportion
            of `fractions`. Subjects that it does not name are drawn.

    Returns:
        DataFrame (subject_id Int64, split String) sorted by subject_id.

    Raises:
        ValueError: Fractions that are negative or do not sum to 1, ids that are no integers, a subject with two splits.
    """
    if fractions is not None and not isinstance(fractions, Mapping):
        raise ValueError(f"fractions got {type(fractions).__name__}; expected a mapping from a split to its share.")
    shares = dict(DEFAULT_FRACTIONS if fractions is None else fractions)
    wrong = {name: share for name, share in shares.items() if not _is_share(share)}
    if wrong:
        raise ValueError(f"fractions must be numbers from 0 to 1, got {wrong}.")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ValueError(f"seed got {seed!r}; expected an integer.")
    if not shares or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"fractions must be non-negative and sum to 1, got {shares} (sum {sum(shares.values()):.6g}).")
    subjects = _unique_ids(subject_ids)
    uniform = uniform_of(subjects.to_numpy(), seed)
    drawn = pl.DataFrame({"subject_id": subjects, "split": _bin(uniform, shares)}, schema=SPLIT_SCHEMA)
    if source_splits is None:
        return drawn
    if not isinstance(source_splits, pl.DataFrame) or not set(SPLIT_SCHEMA) <= set(source_splits.columns):
        got = getattr(source_splits, "columns", type(source_splits).__name__)
        raise ValueError(f"source_splits got {got}; expected a polars DataFrame with subject_id and split.")
    assigned = source_splits.select(pl.col("subject_id").cast(pl.Int64), pl.col("split").cast(pl.String)).unique()
    if assigned["subject_id"].n_unique() != assigned.height:
        raise ValueError("source_splits gives a subject two splits; splits must be disjoint by subject.")
    if "pretrain" not in assigned["split"].to_list() and shares.get("pretrain", 0) > 0:
        assigned = _divide_train(assigned, shares, seed)
    return (
        drawn.join(assigned, on="subject_id", how="left", suffix="_given", maintain_order="left")
        .with_columns(pl.coalesce("split_given", "split").alias("split"))
        .select(list(SPLIT_SCHEMA))
    )


def patients_needed(fractions: Mapping[str, float] | None = None, *, certainty: float = 0.99) -> int:
    """Patients from which on `assign_splits` leaves no split empty with this probability.

    Args:
        fractions: Split name -> share. Default `DEFAULT_FRACTIONS`.
        certainty: Probability in (0, 1).

    Returns:
        The smallest n with sum_k (1 - share_k)^n <= 1 - certainty, which bounds the chance of an empty split.

    Raises:
        ValueError: A certainty outside (0, 1).
    """
    if not 0 < certainty < 1:
        raise ValueError(f"certainty must lie between 0 and 1, got {certainty}.")
    shares = np.array([share for share in (fractions or DEFAULT_FRACTIONS).values() if share > 0])
    count = 1
    while ((1 - shares) ** count).sum() > 1 - certainty:
        count += 1
    return count


def _divide_train(assigned: pl.DataFrame, shares: Mapping[str, float], seed: int) -> pl.DataFrame:
    """A source's `train` as `pretrain` and `train`, in the proportion of the two shares."""
    both = shares["pretrain"] + shares.get("train", 0.0)
    uniform = uniform_of(assigned["subject_id"].to_numpy(), seed)
    pretrain = pl.Series(uniform < shares["pretrain"] / both)
    return assigned.with_columns(
        pl.when((pl.col("split") == "train") & pretrain).then(pl.lit("pretrain")).otherwise("split").alias("split")
    )


def _is_share(share: Any) -> bool:
    return isinstance(share, int | float | np.number) and not isinstance(share, bool) and bool(np.isfinite(share))


def _unique_ids(subject_ids: pl.Series | np.ndarray | Sequence[int]) -> pl.Series:
    try:
        ids = pl.Series("subject_id", subject_ids)
    except (TypeError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"subject_ids got {type(subject_ids).__name__}; expected integers in a list or array.") from (
            error
        )
    if ids.is_empty():
        return ids.cast(pl.Int64)
    if not ids.dtype.is_integer() or ids.null_count():
        raise ValueError(
            f"subject_ids must be integers without nulls, got {ids.dtype} with {ids.null_count()} null(s)."
        )
    return ids.cast(pl.Int64).unique().sort()


def uniform_of(ids: np.ndarray, seed: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of (seed, id): two rounds of splitmix64 (Steele, Lea, Flood 2014), whose bits all
    depend on all bits.
    """
    mixed = splitmix64(ids.astype(np.int64).view(np.uint64) ^ splitmix64(np.array([seed % 2**64], dtype=np.uint64)))
    uniform: np.ndarray = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Hash of each number, a new array: the finaliser of splitmix64 (Steele, Lea, Flood 2014) on uint64."""
    mixed: np.ndarray = values + np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _bin(uniform: np.ndarray, shares: Mapping[str, float]) -> list[str]:
    names = list(shares)
    edges = np.cumsum(list(shares.values()))[:-1]
    return [names[number] for number in np.searchsorted(edges, uniform, side="right").tolist()]

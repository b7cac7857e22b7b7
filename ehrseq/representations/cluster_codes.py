"""What the patients of each cluster have in their records more often than the others, and which groups they belong to.

A patient has a code in a cluster where one of their vectors in it is of a record that holds it: of a patient's vector
the record up to its time, of a visit's the visit itself. The others are the patients with a vector outside the cluster.
Patients are counted, not rows, so that many visits of one patient prove nothing. (Who has vectors both in and outside
counts on both sides, which makes a difference look smaller.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.data.metadata import read_settings
from ehrseq.data.shards import Shard, read_blocks
from ehrseq.tokenization.ehr_codes import DEFAULT_CODE_MAP, EVENT_KINDS, category_and_chapter, code_kinds, split_kind

_COLUMNS = ("subject_id", "time", "code")
_CONTINUITY = 0.5  # added to every cell (Haldane and Anscombe), so that no odds are 0 or endless


def codes_of_vectors(table: pl.DataFrame, shards: Sequence[Shard]) -> Iterable[pl.DataFrame]:
    """Which vectors have which code, block by block of patients: row (position in `table`), code.

    Args:
        table: subject_id, prediction_time, of visits also start, end (null: up to the prediction time).
        shards: Files of the dataset that was embedded.
    """
    keys = table.with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))
    if "visit" in table.columns:
        keys = keys.with_columns(until=pl.coalesce("end", "prediction_time"), since=pl.col("start"))
    else:
        keys = keys.with_columns(until=pl.col("prediction_time"), since=pl.lit(None, pl.Datetime("us")))
    keys = keys.select("row", "subject_id", "since", "until")
    for shard in shards:
        for events in read_blocks(shard, columns=_COLUMNS):
            here = keys.filter(pl.col("subject_id").is_in(events["subject_id"].unique().implode()))
            if here.is_empty():
                continue
            first = events.group_by("subject_id", "code").agg(
                pl.col("time").min(), pl.col("time").is_null().any().alias("static")
            )
            if here["since"].null_count() == here.height:  # only the first time of a code matters
                pairs = here.join(first, on="subject_id").filter(pl.col("static") | (pl.col("time") <= pl.col("until")))
            else:
                rows = events.select(_COLUMNS).unique()
                pairs = here.join(rows, on="subject_id").filter(
                    pl.col("time").is_between(pl.col("since"), pl.col("until"))
                )
            yield pairs.select("row", "code").unique()


def kinds_of(codes: Sequence[str], data: str | Path) -> dict[str, str]:
    """Kind of each code, by the dataset's own rules where it has some."""
    rules = read_settings(data).code_map if Path(data).is_dir() else ()
    kinds = code_kinds(codes, [*rules, *DEFAULT_CODE_MAP])
    return {code: split_kind(kind)[0] for code, kind in zip(codes, kinds, strict=True)}


def group_of(code: str, kind: str, against: str, detail: str) -> str | None:
    """The group that a code stands for, None where it stands for none.

    Args:
        code: The code.
        kind: Its kind.
        against: A kind of codes, or a pattern of codes (`ICU_TYPE//*`).
        detail: Of ICD codes "category" (three characters), "chapter" or "code"; other codes are groups themselves.
    """
    if against in EVENT_KINDS:
        if kind != against:
            return None
    elif not fnmatchcase(code, against):
        return None
    parents = category_and_chapter(code)
    if detail == "code" or not parents:
        return code
    if detail == "chapter":
        return parents[-1]
    is_category = len(parents) == 1 and "-" in parents[0].rpartition("/")[2]  # nothing above it but its chapter
    return code if is_category else parents[0]


def group_matrix(pairs: pl.DataFrame, rows: int) -> tuple[NDArray[np.bool_], list[str]]:
    """Which groups each vector has, `[n, g]`, and their names in alphabetical order.

    Args:
        pairs: row (position of a vector), group.
        rows: Number of vectors.
    """
    names = pairs["group"].unique().sort().to_list()
    column = pairs["group"].replace_strict(dict(zip(names, range(len(names)), strict=True)), return_dtype=pl.Int64)
    matrix = np.zeros((rows, len(names)), bool)
    matrix[pairs["row"].to_numpy(), column.to_numpy()] = True
    return matrix, names


class CodeCounts:
    """Patients with each code in and outside of each cluster, summed over blocks of whole patients.

    Args:
        table: subject_id of each vector.
        clusters: `[n]` cluster of each, from 1 on.
    """

    def __init__(self, table: pl.DataFrame, clusters: NDArray[np.int64]) -> None:
        self.rows = pl.DataFrame(
            {"row": np.arange(len(clusters)), "subject_id": table["subject_id"], "cluster": clusters}
        )
        self.patients = self._in_and_out(self.rows.with_columns(code=pl.lit("")))
        self._parts: list[pl.DataFrame] = []

    def add(self, pairs: pl.DataFrame) -> None:
        """Count the codes of a block: row, code."""
        self._parts.append(self._in_and_out(pairs.join(self.rows, on="row")))

    def _in_and_out(self, owned: pl.DataFrame) -> pl.DataFrame:
        """code, cluster, inside, outside: patients with the code in a cluster, and with it in a vector outside."""
        held = owned.select("subject_id", "cluster", "code").unique()
        spread = held.group_by("subject_id", "code").agg(pl.len().alias("clusters"), pl.col("cluster").first())
        total = spread.group_by("code").agg(pl.len().alias("total"))
        only = spread.filter(pl.col("clusters") == 1).group_by("code", "cluster").agg(pl.len().alias("only"))
        inside = held.group_by("code", "cluster").agg(pl.len().alias("inside"))
        every = pl.DataFrame({"cluster": self.rows["cluster"].unique().sort()})
        return (
            total.join(every, how="cross")
            .join(inside, on=["code", "cluster"], how="left")
            .join(only, on=["code", "cluster"], how="left")
            .select(
                "code",
                "cluster",
                pl.col("inside").fill_null(0),
                (pl.col("total") - pl.col("only").fill_null(0)).alias("outside"),
            )
            .with_columns(pl.col("inside", "outside").cast(pl.Int64))
        )

    def table(self) -> pl.DataFrame:
        """Every code in every cluster, see `over_represented`."""
        counts = pl.concat(self._parts).group_by("code", "cluster").agg(pl.col("inside", "outside").sum())
        whole = self.patients.select("cluster", pl.col("inside").alias("patients"), pl.col("outside").alias("others"))
        return over_represented(counts.join(whole, on="cluster").sort("cluster", "code"))


def over_represented(counts: pl.DataFrame) -> pl.DataFrame:
    """Odds ratios of codes in clusters.

    Args:
        counts: cluster, code, inside (patients with the code in the cluster), outside (with it elsewhere), patients
            (of the cluster), others (with vectors elsewhere).

    Returns:
        The same with share, share_outside, odds_ratio, low, high, p_value, q_value: the odds ratio with 0.5 added to
        each cell and Woolf's interval, all intervals together at 95 % (Bonferroni); Fisher's exact test, one-sided; its
        p-values made false discovery rates (Benjamini and Hochberg) over all codes and clusters.
    """
    from scipy.stats import hypergeom, norm

    inside, outside, patients, others = (
        counts[name].to_numpy().astype(np.float64) for name in ("inside", "outside", "patients", "others")
    )
    a, b, c, d = (cell + _CONTINUITY for cell in (inside, patients - inside, outside, others - outside))
    log_odds, error = np.log(a * d / (b * c)), np.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    width = float(norm.ppf(1 - 0.025 / max(1, counts.height)))
    p = hypergeom.sf(inside - 1, patients + others, inside + outside, patients)
    return counts.with_columns(
        share=pl.Series(inside / patients),
        share_outside=pl.Series(np.where(others > 0, outside / np.maximum(others, 1), 0.0)),
        odds_ratio=pl.Series(np.exp(log_odds)),
        low=pl.Series(np.exp(log_odds - width * error)),
        high=pl.Series(np.exp(log_odds + width * error)),
        p_value=pl.Series(p),
        q_value=pl.Series(false_discovery_rates(p)),
    )


def false_discovery_rates(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Benjamini and Hochberg's adjusted p-values."""
    if not len(p_values):
        return p_values
    order = np.argsort(p_values)
    ranked = p_values[order] * len(p_values) / np.arange(1, len(p_values) + 1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(ranked[::-1])[::-1])
    return adjusted

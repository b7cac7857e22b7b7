"""From counts to findings: the AUROC of each code's presence and last value, and gaps that are always the same.

A figure above the bound is reported only where chance is no explanation: its p-value (Fisher's exact test for presence,
Mann and Whitney's for values) times the number of codes tried must lie below `ALPHA`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from ehrseq.audit.codes import GAPS, MOMENT_FEATURES, STATIC_GAP
from ehrseq.audit.findings import Finding

ALPHA = 0.01
LEAST_ROWS = 10
"""Rows of each class without which a task's codes are not judged."""

SAME_GAP = 0.5
"""Share of the positives with one and the same gap to a code from which on it is a finding."""


@dataclass(frozen=True)
class Totals:
    """Rows of one task that were drawn: positives and negatives, for codes and for what comes after."""

    name: str
    positives: int
    negatives: int
    ahead_positives: int
    ahead_negatives: int

    @property
    def judged(self) -> bool:
        """Whether there are rows enough."""
        return min(self.positives, self.negatives) >= LEAST_ROWS


def code_findings(codes: pl.DataFrame, totals: dict[int, Totals], bound: float) -> Iterator[Finding]:
    """Codes whose presence nearly is the label.

    Args:
        codes: task, code, gap, label, n (see `count_block`).
        totals: Rows of each task number.
        bound: AUROC from which on (or 1 - bound down to which) a code is listed.
    """
    of = pl.col("n").filter
    table = codes.group_by("task", "code").agg(
        of(pl.col("label")).sum().alias("pos"),
        of(~pl.col("label")).sum().alias("neg"),
        of(pl.col("label") & (pl.col("gap") == 0)).sum().alias("pos_now"),
        of(~pl.col("label") & (pl.col("gap") == 0)).sum().alias("neg_now"),
    )
    for number, total in totals.items():
        if not total.judged:
            continue
        of_task = table.filter(pl.col("task") == number)

        def auroc(pos: str, neg: str, total: Totals = total) -> pl.Expr:
            return 0.5 + (pl.col(pos) / total.positives - pl.col(neg) / total.negatives) / 2

        listed = of_task.with_columns(
            auroc("pos", "neg").alias("auroc"), auroc("pos_now", "neg_now").alias("auroc_now")
        )
        now = pl.max_horizontal(pl.col("auroc_now"), 1 - pl.col("auroc_now"))
        listed = listed.with_columns((now >= bound).alias("at_once")).filter(
            (pl.max_horizontal(pl.col("auroc"), 1 - pl.col("auroc")) >= bound) | pl.col("at_once")
        )
        for row in listed.sort("auroc", "code", descending=[True, False]).iter_rows(named=True):
            suffix = "_now" if row["at_once"] else ""
            pos, neg, value = row[f"pos{suffix}"], row[f"neg{suffix}"], row[f"auroc{suffix}"]
            if _fisher(pos, neg, total) * max(1, of_task.height) >= ALPHA:
                continue
            timing = _timing(codes.filter((pl.col("task") == number) & (pl.col("code") == row["code"])))
            where = " at the very instant of the prediction" if row["at_once"] else " by the prediction time"
            yield Finding(
                "outcome_at_prediction" if row["at_once"] else "near_label_code",
                total.name,
                row["code"],
                pos + neg,
                f"AUROC {value:.3f} of this code alone: recorded{where} in {pos:,} of {total.positives:,} positive and "
                f"{neg:,} of {total.negatives:,} negative rows. Last recorded, positives: {timing}.",
                numbers={"auroc": value, "positives": pos, "negatives": neg},
            )


def value_findings(values: pl.DataFrame, totals: dict[int, Totals], bound: float) -> Iterator[Finding]:
    """Codes whose last value nearly is the label, and moments that are chosen by it; arguments as above."""
    wide = values.group_by("task", "code", "value").agg(
        pl.col("n").filter("label").sum().alias("pos"), pl.col("n").filter(~pl.col("label")).sum().alias("neg")
    )
    below = pl.col("neg").cum_sum().over("task", "code") - pl.col("neg")
    table = (
        wide.sort("task", "code", "value")
        .with_columns((pl.col("pos") * (below + pl.col("neg") / 2)).alias("wins"))
        .group_by("task", "code")
        .agg(pl.col("wins", "pos", "neg").sum())
        .with_columns((pl.col("wins") / (pl.col("pos") * pl.col("neg"))).alias("auroc"))
    )
    for number, total in totals.items():
        if not total.judged:
            continue
        of_task = table.filter(pl.col("task") == number)
        listed = of_task.filter(
            (pl.min_horizontal("pos", "neg") >= LEAST_ROWS)
            & (pl.col("pos") * 2 >= total.positives)
            & (pl.max_horizontal(pl.col("auroc"), 1 - pl.col("auroc")) >= bound)
        )
        for row in listed.sort("auroc", "code").iter_rows(named=True):
            spread = math.sqrt((row["pos"] + row["neg"] + 1) / (12 * row["pos"] * row["neg"]))
            chance = math.erfc(abs(row["auroc"] - 0.5) / spread / math.sqrt(2))
            if chance * max(1, of_task.height) >= ALPHA:
                continue
            feature = row["code"] in MOMENT_FEATURES
            more = "higher" if row["auroc"] > 0.5 else "lower"
            yield Finding(
                "label_dependent_window" if feature else "near_label_code",
                total.name,
                row["code"],
                row["pos"] + row["neg"],
                f"AUROC {row['auroc']:.3f} of {'this feature of the prediction time' if feature else 'its last value'} "
                f"alone, {more} in positive rows ({row['pos']:,} positive and {row['neg']:,} negative rows have it).",
                numbers={"auroc": row["auroc"], "positives": row["pos"], "negatives": row["neg"]},
            )


def gap_findings(ahead: pl.DataFrame, totals: dict[int, Totals]) -> Iterator[Finding]:
    """Prediction times that were counted back from a code; `ahead`: task, code, seconds, label, n."""
    wide = ahead.group_by("task", "code", "seconds").agg(
        pl.col("n").filter("label").sum().alias("pos"), pl.col("n").filter(~pl.col("label")).sum().alias("neg")
    )
    for number, total in totals.items():
        if min(total.ahead_positives, total.ahead_negatives) < LEAST_ROWS:
            continue
        share, other = pl.col("pos") / total.ahead_positives, pl.col("neg") / total.ahead_negatives
        same = wide.filter((pl.col("task") == number) & (share >= SAME_GAP) & (other <= share / 2))
        for (seconds,), group in sorted(same.partition_by("seconds", as_dict=True).items()):
            first = group.sort("pos", "code", descending=[True, False]).row(0, named=True)
            yield Finding(
                "label_dependent_window",
                total.name,
                f"{seconds} s before {first['code']}",
                first["pos"],
                f"{first['pos']:,} of {total.ahead_positives:,} positive rows, and {first['neg']:,} of "
                f"{total.ahead_negatives:,} negative ones, lie exactly {seconds:,} s before {first['code']}"
                + (f" ({group.height - 1} more codes stand there)" if group.height > 1 else "")
                + ": their prediction time was counted back from it.",
                numbers={"seconds": seconds, "codes": sorted(group["code"].to_list())[:20]},
            )


def _fisher(pos: int, neg: int, total: Totals) -> float:
    from scipy.stats import fisher_exact

    table = [[pos, total.positives - pos], [neg, total.negatives - neg]]
    return float(fisher_exact(table).pvalue)


def _timing(codes: pl.DataFrame) -> str:
    """When the code was last recorded before positive rows, in shares."""
    counts = dict(codes.filter("label").group_by("gap").agg(pl.col("n").sum()).sort("gap").iter_rows())
    whole = sum(counts.values())
    words = [*GAPS, "without a time"]
    if not whole:
        return "never"
    return ", ".join(f"{words[gap]} {count / whole:.0%}" for gap, count in counts.items() if gap <= STATIC_GAP)

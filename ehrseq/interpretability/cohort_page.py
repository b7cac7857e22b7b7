"""The page of a cohort: the mean contribution of each code, with its interval over patients, beside its frequency."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq._html import GUIDE, figure, html_page, note
from ehrseq.data.tables import check_columns
from ehrseq.evaluation.report_tables import ReportTable
from ehrseq.work.files import write_text

COHORT_COLUMNS = ("group", "display", "patients", "frequency", "mean", "low", "high", "outcome")
_RAISES, _LOWERS = "#d1495b", "#1f6feb"  # they can be read in the dark as well
_DRAWN, _LISTED = 30, 200
_LETTERS = 46
_READING = (
    "The mean contribution in log-odds over the patients who have the code, with its 95 % interval over patients: "
    "+0.69 doubles the odds, −0.69 halves them. A contribution is a part of the model's answer, not a cause: what is "
    "frequent among the sick raises the risk, whether or not it makes anybody sick."
)


def write_cohort_page(
    table: pl.DataFrame,
    file: str | Path,
    *,
    task: str,
    method: str = "",
    words: Sequence[str] = (),
    least_patients: int = 1,
) -> Path:
    """Write what the codes of a cohort contribute; equal data give equal bytes.

    Args:
        table: `COHORT_COLUMNS`: what is summed up (a code, a kind), its name in words or null, the patients who have
            it, their share, the mean contribution and its interval, and of whom ("positive prediction", "negative
            prediction", "all").
        file: HTML file, replaced where it is there.
        task: Name of the task.
        method: Name of the method.
        words: How it was made, a paragraph each.
        least_patients: Rows of fewer patients are left out, and counted on the page.

    Returns:
        The file.

    Raises:
        ValueError: A column is missing, or `least_patients` is no count.
    """
    table = check_columns(table, COHORT_COLUMNS, "the cohort's table")
    if isinstance(least_patients, bool) or not isinstance(least_patients, int) or least_patients < 1:
        raise ValueError(f"least_patients must be a whole number from 1 on, got {least_patients!r}.")
    kept = table.filter(pl.col("patients") >= least_patients, pl.col("mean").is_finite())
    title = task.replace("_", " ")
    by = f" by {method.replace('_', ' ')}" if method else ""
    parts = [f"<h1>{html.escape(title)}: contributions{html.escape(by)}</h1>", *(note(text) for text in words)]
    parts.append(note(_READING))
    few = table.filter(pl.col("patients") < least_patients).height
    unknown = table.height - few - kept.height
    if few:
        parts.append(note(f"Left out: {few:,} rows with fewer than {least_patients:,} patients."))
    if unknown:
        parts.append(note(f"Left out: {unknown:,} rows without a mean."))
    if kept.is_empty():
        parts.append("<p>There is no contribution to show.</p>")
    for outcome in kept["outcome"].unique(maintain_order=True).to_list():
        parts += _outcome(str(outcome), kept.filter(pl.col("outcome").eq_missing(pl.lit(outcome, pl.String))))
    file = Path(file)
    write_text(file, html_page(f"ehrseq: contributions to {title}", parts))
    return file


def _outcome(outcome: str, table: pl.DataFrame) -> list[str]:
    """Plot and table of one group of patients."""
    table = table.sort([pl.col("mean").abs(), pl.col("group")], descending=[True, False])
    # Those whose interval is on one side of 0 first: the largest mean of three patients says little.
    clear = (pl.col("low") > 0) | (pl.col("high") < 0)
    drawn = pl.concat([table.filter(clear), table.filter(~clear.fill_null(False))]).head(_DRAWN)
    drawn = drawn.sort("mean", "group", descending=[False, True])
    rows = [
        [
            f"{row['display']} ({row['group']})" if row["display"] else _named(row),
            f"{row['patients']:,}",
            _share(row["frequency"]),
            _signed(row["mean"]),
            "" if row["low"] is None or row["high"] is None else f"{_signed(row['low'])} to {_signed(row['high'])}",
        ]
        for row in table.head(_LISTED).iter_rows(named=True)
    ]
    left = table.height - len(rows)
    remark = f"The {len(rows):,} largest of {table.height:,}." if left else ""
    header = ["group", "patients", "frequency", "mean", "95 % interval"]
    listed = ReportTable("", header, rows, remark).to_html().replace("<h3></h3>\n", "")
    caption = (
        f"The {drawn.height:,} largest, those first whose interval does not hold 0; at the right the share of patients "
        "who have it."
    )
    return [
        f"<h2>{html.escape(outcome[:1].upper() + outcome[1:])}</h2>",
        _forest(drawn),
        note(caption),
        f"<details><summary>Table</summary>{listed}</details>",
    ]


def _forest(table: pl.DataFrame) -> str:
    """Means with their intervals, a line each; hollow circles lower the risk."""
    rows = table.to_dicts()

    def draw(axes: Sequence[Any]) -> None:
        axis = axes[0]
        axis.axvline(0, color=GUIDE, lw=1)
        for place, row in enumerate(rows):
            colour = _RAISES if row["mean"] > 0 else _LOWERS
            if row["low"] is not None and row["high"] is not None:
                axis.plot([row["low"], row["high"]], [place, place], color=colour, lw=1.6)
            face = colour if row["mean"] > 0 else "none"
            axis.plot(row["mean"], place, marker="o", ms=5, color=colour, mfc=face, ls="none")
            share = _share(row["frequency"])
            axis.annotate(
                share, (1.0, place), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
        names = [name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…" for name in map(_named, rows)]
        axis.set_yticks(range(len(rows)), [name.replace("$", r"\$") for name in names])
        axis.set_ylim(-0.7, len(rows) - 0.3)
        axis.set_xlabel("mean contribution, log-odds")

    return figure(draw, height=0.8 + 0.22 * len(rows))


def _named(row: dict[str, Any]) -> str:
    return str(row["display"] or row["group"])


def _share(frequency: float | None) -> str:
    return "" if frequency is None else f"{frequency:.1%}" if frequency >= 0.001 else f"{frequency:.2%}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")

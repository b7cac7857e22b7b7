"""The page: one HTML file that needs nothing else, and the tables beside it as CSV."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq._html import COLOURS, figure, html_page, note, rows_as_html
from ehrseq.stats.counting import DatasetStatistics
from ehrseq.stats.privacy import hide_few
from ehrseq.work.files import write_whole

_CODES_SHOWN = 60


def write_statistics(statistics: DatasetStatistics, folder: str | Path, *, least_patients: int = 1) -> Path:
    """Write `index.html` and its tables (`<name>.csv`), the folder whole or not at all.

    Args:
        statistics: What `count_dataset` counted.
        folder: Where to; a page that is there is replaced.
        least_patients: What fewer patients stand behind is left out, see `hide_few`, and the page says how much: set
            it before the page leaves the hospital.

    Returns:
        The page.

    Raises:
        ValueError: The folder holds something other than a page of ours, `least_patients` is no count.
    """
    folder = Path(folder)
    if isinstance(least_patients, bool) or not isinstance(least_patients, int) or least_patients < 1:
        raise ValueError(f"least_patients must be a whole number from 1 on, got {least_patients!r}.")
    check_page_folder(folder)
    shown, notes = hide_few(statistics, least_patients)
    page = _page(shown, notes)

    def write(unfinished: Path) -> None:
        unfinished.mkdir()
        (unfinished / "index.html").write_text(page, encoding="utf-8")
        for name, table in shown.tables().items():
            table.write_csv(unfinished / f"{name}.csv")

    write_whole(folder, write)
    return folder / "index.html"


def check_page_folder(folder: str | Path) -> None:
    """Raise ValueError where a page cannot be written: it would replace what is not a page of ours."""
    folder = Path(folder)
    ours = {"index.html", *(f"{field.name}.csv" for field in fields(DatasetStatistics))}
    if folder.is_dir():
        unknown = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    else:
        unknown = [folder.name] if folder.exists() else []
    if unknown:
        raise ValueError(
            f"{folder} holds something other than a page of `ehrseq stats` ({unknown[0]}); name a new folder."
        )


def _page(statistics: DatasetStatistics, notes: Sequence[str]) -> str:
    codes, months = statistics.codes, statistics.calendar["month"]
    name = html.escape(Path(statistics.dataset).resolve().name)
    splits = html.escape(", ".join(f"{split} {count:,}" for split, count in statistics.patients.items()))
    span = f", {_month(months.min())} to {_month(months.max())}" if months.len() else ""
    caution = notes or [
        "Counts, times and values go down to single patients; before the page is passed on, write it with "
        "--least-patients."
    ]
    parts = [
        f"<h1>{name}</h1>",
        f"<p>{sum(statistics.patients.values()):,} patients ({splits}), {statistics.events:,} events{span}.</p>",
        note(" ".join(caution)),
        "<h2>Events per patient</h2>",
        _events_per_patient(statistics.events_per_patient),
        "<h2>Events over calendar time</h2>",
        _calendar(statistics.calendar),
        "<h2>Missing times, values and visits</h2>",
        note("Rows without a time are static facts; a time at midnight may be a date whose hour nobody recorded."),
        _table(_missing(statistics.kinds)),
        "<h2>Prevalence over calendar time</h2>",
        _prevalence(statistics.prevalence),
        _table(_prevalence_table(statistics.prevalence)),
        "<h2>Codes</h2>",
        _code_curve(codes),
        note(f"The {min(_CODES_SHOWN, codes.height):,} most frequent of {codes.height:,}; codes.csv has all of them."),
        _table(_codes(codes)),
    ]
    return html_page(f"{Path(statistics.dataset).resolve().name}: statistics", parts)


def _month(value: Any) -> str:
    return f"{value:%Y-%m}"


def _missing(kinds: pl.DataFrame) -> pl.DataFrame:
    rows = pl.col("rows")
    return kinds.select(
        "kind",
        "rows",
        "patients",
        (pl.col("without_time") / rows).alias("without a time"),
        (pl.col("at_midnight") / rows).alias("at midnight"),
        (pl.col("without_visit") / rows).alias("without a visit"),
        (pl.col("with_value") / rows).alias("with a value"),
        (pl.col("with_text") / rows).alias("with a text"),
    )


def _prevalence_table(prevalence: pl.DataFrame) -> pl.DataFrame:
    return (
        prevalence.group_by("task", maintain_order=True)
        .agg(pl.col("labels").sum(), pl.col("positives").sum(), pl.len().alias("periods"))
        .with_columns((pl.col("positives") / pl.col("labels")).alias("prevalence"))
    )


def _codes(codes: pl.DataFrame) -> pl.DataFrame:
    return codes.head(_CODES_SHOWN).select(
        "code",
        "kind",
        "rows",
        "patients",
        pl.col("first").dt.strftime("%Y-%m"),
        pl.col("last").dt.strftime("%Y-%m"),
        (pl.col("with_value") / pl.col("rows")).alias("with a value"),
        pl.col("mean").round_sig_figs(4),
    )


def _table(table: pl.DataFrame) -> str:
    """A table as HTML: whole numbers with separators, shares of Float64 columns as percentages."""
    shares = {name for name in table.columns if name.startswith(("with", "at ", "prevalence"))}

    def cell(name: str, value: Any) -> str:
        if value is None:
            return ""
        if name in shares:
            return f"{value:.1%}"
        return f"{value:,}" if isinstance(value, int) else html.escape(str(value))

    return rows_as_html(table.columns, table.iter_rows(), cell)


# -- plots -----------------------------------------------------------------------------------------------------------


def _events_per_patient(table: pl.DataFrame) -> str:
    import numpy as np

    if table.is_empty():
        return note("Too few patients.")
    rows, patients = table["rows"].to_numpy(), table["patients"].to_numpy()
    exact = table["rows"].equals(table["to"])
    edges = np.geomspace(1, max(2, rows.max() + 1), 41) if exact else np.append(rows, 2 * rows[-1])

    def draw(axes: Sequence[Any]) -> None:
        axes[0].hist(rows, bins=edges, weights=patients, color=COLOURS[0])
        axes[0].set_xscale("log")
        axes[0].set_xlabel("events of a patient")
        axes[0].set_ylabel("patients")

    if exact:
        quartiles = [rows[np.searchsorted(np.cumsum(patients), q * patients.sum())] for q in (0.25, 0.5, 0.75)]
        words = f"median {quartiles[1]:,}, quartiles {quartiles[0]:,} and {quartiles[2]:,}, most {rows.max():,}"
    else:
        words = f"in classes of at least {patients.min():,} patients; the last one has no upper end"
    return figure(draw, height=2.6) + note(words)


def _calendar(table: pl.DataFrame) -> str:
    if table.is_empty():
        return note("No month to show.")
    years = (table["month"].max() - table["month"].min()).days / 365.25  # type: ignore[operator,union-attr]
    every = "1mo" if years <= 10 else "1y"
    sums = table.group_by("kind").agg(pl.col("rows").sum())
    kinds = sums.sort("rows", "kind", descending=[True, False])["kind"].to_list()
    wide = (
        table.group_by(pl.col("month").dt.truncate(every).alias("month"), "kind")
        .agg(pl.col("rows").sum())
        .pivot("kind", index="month", values="rows")
        .sort("month")
        .upsample("month", every=every)
        .fill_null(0)
    )

    def draw(axes: Sequence[Any]) -> None:
        axes[0].stackplot(
            wide["month"].to_list(), *(wide[kind].to_list() for kind in kinds), labels=kinds, colors=COLOURS
        )
        axes[0].set_ylabel(f"events a {'month' if every == '1mo' else 'year'}")
        axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)

    return figure(draw, height=3.0)


def _prevalence(table: pl.DataFrame) -> str:
    if table.is_empty():
        return note("No period to show: no labels (`ehrseq label` makes some), or too few patients.")
    groups = table.partition_by("task", as_dict=True, maintain_order=True)

    def draw(axes: Sequence[Any]) -> None:
        from matplotlib.ticker import PercentFormatter

        for axis, ((task,), curve) in zip(axes, groups.items(), strict=True):
            start = curve["from"].to_list()
            axis.fill_between(start, curve["low"].to_list(), curve["high"].to_list(), color=COLOURS[0], alpha=0.2, lw=0)
            axis.plot(start, curve["prevalence"].to_list(), color=COLOURS[0], marker="o", ms=3, lw=1.4)
            axis.set_title(str(task), loc="left", fontsize=9, fontweight="bold")
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axis.set_ylim(bottom=0)

    return figure(draw, height=1.5 * len(groups), panels=len(groups)) + note(
        "Share of positive labels by the period of the prediction; the band is Wilson's 95 % interval. The sums below "
        "are those of the periods shown."
    )


def _code_curve(codes: pl.DataFrame) -> str:
    if codes.is_empty():
        return ""
    rows = codes["rows"].to_list()

    def draw(axes: Sequence[Any]) -> None:
        axes[0].loglog(range(1, len(rows) + 1), rows, color=COLOURS[0], lw=1.6)
        axes[0].set_xlabel("codes, by frequency")
        axes[0].set_ylabel("rows")

    return figure(draw, height=2.6)

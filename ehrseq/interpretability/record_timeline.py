"""The record of one patient as a timeline: visits as bars, events as ticks, one line a kind."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl

from ehrseq.data.tables import as_column, check_columns, microseconds
from ehrseq.tasks.encounters import encounters
from ehrseq.tokenization.ehr_codes import INPATIENT_CLASSES, code_kinds, split_kind

INK, SOFT, GRID = "#22303c", "#7b8794", "#e4e7eb"
DEATH_COLOUR = "#d1495b"
VISIT_COLOURS = {"admission": "#1f6feb", "emergency": "#e8a33d", "other visit": "#b8c4cf"}
KIND_NAMES = {
    "diagnosis": "diagnoses",
    "procedure": "procedures",
    "medication": "medications",
    "lab": "labs",
    "vital": "vitals",
}
"""Kinds that have a line, from below."""


def record_before(record: pl.DataFrame, until: datetime | None) -> pl.DataFrame:
    """What of a record is known at a time.

    Args:
        record: Event table of one patient: time, code, and what else it has.
        until: The time; None: all of it.

    Returns:
        `event` (place in the record), `time`, `code`, `kind`, `visit_id`; later events are left out.

    Raises:
        ValueError: A column is missing.
    """
    record = check_columns(record, ("time", "code"), "the patient's record")
    codes = record["code"].cast(pl.String).unique().drop_nulls().to_list()
    kinds = {code: split_kind(kind)[0] for code, kind in zip(codes, code_kinds(codes), strict=True)}
    table = record.select(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("event"),
        microseconds(record, "time", "the patient's record").cast(pl.Datetime("us")),
        as_column(record, "code", pl.String, "the patient's record"),
        as_column(record, "visit_id", pl.String, "the patient's record"),
    ).with_columns(kind=pl.col("code").replace_strict(kinds, return_dtype=pl.String, default=None))
    return table if until is None else table.filter(pl.col("time").is_null() | (pl.col("time") <= until))


def record_visits(known: pl.DataFrame, until: datetime | None = None) -> pl.DataFrame:
    """Visits of one patient: `start`, `end` (of an open one, the record's end), `name` (a key of `VISIT_COLOURS`).

    Args:
        known: The patient's events: time, code, visit_id.
        until: What an open visit goes on to, default the last event.
    """
    found = encounters(known.with_columns(subject_id=pl.lit(0, pl.Int64)), until=until)
    last = until or known["time"].max()
    of_class = pl.col("encounter_class")
    return found.select(
        "start",
        pl.col("end").fill_null(pl.lit(last, pl.Datetime("us"))).alias("end"),
        pl.when(of_class.is_in(sorted(INPATIENT_CLASSES)))
        .then(pl.lit("admission"))
        .when(of_class == "EMER")
        .then(pl.lit("emergency"))
        .otherwise(pl.lit("other visit"))
        .alias("name"),
    )


def explained_record(contributions: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The record as far as an explanation's table tells it: events and visits, as the functions above give them.

    Of a visit it knows from when to when the model saw tokens of it, not its class.
    """
    known = contributions.filter(pl.col("event").is_not_null()).select(
        "event", "time", "code", "kind", pl.lit(None, pl.String).alias("visit_id")
    )
    visits = (
        contributions.filter(pl.col("visit") > 0, pl.col("time").is_not_null())
        .group_by("visit")
        .agg(pl.col("time").min().alias("start"), pl.col("time").max().alias("end"))
        .sort("visit")
        .select("start", "end", pl.lit("other visit").alias("name"))
    )
    return known, visits


def draw_record(axis: Any, known: pl.DataFrame, visits: pl.DataFrame, until: datetime | None = None) -> None:
    """Draw a record on an axis of matplotlib's.

    Args:
        axis: Where to.
        known: What `record_before` gives.
        visits: What `record_visits` gives.
        until: End of the record, where that is not its last event.
    """
    import matplotlib.dates as mdates

    lines = [kind for kind in KIND_NAMES if kind in set(known["kind"])]
    timed = known.filter(pl.col("time").is_not_null())
    for height, kind in enumerate(lines):
        times = timed.filter(pl.col("kind") == kind)["time"].to_numpy()
        axis.plot(times, np.full(len(times), height), ls="none", marker="|", ms=9, mew=0.7, color=INK, alpha=0.45)
    bar = len(lines)
    axis.set_yticks(range(bar + 1), [*(KIND_NAMES[kind] for kind in lines), "visits"])
    axis.set_ylim(-0.7, bar + 0.7)
    lived = [*timed.filter(pl.col("kind") != "birth")["time"].to_list(), *([] if until is None else [until])]
    if not lived:
        return
    first, last = min(lived), max(lived)
    # A visit of an hour would be thinner than a pixel on an axis of years.
    span = max(1 / 24, (last - first) / timedelta(days=1))
    for row in visits.iter_rows(named=True):
        start = mdates.date2num(row["start"])
        width = max(mdates.date2num(row["end"]) - start, span / 500)
        axis.broken_barh([(start, width)], (bar - 0.3, 0.6), facecolors=VISIT_COLOURS[row["name"]], linewidth=0)
    for death in timed.filter(pl.col("kind") == "death")["time"].to_list():
        axis.axvline(mdates.date2num(death), color=DEATH_COLOUR, lw=1.5)
        axis.annotate(" death", (mdates.date2num(death), bar + 0.55), color=DEATH_COLOUR, va="top")
    axis.set_xlim(mdates.date2num(first) - 0.01 * span, mdates.date2num(last) + 0.03 * span)


def visit_legend(axis: Any) -> None:
    """What the colours of visits mean, above the record."""
    from matplotlib.lines import Line2D

    axis.legend(
        handles=[Line2D([], [], color=colour, lw=5, label=name) for name, colour in VISIT_COLOURS.items()],
        loc="lower right",
        bbox_to_anchor=(1, 0.97),
        ncols=len(VISIT_COLOURS),
        frameon=False,
        fontsize=8,
        handlelength=0.8,
    )

"""When a patient died: at a time, within a month or a year, or nobody knows when.

A death is a row `MEDS_DEATH`. Without a time it says that the patient is dead; its `text_value` may give the month or
the year (`2031-05`, `2031`), and then the death lies between the ends of its first and of its last day, since a death
known to the day is the end of that day. A discharge disposition that says so tells the death of patients without such
a row.
"""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Sequence
from datetime import datetime, time

import polars as pl

from ehrseq.data.unread_codes import codes_of_death
from ehrseq.tasks.zones import Zones
from ehrseq.tokenization.ehr_codes import EXPIRED

_REDUCED = re.compile(r"(\d{4})(?:-(\d{2}))?")
_INSTANT = pl.Datetime("us")

DEATH_TIME_UNKNOWN = "death_time_unknown"
"""Why somebody has no label who is dead, nobody knows since when."""


def patient_deaths(rows: pl.DataFrame, end_of_data: datetime, zones: Zones) -> pl.DataFrame:
    """The death of everybody who died.

    Args:
        rows: subject_id, time (null: unknown), text_value, kind (`death` counts), expired (a discharge disposition
            that says that the patient died).
        end_of_data: Last instant that the data cover; deaths behind it are not known yet.
        zones: Tells the days at the hospital.

    Returns:
        subject_id, death and death_first (the last and the first instant at which it may have been, equal where the
        time is known), death_untimed (dead, and nobody knows when), death_day (of death, at the hospital).
    """
    deaths = rows.filter(pl.col("kind") == "death")
    expired = rows.filter("expired")
    recorded = deaths.group_by("subject_id").agg(pl.col("time").min().alias("recorded"))
    disposed = expired.group_by("subject_id").agg(pl.col("time").min().alias("disposed"))
    table = (
        recorded.join(disposed, on="subject_id", how="full", coalesce=True)
        .join(_intervals(deaths, zones), on="subject_id", how="left")
        # A recorded death wins; without one, the first disposition that says so tells when.
        .with_columns(pl.coalesce("recorded", "disposed").alias("known"))
        .with_columns(
            pl.coalesce("known", "last").alias("death"),
            pl.coalesce("known", "first").alias("death_first"),
            (pl.col("known").is_null() & pl.col("last").is_null()).alias("death_untimed"),
        )
    )
    seen = [pl.when(pl.col(name) <= end_of_data).then(pl.col(name)).alias(name) for name in ("death", "death_first")]
    return zones.days(
        table.select("subject_id", "death", "death_first", "death_untimed").with_columns(seen), "death", "death_first"
    )


def ends_in_death() -> pl.Expr:
    """Whether a code is the end of a stay that says that the patient died; reads the columns `code` and `kind`."""
    return pl.col("kind").eq("visit_end") & pl.col("code").str.contains(EXPIRED)


def dead_at_unknown_time(events: pl.LazyFrame, code_map: Sequence[Sequence[str]] | None = None) -> pl.Series:
    """subject_id of those who are dead and of whom no row, of a death or of a discharge that says so, tells when.

    Args:
        events: subject_id, time, code.
        code_map: As of `label_events`.
    """
    codes = events.select(pl.col("code").drop_nulls().unique()).collect()["code"].to_list()
    deaths = (
        events.filter(pl.col("code").is_in(codes_of_death(codes, code_map)))
        .group_by("subject_id")
        .agg(pl.col("time").max())
    )
    return deaths.filter(pl.col("time").is_null()).collect()["subject_id"]


def _intervals(deaths: pl.DataFrame, zones: Zones) -> pl.DataFrame:
    """subject_id, first and last: the ends of the first and of the last day of the month or year of a death."""
    schema = {"subject_id": pl.Int64(), "first": _INSTANT, "last": _INSTANT}
    reduced = deaths.filter(pl.col("time").is_null() & pl.col("text_value").is_not_null())
    bounds = []
    for subject, text in reduced.select("subject_id", "text_value").iter_rows():
        days = reduced_days(text)
        if days is not None:
            bounds.append((subject, *days))
    table = zones.instants(pl.DataFrame(bounds, schema=schema, orient="row"), "first", "last")
    # Several rows: the death lies where they all put it.
    return table.group_by("subject_id").agg(pl.col("first").max(), pl.col("last").min())


def reduced_days(text: str) -> tuple[datetime, datetime] | None:
    """Ends of the first and of the last day of a year or month, None where the text is neither."""
    match = _REDUCED.fullmatch(text)
    if match is None:
        return None
    year, first, last = int(match[1]), int(match[2] or 1), int(match[2] or 12)
    if not 1 <= year <= 9999 or not 1 <= first <= 12:
        return None
    return (
        datetime.combine(datetime(year, first, 1), time.max),
        datetime.combine(datetime(year, last, monthrange(year, last)[1]), time.max),
    )

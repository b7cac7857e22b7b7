"""Does a single code, or the choice of the moment itself, nearly tell the label?

For every drawn label row and every code of the patient that is known at the prediction time: how long ago the code was
last recorded, and its last value. Counted by task, code, gap and label, these counts add up over blocks and shards, and
give the AUROC of each code's presence and of its last value without holding a row.

Besides codes, four numbers about the moment itself (`MOMENT_FEATURES`) are treated as values, and so is what comes
after it: where most positives, and few negatives, have the same gap, to the second, from the prediction to a code, the
prediction time was counted back from that code.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl

GAPS: dict[str, timedelta] = {
    "at the prediction itself": timedelta(0),
    "within the hour before": timedelta(hours=1),
    "within the day before": timedelta(days=1),
    "within the week before": timedelta(days=7),
    "within the month before": timedelta(days=30),
    "within the year before": timedelta(days=365),
    "earlier": timedelta.max,
}
"""How long before the prediction a code was last recorded: the last bound of each class; static facts follow."""

STATIC_GAP = len(GAPS)
"""Class of a code that stands without a time."""

MOMENT_FEATURES = (
    "hours since the last earlier event",
    "events at the prediction's instant",
    "hours since the last visit began",
    "days since the first event",
)
"""What is known of the moment of a prediction without looking at any code."""

_NO_TIME = datetime(1, 1, 1)
_MAX_TEXT = 64  # characters of a text result that is counted as a code of its own
_VALUE_BITS = 12  # low bits of a float32 that are left out: values are told apart to one part in two thousand


def count_block(events: pl.DataFrame, rows: pl.DataFrame, kinds: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Counts of one block of patients.

    Args:
        events: Rows of the event table.
        rows: Labels of these patients (`ROW_SCHEMA`).
        kinds: code, kind (see `ehr_codes`), entering (whether a model would read it).

    Returns:
        `codes`: task, code, gap (class), label, n. `values`: task, code, value (class, ascending), label, n. `ahead`:
        task, code, seconds, label, n.
    """
    counted = rows.filter("counted")
    timed = events.join(kinds, on="code", how="left", maintain_order="left").filter(
        pl.col("entering")
        # A death or a visit of unknown time would tell the future: no model reads it.
        & (pl.col("time").is_not_null() | ~pl.col("kind").is_in(["death", "visit_start", "visit_end"]))
        & pl.col("subject_id").is_in(rows.filter(pl.col("counted") | pl.col("ahead"))["subject_id"].unique().implode())
    )
    coded = pl.concat(
        [
            timed.select("subject_id", "time", "code", "numeric_value"),
            timed.filter(pl.col("text_value").str.len_chars().is_between(1, _MAX_TEXT)).select(
                "subject_id", "time", pl.concat_str("code", pl.lit("//"), "text_value").alias("code"), "numeric_value"
            ),
        ]
    )
    names = coded.select(pl.col("code").unique().sort()).with_row_index("c")
    coded = (
        coded.join(names, on="code", how="left", maintain_order="left")
        .select("subject_id", pl.col("time").fill_null(_NO_TIME), "c", "numeric_value")
        .sort("time", maintain_order=True)
    )
    moments = counted.select("subject_id", "prediction_time").unique(maintain_order=True).with_row_index("moment")
    marks = counted.join(moments, on=["subject_id", "prediction_time"], how="left").select("moment", "task", "label")

    gaps = _last_before(coded, moments).select("moment", "c", _gap_class().alias("gap"))
    numbers = coded.filter(pl.col("numeric_value").is_not_null())
    values = _last_before(numbers, moments).select("moment", "c", _value_class(pl.col("numeric_value")).alias("value"))
    features = _moment_features(timed, moments)
    return {
        "codes": _tally(gaps, marks, names, "gap"),
        "values": pl.concat([_tally(values, marks, names, "value"), _tally(features, marks, None, "value")]),
        "ahead": _ahead(coded, rows.filter("ahead"), names),
    }


def add_up(tables: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Sum of tables of counts (every column but `n` is a key)."""
    together = pl.concat(list(tables))
    return together.group_by([name for name in together.columns if name != "n"]).agg(pl.col("n").sum())


def _last_before(coded: pl.DataFrame, moments: pl.DataFrame) -> pl.DataFrame:
    """For each moment and code known by then the last row of the code: moment, prediction_time, c, time, value."""
    first = coded.group_by("subject_id", "c").agg(pl.col("time").min().alias("first"))
    pairs = first.join(moments, on="subject_id").filter(pl.col("first") <= pl.col("prediction_time"))
    return pairs.sort("prediction_time").join_asof(
        coded,
        left_on="prediction_time",
        right_on="time",
        by=["subject_id", "c"],
        strategy="backward",
        coalesce=False,
        check_sortedness=False,
    )


def _gap_class() -> pl.Expr:
    gap = pl.col("prediction_time") - pl.col("time")
    chain: Any = pl.when(pl.col("time") == _NO_TIME).then(STATIC_GAP)
    bounds = list(GAPS.values())
    for number, bound in enumerate(bounds[:-1]):
        chain = chain.when(gap <= bound).then(number)
    expression: pl.Expr = chain.otherwise(len(bounds) - 1).cast(pl.Int32)
    return expression


def _value_class(value: pl.Expr) -> pl.Expr:
    """Float32 -> Int32 that ascends with it, its low bits left out."""

    def classes(column: pl.Series) -> pl.Series:
        bits = np.ascontiguousarray(column.cast(pl.Float32).to_numpy()).view(np.int32)
        return pl.Series(np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits) >> _VALUE_BITS, dtype=pl.Int32)

    return value.map_batches(classes, return_dtype=pl.Int32)


def _tally(coded: pl.DataFrame, marks: pl.DataFrame, names: pl.DataFrame | None, key: str) -> pl.DataFrame:
    code = "c" if names is not None else "code"
    counts = coded.join(marks, on="moment").group_by("task", code, key, "label").agg(pl.len().cast(pl.Int64).alias("n"))
    if names is not None:
        counts = counts.join(names, on="c", how="left")
    return counts.select("task", "code", key, "label", "n")


def _moment_features(events: pl.DataFrame, moments: pl.DataFrame) -> pl.DataFrame:
    """moment, code (a name of `MOMENT_FEATURES`), value (class)."""
    timed = events.filter(pl.col("time").is_not_null() & (pl.col("kind") != "birth")).sort("time")
    starts = timed.filter(pl.col("kind") == "visit_start")
    here = (
        timed.group_by("subject_id", pl.col("time").alias("prediction_time"))
        .agg(pl.len().alias("here"))
        .join(moments, on=["subject_id", "prediction_time"], how="semi")
    )
    first = timed.group_by("subject_id").agg(pl.col("time").min().alias("first"))
    table = moments.sort("prediction_time")
    for name, source, exact in (("earlier", timed, False), ("began", starts, True)):
        table = table.join_asof(
            source.select("subject_id", pl.col("time").alias(name)),
            left_on="prediction_time",
            right_on=name,
            by="subject_id",
            strategy="backward",
            allow_exact_matches=exact,
            coalesce=False,
            check_sortedness=False,
        )
    now, hours = pl.col("prediction_time"), pl.duration(hours=1)
    wide = (
        table.join(here, on=["subject_id", "prediction_time"], how="left")
        .join(first, on="subject_id", how="left")
        .select(
            "moment",
            ((now - pl.col("earlier")) / hours).alias(MOMENT_FEATURES[0]),
            pl.col("here").fill_null(0).cast(pl.Float64).alias(MOMENT_FEATURES[1]),
            ((now - pl.col("began")) / hours).alias(MOMENT_FEATURES[2]),
            ((now - pl.col("first")) / pl.duration(days=1)).alias(MOMENT_FEATURES[3]),
        )
    )
    return (
        wide.unpivot(index="moment", variable_name="code", value_name="value")
        .drop_nulls("value")
        .with_columns(_value_class(pl.col("value")).alias("value"))
    )


def _ahead(coded: pl.DataFrame, rows: pl.DataFrame, names: pl.DataFrame) -> pl.DataFrame:
    """Seconds from the prediction to the next row of each code of the patient."""
    last = coded.group_by("subject_id", "c").agg(pl.col("time").max().alias("last"))
    pairs = (
        rows.select("subject_id", "prediction_time", "task", "label")
        .join(last, on="subject_id")
        .filter(pl.col("last") > pl.col("prediction_time"))
    )
    following = pairs.sort("prediction_time").join_asof(
        coded.select("subject_id", "c", "time"),
        left_on="prediction_time",
        right_on="time",
        by=["subject_id", "c"],
        strategy="forward",
        allow_exact_matches=False,
        coalesce=False,
        check_sortedness=False,
    )
    return (
        following.group_by(
            "task", "c", (pl.col("time") - pl.col("prediction_time")).dt.total_seconds().alias("seconds"), "label"
        )
        .agg(pl.len().cast(pl.Int64).alias("n"))
        .join(names, on="c", how="left")
        .select("task", "code", "seconds", "label", "n")
    )

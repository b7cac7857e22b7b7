"""The labels that are audited, as one table of rows."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from ehrseq.tasks.label_sources import AuditedTask

ROW_SCHEMA: dict[str, pl.DataType] = {
    "row": pl.Int64(),
    "task": pl.Int32(),
    "subject_id": pl.Int64(),
    "prediction_time": pl.Datetime("us"),
    "label": pl.Boolean(),
    "counted": pl.Boolean(),
    "ahead": pl.Boolean(),
}
"""Columns of the labels of all tasks together, as workers read them: `row` numbers them, `counted` are the rows drawn
for the statistics of codes, `ahead` those drawn for what comes after the prediction."""

_FEW_AHEAD = 2_000
"""Rows of a class that are enough to see a gap that is always the same."""


def audit_rows(tasks: Sequence[AuditedTask], per_class: int) -> pl.DataFrame:
    """The labels of all tasks as one table of `ROW_SCHEMA`, sorted by subject and time.

    Args:
        tasks: The labels.
        per_class: Rows of each task and class that are drawn for the statistics of codes (by a hash of the patient).
    """
    frames = [
        task.labels.select(
            pl.lit(number, pl.Int32).alias("task"),
            "subject_id",
            "prediction_time",
            pl.col("boolean_value").alias("label"),
        )
        for number, task in enumerate(tasks)
    ]
    drawn = pl.struct("subject_id", "prediction_time").hash(seed=0).rank("ordinal").over("task", "label")
    return (
        pl.concat(frames)
        .sort("subject_id", "prediction_time", "task", "label")
        .with_columns(drawn.alias("rank"))
        .with_columns((pl.col("rank") <= per_class).alias("counted"), (pl.col("rank") <= _FEW_AHEAD).alias("ahead"))
        .with_row_index("row")
        .select(pl.col(name).cast(dtype) for name, dtype in ROW_SCHEMA.items())
    )

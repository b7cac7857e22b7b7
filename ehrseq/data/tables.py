"""Columns of event tables, checked and of one type, and their parts side by side on all cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from ehrseq.work.engine import available_cores

_LONG_WORK = 16  # parts from which on a progress bar is shown


def check_columns(table: Any, required: Sequence[str], what: str) -> pl.DataFrame:
    """A polars table with these columns.

    Raises:
        ValueError: Something else, or a column is missing.
    """
    if isinstance(table, pl.LazyFrame):
        table = table.collect()
    if not isinstance(table, pl.DataFrame):
        raise ValueError(
            f"{what} must be a polars.DataFrame with the columns {list(required)}, got {type(table).__name__} "
            "(polars.from_pandas and polars.from_arrow convert others)."
        )
    missing = [name for name in required if name not in table.columns]
    if missing:
        raise ValueError(f"{what} lacks the columns {missing}; it has {table.columns}, expected {list(required)}.")
    return table


def microseconds(table: pl.DataFrame, name: str, what: str) -> pl.Expr:
    """A time column as Int64 microseconds since 1970, naive UTC (times with a zone are converted).

    Raises:
        ValueError: The column holds no times.
    """
    dtype = table.schema[name]
    if dtype == pl.Null:
        return pl.lit(None, pl.Int64).alias(name)
    if not (isinstance(dtype, pl.Datetime) or dtype == pl.Date):
        raise ValueError(
            f"{what}: the column {name!r} is {dtype}; expected Datetime('us') "
            f"(text: pl.col({name!r}).str.to_datetime(time_unit='us'))."
        )
    column = pl.col(name)
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return column.cast(pl.Datetime("us")).to_physical().alias(name)


def as_column(table: pl.DataFrame, name: str, dtype: Any, what: str) -> pl.Expr:
    """A column of this type, nulls where the table lacks it.

    Raises:
        ValueError: The column cannot be that type (text among the numbers).
    """
    if name not in table.columns:
        return pl.lit(None, dtype).alias(name)
    has = table.schema[name]
    if has == dtype or has == pl.Null or (not has.is_nested() and dtype == pl.String) or has.is_numeric():
        return pl.col(name).cast(dtype).alias(name)
    raise ValueError(f"{what}: the column {name!r} is {has}; expected {dtype}.")


def subject_chunks(events: pl.DataFrame, rows: int) -> list[pl.DataFrame]:
    """Parts of about this many rows, every subject whole in one of them, subjects ascending over the parts."""
    subject = events["subject_id"]
    if events.height <= rows or subject.null_count() or not subject.dtype.is_integer():
        return [events]
    values = subject.to_numpy()
    if (values[1:] < values[:-1]).any():
        events = events.sort("subject_id", maintain_order=True)
        values = events["subject_id"].to_numpy()
    marks = values[rows::rows]
    cuts = [0, *np.unique(np.searchsorted(values, marks)).tolist(), events.height]
    return [events[start:stop] for start, stop in pairwise(cuts) if stop > start]


def in_threads(work: Callable[..., Any], parts: Sequence[tuple[Any, ...]], what: str) -> list[Any]:
    """[work(*part) for part in parts], on all cores: numpy and polars let go of the interpreter's lock."""
    from ehrseq.work.progress import progress_bar

    cores = available_cores()
    bar: dict[str, Any] = {"desc": what, "total": len(parts), "unit": "part", "disable": len(parts) < _LONG_WORK}
    if cores == 1 or len(parts) == 1:
        return [work(*part) for part in progress_bar(parts, **bar)]
    with ThreadPoolExecutor(min(cores, len(parts))) as pool:
        return list(progress_bar(pool.map(lambda part: work(*part), parts), **bar))

"""The event table: MEDS 0.4 rows, one per fact, sorted by subject and time.

| column | type | meaning |
|---|---|---|
| subject_id | Int64 | the patient; never null |
| time | Datetime("us") | when the fact was available, naive UTC; null = static (holds for the whole life) |
| code | String | `KIND//SYSTEM//CODE`, `VISIT_START//<class>`, `MEDS_BIRTH` ...; never null |
| numeric_value | Float32 | measured value in `unit`; null where there is none |
| text_value | String | result in words (`positive`); null where there is none |
| visit_id | String | the visit that the row was recorded in; null where the source names none |
| unit | String | unit of `numeric_value` as the source writes it |

At one instant of one subject the order is: static rows, birth, starts of visits, everything else in source order, ends
    of visits, death.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from ehrseq.data.instants import parse_instant, read_instant
from ehrseq.tokenization.ehr_codes import RANK_BIRTH, RANK_DEATH, RANK_END, RANK_OTHER, RANK_START

if TYPE_CHECKING:
    import pyarrow as pa

EVENT_SCHEMA: dict[str, pl.DataType] = {
    "subject_id": pl.Int64(),
    "time": pl.Datetime("us"),
    "code": pl.String(),
    "numeric_value": pl.Float32(),
    "text_value": pl.String(),
    "visit_id": pl.String(),
    "unit": pl.String(),
}
"""Column name -> polars type of an event table; the last four may be absent on input."""

EVENT_COLUMNS: tuple[str, ...] = tuple(EVENT_SCHEMA)
"""Names of the columns of an event table, in order."""

REQUIRED_COLUMNS: tuple[str, ...] = ("subject_id", "time", "code")

LABEL_SCHEMA: dict[str, pl.DataType] = {
    "subject_id": pl.Int64(),
    "prediction_time": pl.Datetime("us"),
    "boolean_value": pl.Boolean(),
}
"""Column name -> polars type of a MEDS label table; everything up to and including `prediction_time` may be used."""

LABEL_KEYS = ("subject_id", "prediction_time")
"""The columns that say which question of a task a row is about."""

_DAY, _MICROSECOND = timedelta(days=1), timedelta(microseconds=1)
_FIRST_US, _LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999
"""Microseconds since 1970 of the first and the last instant of the years 1 to 9999."""

BIRTH_CODE = "MEDS_BIRTH"
DEATH_CODE = "MEDS_DEATH"

# Rank of a code among the rows of one instant; the second line of each is how MIMIC-IV's and OMOP's MEDS exports call
# it.
_OMOP = r"(?:(?i:visit(?:_occurrence|_detail)?)|CMS Place of Service)//?[^/]+"
_START_PREFIXES = rf"^(?:VISIT_START|HOSPITAL_ADMISSION|ED_REGISTRATION|ICU_ADMISSION|{_OMOP}(?://?start)?$)"
_END_PREFIXES = rf"^(?:VISIT_END|HOSPITAL_DISCHARGE|ED_OUT|ICU_DISCHARGE|{_OMOP}//?end$)"


def code_rank(codes: pl.Series) -> pl.Series:
    """Rank of each code among the rows of one instant (UInt8): birth 0, visit start 1, other 2, visit end 3, death 4.

    Args:
        codes: String codes. Unique ones are best: each is matched against two regular expressions.
    """
    return pl.DataFrame({"code": codes}).select(_rank_of_code())["rank"]


@cache
def _rank_of_code() -> pl.Expr:
    """The rank of the column `code`."""
    code = pl.col("code")
    rank = (
        pl.when(code.str.starts_with(BIRTH_CODE))
        .then(RANK_BIRTH)
        .when(code.str.starts_with(DEATH_CODE))
        .then(RANK_DEATH)
        .when(code.str.contains(_END_PREFIXES))
        .then(RANK_END)
        .when(code.str.contains(_START_PREFIXES))
        .then(RANK_START)
        .otherwise(RANK_OTHER)
    )
    return rank.cast(pl.UInt8).alias("rank")


def arrow_schema() -> pa.Schema:
    """Arrow schema of the event table in the files of a dataset."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("subject_id", pa.int64(), nullable=False),
            pa.field("time", pa.timestamp("us")),
            pa.field("code", pa.string(), nullable=False),
            pa.field("numeric_value", pa.float32()),
            pa.field("text_value", pa.large_string()),
            pa.field("visit_id", pa.string()),
            pa.field("unit", pa.string()),
        ]
    )


def sort_events(events: pl.DataFrame) -> pl.DataFrame:
    """Rows by subject, time (static first) and rank; rows equal in all three keep their order."""
    unique = events.select(pl.col("code").unique())
    ranks = unique.with_columns(code_rank(unique["code"]).alias("__rank"))
    return (
        events.join(ranks, on="code", how="left", maintain_order="left")
        .sort(["subject_id", "time", "__rank"], nulls_last=False, maintain_order=True)
        .drop("__rank")
    )


def validate_events(events: object, *, source: str = "events", sort: bool = True) -> pl.DataFrame:
    """Cast, complete and sort an event table.

    Missing optional columns are filled with nulls, other columns are dropped, times with a zone become naive UTC. NaN
    and infinite values
    become nulls (logged with their number): a value that is not a number is no value.

    Args:
        events: A polars DataFrame, or what `polars.DataFrame()` takes (pyarrow table, pandas frame, dict of columns).
        source: Name of the table in error messages.
        sort: Whether to sort; without it the rows keep their order.

    Returns:
        A DataFrame with exactly the columns of `EVENT_SCHEMA`, sorted by subject_id, time (nulls first) and rank.

    Raises:
        ValueError: A required column is absent, holds nulls or cannot be cast.
    """
    frame = _as_frame(events, source)
    missing = [name for name in REQUIRED_COLUMNS if name not in frame.columns]
    if missing:
        raise ValueError(
            f"{source}: column(s) {missing} are absent (got {frame.columns}); an event table needs subject_id (int64), "
            "time (timestamp, null = static) and code (string)."
        )
    columns = [_cast(frame[name], dtype, source) for name, dtype in EVENT_SCHEMA.items() if name in frame.columns]
    checked = _dates_that_begin(pl.DataFrame(columns), frame["time"])
    for name in ("subject_id", "code"):
        nulls = checked[name].null_count()
        if nulls:
            row = int(checked[name].is_null().arg_true()[0])
            raise ValueError(
                f"{source}: {nulls} row(s) have no {name} (first: row {row}); give every event one or remove the row."
            )
    if (checked["code"] == "").any():
        row = int((checked["code"] == "").arg_true()[0])
        raise ValueError(f"{source}: row {row} has an empty code; give every event a code or remove the row.")
    checked = _without_non_finite(checked, source)
    checked = checked.with_columns(
        pl.lit(None, dtype=dtype).alias(name) for name, dtype in EVENT_SCHEMA.items() if name not in checked.columns
    )
    checked = checked.select(EVENT_COLUMNS)
    return sort_events(checked) if sort else checked


def validate_labels(labels: object, *, source: str = "labels") -> pl.DataFrame:
    """Cast a label table to `LABEL_SCHEMA` and sort it by subject and prediction time.

    Raises:
        ValueError: A column is absent, holds nulls or cannot be cast.
    """
    frame = _as_frame(labels, source)
    missing = [name for name in LABEL_SCHEMA if name not in frame.columns]
    if missing:
        raise ValueError(
            f"{source}: column(s) {missing} are absent (got {frame.columns}); a label table needs {list(LABEL_SCHEMA)}."
        )
    checked = pl.DataFrame([_cast(frame[name], dtype, source) for name, dtype in LABEL_SCHEMA.items()])
    for name in LABEL_SCHEMA:
        if checked[name].null_count():
            raise ValueError(
                f"{source}: {checked[name].null_count()} row(s) have no {name}; a label needs all of "
                f"{list(LABEL_SCHEMA)}."
            )
    return checked.sort(["subject_id", "prediction_time"], maintain_order=True)


def _as_frame(table: object, source: str) -> pl.DataFrame:
    if isinstance(table, pl.DataFrame):
        return table
    if isinstance(table, pl.LazyFrame):
        return table.collect()
    try:
        return pl.DataFrame(cast(Any, table))
    except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise ValueError(
            f"{source}: expected a table (polars, pyarrow, pandas or a dict of columns), got "
            f"{type(table).__name__}: {error}"
        ) from error


def _cast(column: pl.Series, dtype: pl.DataType, source: str) -> pl.Series:
    """`column` as `dtype`, with an error that names the first value that does not fit."""
    if column.dtype == dtype:
        return _in_range(column, source) if isinstance(dtype, pl.Datetime) else column
    if column.dtype == pl.Null:
        return column.cast(dtype)
    if isinstance(dtype, pl.Datetime):
        return cast_time(column, source)
    if isinstance(dtype, pl.Boolean):
        return _cast_boolean(column, source)
    if isinstance(dtype, pl.Int64) and column.dtype.is_float() and not (column.drop_nulls() % 1 == 0).all():
        raise ValueError(
            f"{source}: column {column.name!r} holds numbers that are not whole ({column.dtype}); expected int64."
        )
    if isinstance(dtype, pl.String) and column.dtype.is_nested():
        raise ValueError(f"{source}: column {column.name!r} holds {column.dtype}; expected strings.")
    if isinstance(dtype, pl.Float32 | pl.Int64) and (column.dtype.is_temporal() or column.dtype.is_nested()):
        raise ValueError(f"{source}: column {column.name!r} holds {column.dtype}; expected {dtype}.")
    try:
        cast = column.cast(dtype, strict=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ValueError(
            f"{source}: column {column.name!r} holds {column.dtype}, which cannot be read as {dtype} "
            f"({str(error).splitlines()[0]})."
        ) from error
    lost = cast.is_null() & column.is_not_null()
    if lost.any():
        raise ValueError(
            f"{source}: column {column.name!r} must be {dtype}, row {lost.arg_true()[0]} holds "
            f"{column.filter(lost)[0]!r} ({column.dtype})."
        )
    return cast


def cast_time(column: pl.Series, source: str) -> pl.Series:
    """Any timestamp, date or ISO string as naive UTC microseconds; a date is the last instant of its day.

    Raises:
        ValueError: Something else, or a time outside the years 1 to 9999, by its row.
    """
    if isinstance(column.dtype, pl.Datetime):
        try:
            zoned = column.dtype.time_zone is not None
            utc = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None) if zoned else column
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise ValueError(
                f"{source}: column {column.name!r} has the zone {column.dtype.time_zone!r}, which cannot be read "
                f"({str(error).splitlines()[0]}); convert it to UTC."
            ) from error
        return _in_range(_as_microseconds(utc, source), source)
    if column.dtype == pl.Date:
        return _in_range(column.cast(pl.Datetime("us")) + (_DAY - _MICROSECOND), source)
    if column.dtype in (pl.String, pl.Categorical, pl.Object) or isinstance(column.dtype, pl.Enum):
        return _parse_iso(column.cast(pl.String), source)
    raise ValueError(
        f"{source}: column {column.name!r} holds {column.dtype}; expected timestamps (or ISO 8601 strings)."
    )


def _as_microseconds(times: pl.Series, source: str) -> pl.Series:
    """Naive times of any unit as microseconds; milliseconds may reach further than those can say."""
    cast = times.to_physical() * 1000 if times.dtype == pl.Datetime("ms") else None
    if cast is None:
        return times.cast(pl.Datetime("us"))
    beyond = times.to_physical().abs() > _LAST_US // 1000
    if beyond.any():
        row = int(beyond.arg_true()[0])
        raise ValueError(
            f"{source}: column {times.name!r}, row {row}: the time lies {times.to_physical()[row]} milliseconds from "
            "1970, outside the years 1 to 9999; correct it, or give null where it is not known."
        )
    return cast.cast(pl.Datetime("us"))


def _in_range(times: pl.Series, source: str) -> pl.Series:
    """Refuses what no calendar of ours can name."""
    first, last = times.to_physical().min(), times.to_physical().max()
    if first is None or (first >= _FIRST_US and last <= _LAST_US):  # type: ignore[operator]
        return times
    number = times.to_physical()
    row = int(((number < _FIRST_US) | (number > _LAST_US)).arg_true()[0])
    raise ValueError(
        f"{source}: column {times.name!r}, row {row}: the time lies {number[row]} microseconds from 1970, outside the "
        "years 1 to 9999; correct it, or give null where it is not known."
    )


def texts_without_zone(times: pl.Series) -> int:
    """How many texts of a column of times state an hour and no zone: they are read as UTC, as dates are."""
    if times.dtype not in (pl.String, pl.Categorical) and not isinstance(times.dtype, pl.Enum):
        return 0
    text = times.cast(pl.String)
    stated = text.str.slice(10).str.contains(r"[Zz]$|[+-]\d{2}(:?\d{2})?$")
    return int(((text.str.len_chars() > len("2000-01-01")) & ~stated).sum())


def _dates_that_begin(events: pl.DataFrame, written: pl.Series) -> pl.DataFrame:
    """Moves births and starts of visits that are known to the day (month, year) to its first instant: what begins, does
    so with its first day, and facts are known from the last on.
    """
    if written.dtype == pl.Date:
        is_date = pl.lit(value=True)
    elif written.dtype in (pl.String, pl.Categorical) or isinstance(written.dtype, pl.Enum):
        is_date = pl.lit(written.cast(pl.String).str.len_chars() <= len("2000-01-01"))
    else:
        return events
    codes = events["code"].unique().drop_nulls()
    begins = codes.filter(code_rank(codes).is_in([RANK_BIRTH, RANK_START]))
    moved = is_date & pl.col("code").is_in(begins.implode()) & pl.col("time").is_not_null()
    if written.dtype == pl.Date:
        first = pl.col("time").dt.truncate("1d")
        return events.with_columns(pl.when(moved).then(first).otherwise("time").alias("time"))
    texts = written.cast(pl.String).filter(events.select(moved.alias("moved"))["moved"].fill_null(value=False))
    starts = {text: read_instant(text, first=True)[0] for text in texts.unique()}
    if not starts:
        return events
    first = pl.lit(written.cast(pl.String)).replace_strict(starts, default=None, return_dtype=pl.Int64)
    return events.with_columns(pl.when(moved).then(first.cast(pl.Datetime("us"))).otherwise("time").alias("time"))


def _cast_boolean(column: pl.Series, source: str) -> pl.Series:
    """What says true or false (1 or 0), in words or numbers, as booleans."""
    if column.dtype.is_numeric():
        plain = column.cast(pl.Float64).cast(pl.String)
    elif column.dtype == pl.String or isinstance(column.dtype, pl.Categorical | pl.Enum):
        plain = column.cast(pl.String).str.strip_chars().str.to_lowercase()
    else:
        raise ValueError(f"{source}: column {column.name!r} holds {column.dtype}; expected true and false.")
    words = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    cast = plain.replace_strict(words, default=None, return_dtype=pl.Boolean).alias(column.name)
    lost = cast.is_null() & column.is_not_null()
    if lost.any():
        row = int(lost.arg_true()[0])
        raise ValueError(
            f"{source}: column {column.name!r}, row {row} holds {column[row]!r}; expected true or false (1 or 0)."
        )
    return cast


def _parse_iso(column: pl.Series, source: str) -> pl.Series:
    unique = column.unique().drop_nulls()
    micros: list[int] = []
    for text in unique.to_list():
        try:
            micros.append(parse_instant(text))
        except ValueError as error:
            row = (column == text).arg_true()[0]
            raise ValueError(f"{source}: column {column.name!r}, row {row}: {error}") from error
    parsed = pl.Series(micros, dtype=pl.Int64).cast(pl.Datetime("us"))
    return column.replace_strict(unique, parsed, default=None, return_dtype=pl.Datetime("us"))


def _without_non_finite(events: pl.DataFrame, source: str) -> pl.DataFrame:
    if "numeric_value" not in events.columns:
        return events
    bad = int((~events["numeric_value"].is_finite()).sum())
    if not bad:
        return events
    import logging

    logging.getLogger(__name__).warning(
        f"{source}: {bad} value(s) are NaN, infinite or beyond float32; they are read as missing."
    )
    value = pl.col("numeric_value")
    return events.with_columns(pl.when(value.is_finite()).then(value).alias("numeric_value"))

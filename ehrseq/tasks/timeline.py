"""What the tasks need of an event table: admissions, deaths and the first codes of interest, read in one pass.

Only boundary rows, deaths and codes that some task names are taken out of the table, so that memory follows the number
of admissions and not of events; a `LazyFrame` is never collected whole.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time

import polars as pl

from ehrseq.data.unread_codes import unread_deaths
from ehrseq.tasks.admissions import (
    END_UNKNOWN,
    IN_PROGRESS,
    Admissions,
    FollowUp,
    merge_admissions,
    merge_icu_stays,
    merge_visits,
)
from ehrseq.tasks.deaths import ends_in_death, patient_deaths
from ehrseq.tasks.encounters import encounters
from ehrseq.tasks.measures import code_without_unit, select_values
from ehrseq.tasks.schema import Task
from ehrseq.tasks.zones import Zones
from ehrseq.tokenization.ehr_codes import TIMEZONE, code_kinds, split_kind

logger = logging.getLogger(__name__)

_UNTIMED_CODE = datetime(1, 1, 1)
"""Time of a code without one (a static fact): known before everything else."""


@dataclass(frozen=True)
class Timeline:
    """The table, reduced to what labels depend on.

    Attributes:
        admissions: One row per admission, sorted by subject and start: subject_id, admission, start, start_day, end,
            status, expired (a discharge disposition says so), death, death_first, death_untimed and the days of the
            first two (see `patient_deaths`), next_start (of the next admission), in_progress_start (of the patient's
            admission in progress at the end of the data).
        first_codes: task -> subject_id, first_code (time), first_code_start (start of the admission that it belongs to,
            null for none): the patient's first code of the task.
        stays: `admission`, and `icu` and `visit` where a task asks for them -> the same columns for other stays.
        values: task -> subject_id, time, value: what measures the task's outcome.
        births: subject_id, birth.
        end_of_data: Last instant that the data cover.
        notes: Counts of what was met on the way: encounters, admissions, open ones, rows after the end of the data.
    """

    admissions: pl.DataFrame
    first_codes: dict[str, pl.DataFrame]
    end_of_data: datetime
    notes: dict[str, int]
    stays: dict[str, pl.DataFrame]
    values: dict[str, pl.DataFrame]
    births: pl.DataFrame


def read_timeline(
    events: pl.DataFrame | pl.LazyFrame,
    tasks: Sequence[Task],
    *,
    end_of_data: datetime | date | str | None = None,
    code_map: Sequence[Sequence[str]] | None = None,
    timezone: str | None = None,
    default_timezone: str | None = None,
    is_part: bool = False,
) -> Timeline:
    """Reduce an event table to what the labels of `tasks` depend on.

    Args:
        events: As of `label_events`.
        tasks: The tasks.
        end_of_data: As of `label_events`.
        code_map: As of `label_events`.
        timezone: As of `label_events`.
        default_timezone: Zone of patients whose rows name none, where `timezone` is not given.
        is_part: The events are those of some patients of a dataset: what is wrong with it is for others to say.
    """
    frame = _checked(events, with_values=any(task.measures for task in tasks))
    end = as_instant(end_of_data)
    beyond = pl.lit(0) if end is None else (pl.col("time") > end).sum()
    totals, unique = pl.collect_all(
        [
            frame.select(
                last=pl.col("time").max(),
                after=beyond,
                no_subject=pl.col("subject_id").null_count(),
                no_code=pl.col("code").null_count(),
            ),
            frame.select(pl.col("code").drop_nulls().unique()),
        ]
    )
    last, after, no_subject, no_code = totals.row(0)
    if no_subject:
        raise ValueError(
            f"events hold {no_subject} rows without subject_id; expected one in every row. Drop or mend them first."
        )
    if end is None:
        if last is None:
            raise ValueError("events hold no row with a time, so nothing can be labelled; expected timed MEDS rows.")
        end = last
        logger.warning(
            f"No end_of_data was given: follow-up is taken to end with the last event, {end}. If the data were "
            "extracted at a known date, give it: otherwise the last labels are censored at the wrong moment."
        )
    elif after and not is_part:
        logger.warning(f"{after} events after end_of_data ({end}) are left out of the labels.")

    codes = _code_table(unique["code"], tasks, code_map)
    # An end later than the data says that the encounter goes on.
    in_time = pl.col("time").is_null() | (pl.col("time") <= end)
    rows = (
        frame.filter(pl.col("code").is_in(codes["code"].implode()))
        .collect()
        .join(codes, on="code", how="left", maintain_order="left")
    )
    counts = {} if is_part else unread_deaths(events.lazy(), unique["code"], code_map)
    boundary = rows.filter(pl.col("kind").is_in(["visit_start", "visit_end"]))
    visits = encounters(boundary.select("subject_id", "time", "code", "visit_id"), code_map, until=end, report=counts)
    zones = Zones(rows.filter(pl.col("kind") == "timezone"), timezone, default_timezone)
    rows = rows.filter(in_time)
    deaths = patient_deaths(rows, end, zones)
    follow_up = FollowUp(end, deaths, zones)
    admissions = merge_admissions(visits, follow_up)
    table = _with_deaths(admissions, rows, deaths)
    stays = {"admission": table}
    if any(task.stays == "icu" or task.outcome == "icu_admission" for task in tasks):
        stays["icu"] = _with_deaths(merge_icu_stays(visits, admissions, follow_up), rows, deaths)
    if any(task.stays == "visit" for task in tasks):
        stays["visit"] = _with_deaths(merge_visits(visits, zones), rows, deaths)
    status = table["status"]
    notes = {
        **counts,
        "admissions": table.height,
        "admissions_in_progress": int((status == IN_PROGRESS).sum()),
        "admissions_end_unknown": int((status == END_UNKNOWN).sum()),
        "events_after_end_of_data": int(after),
        "events_without_code": int(no_code),
    }
    first_codes = {task.name: _first_codes(rows, task, admissions) for task in tasks if task.codes}
    values = {
        task.name: select_values(rows.filter(pl.col(f"task:{task.name}")), task.measures)
        for task in tasks
        if task.measures
    }
    births = rows.filter(pl.col("kind") == "birth").group_by("subject_id").agg(pl.col("time").min().alias("birth"))
    return Timeline(table, first_codes, end, notes, stays, values, births)


def _checked(events: pl.DataFrame | pl.LazyFrame, *, with_values: bool) -> pl.LazyFrame:
    """The columns that labels depend on, five or seven, with the types of the schema."""
    if not isinstance(events, (pl.DataFrame, pl.LazyFrame)):
        raise ValueError(
            f"events is a {type(events).__name__}; expected a polars DataFrame or LazyFrame of MEDS events."
        )
    frame = events.lazy()
    schema = frame.collect_schema()
    missing = [name for name in ("subject_id", "time", "code") if name not in schema]
    if missing:
        raise ValueError(f"events have no column {missing}; expected subject_id, time, code (got {schema.names()}).")
    if not schema["subject_id"].is_integer():
        raise ValueError(f"events column subject_id is {schema['subject_id']}; expected integers.")
    if not isinstance(schema["time"], pl.Datetime):
        raise ValueError(f"events column time is {schema['time']}; expected Datetime in UTC. Cast it first.")
    if schema["code"] not in (pl.String, pl.Categorical, pl.Enum):
        raise ValueError(f"events column code is {schema['code']}; expected strings.")
    instant = pl.col("time")
    if schema["time"].time_zone is not None:
        instant = instant.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    visit_id = pl.col("visit_id") if "visit_id" in schema else pl.lit(None)
    extra = []
    if with_values:
        if "numeric_value" not in schema or not schema["numeric_value"].is_numeric():
            raise ValueError(
                f"events column numeric_value is {schema.get('numeric_value', 'absent')}; expected numbers: a task "
                "looks at values."
            )
        unit = pl.col("unit").cast(pl.String) if "unit" in schema else pl.lit(None, pl.String).alias("unit")
        extra = [pl.col("numeric_value").cast(pl.Float32), unit]
    text = pl.col("text_value") if "text_value" in schema else pl.lit(None)
    return frame.select(
        pl.col("subject_id").cast(pl.Int64),
        instant.cast(pl.Datetime("us")).alias("time"),
        pl.col("code").cast(pl.String),
        visit_id.cast(pl.String).alias("visit_id"),
        text.cast(pl.String).alias("text_value"),
        *extra,
    )


def as_instant(value: datetime | date | str | None) -> datetime | None:
    """A moment in naive UTC; a bare date is its last instant."""
    if isinstance(value, str):
        try:
            value = date.fromisoformat(value) if len(value) == 10 else datetime.fromisoformat(value)
        except ValueError as error:
            raise ValueError(
                f"end_of_data={value!r} is no ISO 8601 date or time ({error}); expected 2020-12-31, for example."
            ) from error
    if value is None or isinstance(value, datetime):
        if value is not None and value.tzinfo is not None:
            value = value.astimezone(UTC).replace(tzinfo=None)
        return value
    if isinstance(value, date):
        return datetime.combine(value, time.max)
    raise ValueError(f"end_of_data is a {type(value).__name__}; expected a datetime, a date, ISO 8601 text or None.")


def _code_table(unique: pl.Series, tasks: Sequence[Task], code_map: Sequence[Sequence[str]] | None) -> pl.DataFrame:
    """Codes of interest with `kind`, `expired` and one boolean column per task that names codes (`task:<name>`), be
    they those of an event or of values.
    """
    names = unique.sort()
    kinds = [split_kind(kind)[0] for kind in code_kinds(names.to_list(), code_map)]
    kind = pl.when(pl.col("code").str.starts_with(TIMEZONE)).then(pl.lit("timezone")).otherwise("kind")
    table = pl.DataFrame({"code": names, "kind": pl.Series(kinds, dtype=pl.String)}).with_columns(
        kind.alias("kind"),
        ends_in_death().alias("expired"),
        *(_names(task).alias(f"task:{task.name}") for task in tasks if task.codes or task.measures),
    )
    wanted = [pl.col(name) for name in table.columns if name.startswith("task:")]
    kinds_needed = ["visit_start", "visit_end", "death", "timezone"]
    if any(task.ages != (None, None) for task in tasks):
        kinds_needed.append("birth")
    return table.filter(pl.any_horizontal(pl.col("kind").is_in(kinds_needed), *wanted))


def _names(task: Task) -> pl.Expr:
    """Whether a code is one of the task's, be it that of an event or of values, with or without its unit."""
    measured = [pattern for measure in task.measures for pattern in measure.codes]
    names = [pl.col("code").str.contains(pattern) for pattern in (*task.codes, *measured)]
    bare = [code_without_unit().str.contains(pattern).fill_null(value=False) for pattern in measured]
    return pl.any_horizontal(*names, *bare)


def _with_deaths(admissions: Admissions, rows: pl.DataFrame, deaths: pl.DataFrame) -> pl.DataFrame:
    """Adds expired, next_start, in_progress_start and the columns of `patient_deaths` to the admissions."""
    expired = rows.filter(pl.col("expired") & pl.col("time").is_not_null()).select("subject_id", "time")
    expired_stays = admissions.at(expired).filter(pl.col("admission").is_not_null()).select("admission").unique()
    return (
        admissions.table.join(expired_stays.with_columns(pl.lit(True).alias("expired")), on="admission", how="left")
        .join(deaths, on="subject_id", how="left")
        .sort("subject_id", "start")
        .with_columns(pl.col("expired", "death_untimed").fill_null(False))
        # Whoever has died is in hospital no more.
        .with_columns(
            pl.when(pl.col("death_untimed") & (pl.col("status") == IN_PROGRESS))
            .then(pl.lit(END_UNKNOWN))
            .otherwise("status")
            .alias("status")
        )
        .with_columns(
            pl.col("start").shift(-1).over("subject_id").alias("next_start"),
            pl.col("start")
            .filter(pl.col("status") == IN_PROGRESS)
            .first()
            .over("subject_id")
            .alias("in_progress_start"),
        )
        .drop("reach", "extent_start", "extent_end")
    )


def _first_codes(rows: pl.DataFrame, task: Task, admissions: Admissions) -> pl.DataFrame:
    """Time of each patient's first code of the task, and the start of the admission that it was recorded at."""
    coded = rows.filter(pl.col(f"task:{task.name}")).select(
        "subject_id", pl.col("time").fill_null(_UNTIMED_CODE), "visit_id"
    )
    first = coded.filter(pl.col("time") == pl.col("time").min().over("subject_id"))
    starts = admissions.table.select("admission", pl.col("start").alias("first_code_start"))
    return (
        admissions.locate(first)
        .join(starts, on="admission", how="left")
        # Codes of one instant at several places: an admission goes first, the latest of several.
        .group_by("subject_id")
        .agg(pl.col("time").min().alias("first_code"), pl.col("first_code_start").max())
    )

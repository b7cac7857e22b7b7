"""When a risk is wanted: prediction times as a user gives them, of all tasks alike or of each task by its labels.

A *moment* is a row of subject_id, prediction_time, task: one question to a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import polars as pl

from ehrseq.data.parquet import check_parquet
from ehrseq.data.schema import LABEL_KEYS
from ehrseq.tasks.label_sources import read_audited

LabelSource = str | Path | Mapping[str, pl.DataFrame]
"""Labels: a dataset, a folder or a file of them, or task -> table of subject_id, prediction_time."""


def checked_times(source: str | Path | pl.DataFrame) -> pl.DataFrame:
    """One row for each (subject_id, prediction_time), from a table or a file.

    Raises:
        ValueError: A file that cannot be read, or no table of whole numbers and times.
    """
    table = source if isinstance(source, pl.DataFrame) else _read_times(Path(source))
    missing = set(LABEL_KEYS) - set(table.columns)
    if missing:
        raise ValueError(
            f"prediction times lack {sorted(missing)}; expected subject_id, prediction_time, got {table.columns}."
        )
    subjects = table["subject_id"]
    if subjects.dtype.is_float() and (subjects != subjects.round()).any():
        raise ValueError("prediction times name patients by fractions; expected whole numbers.")
    try:
        times = table.select(pl.col("subject_id").cast(pl.Int64), pl.col("prediction_time").cast(pl.Datetime("us")))
    except pl.exceptions.PolarsError as error:
        types = {name: str(table.schema[name]) for name in LABEL_KEYS}
        raise ValueError(
            f"prediction times have the types {types}; expected whole numbers and times such as 2024-03-01T08:30:00."
        ) from error
    if times.is_empty():
        raise ValueError("the table of prediction times has no row; leave it out to score at the end of each record.")
    nulls = times.filter(pl.any_horizontal(pl.all().is_null())).height
    if nulls:
        raise ValueError(f"{nulls} prediction times lack the patient or the time; fill them in, or leave them out.")
    return times.unique(maintain_order=True)


def moments_of_all(times: pl.DataFrame, tasks: Iterable[str]) -> pl.DataFrame:
    """Every task at every time."""
    names = pl.DataFrame({"task": list(tasks)}, schema={"task": pl.String})
    return times.join(names, how="cross", maintain_order="left_right")


def last_times(events: pl.DataFrame) -> pl.DataFrame:
    """The end of each record."""
    return (
        events.filter(pl.col("time").is_not_null())
        .group_by("subject_id", maintain_order=True)
        .agg(pl.col("time").max().alias("prediction_time"))
    )


def read_labelled_times(source: LabelSource) -> dict[str, pl.DataFrame]:
    """The labelled times of each task.

    Raises:
        ValueError: Nothing to read, or a table that is no label table.
    """
    tables = source if isinstance(source, Mapping) else {task.name: task.labels for task in read_audited(source)}
    return {name: checked_times(table) for name, table in tables.items() if table.height}


def moments_of_labels(times: Mapping[str, pl.DataFrame], tasks: Iterable[str], notes: Counter[str]) -> pl.DataFrame:
    """Each task at its own labelled times; tasks that are on one side only are counted in `notes`.

    Args:
        times: From `read_labelled_times`.
        tasks: Tasks to score.
        notes: Counts what is left out.

    Raises:
        ValueError: None of the tasks has labels.
    """
    names = list(tasks)
    shared = [name for name in names if name in times]
    if not shared:
        raise ValueError(f"there are labels of {sorted(times)} and none of the tasks {names} to score; label these.")
    without = [name for name in names if name not in times]
    if without:
        notes[f"tasks of the checkpoint without labels, not scored: {', '.join(without)}"] += len(without)
    for name, table in times.items():
        if name not in shared:
            notes[f"labels of {name}, a task that is not scored"] += table.height
    return pl.concat([times[name].with_columns(task=pl.lit(name)) for name in shared])


def check_known(times: pl.DataFrame, subjects: pl.Series) -> None:
    """Refuse prediction times of patients that are not there.

    Raises:
        ValueError: There are such.
    """
    unknown = times.filter(~pl.col("subject_id").is_in(subjects.implode()))["subject_id"].unique(maintain_order=True)
    if len(unknown):
        raise ValueError(f"prediction times name {len(unknown)} patients without events, e.g. {unknown[0]}.")


def of_patients(moments: pl.DataFrame, subjects: pl.Series, notes: Counter[str]) -> pl.DataFrame:
    """The moments of patients that are there: labels often speak of a whole dataset; the others are counted.

    Raises:
        ValueError: There are none.
    """
    known = moments.filter(pl.col("subject_id").is_in(subjects.implode()))
    if known.is_empty():
        raise ValueError(
            f"none of the {moments.height:,} labelled times is of a patient of these data; are they labels of this "
            "dataset?"
        )
    if known.height < moments.height:
        notes["labelled times of other patients, not scored"] += moments.height - known.height
    return known


def _read_times(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise ValueError(f"no file {path}; give a Parquet or CSV file of subject_id, prediction_time.")
    if path.suffix != ".csv":
        check_parquet(path)
    try:
        return pl.read_csv(path, try_parse_dates=True) if path.suffix == ".csv" else pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as {path.suffix or 'Parquet'}: {reason}") from error

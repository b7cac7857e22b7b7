"""Label tables as rows to prompt for: which patient, which task, when, and how much of the patient is known then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from ehrseq.data.tables import as_column, check_columns, microseconds
from ehrseq.tokenization.ehr_plans import LabelIndex


def labels_of_subjects(labels: Mapping[str, Any], subject_ids: np.ndarray, task_names: Sequence[str]) -> LabelIndex:
    """The labels of some patients, tasks in the order given.

    Args:
        labels: Task name -> table of subject_id, prediction_time, boolean_value.
        subject_ids: The patients, ascending.
        task_names: The tokenizer's tasks.

    Raises:
        ValueError: A task that the tokenizer has no token for, or a table without these columns.
    """
    if not isinstance(labels, Mapping):
        raise ValueError(
            f"labels must be {{task name: table of subject_id, prediction_time, boolean_value}}, got "
            f"{type(labels).__name__}; give one table as {{{task_names[0] if task_names else 'name'!r}: table}}."
        )
    unknown = [task for task in labels if task not in task_names]
    if unknown:
        raise ValueError(
            f"labels name the tasks {unknown}; the tokenizer knows {list(task_names)}: tokenizer.add_task adds one."
        )
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int8))]
    skipped = 0
    for task, of_task in labels.items():
        what = f"labels of {task!r}"
        table = check_columns(of_task, ("subject_id", "prediction_time", "boolean_value"), what)
        frame = table.select(
            as_column(table, "subject_id", pl.Int64, what),
            microseconds(table, "prediction_time", what),
            pl.col("boolean_value").cast(pl.Int8).alias("label"),
        )
        nulls = {name: count for name, count in frame.null_count().row(0, named=True).items() if count}
        if nulls:
            raise ValueError(f"{what} have nulls ({nulls}); every label needs a subject, a time and an outcome.")
        subjects = frame["subject_id"].to_numpy()
        history = np.minimum(np.searchsorted(subject_ids, subjects), max(0, len(subject_ids) - 1))
        known = subject_ids[history] == subjects if len(subject_ids) else np.zeros(len(subjects), bool)
        skipped += int((~known).sum())
        time, label = frame["prediction_time"].to_numpy()[known], frame["label"].to_numpy()[known]
        parts.append((history[known], time, np.full(len(time), task_names.index(task), np.int32), label))
    history, time, task_ids, label = (np.concatenate(column) for column in zip(*parts, strict=True))
    return LabelIndex(
        history=history,
        task=task_ids,
        label=label,
        prediction_time=time,
        skipped={"subject_without_events": skipped} if skipped else {},
    )


def rows_until(row_time: np.ndarray, row_offsets: np.ndarray, history: np.ndarray, instant: np.ndarray) -> np.ndarray:
    """How many of its patient's rows each (patient, instant) knows: those up to and including the instant.

    Args:
        row_time: Ascending in each patient, [rows].
        row_offsets: Where the rows of each patient lie, [patients + 1].
        history: Positions of patients, [n].
        instant: In the unit of `row_time`, [n].
    """
    low, high = row_offsets[history].astype(np.int64), row_offsets[history + 1].astype(np.int64)
    begin = low.copy()
    # Binary search, one step for all at once.
    while (searching := np.flatnonzero(low < high)).size:
        middle = (low[searching] + high[searching]) // 2
        is_known = row_time[middle] <= instant[searching]
        low[searching[is_known]] = middle[is_known] + 1
        high[searching[~is_known]] = middle[~is_known]
    array: np.ndarray = low - begin
    return array

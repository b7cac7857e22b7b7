"""What is asked of a checkpoint about many patients: which tasks, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.batches.scoring import RiskModel
from ehrseq.tasks.moments import (
    LabelSource,
    check_known,
    checked_times,
    moments_of_all,
    moments_of_labels,
    of_patients,
    read_labelled_times,
)

TaskConfigs = Mapping[str, Mapping[str, Any]]
"""Entries of `config.tasks` by name."""

TaskNames = Sequence[str] | str | None
"""Names of tasks, one name, or None for all."""


@dataclass(frozen=True)
class RiskRequest:
    """What is wanted of a checkpoint.

    Attributes:
        tasks: Tasks to score.
        moments: subject_id, prediction_time, task; None = all tasks where each record, or each stay, ends.
        from_labels: Whether the moments are those of labels, which may speak of further patients.
        notes: What was left out of the request, counted.
    """

    tasks: TaskConfigs
    moments: pl.DataFrame | None
    from_labels: bool
    notes: Counter[str] = field(default_factory=Counter)

    def moments_of(self, subjects: pl.Series) -> pl.DataFrame | None:
        """The moments, when the patients are known.

        Raises:
            ValueError: A prediction time is of nobody here, or every label is.
        """
        if self.moments is None:
            return None
        if self.from_labels:
            return of_patients(self.moments, subjects, self.notes)
        check_known(self.moments, subjects)
        return self.moments


def read_request(
    model: RiskModel,
    checkpoint: str | Path,
    tasks: TaskNames,
    prediction_times: str | Path | pl.DataFrame | None,
    labels: LabelSource | None,
) -> RiskRequest:
    """What a call wants.

    Raises:
        ValueError: An unknown task, a table of prediction times or labels that is none, labels of none of the tasks.
    """
    configs = requested_tasks(model, checkpoint, tasks)
    if labels is None:
        times = None if prediction_times is None else checked_times(prediction_times)
        return RiskRequest(configs, None if times is None else moments_of_all(times, configs), from_labels=False)
    notes: Counter[str] = Counter()
    labelled = read_labelled_times(labels)
    unlabelled = [] if tasks is None else [name for name in configs if name not in labelled]
    if unlabelled:
        raise ValueError(f"there are no labels of {unlabelled}; there are those of {sorted(labelled)}.")
    return RiskRequest(configs, moments_of_labels(labelled, configs, notes), from_labels=True, notes=notes)


def requested_tasks(model: RiskModel, checkpoint: str | Path, tasks: TaskNames) -> TaskConfigs:
    """Entries of the checkpoint's `config.tasks` by name, those that are wanted.

    Raises:
        ValueError: It has none, or none of these.
    """
    known = {task["name"]: task for task in getattr(model.config, "tasks", None) or []}
    if not known:
        raise ValueError(f"{checkpoint} has no tasks in its config; finetune it first (examples/03_finetune.py).")
    wanted = list(known) if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
    unknown = [task for task in wanted if task not in known]
    if unknown or not wanted:
        raise ValueError(f"unknown tasks {unknown}; this checkpoint knows {list(known)}, name at least one.")
    return {name: known[name] for name in wanted}


def check_request(data: object, tasks: object, prediction_times: object, labels: object) -> None:
    """Refuse arguments that are of no use, before anything is loaded.

    Raises:
        ValueError: See above.
    """
    for name, value in (("data", data), ("prediction_times", prediction_times)):
        if not isinstance(value, str | Path | pl.DataFrame) and not (value is None and name == "prediction_times"):
            raise ValueError(f"{name} got {type(value).__name__}; expected a path or a polars DataFrame.")
    if labels is not None and not isinstance(labels, str | Path | Mapping):
        raise ValueError(f"labels got {type(labels).__name__}; expected a path, or tables by task.")
    if labels is not None and prediction_times is not None:
        raise ValueError("labels and prediction times both say when to score; give one of them.")
    if tasks is not None and not isinstance(tasks, str | list | tuple | set):
        raise ValueError(f"tasks got {tasks!r} ({type(tasks).__name__}); expected the name of a task, or a list.")

"""Risks of many patients at once, from a checkpoint and a folder of records, by the columnar path.

`pipeline("ehr-risk")` answers for a patient in hand; this is the same model on a whole export, encoded as one table.

A task is learnt at one kind of moment (a discharge, 24 hours after an admission) of patients for whom the answer is
open. Rows outside of that stay in the table with their `reason`, and are counted in the report: the score is null where
nothing is left to foretell (`died_before_prediction`, `death_time_unknown`, `earlier_code`, `stay_ended`) and given, to
be read with care, where the moment is another one (`no_discharge`, `off_anchor`). Rows with a null reason are what
evaluations speak of.

A checkpoint of HyMaTE has a feature extractor in the place of the tokenizer and reads stays: see
`ehrseq.prediction.stays`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from ehrseq.batches.scoring import RiskModel, check_batch_size
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import validate_events
from ehrseq.data.sources import load_events
from ehrseq.hub.checkpoints import load_checkpoint
from ehrseq.prediction.questions import TaskConfigs
from ehrseq.prediction.scoring import RISK_SCHEMA, score_events
from ehrseq.prediction.times import (
    LabelSource,
    check_known,
    checked_times,
    moments_of_all,
    moments_of_labels,
    of_patients,
    read_labelled_times,
)

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


def predict_risks(
    checkpoint: str | Path,
    data: str | Path | pl.DataFrame,
    *,
    tasks: TaskNames = None,
    prediction_times: str | Path | pl.DataFrame | None = None,
    labels: LabelSource | None = None,
    batch_size: int = 32,
    on_error: str = "raise",
    progress: bool = True,
) -> tuple[pl.DataFrame, ConversionReport]:
    """Score patients.

    Args:
        checkpoint: Folder of a finetuned checkpoint with its tokenizer, or `owner/name` on the Hub.
        data: FHIR or MEDS (folder or file), or an event table.
        tasks: Names of the tasks, or one name; None = all of the checkpoint.
        prediction_times: Table (or Parquet or CSV file) of subject_id, prediction_time; None = the last event of each
            patient, or where a checkpoint reads stays the end of each stay's window. Nothing later than it is read.
        labels: Labels whose times are the prediction times, each task at its own: a dataset with `labels/`, a folder
            of labels, a label table (Parquet), or task -> table. The answers in it are not read. Labels of tasks and
            patients that are not scored are counted in the report.
        batch_size: Rows (patient, time, task) in one forward pass.
        on_error: FHIR only: "raise" or "skip" (counted in the report).
        progress: Show progress bars.

    Returns:
        `(risks, report)`: a table subject_id, prediction_time, task, label (the positive outcome), score (its
        probability, null where there is nothing to foretell), reason (why the task does not apply, null where it does),
        and what was read and skipped.

    Raises:
        ValueError: An unknown task or patient, a checkpoint without tasks, tokenizer or trained head, unreadable data,
            both `labels` and `prediction_times`, labels of none of the tasks or patients.
    """
    check_request(data, tasks, prediction_times, labels, batch_size)
    loaded = load_checkpoint(checkpoint)
    request = read_request(loaded.model, checkpoint, tasks, prediction_times, labels)
    if isinstance(data, pl.DataFrame):
        events, report = validate_events(data), ConversionReport()
    else:
        events, report = load_events(data, on_error=on_error, progress=progress)
    if events.is_empty():
        raise ValueError(f"the data hold no event, so there is nobody to score. What was read:\n{report}")
    moments = request.moments_of(events["subject_id"].unique())
    report.notes.update(request.notes)
    risks = score_events(
        loaded, events, moments, request.tasks, notes=report.notes, batch_size=batch_size, progress=progress
    )
    return checked_risks(risks, checkpoint), report


def checked_risks(risks: pl.DataFrame, checkpoint: str | Path) -> pl.DataFrame:
    """Risks in the columns of `RISK_SCHEMA`, sorted.

    Raises:
        ValueError: One is no number.
    """
    scores = risks["score"].drop_nulls().to_numpy()
    if not np.isfinite(scores).all():
        raise ValueError(
            f"{checkpoint} gives {scores[~np.isfinite(scores)][0]} as a risk: its weights are damaged. Save it again."
        )
    return risks.match_to_schema(RISK_SCHEMA).sort("subject_id", "prediction_time", maintain_order=True)


def read_request(
    model: RiskModel,
    checkpoint: str | Path,
    tasks: TaskNames,
    prediction_times: str | Path | pl.DataFrame | None,
    labels: LabelSource | None,
) -> RiskRequest:
    """What a call of `predict_risks` wants.

    Raises:
        ValueError: See `predict_risks`.
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


def check_request(data: object, tasks: object, prediction_times: object, labels: object, batch_size: object) -> None:
    """Refuse arguments of `predict_risks` that are of no use, before anything is loaded.

    Raises:
        ValueError: See above.
    """
    check_batch_size(batch_size)
    for name, value in (("data", data), ("prediction_times", prediction_times)):
        if not isinstance(value, str | Path | pl.DataFrame) and not (value is None and name == "prediction_times"):
            raise ValueError(f"{name} got {type(value).__name__}; expected a path or a polars DataFrame.")
    if labels is not None and not isinstance(labels, str | Path | Mapping):
        raise ValueError(f"labels got {type(labels).__name__}; expected a path, or tables by task.")
    if labels is not None and prediction_times is not None:
        raise ValueError("labels and prediction times both say when to score; give one of them.")
    if tasks is not None and not isinstance(tasks, str | list | tuple | set):
        raise ValueError(f"tasks got {tasks!r} ({type(tasks).__name__}); expected the name of a task, or a list.")

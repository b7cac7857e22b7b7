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

from pathlib import Path

import numpy as np
import polars as pl

from ehrseq.batches.requests import TaskNames, check_request, read_request
from ehrseq.batches.scoring import check_batch_size
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import validate_events
from ehrseq.data.sources import load_events
from ehrseq.hub.checkpoints import load_checkpoint
from ehrseq.prediction.scoring import RISK_SCHEMA, score_events
from ehrseq.tasks.moments import LabelSource


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
    check_batch_size(batch_size)
    check_request(data, tasks, prediction_times, labels)
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

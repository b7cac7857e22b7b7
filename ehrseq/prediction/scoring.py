"""From events to risks, whatever the checkpoint reads: a reader says what to score, `score` scores it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.batches.requests import TaskConfigs
from ehrseq.hub.checkpoints import Checkpoint
from ehrseq.hub.families import FAMILIES
from ehrseq.prediction.prompts import PromptReader
from ehrseq.prediction.questions import RiskReader
from ehrseq.prediction.stays import StayReader

if TYPE_CHECKING:
    pass


RISK_SCHEMA = pl.Schema(
    {
        "subject_id": pl.Int64(),
        "prediction_time": pl.Datetime("us"),
        "task": pl.String(),
        "label": pl.String(),
        "score": pl.Float64(),
        "reason": pl.String(),
    }
)
"""Columns of a table of risks."""


def reader_of(checkpoint: Checkpoint) -> RiskReader:
    """The reader of a checkpoint's family."""
    reads_stays = FAMILIES[checkpoint.model.config.model_type].feature_extractor is not None
    return StayReader(checkpoint) if reads_stays else PromptReader(checkpoint)


def score_events(
    checkpoint: Checkpoint,
    events: pl.DataFrame,
    moments: pl.DataFrame | None,
    tasks: TaskConfigs,
    *,
    notes: Counter[str],
    batch_size: int,
    progress: bool,
    is_part: bool = False,
) -> pl.DataFrame:
    """Risks of an event table's patients.

    Args:
        checkpoint: A finetuned model and its encoder.
        events: Event table of whole patients.
        moments: See `RiskReader.questions`.
        tasks: Tasks to score.
        notes: Counts what was left out.
        batch_size: Rows in one forward pass.
        progress: Show progress bars.
        is_part: See `RiskReader.questions`.

    Returns:
        A table in the columns of `RISK_SCHEMA`.

    Raises:
        ValueError: See `RiskReader.questions`.
    """
    from ehrseq.batches.scoring import score

    questions = reader_of(checkpoint).questions(events, moments, tasks, is_part=is_part)
    notes.update(questions.notes)
    scores: NDArray[np.float64] = np.empty(0)
    if questions.rows is not None and questions.collate is not None:
        scores = score(
            checkpoint.model,
            questions.rows,
            questions.collate,
            task_ids=questions.task_ids,
            batch_size=batch_size,
            unit=questions.unit,
            progress=progress,
        )
    labels = {name: task.get("positive_label") for name, task in tasks.items()}
    return questions.table.with_columns(
        label=pl.col("task").replace_strict(labels, return_dtype=pl.String),
        score=pl.Series(scores, dtype=pl.Float64).gather(questions.table["row"]),
    ).select(pl.col(name).cast(kind) for name, kind in RISK_SCHEMA.items())

"""From events to risks, whatever the checkpoint reads: a reader says what to score, `score` scores it.

A reader knows one kind of encoder: `prompts.PromptReader` a tokenizer of events, `stays.StayReader` a feature extractor
of stays. Which one a family of models has stands in the registry (`ehrseq.hub.families`); here nobody asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.hub.checkpoints import Checkpoint
from ehrseq.hub.families import FAMILIES

if TYPE_CHECKING:
    from ehrseq.batches.scoring import Collator, ScoredRows

TaskConfigs = Mapping[str, Mapping[str, Any]]
"""Entries of `config.tasks` by name."""

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


@dataclass(frozen=True)
class Questions:
    """What a checkpoint is asked about some patients.

    Attributes:
        table: subject_id, prediction_time, task, reason (why the task does not apply, null where it does), row (the row
            whose score answers, null where there is no score).
        rows: Rows to score; None = there are none.
        collate: Makes a batch of rows.
        task_ids: `[rows]` index of each row's task in `config.tasks`; None where all tasks share a score.
        unit: What a row is called in the progress bar.
        notes: What was left out or is to be read with care, counted.
    """

    table: pl.DataFrame
    rows: ScoredRows | None = None
    collate: Collator | None = None
    task_ids: NDArray[np.int64] | None = None
    unit: str = "row"
    notes: Counter[str] = field(default_factory=Counter)


class RiskReader(Protocol):
    """Turns events into the questions of a checkpoint."""

    def questions(
        self, events: pl.DataFrame, moments: pl.DataFrame | None, tasks: TaskConfigs, *, is_part: bool
    ) -> Questions:
        """What there is to ask about these patients.

        Args:
            events: Event table of whole patients.
            moments: subject_id, prediction_time, task; None = all tasks, when the checkpoint's kind of record ends.
            tasks: Tasks to score.
            is_part: These are some patients of a larger dataset: that there is nothing to ask about them is no error.

        Raises:
            ValueError: There is nothing to ask, and this is no part of anything.
        """


def reader_of(checkpoint: Checkpoint) -> RiskReader:
    """The reader of a checkpoint's family."""
    module, name = FAMILIES[checkpoint.model.config.model_type].risk_reader.split(":")
    reader: RiskReader = getattr(import_module(f"ehrseq.{module}"), name)(checkpoint)
    return reader


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

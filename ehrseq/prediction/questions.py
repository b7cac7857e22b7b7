"""What a checkpoint is asked about some patients: the rows of its model, and the answers that need none.

Each kind of record has its reader: `prompts.PromptReader` of whole records, `stays.StayReader` of stays.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.batches.requests import TaskConfigs

if TYPE_CHECKING:
    from ehrseq.batches.scoring import Collator, ScoredRows


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

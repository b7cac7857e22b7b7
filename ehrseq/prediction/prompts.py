"""Questions to a model that is prompted (EhrMamba and the event baselines): one row for each time and task.

A task is learnt at one kind of moment (a discharge, 24 hours after an admission) of patients for whom the answer is
open. Rows outside of that have a reason, and no score where nothing is left to foretell.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, cast

import numpy as np
import polars as pl

from ehrseq.batches.collation import DataCollatorForPrompts
from ehrseq.batches.prompts import prompted_dataset
from ehrseq.batches.reasons import count_reasons, leaves_nothing_to_foretell, with_reasons
from ehrseq.batches.requests import TaskConfigs
from ehrseq.batches.scoring import config_task_ids
from ehrseq.data.schema import LABEL_KEYS
from ehrseq.hub.checkpoints import Checkpoint
from ehrseq.prediction.questions import Questions
from ehrseq.tasks.moments import last_times, moments_of_all

if TYPE_CHECKING:
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer


class PromptReader:
    """Reads events with a tokenizer.

    Args:
        checkpoint: A prompted classifier and its tokenizer.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = checkpoint.model
        self.tokenizer = cast("EhrTokenizer", checkpoint.encoder)

    def questions(
        self, events: pl.DataFrame, moments: pl.DataFrame | None, tasks: TaskConfigs, *, is_part: bool
    ) -> Questions:
        """See `RiskReader`; without moments every task is asked at the end of each record."""
        notes: Counter[str] = Counter()
        if moments is None:
            times = last_times(events)
            notes["patients without a timed event, not scored"] = events["subject_id"].n_unique() - times.height
            moments = moments_of_all(times, tasks)
        times_of = {
            task: moments.filter(pl.col("task") == task).select(*LABEL_KEYS, boolean_value=pl.lit(False))
            for task in tasks
        }
        context = cast("int", self.model.config.max_position_embeddings)  # no prompted model goes without
        rows = prompted_dataset(self.tokenizer, events, times_of, context)
        # Such a risk is the model's guess for somebody of whom it read nothing.
        notes["events of unknown codes, read as [UNK]"] = self.tokenizer.coverage(events)["lost_events"]
        notes["risks without a timed event up to the prediction time"] = int((rows.in_memory()[1].end == 0).sum())
        names = self.tokenizer.tasks
        table = pl.DataFrame(
            {
                "subject_id": rows.subject_ids,
                "prediction_time": rows.prediction_times,
                "task": [names[task_id] for task_id in rows.task_ids.tolist()],
            }
        )
        reasons = with_reasons(events, moments, tasks, self.tokenizer.vocabulary.kind)
        table = table.join(reasons, on=[*LABEL_KEYS, "task"], how="left", maintain_order="left")
        count_reasons(table, notes)
        has_score = table.select(~leaves_nothing_to_foretell()).to_series()
        scored = rows.subset(np.flatnonzero(has_score.to_numpy()))
        return Questions(
            table.with_columns(row=pl.when(has_score).then(has_score.cum_sum().cast(pl.Int64) - 1)),
            scored,
            DataCollatorForPrompts(self.tokenizer),
            config_task_ids(self.model, names)[scored.task_ids],
            notes=notes,
        )

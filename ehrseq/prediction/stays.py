"""Questions to a model of stays (HyMaTE): one row for each stay, whose one score answers every task.

Without prediction times every stay is scored once, at the end of the window that the checkpoint's feature extractor
reads (48 hours after the admission to intensive care, for the challenge of 2012); patients without a stay are counted
in the report. Stays of which nothing can be read stay in the table with a null score and their `reason`, and are
counted as well. Whether a task can be asked at all is told by the rules of every checkpoint (`ehr_anchors`): the dead
have no risk.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, cast

import polars as pl

from ehrseq.batches.readable_stays import STAY_REASONS, readable_stays
from ehrseq.batches.reasons import count_reasons, leaves_nothing_to_foretell, with_reasons
from ehrseq.batches.requests import TaskConfigs
from ehrseq.batches.triplet_collation import DataCollatorForTriplets
from ehrseq.batches.triplet_rows import TripletRows
from ehrseq.data.schema import LABEL_KEYS
from ehrseq.hub.checkpoints import Checkpoint
from ehrseq.prediction.questions import Questions
from ehrseq.tasks.moments import moments_of_all

if TYPE_CHECKING:
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor


class StayReader:
    """Reads stays with a feature extractor.

    Args:
        checkpoint: A trained `HyMaTEForSequenceClassification` and its feature extractor.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = checkpoint.model
        self.extractor = cast("HyMaTEFeatureExtractor", checkpoint.encoder)

    def questions(
        self, events: pl.DataFrame, moments: pl.DataFrame | None, tasks: TaskConfigs, *, is_part: bool
    ) -> Questions:
        """See `RiskReader`; without moments every stay is asked about at the end of its window.

        Raises:
            NoStayError: No stay begins in these events, and they are no part of a larger dataset.
        """
        notes: Counter[str] = Counter()
        stays = readable_stays(events, self.extractor, moments, notes, is_part=is_part)
        rows = None
        if stays.table is not None:
            rows = TripletRows(stays.table, self.extractor, max_length=self.model.config.max_position_embeddings)
        if moments is None:
            moments = moments_of_all(stays.answers.select(LABEL_KEYS), tasks)
        asked = with_reasons(events, moments, tasks, self.extractor.kind_of)
        found = stays.answers.rename({"reason": "why_not_read"})
        answers = asked.join(found, on=list(LABEL_KEYS), how="left", maintain_order="left")
        # What leaves nothing to foretell says more than what cannot be read, and that more than another moment.
        no_score = leaves_nothing_to_foretell()
        answers = answers.with_columns(
            row=pl.when(~no_score).then("row"),
            reason=pl.when(no_score).then("reason").otherwise(pl.coalesce("why_not_read", "reason")),
        ).drop("why_not_read")
        count_reasons(answers, notes)
        for reason, words in STAY_REASONS.items():
            notes[f"risks not given: {words}"] = int((answers["reason"] == reason).sum())
        return Questions(answers, rows, DataCollatorForTriplets(self.extractor), unit="stay", notes=notes)

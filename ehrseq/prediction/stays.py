"""Questions to a model of stays (HyMaTE): one row for each stay, whose one score answers every task.

Without prediction times every stay is scored once, at the end of the window that the checkpoint's feature extractor
reads (48 hours after the admission to intensive care, for the challenge of 2012); patients without a stay are counted
in the report. Stays of which nothing can be read stay in the table with a null score and their `reason`, and are
counted as well.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, cast

import numpy as np
import polars as pl

from ehrseq.batches.requests import TaskConfigs
from ehrseq.batches.triplet_collation import DataCollatorForTriplets
from ehrseq.batches.triplet_rows import TripletRows
from ehrseq.data.schema import LABEL_KEYS
from ehrseq.encode.triplets import STAY_REASONS, NoStayError, TripletTable, build_triplets
from ehrseq.hub.checkpoints import Checkpoint
from ehrseq.prediction.questions import Questions
from ehrseq.tasks.moments import last_times, moments_of_all

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
        times = None if moments is None else moments.select(LABEL_KEYS).unique(maintain_order=True)
        if times is None and self.extractor.spec.window_start == "before_prediction":
            times = last_times(events)
        rows, stays = None, pl.DataFrame(schema={**_KEY_SCHEMA, "row": pl.Int64, "reason": pl.String})
        try:
            table = build_triplets(events, self.extractor.spec, times, keep_empty=True)
        except NoStayError:
            if not is_part:
                raise
        else:
            rows, stays = self._rows(table, notes)
        if times is not None:
            without = times.join(stays, on=list(LABEL_KEYS), how="anti").with_columns(reason=pl.lit("no_stay"))
            stays = pl.concat([stays, without], how="diagonal")
        for reason, words in STAY_REASONS.items():
            notes[f"risks not given: {words}"] = int((stays["reason"] == reason).sum())
        if moments is None:
            notes["patients without a stay, not scored"] = (
                events["subject_id"].n_unique() - stays["subject_id"].n_unique()
            )
            moments = moments_of_all(stays.select(LABEL_KEYS), tasks)
        answers = moments.join(stays, on=list(LABEL_KEYS), how="left", maintain_order="left")
        return Questions(answers, rows, DataCollatorForTriplets(self.extractor), unit="stay", notes=notes)

    def _rows(self, table: TripletTable, notes: Counter[str]) -> tuple[TripletRows, pl.DataFrame]:
        """The stays of which something can be read as rows, and for every stay its row, or why it has none."""
        for reason, count in table.skipped.items():
            notes[f"triplets: {reason}"] = count
        known = self.extractor.was_fitted(table.variable_ids)
        notes["triplets of variables without training values, left out"] = int((~known).sum())
        readable = np.bincount(table.stay_ids[known], minlength=len(table)) > 0
        rows = TripletRows(
            dataclasses.replace(table.subset(readable), labels=None),
            self.extractor,
            max_length=self.model.config.max_position_embeddings,
        )
        is_read = pl.Series(readable)
        stays = pl.DataFrame(
            {"subject_id": table.subject_ids, "prediction_time": table.prediction_times.astype("datetime64[us]")}
        ).with_columns(
            row=pl.when(is_read).then(is_read.cum_sum().cast(pl.Int64) - 1),
            reason=pl.when(~is_read).then(pl.lit("no_triplet")),
        )
        return rows, stays


_KEY_SCHEMA = {"subject_id": pl.Int64(), "prediction_time": pl.Datetime("us")}

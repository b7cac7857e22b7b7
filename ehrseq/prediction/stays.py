"""Risks of stays, from a checkpoint that reads triplets (HyMaTE): what `risks` does for such a checkpoint.

Without prediction times every stay is scored once, at the end of the window that the checkpoint's feature extractor
reads (48 hours after the admission to intensive care, for the challenge of 2012); patients without a stay are counted
in the report. Stays of which nothing can be read stay in the table with a null score and their `reason`, and are
counted as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

REASONS = {
    "no_stay": "no window that the model reads begins before the prediction time",
    "no_triplet": "the stay holds no value of a variable that the model knows",
}
"""Why a stay has no score."""


def stay_risks(
    model: Any,
    extractor: Any,
    events: pl.DataFrame,
    times: pl.DataFrame | None,
    tasks: dict[str, Any],
    *,
    report: Any,
    batch_size: int,
    progress: bool,
) -> pl.DataFrame:
    """Score stays.

    Args:
        model: A trained `HyMaTEForSequenceClassification`.
        extractor: Its `HyMaTEFeatureExtractor`.
        events: Event table.
        times: subject_id, prediction_time; None = the end of every stay's window.
        tasks: Entries of `config.tasks` by name; a model of stays answers all of them with its one score.
        report: `ConversionReport` whose notes count what was left out.
        batch_size: Stays in one forward pass.
        progress: Show a progress bar.

    Returns:
        subject_id, prediction_time, task, label, score (null where there is none), reason.

    Raises:
        ValueError: No stay begins in these events, or none holds a triplet.
    """
    from ehrseq.batches.scoring import score_stays
    from ehrseq.encode.triplets import build_triplets

    table = build_triplets(events, extractor.spec, times, keep_empty=True)
    for reason, count in table.skipped.items():
        report.notes[f"triplets: {reason}"] += count
    known = extractor.was_fitted(table.variable_ids)
    readable = np.bincount(table.stay_ids[known], minlength=len(table)) > 0
    report.notes["triplets of variables without training values, left out"] += int((~known).sum())
    scores = np.full(len(table), np.nan)
    scores[readable] = score_stays(
        model,
        extractor,
        table.subset(readable),
        max_length=model.config.max_position_embeddings,
        batch_size=batch_size,
        progress=progress,
    )
    stays = pl.DataFrame(
        {
            "subject_id": table.subject_ids,
            "prediction_time": table.prediction_times.astype("datetime64[us]"),
            "score": scores,
            "readable": readable,
        }
    ).select(
        "subject_id",
        "prediction_time",
        pl.when("readable").then("score").alias("score"),
        pl.when(~pl.col("readable")).then(pl.lit("no_triplet")).alias("reason"),
    )
    if times is not None:
        unread = times.join(stays, on=["subject_id", "prediction_time"], how="anti")
        stays = pl.concat([stays, unread.with_columns(reason=pl.lit("no_stay"))], how="diagonal")
    for reason, words in REASONS.items():
        report.notes[f"risks not given: {words}"] += int((stays["reason"] == reason).sum())
    return pl.concat(
        [
            stays.select(
                "subject_id",
                "prediction_time",
                pl.lit(name).alias("task"),
                pl.lit(task.get("positive_label"), pl.String).alias("label"),
                "score",
                "reason",
            )
            for name, task in tasks.items()
        ]
    )

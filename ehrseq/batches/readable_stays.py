"""Which stays of some patients can be read, when, and why the others cannot."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from ehrseq.data.schema import LABEL_KEYS
from ehrseq.encode.triplets import NoStayError, TripletTable, build_triplets
from ehrseq.tasks.moments import last_times

if TYPE_CHECKING:
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

STAY_REASONS = {
    "no_stay": "no window that the model reads begins before the prediction time",
    "no_triplet": "the stay holds no value of a variable that the model knows",
}
"""Why a stay has no score."""


@dataclass(frozen=True)
class ReadableStays:
    """The stays of some patients.

    Attributes:
        answers: subject_id, prediction_time, row (the stay's in `table`, null where it cannot be read), reason (why
            not, a key of `STAY_REASONS`).
        table: The stays that can be read; None = there are none.
    """

    answers: pl.DataFrame
    table: TripletTable | None


def readable_stays(
    events: pl.DataFrame,
    extractor: HyMaTEFeatureExtractor,
    moments: pl.DataFrame | None,
    notes: Counter[str],
    *,
    is_part: bool,
) -> ReadableStays:
    """The stays that a checkpoint is asked about.

    Args:
        events: Event table of whole patients.
        extractor: What reads them.
        moments: Table of subject_id, prediction_time; None = every stay, at the end of its window.
        notes: Counts what was left out.
        is_part: These are some patients of a larger dataset: that no stay begins is no error.

    Raises:
        NoStayError: No stay begins in these events, and they are no part of a larger dataset.
    """
    times = None if moments is None else moments.select(LABEL_KEYS).unique(maintain_order=True)
    if times is None and extractor.spec.window_start == "before_prediction":
        times = last_times(events)
    table, stays = None, pl.DataFrame(schema={**_KEY_SCHEMA, "row": pl.Int64, "reason": pl.String})
    try:
        table = build_triplets(events, extractor.spec, times, keep_empty=True)
    except NoStayError:
        if not is_part:
            raise
    else:
        table, stays = _readable(table, extractor, notes)
    if times is not None:
        without = times.join(stays, on=list(LABEL_KEYS), how="anti").with_columns(reason=pl.lit("no_stay"))
        stays = pl.concat([stays, without], how="diagonal")
    for reason, words in STAY_REASONS.items():
        notes[f"risks not given: {words}"] = int((stays["reason"] == reason).sum())
    if moments is None:
        notes["patients without a stay, not scored"] = events["subject_id"].n_unique() - stays["subject_id"].n_unique()
    return ReadableStays(stays, table)


def _readable(
    table: TripletTable, extractor: HyMaTEFeatureExtractor, notes: Counter[str]
) -> tuple[TripletTable, pl.DataFrame]:
    """The stays of which something can be read, and for every stay its row among them, or why it has none."""
    for reason, count in table.skipped.items():
        notes[f"triplets: {reason}"] = count
    known = extractor.was_fitted(table.variable_ids)
    notes["triplets of variables without training values, left out"] = int((~known).sum())
    readable = np.bincount(table.stay_ids[known], minlength=len(table)) > 0
    is_read = pl.Series(readable)
    stays = pl.DataFrame(
        {"subject_id": table.subject_ids, "prediction_time": table.prediction_times.astype("datetime64[us]")}
    ).with_columns(
        row=pl.when(is_read).then(is_read.cum_sum().cast(pl.Int64) - 1),
        reason=pl.when(~is_read).then(pl.lit("no_triplet")),
    )
    return dataclasses.replace(table.subset(readable), labels=None), stays


_KEY_SCHEMA = {"subject_id": pl.Int64(), "prediction_time": pl.Datetime("us")}

"""When forecasts of many records are asked for where nobody says when."""

from __future__ import annotations

import numpy as np
import polars as pl

from ehrseq.data.splits import uniform_of
from ehrseq.tokenization.ehr_histories import EncodedHistories


def visit_ends(histories: EncodedHistories, *, seed: int = 0) -> pl.DataFrame:
    """One end of a visit of every patient, drawn by chance: when a doctor asks what comes next.

    The draw depends on the seed and the patient alone. Patients without a visit that has ended are left out.

    Returns:
        subject_id, prediction_time.
    """
    closes = ~histories.row_open.astype(bool)
    subjects, times = [], []
    for k, subject in enumerate(histories.subject_ids.tolist()):
        first, behind = int(histories.row_offsets[k]), int(histories.row_offsets[k + 1])
        ends = first + np.flatnonzero(closes[first:behind])
        if len(ends):
            order = histories.row_order[ends]
            ends = ends[np.append(order[1:] != order[:-1], True)]  # rows behind the end of a visit are of it
            place = int(uniform_of(np.array([subject]), seed)[0] * len(ends))
            subjects.append(subject)
            times.append(int(histories.row_time[ends[place]]))
    return pl.DataFrame(
        {"subject_id": pl.Series(subjects, dtype=pl.Int64), "prediction_time": pl.Series(times, dtype=pl.Int64)}
    ).with_columns(pl.col("prediction_time").cast(pl.Datetime("us")))

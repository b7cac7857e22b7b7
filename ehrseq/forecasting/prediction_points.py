"""When forecasts of many records are asked for where nobody says when: at the ends of visits."""

from __future__ import annotations

import numpy as np
import polars as pl

from ehrseq.tokenization.ehr_histories import EncodedHistories


def visit_ends(histories: EncodedHistories) -> pl.DataFrame:
    """Every end of a visit, when a doctor asks what comes next.

    All of them, or some drawn from all with equal chance, may stand for the moments at which a model would be asked.
    One drawn from each patient's record may not: of somebody who dies soon there are few to draw from, so that the last
    ones before a death would come too often, and no model could be calibrated at them.

    Returns:
        subject_id, prediction_time.
    """
    closed = ~histories.row_open.astype(bool)
    lengths = np.diff(histories.row_offsets)
    history = np.repeat(np.arange(len(histories)), lengths)
    # Rows behind the end of a visit are of it: its end is the last of them.
    following = np.append((history[1:] == history[:-1]) & (histories.row_order[1:] == histories.row_order[:-1]), False)
    ends = np.flatnonzero(closed & ~following & (histories.row_order > 0))
    times = pl.Series(histories.row_time[ends]).cast(pl.Datetime("us"))
    table = pl.DataFrame({"subject_id": histories.subject_ids[history[ends]], "prediction_time": times})
    return table.unique(maintain_order=True)  # a visit may begin and end at the instant at which another one ended

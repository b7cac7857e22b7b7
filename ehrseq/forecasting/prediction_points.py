"""Where forecasts of many encoded records begin: prediction times, and the prompts that a model reads there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from ehrseq.data.splits import uniform_of
from ehrseq.tokenization.ehr_forecast_prompts import RecordToForecast
from ehrseq.tokenization.ehr_histories import EncodedHistories
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer


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


def read_prompts(
    tokenizer: EhrTokenizer, events: pl.DataFrame, times: pl.DataFrame, *, max_length: int | None = None
) -> Iterator[RecordToForecast]:
    """What a model continues, of some records at some times.

    Args:
        tokenizer: Of the model.
        events: Whole records.
        times: subject_id, prediction_time (UTC), by patient.
        max_length: Context length: the most recent tokens stay. None = all.

    Yields:
        One a row of `times`.

    Raises:
        ValueError: A patient who is not there.
    """
    wanted = times["subject_id"].unique()
    records = events.filter(pl.col("subject_id").is_in(wanted.implode())).partition_by("subject_id", as_dict=True)
    patient: dict[str, Any] = {"subject_id": None, "events": []}
    for subject, time in times.select("subject_id", "prediction_time").iter_rows():
        if (subject,) not in records:
            raise ValueError(f"the records lack patient {subject}.")
        if subject != patient["subject_id"]:
            patient = {"subject_id": subject, "events": records[(subject,)].drop("subject_id").to_dicts()}
        yield tokenizer.forecast_prompt(patient, time, max_length)

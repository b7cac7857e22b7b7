"""Rows of multitask prompted finetuning (MPF) of some patients, encoded in memory.

Rows are never copied: a history is encoded once, a row is an index (history, end, task) that is cut when it is asked
for. Balancing therefore resamples indices. It happens before Trainer, whose own shuffling then mixes the tasks within
every batch, so that the unmodified Trainer can be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import polars as pl

from ehrseq.encode.rows import PromptedDataset

if TYPE_CHECKING:
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer


def prompted_dataset(
    tokenizer: EhrTokenizer, events: pl.DataFrame, labels: Mapping[str, pl.DataFrame], max_length: int
) -> PromptedDataset:
    """The MPF rows of some patients, encoded once and cut lazily.

    Args:
        tokenizer: A trained `EhrTokenizer` that knows the tasks.
        events: Events of these patients (others than the labels' are skipped).
        labels: Label table (subject_id, prediction_time, boolean_value) by task; labels of other patients are skipped.
        max_length: Context length.

    Returns:
        The dataset; empty when no label is about these patients.
    """
    subjects = events["subject_id"].unique()
    tables = {task: table.filter(pl.col("subject_id").is_in(subjects.implode())) for task, table in labels.items()}
    labelled = pl.concat([table["subject_id"] for table in tables.values()]).unique() if tables else subjects.head(0)
    histories = tokenizer.encode_histories(events.filter(pl.col("subject_id").is_in(labelled.implode())))
    return PromptedDataset(histories, histories.index_labels(tables), max_length)

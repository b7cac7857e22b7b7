"""Rows of multitask prompted finetuning (MPF): one row per (label, task), and the sampler that balances them.

Rows are never copied: a history is encoded once, a row is an index (history, end, task) that is cut when it is asked
for. Balancing therefore resamples indices. It happens before Trainer, whose own shuffling then mixes the tasks within
every batch, so that the unmodified Trainer can be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer


class PromptedDataset(Dataset[dict[str, Any]]):
    """Lazy MPF rows over encoded histories.

    Args:
        histories: `tokenizer.encode_histories(events)`.
        index: `histories.index_labels({task: labels})`, or a `subset` of it.
        max_length: Context length of a row, task tokens included.

    Each item holds the channels, `labels` (0/1) and `task_ids` (index into the tokenizer's tasks).
    """

    def __init__(self, histories: Any, index: Any, max_length: int) -> None:
        self.histories = histories
        self.index = index
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} is outside 0..{len(self) - 1}")
        values: dict[str, Any] = self.histories.prompted_row(self.index, int(row) % len(self), self.max_length)
        return values

    @property
    def subject_ids(self) -> NDArray[np.int64]:
        """`[n]` patient of each row (for the bootstrap over patients)."""
        array: np.ndarray = np.asarray(self.histories.subject_ids)[np.asarray(self.index.history)]
        return array

    @property
    def labels(self) -> NDArray[np.int64]:
        """`[n]` labels."""
        return np.asarray(self.index.label).astype(np.int64)

    @property
    def task_ids(self) -> NDArray[np.int64]:
        """`[n]` task ids."""
        return np.asarray(self.index.task).astype(np.int64)

    @property
    def prediction_times(self) -> NDArray[np.datetime64]:
        """`[n]` prediction times, datetime64[us] (naive UTC)."""
        return np.asarray(self.index.prediction_time).astype("datetime64[us]")

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[n]` tokens of each row, without assembling it."""
        return np.asarray(self.histories.plan_prompts(self.index, self.max_length).lengths)

    def subset(self, rows: ArrayLike) -> PromptedDataset:
        """The dataset of these rows, in this order (repeats allowed)."""
        return PromptedDataset(self.histories, self.index.subset(np.asarray(rows)), self.max_length)


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

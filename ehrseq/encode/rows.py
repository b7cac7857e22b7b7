"""Training rows as map-style datasets: windows and prompts, cut when they are asked for.

Both stand on patients that can be asked for a row, wherever those are: `EncodedHistories` holds them in memory,
`EncodedPatients` in files.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from ehrseq.encode.assembly import prompt_table
from ehrseq.tokenization.ehr_plans import SILENT_DAYS, LabelIndex, PromptIndex

if TYPE_CHECKING:
    import pyarrow as pa

    from ehrseq.tokenization.ehr_histories import EncodedHistories


class PromptedPatients(Protocol):
    """Patients of whom labels are asked; an index is one that `index_labels` of the same patients has made."""

    subject_ids: NDArray[np.int64]

    def prompted_row(self, index: Any, row: int, max_length: int | None = None) -> dict[str, Any]:
        """Channels of one row of an index, with `labels` and `task_ids`."""

    def prompt_parts(self, index: Any) -> Iterator[tuple[NDArray[np.int64], EncodedHistories, PromptIndex]]:
        """Part by part: which rows of an index, histories in memory, and the rows as an index into those."""


class WindowPlan(Protocol):
    """Windows before they are cut, one entry a window."""

    @property
    def history(self) -> NDArray[Any]:
        """Position of each window's patient."""

    @property
    def lengths(self) -> NDArray[Any]:
        """Tokens of each window."""


class WindowedPatients(Protocol):
    """Patients whose histories are cut into windows; a plan is one of the same patients."""

    subject_ids: NDArray[np.int64]

    def row(self, plan: Any, row: int) -> dict[str, Any]:
        """Channels of one window of a plan."""


class HistoryWindows(Dataset[dict[str, Any]]):
    """Pretraining rows, see `EncodedHistories.windows` and `EncodedDataset.windows`.

    Args:
        histories: The patients.
        plan: Their windows, in their order.
        silent_days: Of each patient the days between the last visit and the end of the data, 0 where they are unknown
            (`ehrseq.encode.follow_up`): the patient's last window then has the channel of that name, as the others
            have, with these days at its last token. None: no such channel.
    """

    def __init__(
        self, histories: WindowedPatients, plan: WindowPlan, silent_days: NDArray[np.float32] | None = None
    ) -> None:
        self.histories, self.plan, self.silent_days = histories, plan, silent_days

    def __len__(self) -> int:
        return len(self.plan.history)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"window {row} of {len(self)}")
        row %= len(self)
        values = self.histories.row(self.plan, row)
        if self.silent_days is not None:
            patient = self.plan.history[row]
            is_last = row + 1 == len(self) or self.plan.history[row + 1] != patient
            values[SILENT_DAYS] = np.zeros(len(values["input_ids"]), np.float32)
            values[SILENT_DAYS][-1] = self.silent_days[patient] * is_last
        return values

    @property
    def subject_ids(self) -> NDArray[np.int64]:
        """`[n]` patient of each window."""
        return np.asarray(self.histories.subject_ids[self.plan.history])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[n]` tokens of each window."""
        return np.asarray(self.plan.lengths)


class PromptedDataset(Dataset[dict[str, Any]]):
    """Rows of multitask prompted finetuning (MPF), one for each (label, task).

    Args:
        histories: The patients: `tokenizer.encode_histories(events)`, or `EncodedDataset.patients(splits)`.
        index: Their `index_labels({task: labels})`, or a `subset` of it.
        max_length: Context length of a row, task tokens included.

    Each item holds the channels, `labels` (0/1) and `task_ids` (index into the tokenizer's tasks).
    """

    def __init__(self, histories: PromptedPatients, index: LabelIndex, max_length: int) -> None:
        self.histories, self.index, self.max_length = histories, index, max_length

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} is outside 0..{len(self) - 1}")
        return self.histories.prompted_row(self.index, int(row) % len(self), self.max_length)

    @property
    def subject_ids(self) -> NDArray[np.int64]:
        """`[n]` patient of each row (for the bootstrap over patients)."""
        return np.asarray(self.histories.subject_ids[self.index.history])

    @property
    def labels(self) -> NDArray[np.int64]:
        """`[n]` labels."""
        return self.index.label.astype(np.int64)

    @property
    def task_ids(self) -> NDArray[np.int64]:
        """`[n]` task ids."""
        return self.index.task.astype(np.int64)

    @property
    def prediction_times(self) -> NDArray[np.datetime64]:
        """`[n]` prediction times, datetime64[us] (naive UTC)."""
        return self.index.prediction_time.astype("datetime64[us]")

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """`[n]` tokens of each row, without assembling it; of files, the patients are decoded for it."""
        lengths = np.zeros(len(self), np.int64)
        for rows, histories, index in self.histories.prompt_parts(self.index):
            lengths[rows] = histories.plan_prompts(index, self.max_length).lengths
        return lengths

    def tables(self) -> Iterator[pa.Table]:
        """The rows as tables of `EhrTokenizer.encode_table`: of files batch by batch, in their order."""
        for _, histories, index in self.histories.prompt_parts(self.index):
            yield prompt_table(histories, index, self.max_length)

    def subset(self, rows: ArrayLike) -> PromptedDataset:
        """The dataset of these rows, in this order (repeats allowed)."""
        return PromptedDataset(self.histories, self.index.subset(np.asarray(rows)), self.max_length)

    def in_memory(self) -> tuple[EncodedHistories, PromptIndex]:
        """The patients' histories, and the rows as an index into them.

        Raises:
            ValueError: They are in files.
        """
        if not isinstance(self.index, PromptIndex):
            raise ValueError(
                "these rows are cut from encoded files; histories in memory are needed: "
                "prompted_dataset(tokenizer, events, labels, max_length)."
            )
        return cast("EncodedHistories", self.histories), self.index

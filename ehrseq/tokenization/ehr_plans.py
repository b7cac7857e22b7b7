"""Rows before they are assembled: arrays of positions in `EncodedHistories` (`ehr_histories.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

MIN_CONTEXT = 8
"""Shortest context that holds a prompt, a visit's marks and an event with its interval."""
MAX_STATIC_SHARE = 4
"""Static tokens stay in a truncated sequence while [CLS] and they take at most a quarter of the context."""
CHANNELS = ["input_ids", "attention_mask", "token_type_ids", "times", "ages", "visit_orders", "visit_segments"]
SEGMENTS = "segment_ids"
"""The channel of packed rows: which of its sequences a token belongs to, see `ehrseq.batches.packing`."""
SILENT_DAYS = "silent_days"
"""The channel of pretraining rows whose follow-up is known: at the last token of a record the days without anything up
to the end of the data, 0 elsewhere; see `ehrseq.encode.follow_up`."""
CHANNEL_DTYPES = {
    "input_ids": np.int64,
    "attention_mask": np.int64,
    "token_type_ids": np.int64,
    "times": np.float32,
    "ages": np.float32,
    "visit_orders": np.int64,
    "visit_segments": np.int64,
}


def check_context(max_length: int) -> int:
    """The context length, where it is one.

    Raises:
        ValueError: It holds not even the special tokens and an event.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, (int, np.integer)) or max_length < MIN_CONTEXT:
        raise ValueError(
            f"max_length got {max_length!r}; a context holds the special tokens and an event from {MIN_CONTEXT} "
            "tokens on."
        )
    return int(max_length)


@dataclass
class RowPlan:
    """Which pieces make up each sequence: head, an inserted [VS], a slice of a body, a tail. One entry a row."""

    history: np.ndarray
    statics: np.ndarray  # number of static tokens behind the first token
    first_id: np.ndarray  # [CLS] or a task's token
    start: np.ndarray
    end: np.ndarray
    vs_at: np.ndarray  # where the [VS] stands that a cut visit gets back (flat position), -1 = none is needed
    shift: np.ndarray  # subtracted from visit orders
    tail: np.ndarray  # 0, 1 (last token) or 2 ([VE] and last token)
    last_id: np.ndarray
    last_time: np.ndarray  # microseconds
    close_time: np.ndarray
    order: np.ndarray

    def row(self, row: int) -> list[int]:
        """The fields of one row, in their order."""
        if len(self.history) == 1:  # a plan that was made for one row is asked once
            return [getattr(self, name).item() for name in _FIELDS]
        row_of_numbers: list[int] = self._numbers[row].tolist()
        return row_of_numbers

    @cached_property
    def _numbers(self) -> np.ndarray:
        """All fields side by side, int64 [rows, fields]."""
        return np.stack([getattr(self, name).astype(np.int64) for name in _FIELDS], axis=1)

    def subset(self, rows: Any) -> RowPlan:
        """The plan of some rows."""
        return RowPlan(**{name: getattr(self, name)[rows] for name in _FIELDS})

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        array: np.ndarray = 1 + self.statics + (self.vs_at >= 0) + self.end - self.start + self.tail
        return array


_FIELDS = tuple(part.name for part in fields(RowPlan))


@dataclass(kw_only=True)
class LabelIndex:
    """(patient, prediction time, task) rows; all arrays have one entry a row.

    Attributes:
        history: Position of the patient among those that the rows are cut from.
        task: Position of the task in the tokenizer's tasks.
        label: 0 or 1.
        prediction_time: Microseconds.
        skipped: Labels that no row was made of, by reason.
    """

    history: np.ndarray
    task: np.ndarray
    label: np.ndarray
    prediction_time: np.ndarray
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.history)

    def subset(self, rows: Any) -> Self:
        """The index of some rows, in the order given (positions, repeated ones too, or a mask)."""
        rows = np.asarray(rows)
        arrays = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays)


@dataclass(kw_only=True)
class PromptIndex(LabelIndex):
    """Labels as positions in an `EncodedHistories`.

    Attributes:
        end: Tokens of the history's body that are known at the prediction time.
        closed: Whether the last visit is closed then.
        close_time: Time of the latest known row (microseconds), which is when a closed visit ended.
        order: Order of the last visit, 0 where nothing is known yet.
    """

    end: np.ndarray
    closed: np.ndarray
    close_time: np.ndarray
    order: np.ndarray
    _plan: tuple[int, int | None, RowPlan] | None = field(default=None, init=False, repr=False)

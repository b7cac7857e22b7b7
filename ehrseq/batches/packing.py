"""Batches without padding: several patients in one row, and batches of patients of like length.

Histories differ in length by orders of magnitude; padded to the context, five in six tokens of a batch are nothing.
The packing collators put the patients of a batch one behind the other into as few rows as hold them. `segment_ids`
(1 .. S, 0 = padding) say who is who: the models reset their state there, so that every patient's outputs and gradients
are those of a row of its own.

The patients of a batch are packed, not the dataset. So the unmodified Trainer draws, counts, shards and resumes exactly
what it does without packing: `per_device_train_batch_size` counts patients, the classifier's loss is the mean over
them, that of next-token prediction is divided by the targets of all accumulated batches, and schedules and epochs keep
their length. A dataset of packs planned in advance would fill rows as well, but make batches of a varying number of
patients (whose mean loss then weighs a patient by its neighbours), always the same ones together.

Trainer has one collator for training and for evaluation, and it counts evaluated rows: packed, it would weigh their
losses by the number of rows and hand logits of another shape to the metrics. Therefore a training set says that its
rows may be packed (`PackableRows`); all others are padded, as before:

    Trainer(
        train_dataset=PackableRows(train),
        eval_dataset=tuning,
        data_collator=DataCollatorForPackedPrompts(tokenizer, max_length=2048),
        ...
    )
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from ehrseq.batches.collation import (
    FLOAT_CHANNELS,
    DataCollatorForNextToken,
    DataCollatorForPrompts,
    next_token_channels,
)
from ehrseq.modeling.risk_tasks import IGNORED_LABEL
from ehrseq.tokenization.ehr_plans import SEGMENTS

if TYPE_CHECKING:
    from transformers import TrainingArguments


class PackableRows(Dataset[dict[str, Any]]):
    """The rows of a training set, marked so that the packing collators put several into one.

    The mark is the channel `segment_ids`, 1 everywhere: it is an argument of the models, hence Trainer keeps it.

    Args:
        dataset: Map-style dataset of rows (dicts with `input_ids` and the other channels).
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        values = self.dataset[row]
        return {**values, SEGMENTS: np.ones(len(values["input_ids"]), np.int64)}

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[n]` tokens of each row, where the dataset knows them."""
        return np.asarray(self.dataset.lengths)


def pack_lengths(lengths: ArrayLike, max_length: int) -> list[list[int]]:
    """Distribute sequences over as few rows as hold them, the rows filled as evenly as can be.

    First-fit decreasing finds how many rows are needed; then the longest sequence left always goes to the shortest
    row. Rows of equal length need no padding, whereas first-fit leaves one row nearly empty.

    Args:
        lengths: `[n]` tokens of each sequence.
        max_length: Tokens that a row can hold.

    Returns:
        Positions of the sequences of each row, ascending; rows in the order of their first sequence. Depends on
        nothing but the arguments.

    Raises:
        ValueError: A sequence is empty or longer than a row.

    Example:
        >>> pack_lengths([5, 3, 9, 2, 1], max_length=10)
        [[0, 1, 3], [2, 4]]
    """
    sizes = np.asarray(lengths, np.int64)
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}.")
    if sizes.ndim != 1:
        raise ValueError(f"expected a flat list of lengths, got an array of shape {list(sizes.shape)}.")
    misfits = np.flatnonzero((sizes < 1) | (sizes > max_length))
    if len(misfits):
        raise ValueError(
            f"expected lengths from 1 to max_length={max_length}, got {sizes[misfits[0]]} at position {misfits[0]}: "
            "cut the rows to the context, or give a larger max_length."
        )
    longest_first = np.argsort(-sizes, kind="stable").tolist()
    rows: list[list[int]] = []
    room: list[int] = []
    for sequence in longest_first:
        size = int(sizes[sequence])
        row = next((number for number, left in enumerate(room) if left >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_length)
        rows[row].append(sequence)
        room[row] -= size

    even: list[list[int]] = [[] for _ in rows]
    filled = np.zeros(len(rows), np.int64)
    for sequence in longest_first:
        row = int(filled.argmin())
        even[row].append(sequence)
        filled[row] += sizes[sequence]
    packed = even if len(rows) and filled.max() <= max_length else rows
    return sorted(sorted(row) for row in packed)


def pack_channels(
    rows: Sequence[Mapping[str, Any]],
    channels: Sequence[str],
    plan: Sequence[Sequence[int]],
    *,
    pad_to_multiple_of: int | None = None,
) -> dict[str, torch.Tensor]:
    """Lay rows of several channels one behind the other.

    Args:
        rows: Rows; each maps every channel to a sequence of the row's length.
        channels: Channel names; `attention_mask` and `segment_ids` are made.
        plan: Positions of the rows of each packed row, as of `pack_lengths`.
        pad_to_multiple_of: Round the length up to a multiple of this.

    Returns:
        Tensors `[b, L]` by channel, `segment_ids` included; L is the length of the longest packed row, 0 behind the
        others' ends.

    Raises:
        ValueError: A missing channel, or channels of different length in a row.
    """
    sizes = [len(row["input_ids"]) for row in rows]
    length = max(sum(sizes[position] for position in row) for row in plan)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    names = [*(name for name in channels if name not in ("attention_mask", SEGMENTS)), "attention_mask", SEGMENTS]
    packed = {name: np.zeros((len(plan), length), np.float32 if name in FLOAT_CHANNELS else np.int64) for name in names}
    for number, positions in enumerate(plan):
        start = 0
        for segment, position in enumerate(positions, start=1):
            row, size = rows[position], sizes[position]
            place = slice(start, start + size)
            for name in names[:-2]:
                values = row.get(name)
                if values is None:
                    raise ValueError(f"row {position} lacks the channel {name!r}; it has {sorted(row)}.")
                if len(values) != size:
                    raise ValueError(
                        f"row {position}: channel {name!r} has length {len(values)}, input_ids has {size}. All "
                        "channels of a row must be cut alike."
                    )
                packed[name][number, place] = values
            mask = row.get("attention_mask")
            packed["attention_mask"][number, place] = 1 if mask is None else mask
            packed[SEGMENTS][number, place] = segment
            start += size
    return {name: torch.from_numpy(values) for name, values in packed.items()}


@dataclass
class _Packing:
    """What both packing collators share."""

    tokenizer: Any
    max_length: int
    pad_to_multiple_of: int | None = None

    def _plan(self, features: Sequence[Mapping[str, Any]]) -> list[list[int]] | None:
        """How to pack these rows; None when they are not marked as packable.

        Raises:
            ValueError: Only some are marked, or one is packed already.
        """
        marked = [SEGMENTS in row for row in features]
        if not any(marked):
            return None
        if not all(marked):
            raise ValueError(
                f"{sum(marked)} of {len(marked)} rows are marked as packable (segment_ids): expected all of a batch, "
                "or none. Wrap the whole training set in PackableRows."
            )
        for position, row in enumerate(features):
            if np.asarray(row[SEGMENTS]).max(initial=1) > 1:
                raise ValueError(f"row {position} is packed already: its segment_ids go beyond 1.")
        return pack_lengths([len(row["input_ids"]) for row in features], self.max_length)


@dataclass
class DataCollatorForPackedNextToken(_Packing):
    """NTP batches: packs rows that are marked by `PackableRows`, pads others as `DataCollatorForNextToken` does.

    Args:
        tokenizer: Gives the channels (`model_input_names`) and, for rows that are not packed, the `padding_side`.
        max_length: Tokens of a packed row, at least the longest history's (the context).
        pad_to_multiple_of: Round the length up to a multiple of this.
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows into tensors `[b, L]`, `labels` and, where packed, `segment_ids` included."""
        plan = self._plan(features)
        if plan is None:
            return DataCollatorForNextToken(self.tokenizer, self.pad_to_multiple_of)(features)
        channels = next_token_channels(self.tokenizer, features)
        batch = pack_channels(features, channels, plan, pad_to_multiple_of=self.pad_to_multiple_of)
        segments = batch[SEGMENTS]
        # A sequence's first token has no past to be told from: no target, and not counted as one by Trainer.
        first = torch.ones_like(segments, dtype=torch.bool)
        first[:, 1:] = segments[:, 1:] != segments[:, :-1]
        no_target = first | (segments == 0) | (batch["attention_mask"] == 0)
        batch["labels"] = batch["input_ids"].masked_fill(no_target, IGNORED_LABEL)
        return batch


@dataclass
class DataCollatorForPackedPrompts(_Packing):
    """MPF batches: packs rows that are marked by `PackableRows`, pads others as `DataCollatorForPrompts` does.

    Args:
        tokenizer: Gives the channels (`model_input_names`) and, for rows that are not packed, the `padding_side`.
        max_length: Tokens of a packed row, at least the longest prompt's (the context).
        pad_to_multiple_of: Round the length up to a multiple of this.
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows into tensors: channels and `segment_ids` `[b, L]`; `labels`, `task_ids` `[b, S]`, -100 = none.

        Rows that are not marked give channels `[b, L]`, `labels` and `task_ids` `[b]`.
        """
        plan = self._plan(features)
        if plan is None:
            return DataCollatorForPrompts(self.tokenizer, self.pad_to_multiple_of)(features)
        batch = pack_channels(
            features, self.tokenizer.model_input_names, plan, pad_to_multiple_of=self.pad_to_multiple_of
        )
        for name in ("labels", "task_ids"):
            if name in features[0]:
                values = torch.full((len(plan), max(map(len, plan))), IGNORED_LABEL)
                for number, positions in enumerate(plan):
                    values[number, : len(positions)] = torch.tensor([int(features[at][name]) for at in positions])
                batch[name] = values
        return batch


def evaluation_order(lengths: ArrayLike, args: TrainingArguments) -> NDArray[np.int64]:
    """The order in which Trainer evaluates the rows of a dataset.

    With `train_sampling_strategy="group_by_length"` Trainer groups the evaluated rows as well, and says so to nobody:
    what is known of each row beside the labels (its patient, say) must be put into this order for `compute_metrics`.

    Args:
        lengths: `[n]` tokens of each row of the evaluation dataset.
        args: Trainer's arguments.

    Returns:
        `[n]` positions in the dataset.
    """
    sizes = np.asarray(lengths, np.int64)
    if getattr(args, "train_sampling_strategy", None) != "group_by_length":
        return np.arange(len(sizes))
    from transformers.trainer_pt_utils import LengthGroupedSampler

    seed = args.seed if args.data_seed is None else args.data_seed
    generator = torch.Generator().manual_seed(seed)
    sampler = LengthGroupedSampler(args.eval_batch_size, lengths=sizes.tolist(), generator=generator)
    return np.fromiter(iter(sampler), np.int64, len(sizes))

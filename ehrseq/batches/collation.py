"""Batches for next-token prediction (NTP) and, faster than Trainer's own collator, for prompted rows.

Prompted rows need none of this: their tokenizer pads every channel, so Trainer's own `DataCollatorWithPadding` does.
For NTP the padding must not become a target, hence labels of -100 there. Here rows stay numpy arrays while they are
padded; `tokenizer.pad` goes through Python lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ehrseq.modeling.risk_tasks import IGNORED_LABEL
from ehrseq.tokenization.ehr_plans import SILENT_DAYS

FLOAT_CHANNELS = frozenset({"times", "ages", SILENT_DAYS})
"""Channels that are float32; all others are int64."""


def pad_channels(
    rows: Sequence[Mapping[str, Any]],
    channels: Sequence[str],
    *,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> dict[str, torch.Tensor]:
    """Pad rows of several channels to their common length with 0.

    Args:
        rows: Rows; each maps every channel to a sequence of the row's length.
        channels: Channel names, e.g. `tokenizer.model_input_names`. `attention_mask` is made where a row lacks it.
        padding_side: "right" or "left".
        pad_to_multiple_of: Round the length up to a multiple of this.

    Returns:
        Tensors `[b, L]` by channel.

    Raises:
        ValueError: No rows, a missing channel, channels of different length in a row, an unknown side.
    """
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}.")
    if not rows:
        raise ValueError("cannot pad an empty batch: expected at least one row.")
    lengths = [len(row["input_ids"]) for row in rows]
    length = max(lengths)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    batch: dict[str, torch.Tensor] = {}
    for channel in channels:
        padded = np.zeros((len(rows), length), np.float32 if channel in FLOAT_CHANNELS else np.int64)
        for position, (row, size) in enumerate(zip(rows, lengths, strict=True)):
            values = row.get(channel)
            if values is None:
                if channel != "attention_mask":
                    raise ValueError(f"row {position} lacks the channel {channel!r}; it has {sorted(row)}.")
                values = np.ones(size, np.int64)
            if len(values) != size:
                raise ValueError(
                    f"row {position}: channel {channel!r} has length {len(values)}, input_ids has {size}. All channels "
                    "of a row must be cut alike."
                )
            first = 0 if padding_side == "right" else length - size
            padded[position, first : first + size] = values
        batch[channel] = torch.from_numpy(padded)
    return batch


def next_token_channels(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tokenizer's channels, and that of known silences where rows have it."""
    return [*tokenizer.model_input_names, *([SILENT_DAYS] if any(SILENT_DAYS in row for row in rows) else [])]


@dataclass
class _ChannelCollator:
    """What both collators share: the tokenizer that names the channels and their padding."""

    tokenizer: Any
    pad_to_multiple_of: int | None = None

    def _channels(
        self, features: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        return pad_channels(
            features,
            names or self.tokenizer.model_input_names,
            padding_side=self.tokenizer.padding_side,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )


@dataclass
class DataCollatorForNextToken(_ChannelCollator):
    """Pads event sequences for NTP: channels with 0, labels with -100.

    Labels are the input ids themselves; the model shifts them.

    Args:
        tokenizer: Gives the channels (`model_input_names`) and the `padding_side`.
        pad_to_multiple_of: Round the length up to a multiple of this.
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows into tensors `[b, L]`, `labels` included."""
        batch = self._channels(features, next_token_channels(self.tokenizer, features))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        return batch


@dataclass
class DataCollatorForPrompts(_ChannelCollator):
    """Pads prompted rows as `DataCollatorWithPadding` does, without the way through Python lists.

    Args:
        tokenizer: Gives the channels (`model_input_names`) and the `padding_side`.
        pad_to_multiple_of: Round the length up to a multiple of this.
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows into tensors: channels `[b, L]`, `labels` and `task_ids` `[b]`."""
        batch = self._channels(features)
        for name in ("labels", "task_ids"):
            if name in features[0]:
                batch[name] = torch.tensor([int(row[name]) for row in features])
        return batch

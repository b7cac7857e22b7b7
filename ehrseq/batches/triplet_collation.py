"""Batches of stays for HyMaTE: padded, or packed one behind the other.

Rows are those of `TripletRows` (labels 0 or 1) and `ForecastRows` (labels and label_mask `[V]`); the collators tell
them apart by their labels. As for events (`ehrseq.batches.packing`), the rows of a training set are packed where
they are marked, and others (Trainer's evaluation) are padded:

    Trainer(
        train_dataset=PackableTriplets(train_rows),
        eval_dataset=tuning_rows,
        data_collator=DataCollatorForPackedTriplets(extractor, max_length=2048),
        ...
    )
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ehrseq.batches.packing import PackableRows, pack_lengths
from ehrseq.modeling.risk_tasks import IGNORED_LABEL
from ehrseq.tokenization.ehr_plans import SEGMENTS

CHANNEL_TYPES: dict[str, type[np.generic]] = {"variable_ids": np.int64, "times": np.float32, "values": np.float32}
"""Channels of a stay's length, beside the mask."""


class PackableTriplets(PackableRows):
    """The rows of a training set, marked so that `DataCollatorForPackedTriplets` puts several into one.

    Args:
        dataset: `TripletRows`, `ForecastRows` or another map-style dataset of such rows.
    """

    def __getitem__(self, row: int) -> dict[str, Any]:
        values = self.dataset[row]
        return {**values, SEGMENTS: np.ones(len(values["variable_ids"]), np.int64)}

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to the rows."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


@dataclass
class DataCollatorForTriplets:
    """Pads stays to the longest of the batch, with 0 in every channel.

    Args:
        extractor: Gives the `padding_side`.
        pad_to_multiple_of: Round the length up to a multiple of this.
    """

    extractor: Any
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows into tensors.

        Returns:
            `variable_ids`, `times`, `values`, `attention_mask` `[b, n]`, `static_values` `[b, D]`, and where the rows
            have them `labels` `[b]`, or `labels` and `label_mask` `[b, V]`, and `auxiliary_targets` `[b, A]`.

        Raises:
            ValueError: No rows, a row without a triplet, a channel absent or of another length.
        """
        sizes = triplets_of_each(features)
        length = _round_up(max(sizes), self.pad_to_multiple_of)
        left = self.extractor.padding_side == "left"
        starts = [length - size if left else 0 for size in sizes]
        arrays = _empty(len(features), length)
        for number, (row, size, start) in enumerate(zip(features, sizes, starts, strict=True)):
            _lay(arrays, number, start, row, size)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["static_values"] = torch.from_numpy(np.stack([_static(row) for row in features]))
        for name, fill in _row_entries(features[0]).items():
            entries = np.stack([np.asarray(row[name], fill.dtype) for row in features])
            batch[name] = torch.from_numpy(entries)
        return batch


@dataclass
class DataCollatorForPackedTriplets:
    """Packs rows that are marked by `PackableTriplets`, pads others as `DataCollatorForTriplets` does.

    Args:
        extractor: Gives the `padding_side` of rows that are not packed.
        max_length: Triplets of a packed row, at least the longest stay's.
        pad_to_multiple_of: Round the length up to a multiple of this.
    """

    extractor: Any
    max_length: int
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows into tensors.

        Returns:
            Where packed: `variable_ids`, `times`, `values`, `attention_mask`, `segment_ids` `[b, n]` (1 .. S by row,
            0 = padding), `static_values` `[b, S, D]`, and `labels` `[b, S]` (-100 where a row has fewer stays) or
            `labels` and `label_mask` `[b, S, V]`, and `auxiliary_targets` `[b, S, A]` (NaN there); S is the largest
            number of stays in a row.

        Raises:
            ValueError: As `DataCollatorForTriplets`; only some rows are marked, or a stay is longer than a row.
        """
        marked = [SEGMENTS in row for row in features]
        if not any(marked):
            return DataCollatorForTriplets(self.extractor, self.pad_to_multiple_of)(features)
        if not all(marked):
            raise ValueError(
                f"{sum(marked)} of {len(marked)} rows are marked as packable (segment_ids): expected all of a batch, "
                "or none. Wrap the whole training set in PackableTriplets."
            )
        sizes = triplets_of_each(features)
        plan = pack_lengths(sizes, self.max_length)
        length = _round_up(max(sum(sizes[at] for at in positions) for positions in plan), self.pad_to_multiple_of)
        segments = max(map(len, plan))
        arrays = _empty(len(plan), length)
        arrays[SEGMENTS] = np.zeros((len(plan), length), np.int64)
        static = np.zeros((len(plan), segments, len(_static(features[0]))), np.float32)
        entries = {
            name: np.full((len(plan), segments, *np.shape(features[0][name])), fill)
            for name, fill in _row_entries(features[0]).items()
        }
        for number, positions in enumerate(plan):
            start = 0
            for segment, at in enumerate(positions):
                row, size = features[at], sizes[at]
                _lay(arrays, number, start, row, size)
                arrays[SEGMENTS][number, start : start + size] = segment + 1
                static[number, segment] = _static(row)
                for name, entry in entries.items():
                    entry[number, segment] = row[name]
                start += size
        arrays["static_values"] = static
        return {name: torch.from_numpy(array) for name, array in (arrays | entries).items()}


def triplets_of_each(features: Sequence[Mapping[str, Any]]) -> list[int]:
    """Triplets of each row.

    Raises:
        ValueError: No rows, a row without a triplet, a channel absent or of another length.
    """
    if not features:
        raise ValueError("cannot make a batch of no rows: expected at least one.")
    sizes = []
    for position, row in enumerate(features):
        for name in (*CHANNEL_TYPES, "static_values"):
            if row.get(name) is None:
                raise ValueError(f"row {position} lacks the channel {name!r}; it has {sorted(row)}.")
        size = len(row["variable_ids"])
        if not size:
            raise ValueError(f"row {position} holds no triplet; leave stays without one out (build_triplets does).")
        for name in CHANNEL_TYPES:
            if len(row[name]) != size:
                raise ValueError(
                    f"row {position}: channel {name!r} has length {len(row[name])}, variable_ids has {size}. All "
                    "channels of a stay must be cut alike."
                )
        for name in ("labels", "label_mask", "auxiliary_targets"):
            if (name in row) != (name in features[0]):
                raise ValueError(f"some rows have {name!r} and some have not; expected all of a batch, or none.")
        sizes.append(size)
    return sizes


def _empty(rows: int, length: int) -> dict[str, Any]:
    arrays: dict[str, Any] = {name: np.zeros((rows, length), dtype) for name, dtype in CHANNEL_TYPES.items()}
    arrays["attention_mask"] = np.zeros((rows, length), np.int64)
    return arrays


def _lay(arrays: dict[str, Any], number: int, start: int, row: Mapping[str, Any], size: int) -> None:
    """Write one stay into row `number` of the batch, from `start` on."""
    place = slice(start, start + size)
    for name in CHANNEL_TYPES:
        arrays[name][number, place] = row[name]
    mask = row.get("attention_mask")
    arrays["attention_mask"][number, place] = 1 if mask is None else mask


def _static(row: Mapping[str, Any]) -> Any:
    return np.asarray(row["static_values"], np.float32).reshape(-1)


def _row_entries(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row has one of, beside static values -> what stands where a packed row has no stay, in its type."""
    is_class = np.ndim(row.get("labels", 0)) == 0
    fills: dict[str, Any] = {
        "labels": np.int64(IGNORED_LABEL) if is_class else np.float32(0),
        "label_mask": np.float32(0),
        "auxiliary_targets": np.float32(np.nan),
    }
    return {name: fill for name, fill in fills.items() if name in row}


def _round_up(length: int, multiple: int | None) -> int:
    return -(-length // multiple) * multiple if multiple else length

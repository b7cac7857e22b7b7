"""What HyMaTE's inputs must be, and the first things that are read off them.

Glossary: b batch, n length (triplets), S packed sequences of a row, D num_static, V num_variables.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .configuration_hymate import HyMaTEConfig
from .ehr_embeddings import check_segment_ids


def check_inputs(
    config: HyMaTEConfig,
    static_values: Tensor | None,
    channels: Mapping[str, Tensor | None],
    masks: Mapping[str, Tensor | None],
) -> None:
    """Raise a ValueError that names the channel for a wrong shape, an id out of range or a value that is not finite.

    Values are looked at on CPU only: elsewhere that would wait for the device, and embedding lookups fail there by
    themselves.

    Args:
        config: Sizes.
        static_values: [b, D] or [b, S, D].
        channels: variable_ids, times and values, which are needed, [b, n].
        masks: attention_mask and segment_ids, which are not.
    """
    missing = [name for name, channel in channels.items() if channel is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing: a triplet has variable_ids, times and values, all [b, n].")
    present = {name: channel for name, channel in {**channels, **masks}.items() if channel is not None}
    shape = present["variable_ids"].shape
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(
            f"variable_ids has shape {list(shape)}: expected [batch, triplets] with at least one triplet a row."
        )
    for name, channel in present.items():
        if channel.shape != shape:
            raise ValueError(
                f"{name} has shape {list(channel.shape)}, expected {list(shape)} like variable_ids: pad and cut all "
                "channels together (feature_extractor.pad does)."
            )
    _check_static(config, static_values, shape[0], packed="segment_ids" in present)
    if present["variable_ids"].device.type != "cpu" or torch.compiler.is_compiling():
        return
    _check_values(config, present if static_values is None else {**present, "static_values": static_values})


def _check_static(config: HyMaTEConfig, static_values: Tensor | None, batch: int, packed: bool) -> None:
    expected = f"[{batch}, sequences, {config.num_static}]" if packed else f"[{batch}, {config.num_static}]"
    if static_values is None:
        if config.num_static:
            raise ValueError(
                f"static_values missing: expected {expected} (config.num_static={config.num_static}; 0 for a model "
                "without them)."
            )
        return
    lead = static_values.shape[:-1]
    if static_values.dim() != 2 + packed or lead[0] != batch or static_values.shape[-1] != config.num_static:
        raise ValueError(f"static_values has shape {list(static_values.shape)}, expected {expected}.")


def _check_values(config: HyMaTEConfig, present: Mapping[str, Tensor]) -> None:
    for name, channel in present.items():
        if channel.numel() == 0:
            continue
        if name == "variable_ids":
            low, high = int(channel.min()), int(channel.max())
            if low < 0 or high >= config.num_variables:
                raise ValueError(
                    f"variable_ids holds values from {low} to {high}, expected 0 .. {config.num_variables - 1} "
                    f"(config.num_variables={config.num_variables})."
                )
        elif name == "segment_ids":
            check_segment_ids(channel)
        elif channel.is_floating_point() and not bool(torch.isfinite(channel).all()):
            raise ValueError(
                f"{name} holds NaN or infinite values: mend them before the model, they would spoil whole rows."
            )


def real_triplets(attention_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor | None:
    """Mask [b, n], bool, False at padding; None where there is none, as far as that is known without waiting."""
    real = None if attention_mask is None else attention_mask.bool()
    if segment_ids is not None:
        real = segment_ids > 0 if real is None else real & (segment_ids > 0)
    if real is not None and real.device.type == "cpu" and not torch.compiler.is_compiling() and bool(real.all()):
        return None
    return real


def num_segments_of(segment_ids: Tensor | None, static_values: Tensor | None, wanted: int | None) -> int:
    """S, the packed sequences that a row has room for; 1 without packing.

    Raises:
        ValueError: `segment_ids` has more of them than labels or static values have room for.
    """
    if segment_ids is None:
        return 1
    most = int(segment_ids.max())
    rooms = {"labels": wanted, "static_values": None if static_values is None else static_values.shape[1]}
    for name, room in rooms.items():
        if room is not None and most > room:
            raise ValueError(
                f"A row packs {most} sequences, {name} have room for {room}: give {name} [batch, sequences, ...], "
                "padded to the row with the most."
            )
    present = {room for room in rooms.values() if room is not None}
    if len(present) > 1:
        raise ValueError(f"labels have room for {wanted} sequences a row, static_values for {rooms['static_values']}.")
    return present.pop() if present else max(most, 1)


def check_rows(real: Tensor | None, segment_ids: Tensor | None) -> None:
    """Raise a ValueError for a row without a triplet, where that can be seen without waiting for a device.

    Args:
        real: bool [b, n], None without padding.
        segment_ids: [b, n], None without packing; a packed row may have fewer sequences than others.
    """
    if real is None or segment_ids is not None or real.device.type != "cpu" or torch.compiler.is_compiling():
        return
    empty = (~real.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"Rows {empty} hold no triplet (attention_mask is 0): there is nothing to read. Leave such patients out, "
            "or let variable dropout spare one variable."
        )


def check_labels(labels: Tensor, logits: Tensor, segment_ids: Tensor | None) -> None:
    """Raise a ValueError unless there is one label for each row of logits, and none for a sequence that is not there.

    Args:
        labels: Classes, negative where there is none.
        logits: [b, classes] or [b, S, classes].
        segment_ids: [b, n], None without packing.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have shape {list(labels.shape)}, expected one label for each of the {list(logits.shape[:-1])} "
            "rows (packed: [batch, sequences])."
        )
    if segment_ids is None or labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    numbers = torch.arange(1, labels.shape[1] + 1)
    if bool(((labels >= 0) & (numbers > segment_ids.amax(1, keepdim=True))).any()):
        raise ValueError("labels has classes for sequences that segment_ids does not have: pad it with -100.")


__all__ = ["check_inputs", "check_labels", "check_rows", "num_segments_of", "real_triplets"]

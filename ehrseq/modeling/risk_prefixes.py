"""A classifier asked after each of many prefixes of one row, as whole rows: what every model can do, at a row's price
for each.

Glossary: l tokens (triplets) of the row, k prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

ROWS, TOKENS = 32, 32_768
"""Rows, and tokens, of one forward pass at most."""

OF_THE_ROW = frozenset({"static_values"})
"""Inputs that are no channel of tokens."""


def check_prefixes(
    inputs: Mapping[str, Tensor], ends: Tensor, tails: Mapping[str, Tensor], tail_lengths: Tensor
) -> None:
    """Raise a ValueError unless these are prefixes of one row.

    Raises:
        ValueError: Several rows or a padded one, prefixes that are none of its, or tails of another shape.
    """
    length = next(channel.shape[-1] for name, channel in inputs.items() if name not in OF_THE_ROW)
    if any(channel.shape[0] != 1 for channel in inputs.values()):
        raise ValueError(f"prefixes are of one row, got {next(iter(inputs.values())).shape[0]}; ask row by row.")
    mask = inputs.get("attention_mask")
    if (mask is not None and not bool(mask.all())) or inputs.get("segment_ids") is not None:
        raise ValueError("prefixes are of a row without padding and packing; take the padding off, and unpack it.")
    if ends.dim() != 1 or not len(ends) or not bool(((ends >= 1) & (ends <= length)).all()):
        raise ValueError(f"ends must be a flat list of numbers from 1 to {length}, got {ends.tolist()[:5]}.")
    if bool((ends[1:] < ends[:-1]).any()):
        raise ValueError("ends must ascend: the shortest prefix first.")
    wrong = [name for name, tail in tails.items() if tail.shape != (len(ends), 2)]
    if wrong or tail_lengths.shape != ends.shape:
        raise ValueError(f"tails {wrong} and their lengths must be of {len(ends)} prefixes, [k, 2] and [k].")


@torch.no_grad()
def whole_prefix_logits(
    classify: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    ends: Tensor,
    tails: Mapping[str, Tensor],
    tail_lengths: Tensor,
) -> Tensor:
    """Logits [k, classes] of prefixes that are made to rows and padded on the right, some at a time.

    Args:
        classify: The model.
        inputs: Channels of the row, [1, l], and what belongs to it as a whole.
        ends: First tokens that each prefix keeps, [k], ascending.
        tails: Channel -> [k, 2], what follows them; none where nothing does.
        tail_lengths: How much of the two that is, [k].
    """
    lengths = ends + tail_lengths
    logits = []
    first = 0
    while first < len(ends):
        size = min(ROWS, len(ends) - first)
        while size > 1 and size * int(lengths[first : first + size].max()) > TOKENS:
            size //= 2
        rows = slice(first, first + size)
        made = _rows(inputs, ends[rows], {name: tail[rows] for name, tail in tails.items()}, lengths[rows])
        logits.append(classify(**made).logits)
        first += size
    return torch.cat(logits)


def _rows(
    inputs: Mapping[str, Tensor], ends: Tensor, tails: Mapping[str, Tensor], lengths: Tensor
) -> dict[str, Tensor]:
    """Some prefixes as rows [r, m]."""
    places = torch.arange(int(lengths.max()), device=ends.device)
    kept, real = places < ends[:, None], places < lengths[:, None]
    behind = (places - ends[:, None]).clamp(0, 1)  # places in the tail
    made = {}
    for name, channel in inputs.items():
        if name in OF_THE_ROW:
            made[name] = channel.expand(len(ends), *channel.shape[1:])
            continue
        row = channel[0, places.clamp(max=channel.shape[1] - 1)].expand(len(ends), -1)
        if name in tails:
            row = torch.where(kept, row, tails[name].to(channel.dtype).gather(1, behind))
        made[name] = row.masked_fill(~real, 0)
    made["attention_mask"] = real.long()
    return made


__all__ = ["check_prefixes", "whole_prefix_logits"]

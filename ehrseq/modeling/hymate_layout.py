"""How the triplets of a batch lie in memory while HyMaTE's blocks run.

A batch comes padded (rows of different length) or packed (several sequences in a row). Neither is how it is computed
fastest on a CPU: padding costs Mamba and attention as much as real triplets do, and attention over a packed row
computes all pairs of its triplets, though it may use only those within a sequence. Hence two layouts with equal
results:

    joined    the real triplets of all sequences, one behind the other in one row [1, T]. Mamba's state is reset where a
              sequence starts; attention runs over one sequence after the other, whose triplets are a slice. No pair of
              triplets is computed that is not needed. For CPUs.
    as given  the rows of the batch, with masks, the padding of each moved behind its triplets, where Mamba, which is
              causal, never reads it. For accelerators, where long rows would leave most of the device idle;
              under `torch.compile`, which wants shapes that do not depend on the values; when all hidden states or all
              attention weights are asked for; and where there is nothing to gain: rows of equal length.

Glossary: b batch, n length (triplets), S packed sequences of a row (1 without packing), R = b S sequences, T real
triplets of the batch, N triplets of the layout with padding (T or b n).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .ehr_embeddings import segment_starts


@dataclass(frozen=True)
class TripletLayout:
    """Which sequence every triplet belongs to, and what the blocks need of that.

    Attributes:
        owner: Number of each triplet's sequence, 0 .. R - 1, row by row; R at padding. int64, [1, T] or [b, n].
        num_sequences: R.
        shape: (b, n) of the batch.
        real: bool, shape of `owner`, False at padding; None where there is none.
        starts: bool, shape of `owner`, True where a sequence starts behind another one; None where none does.
        lengths: Triplets of each sequence; None where attention takes whole rows, under `mask`.
        mask: bool [b, 1, 1 or n, n], the keys that a query may read; None where it may read all.
        positions: int64 [N], where each triplet stood in the flattened batch; None for the order of the batch.
    """

    owner: Tensor
    num_sequences: int
    shape: tuple[int, int]
    real: Tensor | None = None
    starts: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None

    def take(self, channel: Tensor) -> Tensor:
        """Bring a channel of the batch [b, n, ...] into this layout, [1, T, ...] or [b, n, ...]."""
        if self.positions is None:
            return channel
        return channel.flatten(0, 1).index_select(0, self.positions).unflatten(0, self.owner.shape)

    def restore(self, states: Tensor) -> Tensor:
        """Bring states of this layout [1, T, ...] or [b, n, ...] back to the batch [b, n, ...]; 0 at padding."""
        if self.positions is None:
            return states
        flat = states.flatten(0, 1)
        if self.real is not None:
            flat = flat.masked_fill(~self.real.flatten().view(-1, *[1] * (flat.dim() - 1)), 0.0)
        batch = flat.new_zeros(self.shape[0] * self.shape[1], *flat.shape[1:])
        return batch.index_copy(0, self.positions, flat).unflatten(0, self.shape)

    def restore_pairs(self, weights: Tensor) -> Tensor:
        """Bring attention weights [b, h, n, n] of this layout's rows back to the order of the batch."""
        if self.positions is None:
            return weights
        places = torch.argsort(self.positions.view(self.shape), dim=1)  # of each triplet of the batch in this layout
        rows = weights.gather(2, places[:, None, :, None].expand_as(weights))
        return rows.gather(3, places[:, None, None, :].expand_as(weights))

    def shuffled(self) -> tuple[TripletLayout, Tensor]:
        """This layout with the triplets of every sequence permuted at random, and that permutation [N]."""
        owner = self.owner.flatten()
        runs = torch.cat([owner.new_zeros(1), (owner[1:] != owner[:-1]).long()]).cumsum(0)
        order = torch.argsort(runs + torch.rand(owner.shape, dtype=torch.float64, device=owner.device))
        return replace(self, positions=order if self.positions is None else self.positions[order]), order


def owners(channel: Tensor, real: Tensor | None, segment_ids: Tensor | None = None, num_segments: int = 1) -> Tensor:
    """Number of the sequence that each triplet belongs to, int64 [b, n]; R at padding.

    Args:
        channel: Any channel of the batch, [b, n]: tells shape and device.
        real: bool [b, n], False at padding; None where there is none.
        segment_ids: [b, n], 0 = padding, 1 .. S; None without packing.
        num_segments: S; sequence s of row i has number i S + s - 1.
    """
    batch, length = channel.shape[:2]
    first = torch.arange(batch, device=channel.device)[:, None] * num_segments
    owner = first.expand(batch, length) if segment_ids is None else first + segment_ids - 1
    return owner if real is None else torch.where(real, owner, batch * num_segments)


def joined_layout(owner: Tensor, num_sequences: int) -> TripletLayout:
    """Only the real triplets, in one row: owner [b, n] as made by `owners`."""
    positions = (owner.flatten() < num_sequences).nonzero().flatten()
    joined = owner.flatten()[positions]
    return TripletLayout(
        owner=joined[None],
        num_sequences=num_sequences,
        shape=(owner.shape[0], owner.shape[1]),
        starts=segment_starts(joined[None] + 1),
        lengths=tuple(torch.bincount(joined, minlength=num_sequences).tolist()),
        positions=positions,
    )


def layout_as_given(owner: Tensor, num_sequences: int, real: Tensor | None, packed: bool) -> TripletLayout:
    """The rows as they are, padding last, with the masks that keep sequences and padding apart.

    Args:
        owner: [b, n], as made by `owners`.
        num_sequences: R.
        real: bool [b, n], False at padding, wherever it stands; None where there is none.
        packed: Whether rows hold several sequences.
    """
    batch, length = owner.shape
    positions: Tensor | None = None
    if real is not None:
        order = torch.argsort(~real, dim=1, stable=True)
        owner, real = owner.gather(1, order), real.gather(1, order)
        positions = (order + torch.arange(batch, device=owner.device)[:, None] * length).flatten()
    mask: Tensor | None = None
    if packed:
        mask = owner[:, None, :, None] == owner[:, None, None, :]  # padding reads padding: no query is without a key
    elif real is not None:
        # Rows of nothing but padding read it, for the same reason.
        mask = (real | ~real.any(1, keepdim=True))[:, None, None, :]
    return TripletLayout(
        owner=owner,
        num_sequences=num_sequences,
        shape=(batch, length),
        real=real,
        starts=segment_starts(torch.where(owner < num_sequences, owner + 1, 0)) if packed else None,
        mask=mask,
        positions=positions,
    )


def sum_by_sequence(values: Tensor, layout: TripletLayout) -> Tensor:
    """Sum over each sequence's triplets: values [N, ...] in the order of the layout -> [R, ...]."""
    total = values.new_zeros(layout.num_sequences + 1, *values.shape[1:])
    return total.index_add(0, layout.owner.flatten(), values)[:-1]


__all__ = ["TripletLayout", "joined_layout", "layout_as_given", "owners", "sum_by_sequence"]

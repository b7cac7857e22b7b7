"""The input of HyMaTE: a triplet (time, variable, value) as one vector, or the hourly grid that it replaces.

    e = e_f(variable) + e_v(value) + e_t(time)                                                (HyMaTE, section 3.2.1)

e_f is a table, e_v and e_t are small networks of one number each (STraTS' continuous value embedding), so that nothing
is binned and nothing imputed.

Glossary: N triplets in the layout of hymate_layout.py, R sequences, d hidden_size, V num_variables, B num_bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_hymate import HyMaTEConfig
from .fast_linear import as_input_of, linear
from .hymate_layout import TripletLayout
from .mamba_block import at_least_float32


class NumberEmbedding(nn.Module):
    """W2 tanh(W1 x + b1) with floor(sqrt d) units between, no second bias (STraTS).

    Args:
        numbers: Numbers that are embedded together.
        size: d.
    """

    def __init__(self, numbers: int, size: int):
        super().__init__()
        units = math.isqrt(size)
        self.w1 = nn.Parameter(torch.empty(units, numbers))
        self.b1 = nn.Parameter(torch.empty(units))
        self.w2 = nn.Parameter(torch.empty(size, units))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier-uniform weights and a bias of zero, as in STraTS."""
        init.xavier_uniform_(self.w1)
        init.zeros_(self.b1)
        init.xavier_uniform_(self.w2)

    def forward(self, *numbers: Tensor) -> Tensor:
        """Tensors [...], one for each number -> [..., d] in the dtype of the weights.

        The first layer is computed in float32 at least, autocast or not: bfloat16 tells 48 hours apart by quarters of
        an hour only.
        """
        units = at_least_float32(self.b1)
        for number, weight in zip(numbers, at_least_float32(self.w1).unbind(1), strict=True):
            units = units + at_least_float32(number)[..., None] * weight
        return nn.functional.linear(torch.tanh(units).to(self.w2.dtype), self.w2)


class TripletEmbeddings(nn.Module):
    """Embedding of triplets, in the modes "sum", "concat" and "value" of the config."""

    def __init__(self, config: HyMaTEConfig):
        super().__init__()
        d = config.hidden_size
        self.mode = config.embedding_mode
        self.value_embeddings = NumberEmbedding(1, d)
        parts = 1
        if self.mode != "value":
            self.variable_embeddings = nn.Embedding(config.num_variables, d)
            self.time_embeddings = NumberEmbedding(1, d)
            parts += 2
        # Beyond the paper: what happened to this variable since its last value. The second number marks a first value,
        # which has no change and no gap.
        self.change_embeddings = NumberEmbedding(2, d) if config.value_change_embedding else None
        self.gap_embeddings = NumberEmbedding(2, d) if config.time_gap_embedding else None
        parts += (self.change_embeddings is not None) + (self.gap_embeddings is not None)
        self.projection = nn.Linear(parts * d, d) if self.mode == "concat" else None

    def forward(self, variable_ids: Tensor, times: Tensor, values: Tensor, layout: TripletLayout) -> Tensor:
        """Embed triplets in the order of time.

        Args:
            variable_ids: int64, shape of `layout.owner`.
            times: In [-1, 1] over the window, same shape.
            values: z-scored, same shape.
            layout: Who they belong to.

        Returns:
            [..., d].
        """
        parts = [self.value_embeddings(values)]
        if self.mode != "value":
            parts += [self.variable_embeddings(variable_ids), self.time_embeddings(times)]
        if self.change_embeddings is not None or self.gap_embeddings is not None:
            before = previous_of_variable(variable_ids, layout)
            first = (before < 0).to(values.dtype)
            for embed, channel in ((self.change_embeddings, values), (self.gap_embeddings, times)):
                if embed is not None:
                    last = channel.flatten()[before.clamp(min=0)]
                    parts.append(embed((channel - last).masked_fill(before < 0, 0.0), first))
        if self.projection is not None:
            return linear(self.projection, torch.cat(parts, dim=-1))
        return sum(parts[1:], start=parts[0])


class BinnedEmbeddings(nn.Module):
    """Ablation without triplets: Linear(3V -> d) of an hourly grid of values, masks and gaps."""

    def __init__(self, config: HyMaTEConfig):
        super().__init__()
        self.num_bins, self.num_variables = config.num_bins, config.num_variables
        self.projection = nn.Linear(3 * config.num_variables, config.hidden_size)

    def forward(self, grid: Tensor) -> Tensor:
        """[..., 3V] -> [..., d]."""
        return linear(self.projection, as_input_of(self.projection, grid))

    def grid(self, variable_ids: Tensor, times: Tensor, values: Tensor, layout: TripletLayout) -> tuple[Tensor, Tensor]:
        """Bins of all sequences; arguments as in `TripletEmbeddings`.

        Returns:
            (grid [R, B, 3V], real bool [R, B]). A variable's three columns are its mean in the bin, else in the last
            bin that has one, else 0; 1 where it was measured in this bin; and the bins since it was, as a share of B, 1
            where it never was. Bins behind a sequence's last triplet are not real.
        """
        bins, variables, sequences = self.num_bins, self.num_variables, layout.num_sequences
        bin_ids = ((times.flatten() + 1.0) / 2.0 * bins).long().clamp(0, bins - 1)
        cell = (layout.owner.flatten() * bins + bin_ids) * variables + variable_ids.flatten()
        empty = at_least_float32(values).new_zeros((sequences + 1) * bins * variables)  # one more: padding
        counts = empty.index_add(0, cell, empty.new_ones(cell.shape))
        sums = empty.index_add(0, cell, values.flatten().to(empty.dtype))
        shape = (sequences + 1, bins, variables)
        mask = (counts > 0).view(shape)[:-1]
        means = (sums / counts.clamp(min=1.0)).view(shape)[:-1]

        steps = torch.arange(bins, device=times.device)[:, None]
        newest = torch.where(mask, steps, -1).cummax(dim=1).values  # bin of the newest value, -1 before the first
        known = newest >= 0
        carried = torch.where(known, means.gather(1, newest.clamp(min=0)), 0.0)
        gap = torch.where(known, (steps - newest).to(empty.dtype) / bins, 1.0)
        last = torch.where(mask.any(2), steps.view(1, -1), -1).amax(1)
        return torch.cat([carried, mask.to(empty.dtype), gap], dim=-1), steps.view(1, -1) <= last[:, None]


def previous_of_variable(variable_ids: Tensor, layout: TripletLayout) -> Tensor:
    """Flat index of the same variable's triplet before each, in the same sequence; -1 for a first one.

    Args:
        variable_ids: int64, shape of `layout.owner`.
        layout: Who they belong to, in the order of time.

    Returns:
        int64, shape of `variable_ids`. What stands at padding has no meaning.
    """
    key = (layout.owner * (variable_ids.amax() + 1) + variable_ids).flatten()
    order = torch.argsort(key, stable=True)
    same = key[order][1:] == key[order][:-1]
    before = torch.full_like(key, -1)
    before[order[1:]] = torch.where(same, order[:-1], -1)
    return before.view(variable_ids.shape)


__all__ = ["BinnedEmbeddings", "NumberEmbedding", "TripletEmbeddings", "previous_of_variable"]

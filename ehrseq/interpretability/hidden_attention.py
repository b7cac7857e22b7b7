"""Hidden attention of a model's Mamba layers: how much the token that is read takes from each token before it.

scan_attention.py has the equation. The weights of a layer's channels have either sign; a layer is shown by the mean of
|a_(t,j)| over its channels. They weigh what enters the scan at step j, to which the short convolution has brought the
`conv_kernel - 1` tokens before j as well. Like attention weights of a transformer they tell what is looked at, not
whether it raises or lowers the risk: they have no sum to compare with it.

The row t is the last token of the record: where EhrMamba's head reads, and the state that HyMaTE's last triplet leaves.

Glossary: b batch, l length, K Mamba layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ehrseq.interpretability.relevance import NETWORKS, at_least_single, without_dropout
from ehrseq.interpretability.relevance_mamba import MambaLayer
from ehrseq.interpretability.scan_attention import row_weights

LONGEST_MATRIX = 512
"""Tokens of the longest record whose whole matrices are made: one backward pass of each layer a token."""


def mean_hidden_attention(model: Any, inputs: Mapping[str, Tensor], matrix: bool = False) -> list[Tensor]:
    """Mean of |a_(t,j)| over the channels, layer by layer.

    Args:
        model: A classifier of EhrMamba or HyMaTE.
        inputs: Channels as its `forward` takes them, padded on either side or packed.
        matrix: Every row t in place of the last one alone; for one patient of at most `LONGEST_MATRIX` tokens.

    Returns:
        K tensors: [b, l], of each token's weight in the last row of its own sequence, 0 at padding; or [l, l].

    Raises:
        ValueError: A model without Mamba layers, a matrix of several patients or of a longer record.
    """
    family = getattr(model.config, "model_type", None)
    if family not in ("ehrmamba", "hymate"):
        raise ValueError(
            f"hidden_attention: {family!r} has no Mamba layers, which ehrmamba and hymate have: a transformer has "
            "attentions."
        )
    model = at_least_single(model)
    with without_dropout(model), torch.no_grad():
        network = NETWORKS[family](model, inputs)
        ends = network.ends
        if matrix and (number := int(ends.sum())) != 1:
            raise ValueError(f"hidden_attention: matrix=True shows one patient, got {number}: give one row.")
        if matrix and network.embedded.shape[1] > LONGEST_MATRIX:
            raise ValueError(
                f"hidden_attention: matrix=True makes matrices of records of at most {LONGEST_MATRIX} tokens, this one "
                f"has {network.embedded.shape[1]}: take the last row (matrix=False), or read it with a smaller "
                "max_length."
            )
        found, x = [], network.embedded
        for layer in network.layers:
            if not isinstance(layer, MambaLayer):
                break  # HyMaTE's attention blocks stand behind them
            found.append(_weights(layer, x, network.restore, None if matrix else ends))
            x = layer(x)
    if not found:
        raise ValueError("hidden_attention: this HyMaTE has no Mamba layers (num_mamba_layers=0): it has attentions.")
    return found


def _weights(layer: MambaLayer, x: Tensor, restore: Callable[[Tensor], Tensor], ends: Tensor | None) -> Tensor:
    """Weights of one layer, [b, l] of the rows at `ends`, or [l, l] of all rows."""
    terms = layer.terms(x)
    weigh = row_weights(terms.step_sizes, terms.A, terms.B, terms.C, layer.starts)
    if ends is not None:
        return restore(weigh(ends).abs().mean(-1))
    steps = torch.arange(x.shape[1], device=x.device)

    def rows() -> Iterator[Tensor]:
        for step in steps:
            yield weigh((steps == step)[None]).abs().mean(-1)[0]

    square = torch.stack(list(rows()))  # [T, T], as the tokens lie in the layout
    by_row = restore(square[None])[0]  # [l, T]
    return restore(by_row.t()[None])[0].t()


__all__ = ["LONGEST_MATRIX", "mean_hidden_attention"]

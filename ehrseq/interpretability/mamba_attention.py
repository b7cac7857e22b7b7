"""Hidden attention of a model's Mamba layers: how much the token that is read takes from each token before it.

scan_weights.py has the equation. The weights of a layer's channels have either sign; a layer is shown by the mean of
|a_(t,j)| over its channels. They weigh what enters the scan at step j, to which the short convolution has brought the
`conv_kernel - 1` tokens before j as well. Like attention weights of a transformer they tell what is looked at, not
whether it raises or lowers the risk: they have no sum to compare with it.

The row t is the last token of the record: where EhrMamba's head reads, and the state that HyMaTE's last triplet leaves.

Glossary: b batch, l length, K Mamba layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ehrseq.interpretability.attention_weights import AttentionWeights, real_tokens_of
from ehrseq.interpretability.relevance_mamba import MambaLayer
from ehrseq.interpretability.relevance_propagation import NETWORKS, at_least_single, without_dropout
from ehrseq.interpretability.scan_weights import row_weights

if TYPE_CHECKING:
    from ehrseq.interpretability.questions import Question

LONGEST_MATRIX = 512
"""Tokens of the longest record whose whole matrices are made: one backward pass of each layer a token."""


def hidden_attention(
    question: Question,
    layer: int | None = None,
    matrix: bool = False,
    displays: Mapping[str, str] | None = None,
) -> AttentionWeights:
    """Hidden attention of EhrMamba's or HyMaTE's Mamba layers over one record.

    Args:
        question: What is asked.
        layer: One of them, from 0; None: all of them (`AttentionWeights.mean` averages).
        matrix: Every token's view of those before it, [m, m] a layer, in place of the last token's, [m].
        displays: Code -> description.

    Raises:
        ValueError: A model without Mamba layers, a layer that it lacks, or a matrix of a record of more than
            `LONGEST_MATRIX` tokens.
    """
    model = question.checkpoint.model
    count = number_of_mamba_layers(model)
    if layer is not None and not 0 <= layer < count:
        raise ValueError(f"hidden_attention: layer got {layer}; this model has the layers 0 .. {count - 1}.")
    what = "hidden attention (mean of |a| over the channels)"
    if not question.has_answer:
        return AttentionWeights.of(question, [], what)
    real = real_tokens_of(question.inputs)
    rows = [weights if matrix else weights[0] for weights in mean_hidden_attention(model, question.inputs, matrix)]
    shown = [weights[real][:, real] if matrix else weights[real] for weights in rows]
    numbers = list(range(count)) if layer is None else [layer]
    return AttentionWeights.of(question, [shown[number] for number in numbers], what, numbers, displays)


def number_of_mamba_layers(model: Any) -> int:
    """How many there are, at least one; a ValueError where the family or the model has none."""
    family = getattr(model.config, "model_type", None)
    if family not in ("ehrmamba", "hymate"):
        raise ValueError(
            f"hidden_attention: {family!r} has no Mamba layers, which ehrmamba and hymate have: a transformer has "
            "attentions."
        )
    count = int(model.config.num_hidden_layers if family == "ehrmamba" else model.config.num_mamba_layers)
    if count < 1:
        raise ValueError("hidden_attention: this HyMaTE has no Mamba layers (num_mamba_layers=0): it has attentions.")
    return count


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
    number_of_mamba_layers(model)
    model = at_least_single(model)
    with torch.inference_mode(False), without_dropout(model), torch.no_grad():
        network = NETWORKS[model.config.model_type](model, inputs)
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


__all__ = ["LONGEST_MATRIX", "hidden_attention", "mean_hidden_attention", "number_of_mamba_layers"]

"""Relevance propagation through CEHR-BERT and BigBird: attention weights and norms held constant (Ali et al. 2022).

Relevance ends where the first layer begins: a token's embedding with that of its place.

Glossary: b batch, l length, n sequences of the batch (rows, or packed ones), m tokens of the longest, d width, h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.big_bird.modeling_big_bird import BigBirdModel

from ehrseq.interpretability.relevance_mamba import EVENT_CHANNELS, event_head
from ehrseq.interpretability.relevance_network import RewrittenNetwork
from ehrseq.interpretability.relevance_rules import activation_rule, attention_rule, layer_norm_rule, linear_layer
from ehrseq.modeling.event_encoder import EventInputs, EventSequences
from ehrseq.modeling.modeling_cehrbert import CehrBertForSequenceClassification, attention_bias
from ehrseq.modeling.modeling_ehr_bigbird import (
    EhrBigBirdForSequenceClassification,
    PlannedBlockSparseAttention,
    padded_length,
)

Attend = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""(attention module, queries, keys, values, [n, h, m, d / h] each) -> mixed values [n, m, d], linear in the values."""


def transformer_layer(layer: Any, attend: Attend, x: Tensor) -> Tensor:
    """A layer of BERT or BigBird, [n, m, d] -> [n, m, d]: LayerNorm(x + MHA(x)), then LayerNorm(x + FFN(x)).

    Args:
        layer: transformers' `BertLayer` or `BigBirdLayer`.
        attend: How its attention mixes values.
        x: [n, m, d].
    """
    # 1. Queries, keys and values of each head.
    module = layer.attention.self
    query, key, value = (
        linear_layer(part, x).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
        for part in (module.query, module.key, module.value)
    )
    # 2. Attention, residual, norm.
    mixed = linear_layer(layer.attention.output.dense, attend(module, query, key, value))
    x = layer_norm_rule(layer.attention.output.LayerNorm, mixed + x)
    # 3. Feed-forward part, residual, norm.
    wide = activation_rule(linear_layer(layer.intermediate.dense, x), layer.intermediate.intermediate_act_fn)
    return layer_norm_rule(layer.output.LayerNorm, linear_layer(layer.output.dense, wide) + x)


@torch.no_grad()
def cehrbert_network(model: CehrBertForSequenceClassification, inputs: Mapping[str, Tensor]) -> RewrittenNetwork:
    """CEHR-BERT's classifier by the rules; arguments as in `ehrmamba_network`."""
    sequences, tokens = _embed(model, inputs)
    mask = attention_bias(sequences.lengths, tokens)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_rule(query, key, value, mask)

    return _network(model, inputs, sequences, tokens, attend)


@torch.no_grad()
def bigbird_network(model: EhrBigBirdForSequenceClassification, inputs: Mapping[str, Tensor]) -> RewrittenNetwork:
    """BigBird's classifier by the rules; arguments as in `ehrmamba_network`.

    Its attention is transformers', which writes a matrix of all pairs of tokens even where nobody asks for it: memory
    is that of the model itself, quadratic in length.
    """
    sequences, tokens = _embed(model, inputs)
    size = model.config.block_size
    tokens = F.pad(tokens, (0, 0, 0, padded_length(tokens.shape[1], size) - tokens.shape[1]))
    real = (torch.arange(tokens.shape[1]) < sequences.lengths[:, None]).to(tokens.device, tokens.dtype)
    blocks, *masks = BigBirdModel.create_masks_for_block_sparse_attn(real, size)

    def attend(module: PlannedBlockSparseAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, batch = value.shape[2], value.shape[0]
        sparse: Any = module.bigbird_block_sparse_attention
        sizes = (module.num_attention_heads, module.num_random_blocks, module.attention_head_size, size, size)
        plan = {"seed": module.seed, "plan_from_length": None, "plan_num_rand_blocks": None}
        values = (query.detach(), key.detach(), value, *masks, blocks, blocks)
        mixed: Tensor = sparse(*values, *sizes, batch, length, length, **plan)[0]
        return mixed.reshape(batch, length, -1)

    return _network(model, inputs, sequences, tokens, attend)


def _embed(model: Any, inputs: Mapping[str, Tensor]) -> tuple[EventSequences, Tensor]:
    """The sequences of the batch, and their tokens with places, [n, m, d]."""
    encoder = model.model
    read = EventInputs.of(encoder.embeddings, model.config, *(inputs.get(name) for name in EVENT_CHANNELS))
    hidden_states = read.embed(encoder.embeddings)
    real = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool) if read.real is None else read.real
    if not bool(real.any()):
        raise ValueError("All rows hold padding only (attention_mask is 0): there is nothing to read.")
    sequences = EventSequences.of(real, inputs.get("segment_ids"))
    return sequences, encoder.positions(sequences.take(hidden_states))


def _network(
    model: Any, inputs: Mapping[str, Tensor], sequences: EventSequences, tokens: Tensor, attend: Attend
) -> RewrittenNetwork:
    longest = int(sequences.lengths.max())

    def head(x: Tensor) -> Tensor:
        hidden_states = sequences.restore(x[:, :longest])
        mask, segments = inputs.get("attention_mask"), inputs.get("segment_ids")
        return event_head(model.classifier, model.pool(hidden_states, mask, segments, None))

    def restore(numbers: Tensor) -> Tensor:
        return sequences.restore(numbers[:, :longest, None]).squeeze(-1)

    layers = tuple(partial(transformer_layer, layer, attend) for layer in model.model.layers)
    ends = torch.arange(tokens.shape[1]) == sequences.lengths[:, None] - 1
    return RewrittenNetwork(tokens, layers, head, restore, ends.to(tokens.device), inputs.get("segment_ids"))


__all__ = ["bigbird_network", "cehrbert_network", "transformer_layer"]

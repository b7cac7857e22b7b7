"""Relevance propagation through HyMaTE: Mamba layers, self-attention, fusion attention, and what passes them by.

Relevance of a triplet ends at its embedding. What reaches the log-odds another way belongs to no triplet's embedding
and is told by name: the static values; the summaries of each variable (through their embedding, and through the
additive part of the logits); and the last values where the head forecasts from them. Integrated gradients, which
follow values and not embeddings, see those.

Glossary: b batch, n triplets, S packed sequences of a row, R sequences, d width, h heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ehrseq.interpretability.relevance_mamba import MambaLayer, ends_of
from ehrseq.interpretability.relevance_network import RewrittenNetwork, log_odds_of
from ehrseq.interpretability.relevance_rules import activation_rule, attention_rule, linear_layer, rms_norm_rule
from ehrseq.modeling.hymate_attention import FusionAttention, HyMaTEAttentionBlock, HyMaTESelfAttention
from ehrseq.modeling.hymate_inputs import check_inputs, check_rows, num_segments_of, real_triplets
from ehrseq.modeling.hymate_layout import TripletLayout, owners, sum_by_sequence
from ehrseq.modeling.hymate_summaries import summarise_variables
from ehrseq.modeling.modeling_hymate import HyMaTEForSequenceClassification, choose_layout, repeat

# What reaches HyMaTE's log-odds past the embedded triplets.
STATIC_PART = "static values"
SUMMARY_PART = "variable summaries"
LAST_VALUE_PART = "last values"
ADDITIVE_PART = "additive part"


def self_attention(module: HyMaTESelfAttention, layout: TripletLayout, x: Tensor) -> Tensor:
    """HyMaTE's self-attention with constant weights, [1, T, d] or [b, n, d] -> the same shape."""
    projected = linear_layer(module.qkv_proj, x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if layout.lengths is None:
        query, key, value = projected
        mixed = attention_rule(query, key, value, layout.mask)
    else:  # one sequence after the other
        parts = projected.split([length for length in layout.lengths if length], dim=3)
        mixed = torch.cat([attention_rule(query, key, value, None) for query, key, value in parts], dim=1)
    return linear_layer(module.out_proj, mixed)


def attention_block(block: HyMaTEAttentionBlock, layout: TripletLayout, x: Tensor) -> Tensor:
    """A pre-norm block: x + MHA(norm x), then x + FFN(norm x)."""
    x = x + self_attention(block.attention, layout, rms_norm_rule(block.attention_norm, x))
    wide = activation_rule(linear_layer(block.up_proj, rms_norm_rule(block.feed_forward_norm, x)), F.gelu)
    return x + linear_layer(block.down_proj, wide)


def fuse(fusion: FusionAttention, layout: TripletLayout, x: Tensor) -> Tensor:
    """sum_i [alpha_i]_const x_i of each sequence, [R, d]."""
    with torch.no_grad():
        _, alpha = fusion(x, layout)
    return sum_by_sequence(alpha.flatten()[:, None] * x.flatten(0, 1), layout)


@torch.no_grad()
def hymate_network(model: HyMaTEForSequenceClassification, inputs: Mapping[str, Tensor]) -> RewrittenNetwork:
    """HyMaTE's classifier by the rules.

    Args:
        model: In evaluation mode, in float32 or float64.
        inputs: Channels as `forward` takes them, padded on either side or packed.

    Raises:
        ValueError: A model of `embedding_mode="binned"`, which has no triplets.
    """
    config, encoder = model.config, model.model
    if config.embedding_mode == "binned":
        raise ValueError(
            "relevance: this HyMaTE has embedding_mode='binned', in which no triplet has an embedding of its own: take "
            "prefix deltas, occlusion or integrated gradients."
        )
    # 1. Inputs and their layout, as the model's forward has them.
    static, segment_ids = inputs.get("static_values"), inputs.get("segment_ids")
    channels = {name: inputs.get(name) for name in ("variable_ids", "times", "values")}
    check_inputs(config, static, channels, {name: inputs.get(name) for name in ("attention_mask", "segment_ids")})
    triplets = {name: channel for name, channel in channels.items() if channel is not None}
    num_segments = num_segments_of(segment_ids, static, None)
    real = real_triplets(inputs.get("attention_mask"), segment_ids)
    check_rows(real, segment_ids)
    owner = owners(triplets["values"], real, segment_ids, num_segments)
    num_sequences, packed = owner.shape[0] * num_segments, segment_ids is not None
    layout = choose_layout(owner, num_sequences, real, packed, False)

    # 2. Embeddings, as they are: relevance ends at their output.
    taken = {name: layout.take(channel) for name, channel in triplets.items()}
    embedded = encoder.embeddings(**taken, layout=layout)

    # 3. Mamba blocks, then attention blocks.
    mamba_blocks: Iterator[Any] = repeat(encoder.mamba_layers, config.num_mamba_layers)
    mamba = [MambaLayer(block.norm, block.mixer, None, layout.starts) for block in mamba_blocks]
    attention_blocks: Iterator[Any] = repeat(encoder.attention_layers, config.num_attention_layers)
    attend = [partial(attention_block, block, layout) for block in attention_blocks]

    # 4. Beside the triplets: static values and summaries.
    beside: dict[str, Tensor] = {}
    if encoder.static_embedding is not None and static is not None:
        beside[STATIC_PART] = encoder.static_embedding(static)
    summaries = None
    if config.variable_summaries or config.additive_summaries or config.forecast_from_last_value:
        summaries = summarise_variables(
            **triplets, owner=owner, num_sequences=num_sequences, num_variables=config.num_variables
        )

    def by_row(numbers: Tensor) -> Tensor:
        return numbers.unflatten(0, (-1, num_segments)) if packed else numbers

    if summaries is not None and encoder.summary_embedding is not None:
        beside[SUMMARY_PART] = encoder.summary_embedding(by_row(summaries.features))
    if summaries is not None and model.forecast_head is not None and model.forecast_head.persistence is not None:
        beside[LAST_VALUE_PART] = by_row(summaries.last_values)

    # 5. The head is affine in the fused triplets and in what stands beside them.
    def log_odds(fused: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        pooled = torch.cat([fused, *(others[name] for name in (STATIC_PART, SUMMARY_PART) if name in others)], dim=-1)
        read = pooled if model.forecast_head is None else model.forecast_head(pooled, others.get(LAST_VALUE_PART))
        return log_odds_of(linear_layer(model.classifier, read))

    nothing = by_row(embedded.new_zeros(num_sequences, config.hidden_size))
    with torch.enable_grad():
        leaves = {name: numbers.detach().requires_grad_() for name, numbers in beside.items()}
        gradients = torch.autograd.grad(log_odds(nothing, leaves).sum(), list(leaves.values())) if leaves else ()
    parts = {name: (beside[name] * grad).sum(-1) for name, grad in zip(beside, gradients, strict=True)}
    additive: Tensor | float = 0.0
    if summaries is not None and model.additive_head is not None:
        additive = parts[ADDITIVE_PART] = log_odds_of(model.additive_head(by_row(summaries.features), static))

    def head(x: Tensor) -> Tensor:
        fused = fuse(encoder.fusion_attention, layout, rms_norm_rule(encoder.norm_f, x))
        return log_odds(by_row(fused), beside) + additive

    ends = ends_of(layout.owner, layout.owner < num_sequences)
    return RewrittenNetwork(embedded, (*mamba, *attend), head, layout.restore, ends, segment_ids, parts)


__all__ = [
    "ADDITIVE_PART",
    "LAST_VALUE_PART",
    "STATIC_PART",
    "SUMMARY_PART",
    "attention_block",
    "hymate_network",
    "self_attention",
]

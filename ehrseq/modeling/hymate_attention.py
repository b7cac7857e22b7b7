"""HyMaTE's two attentions: self-attention blocks over the triplets, and the fusion attention that pools them.

Glossary: N triplets in the layout of hymate_layout.py, n triplets of a row or of one sequence, h heads, d hidden_size,
R sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_hymate import HyMaTEConfig
from .fast_dropout import FastDropout
from .fast_linear import linear
from .hymate_layout import TripletLayout, sum_by_sequence
from .mamba_block import EhrMambaRMSNorm, at_least_float32


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for whoever wants to see its weights.

    Args:
        module: The calling layer: whether it trains.
        query, key, value: [b, h, n, d / h].
        attention_mask: bool, broadcast to [b, h, n, n], False where a query may not read a key; None: it may read all.
        scaling: Factor of the scores.
        dropout: Of the weights.

    Returns:
        (output [b, n, h, d / h], weights [b, h, n, n]).
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(at_least_float32(scores), dim=-1).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class HyMaTESelfAttention(nn.Module):
    """Multi-head self-attention in both directions; no triplet reads another sequence or padding."""

    is_causal = False  # transformers' attention functions ask for it

    def __init__(self, config: HyMaTEConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.dropout = config.attention_probs_dropout_prob
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, layout: TripletLayout, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments as in `HyMaTEAttentionBlock`."""
        projected = linear(self.qkv_proj, hidden_states)  # [b, n, 3d]
        if layout.lengths is None:
            mixed, weights = self._attend(projected, layout.mask, return_weights)
        else:
            # One sequence after the other: no mask, and no pair of triplets that do not belong together.
            parts = projected[0].split([length for length in layout.lengths if length])
            mixed = torch.cat([self._attend(part[None], None, False)[0] for part in parts], dim=1)
            weights = None
        return linear(self.out_proj, mixed), weights

    def _attend(self, projected: Tensor, mask: Tensor | None, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values [b, n, 3d] -> (output [b, n, d], weights [b, h, n, n] or None)."""
        query, key, value = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # Only the attention that is written out has weights to return; it computes the same.
        implementation = "eager" if return_weights else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        return mixed.flatten(2), weights if return_weights else None


class HyMaTEAttentionBlock(GradientCheckpointingLayer):
    """Pre-norm Transformer block: h + Drop(MHA(norm h)), then h + Drop(FFN(norm h)); pre-norm is our choice."""

    def __init__(self, config: HyMaTEConfig):
        super().__init__()
        d, wide = config.hidden_size, config.feed_forward_expand * config.hidden_size
        self.residual_in_fp32 = config.residual_in_fp32
        self.attention_norm = EhrMambaRMSNorm(d, eps=config.layer_norm_epsilon)
        self.attention = HyMaTESelfAttention(config)
        self.feed_forward_norm = EhrMambaRMSNorm(d, eps=config.layer_norm_epsilon)
        self.up_proj = nn.Linear(d, wide)
        self.down_proj = nn.Linear(wide, d)
        self.dropout = FastDropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: Tensor, layout: TripletLayout, return_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """One block.

        Args:
            hidden_states: [1, T, d] or [b, n, d].
            layout: Who they belong to.
            return_weights: Also return the attention weights; only in the layout of whole rows.

        Returns:
            (hidden states of the same shape, weights [b, h, n, n] or None).
        """
        residual = at_least_float32(hidden_states) if self.residual_in_fp32 else hidden_states
        mixed, weights = self.attention(self.attention_norm(hidden_states), layout, return_weights)
        hidden_states = residual + self.dropout(mixed)
        wide = F.gelu(linear(self.up_proj, self.feed_forward_norm(hidden_states)))
        return hidden_states + self.dropout(linear(self.down_proj, wide)), weights


class FusionAttention(nn.Module):
    """Pooling by attention: alpha = softmax_i(u^T tanh(W h_i + b)), z = sum_i alpha_i h_i (HyMaTE, STraTS)."""

    def __init__(self, config: HyMaTEConfig):
        super().__init__()
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)  # W and b
        self.u = nn.Parameter(torch.empty(config.hidden_size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier-uniform, as for a matrix of one column."""
        bound = (6.0 / (self.u.shape[0] + 1)) ** 0.5
        init.uniform_(self.u, -bound, bound)

    def forward(self, hidden_states: Tensor, layout: TripletLayout) -> tuple[Tensor, Tensor]:
        """Pool each sequence.

        Args:
            hidden_states: [1, T, d] or [b, n, d].
            layout: Who they belong to.

        Returns:
            (pooled [R, d] in the dtype of the hidden states, 0 for a sequence without triplets; alpha in float32 at
            least, shape of `layout.owner`, 0 at padding).
        """
        owner = layout.owner.flatten()
        states = at_least_float32(hidden_states.flatten(0, 1))  # [N, d]
        # 1. Scores of all triplets, in one go.
        scores = at_least_float32(torch.tanh(linear(self.projection, hidden_states)) @ self.u).flatten()  # [N]
        # 2. Softmax over each sequence; its largest score is subtracted, which changes nothing but overflows.
        lowest = torch.finfo(scores.dtype).min
        largest = scores.new_full((layout.num_sequences + 1,), lowest)
        largest = largest.scatter_reduce(0, owner, scores.detach(), "amax")
        weights = torch.exp(scores - largest[owner])
        if layout.real is not None:
            weights = weights.masked_fill(~layout.real.flatten(), 0.0)
        total = sum_by_sequence(weights, layout).clamp(min=torch.finfo(weights.dtype).tiny)
        # 3. Weighted sums.
        pooled = sum_by_sequence(weights[:, None] * states, layout) / total[:, None]
        alpha = weights / F.pad(total, (0, 1), value=1.0).index_select(0, owner)
        return pooled.to(hidden_states.dtype), alpha.view(layout.owner.shape)


__all__ = ["FusionAttention", "HyMaTEAttentionBlock", "HyMaTESelfAttention", "eager_attention"]

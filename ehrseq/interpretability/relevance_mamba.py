"""Relevance propagation through Mamba layers (MambaLRP, arXiv:2406.07592), and EhrMamba's network by its rules.

Glossary: b batch, l length, d width, e channels inside a mixer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ehrseq.interpretability.mamba_scans import ScanTerms, scan_terms
from ehrseq.interpretability.relevance_network import RewrittenNetwork, log_odds_of
from ehrseq.interpretability.relevance_rules import gate_rule, linear_layer, rms_norm_rule, silu_rule
from ehrseq.modeling.event_classification import EventClassificationHead
from ehrseq.modeling.event_encoder import EventInputs
from ehrseq.modeling.mamba_block import EhrMambaMixer, EhrMambaRMSNorm
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForSequenceClassification
from ehrseq.modeling.selective_scan import selective_scan

EVENT_CHANNELS = (
    *("input_ids", "attention_mask", "token_type_ids", "times", "ages", "visit_orders", "visit_segments"),
    *("segment_ids", "inputs_embeds"),
)
"""Inputs of the models over events, in the order of their `forward`."""


@dataclass(frozen=True)
class MambaLayer:
    """x + mixer(norm(x)), of EhrMamba and HyMaTE.

    The scan is the model's own, by whatever kernel serves it: with [delta, B, C]_const and no gate inside it is linear
    in what it mixes.

    Attributes:
        norm: The norm before the mixer.
        mixer: The mixer.
        real: bool [b, l], False at padding; None where there is none, or where it stands last.
        starts: bool [b, l], True where a packed sequence starts; None without packing.
    """

    norm: EhrMambaRMSNorm
    mixer: EhrMambaMixer
    real: Tensor | None
    starts: Tensor | None

    def terms(self, x: Tensor) -> ScanTerms:
        """What the layer's scan reads, x [b, l, d] being the residual stream."""
        return scan_terms(self.mixer, rms_norm_rule(self.norm, x), self.real, self.starts)

    def __call__(self, x: Tensor) -> Tensor:
        """[b, l, d] -> [b, l, d]."""
        # 1. Up to the scan: norm, input projection, convolution, SiLU.
        terms = self.terms(x)
        # 2. The scan, linear in u.
        constants = (terms.delta, terms.A, terms.B, terms.C, terms.D)
        options: dict[str, Any] = {"delta_bias": terms.delta_bias, "delta_softplus": True, "reset_mask": self.starts}
        y = cast(Tensor, selective_scan(terms.u, *constants, **options))
        # 3. The gate: half of the relevance to either side, the SiLU by its own rule.
        gated = gate_rule(silu_rule(terms.z), y)
        # 4. Output projection and residual.
        return x + linear_layer(self.mixer.out_proj, gated)


def event_head(head: EventClassificationHead, pooled: Tensor) -> Tensor:
    """The head of the models over events: dense, SiLU, classes; [..., d] -> log-odds [...]."""
    return log_odds_of(linear_layer(head.out_proj, silu_rule(linear_layer(head.dense, pooled))))


@torch.no_grad()
def ehrmamba_network(model: EhrMambaForSequenceClassification, inputs: Mapping[str, Tensor]) -> RewrittenNetwork:
    """EhrMamba's classifier by the rules.

    Args:
        model: In evaluation mode, in float32 or float64.
        inputs: Channels as `forward` takes them, padded on either side or packed.
    """
    # 1. Embeddings, as they are: relevance ends at their output.
    encoder = model.model
    channels = [inputs.get(name) for name in EVENT_CHANNELS]
    read = EventInputs.of(encoder.embeddings, model.config, *channels)
    embedded = read.embed(encoder.embeddings)
    # 2. Blocks.
    blocks: Any = encoder.layers
    layers = tuple(MambaLayer(block.norm, block.mixer, read.real, read.starts) for block in blocks)

    # 3. Final norm, the last token of each row, the head.
    def head(x: Tensor) -> Tensor:
        mask, segments = inputs.get("attention_mask"), inputs.get("segment_ids")
        return event_head(model.classifier, model.pool(rms_norm_rule(encoder.norm_f, x), mask, segments, None))

    def restore(numbers: Tensor) -> Tensor:
        if read.real is None:
            return numbers
        return numbers.masked_fill(~read.real.view(*read.real.shape, *[1] * (numbers.dim() - 2)), 0.0)

    real = torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device) if read.real is None else read.real
    segments = inputs.get("segment_ids")
    ends = ends_of(real.long() if segments is None else segments, real)
    return RewrittenNetwork(embedded, layers, head, restore, ends, segments)


def ends_of(sequence: Tensor, real: Tensor) -> Tensor:
    """Bool [b, l], True at the last token of each sequence: its numbers [b, l], and False at padding [b, l]."""
    behind = torch.cat([sequence[:, 1:], torch.full_like(sequence[:, :1], -1)], dim=1)
    return real & (sequence != behind)


__all__ = ["EVENT_CHANNELS", "MambaLayer", "ehrmamba_network", "ends_of", "event_head"]

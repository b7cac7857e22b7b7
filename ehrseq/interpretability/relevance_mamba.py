"""Relevance propagation through Mamba layers (MambaLRP, arXiv:2406.07592), and EhrMamba's network by its rules.

Glossary: b batch, l length, d width, e channels inside a mixer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ehrseq.interpretability.mamba_scans import scan_terms
from ehrseq.interpretability.relevance_network import RewrittenNetwork, log_odds_of
from ehrseq.interpretability.relevance_rules import gate, linear_layer, rms_norm, silu
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


def mamba_mixer(mixer: EhrMambaMixer, x: Tensor, real: Tensor | None, starts: Tensor | None) -> Tensor:
    """Mamba's mixer, [b, l, d] -> [b, l, d]; arguments as in `scan_terms`.

    The scan is the model's own, by whatever kernel serves it: with [delta, B, C]_const and no gate inside it is linear
    in u.
    """
    # 1. Up to the scan.
    terms = scan_terms(mixer, x, real, starts)
    # 2. The scan, linear in u.
    constants = (terms.delta, terms.A, terms.B, terms.C, terms.D)
    options = {"delta_bias": terms.delta_bias, "delta_softplus": True, "reset_mask": starts}
    y = cast(Tensor, selective_scan(terms.u, *constants, **options))
    # 3. The gate: half of the relevance to either side, the SiLU by its own rule.
    gated = gate(silu(terms.z), y)
    # 4. Output projection.
    return linear_layer(mixer.out_proj, gated)


def mamba_block(
    norm: EhrMambaRMSNorm, mixer: EhrMambaMixer, real: Tensor | None, starts: Tensor | None, x: Tensor
) -> Tensor:
    """x + mixer(norm(x)), of EhrMamba and HyMaTE."""
    return x + mamba_mixer(mixer, rms_norm(norm, x), real, starts)


def event_head(head: EventClassificationHead, pooled: Tensor) -> Tensor:
    """The head of the models over events: dense, SiLU, classes; [..., d] -> log-odds [...]."""
    return log_odds_of(linear_layer(head.out_proj, silu(linear_layer(head.dense, pooled))))


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
    layers = tuple(
        partial(mamba_block, block.norm, block.mixer, read.real, read.starts) for block in encoder.layers
    )

    # 3. Final norm, the last token of each row, the head.
    def head(x: Tensor) -> Tensor:
        mask, segments = inputs.get("attention_mask"), inputs.get("segment_ids")
        return event_head(model.classifier, model.pool(rms_norm(encoder.norm_f, x), mask, segments, None))

    def restore(numbers: Tensor) -> Tensor:
        return numbers if read.real is None else numbers.masked_fill(~read.real, 0.0)

    return RewrittenNetwork(embedded, layers, head, restore, inputs.get("segment_ids"))


__all__ = ["EVENT_CHANNELS", "ehrmamba_network", "event_head", "mamba_block", "mamba_mixer"]

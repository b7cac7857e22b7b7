"""What the selective scan of a Mamba layer reads, as numbers: for relevance propagation and for hidden attention.

Glossary: b batch, l length, e channels inside the mixer, n state size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ehrseq.interpretability.relevance_rules import constant, linear_halves, silu_rule
from ehrseq.modeling.causal_conv import causal_conv1d
from ehrseq.modeling.mamba_block import EhrMambaMixer, at_least_float32


@dataclass(frozen=True)
class ScanTerms:
    """The terms of h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t, y_t = C_t h_t + D u_t, and the gate beside it.

    Attributes:
        u: What the scan mixes, [b, l, e], with the gradient of the mixer's input.
        z: The gate before its SiLU, [b, l, e], with the gradient of the mixer's input.
        delta: Step sizes before bias and softplus, -inf at padding, [b, l, e]; constant, as all that follow.
        delta_bias: [e], None where `delta` holds it.
        A: [e, n].
        B: [b, l, n].
        C: [b, l, n].
        D: [e].
    """

    u: Tensor
    z: Tensor
    delta: Tensor
    delta_bias: Tensor | None
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    @property
    def step_sizes(self) -> Tensor:
        """Step sizes as the recurrence has them: positive, 0 at padding, [b, l, e]."""
        return F.softplus(self.delta if self.delta_bias is None else self.delta + self.delta_bias)


def scan_terms(mixer: EhrMambaMixer, x: Tensor, real: Tensor | None, starts: Tensor | None) -> ScanTerms:
    """A mixer up to its scan, by the rules of relevance_rules.py.

    Args:
        mixer: The mixer.
        x: Its input, after the norm, [b, l, d].
        real: bool [b, l], False at padding; None where there is none, or where it stands last.
        starts: bool [b, l], True where a packed sequence starts; None without packing.
    """
    # 1. Input projection and convolution, both linear; SiLU by its rule.
    inner, z = linear_halves(mixer.in_proj, x)
    if real is not None:
        inner = inner.masked_fill(~real[..., None], 0.0)
    weight, bias = mixer.conv1d.weight.detach().squeeze(1), constant(mixer.conv1d.bias)
    u = silu_rule(cast(Tensor, causal_conv1d(inner, weight, bias, reset_mask=starts, activation=None)))
    # 2. Step sizes, B and C: constants.
    with torch.no_grad():
        delta, B, C, delta_bias = mixer.select(u, real)
        A = -torch.exp(at_least_float32(mixer.A_log))
        D = at_least_float32(mixer.D).detach()
    return ScanTerms(u, z, delta, constant(delta_bias), A, B, C, D)


__all__ = ["ScanTerms", "scan_terms"]

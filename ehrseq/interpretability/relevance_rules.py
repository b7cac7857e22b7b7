"""The local rules of relevance propagation: each layer of a network as one that is linear in what flows through it.

A layer y = f(x) is written as y = J(x) x with J(x) held constant in the gradient. Its output is the same to the last
digits, and gradient x input of the whole network then hands the output's relevance down from layer to layer without
loss: of y = J x without a bias, sum_i x_i (J^T g)_i = sum_o y_o g_o. [.]_const is what no gradient goes through.

    SiLU, GELU, tanh     x [f(x) / x]_const                       SiLU: [sigmoid(x)]_const        MambaLRP
    selective scan       linear in u, [delta, B, C]_const                                         MambaLRP
    gate                 z y / 2 + [z y]_const / 2                                                MambaLRP
    RMS norm             x [1 / rms(x)]_const weight                                              MambaLRP
    LayerNorm            (x - mean(x)) [1 / std(x)]_const weight                                  LN rule
    softmax attention    [weights]_const values                                                   AH rule

MambaLRP: Jafari et al., NeurIPS 2024, arXiv:2406.07592, section 4. LN and AH rule: Ali et al., ICML 2022,
arXiv:2202.07304. AttnLRP (arXiv:2402.05602) has another rule of attention, which also hands relevance to queries and
keys. The AH rule is used here because it is what MambaLRP does to the scan (whose step sizes, B and C are weights of
the same kind), so that HyMaTE's two kinds of layers are read alike; and because attention stays one call of the fast
kernels, whose memory is linear in length.

Biases take part of the relevance with them: with biases the sum at a layer differs from the log-odds by what they add
above it. That remainder is told, and never spread over the tokens.

Glossary: b batch, l length, d width, h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehrseq.modeling.fast_linear import fast_linear, halves, is_bare, linear
from ehrseq.modeling.mamba_block import EhrMambaRMSNorm


def constant(parameter: Tensor | None) -> Tensor | None:
    """A parameter that no gradient is asked of, None as it is: spares the backward the weights' half of the work."""
    return None if parameter is None else parameter.detach()


def linear_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """W x + b: linear as it is. [..., i] -> [..., o]; `layer` may be what a library has put in a layer's place."""
    if not is_bare(layer):
        return linear(layer, x)
    return fast_linear(x, cast(Tensor, layer.weight).detach(), constant(cast("Tensor | None", layer.bias)))


def linear_halves(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of W x + b, [..., i] -> two [..., o / 2]."""
    if not is_bare(layer):
        return halves(layer, x)
    weights, bias = cast(Tensor, layer.weight).detach().chunk(2), constant(cast("Tensor | None", layer.bias))
    biases = (None, None) if bias is None else bias.chunk(2)
    return fast_linear(x, weights[0], biases[0]), fast_linear(x, weights[1], biases[1])


def silu_rule(x: Tensor) -> Tensor:
    """SiLU as x [sigmoid(x)]_const."""
    rule: Any = _SiLU
    return cast(Tensor, rule.apply(x))


class _SiLU(torch.autograd.Function):
    """The rule in one pass each way, where x * sigmoid(x.detach()) takes two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.sigmoid(x).mul_(gradient)


def activation_rule(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Any activation f with f(0) = 0 as x [f(x) / x]_const: GELU's factor is Phi(x), that of tanh goes to 1 at 0.

    At 0 itself, where it makes no difference to y and hardly ever occurs, the factor is f' by a small step.
    """
    with torch.no_grad():
        step = torch.full((), 1e-4, dtype=x.dtype, device=x.device)
        factor = torch.where(x == 0, function(step) / step, function(x) / x)
    return x * factor


def gate_rule(a: Tensor, b: Tensor) -> Tensor:
    """A product of two signals as a b / 2 + [a b]_const / 2: each gets half of its relevance, and none is doubled."""
    rule: Any = _Gate
    return cast(Tensor, rule.apply(a, b))


class _Gate(torch.autograd.Function):
    """The rule without the two halves, which are the product."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        half = gradient * 0.5
        return half * b, half.mul_(a)


def rms_norm_rule(norm: EhrMambaRMSNorm, x: Tensor) -> Tensor:
    """The RMS norm as x [1 / rms(x)]_const weight; [..., d] -> [..., d]."""
    with torch.no_grad():
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    return x * scale


def layer_norm_rule(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm as (x - mean(x)) [1 / std(x)]_const weight + bias; [..., d] -> [..., d]."""
    centred = x - x.mean(-1, keepdim=True)
    with torch.no_grad():
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    return torch.addcmul(norm.bias.detach(), centred, scale) if norm.bias is not None else centred * scale


def attention_rule(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention as [softmax(q k / sqrt(d / h))]_const v, by torch's fastest kernel.

    Args:
        query, key, value: [b, h, l, d / h].
        mask: What the scores may see (bool) or get added, broadcast to [b, h, l, l]; None for all.

    Returns:
        [b, l, d].
    """
    mixed = F.scaled_dot_product_attention(query.detach(), key.detach(), value, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


__all__ = [
    "activation_rule",
    "attention_rule",
    "constant",
    "gate_rule",
    "layer_norm_rule",
    "linear_halves",
    "linear_layer",
    "rms_norm_rule",
    "silu_rule",
]

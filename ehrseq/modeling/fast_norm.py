"""The RMS norm in few passes over memory.

    y = x / sqrt(mean(x^2) + eps) * weight,   over the last dimension

Written as a formula, torch makes a pass and a tensor of each step, forward and backward; on CPU that is memory traffic
and nothing else. Here the sums of squares, the scaling and the gradient of the weight take one pass each.

Glossary: m rows (tokens), d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fast_linear import are_plain_tensors


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMS norm of x [..., d] with weight [d], computed in at least float32, in the dtype of the weight."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if are_plain_tensors(x, weight) and not torch.is_autocast_enabled("cpu"):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _RMSNorm.apply(x, weight, eps)
        return (x * _scale(x, eps)).to(weight.dtype).mul_(weight)
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(weight.dtype)


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / rms of each row, [..., 1]."""
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return (x * scale).to(weight.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        width, dtype = x.shape[-1], weight.dtype
        grad, weight = grad.to(x.dtype), weight.to(x.dtype)
        if torch.is_grad_enabled():  # create_graph=True: the same, by steps that are differentiable
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
            weighted = grad * weight
            along = (weighted * x).sum(-1, keepdim=True) * scale.pow(3) / width
            return scale * weighted - x * along, (grad * x * scale).reshape(-1, width).sum(0).to(dtype), None
        both = grad * x
        rows = both.reshape(-1, width)
        grad_weight = scale.reshape(-1) @ rows
        along = (rows @ weight).view(scale.shape) * scale.pow(3).div_(-width)
        grad_x = torch.mul(grad, weight, out=both).mul_(scale).addcmul_(x, along)
        return grad_x, grad_weight.to(dtype), None


__all__ = ["rms_norm"]

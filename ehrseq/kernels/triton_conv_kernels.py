"""The Triton kernels of the causal convolution. Importing this module imports triton: triton_conv.py does when called.

One program computes a block of steps and channels of one row. A tap reaches from a step back into the inputs, and
before the first step into the initial state; a reset in between cuts it. Sums over rows and blocks of steps are written
to a slot for each program and added up afterwards: gradients are the same in every run.

Glossary: t steps of a block, d channels of a block, s how far a tap reaches back. CT is the compute dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tap(x_ptr, initial_ptr, row, t, d, s, length, channels, x_batch, x_step, K: tl.constexpr, CT: tl.constexpr):
    """The inputs s steps before each step, [t, d]: 0 beyond the row and its initial state."""
    at = t - s
    real_d = (d < channels)[None, :]
    inside = ((at >= 0) & (t < length))[:, None] & real_d
    x = tl.load(x_ptr + row * x_batch + at[:, None] * x_step + d[None, :], mask=inside, other=0.0).to(CT)
    if initial_ptr is not None:
        before = ((at < 0) & (t < length))[:, None] & real_d
        past = initial_ptr + (row * channels + d[None, :]) * (K - 1) + (at + K - 1)[:, None]
        x += tl.load(past, mask=before, other=0.0).to(CT)
    return x


@triton.jit
def _cuts(reset_ptr, row, t, length):
    """1 where a segment starts at a step of the row, [t]."""
    return tl.load(reset_ptr + row * length + t, mask=(t >= 0) & (t < length), other=0).to(tl.int32)


@triton.jit
def _sum(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, reset_ptr,
    row, t, d, length, channels,
    x_batch, x_step,
    K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """What goes into the activation, [t, d]."""
    real_d = d < channels
    out = tl.zeros((BT, BD), CT)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + d, mask=real_d, other=0.0).to(CT)[None, :]
    cut = tl.zeros((BT,), tl.int32)
    for s in tl.static_range(K):
        w = tl.load(weight_ptr + d * K + (K - 1 - s), mask=real_d, other=0.0).to(CT)
        x = _tap(x_ptr, initial_ptr, row, t, d, s, length, channels, x_batch, x_step, K, CT)
        out += tl.where((cut == 0)[:, None], x * w[None, :], 0.0)
        if reset_ptr is not None:
            cut += _cuts(reset_ptr, row, t - s, length)
    return out


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


@triton.jit
def conv_forward(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, reset_ptr, out_ptr,
    length, channels,
    x_batch, x_step,
    SILU: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Grid: batch * blocks of steps * blocks of channels."""
    d_blocks, t_blocks = tl.cdiv(channels, BD), tl.cdiv(length, BT)
    d = (tl.program_id(0) % d_blocks) * BD + tl.arange(0, BD)
    row = (tl.program_id(0) // d_blocks // t_blocks).to(tl.int64)
    t = (tl.program_id(0) // d_blocks % t_blocks).to(tl.int64) * BT + tl.arange(0, BT)
    out = _sum(
        x_ptr, weight_ptr, bias_ptr, initial_ptr, reset_ptr, row, t, d, length, channels, x_batch, x_step, K, BT, BD, CT
    )
    if SILU:
        out *= _sigmoid(out)
    real = (t < length)[:, None] & (d < channels)[None, :]
    tl.store(out_ptr + (row * length + t[:, None]) * channels + d[None, :], out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def conv_backward_sum(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, reset_ptr, grad_ptr, grad_sum_ptr, grad_weight_ptr, grad_bias_ptr,
    length, channels,
    x_batch, x_step, grad_batch, grad_step,
    SILU: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Grid as of the forward. Gradient of the sum before the activation, in the compute dtype.

    And the programs' shares of the gradients of the weight, [batch * blocks of steps, channels, K], and of the bias.
    """
    d_blocks, t_blocks = tl.cdiv(channels, BD), tl.cdiv(length, BT)
    d = (tl.program_id(0) % d_blocks) * BD + tl.arange(0, BD)
    slot = (tl.program_id(0) // d_blocks).to(tl.int64)
    row = slot // t_blocks
    t = (slot % t_blocks) * BT + tl.arange(0, BT)
    real_d = d < channels
    real = (t < length)[:, None] & real_d[None, :]
    at = grad_ptr + row * grad_batch + t[:, None] * grad_step + d[None, :]
    g = tl.load(at, mask=real, other=0.0).to(CT)
    if SILU:
        out = _sum(
            x_ptr,
            weight_ptr,
            bias_ptr,
            initial_ptr,
            reset_ptr,
            row,
            t,
            d,
            length,
            channels,
            x_batch,
            x_step,
            K,
            BT,
            BD,
            CT,
        )
        s = _sigmoid(out)
        g = tl.where(real, g * s * (1.0 + out * (1.0 - s)), 0.0)
    tl.store(grad_sum_ptr + (row * length + t[:, None]) * channels + d[None, :], g, mask=real)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + slot * channels + d, tl.sum(g, 0), mask=real_d)
    cut = tl.zeros((BT,), tl.int32)
    for s in tl.static_range(K):
        x = _tap(x_ptr, initial_ptr, row, t, d, s, length, channels, x_batch, x_step, K, CT)
        grad_w = tl.sum(tl.where((cut == 0)[:, None], g * x, 0.0), 0)
        tl.store(grad_weight_ptr + (slot * channels + d) * K + (K - 1 - s), grad_w, mask=real_d)
        if reset_ptr is not None:
            cut += _cuts(reset_ptr, row, t - s, length)


@triton.jit
def conv_backward_inputs(
    weight_ptr, reset_ptr, grad_sum_ptr, grad_x_ptr, grad_initial_ptr,
    length, channels,
    K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs and of the initial state, which is the K - 1 steps before the first.

    Grid: batch * blocks of length + K - 1 steps * blocks of channels.
    """
    d_blocks, t_blocks = tl.cdiv(channels, BD), tl.cdiv(length + K - 1, BT)
    d = (tl.program_id(0) % d_blocks) * BD + tl.arange(0, BD)
    row = (tl.program_id(0) // d_blocks // t_blocks).to(tl.int64)
    t = (tl.program_id(0) // d_blocks % t_blocks).to(tl.int64) * BT + tl.arange(0, BT) - (K - 1)
    real_d = d < channels
    grad = tl.zeros((BT, BD), CT)
    cut = tl.zeros((BT,), tl.int32)
    for s in tl.static_range(K):  # the step s after this one reads it
        to = t + s
        if reset_ptr is not None and s > 0:
            cut += _cuts(reset_ptr, row, to, length)
        reads = ((to >= 0) & (to < length) & (cut == 0))[:, None] & real_d[None, :]
        w = tl.load(weight_ptr + d * K + (K - 1 - s), mask=real_d, other=0.0).to(CT)
        g = tl.load(grad_sum_ptr + (row * length + to[:, None]) * channels + d[None, :], mask=reads, other=0.0)
        grad += tl.where(reads, g * w[None, :], 0.0)
    real = ((t >= 0) & (t < length))[:, None] & real_d[None, :]
    at = grad_x_ptr + (row * length + t[:, None]) * channels + d[None, :]
    tl.store(at, grad.to(grad_x_ptr.dtype.element_ty), mask=real)
    if grad_initial_ptr is not None:
        before = (t < 0)[:, None] & real_d[None, :]
        past = grad_initial_ptr + (row * channels + d[None, :]) * (K - 1) + (t + K - 1)[:, None]
        tl.store(past, grad, mask=before)

"""Causal depthwise convolution with SiLU, channel-last, with a carried state and segment resets.

    out_t = silu(bias + sum_s weight[:, k-1-s] * x_{t-s}),   s = 0 .. k-1, and s <= steps since the segment of t began

One operator, several interchangeable backends with equal results, gradients included:

- `torch`: k shifted multiply-adds. It needs no transpose to channels-first and is about twice as fast on CPU as a
  grouped `torch.conv1d`. The backward computes the sum again instead of storing it.
- `naive`: the same sum differentiated by autograd. Only used when it is asked for.
- `cuda`, `triton`, `cpp`: compiled kernels of `ehrseq.kernels`, where the package is installed.

kernel_backends.py has the choice between them.

Glossary: b batch, l length, d channels, k kernel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel_backends import (
    BackendTable,
    OperatorBackend,
    any_needs_grad,
    check_dimensions,
    check_tensor,
    compute_dtype_of,
)

try:  # absent where a checkpoint brings this file along as remote code
    from ehrseq.kernels import conv_backends as _accelerators
except ImportError:
    _accelerators = dict

Activation = Literal["silu"] | None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reset_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: Activation = "silu",
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution over the length, then SiLU.

    Computes in float64 when `x` is float64, else in float32. Continuing a returned final state over any number of
    further steps equals the whole pass.

    Args:
        x: Input, [batch, length, channels], length at least 1.
        weight: [channels, kernel], the last tap meets the current step (the weight of a `Conv1d` less its middle axis).
        bias: [channels].
        initial_state: The kernel - 1 inputs before the first step, oldest first, [batch, channels, kernel - 1]; zeros
            when None.
        reset_mask: bool [batch, length]; True starts a segment there: no tap of that step or a later one reaches back
            before it, nor into `initial_state`.
        lengths: int [batch], real steps of right-padded rows (0 .. length): the final state is then the one after each
            row's last real step. The output does not depend on it.
        activation: "silu" or None.
        return_final_state: Also return the state after the last (real) step.
        backend: Name of a registered backend; None takes the one of the environment variable EHRSEQ_BACKEND, and where
            that is not set the first of the table that serves this call.

    Returns:
        The output in the dtype of `x`, [batch, length, channels]; with `return_final_state` the pair (output,
        final_state), the state [batch, channels, kernel - 1] in the dtype of `x`, 0 before the last segment's start.

    Raises:
        ValueError: a wrong shape, dtype or device, length 0, `lengths` outside 0 .. length, an unknown activation
            or backend, a backend that cannot serve the call.
    """
    _check_inputs(x, weight, bias, initial_state, reset_mask, lengths, activation)
    inputs = ConvInputs(x, weight, bias, initial_state, reset_mask, activation)
    out = CONV_BACKENDS.choose(backend, inputs).run(inputs)
    if not return_final_state:
        return out
    kernel = weight.shape[1]
    return out, conv_final_state(x, kernel, initial_state=initial_state, reset_mask=reset_mask, lengths=lengths)


def positions_in_segment(reset_mask: Tensor, before: int = 0) -> Tensor:
    """Steps since the segment of each step began, int64 [batch, length].

    Args:
        reset_mask: bool [batch, length], True where a segment starts.
        before: Steps taken to precede the row's first one, where that starts no segment.
    """
    steps = torch.arange(reset_mask.shape[1], device=reset_mask.device)
    last_reset = torch.where(reset_mask, steps, -before).cummax(1).values
    return steps - last_reset


def conv_final_state(
    x: Tensor,
    kernel: int,
    *,
    initial_state: Tensor | None = None,
    reset_mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The last kernel - 1 inputs of each row, oldest first: the `initial_state` of what follows.

    Arguments as in `causal_conv1d`. Returns [batch, channels, kernel - 1], differentiable, 0 before the row's last
    segment start.
    """
    batch, length, channels = x.shape
    past = kernel - 1
    earlier = x.new_zeros(batch, past, channels) if initial_state is None else initial_state.transpose(1, 2).to(x.dtype)
    if lengths is None:
        tail = torch.cat([earlier, x[:, max(0, length - past) :]], 1)[:, min(past, length) :]  # [b, k-1, d]
    if lengths is None and reset_mask is None:
        return tail.transpose(1, 2)

    ends = x.new_full((batch,), length, dtype=torch.int64) if lengths is None else lengths.to(x.device, torch.int64)
    steps = ends[:, None] + torch.arange(-past, 0, device=x.device)  # [b, k-1], negative = in the initial state
    if lengths is not None:
        tail = torch.cat([earlier, x], 1).gather(1, (steps + past)[..., None].expand(-1, -1, channels))
    if reset_mask is not None:
        row_steps = torch.arange(length, device=x.device)
        real_starts = torch.where(reset_mask & (row_steps < ends[:, None]), row_steps, -past)
        tail = tail.masked_fill((steps < real_starts.amax(1, keepdim=True))[..., None], 0.0)
    return tail.transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and the table of backends
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ConvInputs:
    """The checked arguments of one call, as a backend receives them (shapes as in `causal_conv1d`)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    reset_mask: Tensor | None
    activation: Activation

    @property
    def needs_grad(self) -> bool:
        """Whether autograd will ask for a backward of this call."""
        return any_needs_grad(vars(self).values())

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 for everything narrower."""
        return compute_dtype_of(self.x)


# Outputs are [batch, length, channels] in the dtype of x. (The final state is a slice of the inputs:
# `conv_final_state`.)
CONV_BACKENDS: BackendTable[ConvInputs, Tensor] = BackendTable("conv")


# ---------------------------------------------------------------------------------------------------------------------
# torch
# ---------------------------------------------------------------------------------------------------------------------
def _run_torch(inputs: ConvInputs) -> Tensor:
    if not inputs.needs_grad:
        return _run_naive(inputs)
    starts = inputs.reset_mask
    positions = None if starts is None else positions_in_segment(starts, inputs.weight.shape[1] - 1)
    tensors = (inputs.x, inputs.weight, inputs.bias, inputs.initial_state)
    return _CausalConv.apply(*tensors, positions, inputs.activation)


def _run_naive(inputs: ConvInputs) -> Tensor:
    starts = inputs.reset_mask
    positions = None if starts is None else positions_in_segment(starts, inputs.weight.shape[1] - 1)
    out = _convolve(inputs.x, inputs.weight, inputs.bias, inputs.initial_state, positions)
    return (F.silu(out, inplace=not inputs.needs_grad) if inputs.activation == "silu" else out).to(inputs.x.dtype)


class _CausalConv(torch.autograd.Function):
    """Saves its inputs only; the backward computes the sum before the activation again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        positions: Tensor | None,
        activation: Activation,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, initial_state, positions)
        ctx.activation = activation
        out = _convolve(x, weight, bias, initial_state, positions)
        return (F.silu(out, inplace=True) if activation == "silu" else out).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("causal_conv1d has no second derivative: call backward without create_graph=True.")
        x, weight, bias, initial_state, positions = ctx.saved_tensors
        dtype = compute_dtype_of(x)
        kernel, length = weight.shape[1], x.shape[1]
        g = grad.to(dtype)  # [b, l, d], of the sum before the activation
        if ctx.activation == "silu":
            g = torch.ops.aten.silu_backward(g, _convolve(x, weight, bias, initial_state, positions))
        x_, w = x.to(dtype), weight.to(dtype)
        grad_x = g * w[:, -1]
        grad_weight = torch.empty_like(w)
        grad_weight[:, -1] = (g * x_).sum((0, 1))
        grad_state = None if initial_state is None else initial_state.new_zeros(initial_state.shape, dtype=dtype)
        for s in range(1, kernel):
            tap = w[:, kernel - 1 - s]
            # [b, l, d], 0 where the tap would have crossed a segment start
            reached = g if positions is None else g.masked_fill((positions < s)[..., None], 0.0)
            grad_tap = (reached[:, s:] * x_[:, :-s]).sum((0, 1)) if s < length else 0.0
            if s < length:
                grad_x[:, :-s].addcmul_(reached[:, s:], tap)
            if initial_state is not None and grad_state is not None:
                m = min(s, length)  # the first m steps reach into the state
                past = slice(kernel - 1 - s, kernel - 1 - s + m)
                grad_state[:, :, past] += (reached[:, :m] * tap).transpose(1, 2)
                grad_tap = grad_tap + (reached[:, :m] * initial_state[:, :, past].to(dtype).transpose(1, 2)).sum((0, 1))
            grad_weight[:, kernel - 1 - s] = grad_tap
        return (
            grad_x.to(x.dtype),
            grad_weight.to(weight.dtype),
            None if bias is None else g.sum((0, 1)).to(bias.dtype),
            None if initial_state is None or grad_state is None else grad_state.to(initial_state.dtype),
            None,
            None,
        )


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, positions: Tensor | None
) -> Tensor:
    """The sum before the activation, in the compute dtype, [b, l, d]."""
    dtype = compute_dtype_of(x)
    kernel, length = weight.shape[1], x.shape[1]
    x, w = x.to(dtype), weight.to(dtype)
    out = x * w[:, -1] if bias is None else torch.addcmul(bias.to(dtype), x, w[:, -1])
    for s in range(1, kernel):
        tap = w[:, kernel - 1 - s]
        if s < length:
            earlier = x[:, :-s]
            if positions is not None:  # a fill, not a product with 0, so that a NaN stays in its own segment
                earlier = earlier.masked_fill((positions[:, s:] < s)[..., None], 0.0)
            out[:, s:].addcmul_(earlier, tap)
        if initial_state is not None:
            m = min(s, length)  # the first m steps reach into the state
            before = initial_state[:, :, kernel - 1 - s : kernel - 1 - s + m].to(dtype).transpose(1, 2)
            if positions is not None:
                before = before.masked_fill((positions[:, :m] < s)[..., None], 0.0)
            out[:, :m].addcmul_(before, tap)
    return out


def _check_inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset_mask: Tensor | None,
    lengths: Tensor | None,
    activation: Activation,
) -> None:
    """Raise a ValueError that names the argument, what it is, and what it should be."""
    check_dimensions("causal_conv1d", "x", x, "[batch, length, channels]")
    check_dimensions("causal_conv1d", "weight", weight, "[channels, kernel]")
    batch, length, channels = x.shape
    kernel = weight.shape[1]
    if length == 0:
        raise ValueError(f"causal_conv1d: x has length 0 ({list(x.shape)}), expected at least one step.")
    if kernel == 0:
        raise ValueError("causal_conv1d: weight has kernel size 0, expected at least one tap.")
    expected: dict[str, tuple[Tensor | None, str, tuple[int, ...]]] = {
        "x": (x, "[batch, length, channels]", (batch, length, channels)),
        "weight": (weight, "[channels, kernel]", (channels, kernel)),
        "bias": (bias, "[channels]", (channels,)),
        "initial_state": (initial_state, "[batch, channels, kernel - 1]", (batch, channels, kernel - 1)),
        "reset_mask": (reset_mask, "[batch, length]", (batch, length)),
        "lengths": (lengths, "[batch]", (batch,)),
    }
    for name, (value, layout, shape) in expected.items():
        if value is not None:
            check_tensor("causal_conv1d", name, value, layout, shape, ("x", x))
    if lengths is not None and lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= length:
        raise ValueError(f"causal_conv1d: lengths is {lengths.tolist()}, expected values from 0 to {length}.")
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: unknown activation {activation!r}, expected 'silu' or None.")


CONV_BACKENDS.register("naive", OperatorBackend(_run_naive, automatic=False))
CONV_BACKENDS.register("torch", OperatorBackend(_run_torch))
for _name, _entry in reversed(_accelerators().items()):
    CONV_BACKENDS.register(_name, cast("OperatorBackend[ConvInputs, Tensor]", _entry))

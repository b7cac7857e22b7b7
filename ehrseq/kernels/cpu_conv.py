"""The causal convolution with SiLU on CPU by the compiled kernels: custom operators of torch with gradients.

Registered as those of cpu_scan.py, with the same behaviour under `torch.compile`, `torch.export` and autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu_library
from .backend import KernelBackend
from .cpu_library import contiguous, pointer, rows, rows_fields
from .operators import compute_dtype, fake_gradients, register_conv_autograd

MAX_KERNEL = 4  # kTaps of csrc/conv.h


def _sizes(x: Tensor, weight: Tensor, silu: bool) -> list[int]:
    batch, length, channels = x.shape
    dtype, threads = compute_dtype(x), cpu_library.num_threads(batch * length * channels * weight.shape[1])
    splits = cpu_library.splits(batch, channels, dtype, threads)
    return [int(dtype == torch.float64), batch, length, channels, weight.shape[1], splits, threads, int(silu)]


def _reset_fields(reset_mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if reset_mask is None else (reset_mask.data_ptr(), *reset_mask.stride())


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, reset_mask: Tensor | None, silu: bool
) -> Tensor:
    """The output for plain CPU tensors."""
    dtype = compute_dtype(x)
    x = rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    parameters = [contiguous(t, dtype) for t in (weight, bias, initial_state)]
    fields = [
        *_sizes(x, weight, silu),
        *rows_fields(x),
        *rows_fields(out),
        *(pointer(t) for t in parameters),
        *_reset_fields(reset_mask),
        *[0] * (2 * 4 + 3),
    ]
    cpu_library.call("ehrseq_conv_forward", fields)
    return out


@torch.library.custom_op("ehrseq::causal_conv1d", mutates_args=(), device_types="cpu")
def causal_conv1d_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, reset_mask: Tensor | None, silu: bool
) -> Tensor:
    """The convolution; arguments as in `ehrseq.modeling.causal_conv.causal_conv1d`; `silu` for its activation."""
    return _forward(x, weight, bias, initial_state, reset_mask, silu)


@causal_conv1d_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, reset_mask: Tensor | None, silu: bool
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ehrseq::causal_conv1d_backward", mutates_args=(), device_types="cpu")
def causal_conv1d_backward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset_mask: Tensor | None,
    silu: bool,
    grad: Tensor,
) -> list[Tensor]:
    """Gradients of x, weight, bias and initial_state, those that are there, in their dtypes."""
    dtype = compute_dtype(x)
    x, grad = rows(x), rows(grad)
    inputs = [contiguous(t, dtype) for t in (weight, bias, initial_state)]
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    grads = [None if t is None else torch.empty(t.shape, dtype=dtype) for t in (weight, bias, initial_state)]
    fields = [
        *_sizes(x, weight, silu),
        *rows_fields(x),
        *rows_fields(None),
        *(pointer(t) for t in inputs),
        *_reset_fields(reset_mask),
        *rows_fields(grad),
        *rows_fields(grad_x),
        *(pointer(t) for t in grads),
    ]
    cpu_library.call("ehrseq_conv_backward", fields)
    pairs = zip((weight, bias, initial_state), grads, strict=True)
    return [grad_x, *(g.to(t.dtype) for t, g in pairs if t is not None and g is not None)]


@causal_conv1d_backward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset_mask: Tensor | None,
    silu: bool,
    grad: Tensor,
) -> list[Tensor]:
    return fake_gradients(x, weight, bias, initial_state)


register_conv_autograd(causal_conv1d_op, causal_conv1d_backward_op, "cpp")


def _run(inputs: Any) -> Tensor:
    arguments = (inputs.x, inputs.weight, inputs.bias, inputs.initial_state, inputs.reset_mask)
    silu = inputs.activation == "silu"
    if not inputs.needs_grad and cpu_library.is_plain(*arguments):
        return _forward(*arguments, silu)
    return causal_conv1d_op(*arguments, silu)


def _why_not(inputs: Any) -> str | None:
    if inputs.x.device.type != "cpu":
        return f"it runs on CPU, the tensors are on {inputs.x.device.type}"
    if inputs.x.dtype not in cpu_library.DTYPE_CODES:
        return f"it reads float64, float32, bfloat16 and float16, x is {inputs.x.dtype}"
    if inputs.weight.shape[1] > MAX_KERNEL:
        return f"it has up to {MAX_KERNEL} taps, weight has {inputs.weight.shape[1]}"
    return cpu_library.why_no_library()


CONV_BACKEND = KernelBackend(_run, _why_not)

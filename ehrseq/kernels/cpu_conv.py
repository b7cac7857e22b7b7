"""The causal convolution with SiLU on CPU by the compiled kernels, as a custom operator of torch (operators.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu_library
from .backend import KernelBackend
from .cpu_library import contiguous, pointer, rows, rows_fields
from .operators import ConvArguments, ConvInputsLike, compute_dtype, conv_operator, present_gradients

CPP_MAX_KERNEL = 4  # kTaps of csrc/conv.h


def _fields(
    conv: ConvArguments, x: Tensor, out: Tensor | None, parameters: list[Tensor | None], gradients: list[int]
) -> list[int]:
    """`ConvCall` of csrc/conv.h; the tensors must live until the call is over."""
    (batch, length, channels), taps, dtype = x.shape, conv.weight.shape[1], compute_dtype(x)
    threads = cpu_library.num_threads(batch * length * channels * taps)
    splits = cpu_library.splits(batch, channels, dtype, threads)
    reset = conv.reset_mask
    return [
        *(int(dtype == torch.float64), batch, length, channels, taps, splits, threads, int(conv.silu)),
        *rows_fields(x),
        *rows_fields(out),
        *(pointer(t) for t in parameters),
        *((0, 0, 0) if reset is None else (reset.data_ptr(), *reset.stride())),
        *gradients,
    ]


def _forward(conv: ConvArguments) -> Tensor:
    """The output for plain CPU tensors."""
    x, dtype = rows(conv.x), compute_dtype(conv.x)
    out = torch.empty(x.shape, dtype=x.dtype)
    parameters = [contiguous(t, dtype) for t in conv.differentiable[1:]]
    cpu_library.call("ehrseq_conv_forward", _fields(conv, x, out, parameters, [0] * (2 * 4 + 3)))
    return out


def _backward(conv: ConvArguments, grad: Tensor) -> list[Tensor]:
    x, grad, dtype = rows(conv.x), rows(grad), compute_dtype(conv.x)
    parameters = [contiguous(t, dtype) for t in conv.differentiable[1:]]
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    grads = [None if t is None else torch.empty(t.shape, dtype=dtype) for t in conv.differentiable[1:]]
    gradients = [*rows_fields(grad), *rows_fields(grad_x), *(pointer(t) for t in grads)]
    cpu_library.call("ehrseq_conv_backward", _fields(conv, x, None, parameters, gradients))
    return present_gradients(conv.differentiable, (grad_x, *grads))


causal_conv1d_op = conv_operator("ehrseq::causal_conv1d", "cpp", _forward, _backward, device="cpu")


def _run(inputs: ConvInputsLike) -> Tensor:
    conv = ConvArguments.of(inputs)
    if not inputs.needs_grad and cpu_library.is_plain(*conv):
        return _forward(conv)
    out: Tensor = causal_conv1d_op(*conv)
    return out


def _why_not(inputs: ConvInputsLike) -> str | None:
    if inputs.x.device.type != "cpu":
        return f"it runs on CPU, the tensors are on {inputs.x.device.type}"
    if inputs.x.dtype not in cpu_library.DTYPE_CODES:
        return f"it reads float64, float32, bfloat16 and float16, x is {inputs.x.dtype}"
    if inputs.weight.shape[1] > CPP_MAX_KERNEL:
        return f"it has up to {CPP_MAX_KERNEL} taps, weight has {inputs.weight.shape[1]}"
    return cpu_library.why_no_library()


CPP_CONV = KernelBackend(_run, _why_not)

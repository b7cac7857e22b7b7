"""The causal convolution with SiLU on GPU by Triton kernels, as a custom operator of torch (operators.py).

The kernels themselves are in triton_conv_kernels.py, which is imported at the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import KernelBackend
from .operators import ConvArguments, ConvInputsLike, compute_dtype, conv_operator, present_gradients
from .triton_library import (
    TRITON_DTYPES,
    dense,
    innermost_dense,
    interpreted,
    mask_bytes,
    on_device,
    strides,
    why_not_triton,
)

TRITON_MAX_KERNEL = 8  # the taps are unrolled
_BLOCK_STEPS = 32


def _settings(x: Tensor, weight: Tensor) -> dict[str, Any]:
    """The compile-time arguments that all kernels have."""
    import triton
    import triton.language as tl

    return {
        "K": weight.shape[1],
        "BT": min(_BLOCK_STEPS, triton.next_power_of_2(x.shape[1])),
        "BD": min(64, triton.next_power_of_2(x.shape[2])),
        "CT": tl.float32 if compute_dtype(x) == torch.float32 else tl.float64,
    }


def _forward(conv: ConvArguments) -> Tensor:
    from .triton_conv_kernels import conv_forward

    batch, length, channels = conv.x.shape
    x = innermost_dense(conv.x)
    out = x.new_empty(batch, length, channels)
    settings = _settings(x, conv.weight)
    with on_device(x):
        conv_forward[(batch * -(-length // settings["BT"]) * -(-channels // settings["BD"]),)](
            x,
            conv.weight.contiguous(),
            dense(conv.bias),
            dense(conv.initial_state),
            mask_bytes(conv.reset_mask),
            out,
            length,
            channels,
            *strides(x),
            SILU=conv.silu,
            **settings,
        )
    return out


def _backward(conv: ConvArguments, grad: Tensor) -> list[Tensor]:
    from .triton_conv_kernels import conv_backward_inputs, conv_backward_sum

    batch, length, channels = conv.x.shape
    x, grad, weight = innermost_dense(conv.x), innermost_dense(grad), conv.weight.contiguous()
    reset, settings = mask_bytes(conv.reset_mask), _settings(conv.x, conv.weight)
    kernel, dtype = weight.shape[1], compute_dtype(x)
    t_blocks, d_blocks = -(-length // settings["BT"]), -(-channels // settings["BD"])

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    # Gradients of the parameters have a slot for each row and block of steps.
    weight_slots, grad_sum = empty(batch * t_blocks, channels, kernel), empty(batch, length, channels)
    bias_slots = None if conv.bias is None else empty(batch * t_blocks, channels)
    grad_x = x.new_empty(batch, length, channels)
    grad_initial = None if conv.initial_state is None else empty(batch, channels, kernel - 1)
    with on_device(x):
        conv_backward_sum[(batch * t_blocks * d_blocks,)](
            x,
            weight,
            dense(conv.bias),
            dense(conv.initial_state),
            reset,
            grad,
            grad_sum,
            weight_slots,
            bias_slots,
            length,
            channels,
            *strides(x),
            *strides(grad),
            SILU=conv.silu,
            **settings,
        )
        conv_backward_inputs[(batch * -(-(length + kernel - 1) // settings["BT"]) * d_blocks,)](
            weight, reset, grad_sum, grad_x, grad_initial, length, channels, **settings
        )
    grad_bias = None if bias_slots is None else bias_slots.sum(0)
    return present_gradients(conv.differentiable, (grad_x, weight_slots.sum(0), grad_bias, grad_initial))


triton_causal_conv1d_op = conv_operator("ehrseq::triton_causal_conv1d", "triton", _forward, _backward)


def _run(inputs: ConvInputsLike) -> Tensor:
    out: Tensor = triton_causal_conv1d_op(*ConvArguments.of(inputs))
    return out


def _why_not(inputs: ConvInputsLike) -> str | None:
    for name in ("x", "weight", "bias", "initial_state"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.dtype not in TRITON_DTYPES:
            return f"it reads float64, float32, bfloat16 and float16, {name} is {tensor.dtype}"
    if inputs.weight.shape[1] > TRITON_MAX_KERNEL:
        return f"it has up to {TRITON_MAX_KERNEL} taps, weight has {inputs.weight.shape[1]}"
    if inputs.x.numel() == 0:
        return "x is empty"
    return why_not_triton(inputs.x.device)


# Under Triton's interpreter, which is there for tests, only when it is asked for by name.
TRITON_CONV = KernelBackend(_run, _why_not, automatic=not interpreted())

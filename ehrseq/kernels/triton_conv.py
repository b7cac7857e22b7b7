"""The causal convolution with SiLU on GPU by Triton kernels: custom operators of torch with gradients.

Registered as those of cpu_scan.py, with the same behaviour under `torch.compile`, `torch.export` and autocast. The
kernels themselves are in triton_conv_kernels.py, which is imported at the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import KernelBackend
from .operators import compute_dtype, fake_gradients, register_conv_autograd
from .triton_library import (
    DTYPES,
    contiguous,
    interpreted,
    mask_bytes,
    on_device,
    rows,
    strides,
    why_not_triton,
)

MAX_KERNEL = 8  # the taps are unrolled
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


@torch.library.custom_op("ehrseq::triton_causal_conv1d", mutates_args=())
def triton_causal_conv1d_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, reset_mask: Tensor | None, silu: bool
) -> Tensor:
    """The convolution; arguments as in `ehrseq.modeling.causal_conv.causal_conv1d`; `silu` for its activation."""
    from .triton_conv_kernels import conv_forward

    batch, length, channels = x.shape
    x = rows(x)
    out = x.new_empty(batch, length, channels)
    settings = _settings(x, weight)
    with on_device(x):
        conv_forward[(batch * -(-length // settings["BT"]) * -(-channels // settings["BD"]),)](
            x,
            weight.contiguous(),
            contiguous(bias),
            contiguous(initial_state),
            mask_bytes(reset_mask),
            out,
            length,
            channels,
            *strides(x),
            SILU=silu,
            **settings,
        )
    return out


@triton_causal_conv1d_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, reset_mask: Tensor | None, silu: bool
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ehrseq::triton_causal_conv1d_backward", mutates_args=())
def triton_causal_conv1d_backward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset_mask: Tensor | None,
    silu: bool,
    grad: Tensor,
) -> list[Tensor]:
    """Gradients of x, weight, bias and initial_state, those that are there, in their dtypes."""
    from .triton_conv_kernels import conv_backward_inputs, conv_backward_sum

    originals = (x, weight, bias, initial_state)
    batch, length, channels = x.shape
    x, grad, weight, reset = rows(x), rows(grad), weight.contiguous(), mask_bytes(reset_mask)
    kernel, dtype, settings = weight.shape[1], compute_dtype(x), _settings(x, weight)
    t_blocks, d_blocks = -(-length // settings["BT"]), -(-channels // settings["BD"])

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    # Gradients of the parameters have a slot for each row and block of steps.
    weight_slots, grad_sum = empty(batch * t_blocks, channels, kernel), empty(batch, length, channels)
    bias_slots = None if bias is None else empty(batch * t_blocks, channels)
    grad_x = x.new_empty(batch, length, channels)
    grad_initial = None if initial_state is None else empty(batch, channels, kernel - 1)
    with on_device(x):
        conv_backward_sum[(batch * t_blocks * d_blocks,)](
            x,
            weight,
            contiguous(bias),
            contiguous(initial_state),
            reset,
            grad,
            grad_sum,
            weight_slots,
            bias_slots,
            length,
            channels,
            *strides(x),
            *strides(grad),
            SILU=silu,
            **settings,
        )
        conv_backward_inputs[(batch * -(-(length + kernel - 1) // settings["BT"]) * d_blocks,)](
            weight, reset, grad_sum, grad_x, grad_initial, length, channels, **settings
        )
    grads = (grad_x, weight_slots.sum(0), None if bias_slots is None else bias_slots.sum(0), grad_initial)
    return [g.to(t.dtype) for t, g in zip(originals, grads, strict=True) if t is not None and g is not None]


@triton_causal_conv1d_backward_op.register_fake
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


register_conv_autograd(triton_causal_conv1d_op, triton_causal_conv1d_backward_op, "triton")


def _run(inputs: Any) -> Tensor:
    arguments = (inputs.x, inputs.weight, inputs.bias, inputs.initial_state, inputs.reset_mask)
    return triton_causal_conv1d_op(*arguments, inputs.activation == "silu")


def _why_not(inputs: Any) -> str | None:
    for name in ("x", "weight", "bias", "initial_state"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"it reads float64, float32, bfloat16 and float16, {name} is {tensor.dtype}"
    if inputs.weight.shape[1] > MAX_KERNEL:
        return f"it has up to {MAX_KERNEL} taps, weight has {inputs.weight.shape[1]}"
    if inputs.x.numel() == 0:
        return "x is empty"
    return why_not_triton(inputs.x.device)


# Under Triton's interpreter, which is there for tests, only when it is asked for by name.
CONV_BACKEND = KernelBackend(_run, _why_not, automatic=not interpreted())

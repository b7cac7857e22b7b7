"""The selective scan on GPU by Triton kernels: custom operators of torch with gradients.

Registered as those of cpu_scan.py, with the same behaviour under `torch.compile`, `torch.export` and autocast. The
kernels themselves are in triton_scan_kernels.py, which is imported at the first call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import KernelBackend
from .operators import compute_dtype, fake_gradients, register_scan_autograd, scan_arguments
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

TILE_STEPS = 16
MAX_STATE = 256  # a tile of one channel must fit the registers
_TILE_ELEMENTS = 4096  # of steps x channels x states: 16 to 32 values a thread for each of a handful of tensors


def _settings(u: Tensor, A: Tensor, delta_softplus: bool) -> dict[str, Any]:
    """The compile-time arguments of both kernels."""
    import triton
    import triton.language as tl

    dtype, states = compute_dtype(u), triton.next_power_of_2(A.shape[1])
    most = max(1, _TILE_ELEMENTS // (TILE_STEPS * states) // (2 if dtype == torch.float64 else 1))
    return {
        "SOFTPLUS": delta_softplus,
        "T": TILE_STEPS,
        "BD": min(32, most, triton.next_power_of_2(u.shape[2])),
        "N": states,
        "TERMS": 9 if dtype == torch.float32 else 15,
        "CT": tl.float32 if dtype == torch.float32 else tl.float64,
        "num_warps": 8,
    }


@torch.library.custom_op("ehrseq::triton_selective_scan", mutates_args=())
def triton_selective_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reset_mask: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan; arguments as in `ehrseq.modeling.selective_scan.selective_scan`.

    Args:
        keep_states: Whether a backward will follow.

    Returns:
        y; the final state [batch, channels, state]; with `keep_states` the state before each tile [batch, tiles,
        channels, state], which the backward starts from, else an empty tensor.
    """
    from .triton_scan_kernels import scan_forward

    (batch, length, channels), state, dtype = u.shape, A.shape[1], compute_dtype(u)
    u, delta, B, C = rows(u), rows(delta), rows(B), rows(C)
    z = None if z is None else rows(z)
    y = u.new_empty(batch, length, channels)
    final_state = u.new_empty(batch, channels, state, dtype=dtype)
    tiles = -(-length // TILE_STEPS) if keep_states else 0
    tile_states = u.new_empty(batch, tiles, channels, state, dtype=dtype)
    if y.numel() == 0 or state == 0:
        raise ValueError(f"triton selective_scan: nothing to compute for u {list(u.shape)} and A {list(A.shape)}.")
    settings = _settings(u, A, delta_softplus)
    with on_device(u):
        scan_forward[(batch * -(-channels // settings["BD"]),)](
            u,
            delta,
            A.contiguous(),
            B,
            C,
            contiguous(D),
            z,
            contiguous(delta_bias),
            contiguous(initial_state),
            mask_bytes(reset_mask),
            y,
            final_state,
            tile_states if keep_states else None,
            length,
            channels,
            state,
            *strides(u),
            *strides(delta),
            *strides(B),
            *strides(C),
            *strides(z),
            **settings,
        )
    return y, final_state, tile_states


@triton_selective_scan_op.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reset_mask: Tensor | None,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    dtype, state = compute_dtype(u), A.shape[1]
    tiles = (length + TILE_STEPS - 1) // TILE_STEPS if keep_states else 0
    return (
        u.new_empty(u.shape),
        u.new_empty(batch, channels, state, dtype=dtype),
        u.new_empty(batch, tiles, channels, state, dtype=dtype),
    )


@torch.library.custom_op("ehrseq::triton_selective_scan_backward", mutates_args=())
def triton_selective_scan_backward_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reset_mask: Tensor | None,
    tile_states: Tensor,
    grad_y: Tensor | None,
    grad_final_state: Tensor | None,
) -> list[Tensor]:
    """Gradients of the tensors that are there, in the order of the arguments and in their dtypes."""
    from .triton_scan_kernels import scan_backward

    originals = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    (batch, length, channels), state, dtype = u.shape, A.shape[1], compute_dtype(u)
    u, delta, B, C = rows(u), rows(delta), rows(B), rows(C)
    z = None if z is None else rows(z)
    grad_y = None if grad_y is None else rows(grad_y)
    settings = _settings(u, A, delta_softplus)
    blocks = -(-channels // settings["BD"])

    def empty(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=dtype)

    grad_u, grad_delta = (t.new_empty(batch, length, channels) for t in (u, delta))
    grad_z = None if z is None else z.new_empty(batch, length, channels)
    # A slot for each program that adds to a gradient: rows for the parameters, blocks of channels for B and C.
    A_slots, B_slots, C_slots = empty(batch, channels, state), *(empty(blocks, batch, length, state) for _ in "BC")
    D_slots, bias_slots = (None if t is None else empty(batch, channels) for t in (D, delta_bias))
    grad_initial = None if initial_state is None else empty(batch, channels, state)
    with on_device(u):
        scan_backward[(batch * blocks,)](
            u,
            delta,
            A.contiguous(),
            B,
            C,
            contiguous(D),
            z,
            contiguous(delta_bias),
            mask_bytes(reset_mask),
            tile_states,
            grad_y,
            contiguous(grad_final_state),
            grad_u,
            grad_delta,
            A_slots,
            B_slots,
            C_slots,
            D_slots,
            grad_z,
            bias_slots,
            grad_initial,
            length,
            channels,
            state,
            *strides(u),
            *strides(delta),
            *strides(B),
            *strides(C),
            *strides(z),
            *strides(grad_y),
            **settings,
        )
    sums = (None if slots is None else slots.sum(0) for slots in (A_slots, B_slots, C_slots, D_slots))
    grad_A, grad_B, grad_C, grad_D = sums
    grad_bias = None if bias_slots is None else bias_slots.sum(0)
    grads = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial)
    return [grad.to(t.dtype) for t, grad in zip(originals, grads, strict=True) if t is not None and grad is not None]


@triton_selective_scan_backward_op.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reset_mask: Tensor | None,
    tile_states: Tensor,
    grad_y: Tensor | None,
    grad_final_state: Tensor | None,
) -> list[Tensor]:
    return fake_gradients(u, delta, A, B, C, D, z, delta_bias, initial_state)


register_scan_autograd(
    triton_selective_scan_op, triton_selective_scan_backward_op, "ehrseq::triton_selective_scan", "triton"
)


def _run(inputs: Any) -> tuple[Tensor, Tensor]:
    y, final_state, _ = triton_selective_scan_op(*scan_arguments(inputs))
    return y, final_state


def _why_not(inputs: Any) -> str | None:
    for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"it reads float64, float32, bfloat16 and float16, {name} is {tensor.dtype}"
    if not 1 <= inputs.A.shape[1] <= MAX_STATE:
        return f"it has state sizes from 1 to {MAX_STATE}, A has {inputs.A.shape[1]}"
    if inputs.u.numel() == 0:
        return "u is empty"
    return why_not_triton(inputs.u.device)


# Under Triton's interpreter, which is there for tests, only when it is asked for by name.
SCAN_BACKEND = KernelBackend(_run, _why_not, automatic=not interpreted())

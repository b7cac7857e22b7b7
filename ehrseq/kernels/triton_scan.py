"""The selective scan on GPU by Triton kernels, as a custom operator of torch (operators.py).

The kernels themselves are in triton_scan_kernels.py, which is imported at the first call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .backend import KernelBackend
from .operators import (
    ScanArguments,
    ScanInputsLike,
    compute_dtype,
    empty_scan_results,
    present_gradients,
    scan_operator,
)
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

TRITON_TILE_STEPS = 16
TRITON_MAX_STATE = 256  # a tile of one channel must fit the registers
_TILE_ELEMENTS = 4096  # of steps x channels x states: 16 to 32 values a thread for each of a handful of tensors


def _settings(u: Tensor, A: Tensor, delta_softplus: bool) -> dict[str, Any]:
    """The compile-time arguments of both kernels."""
    import triton
    import triton.language as tl

    dtype, states = compute_dtype(u), triton.next_power_of_2(A.shape[1])
    most = max(1, _TILE_ELEMENTS // (TRITON_TILE_STEPS * states) // (2 if dtype == torch.float64 else 1))
    return {
        "SOFTPLUS": delta_softplus,
        "T": TRITON_TILE_STEPS,
        "BD": min(32, most, triton.next_power_of_2(u.shape[2])),
        "N": states,
        "TERMS": 9 if dtype == torch.float32 else 15,
        "CT": tl.float32 if dtype == torch.float32 else tl.float64,
        "num_warps": 8,
    }


_empty_results = partial(empty_scan_results, tile_steps=TRITON_TILE_STEPS, channels_innermost=False)


class _Launch:
    """What both kernels read: the tensors of one call in the order of their parameters, sizes, strides, settings."""

    def __init__(self, scan: ScanArguments) -> None:
        self.settings = _settings(scan.u, scan.A, scan.delta_softplus)
        self.blocks = -(-scan.u.shape[2] // self.settings["BD"])
        u, delta, B, C = (innermost_dense(t) for t in (scan.u, scan.delta, scan.B, scan.C))
        z = None if scan.z is None else innermost_dense(scan.z)
        self.inputs = (u, delta, scan.A.contiguous(), B, C, dense(scan.D), z, dense(scan.delta_bias))
        self.reset_mask = mask_bytes(scan.reset_mask)
        self.sizes = scan.sizes[1:]
        self.strides = [stride for tensor in (u, delta, B, C, z) for stride in strides(tensor)]


def _forward(scan: ScanArguments, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, state before each tile [batch, tiles, channels, state])."""
    from .triton_scan_kernels import scan_forward

    y, final_state, tile_states = _empty_results(scan, keep_states)
    if y.numel() == 0 or final_state.numel() == 0:
        raise ValueError(
            f"triton selective_scan: nothing to compute for u {list(scan.u.shape)} and A {list(scan.A.shape)}."
        )
    launch = _Launch(scan)
    with on_device(scan.u):
        scan_forward[(scan.u.shape[0] * launch.blocks,)](
            *launch.inputs,
            dense(scan.initial_state),
            launch.reset_mask,
            y,
            final_state,
            tile_states if keep_states else None,
            *launch.sizes,
            *launch.strides,
            **launch.settings,
        )
    return y, final_state, tile_states


def _backward(
    scan: ScanArguments, tile_states: Tensor, grad_y: Tensor | None, grad_final_state: Tensor | None
) -> list[Tensor]:
    from .triton_scan_kernels import scan_backward

    (batch, length, channels, state), dtype = scan.sizes, compute_dtype(scan.u)
    launch = _Launch(scan)
    blocks = launch.blocks
    grad_y = None if grad_y is None else innermost_dense(grad_y)

    def empty(*shape: int) -> Tensor:
        return scan.u.new_empty(shape, dtype=dtype)

    grad_u, grad_delta = (t.new_empty(batch, length, channels) for t in (scan.u, scan.delta))
    grad_z = None if scan.z is None else scan.z.new_empty(batch, length, channels)
    # A slot for each program that adds to a gradient: rows for the parameters, blocks of channels for B and C.
    A_slots, B_slots, C_slots = empty(batch, channels, state), *(empty(blocks, batch, length, state) for _ in "BC")
    D_slots, bias_slots = (None if t is None else empty(batch, channels) for t in (scan.D, scan.delta_bias))
    grad_initial = None if scan.initial_state is None else empty(batch, channels, state)
    with on_device(scan.u):
        scan_backward[(batch * blocks,)](
            *launch.inputs,
            launch.reset_mask,
            tile_states,
            grad_y,
            dense(grad_final_state),
            grad_u,
            grad_delta,
            A_slots,
            B_slots,
            C_slots,
            D_slots,
            grad_z,
            bias_slots,
            grad_initial,
            *launch.sizes,
            *launch.strides,
            *strides(grad_y),
            **launch.settings,
        )
    slots = (A_slots, B_slots, C_slots, D_slots, bias_slots)
    grad_A, grad_B, grad_C, grad_D, grad_bias = (None if slot is None else slot.sum(0) for slot in slots)
    grads = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial)
    return present_gradients(scan.differentiable, grads)


triton_selective_scan_op = scan_operator("ehrseq::triton_selective_scan", "triton", _forward, _backward, _empty_results)


def _run(inputs: ScanInputsLike) -> tuple[Tensor, Tensor]:
    y, final_state, _ = triton_selective_scan_op(*ScanArguments.of(inputs), inputs.needs_grad)
    return y, final_state


def _why_not(inputs: ScanInputsLike) -> str | None:
    for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.dtype not in TRITON_DTYPES:
            return f"it reads float64, float32, bfloat16 and float16, {name} is {tensor.dtype}"
    if not 1 <= inputs.A.shape[1] <= TRITON_MAX_STATE:
        return f"it has state sizes from 1 to {TRITON_MAX_STATE}, A has {inputs.A.shape[1]}"
    if inputs.u.numel() == 0:
        return "u is empty"
    return why_not_triton(inputs.u.device)


# Under Triton's interpreter, which is there for tests, only when it is asked for by name.
TRITON_SCAN = KernelBackend(_run, _why_not, automatic=not interpreted())

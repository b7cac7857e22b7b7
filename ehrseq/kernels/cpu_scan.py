"""The selective scan on CPU by the compiled kernels: custom operators of torch with gradients.

`torch.ops.ehrseq.selective_scan` and its backward are registered with fake kernels, so that `torch.compile`,
`torch.export` and fake tensors know their shapes. Half precision goes in and comes out and is computed in float32;
autocast leaves the operators alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu_library
from .backend import KernelBackend
from .cpu_library import TILE_STEPS, contiguous, pointer, rows, rows_fields
from .operators import compute_dtype, fake_gradients, register_scan_autograd, scan_arguments


class _Call:
    """Arguments of one call in the form that the library reads, kept alive while it runs."""

    def __init__(
        self,
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
    ) -> None:
        dtype = compute_dtype(u)
        self.u, self.delta, self.B, self.C = rows(u), rows(delta), rows(B), rows(C)
        self.z = None if z is None else rows(z)
        self.parameters = [contiguous(t, dtype) for t in (A, D, delta_bias, initial_state)]
        self.reset_mask = reset_mask
        batch, length, channels = u.shape
        threads = cpu_library.num_threads(batch * length * channels * A.shape[1])
        self.sizes = [
            int(dtype == torch.float64),
            batch,
            length,
            channels,
            A.shape[1],
            cpu_library.splits(batch, channels, dtype, threads),
            threads,
            int(delta_softplus),
        ]

    def fields(self, y: Tensor | None, final_state: Tensor | None, tile_states: Tensor | None) -> list[int]:
        """`ScanCall` of csrc/scan.h up to the fields of the backward."""
        reset = self.reset_mask
        return [
            *self.sizes,
            *rows_fields(self.u),
            *rows_fields(self.delta),
            *rows_fields(self.z),
            *rows_fields(self.B),
            *rows_fields(self.C),
            *rows_fields(y),
            *(pointer(t) for t in self.parameters),
            pointer(reset),
            *((0, 0) if reset is None else reset.stride()),
            pointer(final_state),
            pointer(tile_states),
        ]


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, tile states) of plain CPU tensors; arguments as of the operator."""
    *tensors, keep_states = arguments
    u, A = tensors[0], tensors[2]
    batch, length, channels = u.shape
    dtype, state = compute_dtype(u), A.shape[1]
    y = torch.empty(u.shape, dtype=u.dtype)
    final_state = torch.empty(batch, channels, state, dtype=dtype)
    tiles = -(-length // TILE_STEPS) if keep_states else 0
    tile_states = torch.empty(batch, tiles, state, channels, dtype=dtype)
    call = _Call(*tensors)
    fields = [*call.fields(y, final_state, tile_states if keep_states else None), *[0] * (4 * 4 + 7)]
    cpu_library.call("ehrseq_scan_forward", fields)
    return y, final_state, tile_states


@torch.library.custom_op("ehrseq::selective_scan", mutates_args=(), device_types="cpu")
def selective_scan_op(
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
        y; the final state [batch, channels, state]; with `keep_states` the state before each tile [batch, tiles, state,
        channels], which the backward starts from, else an empty tensor.
    """
    return _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset_mask, keep_states)


@selective_scan_op.register_fake
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
        u.new_empty(batch, tiles, state, channels, dtype=dtype),
    )


@torch.library.custom_op("ehrseq::selective_scan_backward", mutates_args=(), device_types="cpu")
def selective_scan_backward_op(
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
    dtype = compute_dtype(u)
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset_mask)
    grad_y = None if grad_y is None else rows(grad_y)
    grad_final_state = contiguous(grad_final_state, dtype)
    # The gradients of whole activations are written in their dtypes, the rest is small and converted afterwards.
    grad_u, grad_delta = torch.empty(u.shape, dtype=u.dtype), torch.empty(delta.shape, dtype=delta.dtype)
    grad_z = None if z is None else torch.empty(z.shape, dtype=z.dtype)
    small = {
        name: None if t is None else torch.empty(t.shape, dtype=dtype)
        for name, t in (("A", A), ("B", B), ("C", C), ("D", D), ("bias", delta_bias), ("state", initial_state))
    }
    fields = [
        *call.fields(None, None, tile_states),
        *rows_fields(grad_y),
        *rows_fields(grad_u),
        *rows_fields(grad_delta),
        *rows_fields(grad_z),
        pointer(grad_final_state),
        *(pointer(t) for t in small.values()),
    ]
    cpu_library.call("ehrseq_scan_backward", fields)
    pairs = [
        (u, grad_u),
        (delta, grad_delta),
        (A, small["A"]),
        (B, small["B"]),
        (C, small["C"]),
        (D, small["D"]),
        (z, grad_z),
        (delta_bias, small["bias"]),
        (initial_state, small["state"]),
    ]
    return [grad.to(t.dtype) for t, grad in pairs if t is not None and grad is not None]


@selective_scan_backward_op.register_fake
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


register_scan_autograd(selective_scan_op, selective_scan_backward_op, "ehrseq::selective_scan", "cpp")


def _run(inputs: Any) -> tuple[Tensor, Tensor]:
    arguments = scan_arguments(inputs)
    # Without gradients the operator's dispatch, some 50 microseconds, would be most of a single step's time.
    if not inputs.needs_grad and cpu_library.is_plain(*arguments):
        y, final_state, _ = _forward(*arguments)
    else:
        y, final_state, _ = selective_scan_op(*arguments)
    return y, final_state


def _why_not(inputs: Any) -> str | None:
    if inputs.u.device.type != "cpu":
        return f"it runs on CPU, the tensors are on {inputs.u.device.type}"
    for name in ("u", "delta", "B", "C", "z"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.dtype not in cpu_library.DTYPE_CODES:
            return f"it reads float64, float32, bfloat16 and float16, {name} is {tensor.dtype}"
    return cpu_library.why_no_library()


SCAN_BACKEND = KernelBackend(_run, _why_not)

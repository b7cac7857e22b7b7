"""The selective scan on CPU by the compiled kernels, as a custom operator of torch (operators.py)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import cpu_library
from .backend import KernelBackend
from .cpu_library import CPP_TILE_STEPS, contiguous, pointer, rows, rows_fields
from .operators import (
    ScanArguments,
    ScanInputsLike,
    compute_dtype,
    empty_scan_results,
    present_gradients,
    scan_operator,
)

_empty_results = partial(empty_scan_results, tile_steps=CPP_TILE_STEPS, channels_innermost=True)


class _Call:
    """Arguments of one call in the form that the library reads, kept alive while it runs."""

    def __init__(self, scan: ScanArguments) -> None:
        dtype = compute_dtype(scan.u)
        batch, length, channels, state = scan.sizes
        self.inputs = [None if t is None else rows(t) for t in (scan.u, scan.delta, scan.z, scan.B, scan.C)]
        parameters = (scan.A, scan.D, scan.delta_bias, scan.initial_state)
        self.parameters = [contiguous(t, dtype) for t in parameters]
        self.reset_mask = scan.reset_mask
        threads = cpu_library.num_threads(batch * length * channels * state)
        splits = cpu_library.splits(batch, channels, dtype, threads)
        double = int(dtype == torch.float64)
        self.sizes = [double, batch, length, channels, state, splits, threads, int(scan.delta_softplus)]

    def fields(self, y: Tensor | None, final_state: Tensor | None, tile_states: Tensor | None) -> list[int]:
        """`ScanCall` of csrc/scan.h up to the fields of the backward."""
        reset = self.reset_mask
        return [
            *self.sizes,
            *(field for tensor in (*self.inputs, y) for field in rows_fields(tensor)),
            *(pointer(t) for t in self.parameters),
            pointer(reset),
            *((0, 0) if reset is None else reset.stride()),
            pointer(final_state),
            pointer(tile_states),
        ]


def _forward(scan: ScanArguments, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, state before each tile [batch, tiles, state, channels]) of plain CPU tensors."""
    y, final_state, tile_states = _empty_results(scan, keep_states)
    call = _Call(scan)
    fields = [*call.fields(y, final_state, tile_states if keep_states else None), *[0] * (4 * 4 + 7)]
    cpu_library.call("ehrseq_scan_forward", fields)
    return y, final_state, tile_states


def _backward(
    scan: ScanArguments, tile_states: Tensor, grad_y: Tensor | None, grad_final_state: Tensor | None
) -> list[Tensor]:
    dtype = compute_dtype(scan.u)
    call = _Call(scan)
    grad_y = None if grad_y is None else rows(grad_y)
    grad_final_state = contiguous(grad_final_state, dtype)
    # The gradients of whole activations are written in their dtypes, the rest is small and converted afterwards.
    u, delta, z = (None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in (scan.u, scan.delta, scan.z))
    small = (scan.A, scan.B, scan.C, scan.D, scan.delta_bias, scan.initial_state)
    A, B, C, D, bias, state = (None if t is None else torch.empty(t.shape, dtype=dtype) for t in small)
    fields = [
        *call.fields(None, None, tile_states),
        *(field for tensor in (grad_y, u, delta, z) for field in rows_fields(tensor)),
        *(pointer(t) for t in (grad_final_state, A, B, C, D, bias, state)),
    ]
    cpu_library.call("ehrseq_scan_backward", fields)
    return present_gradients(scan.differentiable, (u, delta, A, B, C, D, z, bias, state))


selective_scan_op = scan_operator("ehrseq::selective_scan", "cpp", _forward, _backward, _empty_results, device="cpu")


def _run(inputs: ScanInputsLike) -> tuple[Tensor, Tensor]:
    scan = ScanArguments.of(inputs)
    # Without gradients the operator's dispatch, some 50 microseconds, would be most of a single step's time.
    if not inputs.needs_grad and cpu_library.is_plain(*scan):
        y, final_state, _ = _forward(scan, False)
    else:
        y, final_state, _ = selective_scan_op(*scan, inputs.needs_grad)
    return y, final_state


def _why_not(inputs: ScanInputsLike) -> str | None:
    if inputs.u.device.type != "cpu":
        return f"it runs on CPU, the tensors are on {inputs.u.device.type}"
    for name in ("u", "delta", "B", "C", "z"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.dtype not in cpu_library.DTYPE_CODES:
            return f"it reads float64, float32, bfloat16 and float16, {name} is {tensor.dtype}"
    return cpu_library.why_no_library()


CPP_SCAN = KernelBackend(_run, _why_not)

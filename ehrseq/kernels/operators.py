"""What the custom operators of every accelerator share: shapes for fake tensors, and the wiring of autograd.

The operators of the C++ and of the Triton kernels have the same arguments and results, in the same order; only the
kernels behind them differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def scan_arguments(inputs: Any) -> tuple[Any, ...]:
    """The arguments of a scan operator from the checked inputs of a call; states are kept for a backward."""
    return (
        inputs.u,
        inputs.delta,
        inputs.A,
        inputs.B,
        inputs.C,
        inputs.D,
        inputs.z,
        inputs.delta_bias,
        inputs.delta_softplus,
        inputs.initial_state,
        inputs.reset_mask,
        inputs.needs_grad,
    )


def fake_gradients(*tensors: Tensor | None) -> list[Tensor]:
    """Gradients as a backward operator returns them: of the tensors that are there, in their shapes and dtypes."""
    return [t.new_empty(t.shape) for t in tensors if t is not None]


def register_scan_autograd(
    operator: Any, backward_operator: Callable[..., list[Tensor]], name: str, backend: str
) -> None:
    """Connect a scan operator with its backward.

    Args:
        operator: (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset_mask, keep_states) -> (y,
            final state, tile states).
        backward_operator: (the first eleven, tile states, gradients of y and of the final state) -> gradients of the
            tensors that are there.
        name: Name of the operator, for messages.
        backend: Name of the backend, for messages.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, delta_softplus, initial_state, reset_mask, keep_states = inputs
        ctx.save_for_backward(*tensors, initial_state, reset_mask, output[2])
        ctx.delta_softplus, ctx.keep_states = delta_softplus, keep_states
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        _refuse_second_derivative(backend, "selective_scan")
        if not ctx.keep_states:
            raise RuntimeError(f"{name} was called with keep_states=False: there is nothing to go back from.")
        *tensors, initial_state, reset_mask, tile_states = ctx.saved_tensors
        grads = iter(
            backward_operator(
                *tensors, ctx.delta_softplus, initial_state, reset_mask, tile_states, grad_y, grad_final_state
            )
        )
        by_input = [None if t is None else next(grads) for t in (*tensors, initial_state)]
        return (*by_input[:8], None, by_input[8], None, None)

    operator.register_autograd(backward, setup_context=setup_context)


def register_conv_autograd(operator: Any, backward_operator: Callable[..., list[Tensor]], backend: str) -> None:
    """Connect a convolution operator with its backward.

    Args:
        operator: (x, weight, bias, initial_state, reset_mask, silu) -> output.
        backward_operator: (the same, gradient of the output) -> gradients of the first four that are there.
        backend: Its name, for messages.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, silu = inputs
        ctx.save_for_backward(*tensors)
        ctx.silu = silu

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative(backend, "causal_conv1d")
        tensors = ctx.saved_tensors
        grads = iter(backward_operator(*tensors, ctx.silu, grad))
        return (*(None if t is None else next(grads) for t in tensors[:4]), None, None)

    operator.register_autograd(backward, setup_context=setup_context)


def _refuse_second_derivative(backend: str, function: str) -> None:
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            f"The {backend} backend of {function} has no second derivative: use backward without create_graph=True, "
            f"or {function} with backend='naive'."
        )

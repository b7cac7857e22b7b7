"""The custom operators of torch behind every accelerator: signatures, shapes for fake tensors, and autograd.

The operators of the C++ and of the Triton kernels have the same arguments and results, in the same order; only the
kernels behind them differ. A backend hands its kernels to `scan_operator` and `conv_operator`; the operators that these
make are known to `torch.compile`, `torch.export` and fake tensors. Half precision goes in and comes out, and autocast
leaves them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


class ScanInputsLike(Protocol):
    """`ScanInputs` of ehrseq/modeling/selective_scan.py, or of a checkpoint's own copy of it."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    initial_state: Tensor | None
    reset_mask: Tensor | None
    needs_grad: bool


class ConvInputsLike(Protocol):
    """`ConvInputs` of ehrseq/modeling/causal_conv.py, or of a checkpoint's own copy of it."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    reset_mask: Tensor | None
    activation: str | None
    needs_grad: bool


class ScanArguments(NamedTuple):
    """The arguments of a scan operator; shapes as in `ehrseq.modeling.selective_scan.selective_scan`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    initial_state: Tensor | None
    reset_mask: Tensor | None

    @classmethod
    def of(cls, inputs: ScanInputsLike) -> ScanArguments:
        """Those of the checked inputs of a call."""
        return cls._make(getattr(inputs, name) for name in cls._fields)

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What a backward returns gradients of."""
        return (*self[:8], self.initial_state)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(batch, length, channels, state)."""
        return (*self.u.shape, self.A.shape[1])


class ConvArguments(NamedTuple):
    """The arguments of a convolution operator; shapes as in `ehrseq.modeling.causal_conv.causal_conv1d`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    reset_mask: Tensor | None
    silu: bool

    @classmethod
    def of(cls, inputs: ConvInputsLike) -> ConvArguments:
        """Those of the checked inputs of a call."""
        return cls._make([*(getattr(inputs, name) for name in cls._fields[:-1]), inputs.activation == "silu"])

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What a backward returns gradients of."""
        return self[:4]


ScanResults = tuple[Tensor, Tensor, Tensor]
ScanForward = Callable[[ScanArguments, bool], ScanResults]
ScanBackward = Callable[[ScanArguments, Tensor, Tensor | None, Tensor | None], list[Tensor]]

_SCAN = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? initial_state, Tensor? reset_mask"
)
_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? reset_mask, bool silu"


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def empty_scan_results(
    scan: ScanArguments, keep_states: bool, tile_steps: int, channels_innermost: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for the results of a scan: y, the final state, and with `keep_states` the state before each tile."""
    batch, length, channels, state = scan.sizes
    dtype = compute_dtype(scan.u)
    tiles = (length + tile_steps - 1) // tile_steps if keep_states else 0
    innermost = (state, channels) if channels_innermost else (channels, state)
    return (
        scan.u.new_empty(scan.u.shape),
        scan.u.new_empty(batch, channels, state, dtype=dtype),
        scan.u.new_empty(batch, tiles, *innermost, dtype=dtype),
    )


def scan_operator(
    name: str,
    backend: str,
    forward: ScanForward,
    backward: ScanBackward,
    empty_results: ScanForward,
    device: str | None = None,
) -> CustomOpDef:
    """Make a scan operator with its gradients.

    Args:
        name: Its name, `namespace::name`.
        backend: Name of the backend, for messages.
        forward: (arguments, whether a backward will follow) -> y; the final state [batch, channels, state]; and where a
            backward follows what it starts from, else an empty tensor.
        backward: (arguments, what the forward kept, gradients of y and of the final state) -> gradients of the tensors
            that are there, in the order of `ScanArguments.differentiable` and in their dtypes.
        empty_results: The results of `forward` with no values.
        device: Type of device that the kernels run on, any by default.
    """
    options: dict[str, Any] = {"mutates_args": (), "device_types": device}
    results = "(Tensor, Tensor, Tensor)"
    operator = torch.library.custom_op(
        name,
        lambda *values: forward(ScanArguments(*values[:-1]), values[-1]),
        schema=f"({_SCAN}, bool keep_states) -> {results}",
        **options,
    )
    operator.register_fake(lambda *values: empty_results(ScanArguments(*values[:-1]), values[-1]))
    gradients = torch.library.custom_op(
        f"{name}_backward",
        lambda *values: backward(ScanArguments(*values[:11]), *values[11:]),
        schema=f"({_SCAN}, Tensor tile_states, Tensor? grad_y, Tensor? grad_final_state) -> Tensor[]",
        **options,
    )
    gradients.register_fake(lambda *values: _empty_gradients(ScanArguments(*values[:11]).differentiable))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: ScanResults) -> None:
        scan, ctx.keep_states = ScanArguments(*inputs[:-1]), inputs[-1]
        ctx.save_for_backward(*scan.differentiable, scan.reset_mask, output[2])
        ctx.delta_softplus = scan.delta_softplus
        ctx.set_materialize_grads(False)

    def run_backward(
        ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None, _: Tensor | None
    ) -> tuple[Any, ...]:
        _refuse_second_derivative(backend, "selective_scan")
        if not ctx.keep_states:
            raise RuntimeError(f"{name} was called with keep_states=False: there is nothing to go back from.")
        *tensors, initial_state, reset_mask, tile_states = ctx.saved_tensors
        scan = ScanArguments._make([*tensors, ctx.delta_softplus, initial_state, reset_mask])
        grads = _by_input(scan.differentiable, gradients(*scan, tile_states, grad_y, grad_final_state))
        return (*grads[:8], None, grads[8], None, None)

    operator.register_autograd(run_backward, setup_context=setup_context)
    return operator


def conv_operator(
    name: str,
    backend: str,
    forward: Callable[[ConvArguments], Tensor],
    backward: Callable[[ConvArguments, Tensor], list[Tensor]],
    device: str | None = None,
) -> CustomOpDef:
    """Make a convolution operator with its gradients.

    Args:
        name: Its name, `namespace::name`.
        backend: Name of the backend, for messages.
        forward: Arguments -> output [batch, length, channels].
        backward: (arguments, gradient of the output) -> gradients of the tensors that are there, in the order of
            `ConvArguments.differentiable` and in their dtypes.
        device: Type of device that the kernels run on, any by default.
    """
    options: dict[str, Any] = {"mutates_args": (), "device_types": device}
    operator = torch.library.custom_op(
        name, lambda *values: forward(ConvArguments(*values)), schema=f"({_CONV}) -> Tensor", **options
    )
    operator.register_fake(lambda x, *_: x.new_empty(x.shape))
    gradients = torch.library.custom_op(
        f"{name}_backward",
        lambda *values: backward(ConvArguments(*values[:-1]), values[-1]),
        schema=f"({_CONV}, Tensor grad) -> Tensor[]",
        **options,
    )
    gradients.register_fake(lambda *values: _empty_gradients(values[:4]))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    def run_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative(backend, "causal_conv1d")
        conv = ConvArguments._make([*ctx.saved_tensors, ctx.silu])
        return (*_by_input(conv.differentiable, gradients(*conv, grad)), None, None)

    operator.register_autograd(run_backward, setup_context=setup_context)
    return operator


def present_gradients(inputs: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Gradients as a backward operator returns them: of the inputs that are there, in their dtypes."""
    pairs = zip(inputs, grads, strict=True)
    return [grad.to(tensor.dtype) for tensor, grad in pairs if tensor is not None and grad is not None]


def _empty_gradients(inputs: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None]


def _by_input(inputs: tuple[Tensor | None, ...], grads: list[Tensor]) -> list[Tensor | None]:
    """The gradient of each input, None for those that are not there."""
    present = iter(grads)
    return [None if tensor is None else next(present) for tensor in inputs]


def _refuse_second_derivative(backend: str, function: str) -> None:
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            f"The {backend} backend of {function} has no second derivative: use backward without create_graph=True, "
            f"or {function} with backend='naive'."
        )

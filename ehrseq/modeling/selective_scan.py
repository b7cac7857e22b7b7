"""The selective state-space scan of Mamba (Gu & Dao 2023, arXiv:2312.00752, algorithm 2), linear in length and differentiable.

    delta_t = softplus(delta_t + delta_bias)                      # when delta_softplus
    h_t     = exp(delta_t * A) * h_{t-1} + (delta_t * u_t) B_t    # h is zeroed before a step where reset_mask is set
    y_t     = (C_t . h_t + D * u_t) * silu(z_t)

One operator, several interchangeable backends that give the same result, gradients included:

- `torch`: tiles of 16 steps, a hand-written backward that recomputes the states from one checkpoint a tile. Needs nothing but torch.
- `naive`: `selective_scan_naive`, the formula above as a loop over the steps. It is the truth the tests compare with, never chosen by itself.

Accelerators join the table with `register_scan_backend`.

Glossary: b batch, l length (steps), d channels, n state size, c steps of a tile. Inside a tile the layout is [b, c, n, d], so that the
innermost loop of every operation runs over contiguous channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Steps that share one exponential call and one stored state: 16 keeps a tile of a 768-wide block (1.5 MB) within a core's cache and the
# stored states as large as one activation when n = 16.
TILE_STEPS = 16


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    reset_mask: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan over the length, by the fastest backend that can serve these tensors.

    Computes in float64 when `u` is float64 and in float32 otherwise; every input may be any floating dtype. Safe under autocast.
    Continuing a returned final state over any number of further steps equals the whole pass.

    Padding: a step with delta 0 *after* the softplus holds the state exactly (exp(0) = 1, nothing is added). With `delta_softplus`, give pad
    steps `delta = -inf` (`delta.masked_fill(~mask[..., None], float("-inf"))`), whose softplus and gradient are exactly 0; `u` must be finite
    there. The final state of a right-padded row is then the state at its last real step. The output at a pad step is meaningless.

    Args:
        u: Input, [batch, length, channels], length at least 1.
        delta: Step sizes, [batch, length, channels].
        A: Decay rates, [channels, state]; negative for a stable recurrence.
        B: Input projection, [batch, length, state].
        C: Output projection, [batch, length, state].
        D: Skip weight, [channels].
        z: Gate; the output is multiplied by silu(z). [batch, length, channels].
        delta_bias: Added to delta before the softplus, [channels].
        delta_softplus: Pass delta through softplus.
        initial_state: State before the first step, [batch, channels, state]; zeros when None.
        reset_mask: bool [batch, length]; True zeroes the state before that step (at step 0 it overrides `initial_state`).
        return_final_state: Also return the state after the last step.
        backend: Name of a registered backend; None picks the first of the table that serves this call.

    Returns:
        y in the dtype of `u`, [batch, length, channels]; with `return_final_state` the pair (y, final_state), the state [batch, channels,
        state] in the dtype of the computation (float32 or float64), so that a cached continuation loses nothing.

    Raises:
        ValueError: a wrong shape, dtype or device; length 0; an unknown backend; a forced backend that cannot serve this call.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset_mask)
    _check_inputs(inputs)
    y, final_state = _choose_backend(backend, inputs).run(inputs)
    return (y, final_state) if return_final_state else y


def selective_scan_naive(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    reset_mask: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan as written on paper, one step at a time, differentiated by autograd: slow, and the truth for every backend.

    Arguments and returns as in `selective_scan`.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset_mask)
    _check_inputs(inputs)
    y, final_state = _run_naive(inputs)
    return (y, final_state) if return_final_state else y


# ---------------------------------------------------------------------------------------------------------------------------------------
# Inputs and the table of backends
# ---------------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ScanInputs:
    """The checked arguments of one call, as a backend receives them (shapes as in `selective_scan`)."""

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

    @property
    def needs_grad(self) -> bool:
        """Whether autograd will ask for a backward of this call."""
        return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in vars(self).values())

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 for everything narrower."""
        return torch.float64 if self.u.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class ScanBackend:
    """One implementation of the scan.

    Attributes:
        run: `ScanInputs` -> (y [batch, length, channels] in u's dtype, final_state [batch, channels, state] in the compute dtype).
        why_not: `ScanInputs` -> None when this backend serves the call with its gradients, else the reason why it does not.
        automatic: Whether `backend=None` may pick it.
    """

    run: Callable[[ScanInputs], tuple[Tensor, Tensor]]
    why_not: Callable[[ScanInputs], str | None] = lambda inputs: None
    automatic: bool = True


_BACKENDS: dict[str, ScanBackend] = {}  # fastest first: the order in which `backend=None` tries them


def register_scan_backend(name: str, backend: ScanBackend) -> None:
    """Put a backend in front of the table, so that `backend=None` tries it first; a backend of the same name is replaced."""
    others = {key: value for key, value in _BACKENDS.items() if key != name}
    _BACKENDS.clear()
    _BACKENDS.update({name: backend, **others})


def scan_backends() -> list[str]:
    """Names of the registered backends, fastest first."""
    return list(_BACKENDS)


def _choose_backend(name: str | None, inputs: ScanInputs) -> ScanBackend:
    if name is None:
        return next(entry for entry in _BACKENDS.values() if entry.automatic and entry.why_not(inputs) is None)
    if name not in _BACKENDS:
        raise ValueError(f"Unknown scan backend {name!r}: expected one of {scan_backends()}, or None for the fastest.")
    reason = _BACKENDS[name].why_not(inputs)
    if reason is not None:
        raise ValueError(f"Scan backend {name!r} cannot serve this call: {reason}. Use backend=None to let one that can be chosen.")
    return _BACKENDS[name]


def _check_inputs(inputs: ScanInputs) -> None:
    """Raise a ValueError that names the argument, what it is, and what it should be."""
    u, A = inputs.u, inputs.A
    for name, tensor, layout in (("u", u, "[batch, length, channels]"), ("A", A, "[channels, state]")):
        if not isinstance(tensor, Tensor) or tensor.dim() != layout.count(",") + 1:
            raise ValueError(f"selective_scan: {name} is {_describe(tensor)}, expected a tensor {layout}.")
    batch, length, channels = u.shape
    state = A.shape[1]
    if length == 0:
        raise ValueError(f"selective_scan: u has length 0 (shape {list(u.shape)}), expected at least one step; leave empty sequences out.")
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "u": ("[batch, length, channels]", (batch, length, channels)),
        "delta": ("[batch, length, channels] as u", (batch, length, channels)),
        "A": ("[channels, state]", (channels, state)),
        "B": ("[batch, length, state]", (batch, length, state)),
        "C": ("[batch, length, state]", (batch, length, state)),
        "D": ("[channels]", (channels,)),
        "z": ("[batch, length, channels] as u", (batch, length, channels)),
        "delta_bias": ("[channels]", (channels,)),
        "initial_state": ("[batch, channels, state]", (batch, channels, state)),
        "reset_mask": ("[batch, length]", (batch, length)),
    }
    for name, (layout, shape) in expected.items():
        tensor = getattr(inputs, name)
        if tensor is None and name in ("D", "z", "delta_bias", "initial_state", "reset_mask"):
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            raise ValueError(f"selective_scan: {name} is {_describe(tensor)}, expected {layout} = {list(shape)}.")
        if name == "reset_mask":
            if tensor.dtype != torch.bool:
                raise ValueError(f"selective_scan: reset_mask is {tensor.dtype}, expected torch.bool; convert it with `.bool()`.")
        elif not tensor.is_floating_point():
            raise ValueError(f"selective_scan: {name} is {tensor.dtype}, expected a floating dtype; convert it with `.float()`.")
        if tensor.device != u.device:
            raise ValueError(f"selective_scan: {name} is on {tensor.device} and u on {u.device}; move them to one device.")


def _describe(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"


# ---------------------------------------------------------------------------------------------------------------------------------------
# naive
# ---------------------------------------------------------------------------------------------------------------------------------------
def _run_naive(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    dtype = inputs.compute_dtype
    # 1. Discretisation: step sizes are positive.
    delta = inputs.delta.to(dtype)
    if inputs.delta_bias is not None:
        delta = delta + inputs.delta_bias.to(dtype)
    if inputs.delta_softplus:
        delta = F.softplus(delta)
    u, A, B, C = (t.to(dtype) for t in (inputs.u, inputs.A, inputs.B, inputs.C))
    batch, length, channels = u.shape
    h = u.new_zeros(batch, channels, A.shape[1]) if inputs.initial_state is None else inputs.initial_state.to(dtype)
    # 2. Recurrence.
    outputs = []
    for t in range(length):
        if inputs.reset_mask is not None:
            h = h.masked_fill(inputs.reset_mask[:, t, None, None], 0.0)
        decay = torch.exp(delta[:, t, :, None] * A)  # [b, d, n]
        h = decay * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]  # [b, d, n]
        outputs.append((h * C[:, t, None, :]).sum(-1))  # [b, d]
    y = torch.stack(outputs, 1)  # [b, l, d]
    # 3. Skip and gate.
    if inputs.D is not None:
        y = y + inputs.D.to(dtype) * u
    if inputs.z is not None:
        y = y * F.silu(inputs.z.to(dtype))
    return y.to(inputs.u.dtype), h


# ---------------------------------------------------------------------------------------------------------------------------------------
# torch
# ---------------------------------------------------------------------------------------------------------------------------------------
def _run_torch(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    if inputs.u.shape[1] == 1:  # one cached step: no tiles, no custom backward, the formula itself is the fastest
        return _run_naive(inputs)
    arguments = tuple(vars(inputs).values())
    if inputs.needs_grad:
        y, final_state = _TiledScan.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        y, final_state, _ = _tiled_forward(inputs, keep_states=False)
    return y, final_state


class _TiledScan(torch.autograd.Function):
    """Saves the inputs and one state a tile; the backward recomputes the rest, tile by tile, from the last to the first."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs = ScanInputs(*arguments)
        y, final_state, tile_states = _tiled_forward(inputs, keep_states=True)
        ctx.delta_softplus = inputs.delta_softplus
        ctx.save_for_backward(*(t for t in arguments if not isinstance(t, bool)), tile_states)
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, grad_final_state = grads
        *tensors, tile_states = ctx.saved_tensors
        inputs = ScanInputs(*tensors[:8], ctx.delta_softplus, *tensors[8:])
        gradients = _tiled_backward(inputs, tile_states, grad_y, grad_final_state)
        return tuple(
            gradients[name].to(value.dtype) if name in gradients and isinstance(value, Tensor) else None
            for name, value in vars(inputs).items()
        )


def _step_sizes(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """(delta before the softplus, delta after it), in the compute dtype, [b, l, d]."""
    before = inputs.delta.to(inputs.compute_dtype)
    if inputs.delta_bias is not None:
        before = before + inputs.delta_bias.to(before.dtype)
    return before, F.softplus(before) if inputs.delta_softplus else before


def _resets_of_tile(reset_mask: Tensor | None, has_reset: list[bool], start: int, stop: int) -> Tensor | None:
    """The reset mask of a tile, [b, c], or None when no row resets there."""
    return reset_mask[:, start:stop] if reset_mask is not None and any(has_reset[start:stop]) else None


def _decays(delta: Tensor, A_t: Tensor, resets: Tensor | None, out: Tensor) -> Tensor:
    """exp(delta A) of one tile, 0 where the state is reset: delta [b, c, d], A_t [n, d] -> [b, c, n, d]."""
    torch.mul(delta[:, :, None], A_t, out=out).exp_()
    return out if resets is None else out.masked_fill_(resets[:, :, None, None], 0.0)


def _states_in_place(decays: Tensor, states: Tensor, h: Tensor, resets: Tensor | None) -> None:
    """Turn the inputs of a tile's steps into its states: `states` [b, c, n, d] holds delta u B, `h` [b, n, d] is the state before it."""
    for j, (decay, state) in enumerate(zip(decays.unbind(1), states.unbind(1), strict=True)):
        if resets is not None:
            h = h.masked_fill(resets[:, j, None, None], 0.0)  # the decay is 0 there too, but 0 * NaN of a broken neighbour is NaN
        state.addcmul_(decay, h)
        h = state


def _tiled_forward(inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y [b, l, d], final state [b, d, n], states before each tile [tiles, b, n, d] or, without `keep_states`, the last one)."""
    dtype = inputs.compute_dtype
    with torch.no_grad(), torch.autocast(inputs.u.device.type, enabled=False):
        u, B, C = (t.to(dtype) for t in (inputs.u, inputs.B, inputs.C))
        A_t = inputs.A.to(dtype).t().contiguous()  # [n, d]
        delta = _step_sizes(inputs)[1]
        batch, length, channels = u.shape
        n = A_t.shape[0]
        has_reset = [] if inputs.reset_mask is None else inputs.reset_mask.any(0).tolist()

        tile_starts = range(0, length, TILE_STEPS)
        tile_states = u.new_empty(len(tile_starts) if keep_states else 1, batch, n, channels)
        h = u.new_zeros(batch, n, channels) if inputs.initial_state is None else inputs.initial_state.to(dtype).transpose(1, 2)
        delta_u = delta * u
        y = torch.empty_like(delta_u)
        c = min(TILE_STEPS, length)
        decay_buffer, state_buffer = u.new_empty(batch, c, n, channels), u.new_empty(batch, c, n, channels)
        for i, start in enumerate(tile_starts):
            stop = min(start + c, length)
            resets = _resets_of_tile(inputs.reset_mask, has_reset, start, stop)
            before = tile_states[i if keep_states else 0].copy_(h)
            decays = _decays(delta[:, start:stop], A_t, resets, out=decay_buffer[:, : stop - start])
            states = torch.mul(delta_u[:, start:stop, None], B[:, start:stop, :, None], out=state_buffer[:, : stop - start])
            _states_in_place(decays, states, before, resets)
            y[:, start:stop] = torch.matmul(C[:, start:stop, None], states).squeeze(2)
            h = states[:, -1]
        final_state = h.transpose(1, 2).contiguous()  # [b, d, n]

        if inputs.D is not None:
            y.addcmul_(u, inputs.D.to(dtype))
        if inputs.z is not None:
            y.mul_(F.silu(inputs.z.to(dtype)))
    return y.to(inputs.u.dtype), final_state, tile_states


def _tiled_backward(
    inputs: ScanInputs, tile_states: Tensor, grad_y: Tensor | None, grad_final_state: Tensor | None
) -> dict[str, Tensor]:
    """Gradients of every tensor input by name, in the compute dtype; cost linear in length, memory of a few tiles and activations.

    With H_t the state and Q_t = dL/dH_t = g_t C_t + exp(delta_{t+1} A) Q_{t+1} (g: gradient of the ungated output):
    dC_t = g_t . H_t, dB_t = Q_t . (delta_t u_t), d(delta_t u_t) = Q_t . B_t, d(delta_t A) = Q_t exp(delta_t A) H_{t-1}.
    """
    dtype = inputs.compute_dtype
    with torch.no_grad(), torch.autocast(inputs.u.device.type, enabled=False):
        u, B, C = (t.to(dtype) for t in (inputs.u, inputs.B, inputs.C))
        A_t = inputs.A.to(dtype).t().contiguous()  # [n, d]
        delta_before, delta = _step_sizes(inputs)
        batch, length, channels = u.shape
        n = A_t.shape[0]
        has_reset = [] if inputs.reset_mask is None else inputs.reset_mask.any(0).tolist()
        z = None if inputs.z is None else inputs.z.to(dtype)
        grads: dict[str, Tensor] = {}

        # 1. Gate: what reaches the ungated output.
        grad_out = torch.zeros_like(u) if grad_y is None else grad_y.to(dtype)
        g = grad_out if z is None else grad_out * F.silu(z)  # [b, l, d]
        y = torch.empty_like(delta) if z is not None else None  # ungated output, recomputed for the gradient of z

        # 2. Recurrence, from the last tile to the first.
        delta_u = delta * u
        grad_delta_u, grad_delta = torch.empty_like(delta), torch.empty_like(delta)
        grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
        grad_A = u.new_zeros(batch, n, channels)
        grad_h = u.new_zeros(batch, n, channels)  # gradient of the state after the tile at hand, from all that follows
        if grad_final_state is not None:
            grad_h.copy_(grad_final_state.transpose(1, 2))
        c = min(TILE_STEPS, length)
        decay_buffer, grad_buffer = u.new_empty(batch, c, n, channels), u.new_empty(batch, c, n, channels)
        state_buffer = u.new_empty(batch, c + 1, n, channels)
        for i in reversed(range(tile_states.shape[0])):
            start, stop = i * TILE_STEPS, min((i + 1) * TILE_STEPS, length)
            tile = slice(start, stop)
            resets = _resets_of_tile(inputs.reset_mask, has_reset, start, stop)
            # 2a. The tile's decays and states again.
            decays = _decays(delta[:, tile], A_t, resets, out=decay_buffer[:, : stop - start])
            states = state_buffer[:, : stop - start + 1]  # the state before the tile, then one a step
            states[:, 0] = tile_states[i]
            torch.mul(delta_u[:, tile, None], B[:, tile, :, None], out=states[:, 1:])
            _states_in_place(decays, states[:, 1:], tile_states[i], resets)
            if y is not None:
                y[:, tile] = torch.matmul(C[:, tile, None], states[:, 1:]).squeeze(2)
            grad_C[:, tile] = torch.matmul(states[:, 1:], g[:, tile, :, None]).squeeze(3)
            # 2b. Gradients of the states, backwards.
            q = torch.mul(g[:, tile, None], C[:, tile, :, None], out=grad_buffer[:, : stop - start])
            q[:, -1] += grad_h
            q_steps, decay_steps = q.unbind(1), decays.unbind(1)
            for j in reversed(range(stop - start - 1)):
                q_steps[j].addcmul_(decay_steps[j + 1], q_steps[j + 1])
            torch.mul(decay_steps[0], q_steps[0], out=grad_h)
            # 2c. What the states were made of.
            grad_B[:, tile] = torch.matmul(q, delta_u[:, tile, :, None]).squeeze(3)
            grad_delta_u[:, tile] = torch.matmul(B[:, tile, None], q).squeeze(2)
            grad_exponent = q.mul_(decays).mul_(states[:, :-1])  # gradient of delta A
            grad_delta[:, tile] = (grad_exponent * A_t).sum(2)
            grad_A += (grad_exponent * delta[:, tile, None]).sum(1)
        grads |= {"A": grad_A.sum(0).t(), "B": grad_B, "C": grad_C, "initial_state": grad_h.transpose(1, 2)}

        # 3. Skip, gate, discretisation.
        grad_u = grad_delta_u * delta
        grad_delta.addcmul_(grad_delta_u, u)
        if inputs.D is not None:
            grads["D"] = (g * u).sum((0, 1))
            grad_u.addcmul_(g, inputs.D.to(dtype))
        if z is not None and y is not None:
            if inputs.D is not None:
                y.addcmul_(u, inputs.D.to(dtype))
            grads["z"] = torch.ops.aten.silu_backward(y.mul_(grad_out), z)
        if inputs.delta_softplus:
            grad_delta = torch.ops.aten.softplus_backward(grad_delta, delta_before, 1, 20)  # F.softplus's own defaults
        if inputs.delta_bias is not None:
            grads["delta_bias"] = grad_delta.sum((0, 1))
        grads |= {"u": grad_u, "delta": grad_delta}
    return grads


register_scan_backend("naive", ScanBackend(_run_naive, automatic=False))
register_scan_backend("torch", ScanBackend(_run_torch))

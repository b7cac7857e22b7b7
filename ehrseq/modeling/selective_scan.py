"""The selective state-space scan of Mamba: linear in length, differentiable, with a carried state and resets.

    delta_t = softplus(delta_t + delta_bias)                      # when delta_softplus
    h_t     = exp(delta_t * A) * h_{t-1} + (delta_t * u_t) B_t    # h is zeroed before a step where reset_mask is set
    y_t     = (C_t . h_t + D * u_t) * silu(z_t)

(Gu & Dao 2023, arXiv:2312.00752, algorithm 2.) One operator, several interchangeable backends with equal results,
gradients included:

- `torch`: tiles of 8 steps, and a hand-written backward that computes the states again from one stored state a tile.
- `naive`: the formula above as a loop over the steps, differentiated by autograd. Only used when it is asked for.
- `cuda`, `triton`, `cpp`: compiled kernels of `ehrseq.kernels`, where the package is installed.

kernel_backends.py has the choice between them.

Glossary: b batch, l length (steps), d channels, n state size, c steps of a tile. Inside a tile the layout is
[c, b, n, d]: a step is one contiguous block, and the innermost loop of every operation runs over the channels.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .kernel_backends import (
    BackendTable,
    OperatorBackend,
    any_needs_grad,
    check_dimensions,
    check_tensor,
    compute_dtype_of,
)

try:  # absent where a checkpoint brings this file along as remote code
    from ehrseq.kernels import scan_backends as _accelerators
except ImportError:
    _accelerators = dict

logger = logging.get_logger(__name__)

# Steps that share one call of the exponential and one stored state. At 8 a tile of a 768-wide block (0.8 MB) fits a
# core's cache, and with n = 16 the stored states are as large as two activations. A longer tile is no faster and rounds
# more often in a row.
TORCH_TILE_STEPS = 8
_LOG2_E = 1.0 / math.log(2.0)


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

    Computes in float64 when `u` is float64, else in float32; inputs may be of any floating dtype. Safe under autocast.
    Continuing a returned final state over any number of further steps equals the whole pass.

    Padding: a step whose delta is 0 *after* the softplus holds the state exactly (exp(0) = 1, and nothing is added).
    With `delta_softplus` give pad steps `delta = -inf` (`delta.masked_fill(~mask[..., None], float("-inf"))`): their
    softplus and their gradient are exactly 0. `u`, `B` and `C` must be finite there. The final state of a right-padded
    row is then the state at its last real step. The output at a pad step means nothing.

    Args:
        u: Input, [batch, length, channels], length at least 1.
        delta: Step sizes, [batch, length, channels].
        A: Decay rates, [channels, state]; negative for a stable recurrence.
        B: Input projection, [batch, length, state].
        C: Output projection, [batch, length, state].
        D: Skip weight, [channels].
        z: Gate: the output is multiplied by silu(z), [batch, length, channels].
        delta_bias: Added to delta before the softplus, [channels].
        delta_softplus: Whether delta passes through the softplus.
        initial_state: State before the first step, [batch, channels, state]; zeros when None.
        reset_mask: bool [batch, length]; True zeroes the state before that step (at step 0 it overrides
            `initial_state`).
        return_final_state: Also return the state after the last step.
        backend: Name of a registered backend; None takes the one of the environment variable EHRSEQ_BACKEND, and where
            that is not set the first of the table that serves this call.

    Returns:
        y in the dtype of `u`, [batch, length, channels]; with `return_final_state` the pair (y, final_state), the state
        [batch, channels, state] in the dtype of the computation, so that a cached continuation loses nothing.

    Raises:
        ValueError: a wrong shape, dtype or device; length 0; an unknown backend, or one that cannot serve the call.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset_mask)
    _check_inputs(inputs)
    y, final_state = SCAN_BACKENDS.choose(backend, inputs).run(inputs)
    return (y, final_state) if return_final_state else y


# The scan as written on paper, a step at a time, differentiated by autograd: slow, the truth for every backend.
selective_scan_naive = partial(selective_scan, backend="naive")


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and the table of backends
# ---------------------------------------------------------------------------------------------------------------------
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
        return any_needs_grad(vars(self).values())

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 for everything narrower."""
        return compute_dtype_of(self.u)


_announced: set[str] = set()


def _announce(name: str, inputs: ScanInputs) -> None:
    """Say once which backend is at work; that nothing faster than torch is there is worth a warning."""
    if name in _announced:
        return
    _announced.add(name)
    logger.info(f"Selective scan: backend {name!r}.")
    if name == "torch" and inputs.u.device.type != "meta":
        reasons = [
            f"{key}: {entry.why_not(inputs)}"
            for key, entry in SCAN_BACKENDS.entries.items()
            if key not in ("torch", "naive")
        ]
        logger.warning(
            "Selective scan: only the torch fallback serves this call; it is exact but several times slower "
            f"({'; '.join(reasons) or 'the package ehrseq, which brings the kernels, is not installed'}). "
            "`ehrseq doctor` shows what is missing."
        )


# Outputs are y [batch, length, channels] in the dtype of u, and the final state [batch, channels, state] in the compute
# dtype.
SCAN_BACKENDS: BackendTable[ScanInputs, tuple[Tensor, Tensor]] = BackendTable("scan", _announce)


def _check_inputs(inputs: ScanInputs) -> None:
    """Raise a ValueError that names the argument, what it is, and what it should be."""
    u, A = inputs.u, inputs.A
    check_dimensions("selective_scan", "u", u, "[batch, length, channels]")
    check_dimensions("selective_scan", "A", A, "[channels, state]")
    if not isinstance(inputs.delta_softplus, bool):
        raise ValueError(f"selective_scan: delta_softplus is {inputs.delta_softplus!r}, expected True or False.")
    batch, length, channels = u.shape
    state = A.shape[1]
    if length == 0:
        raise ValueError(f"selective_scan: u has length 0 ({list(u.shape)}), expected at least one step.")
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
        if tensor is not None or name not in ("D", "z", "delta_bias", "initial_state", "reset_mask"):
            check_tensor("selective_scan", name, tensor, layout, shape, ("u", u))


# ---------------------------------------------------------------------------------------------------------------------
# naive
# ---------------------------------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------------------------------
# torch
# ---------------------------------------------------------------------------------------------------------------------
def _run_torch(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    if inputs.u.shape[1] == 1:
        return _run_naive(inputs) if inputs.needs_grad else _one_step(inputs)
    arguments = tuple(vars(inputs).values())
    if inputs.needs_grad:
        y, final_state = _TiledScan.apply(*arguments)
    else:
        y, final_state, _ = _tiled_forward(inputs, keep_states=False)
    return y, final_state


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Nothing is cast inside; the meta device has no autocast to switch off."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _one_step(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """A cached step without gradients: everything happens in the one tensor that becomes the new state."""
    dtype = inputs.compute_dtype
    with torch.no_grad(), _without_autocast(inputs.u.device.type):
        u, B, C = (t[:, 0].to(dtype) for t in (inputs.u, inputs.B, inputs.C))  # [b, d], [b, n], [b, n]
        delta = _step_sizes(inputs)[1][:, 0]
        h = torch.mul(delta[..., None], inputs.A.to(dtype)).exp_()  # [b, d, n], the decay so far
        if inputs.initial_state is None:
            h.zero_()
        else:
            before = inputs.initial_state.to(dtype)
            resets = inputs.reset_mask
            h.mul_(before if resets is None else before.masked_fill(resets[..., None], 0.0))
        h.addcmul_((delta * u)[..., None], B[:, None])
        y = torch.matmul(h, C[..., None]).squeeze(-1)  # [b, d]
        if inputs.D is not None:
            y.addcmul_(u, inputs.D.to(dtype))
        if inputs.z is not None:
            y.mul_(F.silu(inputs.z[:, 0].to(dtype)))
    return y[:, None].to(inputs.u.dtype), h


class _TiledScan(torch.autograd.Function):
    """Saves the inputs and one state a tile; the backward computes the rest again, from the last tile to the first."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs = ScanInputs(*arguments)
        y, final_state, tile_states = _tiled_forward(inputs, keep_states=True)
        ctx.delta_softplus = inputs.delta_softplus
        ctx.save_for_backward(*(t for t in arguments if not isinstance(t, bool)), tile_states)
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "The torch backend of selective_scan has no second derivative: use backward without create_graph=True, "
                "or selective_scan with backend='naive'."
            )
        grad_y, grad_final_state = grads
        *tensors, tile_states = ctx.saved_tensors
        values: list[Any] = [*tensors[:8], ctx.delta_softplus, *tensors[8:]]
        inputs = ScanInputs(*values)
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


class _Tiles:
    """Walks over the tiles of one call with buffers that every tile uses again: the decays and the states of its steps.

    In float32 a decay near 1 rounds to a multiple of 2^-24, at equal step sizes always to the same side, and every
    addition to the state rounds too: over thousands of steps that grows to 1e-3. So a plain chain is never longer than
    a tile. From tile to tile the state is carried in float64, as exp(A * sum of the tile's step sizes) * state + what
    the tile's own steps leave, that being a chain of its own from 0 (`local`). So is the gradient on the way back.

    Attributes:
        spans: Start and stop of each tile.
        decays: exp(delta A), 0 where the state is reset, [c, b, n, d].
        states: The state before the tile, then the one after each of its steps, [c + 1, b, n, d].
        local: The last state if the tile had begun with 0, [b, n, d].
    """

    def __init__(self, inputs: ScanInputs, delta: Tensor, delta_u: Tensor) -> None:
        dtype = inputs.compute_dtype
        # Views with the steps first, [l, b, d] and [l, b, n]
        self.delta, self.delta_u = delta.transpose(0, 1), delta_u.transpose(0, 1)
        self.B, self.C = inputs.B.to(dtype).transpose(0, 1), inputs.C.to(dtype).transpose(0, 1)
        self.A_t = inputs.A.to(dtype).t().contiguous()  # [n, d]
        # Apple's GPUs have no float64: there the carried state rounds once a tile.
        carry_dtype = dtype if delta.device.type == "mps" else torch.float64
        # exp(x) as 2^(x log2 e), which torch computes in half the time on CPU.
        self.carry_rates = self.A_t.to(carry_dtype) * _LOG2_E
        self.rates = self.carry_rates.to(dtype)
        batch, length, channels = delta.shape
        c, n = min(TORCH_TILE_STEPS, length), self.A_t.shape[0]
        self.spans = [(start, min(start + c, length)) for start in range(0, length, c)]
        self.decays = delta.new_empty(c, batch, n, channels)
        self.states = delta.new_empty(c + 1, batch, n, channels)
        self.local = delta.new_empty(batch, n, channels)
        # Views of the single steps, made once: in a small model making them costs more than using them.
        self.decay_steps, self.state_steps = self.decays.unbind(0), self.states.unbind(0)
        self.resets, self.any_reset = None, [False] * length  # [l, b, 1, 1] bool; whether any row resets at a step
        if inputs.reset_mask is not None:
            self.resets, self.any_reset = inputs.reset_mask.t()[..., None, None], inputs.reset_mask.any(0).tolist()

    def start(self, state: Tensor | None) -> Tensor:
        """A state or its gradient [b, d, n], 0 when None, as it is carried: [b, n, d], float64."""
        if state is None:
            return self.local.new_zeros(self.local.shape, dtype=self.carry_rates.dtype)
        return state.transpose(1, 2).to(self.carry_rates.dtype, copy=True, memory_format=torch.contiguous_format)

    def load(self, start: int, stop: int, h: Tensor, with_local: bool) -> None:
        """Fill the buffers for the steps [start, stop) after the state h [b, n, d]; `local` only when asked for."""
        c = stop - start
        self.states[0] = h
        self.local.zero_()
        torch.mul(self.delta[start:stop, :, None], self.rates, out=self.decays[:c]).exp2_()
        torch.mul(self.delta_u[start:stop, :, None], self.B[start:stop, ..., None], out=self.states[1 : c + 1])
        for j in range(c):
            h = self.state_steps[j]
            if self.resets is not None and self.any_reset[start + j]:
                reset = self.resets[start + j]
                self.decay_steps[j].masked_fill_(reset, 0.0)
                h = h.masked_fill(reset, 0.0)  # a decay of 0 would not do: 0 * NaN of a broken neighbour is NaN
                self.local.masked_fill_(reset, 0.0)
            if with_local:
                torch.addcmul(self.state_steps[j + 1], self.decay_steps[j], self.local, out=self.local)
            self.state_steps[j + 1].addcmul_(self.decay_steps[j], h)

    def carry(self, start: int, stop: int, carried: Tensor) -> Tensor:
        """The carried state (or gradient) behind the steps [start, stop), in place of the one before them.

        exp(A * sum of the step sizes) * carried + local, and after a reset `local` alone.
        """
        total = self.delta[start:stop].sum(0, dtype=carried.dtype)  # [b, d]
        carried.mul_(torch.mul(total[:, None], self.carry_rates).exp2_())
        if self.resets is not None and any(self.any_reset[start:stop]):
            carried.masked_fill_(self.resets[start:stop].any(0), 0.0)
        return carried.add_(self.local)

    def outputs(self, start: int, stop: int) -> Tensor:
        """C . h of the loaded tile, [b, c, d]."""
        return torch.matmul(self.C[start:stop, :, None], self.states[1 : stop - start + 1]).squeeze(2).transpose(0, 1)


def _tiled_forward(inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y [b, l, d], final state [b, d, n], and with `keep_states` the state before each tile, [tiles, b, n, d])."""
    dtype = inputs.compute_dtype
    with torch.no_grad(), _without_autocast(inputs.u.device.type):
        u = inputs.u.to(dtype)
        delta = _step_sizes(inputs)[1]
        tiles = _Tiles(inputs, delta, delta * u)
        h = tiles.start(inputs.initial_state)  # [b, n, d]
        tile_states = tiles.local.new_empty(len(tiles.spans), *h.shape) if keep_states else None
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        for i, (start, stop) in enumerate(tiles.spans):
            if tile_states is not None:
                tile_states[i] = h
            tiles.load(start, stop, h, with_local=True)
            y[:, start:stop] = tiles.outputs(start, stop)
            h = tiles.carry(start, stop, h)
        final_state = h.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)  # [b, d, n]

        if inputs.D is not None:
            y.addcmul_(u, inputs.D.to(dtype))
        if inputs.z is not None:
            y.mul_(F.silu(inputs.z.to(dtype)))
    return y.to(inputs.u.dtype), final_state, tile_states


def _tiled_backward(
    inputs: ScanInputs, tile_states: Tensor, grad_y: Tensor | None, grad_final_state: Tensor | None
) -> dict[str, Tensor]:
    """Gradients of every tensor input by name, in the compute dtype; linear in length, memory of a few activations.

    With g_t the gradient of C_t . h_t, and q_t = dL/dh_t = g_t C_t + exp(delta_{t+1} A) q_{t+1}:
    dC_t = h_t . g_t, dB_t = q_t . (delta_t u_t), d(delta_t u_t) = B_t . q_t, d(delta_t A) = q_t exp(delta_t A) h_{t-1}.
    """
    dtype = inputs.compute_dtype
    with torch.no_grad(), _without_autocast(inputs.u.device.type):
        u = inputs.u.to(dtype)
        delta_before, delta = _step_sizes(inputs)
        tiles = _Tiles(inputs, delta, delta * u)
        grads: dict[str, Tensor] = {}

        # 1. Gate: what reaches the ungated output.
        grad_out = torch.zeros_like(u) if grad_y is None else grad_y.to(dtype)  # [b, l, d]
        g, y = grad_out, None
        if inputs.z is not None:
            z = inputs.z.to(dtype)
            g = grad_out * F.silu(z)
            y = torch.empty_like(delta)  # the ungated output again, for the gradient of z
        g_steps = g.transpose(0, 1)  # [l, b, d]

        # 2. Recurrence, from the last tile to the first.
        grad_delta, grad_delta_u = torch.empty_like(delta), torch.empty_like(delta)
        grad_B, grad_C = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (tiles.B, tiles.C))
        grad_A = tiles.start(None)  # [b, n, d], a sum over all tiles
        grad_h = tiles.start(grad_final_state)  # gradient of the state after the tile at hand, from all that follows
        local = tiles.local  # what the tile at hand gives to the gradient of the state before it
        grad_states = torch.empty_like(tiles.decays)
        grad_state_steps = grad_states.unbind(0)
        for i, (start, stop) in reversed(list(enumerate(tiles.spans))):
            tile, c = slice(start, stop), stop - start
            tiles.load(start, stop, tile_states[i], with_local=False)
            decays, states = tiles.decays[:c], tiles.states[: c + 1]
            if y is not None:
                y[:, tile] = tiles.outputs(start, stop)
            # A row times a matrix: as a matrix times a column MKL takes twenty times as long.
            torch.matmul(g_steps[tile, :, None], states[1:].mT, out=grad_C[tile, :, None])
            # 2a. Gradients of the states, backwards.
            q = torch.mul(g_steps[tile, :, None], tiles.C[tile, ..., None], out=grad_states[:c])
            local.copy_(grad_state_steps[c - 1])
            grad_state_steps[c - 1].add_(grad_h)
            for j in range(c - 1, 0, -1):
                torch.addcmul(grad_state_steps[j - 1], tiles.decay_steps[j], local, out=local)
                grad_state_steps[j - 1].addcmul_(tiles.decay_steps[j], grad_state_steps[j])
            local.mul_(tiles.decay_steps[0])
            grad_h = tiles.carry(start, stop, grad_h)
            # 2b. What the states were made of.
            torch.matmul(tiles.delta_u[tile, :, None], q.mT, out=grad_B[tile, :, None])
            grad_delta_u[:, tile] = torch.matmul(tiles.B[tile, :, None], q).squeeze(2).transpose(0, 1)
            grad_exponents = q.mul_(decays).mul_(states[:-1])  # of delta A; from here on `decays` is scratch space
            grad_delta[:, tile] = torch.mul(grad_exponents, tiles.A_t, out=decays).sum(2).transpose(0, 1)
            grad_A += torch.mul(grad_exponents, tiles.delta[tile, :, None], out=decays).sum(0)
        grads |= {"A": grad_A.sum(0).t(), "initial_state": grad_h.transpose(1, 2)}
        grads |= {"B": grad_B.transpose(0, 1), "C": grad_C.transpose(0, 1)}

        # 3. Gate and skip.
        grad_delta.addcmul_(grad_delta_u, u)
        grad_u = grad_delta_u.mul_(delta)
        if inputs.D is not None:
            grads["D"] = (g * u).sum((0, 1))
            grad_u.addcmul_(g, inputs.D.to(dtype))
        if y is not None:
            if inputs.D is not None:
                y.addcmul_(u, inputs.D.to(dtype))
            grads["z"] = torch.ops.aten.silu_backward(y.mul_(grad_out), z)
        # 4. Discretisation.
        if inputs.delta_softplus:
            grad_delta.mul_(torch.sigmoid(delta_before))
        if inputs.delta_bias is not None:
            grads["delta_bias"] = grad_delta.sum((0, 1), dtype=grad_A.dtype)
        grads |= {"u": grad_u, "delta": grad_delta}
    return grads


SCAN_BACKENDS.register("naive", OperatorBackend(_run_naive, automatic=False))
SCAN_BACKENDS.register("torch", OperatorBackend(_run_torch))
for _name, _entry in reversed(_accelerators().items()):
    SCAN_BACKENDS.register(_name, cast("OperatorBackend[ScanInputs, tuple[Tensor, Tensor]]", _entry))

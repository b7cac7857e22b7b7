"""Inputs, comparisons and the list of backends that the tests of the kernels share."""

import pytest
import torch

from ehrseq.kernels import cpu_library
from ehrseq.modeling import causal_conv, selective_scan

SCAN_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")

needs_cpu_library = pytest.mark.skipif(
    cpu_library.library() is None, reason=f"no compiled CPU kernels: {cpu_library.why_no_library()}"
)


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scan_inputs(batch=2, length=37, channels=6, state=4, dtype=torch.float64, seed=0, device="cpu"):
    """Every tensor argument of the scan, with the softplus."""
    shapes = {
        "u": (batch, length, channels),
        "delta": (batch, length, channels),
        "A": (channels, state),
        "B": (batch, length, state),
        "C": (batch, length, state),
        "D": (channels,),
        "z": (batch, length, channels),
        "delta_bias": (channels,),
        "initial_state": (batch, channels, state),
    }
    inputs = {name: normal(*shape, seed=100 * seed + i) for i, (name, shape) in enumerate(shapes.items())}
    inputs["A"] = -torch.exp(inputs["A"])
    return {k: v.to(device=device, dtype=dtype) for k, v in inputs.items()} | {"delta_softplus": True}


def long_inputs(length, dt, channels=16, state=16):
    """Step sizes as given: a number, "random" (0.5 to 1.5 of 1e-4), or a sweep over ten decades."""
    inputs = scan_inputs(1, length, channels, state, torch.float32)
    if dt == "sweep":
        steps = torch.logspace(-6, 4, 4096).repeat(length // 4096)[None, :, None].expand(1, length, channels)
    elif dt == "random":
        steps = 1e-4 * (0.5 + torch.rand(1, length, channels, generator=torch.Generator().manual_seed(0)))
    else:
        steps = torch.full((1, length, channels), dt)
    return inputs | {"delta": steps.contiguous(), "delta_softplus": False, "delta_bias": torch.zeros(channels)}


def conv_inputs(batch=2, length=13, channels=5, kernel=4, dtype=torch.float64, seed=0, device="cpu"):
    """Every tensor argument of the convolution."""
    inputs = {
        "x": normal(batch, length, channels, seed=seed),
        "weight": normal(channels, kernel, seed=seed + 1),
        "bias": normal(channels, seed=seed + 2),
        "initial_state": normal(batch, channels, kernel - 1, seed=seed + 3),
    }
    return {k: v.to(device=device, dtype=dtype) for k, v in inputs.items()}


def resets(batch, length, rate=0.15, seed=1):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < rate


def max_error(got, want, floor=0.0):
    """max |difference| / max |reference|; a NaN on one side only is an infinite error.

    `floor` is a least value of the denominator: in tiny shapes a gradient may be a single sum of which nothing is left.
    """
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if got.numel() == 0:
        return 0.0
    if not torch.equal(got.isnan(), want.isnan()):
        return float("inf")
    scale = want.abs().nan_to_num(0).max().clamp(min=floor)
    return ((got - want).abs().nan_to_num(0).max() / (scale if scale > 0 else 1)).item()


def with_gradients(function, inputs, seed=3, **options):
    """{"y": ..., "final_state": ..., "grad of <input>": ...} for a random linear function of both results."""
    leaves = {k: v.detach().clone().requires_grad_() if torch.is_tensor(v) else v for k, v in inputs.items()}
    y, state = function(**leaves, **options, return_final_state=True)
    weights = [normal(*t.shape, seed=seed + i).to(t) for i, t in enumerate((y, state))]
    tensors = {k: v for k, v in leaves.items() if torch.is_tensor(v)}
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    named = {f"grad of {k}": g for k, g in zip(tensors, grads, strict=True) if g is not None}
    return {"y": y.detach(), "final_state": state.detach(), **named}


def errors(got, want, floor=0.0):
    """{result: max_error}, every result of the reference present."""
    return {name: max_error(got[name], value, floor) for name, value in want.items()}


def as_double(inputs):
    return {
        k: v.detach().double().cpu() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()
    }


def served(table, inputs):
    """Names of the backends of a table that serve these inputs on this machine, `naive` apart."""
    return [name for name, entry in table.items() if name != "naive" and entry.why_not(inputs) is None]


def scan_backends_here(dtype=torch.float32):
    inputs = scan_inputs(dtype=dtype)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")
    call = selective_scan.ScanInputs(*(inputs[name] for name in order), resets(2, 37))
    return served(selective_scan.SCAN_BACKENDS.entries, call)


def conv_backends_here():
    inputs = conv_inputs(dtype=torch.float32)
    call = causal_conv.ConvInputs(*inputs.values(), resets(2, 13), "silu")
    return served(causal_conv.CONV_BACKENDS.entries, call)

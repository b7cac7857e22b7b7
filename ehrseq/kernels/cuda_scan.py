"""mamba-ssm's scan and causal-conv1d's convolution, where their CUDA kernels are really installed.

Both are looked for at the first call with CUDA tensors, the compiled extension itself and not only the package: since
June 2026 mamba-ssm installs without it unless MAMBA_KEEP_CUDA_BUILD=TRUE asks for it (its pull request 977), and its
Python function then imports and raises when it is called. What they lack is refused, so that the next backend (Triton)
serves it: an initial state and resets in the scan, an initial state together with resets in the convolution, float64,
and `torch.compile`. Their gradients use atomic additions: two runs differ in the last bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .backend import KernelBackend
from .operators import ConvInputsLike, ScanInputsLike

CUDA_MAX_STATE = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INSTALL = 'use `MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation "ehrseq[cuda]"`'


@cache
def _function(package: str, module: str, name: str, extension: str) -> tuple[Callable[..., Any] | None, str]:
    """(function, "") of a package with its extension, or (None, why not). A broken install raises all sorts."""
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        importlib.import_module(extension)
        return function, ""
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == package.replace("-", "_"):
            return None, f"{package} is not installed; {_INSTALL}"
        if error.name == extension:
            return None, f"{package} was installed without its CUDA kernels (no module {extension}); {_INSTALL}"
        return None, f"{package} does not import ({error}); {_INSTALL}"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return None, f"{package} does not import ({error}); {_INSTALL}"


def _mamba_scan() -> tuple[Callable[..., Any] | None, str]:
    return _function("mamba-ssm", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", "selective_scan_cuda")


def _fast_conv() -> tuple[Callable[..., Any] | None, str]:
    return _function("causal-conv1d", "causal_conv1d.causal_conv1d_interface", "causal_conv1d_fn", "causal_conv1d_cuda")


def describe_packages() -> list[tuple[str, str]]:
    """(package, whether its CUDA kernels are there)."""
    found = {"mamba-ssm": _mamba_scan()[1], "causal-conv1d": _fast_conv()[1]}
    return [
        (package, f"none: {reason}" if reason else "its CUDA kernels are there") for package, reason in found.items()
    ]


def _why_not_here(tensor: Tensor, name: str) -> str | None:
    if tensor.device.type != "cuda":
        return f"it runs on CUDA, the tensors are on {tensor.device.type}"
    if tensor.dtype not in _DTYPES:
        return f"it reads float32, bfloat16 and float16, {name} is {tensor.dtype}"
    if tensor.numel() == 0:
        return f"{name} is empty"
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Scan
# ---------------------------------------------------------------------------------------------------------------------
class _StateWithoutGradient(torch.autograd.Function):
    """The final state as it is, and an error instead of a silent zero where its gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, y: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            "The cuda backend of selective_scan (mamba-ssm) has no gradient of the final state: use selective_scan "
            "with backend='triton' or 'torch', or set EHRSEQ_BACKEND."
        )


def _run_scan(inputs: ScanInputsLike) -> tuple[Tensor, Tensor]:
    function = _mamba_scan()[0]
    if function is None:
        raise RuntimeError(_mamba_scan()[1])
    # The kernel reads [batch, channels, length], activations of one dtype, and parameters in float32.
    dtype = inputs.u.dtype
    u, delta, B, C = (t.to(dtype).transpose(1, 2).contiguous() for t in (inputs.u, inputs.delta, inputs.B, inputs.C))
    z = None if inputs.z is None else inputs.z.to(dtype).transpose(1, 2).contiguous()
    D, bias = (None if t is None else t.float().contiguous() for t in (inputs.D, inputs.delta_bias))
    with torch.autocast("cuda", enabled=False), torch.cuda.device(u.device):
        y, state = function(
            u,
            delta,
            inputs.A.float().contiguous(),
            B,
            C,
            D=D,
            z=z,
            delta_bias=bias,
            delta_softplus=inputs.delta_softplus,
            return_last_state=True,
        )
    y = y.transpose(1, 2)
    state = state.detach().float()
    return y, _StateWithoutGradient.apply(state, y) if inputs.needs_grad else state  # type: ignore[no-untyped-call]


def _why_not_scan(inputs: ScanInputsLike) -> str | None:
    reason = _why_not_here(inputs.u, "u")
    if reason is not None:
        return reason
    if any(t is not None and t.dtype == torch.float64 for t in (inputs.delta, inputs.A, inputs.B, inputs.C, inputs.z)):
        return "it has no float64"
    if inputs.initial_state is not None:
        return "it has no initial state"
    if inputs.reset_mask is not None:
        return "it has no resets"
    if not 1 <= inputs.A.shape[1] <= CUDA_MAX_STATE:
        return f"it has state sizes from 1 to {CUDA_MAX_STATE}, A has {inputs.A.shape[1]}"
    function, missing = _mamba_scan()
    return missing if function is None else None


CUDA_SCAN = KernelBackend(_run_scan, _why_not_scan)


# ---------------------------------------------------------------------------------------------------------------------
# Convolution
# ---------------------------------------------------------------------------------------------------------------------
def _run_conv(inputs: ConvInputsLike) -> Tensor:
    function = _fast_conv()[0]
    if function is None:
        raise RuntimeError(_fast_conv()[1])
    x = inputs.x
    if x.stride(2) != 1 or x.stride(1) % 8 or x.stride(0) % 8 or x.stride(1) < x.shape[2]:
        x = x.contiguous()
    state = inputs.initial_state
    if state is not None:  # channels innermost
        state = state.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    segments = None if inputs.reset_mask is None else inputs.reset_mask.cumsum(1, dtype=torch.int32).contiguous()
    weight = inputs.weight.float().contiguous()
    bias = None if inputs.bias is None else inputs.bias.float().contiguous()
    with torch.autocast("cuda", enabled=False), torch.cuda.device(x.device):
        out: Tensor = function(
            x.transpose(1, 2),
            weight,
            bias=bias,
            seq_idx=segments,
            initial_states=state,
            activation=inputs.activation,
        )
    return out.transpose(1, 2)


def _why_not_conv(inputs: ConvInputsLike) -> str | None:
    reason = _why_not_here(inputs.x, "x")
    if reason is not None:
        return reason
    taps, channels = inputs.weight.shape[1], inputs.x.shape[2]
    if not 2 <= taps <= 4:
        return f"it has 2 to 4 taps, weight has {taps}"
    if channels % 8:
        return f"it needs a multiple of 8 channels, x has {channels}"
    if inputs.reset_mask is not None and inputs.initial_state is not None:
        return "it has no resets together with an initial state"
    if inputs.initial_state is not None and inputs.x.shape[1] < taps - 1:
        return f"with an initial state it needs at least {taps - 1} steps"
    function, missing = _fast_conv()
    return missing if function is None else None


CUDA_CONV = KernelBackend(_run_conv, _why_not_conv)

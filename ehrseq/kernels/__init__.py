"""Fast backends of the selective scan and of the causal convolution, behind the operators of `ehrseq.modeling`.

Nothing here is required: without a compiled library, Triton or CUDA kernels those operators run on torch alone, with
equal results. Importing this package loads none of them: each is looked for at the first call that could use it.

`ehrseq doctor` prints what this machine has.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .backend import KernelBackend

if TYPE_CHECKING:
    from torch import Tensor

    from .operators import ConvInputsLike, ScanInputsLike

# Fastest first. The module of `cuda` has CUDA_SCAN or CUDA_CONV, and so on.
_SCAN_MODULES = {"cuda": "cuda_scan", "triton": "triton_scan", "cpp": "cpu_scan"}
_CONV_MODULES = {"cuda": "cuda_scan", "triton": "triton_conv", "cpp": "cpu_conv"}


def scan_backends() -> dict[str, KernelBackend[ScanInputsLike, tuple[Tensor, Tensor]]]:
    """Backends of the selective scan by name, fastest first, whether or not this machine can run them."""
    return {
        name: getattr(import_module(f"{__name__}.{module}"), f"{name.upper()}_SCAN")
        for name, module in _SCAN_MODULES.items()
    }


def conv_backends() -> dict[str, KernelBackend[ConvInputsLike, Tensor]]:
    """Backends of the causal convolution by name, fastest first, whether or not this machine can run them."""
    return {
        name: getattr(import_module(f"{__name__}.{module}"), f"{name.upper()}_CONV")
        for name, module in _CONV_MODULES.items()
    }


__all__ = ["KernelBackend", "conv_backends", "scan_backends"]

"""Whether Triton can be used, and what its two operators share. Importing this module does not import triton."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 asks for the interpreter: kernels then run on CPU, very slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_not_triton(device: torch.device) -> str | None:
    """None when Triton's kernels run on this device, else why they do not."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"it runs on CUDA, the tensors are on {device.type}"
    if not _installed():
        return "Triton is not installed; use `pip install triton`"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = _capability(device.index if device.index is not None else torch.cuda.current_device())
        if major < 7:
            return f"Triton needs compute capability 7.0 or newer, this GPU has {major}.{minor}"
    return None


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def innermost_dense(tensor: Tensor) -> Tensor:
    """The tensor itself when its last dimension is contiguous, else a copy; also of one that torch negates lazily."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def strides(tensor: Tensor | None) -> tuple[int, int]:
    """Strides of the batch and of the steps; zeros for None."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def mask_bytes(reset_mask: Tensor | None) -> Tensor | None:
    """The mask as the kernels read it: contiguous, a byte a step."""
    return None if reset_mask is None else reset_mask.contiguous().view(torch.uint8)


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor with dense memory, or None."""
    return None if tensor is None else tensor.resolve_neg().contiguous()

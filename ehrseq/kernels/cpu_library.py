"""Finds and loads the compiled CPU kernels, and calls them.

The library has a plain C interface: one struct of 8-byte fields goes in, an error number comes out. Here that struct is
a row of integers (`struct.pack`), which costs about a microsecond a call, less than any other way through `ctypes`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch  # first: the library then shares torch's OpenMP threads instead of bringing its own
from torch import Tensor

ABI_VERSION = 2  # kAbiVersion of csrc/kernels.cpp
CPP_TILE_STEPS = 32  # kTile of csrc/scan.h
LIBRARY_FOLDER = Path(__file__).resolve().parent / "lib"

# Dtype of csrc/rows.h
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_FUNCTIONS = (
    "ehrseq_scan_forward",
    "ehrseq_scan_backward",
    "ehrseq_conv_forward",
    "ehrseq_conv_backward",
    "ehrseq_model_step",
    "ehrseq_forecast_step",
    "ehrseq_forecast_draw",
)


@dataclass(frozen=True)
class Library:
    """A loaded library.

    Attributes:
        path: Its file.
        variant: The instruction set it was compiled for.
        compiler: What compiled it.
        vector_bytes: Width of its vectors.
        functions: Its functions by name.
    """

    path: Path
    variant: str
    compiler: str
    vector_bytes: int
    functions: dict[str, ctypes._CFuncPtr]  # type: ignore[name-defined]


_loaded: tuple[Library | None, str] | None = None
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def library() -> Library | None:
    """The library for this machine, loaded once; None where there is none (`why_no_library` says why)."""
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded[0]


def why_no_library() -> str | None:
    """None when the kernels can be used, else the reason and what to do about it."""
    return None if library() is not None else (_loaded or (None, ""))[1]


# What `torch.compiler.assume_constant_result` sets; calling it would import the whole compiler (about a second).
why_no_library._dynamo_marked_constant = True  # type: ignore[attr-defined]


def variants() -> list[str]:
    """Variants that this CPU can run, best first."""
    machine = platform.machine()
    if machine == "aarch64":
        return ["aarch64"]
    if machine != "x86_64":
        return []
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return ["x86-64-v4", "x86-64-v3"]
    return ["x86-64-v3"] if capability == "AVX2" else []


# State updates (scan) or taps (convolution) below which waking other threads costs more than they bring.
_WORK_OF_A_THREAD = 1 << 17


def num_threads(work: int) -> int:
    """Threads for a call of so much work: at most torch's number; one in a forked process, where OpenMP has none."""
    return 1 if _forked else max(1, min(torch.get_num_threads(), work // _WORK_OF_A_THREAD))


def _load() -> tuple[Library | None, str]:
    if sys.platform != "linux" or not variants():
        return None, f"there are no compiled kernels for {sys.platform} on this {platform.machine()} CPU"
    reasons = []
    for variant in variants():
        path = LIBRARY_FOLDER / f"libehrseq-{variant}.so"
        if not path.exists():
            continue
        try:
            return _open(path, variant), ""
        except (OSError, AttributeError) as error:
            reasons.append(f"{path.name} does not load ({error})")
    return None, (
        "; ".join(reasons)
        or "no compiled kernels were installed with ehrseq (there was no C++ compiler): install g++, then "
        "`pip install --force-reinstall --no-deps --no-cache-dir --no-binary ehrseq ehrseq`"
    )


def _open(path: Path, variant: str) -> Library:
    handle = ctypes.CDLL(str(path))
    version = handle.ehrseq_abi_version()
    if version != ABI_VERSION or handle.ehrseq_tile() != CPP_TILE_STEPS:
        raise OSError(f"it is of interface {version}, this package needs {ABI_VERSION}: install ehrseq again")
    handle.ehrseq_compiler.restype = ctypes.c_char_p
    functions = {}
    for name in _FUNCTIONS:
        functions[name] = getattr(handle, name)
        functions[name].argtypes = [ctypes.c_char_p]
    return Library(path, variant, handle.ehrseq_compiler().decode(), handle.ehrseq_vector_bytes(), functions)


def call(name: str, fields: list[int]) -> None:
    """Call a function of the library with the fields of its struct.

    Raises:
        RuntimeError: there is no library, or its call failed.
        MemoryError: no memory for its working buffers.
    """
    compiled = library()
    if compiled is None:
        raise RuntimeError(f"The C++ kernels are not available: {why_no_library()}.")
    error = compiled.functions[name](struct.pack(f"{len(fields)}q", *fields))
    if error == 1:
        raise MemoryError(f"{name}: no memory for the working buffers.")
    if error:
        raise RuntimeError(f"{name}: error {error}.")


# --- tensors as fields -----------------------------------------------------------------------------------------------
# The caller must keep a reference to every tensor until the call is over: only its address goes over.


def is_plain(*values: object) -> bool:
    """Whether the tensors are real ones that nothing traces or transforms, so that their addresses mean something."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    return all(not isinstance(t, Tensor) or type(t) in (Tensor, torch.nn.Parameter) for t in values)


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself when its last dimension is contiguous, else a copy; also of one that torch negates lazily."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def rows_fields(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """`Rows` of csrc/rows.h: data, dtype, stride of the batch, stride of the rows."""
    if tensor is None:
        return (0, 0, 0, 0)
    stride = tensor.stride()
    return (tensor.data_ptr(), DTYPE_CODES[tensor.dtype], stride[0], stride[1])


def pointer(tensor: Tensor | None) -> int:
    """Address of the data, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor as contiguous values of the dtype: itself where it is so already."""
    return None if tensor is None else tensor.to(dtype).resolve_neg().contiguous()


def splits(batch: int, channels: int, dtype: torch.dtype, threads: int) -> int:
    """Into how many ranges of channels each batch row is cut, so that about four tasks fall to each thread."""
    compiled = library()
    lanes = (compiled.vector_bytes if compiled else 64) // dtype.itemsize
    if threads == 1 or batch == 0:
        return 1
    blocks = -(-channels // lanes)
    return max(1, min(blocks, -(-4 * threads // batch)))

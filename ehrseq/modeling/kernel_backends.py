"""Interchangeable implementations of one operator: the table of them, the choice, and the checks of a call's tensors.

The selective scan and the causal convolution have such a table each. The environment variable EHRSEQ_BACKEND forces a
backend of both by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

Inputs = TypeVar("Inputs")
Outputs = TypeVar("Outputs")


@dataclass(frozen=True)
class OperatorBackend(Generic[Inputs, Outputs]):
    """One implementation of an operator. The entries of `ehrseq.kernels` have the same attributes.

    Attributes:
        run: The checked inputs of a call -> its outputs.
        why_not: Inputs -> None when this backend serves the call and its gradients, else why it does not.
        automatic: Whether it may be picked when nobody asks for a backend by name.
    """

    run: Callable[[Inputs], Outputs]
    why_not: Callable[[Inputs], str | None] = lambda inputs: None
    automatic: bool = True


@dataclass
class BackendTable(Generic[Inputs, Outputs]):
    """The backends of one operator.

    Attributes:
        operator: Its name in messages.
        announce: Called with the name and the inputs where nobody asked for a backend by name.
        entries: Backends by name, fastest first: the order in which they are tried.
    """

    operator: str
    announce: Callable[[str, Inputs], None] | None = None
    entries: dict[str, OperatorBackend[Inputs, Outputs]] = field(default_factory=dict)

    def register(self, name: str, backend: OperatorBackend[Inputs, Outputs]) -> None:
        """Put a backend in front, so that it is tried first; one of the same name is replaced."""
        self.entries = {name: backend, **{key: entry for key, entry in self.entries.items() if key != name}}

    def choose(self, name: str | None, inputs: Inputs) -> OperatorBackend[Inputs, Outputs]:
        """The backend of that name, or of EHRSEQ_BACKEND; where neither is set the first that serves the call.

        Raises:
            ValueError: An unknown name, or a backend that cannot serve the call.
        """
        name = name or os.environ.get("EHRSEQ_BACKEND") or None
        if name is None:
            entries = self.entries.items()
            name, chosen = next((n, e) for n, e in entries if e.automatic and e.why_not(inputs) is None)
            if self.announce is not None and not torch.compiler.is_compiling():
                self.announce(name, inputs)
            return chosen
        if name not in self.entries:
            raise ValueError(
                f"Unknown {self.operator} backend {name!r}: expected one of {list(self.entries)}, or None for the "
                "fastest."
            )
        reason = self.entries[name].why_not(inputs)
        if reason is not None:
            raise ValueError(
                f"{self.operator.capitalize()} backend {name!r} cannot serve this call: {reason}. Use backend=None for "
                "one that can."
            )
        return self.entries[name]


def compute_dtype_of(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def any_needs_grad(tensors: Iterable[object]) -> bool:
    """Whether autograd will ask for a backward of a call with these tensors (and other values)."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def check_dimensions(function: str, name: str, value: object, layout: str) -> None:
    """Raise a ValueError unless the value is a dense tensor with as many dimensions as the layout names."""
    if not isinstance(value, Tensor) or not _is_dense(value) or value.dim() != layout.count(",") + 1:
        raise ValueError(f"{function}: {name} is {_describe(value)}, expected a tensor {layout}.")


def check_tensor(
    function: str, name: str, value: object, layout: str, shape: tuple[int, ...], first: tuple[str, Tensor]
) -> None:
    """Raise a ValueError that names the argument, what it is, and what it should be.

    Args:
        function: Name of the operator.
        name: Name of the argument. "reset_mask" must be bool and "lengths" hold integers, all others floating numbers.
        value: The argument.
        layout: Its dimensions by name.
        shape: Their sizes.
        first: Name and value of the argument on whose device it must be.
    """
    if not isinstance(value, Tensor) or not _is_dense(value) or value.shape != shape:
        raise ValueError(f"{function}: {name} is {_describe(value)}, expected {layout} = {list(shape)}.")
    if name == "reset_mask":
        if value.dtype != torch.bool:
            raise ValueError(f"{function}: reset_mask is {value.dtype}, expected torch.bool; use `.bool()`.")
    elif name == "lengths":
        if value.is_floating_point() or value.dtype == torch.bool:
            raise ValueError(f"{function}: lengths is {value.dtype}, expected integers as `attention_mask.sum(1)`.")
    elif not value.is_floating_point():
        raise ValueError(f"{function}: {name} is {value.dtype}, expected a floating dtype; use `.float()`.")
    if value.device != first[1].device:
        raise ValueError(
            f"{function}: {name} is on {value.device}, {first[0]} on {first[1].device}; move both to one device."
        )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    if not _is_dense(value):
        return f"a {'nested' if value.is_nested else str(value.layout).removeprefix('torch.')} tensor, not a dense one"
    return f"a tensor of shape {list(value.shape)}"


__all__ = [
    "BackendTable",
    "OperatorBackend",
    "any_needs_grad",
    "check_dimensions",
    "check_tensor",
    "compute_dtype_of",
]

"""What an accelerated implementation is to the operators of `ehrseq.modeling`: one entry of their table of backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Inputs = TypeVar("Inputs")
Outputs = TypeVar("Outputs")


@dataclass(frozen=True)
class KernelBackend(Generic[Inputs, Outputs]):
    """One implementation of the selective scan or of the causal convolution.

    `ehrseq.modeling` hands over its checked inputs, `ScanInputs` or `ConvInputs`. They are read by attribute only, so
    that a checkpoint's own copy of the modeling code can use these kernels as well.

    Attributes:
        run: Scan: inputs -> (y in the dtype of u, final state in the compute dtype). Convolution: inputs -> output in
            the dtype of x; its final state is a slice of the inputs and is taken by the caller.
        why_not: Inputs -> None when this backend serves the call and its gradients, else why it does not.
        automatic: Whether it may be picked when nobody asks for a backend by name.
    """

    run: Callable[[Inputs], Outputs]
    why_not: Callable[[Inputs], str | None]
    automatic: bool = True

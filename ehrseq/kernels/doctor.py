"""`ehrseq doctor`: which kernels this machine has, whether they compute the right thing, and how fast.

The self-test compares every backend that can run with float64 on a small problem, with its gradients, and measures the
scan and the convolution on one of a block's size against the torch fallback. It takes about two seconds.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import build_library, cpu_library, cuda_scan

# The scan and the convolution are the modeling package's, which imports these kernels: they are handed in.
Operator = Callable[..., Any]
MakeInputs = Callable[[int, int, int, torch.dtype, str], dict[str, Tensor]]
SECONDS_OF_A_MEASUREMENT = 0.1
TOLERANCE = 1e-5  # max |difference| / max |reference| in float32; a right kernel is far below


@dataclass(frozen=True)
class Check:
    """What the self-test found about one backend of one operator.

    Attributes:
        operator: "scan" or "conv".
        backend: Its name in the table.
        problem: Why it cannot run here, or what went wrong; None when it works.
        error: Worst error of results and gradients against float64.
        milliseconds: Of a forward, and of a forward with backward, on a block's size.
        wrong: Whether it ran and computed something else than it should.
    """

    operator: str
    backend: str
    problem: str | None = None
    error: float | None = None
    milliseconds: tuple[float, float] | None = None
    wrong: bool = False


def describe_machine() -> list[tuple[str, str]]:
    """(what, value) of the machine, torch and the compiled library."""
    library = cpu_library.library()
    compiler = build_library.find_compiler()
    lines = [
        ("machine", f"{platform.machine()}, {platform.system()}"),
        ("instruction set", torch.backends.cpu.get_cpu_capability()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ("torch", torch.__version__),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees"),
        ("C++ compiler here", " ".join(compiler) or "none (it is only needed to install)"),
        ("forced backend", os.environ.get("EHRSEQ_BACKEND") or "none (EHRSEQ_BACKEND is not set)"),
    ]
    if library is None:
        lines.append(("CPU kernels", f"none: {cpu_library.why_no_library()}"))
    else:
        bits = 8 * library.vector_bytes
        lines.append(("CPU kernels", f"{library.path} ({bits}-bit vectors, compiled by {library.compiler})"))
    return lines + cuda_scan.describe_packages()


class TableEntry(Protocol):
    """What the self-test reads of a backend."""

    @property
    def automatic(self) -> bool:
        """Whether it may be picked when nobody asks for a backend by name."""


def check_backends(
    scan: Operator,
    conv: Operator,
    scan_table: Mapping[str, TableEntry],
    conv_table: Mapping[str, TableEntry],
    device: str = "cpu",
) -> list[Check]:
    """Run the self-test.

    Args:
        scan: `ehrseq.modeling.selective_scan.selective_scan`.
        conv: `ehrseq.modeling.causal_conv.causal_conv1d`.
        scan_table: Backends of the scan by name, fastest first.
        conv_table: Backends of the convolution by name, fastest first.
        device: Where to run.
    """
    checks = []
    cases: list[tuple[str, Operator, Mapping[str, TableEntry], MakeInputs]] = [
        ("scan", scan, scan_table, _scan_arguments),
        ("conv", conv, conv_table, _conv_arguments),
    ]
    for operator, function, table, make in cases:
        for name, entry in table.items():
            if name != "naive":
                checks.append(_check(operator, name, function, make, device, entry.automatic))
    return checks


def _check(operator: str, name: str, function: Operator, make: MakeInputs, device: str, automatic: bool) -> Check:
    try:
        small = make(2, 40, 24, torch.float64, device)
        exact = _results(function, small, "naive")
        found = _results(function, {k: v.float() for k, v in small.items()}, name)
        error = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True))
        if not error < TOLERANCE:
            problem = f"WRONG RESULTS: error {error:.1e}, at most {TOLERANCE:.0e} is right"
            return Check(operator, name, problem, wrong=True)
        if not automatic:
            return Check(operator, name, error=error)
        block = make(1, 512, 768, torch.float32, device)
        return Check(operator, name, error=error, milliseconds=_measure(function, block, name, device))
    except (ValueError, RuntimeError, OSError) as trouble:
        return Check(operator, name, str(trouble).removesuffix(" Use backend=None for one that can."))


def _scan_arguments(batch: int, length: int, channels: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    u, delta, z = (normal(batch, length, channels) for _ in range(3))
    A = -torch.arange(1, 17, device=device, dtype=dtype).repeat(channels, 1)
    return {"u": u, "delta": delta - 4, "A": A, "B": normal(batch, length, 16), "C": normal(batch, length, 16), "z": z}


def _conv_arguments(batch: int, length: int, channels: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    inputs = _scan_arguments(batch, length, channels, dtype, device)
    return {"x": inputs["u"], "weight": inputs["A"][:, :4] / 4, "bias": inputs["u"][0, 0]}


def _results(function: Operator, inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    """Output and gradients."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    out = _call(function, leaves, backend)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), list(leaves.values()))]


def _call(function: Operator, inputs: dict[str, Tensor], backend: str) -> Tensor:
    options = {"delta_softplus": True} if "delta" in inputs else {}
    out: Tensor = function(**inputs, **options, backend=backend)
    return out


def _measure(function: Operator, inputs: dict[str, Tensor], backend: str, device: str) -> tuple[float, float]:
    """Milliseconds, the best of a few: (forward, forward with backward)."""

    def forward() -> None:
        with torch.no_grad():
            _call(function, inputs, backend)

    times = []
    for run in (forward, lambda: _results(function, inputs, backend)):
        best, begun = float("inf"), time.perf_counter()
        while best == float("inf") or time.perf_counter() - begun < SECONDS_OF_A_MEASUREMENT:
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        times.append(1e3 * best)
    return times[0], times[1]


def report_machine(machine: list[tuple[str, str]]) -> str:
    """The machine as text."""
    width = max(len(name) for name, _ in machine)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in machine)


def report_checks(checks: list[Check], device: str) -> str:
    """The self-test on one device as text."""
    lines = [f"{'on ' + device:<9}{'backend':<9}{'error':>6}{'forward':>12}{'+ backward':>12}"]
    for check in checks:
        if check.problem is not None:
            lines.append(f"{check.operator:<9}{check.backend:<9}{check.problem}")
            continue
        times = "" if check.milliseconds is None else "".join(f"{value:>9.2f} ms" for value in check.milliseconds)
        lines.append(f"{check.operator:<9}{check.backend:<9}{check.error:>6.0e}{times}")
    for operator in ("scan", "conv"):
        working = [check for check in checks if check.operator == operator and check.milliseconds is not None]
        if working:
            best, torch_times = working[0], next((c.milliseconds for c in working if c.backend == "torch"), None)
            faster = ""
            if torch_times and best.milliseconds and best.backend != "torch":
                faster = f", {torch_times[1] / best.milliseconds[1]:.1f} times as fast as torch in training"
            lines.append(f"{operator}: {best.backend} is used{faster}.")
    return "\n".join(lines)

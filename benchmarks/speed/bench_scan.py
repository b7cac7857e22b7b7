"""The selective scan and the causal convolution alone: every backend that this machine has, in turns.

Two problems: one block of a wide model (768 wide, 2,048 steps) and a batch of a small one (64 wide, 32 rows of 256).
Figures are CPU milliseconds, all threads together, of a forward and of a backward; on a GPU, wall milliseconds.

    python -m benchmarks.speed.bench_scan --repeats 9 --output runs/bench/scan.json
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import benchmark_parser, finish, in_turns
from ehrseq.modeling.causal_conv import CONV_BACKENDS, causal_conv1d
from ehrseq.modeling.selective_scan import SCAN_BACKENDS, selective_scan


@dataclass(frozen=True)
class Problem:
    """Sizes of one measurement."""

    name: str
    batch: int
    length: int
    channels: int
    state: int = 16


PROBLEMS = [Problem("one wide block", 1, 2048, 1536), Problem("a small model's batch", 32, 256, 128)]


def tensors(problem: Problem, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments of the scan and of the convolution, laid out as in a block: halves and slices of projections."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, to)

    b, length, d, n = problem.batch, problem.length, problem.channels, problem.state
    x, z = normal(b, length, 2 * d).chunk(2, -1)
    B, C = normal(b, length, 2 * n).chunk(2, -1)
    scan = {
        "u": x,
        "delta": normal(b, length, d) - 4,
        "A": -torch.arange(1, n + 1, device=device, dtype=torch.float32).repeat(d, 1),
        "B": B,
        "C": C,
        "D": normal(d, to=torch.float32),
        "z": z,
        "delta_bias": normal(d, to=torch.float32) / 10,
    }
    return scan, {"x": x, "weight": normal(d, 4), "bias": normal(d)}


def forward(function: Callable[..., Tensor], inputs: dict[str, Tensor], synchronise: Callable[[], None]) -> Callable:
    """A function that runs one forward without gradients."""

    def run() -> None:
        with torch.no_grad():
            function(**inputs)
        synchronise()

    return run


def backward(function: Callable[..., Tensor], inputs: dict[str, Tensor], synchronise: Callable[[], None]) -> Callable:
    """A function that runs one backward, again and again on the same graph."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = function(**leaves)
    grad = torch.ones_like(y)

    def run() -> None:
        torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)
        synchronise()

    return run


def usable(function: Callable[..., Tensor], name: str, inputs: dict[str, Tensor]) -> bool:
    """Whether the backend serves these tensors here."""
    try:
        function(**inputs, backend=name)
    except (ValueError, RuntimeError):
        return False
    return True


def measure(problem: Problem, dtype: torch.dtype, device: str, repeats: int) -> dict[str, dict[str, float]]:
    """{"scan forward": {backend: milliseconds}, ...}."""
    scan_inputs, conv_inputs = tensors(problem, dtype, device)
    synchronise = torch.cuda.synchronize if device != "cpu" else (lambda: None)

    def scan(backend: str) -> Callable[..., Tensor]:
        return lambda **inputs: selective_scan(**inputs, delta_softplus=True, backend=backend)  # type: ignore[return-value]

    def conv(backend: str) -> Callable[..., Tensor]:
        return lambda **inputs: causal_conv1d(**inputs, backend=backend)  # type: ignore[return-value]

    result = {}
    for operator, make, function, table, inputs in (
        ("scan", scan, selective_scan, SCAN_BACKENDS.entries, scan_inputs),
        ("conv + SiLU", conv, causal_conv1d, CONV_BACKENDS.entries, conv_inputs),
    ):
        names = [name for name in table if name != "naive" and usable(function, name, inputs)]
        for way, build in (("forward", forward), ("backward", backward)):
            costs = in_turns({n: build(make(n), inputs, synchronise) for n in names}, repeats, warm_up=1)
            result[f"{operator}, {way}"] = {
                name: 1e3 * statistics.median(cost.cpu_all if device == "cpu" else cost.wall_all)
                for name, cost in costs.items()
            }
    return result


def main() -> None:
    """Measure, print the table, write the result."""
    parser = benchmark_parser(__doc__ or "", repeats=9)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    results = {}
    for problem in PROBLEMS:
        found = measure(problem, getattr(torch, options.dtype), options.device, options.repeats)
        backends = list(dict.fromkeys(name for times in found.values() for name in times))
        sizes = f"B={problem.batch}, L={problem.length}, channels {problem.channels}, state {problem.state}"
        print(f"\n| {problem.name}: {sizes}, {options.dtype} | " + " | ".join(backends) + " |")
        print("|---" * (len(backends) + 1) + "|")
        for what, times in found.items():
            print(f"| {what}, ms | " + " | ".join(f"{times[n]:.2f}" if n in times else "-" for n in backends) + " |")
        results[problem.name] = {"sizes": sizes, "milliseconds": found}
    finish(
        {"dtype": options.dtype, "device": options.device, "clock": "cpu" if options.device == "cpu" else "wall"}
        | results,
        options.output,
        show=False,
    )


if __name__ == "__main__":
    main()

r"""The selective scan and EhrMamba's training on a GPU, against what the chip can do.

Scan, B=64, L=2048, channels 1536, state 16, bfloat16, as a block calls it (z gate, softplus): every backend present,
forward and forward + backward, in milliseconds by CUDA events; beside them the time in which the bytes that must move
would move (inputs read once, outputs written once; the rate is that of a large copy, measured), and the exponentials
that must be computed (length x channels x state, at 16 a cycle and multiprocessor). Agreement is checked first, on a
smaller problem, against float64.

Training: tokens per second of the full model (768 wide, 32 blocks) in bfloat16 autocast at L=2048, forward, backward
and AdamW step; and the share of the chip's matmul rate (measured, 8192^3) that its matrix products take up: 6
operations a weight and token.

    python -m benchmarks.speed.bench_gpu --output runs/bench/gpu.json

mamba-ssm's and causal-conv1d's kernels are in the table where they are installed.
"""

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import benchmark_parser, finish
from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
from ehrseq.modeling.selective_scan import SCAN_BACKENDS, selective_scan

EXPONENTIALS_A_CYCLE = 16  # of a multiprocessor of Hopper and Ampere


def milliseconds(action: Callable[[], object], repeats: int, warm_up: int = 3) -> float:
    """Median time of a call on the device."""
    for _ in range(warm_up):
        action()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def scan_inputs(batch: int, length: int, channels: int, state: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments of the scan as a block gives them."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(to)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels) - 4,
        "A": -torch.arange(1, state + 1, device="cuda", dtype=wide).repeat(channels, 1),
        "B": normal(batch, length, state),
        "C": normal(batch, length, state),
        "D": normal(channels, to=wide),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels, to=wide) / 10,
    }


def run_scan(inputs: dict[str, Tensor], backend: str) -> Tensor:
    """The scan's y."""
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    return y if isinstance(y, Tensor) else y[0]


def agreement(backend: str) -> dict[str, float]:
    """Largest error against float64, as a share of the largest value: output and every gradient, float32 inputs."""
    inputs = scan_inputs(2, 777, 200, 16, torch.float32)
    weight = torch.randn(2, 777, 200, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    results = []
    for name, dtype in ((backend, torch.float32), ("torch", torch.float64)):
        leaves = {key: value.to(dtype).requires_grad_() for key, value in inputs.items()}
        y = run_scan(leaves, name)
        grads = torch.autograd.grad((y * weight.to(dtype)).sum(), list(leaves.values()))
        results.append({"y": y.detach(), **dict(zip(leaves, grads, strict=True))})
    got, expected = results
    return {key: float((got[key].double() - expected[key]).abs().max() / expected[key].abs().max()) for key in expected}


def measure_scan(
    batch: int, length: int, channels: int, repeats: int, rate: float, chip: Any, clock: float
) -> dict[str, Any]:
    """Milliseconds of every backend, and the limits."""
    state = 16
    inputs = scan_inputs(batch, length, channels, state, torch.bfloat16)
    result: dict[str, Any] = {}
    for name in SCAN_BACKENDS.entries:
        if name in ("naive", "torch", "cpp"):
            continue
        try:
            run_scan(inputs, name)
        except (ValueError, RuntimeError) as error:
            result[name] = {"not measured": str(error)}
            continue
        errors = agreement(name)

        def forward(name: str = name) -> None:
            with torch.no_grad():
                run_scan(inputs, name)

        leaves = {key: value.detach().requires_grad_() for key, value in inputs.items()}
        grad = torch.randn_like(inputs["u"])

        def both(name: str = name, leaves: dict[str, Tensor] = leaves, grad: Tensor = grad) -> None:
            torch.autograd.grad(run_scan(leaves, name), list(leaves.values()), grad)

        torch.cuda.reset_peak_memory_stats()
        result[name] = {
            "forward_ms": milliseconds(forward, repeats),
            "forward_backward_ms": milliseconds(both, repeats),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "largest_error_fp32": max(errors.values()),
            "errors_fp32": errors,
        }
    wide = batch * length * channels * 2  # bytes of one wide tensor in bfloat16
    exponentials = batch * length * channels * state
    per_second = EXPONENTIALS_A_CYCLE * chip.multi_processor_count * clock
    result["limits"] = {
        "forward_bytes_ms": 1e3 * 4 * wide / rate,  # u, delta, z read, y written
        "forward_backward_bytes_ms": 1e3 * (4 + 7) * wide / rate,  # then u, delta, z, dy read, du, ddelta, dz written
        "forward_exponentials_ms": 1e3 * exponentials / per_second,
        "forward_backward_exponentials_ms": 1e3 * 2 * exponentials / per_second,  # computed again going back
    }
    return result


def copy_rate() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source), 10) / 1e3)


def matmul_rate() -> float:
    """Operations a second of a large bfloat16 matrix product of random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (milliseconds(lambda: a @ b, 10) / 1e3)


def measure_training(batch: int, length: int, repeats: int, rate: float, checkpointing: bool) -> dict[str, float]:
    """Tokens a second of next-token training of the full model."""
    config = EhrMambaConfig(vocab_size=20_000)
    model = EhrMambaForCausalLM(config).cuda().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator("cuda").manual_seed(0)

    def integers(high: int) -> Tensor:
        return torch.randint(1, high, (batch, length), device="cuda", generator=generator)

    ids = integers(config.vocab_size - 1)
    channels = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": integers(config.type_vocab_size),
        "times": torch.sort(torch.rand(batch, length, device="cuda"), dim=1).values * 10,
        "ages": torch.full((batch, length), 60.0, device="cuda"),
        "visit_orders": torch.ones_like(ids),
        "visit_segments": integers(3),
        "labels": ids,
    }

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**channels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    torch.cuda.reset_peak_memory_stats()
    ms = milliseconds(step, repeats, warm_up=3)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    weights -= model.get_input_embeddings().weight.numel() if not config.tie_word_embeddings else 0
    tokens = batch * length
    return {
        "batch": batch,
        "ms_a_step": ms,
        "tokens_a_second": tokens / ms * 1e3,
        "matmul_share": 6 * weights * tokens / (ms / 1e3) / rate,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    """Measure, print the tables, write the result."""
    parser = benchmark_parser(__doc__ or "", repeats=10)
    parser.add_argument("--batch", type=int, default=64, help="rows of the scan")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=1536)
    parser.add_argument("--train_batch", type=int, nargs="+", default=[16], help="rows of a training step")
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"], help="trained with, each in turn")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is here; benchmarks/tables/mamba_table.py has the table of the CPU.")
    chip = torch.cuda.get_device_properties(0)
    clock = getattr(chip, "clock_rate", 0) * 1e3 or 1.98e9  # Hz; torch tells it from 2.8 on
    rate, products = copy_rate(), matmul_rate()
    torch.cuda.empty_cache()
    result: dict[str, Any] = {
        "copy_bytes_a_second": rate,
        "matmul_operations_a_second": products,
        "clock_hz": clock,
        "scan": measure_scan(options.batch, options.length, options.channels, options.repeats, rate, chip, clock),
        "training": {},
    }
    limits = result["scan"]["limits"]
    sizes = f"B={options.batch}, L={options.length}, channels {options.channels}, bf16"
    print(f"{chip.name}: copies {rate / 1e12:.2f} TB/s, multiplies {products / 1e12:.0f} TFLOP/s")
    print(f"\n| scan, {sizes} | forward, ms | forward + backward, ms | largest error, fp32 | GiB |")
    print("|---|---:|---:|---:|---:|")
    for name, found in result["scan"].items():
        if "forward_ms" in found:
            print(
                f"| {name} | {found['forward_ms']:.2f} | {found['forward_backward_ms']:.2f} | "
                f"{found['largest_error_fp32']:.1e} | {found['peak_gib']:.1f} |"
            )
    for what in ("bytes", "exponentials"):
        print(
            f"| {what} alone | {limits[f'forward_{what}_ms']:.2f} | {limits[f'forward_backward_{what}_ms']:.2f} | | |"
        )
    print("\n| training, 768 wide, 32 blocks, bf16 | rows | tokens/s | share of the matmul rate | GiB |")
    print("|---|---:|---:|---:|---:|")
    for name in options.backends:
        if "forward_ms" not in result["scan"].get(name, {}):
            continue
        for batch in options.train_batch:
            torch.cuda.empty_cache()
            os.environ["EHRSEQ_BACKEND"] = name
            try:
                found = measure_training(batch, options.length, max(3, options.repeats // 2), products, False)
            except torch.OutOfMemoryError:
                print(f"| {name} | {batch} | out of memory | | |")
                continue
            result["training"][f"{name}, {batch}"] = found
            print(
                f"| {name} | {batch} | {found['tokens_a_second']:,.0f} | {found['matmul_share']:.1%} | "
                f"{found['peak_gib']:.1f} |"
            )
    finish(result, options.output, show=False)


if __name__ == "__main__":
    main()

"""Peak memory of training: one block against transformers' with mambapy, and the paper's model as a whole.

Each figure comes from a process of its own, in which nothing else has raised the peak. For a block: how far the peak
of one forward and backward lies above what was held before (weights, input, libraries). For the model: the peak of the
whole process over optimiser steps of AdamW, next-token prediction, one patient of 2048 tokens; with and without
gradient checkpointing. Linux only: the peak is read from /proc and set back before the measured step.

    pip install mambapy    # the peer; left out where it is missing
    python -m benchmarks.speed.bench_memory --output runs/bench/memory.json
    python -m benchmarks.speed.bench_memory --quick
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from benchmarks.harness import benchmark_parser, finish

MIB = 2**20


def memory(field: str) -> int:
    """A field of this process' status, in bytes: VmRSS now, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux.")


def peak_of(action: Callable[[], object]) -> tuple[int, int]:
    """(bytes held before, peak during the action)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from what is held now
    before = memory("VmRSS")
    action()
    return before, memory("VmHWM")


def measure_block(kind: str, length: int, width: int) -> dict[str, float]:
    """Peak of one training step of a block: "ehrseq", or "mambapy" (transformers' block with mambapy's scan)."""
    import torch
    import transformers
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaBlock

    from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
    from ehrseq.modeling.mamba_block import EhrMambaBlock

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    block: torch.nn.Module
    if kind == "ehrseq":
        block = EhrMambaBlock(EhrMambaConfig(hidden_size=width, num_hidden_layers=1))
        block.mixer.reset_parameters()
    else:
        block = MambaBlock(MambaConfig(hidden_size=width, num_hidden_layers=1, use_mambapy=True), layer_idx=0)
    block.train()

    def step(tokens: int) -> None:
        hidden = torch.ones(1, tokens, width, requires_grad=True)
        out = block(hidden)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        block.zero_grad()

    step(64)  # libraries load what they need
    before, peak = peak_of(lambda: step(length))
    return {"held_mib": before / MIB, "peak_mib": (peak - before) / MIB}


def measure_model(checkpointing: bool, length: int, width: int, layers: int, vocabulary: int) -> dict[str, float]:
    """Peak of the process over two optimiser steps, and CPU seconds of the second."""
    import time

    import torch

    from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
    from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM

    torch.manual_seed(0)
    config = EhrMambaConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers)
    model = EhrMambaForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(10, vocabulary, (1, length))
    times = torch.rand(1, length).cumsum(1)
    seconds, losses = [], []

    def step() -> None:
        start = time.process_time()
        loss = model(input_ids=ids, times=times, ages=50 + times / 52, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
        losses.append(loss.item())

    def steps() -> None:
        step()
        step()  # the optimiser's state exists now: gradients, activations and state are held together

    _, peak = peak_of(steps)
    return {
        "peak_gib": peak / 2**30,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cpu_seconds_a_step": seconds[-1],
        "loss_falls": losses[1] < losses[0],
    }


def in_own_process(threads: int, what: str, *arguments: object) -> dict[str, float]:
    """Run one measurement of this file in a fresh process."""
    command = [sys.executable, __file__, "--threads", str(threads), "--child", what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{what} {arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(what: str, arguments: list[str]) -> None:
    """One measurement, printed as JSON."""
    if what == "block":
        kind, length, width = arguments
        result = measure_block(kind, int(length), int(width))
    else:
        result = measure_model(*(int(value) for value in arguments))  # type: ignore[arg-type]
    print(json.dumps(result))


def measure(options: argparse.Namespace) -> dict[str, object]:
    """All figures."""
    length, width, layers, vocabulary = options.length, options.width, options.layers, options.vocabulary
    if options.quick:
        length, width, layers, vocabulary = 256, 64, 2, 200
    result: dict[str, object] = {"length": length, "hidden_size": width, "num_hidden_layers": layers}
    kinds = ["ehrseq", *(["mambapy"] if find_spec("mambapy") else [])]
    blocks: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.repeats):
        for kind in kinds:
            blocks[kind].append(in_own_process(options.threads, "block", kind, length, width)["peak_mib"])
    result["block_peak_mib"] = {kind: statistics.median(peaks) for kind, peaks in blocks.items()}
    result["block_peaks_mib"] = blocks
    if "mambapy" in blocks:
        result["block_share_of_mambapy"] = statistics.median(blocks["ehrseq"]) / statistics.median(blocks["mambapy"])
    if not options.no_model:
        for name, checkpointing in (("model", 0), ("model_checkpointing", 1)):
            result[name] = in_own_process(options.threads, "model", checkpointing, length, width, layers, vocabulary)
    return result


def main() -> None:
    """Measure, print and, if asked, write the result."""
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-model", action="store_true", help="the block only (the model takes minutes)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    if options.child:
        child(options.child[0], options.child[1:])
    else:
        finish(measure(options), options.output)


if __name__ == "__main__":
    main()

"""What relevance propagation costs: against one forward of the same row, in time and in memory.

A random model of each family reads one row; figures are CPU seconds, medians over rounds in which forward and relevance
take turns, and ratios to the forward. Memory is how far the peak of the process lies above what was held before, at two
lengths, each in a process of its own: twice the length should take twice the memory. (BigBird's attention is
transformers', which writes a matrix of all pairs: its memory is quadratic with or without an explanation.)

    time        forward, relevance and hidden attention (the last row of every layer), ratio to the forward
    memory      peak of a relevance pass at two lengths, MiB

    OMP_NUM_THREADS=2 python -m benchmarks.speed.bench_relevance --output runs/bench/relevance.json
    python -m benchmarks.speed.bench_relevance --quick
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

from benchmarks.harness import benchmark_parser, finish, in_a_process, in_turns
from benchmarks.speed.bench_memory import MIB, peak_of

MODULE = "benchmarks.speed.bench_relevance"
FAMILIES = ("ehrmamba", "hymate", "cehrbert", "ehr_bigbird")
# (layers, width, tokens): the sizes of the papers, HyMaTE's as configured by default but longer.
SIZES = {
    "ehrmamba": (32, 768, 2048),
    "hymate": (2, 32, 1497),
    "cehrbert": (6, 768, 512),
    "ehr_bigbird": (6, 768, 2048),
}
QUICK = dict.fromkeys(FAMILIES, (2, 48, 200))
VOCABULARY = 1_000


def model_and_row(family: str, layers: int, width: int, length: int) -> tuple[Any, dict[str, Any]]:
    """A random classifier in evaluation mode, and one row of so many tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    import ehrseq  # noqa: F401  (registers the classes)

    logging.set_verbosity_error()
    torch.manual_seed(0)
    ids, times = torch.randint(1, VOCABULARY, (1, length)), torch.rand(1, length).cumsum(1)
    if family == "hymate":
        config = AutoConfig.for_model(family, num_variables=VOCABULARY, hidden_size=width, num_mamba_layers=layers)
        row = {"variable_ids": ids, "times": times / times.max(), "values": torch.randn(1, length)}
        row["static_values"] = torch.randn(1, config.num_static)
    else:
        fields: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers}
        if family != "ehrmamba":
            fields |= {"max_position_embeddings": max(length, 512), "num_attention_heads": 12}
        config = AutoConfig.for_model(family, **fields)
        row = {"input_ids": ids, "times": times, "ages": 50 + times / 52}
    return AutoModelForSequenceClassification.from_config(config).eval(), row


def measure_time(family: str, sizes: tuple[int, int, int], repeats: int) -> dict[str, float]:
    """Ratios of relevance and hidden attention to a forward."""
    import torch

    from ehrseq.interpretability.mamba_attention import mean_hidden_attention
    from ehrseq.interpretability.relevance_propagation import token_relevance

    model, row = model_and_row(family, *sizes)

    def forward() -> None:
        with torch.no_grad():
            model(**row)

    ways: dict[str, Callable[[], object]] = {"forward": forward, "relevance": lambda: token_relevance(model, row)}
    if family in ("ehrmamba", "hymate"):
        ways["hidden_attention"] = lambda: mean_hidden_attention(model, row)
    costs = in_turns(ways, repeats, warm_up=1)
    found = {"forward_seconds": round(costs["forward"].cpu, 4)}
    for name in ways:
        if name != "forward":
            found[name] = round(costs[name].cpu / costs["forward"].cpu, 2)
            found[f"{name}_wall"] = round(costs[name].wall / costs["forward"].wall, 2)
    return found


def raised_peak(
    explain: Callable[[Any, dict[str, Any]], Any], family: str, layers: int, width: int, length: int
) -> float:
    """How far explaining a row raises the peak of this process, MiB."""
    model, row = model_and_row(family, layers, width, length)
    short = {name: channel if name == "static_values" else channel[:, :64] for name, channel in row.items()}
    explain(model, short)  # libraries load what they need
    before, peak = peak_of(lambda: explain(model, row))
    return (peak - before) / MIB


def peak_in_a_process(module: str, family: str, layers: int, width: int, length: int) -> float:
    """What `raised_peak` gives in an interpreter of its own, by the option `--child` of a benchmark."""
    return float(in_a_process(module, "--child", json.dumps([family, layers, width]), "--length", length)[-1])


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--only", nargs="*", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--quick", action="store_true", help="2 layers, 48 wide, 200 tokens: does it run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        from ehrseq.interpretability.relevance_propagation import token_relevance

        print(raised_peak(token_relevance, *json.loads(options.child), options.length))
        return
    result: dict[str, Any] = {}
    for family in options.families:
        layers, width, length = sizes = (QUICK if options.quick else SIZES)[family]
        found: dict[str, Any] = {"layers": layers, "width": width, "tokens": length}
        if "time" in options.only:
            found |= measure_time(family, sizes, options.repeats)
        if "memory" in options.only:
            half, whole = (peak_in_a_process(MODULE, family, layers, width, tokens) for tokens in (length // 2, length))
            found |= {"peak_mib_half_length": round(half, 1), "peak_mib": round(whole, 1)}
        result[family] = found
    finish(result, options.output)


if __name__ == "__main__":
    main()

"""What integrated gradients cost: against one forward of the same row, in time, and in memory at two lengths.

A random model of each family reads one row (sizes as in bench_relevance). Time is CPU seconds, medians over rounds in
which forward and method take turns, and the ratio to the forward. Memory is how far the peak of the process lies above
what was held before, each length in a process of its own: it may double with the length, and no more. (BigBird's
attention is transformers', which writes a matrix of all pairs.)

    OMP_NUM_THREADS=2 python -m benchmarks.speed.bench_integrated_gradients --output runs/bench/gradients.json
    python -m benchmarks.speed.bench_integrated_gradients --quick
"""

import argparse
import json
from typing import Any

from benchmarks.harness import benchmark_parser, finish, in_turns
from benchmarks.speed.bench_relevance import FAMILIES, QUICK, SIZES, model_and_row, peak_in_a_process, raised_peak

MODULE = "benchmarks.speed.bench_integrated_gradients"
NODES = 32
UNKNOWN, EVENT = 1, 5  # id of [UNK], and the type of all other tokens


def explain_row(model: Any, row: dict[str, Any], nodes: int) -> Any:
    """Integrated gradients of a row, from [PAD] in the place of every token, or from values of 0."""
    import torch

    from ehrseq.interpretability.gradient_integrals import integrate_gradients
    from ehrseq.interpretability.gradients import event_line, ready_for_gradients, stay_line

    with ready_for_gradients("integrated_gradients", model):
        if "input_ids" in row:
            moves = torch.ones_like(row["input_ids"], dtype=torch.bool)
            line = event_line(model, row, moves, "padding", [EVENT] * model.config.vocab_size, UNKNOWN)
        else:
            line = stay_line(model, row, ["values"])
        return integrate_gradients(model, line, 0, nodes)


def measure_time(family: str, sizes: tuple[int, int, int], repeats: int, nodes: int) -> dict[str, float]:
    """Seconds of a forward, and how many of them the method takes."""
    import torch

    model, row = model_and_row(family, *sizes)

    def forward() -> None:
        with torch.no_grad():
            model(**row)

    costs = in_turns({"forward": forward, "gradients": lambda: explain_row(model, row, nodes)}, repeats, warm_up=1)
    found = {"forward_seconds": round(costs["forward"].cpu, 4)}
    found["forwards"] = round(costs["gradients"].cpu / costs["forward"].cpu, 1)
    found["forwards_wall"] = round(costs["gradients"].wall / costs["forward"].wall, 1)
    return found


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--nodes", type=int, default=NODES, help="of the integral")
    parser.add_argument("--layers", type=int, help="instead of the paper's number")
    parser.add_argument("--quick", action="store_true", help="2 layers, 48 wide, 200 tokens: does it run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        # More nodes than two come one after the other.
        print(raised_peak(lambda model, row: explain_row(model, row, 2), *json.loads(options.child), options.length))
        return
    result: dict[str, Any] = {"nodes": options.nodes}
    for family in options.families:
        layers, width, length = (QUICK if options.quick else SIZES)[family]
        sizes = (options.layers or layers, width, length)
        one, two = (peak_in_a_process(MODULE, family, *sizes[:2], tokens) for tokens in (length, 2 * length))
        result[family] = {
            "layers": sizes[0],
            "width": width,
            "tokens": length,
            **measure_time(family, sizes, options.repeats, options.nodes),
            "peak_mib": round(one, 1),
            "peak_mib_double_length": round(two, 1),
        }
    finish(result, options.output)


if __name__ == "__main__":
    main()

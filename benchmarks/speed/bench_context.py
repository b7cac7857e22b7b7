"""Training speed and memory by context: EhrMamba against BigBird and dense attention of equal size.

All three have the same embedding layer, width and vocabulary, and as many weights (those of places in the sequence are
not counted: they grow with the context, and EhrMamba has none). A step is forward, loss over the vocabulary (next token
or masked events), backward and AdamW on full rows, about 4,096 tokens a step, or one row. Each figure comes from a
process of its own, with a limit on its memory; the systems take turns. BigBird is transformers', in
`EhrBigBirdForMaskedLM`; dense attention is `CehrBertForMaskedLM` without dropout of its weights, so that PyTorch's fast
kernel can be used.

    python -m benchmarks.speed.bench_context --output runs/bench/context.json
    python -m benchmarks.speed.bench_context --quick
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.harness import benchmark_parser, finish, in_turns
from benchmarks.speed.bench_memory import MIB, peak_of

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
SYSTEMS = ("ehrmamba", "bigbird", "dense")
TOKENS_A_STEP = 4096
OUT_OF_MEMORY = 12  # exit code of a measurement that met the limit


def make_model(system: str, length: int, width: int, layers: int, vocabulary: int) -> Any:
    """The model of a system, with EhrMamba's number of weights."""
    from ehrseq import (
        CehrBertConfig,
        CehrBertForMaskedLM,
        EhrBigBirdConfig,
        EhrBigBirdForMaskedLM,
        EhrMambaConfig,
        EhrMambaForCausalLM,
    )

    shared = {"vocab_size": vocabulary, "hidden_size": width, "max_position_embeddings": length}
    ours = EhrMambaForCausalLM(EhrMambaConfig(**shared, num_hidden_layers=layers))
    if system == "ehrmamba":
        return ours
    config_class, model_class = {
        "bigbird": (EhrBigBirdConfig, EhrBigBirdForMaskedLM),
        "dense": (CehrBertConfig, CehrBertForMaskedLM),
    }[system]
    fields = {**shared, "num_hidden_layers": max(1, layers // 2), "num_attention_heads": max(1, width // 64)}
    fields["attention_probs_dropout_prob"] = 0.0
    # A layer of attention has about twice the weights of a Mamba block; the feed-forward width makes up the rest.
    lowest = weights_of(model_class(config_class(**fields, intermediate_size=1)))
    per_unit = fields["num_hidden_layers"] * (2 * width + 1)
    intermediate = max(1, 1 + round((weights_of(ours) - lowest) / per_unit))
    return model_class(config_class(**fields, intermediate_size=intermediate))


def weights_of(model: Any) -> int:
    """Number of weights without the vectors of places."""
    return sum(weight.numel() for name, weight in model.named_parameters() if "position_embeddings" not in name)


def measure_one(system: str, length: int, width: int, layers: int, vocabulary: int, steps: int) -> dict[str, Any]:
    """Seconds of a step and the peak of memory above what is held between steps."""
    import torch

    torch.manual_seed(0)
    model = make_model(system, length, width, layers, vocabulary).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows = max(1, TOKENS_A_STEP // length)
    ids = torch.randint(10, vocabulary, (rows, length))
    times = torch.rand(rows, length).cumsum(1)
    labels = ids if system == "ehrmamba" else ids.masked_fill(torch.rand(ids.shape) > 0.15, -100)

    def step() -> None:
        model(input_ids=ids, times=times, ages=50 + times / 52, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # kernels and the optimiser's state
    before, peak = peak_of(step)
    costs = in_turns({"step": step}, steps)["step"]
    tokens = rows * length
    return {
        "weights": weights_of(model),
        "tokens_per_second": tokens / costs.wall,
        "tokens_per_cpu_second": tokens / costs.cpu,
        "peak_mib": (peak - before) / MIB,
        "rows": rows,
    }


def in_own_process(options: argparse.Namespace, system: str, length: int) -> dict[str, Any] | None:
    """One measurement in a fresh process; None where it needs more memory than it may have."""
    sizes = [options.width, options.layers, options.vocabulary, options.steps]
    command = [sys.executable, __file__, "--threads", str(options.threads), "--limit_gib", str(options.limit_gib)]
    done = subprocess.run(
        [*command, "--child", system, *map(str, [length, *sizes])], capture_output=True, text=True, check=False
    )
    if done.returncode == OUT_OF_MEMORY:
        return None
    if done.returncode != 0:
        raise RuntimeError(f"{system} at {length} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(options: argparse.Namespace) -> None:
    """One measurement, printed as JSON."""
    limit = int(options.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    system, *sizes = options.child
    try:
        print(json.dumps(measure_one(system, *map(int, sizes))))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        sys.exit(OUT_OF_MEMORY)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, the systems in turns."""
    lengths = options.lengths
    if options.quick:
        options.width, options.layers, options.vocabulary, options.steps, lengths = 64, 2, 200, 1, [512]
    found: dict[int, dict[str, Any]] = {}
    for length in lengths:
        rounds: dict[str, list[dict[str, Any] | None]] = {system: [] for system in SYSTEMS}
        for _ in range(options.repeats):
            for system in SYSTEMS:
                if None not in rounds[system]:
                    rounds[system].append(in_own_process(options, system, length))
        found[length] = {system: _median(each) for system, each in rounds.items()}
        print(json.dumps({length: found[length]}), file=sys.stderr, flush=True)
    return {
        "hidden_size": options.width,
        "ehrmamba_layers": options.layers,
        "vocabulary": options.vocabulary,
        "limit_gib": options.limit_gib,
        "by_length": found,
        "ratios": {length: _ratios(entry) for length, entry in found.items()},
    }


def _median(rounds: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Medians over the rounds, None where one ran out of memory."""
    known = [each for each in rounds if each is not None]
    if len(known) < len(rounds):
        return None
    return {name: statistics.median(each[name] for each in known) for name in known[0]}


def _ratios(entry: dict[str, Any]) -> dict[str, float | None]:
    """EhrMamba's speed over each other system's, and its memory as a share of theirs."""
    ours = entry["ehrmamba"]
    result: dict[str, float | None] = {}
    for system in SYSTEMS[1:]:
        other = entry[system]
        both = ours is not None and other is not None
        result[f"speed over {system}"] = ours["tokens_per_second"] / other["tokens_per_second"] if both else None
        result[f"memory of {system}"] = ours["peak_mib"] / other["peak_mib"] if both else None
    return result


def main() -> None:
    """Measure, print and, if asked, write the result."""
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument(
        "--layers", type=int, default=12, help="blocks of EhrMamba; the others have half as many layers"
    )
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=3, help="steps of a process; a figure is their median")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit_gib", type=float, default=16.0, help="memory that a process may have")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    if options.child:
        child(options)
    else:
        finish(measure(options), options.output)


if __name__ == "__main__":
    main()

"""A training step of EhrMamba's classifier: packed patients against padded ones, same patients, same run.

Lengths are those of records: lognormal with median 200 and mean 336 tokens before the cut at 2048 (an even draw: the
quantiles of that distribution). The same rows go through the collators that training uses:

    packed        as few rows of at most 2048 tokens as hold them (`DataCollatorForPackedPrompts`)
    padded        every patient padded to 2048 tokens, which a fixed shape asks for
    padded_batch  every patient padded to the longest of the batch (Trainer's default)

All three give the same losses and gradients; that is checked first.

    python -m benchmarks.speed.bench_packing --output runs/bench/packing.json
    python -m benchmarks.speed.bench_packing --quick
"""

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import benchmark_parser, finish, in_turns
from ehrseq.batches.collation import DataCollatorForPrompts
from ehrseq.batches.packing import DataCollatorForPackedPrompts, PackableRows
from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForSequenceClassification

CHANNELS = ["input_ids", "attention_mask", "token_type_ids", "times", "ages", "visit_orders", "visit_segments"]
CONTEXT, MEDIAN, MEAN, SHORTEST = 2048, 200, 336, 8
VOCABULARY = 1000


def record_lengths(patients: int, scale: float = 1.0) -> list[int]:
    """Quantiles of the lognormal distribution of lengths, cut at the context."""
    normal = NormalDist(math.log(MEDIAN), math.sqrt(2 * math.log(MEAN / MEDIAN)))
    exact = [math.exp(normal.inv_cdf((rank + 0.5) / patients)) for rank in range(patients)]
    return [round(min(max(length, SHORTEST), CONTEXT) * scale) for length in exact]


def make_rows(lengths: list[int]) -> list[dict]:
    """Random patients of these lengths, in random order."""
    rng = np.random.default_rng(0)
    rows = []
    for length in rng.permutation(lengths):
        times = rng.exponential(0.3, length).cumsum().astype(np.float32)
        rows.append(
            {
                "input_ids": rng.integers(10, VOCABULARY, length),
                "attention_mask": np.ones(length, np.int64),
                "token_type_ids": rng.integers(0, 13, length),
                "times": times,
                "ages": 50 + times / 52,
                "visit_orders": np.arange(length) // 10,
                "visit_segments": 1 + np.arange(length) // 10 % 2,
                "labels": rng.integers(0, 2),
                "task_ids": 0,
            }
        )
    return rows


def training_step(model: EhrMambaForSequenceClassification, batch: Mapping[str, Tensor]) -> Callable[[], list[Tensor]]:
    """A function that runs forward and backward: [loss, gradient of every weight]."""
    weights = list(model.parameters())

    def step() -> list[Tensor]:
        loss = model(**batch).loss
        return [loss.detach(), *torch.autograd.grad(loss, weights)]

    return step


def measure(patients: int, width: int, layers: int, scale: float, repeats: int) -> dict[str, object]:
    """Check that the ways agree, then time them in turns."""
    torch.manual_seed(0)
    context = round(CONTEXT * scale)
    config = EhrMambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        hidden_dropout_prob=0.0,
        classifier_dropout=0.0,
    )
    model = EhrMambaForSequenceClassification(config).train()
    tokenizer = SimpleNamespace(model_input_names=CHANNELS, padding_side="right")
    rows = make_rows(record_lengths(patients, scale))
    batches = {
        "packed": DataCollatorForPackedPrompts(tokenizer, context)(list(PackableRows(rows))),
        "padded": DataCollatorForPrompts(tokenizer, pad_to_multiple_of=context)(rows),
        "padded_batch": DataCollatorForPrompts(tokenizer)(rows),
    }
    steps = {name: training_step(model, batch) for name, batch in batches.items()}
    results = {name: step() for name, step in steps.items()}  # the warm-up as well
    worst = max(
        ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
        for name in ("packed", "padded_batch")
        for a, b in zip(results[name], results["padded"], strict=True)
    )
    del results
    costs = in_turns(steps, repeats)
    return {
        "patients": patients,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "context": context,
        "real_tokens": sum(len(row["input_ids"]) for row in rows),
        "tokens": {name: batch["input_ids"].numel() for name, batch in batches.items()},
        "rows": {name: len(batch["input_ids"]) for name, batch in batches.items()},
        "cpu_seconds_a_step": {name: cost.cpu for name, cost in costs.items()},
        "ratio": costs["padded"].cpu / costs["packed"].cpu,
        "ratio_to_padded_batch": costs["padded_batch"].cpu / costs["packed"].cpu,
        "worst_relative_difference": worst,
        "repeats": repeats,
        "cpu_seconds": {name: cost.cpu_all for name, cost in costs.items()},
    }


def main() -> None:
    """Measure, print and, if asked, write the result."""
    parser = benchmark_parser(__doc__, repeats=5)
    parser.add_argument("--patients", type=int, default=16)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny model and histories an eighth as long: seconds")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    width, scale = (64, 1 / 8) if options.quick else (options.width, 1.0)
    result = measure(options.patients, width, options.layers, scale, options.repeats)
    print("| batch | rows x tokens | CPU-s a training step | slower than packed |\n|---|---:|---:|---:|")
    for name, seconds in result["cpu_seconds_a_step"].items():
        shape = f"{result['rows'][name]} x {result['tokens'][name] // result['rows'][name]}"
        print(f"| {name} | {shape} | {seconds:.2f} | {seconds / result['cpu_seconds_a_step']['packed']:.2f} |")
    print(f"Worst relative difference of loss and gradients: {result['worst_relative_difference']:.1e}")
    finish(result, options.output, show=False)


if __name__ == "__main__":
    main()

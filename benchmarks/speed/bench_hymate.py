"""Training of HyMaTE on CPU: stays a second, against the same model on transformers' Mamba block with mambapy's scan.

Lengths are those of PhysioNet-2012: lognormal with median 424, one stay in four thousand reaches 1,497 triplets (an
even draw: the quantiles of that distribution). A step is forward, backward and AdamW for a batch of 32 stays; every way
takes the same stays and weights:

    ehrseq         padded batches in random order, as Trainer's default sampler and collator make them: the model itself
                   leaves the padding out (hymate_layout.py, "joined")
    ehrseq_packed  the same stays, packed into rows of at most 2,048 triplets
    ehrseq_rows    the padded rows as they are, with masks: what the joined layout saves
    peer           transformers' mixer with mambapy in the place of ours, padded rows in random order
    peer_grouped   the peer's best case: stays of like length share a batch

The peer runs a batch in parts of 8 stays (gradients add up to the same), for its scan keeps gigabytes for a whole one.
Losses and gradients of all ways are compared first. Also measured: predicting, without gradients.

    python -m benchmarks.speed.bench_hymate --output runs/bench/hymate.json
    python -m benchmarks.speed.bench_hymate --quick
"""

import copy
import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from benchmarks.harness import benchmark_parser, finish, in_turns
from ehrseq.batches.triplet_collation import DataCollatorForPackedTriplets, DataCollatorForTriplets, PackableTriplets
from ehrseq.modeling import modeling_hymate
from ehrseq.modeling.configuration_hymate import HyMaTEConfig
from ehrseq.modeling.modeling_hymate import HyMaTEForSequenceClassification

MEDIAN, LONGEST, STAYS_OF_THE_LONGEST = 424, 1497, 4000
BATCH, PEER_PART, ROW = 32, 8, 2048
EXTRACTOR = SimpleNamespace(padding_side="right")
Batches = list[dict[str, Tensor]]


class PeerMixer(nn.Module):
    """transformers' mixer behind the signature of ours. It knows no packing: rows must hold one stay each."""

    def __init__(self, config: HyMaTEConfig):
        super().__init__()
        sizes = {"hidden_size": config.hidden_size, "state_size": config.state_size, "expand": config.expand}
        self.mixer = MambaMixer(MambaConfig(**sizes, num_hidden_layers=1, use_mambapy=True), layer_idx=0)

    def forward(self, hidden: Tensor, starts: Tensor | None = None) -> tuple[Tensor, None]:
        """[b, n, d] -> [b, n, d]."""
        if starts is not None:
            raise ValueError("the peer cannot reset its state between packed stays; give it padded rows.")
        return self.mixer(hidden), None


def peer_of(model: HyMaTEForSequenceClassification) -> HyMaTEForSequenceClassification:
    """The same model and weights on transformers' mixer."""
    peer = copy.deepcopy(model)
    for block in peer.model.mamba_layers:
        mixer = PeerMixer(model.config)
        mixer.mixer.load_state_dict(block.mixer.state_dict())
        block.mixer = mixer
    return peer


@contextmanager
def rows_as_given() -> Any:
    """Keep the model from joining the stays of a batch, which the peer's mixer could not tell apart."""
    choose = modeling_hymate.choose_layout
    modeling_hymate.choose_layout = lambda *args: choose(*args[:-1], True)
    try:
        yield
    finally:
        modeling_hymate.choose_layout = choose


def stay_lengths(stays: int, scale: float = 1.0) -> list[int]:
    """Quantiles of the lognormal distribution of lengths."""
    sigma = math.log(LONGEST / MEDIAN) / NormalDist().inv_cdf(1 - 0.5 / STAYS_OF_THE_LONGEST)
    normal = NormalDist(math.log(MEDIAN), sigma)
    return [round(scale * math.exp(normal.inv_cdf((rank + 0.5) / stays))) for rank in range(stays)]


def make_rows(lengths: list[int], config: HyMaTEConfig) -> list[dict[str, Any]]:
    """Random stays of these lengths, in random order."""
    rng = np.random.default_rng(0)
    return [
        {
            "variable_ids": rng.integers(0, config.num_variables, length),
            "times": np.sort(rng.uniform(-1, 1, length)).astype(np.float32),
            "values": rng.normal(size=length).astype(np.float32),
            "attention_mask": np.ones(length, np.int64),
            "static_values": rng.normal(size=config.num_static).astype(np.float32),
            "labels": int(rng.random() < 0.14),
        }
        for length in rng.permutation(lengths)
    ]


def make_batches(rows: list[dict[str, Any]], size: int) -> dict[str, list[Batches]]:
    """Way of batching -> batches, each a list of parts whose losses are averaged."""
    grouped = sorted(rows, key=lambda row: len(row["values"]))
    pad, pack = DataCollatorForTriplets(EXTRACTOR), DataCollatorForPackedTriplets(EXTRACTOR, ROW)

    def parts(stays: list[dict[str, Any]], part: int) -> list[Batches]:
        batches = [stays[first : first + size] for first in range(0, len(stays), size)]
        return [[pad(batch[first : first + part]) for first in range(0, size, part)] for batch in batches]

    packed = [[pack(list(PackableTriplets(rows[first : first + size])))] for first in range(0, len(rows), size)]
    return {
        "padded": parts(rows, size),
        "packed": packed,
        "padded parts": parts(rows, min(PEER_PART, size)),
        "grouped parts": parts(grouped, min(PEER_PART, size)),
    }


def gradients_of(model: nn.Module, batches: list[Batches]) -> list[Tensor]:
    """Mean loss over all batches and its gradients."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        for part in batch:
            loss = model(**part).loss / (len(batch) * len(batches))
            loss.backward()
            total += loss.item()
    order = sorted(name.replace("mixer.mixer.", "mixer.") for name, _ in model.named_parameters())
    by_name = {name.replace("mixer.mixer.", "mixer."): p.grad for name, p in model.named_parameters()}
    return [torch.tensor(total), *(by_name[name].clone() for name in order)]


def training(model: nn.Module, batches: list[Batches]) -> Callable[[], None]:
    """A function that trains on every batch once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    def step() -> None:
        for batch in batches:
            optimizer.zero_grad()
            for part in batch:
                (model(**part).loss / len(batch)).backward()
            optimizer.step()

    return step


def predicting(model: nn.Module, batches: list[Batches]) -> Callable[[], None]:
    """A function that scores every batch."""

    def step() -> None:
        model.eval()
        with torch.inference_mode():
            for batch in batches:
                for part in batch:
                    model.risk_scores(model(**{name: v for name, v in part.items() if name != "labels"}).logits)
        model.train()

    return step


def in_rows(action: Callable[[], None]) -> Callable[[], None]:
    """The same without the joined layout."""

    def wrapped() -> None:
        with rows_as_given():
            action()

    return wrapped


def largest_difference(results: dict[str, list[Tensor]], truth: str) -> float:
    """Of losses and gradients, relative to the norm of each."""
    return max(
        ((a - b).norm() / b.norm().clamp(min=1e-9)).item()
        for name in results
        for a, b in zip(results[name], results[truth], strict=True)
    )


def measure(stays: int, width: int, scale: float, repeats: int, peers: bool) -> dict[str, Any]:
    """Check that the ways agree, then time them in turns."""
    torch.manual_seed(0)
    config = HyMaTEConfig(hidden_size=width)
    model = HyMaTEForSequenceClassification(config)
    peer = peer_of(model)
    rows = make_rows(stay_lengths(stays, scale), config)
    batches = make_batches(rows, min(BATCH, stays))
    batching = {"ehrseq": "padded", "ehrseq_packed": "packed", "ehrseq_rows": "padded"}
    if peers:
        batching |= {"peer": "padded parts", "peer_grouped": "grouped parts"}
    model.eval()  # without dropout
    peer.eval()
    results, ways, learners = {}, {}, {}
    for name, way in batching.items():
        learner = copy.deepcopy(peer if name.startswith("peer") else model)
        joins = name in ("ehrseq", "ehrseq_packed")
        with nullcontext() if joins else rows_as_given():
            results[name] = gradients_of(learner, batches[way])
        learners[name] = learner.train()
        step = training(learner, batches[way])
        ways[name] = step if joins else in_rows(step)
    difference = largest_difference(results, "ehrseq")
    costs = in_turns(ways, repeats, calls={"ehrseq": 3, "ehrseq_packed": 3})
    predict = in_turns({"ehrseq": predicting(learners["ehrseq"], batches["padded"])}, 3 * repeats, warm_up=1)["ehrseq"]
    return {
        "hidden_size": width,
        "stays": stays,
        "batch_size": min(BATCH, stays),
        "triplets": sum(len(row["values"]) for row in rows),
        "longest": max(len(row["values"]) for row in rows),
        "cpu_seconds": {name: cost.cpu for name, cost in costs.items()},
        "stays_per_cpu_second": {name: stays / cost.cpu for name, cost in costs.items()},
        "predicted_stays_per_cpu_second": stays / predict.cpu,
        "ratios": {name: cost.cpu / costs["ehrseq"].cpu for name, cost in costs.items()},
        "worst_relative_difference": difference,
        "repeats": repeats,
        "all_cpu_seconds": {name: cost.cpu_all for name, cost in costs.items()},
    }


def show(result: dict[str, Any]) -> None:
    """Print a result as Markdown."""
    print("| way | CPU-s a pass | stays a CPU-second | times ehrseq's cost |\n|---|---:|---:|---:|")
    for name, seconds in result["cpu_seconds"].items():
        rate, ratio = result["stays_per_cpu_second"][name], result["ratios"][name]
        print(f"| {name} | {seconds:.2f} | {rate:.1f} | {ratio:.2f} |")
    print(f"Predicting: {result['predicted_stays_per_cpu_second']:.0f} stays a CPU-second.")
    print(f"Worst relative difference of loss and gradients: {result['worst_relative_difference']:.1e}")


def main() -> None:
    """Measure, print and, if asked, write the result."""
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--stays", type=int, default=64, help="a multiple of the batch size, 32")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-peer", action="store_true", help="ehrseq's own ways alone")
    parser.add_argument("--quick", action="store_true", help="8 stays a tenth as long: does it run?")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()  # the peer says at every start that its CUDA kernels are missing
    stays, scale = (8, 0.1) if options.quick else (options.stays, 1.0)
    result = measure(stays, options.width, scale, options.repeats, not options.no_peer)
    show(result)
    finish(result, options.output, show=False)


if __name__ == "__main__":
    main()

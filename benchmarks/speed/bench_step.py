"""One new event of patients whose state is kept: EhrMamba's step against transformers' step of the same blocks.

Both continue a state by one token, 32 blocks, 768 wide, float32. Figures are CPU seconds, medians over rounds in which
the ways take turns; "ordinary" is EhrMamba block by block with the same kernels, as it runs where the step in one call
does not apply.

    one        one event of one patient
    many       one event of each of 64 patients at once; seconds are of the whole step
    history    one event of one patient after 1k, 4k, 16k and 64k events: the state's size does not grow with them.
               The state is that after so many events; they are prefilled in chunks on a narrow model of the same depth
               (the cost of a step depends on sizes only, and a full-size prefill of 64k events takes minutes)

    python -m benchmarks.speed.bench_step --output runs/bench/step.json
    python -m benchmarks.speed.bench_step --quick
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import MambaConfig, MambaModel
from transformers.utils import logging

from benchmarks.harness import Costs, benchmark_parser, finish, in_turns
from ehrseq.modeling import fast_step
from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.ehrmamba_cache import EhrMambaCache
from ehrseq.modeling.modeling_ehrmamba import EhrMambaModel

VOCABULARY = 1000
CHUNK = 1024
PROMPT = 8  # events before the measured ones


@contextmanager
def block_by_block() -> Iterator[None]:
    """Turns the step in one call off."""
    run, fast_step.run_step = fast_step.run_step, None
    try:
        yield
    finally:
        fast_step.run_step = run


def our_step(model: EhrMambaModel, cache: EhrMambaCache) -> Callable[[], torch.Tensor]:
    """A function that continues every row of the cache by one event."""
    rows = cache.batch_size
    event = {
        "input_ids": torch.randint(1, VOCABULARY, (rows, 1)),
        "token_type_ids": torch.full((rows, 1), 9),
        "times": torch.full((rows, 1), 100.0),
        "ages": torch.full((rows, 1), 60.0),
        "visit_orders": torch.full((rows, 1), 7),
        "visit_segments": torch.full((rows, 1), 1),
    }
    return lambda: model(**event, cache_params=cache, use_cache=True).last_hidden_state


def their_step(model: MambaModel, rows: int) -> Callable[[], torch.Tensor]:
    """The same with transformers' model and cache."""
    cache = model(torch.randint(1, VOCABULARY, (rows, PROMPT)), use_cache=True).cache_params
    event = torch.randint(1, VOCABULARY, (rows, 1))
    return lambda: model(event, cache_params=cache, use_cache=True).last_hidden_state


def compare(ours: EhrMambaModel, theirs: MambaModel, rows: int, repeats: int) -> dict[str, float]:
    """Milliseconds of CPU time of one step of so many rows, each way."""
    cache = ours(torch.randint(1, VOCABULARY, (rows, PROMPT)), use_cache=True).cache_params
    step = our_step(ours, cache)
    ordinary = our_step(ours, cache.clone())

    def slow() -> None:
        with block_by_block():
            ordinary()

    costs = in_turns({"transformers": their_step(theirs, rows), "ordinary": slow, "step": step}, repeats, warm_up=1)
    result = {f"{name}_ms": round(1e3 * cost.cpu, 2) for name, cost in costs.items()}
    result["wall_ms"] = round(1e3 * costs["step"].wall, 2)
    result["times_transformers"] = round(costs["transformers"].cpu / costs["step"].cpu, 2)
    result["times_ordinary"] = round(costs["ordinary"].cpu / costs["step"].cpu, 2)
    return result


def prefilled(model: EhrMambaModel, histories: list[int]) -> dict[int, EhrMambaCache]:
    """States of one patient after so many events, in rising order, on one way through the longest history."""
    cache, states = EhrMambaCache(model.config, 1), {}
    for events in histories:
        while cache.seen_tokens < events:
            ids = torch.randint(1, VOCABULARY, (1, min(CHUNK, events - cache.seen_tokens)))
            model(ids, cache_params=cache, use_cache=True)
        states[events] = cache.clone()
    return states


def by_history(histories: list[int], layers: int, width: int, repeats: int) -> dict[str, object]:
    """Milliseconds of one event after histories of these lengths, and the largest over the smallest."""
    model = EhrMambaModel(EhrMambaConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers)).eval()
    steps = {str(events): our_step(model, state) for events, state in prefilled(model, histories).items()}
    costs: dict[str, Costs] = in_turns(steps, repeats, warm_up=2)
    medians = {name: round(1e3 * cost.cpu, 3) for name, cost in costs.items()}
    return {"width": width, "ms": medians, "spread": round(max(medians.values()) / min(medians.values()) - 1, 3)}


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__, repeats=15)
    parser.add_argument("--patients", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="2 blocks, 64 wide, short histories: does it run?")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    layers, width, narrow = (2, 64, 32) if options.quick else (32, 768, 64)
    histories = [64, 256] if options.quick else [1_000, 4_000, 16_000, 64_000]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers}
    with torch.no_grad():
        ours, theirs = EhrMambaModel(EhrMambaConfig(**sizes)).eval(), MambaModel(MambaConfig(**sizes)).eval()
        result = {
            "layers": layers,
            "width": width,
            "one": compare(ours, theirs, 1, options.repeats),
            "many": {
                "patients": options.patients,
                **compare(ours, theirs, options.patients, max(5, options.repeats // 3)),
            },
            "history": by_history(histories, layers, narrow, 4 * options.repeats),
        }
    finish(result, options.output)


if __name__ == "__main__":
    main()

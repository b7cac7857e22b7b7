"""Trajectories a second: the forecasting engine against `generate`, and against its own step and one pass of sampling.

Figures are CPU seconds, medians over rounds in which the ways take turns, one thread. A token of a row is one event of
one trajectory. The demo's model is one block, 64 wide, state 8, 1,652 tokens; the paper's 32 blocks, 768 wide.

    generate    transformers' loop of this checkout, sampling, 64 rows of one prompt
    sampled     the model's own cached step, then its head, softmax and inverse distribution function, 64 rows
    kernel      the engine's two calls of the kernels alone, without clocks, ends and estimators, 64 rows
    engine      `trajectories`: 64 slots, with clocks, ends and the estimator; its reading of records is not counted

    python -m benchmarks.speed.bench_forecast --output runs/bench/forecast.json
    python -m benchmarks.speed.bench_forecast --size paper --tokens 12 --repeats 3
    python -m benchmarks.speed.bench_forecast --size patients     1,000 patients x 20 trajectories x 30 days, two cores
    python -m benchmarks.speed.bench_forecast --quick
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from benchmarks.harness import benchmark_parser, finish, in_a_process, in_turns
from ehrseq.modeling.configuration_ehrmamba import INTERVAL_DAYS, EhrMambaConfig
from ehrseq.modeling.ehr_trajectories import ForecastPrompt, OutcomeTokens, TrajectoryRequest
from ehrseq.modeling.fast_forecast import FastSlots, why_not_fast
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
from ehrseq.modeling.trajectory_slots import NewTokens
from ehrseq.modeling.trajectory_tokens import TokenSets

ROWS = 64
SPECIALS = ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[VS]", "[VE]", "[REG]", *INTERVAL_DAYS]
SIZES: dict[str, dict[str, int]] = {
    "demo": {"hidden_size": 64, "num_hidden_layers": 1, "state_size": 8, "vocab_size": 1652},
    "paper": {"hidden_size": 768, "num_hidden_layers": 32, "state_size": 16, "vocab_size": 10_000},
    "quick": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 120},
}
RECORD = 256  # tokens


def make_model(size: str) -> EhrMambaForCausalLM:
    """A random model whose futures are visits of about ten events, some days or weeks apart."""
    torch.manual_seed(0)
    ids = {token: number for number, token in enumerate(SPECIALS)}
    config = EhrMambaConfig(**SIZES[size], special_token_ids={t: n for t, n in ids.items() if t[1] in "VRWML"})
    config.special_token_ids.pop("[MASK]", None)
    config.set_token_types(
        [4 if token in INTERVAL_DAYS else 2 for token in SPECIALS] + [9] * (config.vocab_size - len(ids))
    )
    return EhrMambaForCausalLM(config).eval()


def make_prompt(model: EhrMambaForCausalLM, key: int, tokens: int = RECORD) -> ForecastPrompt:
    """A record of random events, one visit."""
    generator = torch.Generator().manual_seed(key)
    ids = torch.randint(len(SPECIALS), model.config.vocab_size, (1, tokens), generator=generator)
    ids[0, 0], ids[0, -2], ids[0, -1] = (SPECIALS.index(token) for token in ("[VS]", "[VE]", "[REG]"))
    ones = torch.ones_like(ids)
    inputs = {
        "input_ids": ids,
        "token_type_ids": torch.tensor(model.config.token_types())[ids],
        "times": torch.linspace(0, 200, tokens)[None],
        "ages": torch.full((1, tokens), 60.0),
        "visit_orders": ones,
        "visit_segments": ones,
    }
    return ForecastPrompt(inputs, 1.0, key)


def request(model: EhrMambaForCausalLM, **changes: Any) -> TrajectoryRequest:
    """Two outcomes by Monte Carlo, `max_tokens` tokens each unless the horizon comes first."""
    first = len(SPECIALS)
    outcomes = (
        OutcomeTokens("event", np.arange(first, first + 10)),
        OutcomeTokens("death", np.array([first + 20])),
    )
    asked: dict[str, Any] = {"horizon_days": 1e9, "outcomes": outcomes, "stop_at_outcomes": False}
    return TrajectoryRequest(**(asked | changes))


def engine_seconds(model: EhrMambaForCausalLM, tokens: int, **changes: Any) -> Callable[[], None]:
    """So many tokens of 64 trajectories of one record of two tokens, whose reading costs as good as nothing."""
    short = make_prompt(model, 1, tokens=3)
    asked = request(model, num=ROWS, max_tokens=tokens, **changes)

    def run() -> None:
        (drawn,) = model.trajectories([short], asked, slots=ROWS)
        if drawn.lengths.sum() != ROWS * tokens:
            raise RuntimeError(f"{drawn.lengths.sum()} tokens were drawn, {ROWS * tokens} were to be.")

    return run


def generate(model: EhrMambaForCausalLM, tokens: int) -> Callable[[], object]:
    """The same by transformers' loop."""
    prompt = {name: channel.expand(ROWS, -1) for name, channel in make_prompt(model, 1, tokens=3).inputs.items()}
    options = {"do_sample": True, "max_new_tokens": tokens, "min_new_tokens": tokens, "top_k": 0, "pad_token_id": 0}
    return lambda: model.generate(**prompt, **options)


def sampled(model: EhrMambaForCausalLM, tokens: int) -> Callable[[], None]:
    """The model's step, and one pass of sampling in torch, channels at rest."""
    prompt = {name: channel.expand(ROWS, -1) for name, channel in make_prompt(model, 1, tokens=3).inputs.items()}
    event = {name: channel[:, -1:] for name, channel in prompt.items()}

    def run() -> None:
        cache = model(**prompt, use_cache=True).cache_params
        drawn = event["input_ids"]
        for _ in range(tokens):
            logits = model(**{**event, "input_ids": drawn}, cache_params=cache, use_cache=True).logits[:, -1]
            sums = logits.softmax(-1).cumsum(-1)
            drawn = torch.searchsorted(sums, torch.rand(ROWS, 1)).clamp(max=sums.shape[1] - 1)

    return run


def kernel(model: EhrMambaForCausalLM, tokens: int) -> Callable[[], None]:
    """The two calls that the engine makes for a token, with nothing around them."""
    slots = FastSlots(model, ROWS, TokenSets.of([np.array([30])]), 1)
    rows, ones = np.arange(ROWS), np.ones(ROWS, dtype=np.int64)
    floats = np.ones(ROWS, dtype=np.float32)

    def run() -> None:
        drawn = ones
        for _ in range(tokens):
            new = NewTokens(drawn, ones, floats, floats, ones, ones, floats)
            drawn = slots.step(rows, new).draw(np.random.default_rng(0).random(ROWS), None, None)

    return run


def tokens_a_second(size: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Every way, and the ratios that count."""
    torch.set_num_threads(1)
    model = make_model(size)
    ways: dict[str, Callable[[], object]] = {
        "generate": generate(model, tokens),
        "sampled": sampled(model, tokens),
        "engine": engine_seconds(model, tokens),
        "engine, scope": engine_seconds(model, tokens, estimator="scope"),
    }
    if why_not_fast(model) is None:
        ways["kernel"] = kernel(model, tokens)
    with torch.no_grad():
        costs = in_turns(ways, repeats, warm_up=1)
    rates = {name: round(ROWS * tokens / cost.cpu) for name, cost in costs.items()}
    return {
        **SIZES[size],
        "rows": ROWS,
        "tokens": tokens,
        "tokens_a_second": rates,
        "times_generate": round(rates["engine"] / rates["generate"], 2),
        "share_of_step_and_sampling": round(rates["engine"] / rates["sampled"], 2),
        "share_of_kernel": round(rates["engine"] / rates["kernel"], 2) if "kernel" in rates else None,
    }


def forecast_some(size: str, first: int, patients: int, num: int) -> dict[str, Any]:
    """The futures of some patients over 30 days, in this process: tokens, seconds, peak of memory."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    model = make_model(size)
    started, tokens = time.perf_counter(), 0

    def prompts() -> Iterator[ForecastPrompt]:
        for key in range(first, first + patients):
            yield make_prompt(model, key)

    for drawn in model.trajectories(prompts(), request(model, horizon_days=30.0, num=num)):
        tokens += int(drawn.lengths.sum())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))
    return {"tokens": tokens, "seconds": time.perf_counter() - started, "peak_mib": peak}


def many_patients(size: str, patients: int, num: int, workers: int) -> dict[str, Any]:
    """A thousand patients shared by processes, and the peak of memory of one process with a tenth of them and all."""
    share = -(-patients // workers)
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = [pool.submit(forecast_some, size, worker * share, share, num) for worker in range(workers)]
        answers = [part.result() for part in parts]
    wall = time.perf_counter() - started
    module = "benchmarks.speed.bench_forecast"
    peaks = {
        str(count): float(in_a_process(module, "--size", size, "--peak", count, "--num", num)[-1])
        for count in (patients // 10, patients)
    }
    return {
        "patients": patients,
        "trajectories": num,
        "record_tokens": RECORD,
        "days": 30,
        "workers": workers,
        "tokens": sum(answer["tokens"] for answer in answers),
        "wall_seconds": round(wall, 1),
        "peak_mib": peaks,
    }


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__, repeats=7)
    parser.add_argument("--size", choices=["demo", "paper", "patients", "quick"], default="demo")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of each row")
    parser.add_argument("--patients", type=int, default=1000)
    parser.add_argument("--num", type=int, default=20, help="trajectories of each patient")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peak", type=int, help="print the peak memory (MiB) of so many patients in this process")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few patients: does it run?")
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.peak is not None:
        print(
            forecast_some("demo" if options.size == "patients" else options.size, 0, options.peak, options.num)[
                "peak_mib"
            ]
        )
        return
    output: Path | None = options.output
    if options.quick:
        result = tokens_a_second("quick", 8, options.repeats)
        finish({**result, "many": many_patients("quick", 20, 2, 1)}, output)
    elif options.size == "patients":
        finish(many_patients("demo", options.patients, options.num, options.workers), output)
    else:
        finish(tokens_a_second(options.size, options.tokens, options.repeats), output)


if __name__ == "__main__":
    main()

"""Trajectories a second: the forecasting engine against `generate`, and against its own step and one pass of sampling.

Figures are CPU seconds, medians over rounds in which the ways take turns, one thread. A token of a row is one event of
one trajectory; the first one, which comes with the record, is not counted. The demo's model is one block, 64 wide,
state 8, 1,652 tokens; the paper's 32 blocks, 768 wide.

    generate    transformers' loop of this checkout, sampling, 64 rows of one prompt
    sampled     the model's own cached step, then its head, softmax and inverse distribution function, 64 rows
    kernel      the engine's two calls of the kernels alone, without clocks, ends and estimators, 64 rows
    engine      `trajectories`: 64 slots, with clocks, ends and the estimator; its reading of records is not counted

    python -m benchmarks.speed.bench_forecast --output runs/bench/forecast.json
    python -m benchmarks.speed.bench_forecast --size paper --tokens 12 --repeats 3
    python -m benchmarks.speed.bench_forecast --size patients

The last one draws 20 trajectories over 30 days of each of 1,000 simulated patients from the starting checkpoint, its
time head among it, on two cores (two processes), simulation and tokenizing included; and tells the peak memory of one
process that reads a tenth of them, and all.

    python -m benchmarks.speed.bench_forecast --quick
"""

import json
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from benchmarks.harness import benchmark_parser, finish, in_a_process, in_turns
from ehrseq.data.simulate import simulate
from ehrseq.hub.starter import STARTER_FORECAST
from ehrseq.modeling.configuration_ehrmamba import INTERVAL_DAYS, EhrMambaConfig
from ehrseq.modeling.ehr_trajectories import ForecastPrompt, OutcomeTokens, TrajectoryRequest
from ehrseq.modeling.fast_forecast import FastSlots, why_not_fast
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
from ehrseq.modeling.record_forecasts import to_prompt
from ehrseq.modeling.trajectory_slots import NewTokens
from ehrseq.modeling.trajectory_tokens import TokenSets
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

ROWS = 64
SPECIALS = ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[VS]", "[VE]", "[REG]", *INTERVAL_DAYS]
SIZES: dict[str, dict[str, int]] = {
    "demo": {"hidden_size": 64, "num_hidden_layers": 1, "state_size": 8, "vocab_size": 1652},
    "paper": {"hidden_size": 768, "num_hidden_layers": 32, "state_size": 16, "vocab_size": 10_000},
    "quick": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 120},
}
BLOCK_PATIENTS = 50  # simulated at once


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


def make_prompt(model: EhrMambaForCausalLM, key: int, tokens: int) -> ForecastPrompt:
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
    asked = request(model, num=ROWS, max_tokens=tokens + 1, **changes)

    def run() -> None:
        (drawn,) = model.trajectories([short], asked, slots=ROWS)
        if drawn.lengths.sum() != ROWS * (tokens + 1):
            raise RuntimeError(f"{drawn.lengths.sum()} tokens were drawn, {ROWS * (tokens + 1)} were to be.")

    return run


def generate(model: EhrMambaForCausalLM, tokens: int) -> Callable[[], object]:
    """The same by transformers' loop."""
    prompt = {name: channel.expand(ROWS, -1) for name, channel in make_prompt(model, 1, tokens=3).inputs.items()}
    options = {
        "do_sample": True,
        "max_new_tokens": tokens + 1,
        "min_new_tokens": tokens + 1,
        "top_k": 0,
        "pad_token_id": 0,
    }
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


def simulated_prompts(first: int, patients: int) -> Iterator[ForecastPrompt]:
    """Records of simulated patients who are alive, by the starting checkpoint's tokenizer."""
    tokenizer = EhrTokenizer.from_pretrained(STARTER_FORECAST)
    seed, left = first, patients
    while left:
        events = simulate(BLOCK_PATIENTS, seed=seed, progress=False).events()
        for frame in events.partition_by("subject_id", maintain_order=True):
            record = tokenizer.forecast_prompt(frame)
            if record.reason is None and left:
                left -= 1
                yield to_prompt(record)
        seed += 1


def forecast_some(first: int, patients: int, num: int) -> dict[str, Any]:
    """Futures of some patients over 30 days, in this process: tokens, seconds, the peak of memory."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    model = EhrMambaForCausalLM.from_pretrained(STARTER_FORECAST)
    tokenizer = EhrTokenizer.from_pretrained(STARTER_FORECAST)
    question = tokenizer.forecast_question("30d", {"death": "death", "admission": "any_admission"})
    outcomes = tuple(OutcomeTokens(each.name, each.ids, each.complement) for each in question.outcomes)
    asked = TrajectoryRequest(30.0, num=num, outcomes=outcomes, death_ids=question.death_ids, stop_at_outcomes=False)
    drawn = [0, 0]
    started = time.perf_counter()
    for each in model.trajectories(simulated_prompts(first, patients), asked):
        drawn[0] += 1
        drawn[1] += int(each.lengths.sum())
    seconds = time.perf_counter() - started
    return {
        "patients": drawn[0],
        "tokens": drawn[1],
        "seconds": seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def many_patients(patients: int, num: int, workers: int) -> dict[str, Any]:
    """A thousand patients shared by processes, and the peak memory of one process with a tenth of them and all."""
    module, share = "benchmarks.speed.bench_forecast", -(-patients // workers)
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        parts = [
            pool.submit(in_a_process, module, "--some", worker * share, share, "--num", num)
            for worker in range(workers)
        ]
        answers = [json.loads(part.result()[-1]) for part in parts]
    wall = time.perf_counter() - started
    tenth, whole = (
        json.loads(in_a_process(module, "--some", 0, count, "--num", num)[-1]) for count in (patients // 10, patients)
    )
    return {
        "patients": sum(answer["patients"] for answer in answers),
        "trajectories": num,
        "days": 30,
        "workers": workers,
        "tokens": sum(answer["tokens"] for answer in answers),
        "wall_seconds": round(wall, 1),
        "forecasting_seconds": [round(answer["seconds"], 1) for answer in answers],
        "peak_mib": {
            str(count): round(part["peak_mib"]) for count, part in ((patients // 10, tenth), (patients, whole))
        },
    }


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__, repeats=7)
    parser.add_argument("--size", choices=["demo", "paper", "patients"], default="demo")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of each row")
    parser.add_argument("--patients", type=int, default=1000)
    parser.add_argument("--num", type=int, default=20, help="trajectories of each patient")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--some", type=int, nargs=2, help="first patient, and how many, of this process alone")
    parser.add_argument("--quick", action="store_true", help="a tiny model, and two patients: does it run?")
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.some is not None:
        print(json.dumps(forecast_some(*options.some, options.num)))
    elif options.quick:
        finish({**tokens_a_second("quick", 8, options.repeats), "some": forecast_some(0, 2, 2)}, options.output)
    elif options.size == "patients":
        finish(many_patients(options.patients, options.num, options.workers), options.output)
    else:
        finish(tokens_a_second(options.size, options.tokens, options.repeats), options.output)


if __name__ == "__main__":
    main()

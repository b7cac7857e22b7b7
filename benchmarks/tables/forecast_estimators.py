r"""Estimators of a forecast against exact enumeration: how far off, how often the intervals cover, how much they vary.

The model is `markov_model.py`, six events whose next token depends on the current one alone, so that every probability
can be computed. Outcomes of a patient at the end of a visit, within 45 days, with death as the competing event, common
and rare; once with an interval token's day even over its span, once with a time head.

    off         the largest distance of the cumulative incidence (three days) from the truth, in standard errors
    covered     share of blocks of `--block` trajectories whose interval of 95 % holds the truth
    variance    that of a trajectory's number over that of Monte Carlo, p (1 - p): below 1 is better, a fifth stands
                for five times as many Monte Carlo trajectories
    seconds     of `--num` trajectories; Monte Carlo and SCOPE serve all outcomes with one pool, REACH needs one each

    python -m benchmarks.tables.forecast_estimators --output runs/estimators          # some minutes on one thread
    python -m benchmarks.tables.forecast_estimators --output /tmp/estimators --quick  # does it run?
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import machine, write_json
from benchmarks.tables.markov_model import ID, Enumeration, markov_model, markov_prompt
from ehrseq.modeling import trajectory_slots
from ehrseq.modeling.ehr_trajectories import ESTIMATORS, OutcomeTokens, TrajectoryRequest
from ehrseq.modeling.outcome_estimates import estimate_outcomes, standard_errors

OUTCOMES = {
    "next visit": ["[VS]"],
    "A": ["A"],
    "B or LAB": ["B", "LAB"],
    "death": ["DEATH"],
    "rare": ["RARE"],
    "rarer": ["RARER"],
}
DAYS = (5.0, 20.0, 45.0)
SLOTS = 4096
LABELS = {"monte_carlo": "Monte Carlo", "scope": "SCOPE", "reach": "REACH"}


def measure(num: int, block: int, *, time_head: bool, seed: int, steps_a_day: int = 16) -> list[dict[str, Any]]:
    """One entry an outcome and estimator.

    Args:
        num: Trajectories, of REACH for each outcome.
        block: Trajectories of a block whose interval is looked at.
        time_head: Which of the two models.
        seed: Of the trajectories.
        steps_a_day: Of the enumeration.
    """
    model, prompt = markov_model(time_head=time_head), markov_prompt(["[VS]", "A", "[VE]", "[REG]"])
    exact = {}
    for name, tokens in OUTCOMES.items():
        enumeration = Enumeration(tokens, days=45, time_head=time_head, steps_a_day=steps_a_day)
        by_day = enumeration.first("[REG]")
        exact[name] = np.array([enumeration.at(by_day, day) for day in DAYS])
    sets = {name: OutcomeTokens(name, np.array(sorted(ID[token] for token in OUTCOMES[name]))) for name in OUTCOMES}
    rows = []
    for estimator in ESTIMATORS:
        pools = [(outcome,) for outcome in sets.values()] if estimator == "reach" else [tuple(sets.values())]
        for outcomes in pools:
            request = TrajectoryRequest(
                horizon_days=DAYS[-1],
                num=num,
                seed=seed,
                outcomes=outcomes,
                estimator=estimator,
                grid_days=DAYS,
                death_ids=(ID["DEATH"],),
                stop_at_outcomes=False,
            )
            start = time.perf_counter()
            (answer,) = model.trajectories([prompt], request, slots=SLOTS)
            seconds = time.perf_counter() - start
            for column, estimate in enumerate(estimate_outcomes(answer, request)):
                truth = exact[estimate.name]
                values = answer.incidence[:, column, -1]
                off = np.abs((np.array(estimate.incidence) - truth) / estimate.incidence_errors)
                blocks = values[: len(values) // block * block].reshape(-1, block).T
                errors = standard_errors(blocks, is_binary=estimator == "monte_carlo")
                covered = np.abs(blocks.mean(0) - truth[-1]) <= 1.96 * errors
                rows.append(
                    {
                        "outcome": estimate.name,
                        "truth": float(truth[-1]),
                        "estimator": estimator,
                        "estimate": estimate.probability,
                        "standard_error": estimate.standard_error,
                        "off": float(off.max()),
                        "covered": float(covered.mean()),
                        "covered_error": float(np.sqrt(0.05 * 0.95 / covered.size)),
                        "variance": float(values.var() / (truth[-1] * (1 - truth[-1]))),
                        "tokens": int(answer.lengths.sum()),
                        "seconds": seconds,
                    }
                )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row an outcome, the three estimators side by side in each cell."""
    names = " / ".join(LABELS.values())
    lines = [
        f"| outcome | probability | off in standard errors: {names} | 95 % interval covers | variance, of Monte Carlo "
        "1: SCOPE / REACH |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in OUTCOMES:
        of = {row["estimator"]: row for row in rows if row["outcome"] == name}
        cells = [
            f"{of['scope']['truth']:.5f}",
            " / ".join(f"{of[estimator]['off']:.1f}" for estimator in ESTIMATORS),
            " / ".join(f"{of[estimator]['covered']:.1%}" for estimator in ESTIMATORS),
            " / ".join(f"{of[estimator]['variance']:.2g}" for estimator in ESTIMATORS[1:]),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seconds = {estimator: [row["seconds"] for row in rows if row["estimator"] == estimator] for estimator in ESTIMATORS}
    told = [
        f"{LABELS[estimator]} {np.mean(times):.1f} s{' an outcome' if estimator == 'reach' else ''}"
        for estimator, times in seconds.items()
    ]
    return "\n".join([*lines, "", f"Seconds: {', '.join(told)}."])


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of result.json")
    parser.add_argument("--num", type=int, default=100_000, help="trajectories")
    parser.add_argument("--num-time-head", type=int, help="trajectories of the model with a time head (a fifth)")
    parser.add_argument("--block", type=int, default=60, help="trajectories of a block")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few trajectories: does it run?")
    options = parser.parse_args(arguments)
    num = 600 if options.quick else options.num
    if min(num, options.block) < 2 or num < options.block:
        parser.error(f"--num {num} and --block {options.block}: expected at least 2, and a block among them")
    trajectory_slots.BLOCK_SLOTS = SLOTS  # a model this small is read fastest in few large blocks
    result: dict[str, Any] = {"machine": machine(), "options": {"num": num, "block": options.block}}
    for time_head in (False, True):
        count = max(options.block, options.num_time_head or num // 5) if time_head else num
        name = "time_head" if time_head else "spans"
        steps = 4 if options.quick else 16
        result[name] = measure(count, options.block, time_head=time_head, seed=options.seed, steps_a_day=steps)
        words = "with a time head" if time_head else "days even over an interval token's span"
        error = result[name][0]["covered_error"]
        print(f"\n{words}; {count:,} trajectories, blocks of {options.block} (standard error of a rate {error:.1%})\n")
        print(table(result[name]))
    write_json(result, options.output / "result.json")


if __name__ == "__main__":
    main(sys.argv[1:])

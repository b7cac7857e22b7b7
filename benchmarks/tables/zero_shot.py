r"""Zero-shot risks on simulated patients, whose true risk is known: forecasts beside what was trained for the tasks.

A pretrained model that never saw a label draws futures of each held-out patient at each labelled time; how often the
outcome comes is its risk. Beside it stand, on the same labels: the model that was finetuned on the tasks, boosting on
counts, and the best possible score. Every figure has its interval over patients.

    AUROC                  how well patients are ranked (0.5 = chance)
    of the way             (AUROC - 0.5) / (best possible AUROC - 0.5)
    Brier                  mean squared error of the risk
    mean risk              beside the prevalence: is the risk right on average?
    slope                  of the calibration: 1 is right, below 1 the risks are too extreme. Of n trajectories a risk p
                           is taken as (n p + 1/2) / (n + 1), since log-odds of 0 are infinite
    rows, tokens, seconds  what the trajectories of all rows of a horizon cost

Patients are those of `ehrseq demo` (4,000 of seed 0, the same splits), so that the checkpoint that comes with the
package is the finetuned model and has not seen the held-out ones. Each estimator's draws are kept: a run that was
stopped goes on.

    python -m benchmarks.tables.zero_shot --output runs/zero_shot --model CHECKPOINT    # about 12 minutes on one thread
    python -m benchmarks.tables.zero_shot --output runs/zero_shot --report              # the table of what is there
    python -m benchmarks.tables.zero_shot --output /tmp/zero_shot --quick               # does it run?

Without --model the model is pretrained here, by the budget of `ehrseq benchmark`.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from benchmarks.harness import machine, write_json, write_parquet
from ehrseq.benchmark.budget import Budget
from ehrseq.benchmark.cells import PretrainCell, pretrain_cell
from ehrseq.benchmark.data import Source
from ehrseq.benchmark.results import TaskResult, TaskScores, read_scores, task_result
from ehrseq.benchmark.run import run_benchmark
from ehrseq.data.dataset import EventDataset, write_dataset
from ehrseq.data.schema import LABEL_KEYS
from ehrseq.data.simulate.cohort import SIMULATED_TASKS, simulate, simulated_name
from ehrseq.data.splits import uniform_of
from ehrseq.evaluation import Interval, bootstrap_interval
from ehrseq.evaluation.calibration import Calibration
from ehrseq.forecasting.prompts import has_time_head, load_forecaster, records_at
from ehrseq.forecasting.task_forecast import TaskForecast
from ehrseq.forecasting.task_outcomes import task_outcome
from ehrseq.hub.families import STARTER
from ehrseq.modeling.ehr_trajectories import ESTIMATORS, TrajectoryRequest
from ehrseq.modeling.outcome_estimates import estimate_outcomes
from ehrseq.modeling.record_forecasts import to_prompt
from ehrseq.pipelines.ehr_forecast import EhrForecastPipeline
from ehrseq.prediction.risks import predict_risks
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.work.files import write_whole

COUNTS, FINETUNED = "xgboost", "finetuned"
TITLES = {
    "monte_carlo": "zero-shot, Monte Carlo",
    "scope": "zero-shot, SCOPE",
    "reach": "zero-shot, REACH",
    FINETUNED: "EhrMamba, finetuned",
    COUNTS: "boosting on counts",
}
ROWS = "rows.parquet"


@dataclass(frozen=True)
class Horizon:
    """Tasks that the same trajectories answer.

    Attributes:
        name: Of its files.
        tasks: What is asked.
    """

    name: str
    tasks: tuple[TaskForecast, ...]


# -- the labelled rows, and what was trained on them -----------------------------------------------------------------


def prepare(options: argparse.Namespace) -> tuple[Source, Budget]:
    """Simulate, label, and train boosting on counts, where that is not done."""
    dataset = options.output / "dataset"
    if not dataset.is_dir():
        cohort = simulate(options.patients, options.seed, progress=False)
        name = simulated_name(options.seed)
        write_whole(dataset, lambda path: write_dataset(cohort.events(), path, dataset_name=name))
    budget = replace(Budget.read("quick"), max_rows_per_task=options.max_rows)
    if options.quick:
        small: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "context": 64, "pretrain_tokens": 2000}
        budget = replace(budget, **small, name="zero_shot_quick")
    folder = options.output / "benchmark"
    run_benchmark(dataset, out=folder, tasks=options.tasks, models=[COUNTS], budget=budget, workers=1, num_resamples=10)
    return Source(str(folder.resolve()), str(dataset.resolve()), None, tuple(options.tasks)), budget


def finetuned_scores(checkpoint: Path, events: pl.DataFrame, rows: Sequence[TaskScores]) -> pl.DataFrame:
    """task, subject_id, prediction_time, score of the model that was trained for the tasks; those that it knows."""
    labels = {each.task: each.rows.select(*LABEL_KEYS) for each in rows}
    risks, _ = predict_risks(checkpoint, events, labels=labels, progress=False)
    return risks.select("task", *LABEL_KEYS, "score")


def of_some_patients(rows: Sequence[TaskScores], share: float) -> list[TaskScores]:
    """The rows of a share of the patients, the same ones for all tasks."""
    if share == 1.0:
        return list(rows)
    some = []
    for each in rows:
        kept = uniform_of(each.rows["subject_id"].to_numpy(), seed=1) < share  # that of the splits is another one
        scores = {name: values[:, kept] for name, values in each.scores.items()}
        some.append(replace(each, rows=each.rows.filter(pl.Series(kept)), scores=scores))
    return some


# -- forecasts ---------------------------------------------------------------------------------------------------------


def horizons(tasks: Sequence[str], forecaster: EhrForecastPipeline) -> tuple[list[Horizon], dict[str, str]]:
    """Tasks by what may be drawn together, and why others cannot be forecast."""
    together: dict[Any, list[TaskForecast]] = {}
    tokenizer: Any = forecaster.tokenizer
    refused = {}
    for name in tasks:
        try:
            asked = task_outcome(name, tokenizer.vocabulary, time_head=has_time_head(forecaster))
        except ValueError as error:
            refused[name] = str(error)
            continue
        key = (asked.horizon_days, asked.until_ids, asked.death_ids, asked.outcome.complement)
        together.setdefault(key, []).append(asked)
    return [Horizon(f"{key[0]:g}d-{place}", tuple(each)) for place, (key, each) in enumerate(together.items())], refused


def draw(
    horizon: Horizon, estimator: str, model: Any, prompts: Sequence[Any], rows: pl.DataFrame, num: int
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Risks of all tasks of a horizon at all times, and what they cost."""
    first = horizon.tasks[0]
    request = TrajectoryRequest(
        horizon_days=first.horizon_days,
        num=num,
        outcomes=tuple(replace(each.outcome, name=each.name) for each in horizon.tasks),
        estimator=estimator,  # type: ignore[arg-type]  # one of ESTIMATORS
        until_ids=first.until_ids,
        death_ids=first.death_ids,
    )
    start = time.perf_counter()
    frames, tokens, cut = [], 0, 0.0
    for row, trajectories in zip(rows.iter_rows(), model.trajectories(prompts, request), strict=True):
        tokens += int(trajectories.lengths.sum())
        for estimate in estimate_outcomes(trajectories, request):
            cut += estimate.cut
            frames.append((estimate.name, *row, estimate.probability, estimate.standard_error))
    seconds = time.perf_counter() - start
    schema = ["task", *LABEL_KEYS, "score", "standard_error"]
    table = pl.DataFrame(frames, schema=schema, orient="row").with_columns(
        pl.col("prediction_time").cast(pl.Datetime("us"))
    )
    cost: dict[str, Any] = {"horizon": horizon.name, "estimator": estimator}
    cost |= {"tasks": [each.name for each in horizon.tasks], "notes": {t.name: t.notes for t in horizon.tasks}}
    cost |= {"times": len(prompts), "num": num, "tokens": tokens, "seconds": seconds, "cut": cut / max(1, len(frames))}
    return table, cost


def forecast(
    options: argparse.Namespace, forecaster: EhrForecastPipeline, events: pl.DataFrame, rows: Sequence[TaskScores]
) -> tuple[pl.DataFrame, list[dict[str, Any]], dict[str, str]]:
    """estimator, task, subject_id, prediction_time, score of all tasks, costs, and why tasks were refused."""
    asked, refused = horizons([each.task for each in rows], forecaster)
    low, high = options.days
    for horizon in asked:
        if not low <= horizon.tasks[0].horizon_days <= high:
            refused |= {each.name: f"its horizon is outside of --days {low:g} {high:g}" for each in horizon.tasks}
    asked = [horizon for horizon in asked if horizon.tasks[0].name not in refused]
    if not asked:
        raise SystemExit(f"none of the tasks is drawn: {refused}")
    by_task = {each.task: each.rows.select(*LABEL_KEYS) for each in rows}
    tables, costs = [], []
    for horizon in asked:
        times = pl.concat([by_task[each.name] for each in horizon.tasks]).unique().sort(*LABEL_KEYS)
        prompts = None
        for estimator in options.estimators:
            file = options.output / "draws" / f"{horizon.name}-{estimator}.parquet"
            if not file.is_file():
                if prompts is None:
                    read = [record for _, _, record in records_at(forecaster, events, times)]
                    silent = sum(each.reason is not None for each in read)
                    if silent:
                        raise SystemExit(
                            f"{silent} labelled times have nothing to forecast; are they labels of these data?"
                        )
                    prompts = [to_prompt(each) for each in read]
                num = options.n if estimator != "reach" else options.n_reach
                table, cost = draw(horizon, estimator, forecaster.model, prompts, times, num)
                print(f"{cost}", file=sys.stderr, flush=True)
                write_json(cost, file.with_suffix(".json"))
                write_parquet(table, file)
            tables.append(pl.read_parquet(file).with_columns(estimator=pl.lit(estimator)))
            costs.append(_read_json(file.with_suffix(".json")))
    return pl.concat(tables), costs, refused


def _read_json(file: Path) -> dict[str, Any]:
    import json

    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


# -- the table ---------------------------------------------------------------------------------------------------------


def all_scores(options: argparse.Namespace, rows: Sequence[TaskScores], table: pl.DataFrame) -> list[TaskScores]:
    """Every system on the rows of each task; a system that does not know a task is absent there."""
    found = []
    for each in rows:
        scores = dict(each.scores)
        of_task = table.filter(pl.col("task") == each.task)
        for name in (FINETUNED, *options.estimators):
            of_system = of_task.filter(pl.col("system") == name).select(*LABEL_KEYS, "score")
            if of_system.is_empty():
                continue
            joined = each.rows.join(of_system, on=list(LABEL_KEYS), how="left", maintain_order="left")["score"]
            if joined.null_count():
                raise SystemExit(f"{name} has no score at {joined.null_count()} labelled times of {each.task}.")
            scores[name] = joined.to_numpy()[None]
        thresholds = {name: [0.5] for name in scores}
        ordered = {name: scores[name] for name in TITLES if name in scores}
        found.append(TaskScores(each.task, each.rows, ordered, thresholds))
    return found


def slope_of(truth: np.ndarray, scores: np.ndarray, subjects: np.ndarray, num: int | None) -> Interval:
    """Calibration slope with its interval over patients; of trajectories see the module's text."""
    moved = scores if num is None else (num * scores + 0.5) / (num + 1)
    return bootstrap_interval(Calibration(truth, moved).slope, subjects, num_resamples=200)


def entries(options: argparse.Namespace, scores: Sequence[TaskScores]) -> Iterator[dict[str, Any]]:
    """One entry a task and system."""
    for each in scores:
        result: TaskResult = task_result(each, COUNTS, num_resamples=options.resamples)
        truth, subjects = each.rows["label"].to_numpy(), each.rows["subject_id"].to_numpy()
        shared = {
            "task": each.task,
            "labels": result.labels,
            "patients": result.patients,
            "positives": result.positives,
        }
        shared |= {"best possible": result.best_possible, "reason": result.reason}
        for name, values in each.scores.items():
            entry: dict[str, Any] = {**shared, "system": name, "mean risk": float(values[0].mean())}
            if result.reason is None:
                num = {"reach": options.n_reach, FINETUNED: None, COUNTS: None}.get(name, options.n)
                measured = result.systems[name]
                entry |= {"auroc": measured.metrics["auroc"], "brier": measured.metrics["brier"]}
                entry |= {"over counts": measured.differences.get("auroc")}
                entry |= {"slope": slope_of(truth, values[0], subjects, num)}
            yield entry


def report(found: Sequence[dict[str, Any]], costs: Sequence[dict[str, Any]], refused: dict[str, str]) -> Iterator[str]:
    """Lines of Markdown tables."""
    tasks = list(dict.fromkeys(entry["task"] for entry in found))
    by = {(entry["task"], entry["system"]): entry for entry in found}
    head = {name: by[name, COUNTS] for name in tasks}

    def table(title: str, cell: Any) -> Iterator[str]:
        yield f"| {title} | {' | '.join(tasks)} |"
        yield f"|---|{'---:|' * len(tasks)}"
        for system, name in TITLES.items():
            if any((task, system) in by for task in tasks):
                cells = [cell(by[task, system]) if (task, system) in by else "" for task in tasks]
                yield f"| {name} | {' | '.join(cells)} |"

    yield from table("AUROC", lambda entry: _told(entry.get("auroc"), entry["reason"]))
    best = [f"{head[task]['best possible']:.3f}" if head[task]["best possible"] else "" for task in tasks]
    yield f"| best possible | {' | '.join(best)} |"
    counts = [f"{head[task]['labels']:,} ({head[task]['positives']:,})" for task in tasks]
    yield f"| labels (positive) | {' | '.join(counts)} |"
    yield ""
    yield from table("of the way from chance to the best possible", _way)
    yield ""
    yield from table("AUROC over boosting on counts, paired", lambda entry: _told(entry.get("over counts"), ""))
    yield ""
    yield from table("mean risk", lambda entry: f"{entry['mean risk']:.3f}")
    shares = [f"{head[task]['positives'] / max(1, head[task]['labels']):.3f}" for task in tasks]
    yield f"| prevalence | {' | '.join(shares)} |"
    yield ""
    yield from table("calibration slope", lambda entry: _told(entry.get("slope"), ""))
    yield ""
    yield from table("Brier score", lambda entry: _told(entry.get("brier"), ""))
    yield ""
    yield "| trajectories | times | each | tokens | tokens a trajectory | seconds | tokens a second | cut |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for cost in costs:
        drawn = cost["times"] * cost["num"] * (len(cost["tasks"]) if cost["estimator"] == "reach" else 1)
        cells = [f"{cost['times']:,}", str(cost["num"]), f"{cost['tokens']:,}", f"{cost['tokens'] / max(1, drawn):.0f}"]
        cells += [f"{cost['seconds']:.0f}", f"{cost['tokens'] / cost['seconds']:,.0f}", f"{cost['cut']:.1%}"]
        yield f"| {TITLES[cost['estimator']]}, {', '.join(cost['tasks'])} | {' | '.join(cells)} |"
    notes = {name: words for cost in costs for name, words in cost["notes"].items() if words}
    for name, words in notes.items():
        yield ""
        yield f"{name}: {'; '.join(words)}."
    for name, reason in refused.items():
        yield ""
        yield f"{name} is not forecast: {reason}"


def _told(interval: Interval | None, reason: str | None) -> str:
    if interval is None:
        return f"not estimable: {reason}" if reason else ""
    return str(interval) if math.isfinite(interval.value) else "not estimable"


def _way(entry: dict[str, Any]) -> str:
    best, found = entry["best possible"], entry.get("auroc")
    return f"{(found.value - 0.5) / (best - 0.5):.0%}" if best and found else ""


def main() -> None:
    """Draw and score what is not there yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of what is measured")
    parser.add_argument("--model", type=Path, help="pretrained checkpoint; by default pretrained here")
    parser.add_argument("--finetuned", type=Path, default=STARTER, help="finetuned one; by default the package's own")
    parser.add_argument("--tasks", nargs="+", default=list(SIMULATED_TASKS), help="tasks whose true risk is known")
    parser.add_argument("--patients", type=int, default=4000, help="simulated patients")
    parser.add_argument("--seed", type=int, default=0, help="of the patients")
    parser.add_argument("--n", type=int, default=20, help="trajectories a time")
    parser.add_argument("--n-reach", type=int, default=10, help="trajectories a time and task of REACH")
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument("--max-rows", type=int, default=2000, help="labelled times of a task that are scored")
    parser.add_argument("--days", type=float, nargs=2, default=[0, 9999], help="shortest and longest horizon drawn")
    parser.add_argument("--share", type=float, default=1.0, help="of the held-out patients who are asked about")
    parser.add_argument("--resamples", type=int, default=500, help="of patients, for the intervals")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="few of everything: does it run?")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, draw nothing")
    options = parser.parse_args()
    if min(options.n, options.n_reach, options.max_rows, options.resamples) < 1 or options.patients < 100:
        raise SystemExit("give at least 100 patients, 1 trajectory, 1 row and 1 resample.")
    if not 0 < options.share <= 1:
        raise SystemExit("--share is a share of the patients: above 0, at most 1.")
    unknown = [name for name in options.tasks if name not in SIMULATED_TASKS]
    if unknown:
        raise SystemExit(f"the true risk of {unknown} is not known; expected some of {list(SIMULATED_TASKS)}.")
    if options.quick:
        options.patients, options.n, options.n_reach, options.max_rows, options.resamples = 400, 2, 2, 60, 20
    torch.set_num_threads(options.threads)
    result = options.output / "result.json"
    if options.report:
        if not result.is_file():
            raise SystemExit(f"{result} is not there: run without --report first.")
        print(_read_json(result)["table"])
        return
    source, budget = prepare(options)
    rows = of_some_patients(read_scores(Path(source.out), options.tasks), options.share)
    checkpoint = options.model
    if checkpoint is None:
        cell = PretrainCell(source, budget, "ehrmamba", 0)
        pretrain_cell(cell)
        EhrTokenizer.from_pretrained(Path(source.out) / "tokenizer").save_pretrained(cell.folder)
        checkpoint = cell.folder
    forecaster = load_forecaster(checkpoint)
    subjects = pl.concat([each.rows["subject_id"] for each in rows]).unique()
    events = EventDataset(source.train).events("held_out").filter(pl.col("subject_id").is_in(subjects.implode()))
    drawn, costs, refused = forecast(options, forecaster, events, rows)
    tuned = finetuned_scores(options.finetuned, events, rows).with_columns(system=pl.lit(FINETUNED))
    drawn = drawn.rename({"estimator": "system"})
    table = pl.concat([tuned, drawn.select(tuned.columns)], how="vertical_relaxed")
    write_parquet(table, options.output / ROWS)
    found = list(entries(options, all_scores(options, rows, table)))
    text = "\n".join(report(found, costs, refused))
    told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    settings = {"command": ["python", "-m", "benchmarks.tables.zero_shot", *sys.argv[1:]], "options": told}
    plain = [{key: vars(value) if isinstance(value, Interval) else value for key, value in e.items()} for e in found]
    whole = {**settings, "table": text, "entries": plain, "costs": costs, "refused": refused, "machine": machine()}
    write_json(whole, result)
    print(text)


if __name__ == "__main__":
    main()

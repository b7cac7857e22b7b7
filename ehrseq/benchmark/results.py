"""The numbers of a table: every metric of every system on the same test rows, under the same resamples of patients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ehrseq.benchmark.cells import PREDICTIONS
from ehrseq.benchmark.systems import SYSTEMS
from ehrseq.data.schema import LABEL_KEYS
from ehrseq.evaluation import Interval, Ranking, auroc, best_f1_threshold, bootstrap_intervals, f1_score, seed_test
from ehrseq.evaluation.bootstrap import MetricOfWeights
from ehrseq.evaluation.calibration import Calibration
from ehrseq.evaluation.metrics import FloatArray
from ehrseq.evaluation.reports import MIN_CLASS_COUNT, not_estimable
from ehrseq.training.stages import RESULT, read_result

RESULT_METRICS = {"auroc": "AUROC", "auprc": "AUPRC", "f1": "F1", "brier": "Brier score", "ece": "calibration error"}


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task's test rows, all systems on the same rows.

    Attributes:
        task: Name.
        rows: subject_id, prediction_time, label, true_risk (null where unknown).
        scores: System -> scores of each seed, `[seeds, n]`.
        thresholds: System -> F1's threshold of each seed, chosen on the tuning rows.
    """

    task: str
    rows: pl.DataFrame
    scores: Mapping[str, FloatArray]
    thresholds: Mapping[str, list[float]]


@dataclass(frozen=True)
class SystemResult:
    """One system on one task.

    Attributes:
        system: Name of the system.
        seeds: Seeds that were run.
        metrics: Name of `RESULT_METRICS` -> mean over the seeds, with its interval over patients.
        differences: "auroc", "auprc" -> the same minus the reference's, on the same resamples.
        p_value: Of the t-test over seeds against the reference's AUROCs; None with fewer than two seeds of each.
        by_seed: AUROC of each seed.
    """

    system: str
    seeds: int
    metrics: Mapping[str, Interval]
    differences: Mapping[str, Interval] = field(default_factory=dict)
    p_value: float | None = None
    by_seed: Sequence[float] = ()


@dataclass(frozen=True)
class TaskResult:
    """All systems on one task.

    Attributes:
        task: Name.
        patients: Test patients with a row.
        labels: Test rows.
        positives: Positive ones.
        best_possible: AUROC of the true risk, None where nobody knows it.
        reason: Why nothing could be estimated, None where it was.
        systems: Results by system, empty where there is a reason.
    """

    task: str
    patients: int
    labels: int
    positives: int
    best_possible: float | None
    reason: str | None
    systems: Mapping[str, SystemResult]


def finished_cells(folder: Path) -> dict[str, list[Path]]:
    """Folders of the finished cells by system, systems in the order of `SYSTEMS`."""
    cells = {}
    for name in SYSTEMS:
        seeds = sorted((folder / "cells" / name).glob("seed*"), key=lambda path: int(path.name.removeprefix("seed")))
        done = [path for path in seeds if (path / RESULT).is_file()]
        if done:
            cells[name] = done
    return cells


def read_scores(folder: Path, tasks: Sequence[str]) -> list[TaskScores]:
    """The predictions of all finished cells, task by task.

    Raises:
        ValueError: No finished cell, or cells that scored different rows.
    """
    cells = finished_cells(folder)
    if not cells:
        raise ValueError(f"{folder} has no finished cell yet; run `ehrseq benchmark` without --report-only.")
    tables = {name: [pl.read_parquet(path / PREDICTIONS) for path in paths] for name, paths in cells.items()}
    known = pl.read_parquet(folder / "labels.parquet").filter(pl.col("part") == "test")
    risks = known.select("task", *LABEL_KEYS, "true_risk")
    scores_by_task = []
    for task in tasks:
        of_task = {
            name: [table.filter(pl.col("task") == task, pl.col("part") == "test").sort(LABEL_KEYS) for table in each]
            for name, each in tables.items()
        }
        rows = next(iter(of_task.values()))[0].select(*LABEL_KEYS, "label")
        for name, each in of_task.items():
            if any(not table.select(*LABEL_KEYS, "label").equals(rows) for table in each):
                raise ValueError(f"{folder}: {name} scored other rows of {task} than {next(iter(of_task))}.")
        thresholds = {
            name: [_threshold(table.filter(pl.col("task") == task, pl.col("part") == "tuning")) for table in each]
            for name, each in tables.items()
        }
        rows = rows.join(risks.filter(pl.col("task") == task).drop("task"), on=list(LABEL_KEYS), maintain_order="left")
        scores = {name: np.stack([table["score"].to_numpy() for table in each]) for name, each in of_task.items()}
        scores_by_task.append(TaskScores(task, rows, scores, thresholds))
    return scores_by_task


def task_result(scores: TaskScores, reference: str, *, num_resamples: int = 1000, seed: int = 0) -> TaskResult:
    """Evaluate all systems on one task.

    Args:
        scores: Their scores.
        reference: The system that the others are held against; differences are left out where it has no cell.
        num_resamples: Bootstrap resamples of patients.
        seed: Seed of the bootstrap.
    """
    truth = scores.rows["label"].to_numpy()
    subjects: Any = scores.rows["subject_id"].to_numpy()
    positives = int(truth.sum())
    reason = not_estimable(positives, len(truth) - positives, MIN_CLASS_COUNT)
    risks = scores.rows["true_risk"]
    known = len(risks) > 0 and risks.null_count() == 0 and reason is None
    shared: dict[str, Any] = {
        "task": scores.task,
        "patients": len(np.unique(subjects)),
        "labels": len(truth),
        "positives": positives,
        "best_possible": float(auroc(truth, risks.to_numpy())) if known else None,
        "reason": reason,
    }
    if reason is not None:
        return TaskResult(**shared, systems={})
    ways: dict[str, MetricOfWeights] = {}
    for system, by_seed in scores.scores.items():
        for metric, way in _ways(truth, by_seed, scores.thresholds[system]).items():
            ways[f"{system} {metric}"] = way
    if reference in scores.scores:
        for system in scores.scores:
            for metric in ("auroc", "auprc"):
                if system != reference:
                    this, other = ways[f"{system} {metric}"], ways[f"{reference} {metric}"]
                    ways[f"{system} {metric} difference"] = _minus(this, other)
    intervals = bootstrap_intervals(ways, subjects, num_resamples=num_resamples, seed=seed)
    seeds = {name: [auroc(truth, each) for each in values] for name, values in scores.scores.items()}
    systems = {}
    for system, values in seeds.items():
        tested = system != reference and min(len(values), len(seeds.get(reference, []))) >= 2
        systems[system] = SystemResult(
            system,
            len(values),
            {metric: intervals[f"{system} {metric}"] for metric in RESULT_METRICS},
            {m: intervals[name] for m in ("auroc", "auprc") if (name := f"{system} {m} difference") in intervals},
            seed_test(values, seeds[reference]).p_value if tested else None,
            values,
        )
    return TaskResult(**shared, systems=systems)


def mean_auroc(results: Sequence[TaskResult], system: str) -> float:
    """Mean AUROC of a system over the tasks that are estimable, NaN where none is."""
    values = [result.systems[system].metrics["auroc"].value for result in results if system in result.systems]
    return float(np.mean(values)) if values else math.nan


def costs(folder: Path) -> list[dict[str, Any]]:
    """What each system's first cell cost: parameters, tokens, configurations tried, seconds."""
    entries = []
    for name, paths in finished_cells(folder).items():
        result = read_result(paths[0])
        pretraining = result["pretraining"] or {}
        trials = result["trials"]
        tried = len(trials) if isinstance(trials, list) else len(next(iter(trials.values()))["tried"])
        entries.append(
            {
                "system": name,
                "seeds": len(paths),
                "models": result["models"],
                "parameters": result["parameters"],
                "context": result["context"],
                "pretraining tokens": pretraining.get("tokens"),
                "finetuning tokens": result["tokens"],
                "configurations tried": tried,
                "seconds of training": result["seconds"] + pretraining.get("seconds", 0.0),
            }
        )
    return entries


def _threshold(tuning: pl.DataFrame) -> float:
    if not tuning["label"].any():
        return 0.5
    return best_f1_threshold(tuning["label"].to_numpy(), tuning["score"].to_numpy())


def _ways(truth: Any, by_seed: FloatArray, thresholds: Sequence[float]) -> dict[str, MetricOfWeights]:
    """Each metric as a function of the rows' weights, averaged over the seeds."""
    rankings = [Ranking(truth, scores) for scores in by_seed]
    calibrations = [Calibration(truth, scores) for scores in by_seed]

    def f1(weights: FloatArray | None) -> FloatArray:
        each = [f1_score(truth, scores, limit, weights) for scores, limit in zip(by_seed, thresholds, strict=True)]
        means: FloatArray = np.mean(each, axis=0)
        return means

    return {
        "auroc": lambda weights: np.mean([each.auroc(weights) for each in rankings], axis=0),
        "auprc": lambda weights: np.mean([each.average_precision(weights) for each in rankings], axis=0),
        "f1": f1,
        "brier": lambda weights: np.mean([each.brier(weights) for each in calibrations], axis=0),
        "ece": lambda weights: np.mean([each.expected_error(weights) for each in calibrations], axis=0),
    }


def _minus(metric: MetricOfWeights, other: MetricOfWeights) -> MetricOfWeights:
    return lambda weights: metric(weights) - other(weights)

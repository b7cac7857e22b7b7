"""Metrics per task with intervals, and the table that shows them.

A task with fewer than 20 rows of either class is *not estimable*: its counts are shown and no number that pretends to
be a performance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ehrseq.evaluation.bootstrap import Interval, MetricOfWeights, bootstrap_interval
from ehrseq.evaluation.metrics import Ranking, best_f1_threshold, check_scores, f1_score

MIN_CLASS_COUNT = 20
"""Rows of the rarer class below which a task is not estimable."""

NOT_ESTIMABLE = "not estimable"


@dataclass(frozen=True)
class TaskMetrics:
    """What is known about one task's scores.

    Attributes:
        task: Task name.
        patients: Number of patients with a row.
        labels: Number of rows.
        positives: Number of positive rows.
        mean_score: Mean predicted probability; near the prevalence when scores are probabilities.
        threshold: Decision threshold of `f1`.
        auroc: AUROC with its interval over patients, None when not estimable.
        auprc: Average precision, likewise.
        f1: F1 at `threshold`, likewise.
        reason: Why nothing could be estimated, else None.
    """

    task: str
    patients: int
    labels: int
    positives: int
    mean_score: float | None
    threshold: float
    auroc: Interval | None = None
    auprc: Interval | None = None
    f1: Interval | None = None
    reason: str | None = None

    @property
    def estimable(self) -> bool:
        """Whether there were enough rows of both classes."""
        return self.reason is None

    @property
    def prevalence(self) -> float | None:
        """Share of positive rows, None without rows."""
        return self.positives / self.labels if self.labels else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self) | {"prevalence": self.prevalence, "estimable": self.estimable}


def not_estimable(positives: int, negatives: int, min_class_count: int) -> str | None:
    """Why so many rows of each class are too few, None where they are enough."""
    if positives + negatives == 0:
        return "no labels"
    if positives < min_class_count:
        return f"{positives} positives (needs {min_class_count})"
    if negatives < min_class_count:
        return f"{negatives} negatives (needs {min_class_count})"
    return None


def evaluate_tasks(
    labels: ArrayLike,
    scores: ArrayLike,
    task_ids: ArrayLike,
    subject_ids: ArrayLike,
    task_names: Sequence[str],
    *,
    thresholds: Mapping[str, float] | float = 0.5,
    num_resamples: int = 1000,
    min_class_count: int = MIN_CLASS_COUNT,
    seed: int = 0,
) -> dict[str, TaskMetrics]:
    """AUROC, AUPRC and F1 of every task, each with a 95 % interval over patients.

    Args:
        labels: `[n]` 0/1 labels, all tasks mixed.
        scores: `[n]` P(positive).
        task_ids: `[n]` index of each row's task in `task_names`.
        subject_ids: `[n]` patient of each row.
        task_names: Names by task id.
        thresholds: Threshold of F1, one for all tasks or per task (chosen on tuning rows: `choose_thresholds`).
        num_resamples: Bootstrap resamples; 0 leaves the intervals out (`low = high = value`).
        min_class_count: Rows of the rarer class that make a task estimable.
        seed: Seed of the bootstrap.

    Returns:
        Metrics by task name, in the order of `task_names`.

    Raises:
        ValueError: Arrays of different length, a label that is not 0/1, a score that is not finite, an unknown task id.
    """
    truth, values = check_scores(labels, scores)
    tasks_of_rows, subjects = np.asarray(task_ids), np.asarray(subject_ids)
    if tasks_of_rows.shape != truth.shape or subjects.shape != truth.shape:
        raise ValueError(
            f"task_ids and subject_ids must have one entry per row ({len(truth)}), got {tasks_of_rows.shape} and "
            f"{subjects.shape}."
        )
    if len(tasks_of_rows) and not (tasks_of_rows.min() >= 0 and tasks_of_rows.max() < len(task_names)):
        raise ValueError(
            f"task ids must lie in 0..{len(task_names) - 1} ({list(task_names)}), got {tasks_of_rows.min()}.."
            f"{tasks_of_rows.max()}."
        )

    def interval(metric: MetricOfWeights, patients: ArrayLike) -> Interval:
        if num_resamples == 0:
            value = float(metric(None)[0])
            return Interval(value, value, value)
        return bootstrap_interval(metric, patients, num_resamples=num_resamples, seed=seed)

    results: dict[str, TaskMetrics] = {}
    for task_id, name in enumerate(task_names):
        rows = np.flatnonzero(tasks_of_rows == task_id)
        y, s, patients = truth[rows], values[rows], subjects[rows]
        threshold = float(thresholds.get(name, 0.5) if isinstance(thresholds, Mapping) else thresholds)
        positives = int(y.sum())
        reason = not_estimable(positives, len(y) - positives, min_class_count)
        metrics = {}
        if reason is None:
            ranking = Ranking(y, s)
            metrics = {
                "auroc": interval(ranking.auroc, patients),
                "auprc": interval(ranking.average_precision, patients),
                "f1": interval(partial(f1_score, y, s, threshold), patients),
            }
        results[name] = TaskMetrics(
            task=name,
            patients=len(np.unique(patients)),
            labels=len(y),
            positives=positives,
            mean_score=float(s.mean()) if len(s) else None,
            threshold=threshold,
            reason=reason,
            **metrics,
        )
    return results


def choose_thresholds(
    labels: ArrayLike, scores: ArrayLike, task_ids: ArrayLike, task_names: Sequence[str]
) -> dict[str, float]:
    """The threshold with the largest F1 per task. Give it tuning rows, never the rows that are reported.

    Returns:
        Threshold by task name; 0.5 where a task has no positive.
    """
    truth, values = check_scores(labels, scores)
    tasks_of_rows = np.asarray(task_ids)
    return {
        name: best_f1_threshold(truth[tasks_of_rows == task_id], values[tasks_of_rows == task_id])
        for task_id, name in enumerate(task_names)
    }


def metrics_table(
    results: Mapping[str, TaskMetrics], *, best_possible: Mapping[str, float] | None = None, markdown: bool = False
) -> str:
    """A table: task, patients, labels, positives, AUROC with interval, best possible AUROC, AUPRC, F1.

    Args:
        results: What `evaluate_tasks` returned.
        best_possible: Best possible AUROC by task (known for simulated data only); the column is left out when None.
        markdown: Write a Markdown table instead of aligned text.

    Returns:
        The table as one string.
    """
    header = ["task", "patients", "labels", "positives", "AUROC [95 %]"]
    header += ["best possible"] if best_possible is not None else []
    header += ["AUPRC", "F1 (threshold)"]
    lines = [header]
    for name, result in results.items():
        line = [name, f"{result.patients:,}", f"{result.labels:,}", f"{result.positives:,}"]
        line.append(str(result.auroc) if result.auroc else NOT_ESTIMABLE)
        if best_possible is not None:
            best = best_possible.get(name, float("nan"))
            line.append(f"{best:.3f}" if result.estimable and np.isfinite(best) else "-")
        line.append(f"{result.auprc.value:.3f}" if result.auprc else "-")
        line.append(f"{result.f1.value:.3f} ({result.threshold:.2f})" if result.f1 else "-")
        lines.append(line)
    if markdown:
        rule = ["---"] + ["---:"] * (len(header) - 1)
        return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    texts = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])

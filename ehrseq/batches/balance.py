"""Rows of prompts drawn so that every task and both outcomes are seen often enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class TaskSample:
    """What the sampler did to one task.

    Attributes:
        task: Name.
        available: Rows it could draw from.
        available_positives: Positive rows among them.
        sampled: Rows drawn.
        sampled_positives: Positive rows among them.
        log_odds_shift: logit(sampled prevalence) - logit(available prevalence): what a model trained on the sample
            adds to its log-odds, to be subtracted at inference (0 when the classes were not balanced).
    """

    task: str
    available: int
    available_positives: int
    sampled: int
    sampled_positives: int
    log_odds_shift: float

    @property
    def prevalence(self) -> float:
        """Share of positives among the available rows (NaN without rows)."""
        return self.available_positives / self.available if self.available else math.nan

    @property
    def sampled_prevalence(self) -> float:
        """Share of positives among the drawn rows (NaN without rows)."""
        return self.sampled_positives / self.sampled if self.sampled else math.nan

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self) | {"prevalence": self.prevalence, "sampled_prevalence": self.sampled_prevalence}


@dataclass(frozen=True)
class BalancedSample:
    """Rows drawn by `balance_rows`.

    Attributes:
        rows: `[num_rows]` row indices, tasks mixed.
        tasks: What was done to each task, by task id.
    """

    rows: NDArray[np.int64]
    tasks: tuple[TaskSample, ...]

    @property
    def log_odds_shifts(self) -> list[float]:
        """Shift by task id."""
        return [task.log_odds_shift for task in self.tasks]

    def store_in(self, tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`config.tasks` with each task's `log_odds_shift` filled in (matched by name).

        Raises:
            ValueError: A sampled task is not among `tasks`.
        """
        shifts = {task.task: task.log_odds_shift for task in self.tasks}
        unknown = sorted(set(shifts) - {str(task["name"]) for task in tasks})
        if unknown:
            raise ValueError(f"sampled tasks {unknown} are not in config.tasks {[task['name'] for task in tasks]}.")
        return [dict(task) | {"log_odds_shift": shifts.get(str(task["name"]), 0.0)} for task in tasks]


def balance_rows(
    task_ids: ArrayLike,
    labels: ArrayLike,
    task_names: Sequence[str],
    *,
    num_rows: int | None = None,
    balance_tasks: bool = True,
    positive_share: float | None = None,
    seed: int = 0,
) -> BalancedSample:
    """Draw training rows so that every task is seen equally often and, if asked, every class.

    Rows of a (task, class) are drawn in whole passes plus a remainder without replacement: no row is seen twice before
    each of its class was seen once.

    Args:
        task_ids: `[n]` index of each row's task in `task_names`.
        labels: `[n]` 0/1 labels.
        task_names: Names by task id.
        num_rows: Rows to draw; None = as many as there are. Larger than `n` repeats rows (several epochs in one).
        balance_tasks: Give every task that has rows the same number of rows; else keep the tasks' shares.
        positive_share: Share of positives to draw in every task (0.5 = balanced); None keeps each task's prevalence.
        seed: Seed; equal seeds give equal rows.

    Returns:
        The rows, shuffled over tasks, and what was done to each task.

    Raises:
        ValueError: No rows, arrays of different length, values out of range.
    """
    tasks_of_rows, truth = np.asarray(task_ids), np.asarray(labels)
    if tasks_of_rows.ndim != 1 or tasks_of_rows.shape != truth.shape or len(truth) == 0:
        raise ValueError(
            f"expected task_ids and labels of one length >= 1, got shapes {tasks_of_rows.shape} and {truth.shape}. "
            "Are there labels in this split?"
        )
    if tasks_of_rows.min() < 0 or tasks_of_rows.max() >= len(task_names):
        raise ValueError(
            f"task ids must lie in 0..{len(task_names) - 1}, got {tasks_of_rows.min()}..{tasks_of_rows.max()}."
        )
    if not np.isin(truth, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(truth)[:5].tolist()}.")
    if positive_share is not None and not 0 < positive_share < 1:
        raise ValueError(f"positive_share must lie between 0 and 1, or be None, got {positive_share}.")
    total = len(truth) if num_rows is None else num_rows
    if total < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}.")

    rng = np.random.default_rng(seed)
    available = np.bincount(tasks_of_rows, minlength=len(task_names))
    weights = (available > 0).astype(np.float64) if balance_tasks else available.astype(np.float64)
    drawn: list[NDArray[np.int64]] = []
    report: list[TaskSample] = []
    for task_id, (name, size) in enumerate(zip(task_names, _apportion(total, weights), strict=True)):
        rows = np.flatnonzero(tasks_of_rows == task_id)
        positives, negatives = rows[truth[rows] == 1], rows[truth[rows] == 0]
        share = positive_share if positive_share is not None else len(positives) / max(1, len(rows))
        num_positives = _positives_to_draw(size, share, len(positives), len(negatives))
        drawn += [_draw(positives, num_positives, rng), _draw(negatives, size - num_positives, rng)]
        shift = 0.0
        if positive_share is not None and 0 < num_positives < size:
            shift = math.log(num_positives / (size - num_positives)) - math.log(len(positives) / len(negatives))
        report.append(TaskSample(name, len(rows), len(positives), size, num_positives, shift))
    mixed = np.concatenate(drawn)
    return BalancedSample(rng.permutation(mixed), tuple(report))


class TaskRows(Protocol):
    """Rows of several tasks.

    Attributes:
        task_ids: `[n]` index of each row's task.
    """

    @property
    def task_ids(self) -> NDArray[np.int64]:
        """See above."""

    def subset(self, rows: ArrayLike) -> Self:
        """The rows at these places."""


Limited = TypeVar("Limited", bound=TaskRows)


def limit_rows(rows: Limited, per_task: int | None, seed: int) -> Limited:
    """At most so many rows of each task, drawn at random: scoring every row of a large test set takes longer than the
    intervals are worth.

    Args:
        rows: Rows.
        per_task: Rows of a task; None = all.
        seed: Seed.
    """
    if per_task is None:
        return rows
    rng = np.random.default_rng(seed)
    kept = [
        np.sort(rng.permutation(np.flatnonzero(rows.task_ids == task_id))[:per_task])
        for task_id in np.unique(rows.task_ids)
    ]
    return rows.subset(np.concatenate(kept) if kept else np.empty(0, np.int64))


def _apportion(total: int, weights: NDArray[np.float64]) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to the weights (largest remainders)."""
    exact = total * weights / weights.sum()
    parts = np.floor(exact).astype(np.int64)
    parts[np.argsort(parts - exact, kind="stable")[: total - int(parts.sum())]] += 1
    counts: list[int] = parts.tolist()
    return counts


def _positives_to_draw(size: int, share: float, positives: int, negatives: int) -> int:
    """Positives among `size` rows; a class that exists keeps at least one row where there is room for both."""
    if negatives == 0 or positives == 0:
        return size if negatives == 0 else 0
    wanted = round(size * share)
    return min(max(wanted, 1), size - 1) if size >= 2 else wanted


def _draw(rows: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`size` of the rows: whole passes, then a remainder without replacement."""
    if size == 0:
        return np.empty(0, np.int64)
    passes, rest = divmod(size, len(rows))
    return np.concatenate([np.tile(rows, passes), rng.permutation(rows)[:rest]])

"""`compute_metrics` for the Hugging Face Trainer, per prompted task.

Trainer hands over the rows of all tasks mixed. With `label_names=["labels", "task_ids"]` in `TrainingArguments` it
keeps both columns, and `ComputeTaskMetrics` sorts the rows out again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ehrseq.evaluation.reports import evaluate_tasks

if TYPE_CHECKING:
    from transformers import EvalPrediction

LABEL_NAMES = ["labels", "task_ids"]
"""What `TrainingArguments.label_names` must be for `ComputeTaskMetrics`."""


def positive_probabilities(
    logits: ArrayLike, task_ids: ArrayLike | None = None, log_odds_shifts: Sequence[float] | None = None
) -> NDArray[np.float64]:
    """P(positive) from two-class logits, with a balancing sampler's shift of the log-odds taken back.

    Args:
        logits: `[n, 2]` logits of (negative, positive).
        task_ids: `[n]` task of each row; needed with `log_odds_shifts`.
        log_odds_shifts: Shift by task id (`config.tasks[i]["log_odds_shift"]`); None = no shift.

    Returns:
        `[n]` probabilities.

    Raises:
        ValueError: Logits are not `[n, 2]`, or shifts are given without `task_ids`.
    """
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(f"logits must be [n, 2] (negative, positive), got shape {values.shape}.")
    log_odds = values[:, 1] - values[:, 0]
    if log_odds_shifts is not None:
        if task_ids is None:
            raise ValueError("log_odds_shifts are per task: give task_ids [n] as well.")
        log_odds = log_odds - np.asarray(log_odds_shifts, dtype=np.float64)[np.asarray(task_ids)]
    # exp of a negative number only: no overflow at extreme logits.
    small = np.exp(-np.abs(log_odds))
    return np.where(log_odds >= 0, 1 / (1 + small), small / (1 + small))


class ComputeTaskMetrics:
    """AUROC, AUPRC and F1 of every task for `Trainer(compute_metrics=...)`.

    The keys are `<metric>_<task>` with `_low` and `_high` for the interval, and `auroc_mean` over the estimable tasks
    (0.5 when there is none, so that `metric_for_best_model="auroc_mean"` always exists). A task with too few rows of a
    class gets only its counts.

    Args:
        task_names: Names by task id (`[task["name"] for task in config.tasks]`).
        subject_ids: `[n]` patient of each row of the evaluation dataset, in its order; None treats every row as a
            patient of its own, and the intervals are then too narrow.
        log_odds_shifts: Shift by task id, see `positive_probabilities`.
        thresholds: Threshold of F1; the default 0.5 is the paper's (argmax of two logits).
        num_resamples: Bootstrap resamples (200 suffice between epochs).
        seed: Seed of the bootstrap.

    Example:
        ```python
        TrainingArguments(..., label_names=["labels", "task_ids"])
        Trainer(..., compute_metrics=ComputeTaskMetrics(tasks, dataset.subject_ids))
        ```
    """

    def __init__(
        self,
        task_names: Sequence[str],
        subject_ids: ArrayLike | None = None,
        *,
        log_odds_shifts: Sequence[float] | None = None,
        thresholds: Mapping[str, float] | float = 0.5,
        num_resamples: int = 200,
        seed: int = 0,
    ) -> None:
        self.task_names = list(task_names)
        self.subject_ids = None if subject_ids is None else np.asarray(subject_ids)
        self.log_odds_shifts = log_odds_shifts
        self.thresholds = thresholds
        self.num_resamples = num_resamples
        self.seed = seed

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics of one evaluation.

        Raises:
            ValueError: Trainer was not told to keep `task_ids`, or the rows are not those of `subject_ids`.
        """
        if not isinstance(prediction.label_ids, tuple) or len(prediction.label_ids) != 2:
            raise ValueError(
                "expected the label columns (labels, task_ids); set TrainingArguments(label_names=['labels', "
                "'task_ids']) and train on rows that carry both."
            )
        labels, task_ids = prediction.label_ids
        predictions: Any = prediction.predictions
        logits = predictions[0] if isinstance(predictions, tuple) else predictions
        subjects = np.arange(len(labels)) if self.subject_ids is None else self.subject_ids
        if len(subjects) != len(labels):
            raise ValueError(
                f"subject_ids has {len(subjects)} entries, the evaluation dataset {len(labels)} rows: pass the "
                "subject_ids of the dataset that is evaluated."
            )
        results = evaluate_tasks(
            labels,
            positive_probabilities(logits, task_ids, self.log_odds_shifts),
            task_ids,
            subjects,
            self.task_names,
            thresholds=self.thresholds,
            num_resamples=self.num_resamples,
            seed=self.seed,
        )
        flat: dict[str, float] = {}
        for name, result in results.items():
            flat[f"labels_{name}"] = result.labels
            flat[f"positives_{name}"] = result.positives
            for metric in ("auroc", "auprc", "f1"):
                interval = getattr(result, metric)
                if interval is not None:
                    flat[f"{metric}_{name}"] = interval.value
                    flat[f"{metric}_{name}_low"] = interval.low
                    flat[f"{metric}_{name}_high"] = interval.high
        areas = [result.auroc.value for result in results.values() if result.auroc is not None]
        flat["auroc_mean"] = float(np.mean(areas)) if areas else 0.5
        return flat

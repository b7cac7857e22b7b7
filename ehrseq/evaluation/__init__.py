"""Discrimination of risk scores, per task, with bootstrap intervals over patients."""

from ehrseq.evaluation.bootstrap import Interval, bootstrap_interval, patient_weights
from ehrseq.evaluation.metrics import (
    Ranking,
    auroc,
    average_precision,
    best_f1_threshold,
    f1_score,
)
from ehrseq.evaluation.reports import TaskMetrics, choose_thresholds, evaluate_tasks, metrics_table
from ehrseq.evaluation.trainer_metrics import ComputeTaskMetrics, positive_probabilities

__all__ = [
    "ComputeTaskMetrics",
    "Interval",
    "Ranking",
    "TaskMetrics",
    "auroc",
    "average_precision",
    "best_f1_threshold",
    "bootstrap_interval",
    "choose_thresholds",
    "evaluate_tasks",
    "f1_score",
    "metrics_table",
    "patient_weights",
    "positive_probabilities",
]

"""All about the scores of one task: discrimination, calibration, decisions, each with its interval over patients.

A metric that cannot be estimated is left out, and the reason stands in its place: one class only, too few rows of a
class, a calibration slope without a finite value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.evaluation.bootstrap import Interval, MetricOfWeights, bootstrap_intervals
from ehrseq.evaluation.calibration import NUM_BINS, Calibration, CalibrationCurve
from ehrseq.evaluation.decisions import (
    ALERT_RATE,
    AlertBurden,
    DecisionCurve,
    alert_burden,
    alert_rate_threshold,
    alerts_at,
    decision_curve,
)
from ehrseq.evaluation.metrics import FloatArray, Ranking, best_f1_threshold, f1_score
from ehrseq.evaluation.report_tables import json_ready
from ehrseq.evaluation.reports import MIN_CLASS_COUNT, NOT_ESTIMABLE, not_estimable

NO_TUNING = "no tuning rows were given"
"""Why a threshold is that of an alert rate."""

METRIC_TITLES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "calibration_slope": "calibration slope",
    "calibration_intercept": "calibration in the large",
}


@dataclass(frozen=True)
class RiskAssessment:
    """What is known about one task's scores.

    Attributes:
        task: Name of the task.
        patients: Patients with a row.
        labels: Rows.
        positives: Positive rows.
        mean_score: Mean score; near the prevalence where scores are probabilities. None without rows.
        threshold: From which score on F1 counts a row as predicted positive.
        threshold_from: Where the threshold comes from, in words.
        metrics: Name of `METRIC_TITLES` -> the metric with its interval; only what could be estimated.
        missing: Name -> why it could not.
        num_bins: Bins of the calibration error and curve.
        num_resamples: Resamples of the intervals.
        calibration: Predicted and observed risk; None where nothing is estimable.
        decisions: Net benefit; None where nothing is estimable.
        alerts: Alert burden at `threshold` (`wanted` is None), then at fixed sensitivities.
    """

    task: str
    patients: int
    labels: int
    positives: int
    mean_score: float | None
    threshold: float
    threshold_from: str
    metrics: Mapping[str, Interval]
    missing: Mapping[str, str]
    num_bins: int
    num_resamples: int
    calibration: CalibrationCurve | None = None
    decisions: DecisionCurve | None = None
    alerts: list[AlertBurden] = field(default_factory=list)

    @property
    def prevalence(self) -> float | None:
        """Share of positive rows, None without rows."""
        return self.positives / self.labels if self.labels else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        fields: dict[str, Any] = json_ready(asdict(self))
        return fields | {"prevalence": self.prevalence}

    def to_markdown(self) -> str:
        """Tables of the metrics and of the alerts."""
        counts = f"{self.labels:,} labels of {self.patients:,} patients, {self.positives:,} positive"
        lines = [f"### {self.task}", "", f"{counts}.", "", "| metric | value [95 %] |", "|---|---:|"]
        for name, title in METRIC_TITLES.items():
            shown = str(self.metrics[name]) if name in self.metrics else f"{NOT_ESTIMABLE}: {self.missing[name]}"
            lines.append(f"| {title} | {shown} |")
        lines += [
            "",
            f"F1 at the threshold {self.threshold:.3g} ({self.threshold_from}); calibration over {self.num_bins} bins "
            f"of equal mass; intervals by {self.num_resamples:,} bootstrap resamples of patients.",
        ]
        if self.alerts:
            lines += ["", f"| {' | '.join(ALERT_COLUMNS)} |", "|---|" + "---:|" * (len(ALERT_COLUMNS) - 1)]
            lines += [f"| {' | '.join(alert_cells(alert))} |" for alert in self.alerts]
        return "\n".join(lines) + "\n"


ALERT_COLUMNS = ("alerts", "threshold", "sensitivity", "alerts per 1,000", "share that is right")


def alert_cells(alert: AlertBurden) -> list[str]:
    """A row of `ALERT_COLUMNS`."""
    right = alert.positive_predictive_value
    return [
        "at F1's threshold" if alert.wanted is None else f"to find {alert.wanted:.0%} of the positives",
        f"{alert.threshold:.3g}",
        f"{alert.sensitivity:.1%}",
        f"{alert.alerts_per_1000:.0f}",
        f"{right:.1%}" if math.isfinite(right) else "no alert",
    ]


def assess(
    table: pl.DataFrame,
    task: str,
    *,
    tuning: pl.DataFrame | None = None,
    threshold: float | None = None,
    alert_rate: float = ALERT_RATE,
    num_bins: int = NUM_BINS,
    num_resamples: int = 1000,
    min_class_count: int = MIN_CLASS_COUNT,
    seed: int = 0,
) -> RiskAssessment:
    """Evaluate the scores of one task.

    Args:
        table: What `match_predictions` returns: subject_id, prediction_time, label, score.
        task: Name of the task.
        tuning: The same of the tuning patients: the threshold of F1 is the best one there.
        threshold: Threshold of F1 where it is known.
        alert_rate: Without both, the threshold is the one from which on this share of the rows alerts.
        num_bins: Bins of equal mass for calibration.
        num_resamples: Bootstrap resamples of patients.
        min_class_count: Rows of the rarer class that make a task estimable.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: Scores that are NaN or outside [0, 1], `tuning` and `threshold` both given, numbers out of range.
    """
    truth, scores = table["label"].to_numpy(), table["score"].to_numpy()
    subjects: NDArray[Any] = table["subject_id"].to_numpy()
    limit, origin = _threshold(scores, tuning, threshold, alert_rate)
    calibration = Calibration(truth, scores, num_bins)
    positives = int(truth.sum())
    shared: dict[str, Any] = {
        "task": task,
        "patients": len(np.unique(subjects)),
        "labels": len(truth),
        "positives": positives,
        "mean_score": float(scores.mean()) if len(scores) else None,
        "threshold": limit,
        "threshold_from": origin,
        "num_bins": num_bins,
        "num_resamples": num_resamples,
    }
    reason = not_estimable(positives, len(truth) - positives, min_class_count)
    if reason is not None:
        return RiskAssessment(**shared, metrics={}, missing=dict.fromkeys(METRIC_TITLES, reason))
    ranking = Ranking(truth, scores)

    def f1(weights: FloatArray | None) -> FloatArray:
        return f1_score(truth, scores, limit, weights)

    ways: dict[str, MetricOfWeights] = {
        "auroc": ranking.auroc,
        "auprc": ranking.average_precision,
        "f1": f1,
        "brier": calibration.brier,
        "ece": calibration.expected_error,
        "calibration_slope": calibration.slope,
        "calibration_intercept": calibration.intercept,
    }
    curve = calibration.curve()
    bins: dict[str, MetricOfWeights] = {
        f"bin {number}": partial(calibration.observed, number) for number in range(len(curve.rows))
    }
    intervals = bootstrap_intervals(ways | bins, subjects, num_resamples=num_resamples, seed=seed)
    of_bins = [intervals[name] for name in bins]
    metrics = {name: intervals[name] for name in ways}
    return RiskAssessment(
        **shared,
        metrics={name: each for name, each in metrics.items() if math.isfinite(each.value)},
        missing={name: "it has no finite value" for name, each in metrics.items() if not math.isfinite(each.value)},
        calibration=replace(
            curve, low=np.array([each.low for each in of_bins]), high=np.array([each.high for each in of_bins])
        ),
        decisions=decision_curve(truth, scores),
        alerts=[alerts_at(truth, scores, limit), *alert_burden(truth, scores)],
    )


def _threshold(
    scores: FloatArray, tuning: pl.DataFrame | None, threshold: float | None, alert_rate: float
) -> tuple[float, str]:
    """F1's threshold, and where it comes from."""
    if tuning is not None and threshold is not None:
        raise ValueError("give the tuning rows or a threshold, not both.")
    if threshold is not None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold got {threshold}; expected a probability.")
        return float(threshold), "as given"
    if tuning is None or not tuning["label"].any():
        why = NO_TUNING if tuning is None else "the tuning rows hold no positive"
        limit = alert_rate_threshold(scores, alert_rate) if len(scores) else 0.5
        return limit, f"an alert for the {100 * alert_rate:g} % of the rows with the highest scores: {why}"
    return best_f1_threshold(tuning["label"].to_numpy(), tuning["score"].to_numpy()), "best F1 of the tuning rows"

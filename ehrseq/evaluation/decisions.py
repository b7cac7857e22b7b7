"""What acting on a score would do: net benefit over thresholds, and the alerts that a wanted sensitivity costs.

net benefit     TP / n - FP / n * t / (1 - t) of treating where p >= t: a false alarm costs t / (1 - t) of a hit
                (Vickers and Elkin 2006); beside it those of treating all and treating none (0)
alert burden    alerts per 1,000 predictions at the highest threshold that finds a wanted share of the positives,
                and the share of these alerts that is right (positive predictive value)
alert rate      the threshold from which on a wanted share of the rows alerts, whatever their outcomes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ehrseq.evaluation.calibration import check_probabilities
from ehrseq.evaluation.metrics import FloatArray, check_scores

DECISION_THRESHOLDS = tuple(round(0.01 * step, 2) for step in range(1, 100))
SENSITIVITIES = (0.8, 0.9)
ALERT_RATE = 0.05
"""Share of the rows that alert where nothing better chooses the threshold."""


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefits, in true positives per row.

    Attributes:
        thresholds: `[k]` probabilities from which on one would treat.
        model: `[k]` net benefit of treating where the score reaches the threshold.
        treat_all: `[k]` net benefit of treating everyone.
    """

    thresholds: FloatArray
    model: FloatArray
    treat_all: FloatArray


@dataclass(frozen=True)
class AlertBurden:
    """What alerting from a threshold on finds and costs.

    Attributes:
        wanted: Sensitivity that the threshold was chosen for, None where it was chosen otherwise.
        threshold: Alerts are rows at or above it.
        sensitivity: Share of the positives among the alerts; at least `wanted`.
        alerts_per_1000: Alerts in a thousand predictions.
        positive_predictive_value: Share of the alerts that is right; NaN without an alert.
    """

    wanted: float | None
    threshold: float
    sensitivity: float
    alerts_per_1000: float
    positive_predictive_value: float


def decision_curve(
    labels: ArrayLike, scores: ArrayLike, thresholds: Sequence[float] = DECISION_THRESHOLDS
) -> DecisionCurve:
    """Net benefit of the scores and of treating all.

    Args:
        labels: `[n]` binary labels.
        scores: `[n]` P(positive).
        thresholds: Probabilities, each above 0 and below 1.

    Raises:
        ValueError: As `check_scores`, probabilities outside [0, 1], a threshold out of range, or no rows.
    """
    truth, values = check_scores(labels, scores)
    check_probabilities(values)
    limits = np.asarray(thresholds, dtype=np.float64)
    if len(limits) == 0 or not ((limits > 0) & (limits < 1)).all():
        raise ValueError(f"thresholds got {list(thresholds)[:5]}; expected probabilities above 0 and below 1.")
    if len(truth) == 0:
        raise ValueError("there are no rows; net benefit is a mean over rows.")
    order = np.argsort(values, kind="stable")
    below = np.searchsorted(values[order], limits, side="left")  # rows without an alert
    hits = truth.sum() - np.concatenate([[0], np.cumsum(truth[order])])[below]
    alerts = len(truth) - below
    odds = limits / (1 - limits)
    prevalence = truth.mean()
    return DecisionCurve(limits, (hits - (alerts - hits) * odds) / len(truth), prevalence - (1 - prevalence) * odds)


def alert_burden(
    labels: ArrayLike, scores: ArrayLike, sensitivities: Sequence[float] = SENSITIVITIES
) -> list[AlertBurden]:
    """Alerts per 1,000 predictions and their precision, for each wanted sensitivity.

    Args:
        labels: `[n]` binary labels.
        scores: `[n]` scores, larger = more likely positive.
        sensitivities: Shares of the positives to find, above 0 and at most 1.

    Raises:
        ValueError: As `check_scores`, a sensitivity out of range, or no positive.
    """
    truth, values = check_scores(labels, scores)
    if not all(0 < wanted <= 1 for wanted in sensitivities):
        raise ValueError(f"sensitivities got {list(sensitivities)}; expected shares above 0 and at most 1.")
    positives = np.sort(values[truth])[::-1]
    if len(positives) == 0:
        raise ValueError("there is no positive row; a sensitivity is a share of the positives.")
    return [
        alerts_at(truth, values, float(positives[_count(wanted, len(positives)) - 1]), wanted)
        for wanted in sensitivities
    ]


def alerts_at(labels: ArrayLike, scores: ArrayLike, threshold: float, wanted: float | None = None) -> AlertBurden:
    """Alerts at and above a threshold.

    Args:
        labels: `[n]` binary labels.
        scores: `[n]` scores, larger = more likely positive.
        threshold: Lowest score that alerts.
        wanted: Sensitivity that the threshold was chosen for.

    Raises:
        ValueError: As `check_scores`, or no positive.
    """
    truth, values = check_scores(labels, scores)
    if not truth.any():
        raise ValueError("there is no positive row; a sensitivity is a share of the positives.")
    alert = values >= threshold
    alerts, hits = int(alert.sum()), int((alert & truth).sum())
    precision = hits / alerts if alerts else float("nan")
    return AlertBurden(wanted, float(threshold), hits / int(truth.sum()), 1000 * alerts / len(truth), precision)


def alert_rate_threshold(scores: ArrayLike, alert_rate: float = ALERT_RATE) -> float:
    """The highest score from which on at least a wanted share of the rows alerts; outcomes are not looked at.

    Args:
        scores: `[n]` scores, larger = more likely positive.
        alert_rate: Share of the rows, above 0 and at most 1. More of them alert where scores are equal.

    Raises:
        ValueError: A rate out of range, or no rows.
    """
    values = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    if not 0 < alert_rate <= 1:
        raise ValueError(f"alert_rate got {alert_rate}; expected a share of the rows, above 0 and at most 1.")
    if len(values) == 0:
        raise ValueError("there are no rows; an alert rate is a share of them.")
    return float(values[_count(alert_rate, len(values)) - 1])


def _count(share: float, total: int) -> int:
    """The smallest number of rows, at least one, that makes up the share."""
    return max(1, int(np.ceil(round(share * total, 9))))  # 0.8 * 10 is 8, not 8.000000000000002

"""AUROC, AUPRC and F1 of one task, under any number of row weightings at once.

A bootstrap repeats a metric under a thousand resamples of the patients. Sorting is the dear part and does not depend on
the resample, so a `Ranking` sorts once and every metric then takes weights `[B, n]` (how often each row was drawn) and
returns `[B]` values. The unweighted metric is the same code with one row of ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


def check_scores(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], FloatArray]:
    """Validate one task's labels and scores.

    Args:
        labels: `[n]` binary labels (bool or 0/1).
        scores: `[n]` finite scores, larger = more likely positive.

    Returns:
        `(labels, scores)` as bool `[n]` and float64 `[n]`.

    Raises:
        ValueError: Lengths differ, a label is neither 0 nor 1, or a score is not finite.
    """
    label_array = np.asarray(labels)
    score_array = np.asarray(scores, dtype=np.float64)
    if label_array.ndim != 1 or score_array.shape != label_array.shape:
        raise ValueError(
            f"labels and scores must be one-dimensional and of one length, got shapes {label_array.shape} and "
            f"{score_array.shape}. For logits [n, 2] take the probability of the positive class first."
        )
    if label_array.dtype != np.bool_ and not np.isin(label_array, (0, 1)).all():
        raise ValueError(
            f"labels must be 0 or 1, got values {np.unique(label_array)[:5].tolist()}. Remove rows without a label "
            "(-100 or null) before scoring."
        )
    if not np.isfinite(score_array).all():
        bad = int((~np.isfinite(score_array)).sum())
        raise ValueError(f"scores must be finite, got {bad} NaN or infinite of {len(score_array)}. Check the model.")
    return label_array.astype(np.bool_), score_array


class Ranking:
    """Rows of one task sorted by falling score; equal scores form one step of the curves.

    Args:
        labels: `[n]` binary labels.
        scores: `[n]` scores.

    Attributes:
        order: `[n]` row indices by falling score.
        positive: `[n]` labels in that order.
    """

    def __init__(self, labels: ArrayLike, scores: ArrayLike) -> None:
        checked_labels, checked_scores = check_scores(labels, scores)
        self.order = np.argsort(-checked_scores, kind="stable")
        self.positive = checked_labels[self.order]
        ordered = checked_scores[self.order]
        # Last row of every group of equal scores: a threshold can only stand between groups.
        self._ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) if len(ordered) else np.empty(0, int)

    def _steps(self, weights: ArrayLike | None) -> tuple[FloatArray, FloatArray]:
        """Cumulated weight of positives and of negatives at every threshold, `[B, groups]` each."""
        drawn = np.ones((1, len(self.order))) if weights is None else np.atleast_2d(np.asarray(weights, np.float64))
        if drawn.shape[1] != len(self.order):
            raise ValueError(f"weights must be [B, {len(self.order)}] (one column per row), got {drawn.shape}.")
        drawn = drawn[:, self.order]
        everyone = np.cumsum(drawn, axis=1)[:, self._ends]
        positives = np.cumsum(drawn * self.positive, axis=1)[:, self._ends]
        return positives, everyone - positives

    def auroc(self, weights: ArrayLike | None = None) -> FloatArray:
        """Area under the ROC curve per weighting, ties counting one half.

        Args:
            weights: `[B, n]` row weights in the original row order; None = all ones.

        Returns:
            `[B]` areas; NaN where only one class has weight.
        """
        positives, negatives = self._steps(weights)
        if positives.shape[1] == 0:
            return np.full(len(positives), np.nan)
        # Trapezoids over the false positive axis.
        before = np.pad(positives, ((0, 0), (1, 0)))
        new_negatives = np.diff(negatives, axis=1, prepend=0.0)
        area = (new_negatives * (before[:, :-1] + before[:, 1:])).sum(axis=1) / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            areas: FloatArray = area / (positives[:, -1] * negatives[:, -1])
        return areas

    def average_precision(self, weights: ArrayLike | None = None) -> FloatArray:
        """Area under the precision-recall curve as average precision (no interpolation), per weighting.

        Args:
            weights: `[B, n]` row weights in the original row order; None = all ones.

        Returns:
            `[B]` average precisions; NaN where no positive has weight.
        """
        positives, negatives = self._steps(weights)
        if positives.shape[1] == 0:
            return np.full(len(positives), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.nan_to_num(positives / (positives + negatives))
            gained = np.diff(positives, axis=1, prepend=0.0)
            means: FloatArray = (gained * precision).sum(axis=1) / positives[:, -1]
        return means

    def best_f1_threshold(self, scores: ArrayLike) -> float:
        """The score at which predicting positive at or above it gives the largest F1 on these rows."""
        positives, negatives = self._steps(None)
        if positives.shape[1] == 0 or positives[0, -1] == 0:
            return 0.5
        f1 = 2 * positives[0] / (positives[0, -1] + positives[0] + negatives[0])
        return float(np.asarray(scores, dtype=np.float64)[self.order[self._ends[int(np.argmax(f1))]]])


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve; NaN with one class only.

    Example:
        >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    return float(Ranking(labels, scores).auroc()[0])


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Average precision (AUPRC); NaN without a positive."""
    return float(Ranking(labels, scores).average_precision()[0])


def f1_score(
    labels: ArrayLike, scores: ArrayLike, threshold: float = 0.5, weights: ArrayLike | None = None
) -> FloatArray:
    """F1 of "positive if score >= threshold", per weighting.

    Args:
        labels: `[n]` binary labels.
        scores: `[n]` scores.
        threshold: Decision threshold. 0.5 is the paper's (an argmax of two logits); choose it on tuning rows, never on
            the rows that are reported.
        weights: `[B, n]` row weights; None = all ones.

    Returns:
        `[B]` F1 values; 0 where nothing is predicted positive, NaN where there is neither a positive nor a prediction.
    """
    truth, values = check_scores(labels, scores)
    drawn = np.ones((1, len(truth))) if weights is None else np.atleast_2d(np.asarray(weights, np.float64))
    predicted = values >= threshold
    hits = drawn @ (truth & predicted).astype(np.float64)
    total = drawn @ (truth.astype(np.float64) + predicted.astype(np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * hits / total


def best_f1_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """Threshold with the largest F1 on these rows (use tuning rows); 0.5 when there is no positive."""
    return Ranking(labels, scores).best_f1_threshold(scores)

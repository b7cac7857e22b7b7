"""Are the scores probabilities? Brier score, calibration error, curve, slope and intercept, under bootstrap weights.

    Brier           mean of (p - y)^2
    ECE             mean over bins of equal mass of |mean p - mean y|, weighted by the bins' rows
    slope           b of logit P(y) = a + b logit(p): below 1 the scores are too extreme
    intercept       a of logit P(y) = a + logit(p), calibration in the large: above 0 the risk is underestimated

(Van Calster et al. 2019, "Calibration: the Achilles heel of predictive analytics".) Like `Ranking`, a `Calibration` is
made once from the rows and answers for any number of weightings `[B, n]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ehrseq.evaluation.metrics import FloatArray, check_scores

NUM_BINS = 10
_CLIP = 1e-12  # of probabilities of exactly 0 or 1, whose log-odds are infinite
_STEPS = 25
_LARGEST_STEP = 4.0  # log-odds; where the start is far away, a whole step would overshoot
_TOLERANCE = 1e-5  # of the last step, after which the error is about its square


def check_probabilities(scores: ArrayLike) -> FloatArray:
    """The scores as float64.

    Raises:
        ValueError: A score that is NaN, infinite or outside [0, 1].
    """
    values = np.asarray(scores, dtype=np.float64)
    outside = ~((values >= 0) & (values <= 1))  # NaN compares false
    if outside.any():
        raise ValueError(
            f"expected probabilities in [0, 1], got {int(outside.sum()):,} others of {values.size:,}, for example "
            f"{values[outside][0]}. Give P(positive), not logits; leave out rows without a score."
        )
    return values


@dataclass(frozen=True)
class CalibrationCurve:
    """Predicted and observed risk of bins of equal mass.

    Attributes:
        predicted: `[k]` mean score of each bin, rising.
        observed: `[k]` share of positives.
        rows: `[k]` rows.
        low: `[k]` lower ends of the intervals of `observed`, None where none were made.
        high: `[k]` upper ends.
    """

    predicted: FloatArray
    observed: FloatArray
    rows: NDArray[np.int64]
    low: FloatArray | None = None
    high: FloatArray | None = None


class Calibration:
    """Labels and probabilities of one task.

    Args:
        labels: `[n]` binary labels.
        scores: `[n]` P(positive).
        num_bins: Bins of equal mass for the curve and the calibration error. Equal scores share a bin, so that there
            may be fewer. The bins are those of the rows as they are, also under weights.

    Raises:
        ValueError: As `check_scores`, probabilities outside [0, 1], or `num_bins` below 1.
    """

    def __init__(self, labels: ArrayLike, scores: ArrayLike, num_bins: int = NUM_BINS) -> None:
        if num_bins < 1:
            raise ValueError(f"num_bins got {num_bins}; expected at least 1.")
        truth, values = check_scores(labels, scores)
        self.truth, self.scores = truth.astype(np.float64), check_probabilities(values)
        edges = np.unique(np.quantile(self.scores, np.arange(1, num_bins) / num_bins)) if len(truth) else np.empty(0)
        place = np.searchsorted(edges, self.scores, side="left")
        self._bins, self.bin_of_row = np.unique(place, return_inverse=True)
        clipped = self.scores.clip(_CLIP, 1 - _CLIP)
        self._log_odds = np.log(clipped / (1 - clipped))

    def _weights(self, weights: ArrayLike | None) -> FloatArray:
        rows = len(self.truth)
        drawn = np.ones((1, rows)) if weights is None else np.atleast_2d(np.asarray(weights, np.float64))
        if drawn.shape[1] != rows:
            raise ValueError(f"weights must be [B, {rows}] (one column per row), got {drawn.shape}.")
        return drawn

    def brier(self, weights: ArrayLike | None = None) -> FloatArray:
        """`[B]` Brier scores, 0 = perfect; NaN without rows."""
        drawn = self._weights(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            means: FloatArray = drawn @ (self.scores - self.truth) ** 2 / drawn.sum(axis=1)
        return means

    def expected_error(self, weights: ArrayLike | None = None) -> FloatArray:
        """`[B]` expected calibration errors over bins of equal mass; NaN without rows.

        It is biased upwards where bins hold few rows: chance alone keeps it above 0.
        """
        drawn = self._weights(weights)
        gaps = np.zeros((len(drawn), len(self._bins)))
        difference = drawn * (self.scores - self.truth)
        for number in range(len(self._bins)):
            gaps[:, number] = difference[:, self.bin_of_row == number].sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            means: FloatArray = np.abs(gaps).sum(axis=1) / drawn.sum(axis=1)
        return means

    def curve(self) -> CalibrationCurve:
        """Predicted and observed risk, bin by bin."""
        rows = np.bincount(self.bin_of_row, minlength=len(self._bins))
        predicted = np.bincount(self.bin_of_row, self.scores, len(self._bins)) / rows
        observed = np.bincount(self.bin_of_row, self.truth, len(self._bins)) / rows
        return CalibrationCurve(predicted, observed, rows)

    def observed(self, number: int, weights: ArrayLike | None = None) -> FloatArray:
        """`[B]` shares of positives in one bin; NaN where it has no weight."""
        rows = np.flatnonzero(self.bin_of_row == number)
        drawn = self._weights(weights)[:, rows]
        with np.errstate(invalid="ignore", divide="ignore"):
            shares: FloatArray = drawn @ self.truth[rows] / drawn.sum(axis=1)
        return shares

    def slope(self, weights: ArrayLike | None = None) -> FloatArray:
        """`[B]` calibration slopes; NaN where one class has no weight, all scores are equal, or they separate the
        classes, so that no finite slope is the most likely one.
        """
        return self._fit(self._weights(weights), free_slope=True)[1]

    def intercept(self, weights: ArrayLike | None = None) -> FloatArray:
        """`[B]` calibration in the large (the slope held at 1); NaN where one class has no weight."""
        return self._fit(self._weights(weights), free_slope=False)[0]

    def _fit(self, drawn: FloatArray, free_slope: bool) -> tuple[FloatArray, FloatArray]:
        """Newton's method for the one or two coefficients, all weightings at once.

        Resamples start from the solution of the rows as they are: near their own, and the first step, in which all
        share their probabilities, is then a few matrix products.
        """
        positives, mass = drawn @ self.truth, drawn.sum(axis=1)
        spread = len(self.truth) > 0 and bool(np.ptp(self._log_odds) > 0)
        start, converged = self._newton(np.ones((1, len(self.truth))), np.zeros(1), np.ones(1), free_slope)
        if len(drawn) == 1 or not converged[0]:
            start = (np.zeros(1), np.ones(1))
        a, b = (np.repeat(value, len(drawn)) for value in start)
        (a, b), done = self._newton(drawn, a, b, free_slope)
        missing = ~done | (positives <= 0) | (positives >= mass) | (free_slope and not spread)
        return np.where(missing, np.nan, a), np.where(missing, np.nan, b)

    def _newton(
        self, drawn: FloatArray, a: FloatArray, b: FloatArray, free_slope: bool
    ) -> tuple[tuple[FloatArray, FloatArray], NDArray[np.bool_]]:
        """Coefficients, and for which weightings the steps came to an end."""
        x, y = self._log_odds, self.truth
        done = np.zeros(len(drawn), bool)
        powers = np.stack([np.ones_like(x), x, x**2], axis=1)
        with np.errstate(all="ignore"):
            for _ in range(_STEPS):
                if np.ptp(a) == 0 and np.ptp(b) == 0:  # one set of probabilities for all
                    p = 1 / (1 + np.exp(-(a[0] + b[0] * x)))
                    slopes = drawn @ ((y - p)[:, None] * powers[:, :2])
                    curves = drawn @ ((p * (1 - p))[:, None] * powers)
                else:
                    p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
                    slopes = (drawn * (y - p)) @ powers[:, :2]
                    curves = (drawn * (p * (1 - p))) @ powers
                (g0, g1), (h00, h01, h11) = slopes.T, curves.T
                if free_slope:
                    determinant = h00 * h11 - h01**2
                    step_a, step_b = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
                else:
                    step_a, step_b = g0 / h00, np.zeros_like(b)
                largest = np.maximum(np.abs(step_a), np.abs(step_b))
                shrink = np.minimum(1.0, _LARGEST_STEP / np.maximum(largest, 1e-300))
                a, b = a + shrink * step_a, b + shrink * step_b
                done = largest < _TOLERANCE
                if (done | ~np.isfinite(largest)).all():
                    break
        return (a, b), done


def brier_score(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean squared difference of probability and outcome."""
    return float(Calibration(labels, scores).brier()[0])


def expected_calibration_error(labels: ArrayLike, scores: ArrayLike, num_bins: int = NUM_BINS) -> float:
    """Calibration error over bins of equal mass."""
    return float(Calibration(labels, scores, num_bins).expected_error()[0])


def calibration_curve(labels: ArrayLike, scores: ArrayLike, num_bins: int = NUM_BINS) -> CalibrationCurve:
    """Predicted and observed risk of bins of equal mass."""
    return Calibration(labels, scores, num_bins).curve()

"""Calibration against scikit-learn and hand-computed cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve as sklearn_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from ehrseq.evaluation import Calibration, brier_score, calibration_curve, expected_calibration_error
from tests.properties import examples


def scored(n=3000, seed=0, slope=1.0, shift=0.0):
    """Labels drawn from true risks, and scores whose log-odds are `slope` times the true ones plus `shift`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(-1, 1.3, n)
    y = rng.random(n) < 1 / (1 + np.exp(-x))
    return y, 1 / (1 + np.exp(-(slope * x + shift)))


def test_brier_and_curve_equal_scikit_learn():
    y, p = scored()
    assert brier_score(y, p) == pytest.approx(brier_score_loss(y, p), abs=1e-12)
    ours = calibration_curve(y, p, 10)
    observed, predicted = sklearn_curve(y, p, n_bins=10, strategy="quantile")
    np.testing.assert_allclose(ours.observed, observed, atol=0.02)  # a row at an edge may fall on the other side
    np.testing.assert_allclose(ours.predicted, predicted, atol=0.005)
    assert ours.rows.tolist() == [300] * 10


def test_the_expected_error_is_that_of_the_curve():
    y, p = scored(slope=1.7)
    curve = calibration_curve(y, p, 7)
    by_hand = (curve.rows * np.abs(curve.predicted - curve.observed)).sum() / curve.rows.sum()
    assert expected_calibration_error(y, p, 7) == pytest.approx(by_hand, abs=1e-12)
    assert expected_calibration_error([0, 1, 1, 1], [0.5, 0.5, 0.5, 0.5]) == pytest.approx(0.25)


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (2.0, 0.5), (0.5, -1.0), (1.0, 1.0)])
def test_slope_and_intercept_are_those_of_logistic_regression(slope, shift):
    y, p = scored(6000, slope=slope, shift=shift)
    z = np.log(p / (1 - p))[:, None]
    weights = np.random.default_rng(1).integers(0, 3, (2, len(y))).astype(float)
    calibration = Calibration(y, p)
    for drawn, found in zip([None, *weights], [calibration.slope()[0], *calibration.slope(weights)], strict=True):
        fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=500).fit(z, y, sample_weight=drawn)
        assert found == pytest.approx(fitted.coef_[0, 0], rel=1e-4)
    # Calibration in the large: with the slope held at 1, the recalibrated scores have the prevalence as their mean.
    a = calibration.intercept()[0]
    assert (1 / (1 + np.exp(-(z[:, 0] + a)))).mean() == pytest.approx(y.mean(), abs=1e-6)
    assert calibration.slope()[0] == pytest.approx(1 / slope, rel=0.1)


def test_many_weightings_give_what_each_gives_alone():
    y, p = scored(500)
    weights = np.random.default_rng(2).integers(0, 4, (5, 500)).astype(float)
    calibration = Calibration(y, p)
    for metric in (calibration.brier, calibration.expected_error, calibration.slope, calibration.intercept):
        alone = [metric(weights[i : i + 1])[0] for i in range(5)]
        np.testing.assert_allclose(metric(weights), alone, rtol=1e-6)


def test_weights_are_repeated_rows():
    y, p = scored(200)
    weights = np.random.default_rng(3).integers(0, 3, 200)
    repeated = Calibration(np.repeat(y, weights), np.repeat(p, weights))
    once = Calibration(y, p)
    for name in ("brier", "slope", "intercept"):
        assert getattr(once, name)(weights)[0] == pytest.approx(getattr(repeated, name)()[0], rel=1e-6)


@pytest.mark.parametrize(
    ("labels", "scores"),
    [
        ([0, 0, 0], [0.1, 0.2, 0.3]),
        ([1, 1], [0.2, 0.9]),
        ([0, 1, 0, 1], [0.5] * 4),
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]),
    ],
    ids=["no positive", "no negative", "one score", "separated"],
)
def test_where_no_slope_is_likeliest_there_is_none(labels, scores):
    assert np.isnan(Calibration(labels, scores).slope()[0])


def test_scores_of_0_and_1_are_probabilities():
    calibration = Calibration([0, 1, 1, 0, 1], [0.0, 1.0, 0.4, 0.6, 0.9])
    assert np.isfinite(calibration.brier()[0])
    assert np.isfinite(calibration.intercept()[0])


@examples(25)
@given(st.integers(0, 10_000), st.integers(20, 80))
def test_the_order_of_rows_and_a_second_copy_change_nothing(seed, n):
    rng = np.random.default_rng(seed)
    y, p = rng.random(n) < 0.4, rng.random(n).round(2)
    places = rng.permutation(n)
    for name in ("brier", "expected_error", "slope", "intercept"):
        value = getattr(Calibration(y, p), name)()[0]
        for labels, scores in ((y[places], p[places]), (np.tile(y, 2), np.tile(p, 2))):
            other = getattr(Calibration(labels, scores), name)()[0]
            if name == "expected_error" and len(labels) == 2 * n:
                continue  # quantiles of twice the rows lie elsewhere between two of them
            assert other == pytest.approx(value, rel=1e-5, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize(
    ("labels", "scores", "bins", "message"),
    [
        ([0, 1], [0.2, 1.2], 10, r"probabilities in \[0, 1\], got 1 others of 2, for example 1.2"),
        ([0, 1], [0.2, -0.1], 10, "got 1 others"),
        ([0, 1], [0.2, float("nan")], 10, "scores must be finite"),
        ([0, 2], [0.2, 0.3], 10, "labels must be 0 or 1"),
        ([0, 1], [0.2, 0.3], 0, "num_bins got 0"),
    ],
)
def test_bad_input_is_told(labels, scores, bins, message):
    with pytest.raises(ValueError, match=message):
        Calibration(labels, scores, bins)


def test_weights_of_the_wrong_shape_are_told():
    with pytest.raises(ValueError, match=r"weights must be \[B, 2\]"):
        Calibration([0, 1], [0.1, 0.2]).brier(np.ones((1, 3)))

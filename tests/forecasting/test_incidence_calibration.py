"""Aalen-Johansen by hand, against a naive twin, and the calibration of a planted world."""

import numpy as np
import pytest

from ehrseq.forecasting.incidence_calibration import (
    CAME,
    CENSORED,
    DIED_FIRST,
    aalen_johansen,
    calibrate_incidence,
    observed_causes,
)


def test_a_case_by_hand():
    # Five patients: outcome on day 1, censored on day 2, death on day 3, outcome on day 4, censored on day 10.
    days, causes = [1, 2, 3, 4, 10], [1, 0, 2, 1, 0]
    found = aalen_johansen(days, causes, [0.5, 1, 2, 3, 4, 10])[0]
    # Day 1: 5 at risk, F1 = 1/5, S = 4/5. Day 3: 3 at risk, F2 = 4/5 * 1/3, S = 8/15. Day 4: 2 at risk, F1 += 8/15 / 2.
    assert found[0] == pytest.approx([0, 1 / 5, 1 / 5, 1 / 5, 1 / 5 + 4 / 15, 1 / 5 + 4 / 15])
    assert found[1] == pytest.approx([0, 0, 0, 4 / 15, 4 / 15, 4 / 15])


def test_without_censoring_it_is_the_share():
    rng = np.random.default_rng(0)
    days, causes = rng.exponential(10, 200), rng.integers(1, 3, 200)
    found = aalen_johansen(days, causes, [3.0, 12.0, 1000.0])[0]
    for cause in (1, 2):
        shares = [np.mean((causes == cause) & (days <= day)) for day in (3.0, 12.0, 1000.0)]
        assert found[cause - 1] == pytest.approx(shares)


def naive(days, causes, day):
    """The definition, one day after the other."""
    stay, incidence = 1.0, [0.0, 0.0]
    for at in sorted(set(days)):
        if at > day:
            break
        risk = sum(each >= at for each in days)
        ended = [sum(each == at and cause == k for each, cause in zip(days, causes, strict=True)) for k in (1, 2)]
        incidence = [value + stay * count / risk for value, count in zip(incidence, ended, strict=True)]
        stay *= 1 - sum(ended) / risk
    return incidence


def test_ties_and_weights_against_the_definition():
    rng = np.random.default_rng(1)
    days, causes = rng.integers(0, 8, 30).astype(float), rng.integers(0, 3, 30)
    grid = [0.0, 1.5, 4.0, 6.0]
    for at, day in enumerate(grid):
        assert aalen_johansen(days, causes, grid)[0, :, at] == pytest.approx(naive(days, causes, day))
    # A weight of 2 is the observation twice, of 0 no observation.
    weights = rng.integers(0, 3, (4, 30))
    found = aalen_johansen(days, causes, grid, weights)
    for row, weight in enumerate(weights):
        repeated = aalen_johansen(np.repeat(days, weight), np.repeat(causes, weight), grid)[0]
        assert found[row] == pytest.approx(repeated, nan_ok=True)


def test_beyond_the_last_day_nothing_is_known():
    assert np.isnan(aalen_johansen([1.0, 2.0], [1, 0], [3.0])).all()
    assert aalen_johansen([1.0, 2.0], [1, 2], [3.0])[0, :, 0] == pytest.approx([0.5, 0.5])  # nobody is left
    assert np.isnan(aalen_johansen([], [], [1.0])).all()


def test_what_is_observed_of_a_record():
    inf = np.inf
    outcome, death = [3, 5, inf, 9, inf, 4], [inf, 4, 6, inf, inf, 4]
    days, causes = observed_causes(outcome, death, [30, 30, 30, 8, 30, 30], 10.0)
    # the outcome; death before it; death; the data end before the outcome; neither by the horizon; both on one day
    assert causes.tolist() == [CAME, DIED_FIRST, DIED_FIRST, CENSORED, CENSORED, CAME]
    assert days.tolist() == [3, 4, 6, 8, 10, 4]


def world(n, factor=1.0, seed=0):
    """Patients with a rate of their own, a competing death and censoring; risks predicted from `factor` x the rate."""
    rng = np.random.default_rng(seed)
    rate, death, end = rng.uniform(0.005, 0.05, n), 0.01, rng.uniform(5, 60, n)
    outcome, died = rng.exponential(1 / rate), rng.exponential(1 / death, n)
    days, causes = observed_causes(outcome, died, end, 30.0)
    grid = np.array([1.0, 7.0, 30.0])
    both = factor * rate + death
    predicted = (factor * rate / both)[:, None] * (1 - np.exp(-both[:, None] * grid))
    return predicted, days, causes, np.arange(n), grid


def test_true_risks_are_calibrated_and_false_ones_are_not():
    found = calibrate_incidence("falls", *world(4000))
    assert found.outcome == "falls"
    assert found.censored > 500
    assert found.deaths > 500
    for difference in found.difference:
        assert difference.low <= 0 <= difference.high
    assert len(found.groups) == 5
    assert found.worst_group < 0.06
    predicted = [group.predicted[-1] for group in found.groups]
    assert predicted == sorted(predicted)
    # The share of those seen to have it within 30 days is too low, since some were not followed for as long.
    _, days, causes, *_ = world(4000)
    naive_share = np.mean((causes == CAME) & (days <= 30))
    assert naive_share < found.everybody.low[-1]

    wrong = calibrate_incidence("falls", *world(4000, factor=2.0))
    assert all(difference.high < 0 for difference in wrong.difference)
    assert wrong.to_dict()["difference"][0]["high"] < 0


def test_intervals_are_over_patients():
    predicted, days, causes, subjects, grid = world(300)
    once = calibrate_incidence("x", predicted, days, causes, subjects, grid)
    four = [np.repeat(each, 4, axis=0) for each in (predicted, days, causes, subjects)]
    again = calibrate_incidence("x", *four, grid)
    assert again.patients == 300
    assert again.everybody.observed == pytest.approx(once.everybody.observed)
    assert again.everybody.low == pytest.approx(once.everybody.low)


def test_no_resamples_no_intervals():
    found = calibrate_incidence("x", *world(50), num_resamples=0)
    assert np.isnan(found.everybody.low).all()
    assert found.to_dict()["everybody"]["low"] == [None] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1, 0], [1.0]), r"must be \[n\] each"),
        (([-1.0], [1], [1.0]), "at least 0, got -1.0"),
        (([np.nan], [1], [1.0]), "at least 0, got nan"),
        (([1.0], [3], [1.0]), r"got \[3\]"),
        (([1.0], [1], [1.0], [[1.0, 2.0]]), r"weights must be \[B, 1\]"),
    ],
)
def test_bad_observations_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        aalen_johansen(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_days": [7.0, 1.0, 30.0]}, "that ascend"),
        ({"grid_days": [0.0, 1.0, 30.0]}, "above 0"),
        ({"grid_days": []}, "above 0"),
        ({"grid_days": [1.0, 30.0]}, r"must be \[n, 2\]"),
        ({"predicted": np.full((50, 3), 1.5)}, r"must lie in \[0, 1\]"),
        ({"predicted": np.full((50, 3), np.nan)}, "finite"),
        ({"subjects": [1]}, r"\(1,\)"),
        ({"predicted": np.empty((0, 3)), "days": [], "causes": [], "subjects": []}, "no prediction of x"),
    ],
)
def test_bad_predictions_are_told(change, message):
    names = ("predicted", "days", "causes", "subjects", "grid_days")
    given = dict(zip(names, world(50), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        calibrate_incidence("x", **given)

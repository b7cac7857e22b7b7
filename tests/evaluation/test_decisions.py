"""Net benefit and alert burden against counting by hand."""

import numpy as np
import pytest

from ehrseq.evaluation import alert_burden, decision_curve
from ehrseq.evaluation.decisions import alert_rate_threshold, alerts_at


def test_net_benefit_is_counted_row_by_row():
    rng = np.random.default_rng(0)
    y, p = rng.random(300) < 0.3, rng.random(300).round(1)  # with ties at the thresholds
    thresholds = [0.1, 0.25, 0.5, 0.8, 0.99]
    curve = decision_curve(y, p, thresholds)
    for place, t in enumerate(thresholds):
        hits = sum(1 for truth, score in zip(y, p, strict=True) if score >= t and truth)
        false = sum(1 for truth, score in zip(y, p, strict=True) if score >= t and not truth)
        assert curve.model[place] == pytest.approx(hits / 300 - false / 300 * t / (1 - t))
        assert curve.treat_all[place] == pytest.approx(y.mean() - (1 - y.mean()) * t / (1 - t))


def test_a_perfect_score_gains_the_prevalence():
    y = np.array([0, 1, 0, 0, 1])
    np.testing.assert_allclose(decision_curve(y, y * 1.0, [0.2, 0.9]).model, 0.4)


def test_alerts_find_what_was_asked_for_at_the_least_cost():
    y = np.array([1] * 10 + [0] * 30)
    p = np.concatenate([np.linspace(0.95, 0.5, 10), np.linspace(0.9, 0.1, 30)])
    (burden,) = alert_burden(y, p, [0.8])
    assert burden.threshold == pytest.approx(p[7])
    assert burden.sensitivity == 0.8
    alerts = (p >= p[7]).sum()
    assert burden.alerts_per_1000 == pytest.approx(1000 * alerts / 40)
    assert burden.positive_predictive_value == pytest.approx(8 / alerts)


def test_equal_scores_alert_together():
    (burden,) = alert_burden([1, 1, 0, 0], [0.5, 0.5, 0.5, 0.1], [0.5])
    assert (burden.sensitivity, burden.alerts_per_1000, burden.positive_predictive_value) == (1.0, 750.0, 2 / 3)


@pytest.mark.parametrize(
    ("scores", "rate", "threshold"),
    [
        ([0.1, 0.2, 0.3, 0.4], 0.25, 0.4),
        ([0.1, 0.2, 0.3, 0.4], 0.26, 0.3),  # at least a quarter and a bit
        ([0.1, 0.2, 0.3, 0.4], 0.01, 0.4),  # never nobody
        ([0.1, 0.2, 0.3, 0.4], 1.0, 0.1),
        ([0.3, 0.3, 0.3, 0.1], 0.25, 0.3),  # equal scores alert together
        (np.arange(10) / 10, 0.8, 0.2),  # 0.8 * 10 is 8
    ],
)
def test_the_threshold_of_an_alert_rate(scores, rate, threshold):
    assert alert_rate_threshold(scores, rate) == threshold


def test_alerts_where_no_score_reaches_the_threshold():
    burden = alerts_at([0, 1], [0.1, 0.2], 0.5)
    assert (burden.sensitivity, burden.alerts_per_1000, burden.wanted) == (0.0, 0.0, None)
    assert np.isnan(burden.positive_predictive_value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decision_curve([0, 1], [0.1, 0.2], [0.0]), "thresholds got"),
        (lambda: decision_curve([0, 1], [0.1, 0.2], []), "thresholds got"),
        (lambda: decision_curve([0, 1], [0.1, 2.0]), "expected probabilities"),
        (lambda: decision_curve([], []), "there are no rows"),
        (lambda: alert_burden([0, 0], [0.1, 0.2]), "no positive row"),
        (lambda: alert_burden([0, 1], [0.1, 0.2], [1.5]), "sensitivities got"),
        (lambda: alert_burden([0, 1], [0.1, float("nan")]), "scores must be finite"),
        (lambda: alert_rate_threshold([0.1], 0.0), "alert_rate got 0.0"),
        (lambda: alert_rate_threshold([], 0.1), "there are no rows"),
        (lambda: alerts_at([0, 0], [0.1, 0.2], 0.1), "no positive row"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()

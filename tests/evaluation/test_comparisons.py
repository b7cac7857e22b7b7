"""Paired differences and the t-test over seeds."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from ehrseq.evaluation import auroc, bootstrap_interval, paired_difference, seed_test
from ehrseq.evaluation.metrics import Ranking


def two_models(seed=0, n=600):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.3
    hard = rng.normal(size=n)  # what makes a row hard for both
    return y, y + hard + 0.3 * rng.normal(size=n), y + hard + 0.6 * rng.normal(size=n), np.arange(n) // 3


def test_the_difference_is_that_of_the_metrics():
    y, one, two, subjects = two_models()
    found = paired_difference(y, one, two, subjects, num_resamples=50)
    assert found.value == pytest.approx(roc_auc_score(y, one) - roc_auc_score(y, two))
    found = paired_difference(y, one, two, subjects, metric="auprc", num_resamples=50)
    assert found.value == pytest.approx(average_precision_score(y, one) - average_precision_score(y, two))


def test_pairing_narrows_the_interval():
    y, one, two, subjects = two_models()
    paired = paired_difference(y, one, two, subjects, num_resamples=400)
    first, second = (bootstrap_interval(Ranking(y, s).auroc, subjects, num_resamples=400) for s in (one, two))
    apart = np.hypot(first.high - first.low, second.high - second.low)
    assert paired.high - paired.low < 0.6 * apart


def test_a_model_differs_from_itself_by_nothing():
    y, one, _, subjects = two_models()
    found = paired_difference(y, one, one, subjects, num_resamples=50)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_seeds_are_compared_by_the_t_test():
    first, second = [0.80, 0.81, 0.83], [0.78, 0.79, 0.79]
    for equal in (False, True):
        expected = stats.ttest_ind(first, second, equal_var=equal)
        found = seed_test(first, second, equal_variances=equal)
        assert (found.statistic, found.p_value) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-10)
    assert found.difference == pytest.approx(np.mean(first) - np.mean(second))
    assert found.seeds == (3, 3)


def test_seeds_that_do_not_vary():
    assert seed_test([0.8, 0.8], [0.8, 0.8]).p_value == 1.0
    surely = seed_test([0.7, 0.7], [0.8, 0.8])
    assert (surely.p_value, surely.statistic) == (0.0, -np.inf)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seed_test([0.8], [0.7, 0.6]), "two seeds or more of each model, got 1 and 2"),
        (lambda: seed_test([0.8, float("nan")], [0.7, 0.6]), "expected finite metrics"),
        (lambda: paired_difference([0, 1], [0, 1], [0, 1], [1, 2], metric="f1"), "metric got 'f1'"),
        (lambda: paired_difference([0, 1], [0, 1], [0, 1], [1]), "subject_ids has 1 entries, labels 2"),
        (lambda: paired_difference([0, 1], [0, 1], [0, 1, 2], [1, 2]), "of one length"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_auroc_of_one_class_is_not_a_number():
    assert np.isnan(auroc([1, 1], [0.1, 0.2]))

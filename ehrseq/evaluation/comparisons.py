"""Is one model better than another? Paired differences on the same patients, and a t-test over seeds.

The bootstrap draws the same patients for both models, so that what makes a patient hard for both cancels. The t-test is
the paper's: the metric of each seed is one observation, and the question is whether two sets of seeds differ in mean
(two-sided, Welch's unequal variances unless told otherwise). It knows nothing of the patients' sampling error, as the
bootstrap knows nothing of the seeds'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ehrseq.evaluation.bootstrap import Interval, bootstrap_interval
from ehrseq.evaluation.metrics import FloatArray, Ranking

Metric = Callable[[Ranking, "FloatArray | None"], FloatArray]

COMPARED_METRICS: dict[str, Metric] = {
    "auroc": lambda ranking, weights: ranking.auroc(weights),
    "auprc": lambda ranking, weights: ranking.average_precision(weights),
}


@dataclass(frozen=True)
class SeedTest:
    """Two-sample t-test over seeds.

    Attributes:
        difference: Mean of the first minus mean of the second.
        statistic: t; infinite where neither varies and the means differ.
        p_value: Two-sided.
        seeds: Number of seeds of each.
    """

    difference: float
    statistic: float
    p_value: float
    seeds: tuple[int, int]


def paired_difference(
    labels: ArrayLike,
    scores: ArrayLike,
    other_scores: ArrayLike,
    subject_ids: ArrayLike,
    *,
    metric: str = "auroc",
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """A metric of `scores` minus that of `other_scores`, with its interval over patients.

    Args:
        labels: `[n]` binary labels.
        scores: `[n]` scores of one model.
        other_scores: `[n]` scores of the other for the same rows.
        subject_ids: `[n]` patient of each row.
        metric: "auroc" or "auprc".
        num_resamples: Bootstrap resamples.
        seed: Seed of the draws.

    Raises:
        ValueError: An unknown metric, arrays of different lengths, or scores that are not finite.
    """
    if metric not in COMPARED_METRICS:
        raise ValueError(f"metric got {metric!r}; expected one of {sorted(COMPARED_METRICS)}.")
    ours, theirs = Ranking(labels, scores), Ranking(labels, other_scores)
    if len(np.asarray(subject_ids)) != len(ours.order):
        raise ValueError(f"subject_ids has {len(np.asarray(subject_ids))} entries, labels {len(ours.order)}.")
    of = COMPARED_METRICS[metric]
    return bootstrap_interval(
        lambda weights: of(ours, weights) - of(theirs, weights), subject_ids, num_resamples=num_resamples, seed=seed
    )


def seed_test(values: Sequence[float], others: Sequence[float], *, equal_variances: bool = False) -> SeedTest:
    """The paper's two-sample t-test: do two models' metrics, a value a seed, differ in mean?

    Args:
        values: Metric of each seed of one model, two or more.
        others: Of the other.
        equal_variances: Student's pooled variance instead of Welch's.

    Raises:
        ValueError: Fewer than two seeds of a model, or a value that is not finite.
    """
    from scipy import stats

    first, second = np.asarray(values, np.float64), np.asarray(others, np.float64)
    if min(len(first), len(second)) < 2:
        raise ValueError(f"expected two seeds or more of each model, got {len(first)} and {len(second)}.")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("expected finite metrics, got NaN or infinite ones: leave out what is not estimable.")
    difference = float(first.mean() - second.mean())
    if np.ptp(first) == 0 and np.ptp(second) == 0:  # scipy would say NaN
        equal = difference == 0
        return SeedTest(
            difference, 0.0 if equal else np.copysign(np.inf, difference), float(equal), (len(first), len(second))
        )
    # From means and deviations: with the values themselves scipy warns where the seeds of one model agree.
    moments = [(each.mean(), each.std(ddof=1), len(each)) for each in (first, second)]
    result = stats.ttest_ind_from_stats(*moments[0], *moments[1], equal_var=equal_variances)
    return SeedTest(difference, float(result.statistic), float(result.pvalue), (len(first), len(second)))

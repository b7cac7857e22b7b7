"""Intervals of HyMaTE's forecasts, by split conformal prediction on tuning stays (Vovk et al. 2005; Lei et al. 2018).

    calibrate_stay_forecasts(model, extractor, tuning, train, horizons=(120.0,))      # into model.config

One time is drawn in each tuning stay, one stay of each subject counts, and each variable has scores |y - y^| of its
own: so the scores of a variable are exchangeable with that of a new stay, drawn and asked in the same way, and at least
1 - alpha of such stays lie inside. That is a mean over stays, not a promise for each kind of patient; and since
pretraining has chosen its epoch by the same stays (at other times), it is exact but for that choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ehrseq.batches.forecast_scoring import forecast_rows
from ehrseq.batches.triplet_rows import HORIZON_MINUTES, ForecastRows
from ehrseq.pipelines.stay_forecasts import expected_values

if TYPE_CHECKING:
    from ehrseq.encode.triplets import TripletTable
    from ehrseq.modeling.hymate_intervals import ForecastCalibration
    from ehrseq.modeling.modeling_hymate import HyMaTEForPreTraining
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

ALPHAS = (0.1, 0.2, 0.5)
"""Intervals that 90, 80 and 50 percent of the stays lie in."""

_OTHER_TIMES = 0x5EED  # times by which no epoch was chosen


def conformal_quantile(scores: ArrayLike, alpha: float) -> float:
    """What at most `alpha` of new scores exceed: the score of rank ceil((1 - alpha)(n + 1)) of n.

    Args:
        scores: `[n]` scores of calibration, exchangeable with the new one; infinite where nothing would do.
        alpha: Share that may exceed it.

    Returns:
        The quantile; NaN where that rank is above n, or the score there is infinite: no finite one holds.

    Raises:
        ValueError: An alpha that is no share, or a score that is NaN.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha got {alpha!r}; expected a share between 0 and 1.")
    values = np.sort(np.asarray(scores, np.float64))
    if np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} of {len(values)} scores are NaN; leave them out.")
    rank = math.ceil((1 - Fraction(str(alpha))) * (len(values) + 1))  # 0.3 * 10 is 3 here, and not 3.0000000000000004
    if rank > len(values) or np.isinf(values[rank - 1]):
        return math.nan
    return float(values[rank - 1])


def calibrate_stay_forecasts(
    model: HyMaTEForPreTraining,
    extractor: HyMaTEFeatureExtractor,
    tuning: TripletTable,
    train: TripletTable,
    *,
    horizons: tuple[float, ...] = (HORIZON_MINUTES,),
    max_length: int | None = None,
    alphas: Sequence[float] = ALPHAS,
    units: Mapping[str, str] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> ForecastCalibration:
    """Fit the intervals of a pretrained model, and write them into its config: save it afterwards.

    Args:
        model: A `HyMaTEForPreTraining`.
        extractor: Its feature extractor.
        tuning: Stays that the model has not learnt from.
        train: Those that it has: they say which variables it could learn.
        horizons: Windows that it was pretrained for, see `ForecastRows`.
        max_length: Triplets that it reads at most.
        alphas: Shares of stays that may lie outside.
        units: Unit of each variable, as `ehrseq.encode.triplets.variable_units` finds them.
        seed: Of the times in the tuning stays.
        batch_size: Rows in one forward pass.
        progress: Show a progress bar.

    Raises:
        ValueError: Other horizons than the model has, an alpha that is no share, stays that the extractor cannot read
            or that are too short.
    """
    from ehrseq.modeling.hymate_intervals import ForecastCalibration

    if len(horizons) != model.config.num_horizons:
        raise ValueError(f"horizons got {horizons}; the model has {model.config.num_horizons} of them.")
    options: dict[str, Any] = {"horizons": horizons, "max_length": max_length}
    rows = ForecastRows(tuning, extractor, epochs=1, seed=seed + _OTHER_TIMES, **options)
    forecasts = forecast_rows(model, extractor, rows, batch_size=batch_size, progress=progress)
    targets = np.stack([rows.targets(row) for row in range(len(rows))])
    scores = misses(extractor, expected_values(extractor, forecasts.predictions), targets)
    scores[~_one_of_each(rows.subject_ids, seed)] = np.nan
    grouped = np.stack([np.where(forecasts.measured[:, None, :] == group, scores, np.nan) for group in (False, True)])
    calibration = ForecastCalibration(
        variables=tuple(extractor.variables),
        horizons=rows.horizons,
        first_minute=rows.first_minute,
        learnt=ForecastRows(train, extractor, **options).possible_targets(),
        counts=(~np.isnan(grouped)).sum(1),
        half_widths={float(alpha): _quantiles(grouped, alpha) for alpha in alphas},
        units=dict(units or {}),
    )
    model.config.forecast_calibration = calibration.to_dict()
    model.config.read_calibration()  # what is written can be read
    return calibration


def misses(
    extractor: HyMaTEFeatureExtractor, values: NDArray[np.float64], targets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """|y - y^|, in the variables' own units.

    Args:
        extractor: Intervals end at its bounds, so what was measured outside of them lies in none: infinite.
        values: y^, [..., V].
        targets: y as measured, [..., V]; NaN where nothing was.
    """
    outside = (targets < np.asarray(extractor.value_lower)) | (targets > np.asarray(extractor.value_upper))
    array: NDArray[np.float64] = np.where(outside, np.inf, np.abs(targets - values))
    return array


def _one_of_each(subject_ids: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """One row of each subject, drawn."""
    order = np.random.default_rng((seed, _OTHER_TIMES)).permutation(len(subject_ids))
    chosen = np.zeros(len(subject_ids), bool)
    chosen[order[np.unique(subject_ids[order], return_index=True)[1]]] = True
    return chosen


def _quantiles(scores: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Of scores [2, n, H, V], NaN where there is none: [2, H, V]."""
    size = (scores.shape[0], *scores.shape[2:])
    quantiles = [
        conformal_quantile(column[~np.isnan(column)], alpha)
        for column in np.moveaxis(scores, 1, -1).reshape(-1, scores.shape[1])
    ]
    return np.array(quantiles).reshape(size)

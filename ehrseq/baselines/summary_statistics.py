"""Each stay as per-variable summary statistics: the features of the baseline that a neural model must beat.

Twelve numbers of each variable (minimum, maximum, mean, standard deviation, median, first, last, number, slope, first
and last time, mean of the last 12 hours) and the static values. Trees on them are strong on PhysioNet-2012: the order
and spacing of the measurements is nearly all that they throw away.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ehrseq.encode.triplets import TripletTable

SUMMARIES = (
    "min",
    "max",
    "mean",
    "std",
    "median",
    "first",
    "last",
    "count",
    "slope",
    "first_time",
    "last_time",
    "mean_last_12h",
)
"""Statistics of each variable. Times are in hours since the window's start, the slope is in units an hour."""

LAST_MINUTES = 720.0


def summarise(table: TripletTable) -> tuple[NDArray[np.float32], list[str]]:
    """Features of every stay.

    Args:
        table: The stays.

    Returns:
        `[s, 12 V + D]` float32 and the column names, `<variable> <statistic>` variable by variable, then the static
        columns. NaN where a variable was never measured (its count is 0), where all measurements are of one time (no
        slope), where none is of the window's last 12 hours, and where a static value is unknown.
    """
    spec = table.spec
    size, count = len(SUMMARIES), len(spec.variables)
    features = np.full((len(table), count * size), np.nan, np.float32)
    features[:, SUMMARIES.index("count") :: size] = 0

    # 1. Triplets grouped by (stay, variable), in order of time: each group is one slice.
    group = table.stay_ids * count + table.variable_ids
    order = np.argsort(group, kind="stable")
    group = group[order]
    values = np.asarray(table.values, np.float64)[order]
    hours = np.asarray(table.minutes, np.float64)[order] / 60
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    if len(starts):
        ends = np.append(starts[1:], len(group))
        groups = _summaries(values, hours, starts, ends, spec.window_hours - LAST_MINUTES / 60)
        stays, variables = np.divmod(group[starts], count)
        for number, column in enumerate(groups):
            features[stays, variables * size + number] = column
    names = [f"{name} {statistic}" for name in spec.variable_names for statistic in SUMMARIES]
    return np.hstack([features, table.static.astype(np.float32)]), [*names, *spec.static_columns]


def _summaries(
    values: NDArray[np.float64],
    hours: NDArray[np.float64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    late_from: float,
) -> list[NDArray[np.float64]]:
    """The statistics of `SUMMARIES`, `[groups]` each."""
    number = (ends - starts).astype(np.float64)
    of = np.repeat(np.arange(len(starts)), ends - starts)

    def mean_of(what: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.add.reduceat(what, starts) / number

    # Sums of deviations, not of squares: no cancellation.
    mean, mean_hour = mean_of(values), mean_of(hours)
    deviation, hour_deviation = values - mean[of], hours - mean_hour[of]
    variance, hour_variance = mean_of(deviation**2), mean_of(hour_deviation**2)
    covariance = mean_of(deviation * hour_deviation)
    slope = np.divide(covariance, hour_variance, out=np.full(len(starts), np.nan), where=hour_variance > 0)

    by_value = np.lexsort((values, of))
    low, high = starts + (ends - starts - 1) // 2, starts + (ends - starts) // 2
    median = (values[by_value][low] + values[by_value][high]) / 2

    late = hours >= late_from
    late_number = np.add.reduceat(late.astype(np.float64), starts)
    late_sum = np.add.reduceat(np.where(late, values, 0.0), starts)
    late_mean = np.divide(late_sum, late_number, out=np.full(len(starts), np.nan), where=late_number > 0)
    return [
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
        mean,
        np.sqrt(variance),
        median,
        values[starts],
        values[ends - 1],
        number,
        slope,
        hours[starts],
        hours[ends - 1],
        late_mean,
    ]

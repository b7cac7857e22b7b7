"""95 % intervals by a bootstrap that draws patients, not rows.

A patient contributes several prediction times, and these are not independent: drawing rows would make every interval
too narrow. A resample is kept as counts per patient, so that a metric is computed under weights without copying rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

MetricOfWeights = Callable[[FloatArray | None], FloatArray]
"""A metric under row weights `[B, n]` (None = all ones), `[B]` values."""

# Weights held at once: 4 million float64 = 32 MB, which stays near the cache and bounds the memory for any table.
_CHUNK_CELLS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A metric with its interval.

    Attributes:
        value: The metric on the rows as they are.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def patient_weights(
    subject_ids: ArrayLike, num_resamples: int, *, seed: int = 0, chunk_cells: int = _CHUNK_CELLS
) -> Iterator[FloatArray]:
    """Row weights of bootstrap resamples over patients, in chunks.

    Args:
        subject_ids: `[n]` patient of each row.
        num_resamples: How many resamples in all.
        seed: Seed; the draws do not depend on the chunk size.
        chunk_cells: Largest number of weights in one chunk.

    Yields:
        `[b, n]` weights: how often the patient of each row was drawn.
    """
    _, patient_of_row = np.unique(np.asarray(subject_ids), return_inverse=True)
    num_patients = int(patient_of_row.max()) + 1 if len(patient_of_row) else 0
    rng = np.random.default_rng(seed)
    per_chunk = max(1, chunk_cells // max(1, len(patient_of_row)))
    for first in range(0, num_resamples, per_chunk):
        size = min(per_chunk, num_resamples - first)
        if num_patients == 0:
            yield np.zeros((size, 0))
            continue
        drawn = rng.integers(0, num_patients, size=(size, num_patients))
        drawn += np.arange(size)[:, None] * num_patients
        counts = np.bincount(drawn.ravel(), minlength=size * num_patients).reshape(size, num_patients)
        yield counts[:, patient_of_row].astype(np.float64)


def bootstrap_interval(
    metric: MetricOfWeights,
    subject_ids: ArrayLike,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a metric under resampling of patients.

    Args:
        metric: Takes weights `[B, n]` (None = all ones) and returns `[B]` values, e.g. `Ranking(y, s).auroc`.
        subject_ids: `[n]` patient of each row.
        num_resamples: Number of resamples.
        confidence: Coverage of the interval.
        seed: Seed of the draws.

    Returns:
        The metric with its interval. Resamples in which the metric does not exist (one class drawn) are left out.

    Raises:
        ValueError: `num_resamples` or `confidence` out of range.
    """
    return bootstrap_intervals(
        {"metric": metric}, subject_ids, num_resamples=num_resamples, confidence=confidence, seed=seed
    )["metric"]


def bootstrap_intervals(
    metrics: Mapping[str, MetricOfWeights],
    subject_ids: ArrayLike,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of several metrics of the same rows, under the same resamples: drawn once for all.

    Args:
        metrics: Name -> metric, as `bootstrap_interval` takes it.
        subject_ids: `[n]` patient of each row.
        num_resamples: Number of resamples.
        confidence: Coverage of the intervals.
        seed: Seed of the draws.

    Returns:
        Name -> the metric with its interval; NaN ends where it exists in no resample.

    Raises:
        ValueError: `num_resamples` or `confidence` out of range.
    """
    if num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"expected num_resamples >= 1 and 0 < confidence < 1, got {num_resamples} and {confidence}.")
    drawn: dict[str, list[FloatArray]] = {name: [] for name in metrics}
    for weights in patient_weights(subject_ids, num_resamples, seed=seed):
        for name, metric in metrics.items():
            drawn[name].append(metric(weights))
    intervals = {}
    for name, metric in metrics.items():
        value, values = float(metric(None)[0]), np.concatenate(drawn[name])
        values = values[np.isfinite(values)]
        ends = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2]) if len(values) else (np.nan, np.nan)
        intervals[name] = Interval(value, float(ends[0]), float(ends[1]))
    return intervals

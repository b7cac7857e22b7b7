"""Numbers of a feature extractor: what is saved of the training stays, and what a user gives, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def checked_numbers(name: str, values: Sequence[float], length: int, least: float = -np.inf) -> list[float]:
    """Saved numbers as a list of floats.

    Args:
        name: What they are called.
        values: The numbers.
        length: How many there must be.
        least: The smallest that may stand there.

    Raises:
        ValueError: Others than that many finite numbers of at least `least`.
    """
    try:
        numbers = [float(number) for number in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} got {values!r}; expected {length} numbers.") from error
    if len(numbers) != length or not all(np.isfinite(number) and number >= least for number in numbers):
        raise ValueError(
            f"{name} got {len(numbers)} numbers; expected {length} finite ones of at least {least:g}, one for each "
            "variable (static column). Build the extractor with fit()."
        )
    return numbers


def checked_percentiles(values: Sequence[float]) -> tuple[float, float]:
    """Two ascending percentiles, or a ValueError that says what was given."""
    pair = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []
    if len(pair) != 2 or not all(isinstance(p, int | float) for p in pair) or not 0 <= pair[0] < pair[1] <= 100:
        raise ValueError(f"clip_percentiles got {values!r}; expected two ascending numbers from 0 to 100.")
    return float(pair[0]), float(pair[1])


def clipped_moments(values: np.ndarray, low: float, high: float) -> tuple[float, float, float, float]:
    """Mean and deviation of the clipped values, and their bounds; a deviation of 0 (a constant) becomes 1."""
    if not len(values):
        return 0.0, 1.0, 0.0, 0.0
    lower, upper = np.percentile(values, (low, high))
    clipped = np.clip(values, lower, upper)
    mean, deviation = float(clipped.mean()), float(clipped.std())
    return mean, deviation if deviation > 1e-6 * max(1.0, abs(mean)) else 1.0, float(lower), float(upper)


def flat_numbers(name: str, values: Any) -> np.ndarray:
    """A stay's numbers as a flat float64 array, or a ValueError that names them."""
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} of a stay must be numbers, got {type(values).__name__}: {error}.") from error
    if array.ndim != 1:
        raise ValueError(f"{name} of a stay must be a flat list of numbers, got shape {list(array.shape)}.")
    return array

"""How far a forecast of a stay may be off: what `HyMaTEConfig.forecast_calibration` holds, read and checked.

A forecast y^ of a variable has the interval y^ - q to y^ + q. q is a quantile of |y - y^| over tuning stays, fitted by
split conformal prediction at the end of pretraining (ehrseq.training.forecast_calibration): of n stays the value of
rank ceil((1 - alpha)(n + 1)), so that a new stay lies inside with a probability of at least 1 - alpha, whatever the
model is worth. Where that rank is above n, no finite interval has that promise, and there is none.

A variable that the stay has measured before is foretold far better than one that is new to it, so each of the two has
quantiles of its own, and the promise holds for each.

Glossary: H horizons, V variables, A alphas. Everything is in the variables' own units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

GROUPS = ("new", "measured")
"""Whether the triplets that the model reads hold the variable: what a half width stands under, at 0 and 1."""


@dataclass(frozen=True)
class ForecastCalibration:
    """What is known of a checkpoint's forecasts.

    Attributes:
        variables: Names of the variables, [V].
        horizons: Ends of the target windows in minutes after the last triplet, ascending, [H]. A window begins where
            the one before ends, the first at the last triplet.
        first_minute: Earliest minute of a stay after which training has forecast.
        learnt: Measurements of the training stays that could be a target, int64 [H, V]; where there is none, the
            model has never learnt the variable.
        counts: Tuning stays behind each half width, int64 [2, H, V], the first axis as in `GROUPS`.
        half_widths: alpha -> q, float64 [2, H, V], NaN where the tuning stays are too few.
        units: Unit of a variable, as the training events have it; absent where they have none, or several.
    """

    variables: tuple[str, ...]
    horizons: tuple[float, ...]
    first_minute: float
    learnt: np.ndarray
    counts: np.ndarray
    half_widths: Mapping[float, np.ndarray]
    units: Mapping[str, str]

    @property
    def alphas(self) -> list[float]:
        """The shares of stays that may lie outside, ascending."""
        return sorted(self.half_widths)

    def at(self, alpha: float) -> np.ndarray:
        """Half widths of intervals that 1 - alpha of the stays lie in, [2, H, V].

        Raises:
            ValueError: None were fitted for this alpha.
        """
        if alpha not in self.half_widths:
            raise ValueError(
                f"alpha got {alpha!r}; the intervals of this checkpoint were fitted for {self.alphas}: take one of "
                "those, or fit others (ehrseq.training.calibrate_stay_forecasts)."
            )
        return self.half_widths[alpha]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for `from_dict`; what is NaN here is None there."""

        def plain(widths: np.ndarray) -> dict[str, Any]:
            listed = widths.astype(object)
            listed[np.isnan(widths)] = None
            return {group: listed[place].tolist() for place, group in enumerate(GROUPS)}

        return {
            "variables": list(self.variables),
            "horizons": list(self.horizons),
            "first_minute": self.first_minute,
            "learnt": self.learnt.tolist(),
            "counts": {group: self.counts[place].tolist() for place, group in enumerate(GROUPS)},
            "half_widths": {str(alpha): plain(widths) for alpha, widths in self.half_widths.items()},
            "units": dict(self.units),
        }

    @classmethod
    def from_dict(cls, content: Any, num_horizons: int, num_variables: int) -> ForecastCalibration:
        """The inverse of `to_dict`.

        Args:
            content: What the config has.
            num_horizons: H of the model.
            num_variables: V of the model.

        Raises:
            ValueError: A field is absent, of another size, or holds what cannot be.
        """
        size = (num_horizons, num_variables)
        try:
            calibration = cls(
                variables=tuple(str(name) for name in content["variables"]),
                horizons=tuple(float(end) for end in content["horizons"]),
                first_minute=float(content["first_minute"]),
                learnt=_numbers(content["learnt"], size),
                counts=np.stack([_numbers(content["counts"][group], size) for group in GROUPS]),
                half_widths={
                    float(alpha): np.stack([_numbers(widths[group], size, optional=True) for group in GROUPS])
                    for alpha, widths in content["half_widths"].items()
                },
                units={str(name): str(unit) for name, unit in content["units"].items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"forecast_calibration: {type(error).__name__} {error}; expected what ForecastCalibration.to_dict "
                f"gives, for num_horizons={num_horizons} and num_variables={num_variables}. Fit it anew "
                "(ehrseq.training.calibrate_stay_forecasts), or set it to None."
            ) from error
        calibration._check(num_horizons, num_variables)
        return calibration

    def _check(self, num_horizons: int, num_variables: int) -> None:
        wrong = None
        ends = self.horizons
        if len(self.variables) != num_variables or len(set(self.variables)) < num_variables:
            wrong = f"variables got {len(self.variables)} names, expected {num_variables} different ones"
        elif len(ends) != num_horizons or any(not a < b for a, b in zip((0.0, *ends[:-1]), ends, strict=True)):
            wrong = f"horizons got {list(ends)}, expected {num_horizons} ascending numbers of minutes"
        elif not math.isfinite(self.first_minute):
            wrong = f"first_minute got {self.first_minute}, expected a number of minutes"
        elif any(not 0 < alpha < 1 for alpha in self.half_widths):
            wrong = f"half_widths are of {self.alphas}, expected shares between 0 and 1"
        elif unknown := sorted(set(self.units) - set(self.variables)):
            wrong = f"units are of {unknown}, which are no variables"
        if wrong:
            raise ValueError(f"forecast_calibration: {wrong}. Fit it anew, or set it to None.")


def _numbers(values: Any, size: tuple[int, int], *, optional: bool = False) -> np.ndarray:
    """Counts [H, V], or half widths, of which some may be None.

    Raises:
        ValueError: Another shape, a negative number, or none.
    """
    array = np.array([[math.nan if optional and x is None else x for x in row] for row in values])
    if array.shape != size or array.dtype.kind not in ("fi" if optional else "i"):
        raise ValueError(f"got {array.dtype} {list(array.shape)}, expected numbers {list(size)}")
    if np.isinf(array).any() or (array < 0).any():
        raise ValueError("got a negative or infinite number, expected numbers of at least 0")
    return array.astype(np.float64 if optional else np.int64)


__all__ = ["GROUPS", "ForecastCalibration"]

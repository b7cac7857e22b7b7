"""How well does HyMaTE foretell the next values of a stay? Errors beside those of simple forecasts, and its intervals.

One time is drawn in each stay, as in pretraining, and the first value of each variable in the window after it is asked
for. Beside the model stand "last value", which carries the variable's last value in the stay forward (the training mean
where it has none), and "mean", the training mean. Errors are of values clipped to the range of the training stays, as
the model's loss is: a single pH of 735 would otherwise be all that an error shows. Whether a value lies in its interval
is asked of the value as measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ehrseq.batches.forecast_scoring import forecast_rows
from ehrseq.batches.triplet_rows import ForecastRows
from ehrseq.data.dataset import EventDataset
from ehrseq.encode.triplets import build_triplets
from ehrseq.forecasting.stay_values import load_stay_forecaster
from ehrseq.pipelines.stay_forecasts import StayForecaster, stay_values
from ehrseq.tasks.moments import last_times

if TYPE_CHECKING:
    from ehrseq.encode.triplets import TripletTable
    from ehrseq.modeling.modeling_hymate import HyMaTEForPreTraining
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

VALUE_FORECASTS = ("model", "last value", "mean")


@dataclass(frozen=True)
class ValueErrors:
    """The forecasts of one variable in one window, or of all variables together.

    Attributes:
        variable: Its name; "all" for all variables together, whose errors are in standard deviations.
        unit: Its unit, None where nobody knows.
        horizon: The window.
        targets: Values that were asked for.
        rmse: Root of the mean squared error in the variable's own unit, of each of `VALUE_FORECASTS`.
        mae: Mean absolute error in the variable's own unit, likewise.
        deviation: The variable's standard deviation in training: errors over it are in standard units.
        intervals: Values whose forecast has an interval.
        coverage: Share of those that lie inside; None where there are none.
        coverage_error: Its standard error.
        width: Mean width of their intervals, in the variable's own unit (of all variables: in deviations).
    """

    variable: str
    unit: str | None
    horizon: str | None
    targets: int
    rmse: dict[str, float]
    mae: dict[str, float]
    deviation: float
    intervals: int
    coverage: float | None
    coverage_error: float | None
    width: float | None


@dataclass(frozen=True)
class StayForecastReport:
    """What `evaluate_stay_forecasts` measured.

    Attributes:
        alpha: Share of values that may lie outside their interval.
        stays: Stays that were asked.
        skipped: Stays that are too short to be asked.
        not_forecast: Variable -> values that were asked for and that the model has never learnt to forecast.
        together: All variables of each window together.
        variables: Each window and variable with a value.
    """

    alpha: float
    stays: int
    skipped: int
    not_forecast: dict[str, int]
    together: tuple[ValueErrors, ...]
    variables: tuple[ValueErrors, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table of all windows and variables, and what was left out."""
        inside = f"inside {100 * (1 - self.alpha):g} %"
        lines = [
            f"| variable | window | values | RMSE: {' | RMSE: '.join(VALUE_FORECASTS)} | "
            f"{' | '.join(f'MAE: {who}' for who in VALUE_FORECASTS[:2])} | RMSE, deviations | {inside} | mean width |",
            "|---|---|" + "---:|" * 9,
        ]
        for entry in (*self.together, *self.variables):
            name = entry.variable if entry.unit is None else f"{entry.variable} ({entry.unit})"
            cells = [f"{entry.rmse[who]:.4g}" for who in VALUE_FORECASTS]
            cells += [f"{entry.mae[who]:.4g}" for who in VALUE_FORECASTS[:2]]
            cells.append(f"{entry.rmse['model'] / entry.deviation:.3f}")
            if entry.coverage is None or entry.width is None:
                cells += ["no interval", ""]
            else:
                some = "" if entry.intervals == entry.targets else f", of {entry.intervals:,}"
                cells += [f"{entry.coverage:.3f} ± {entry.coverage_error:.3f}{some}", f"{entry.width:.4g}"]
            lines.append(f"| {name} | {entry.horizon or '?'} | {entry.targets:,} | {' | '.join(cells)} |")
        told = [f"{self.stays:,} stays, one time each; {self.skipped:,} are too short."]
        if self.not_forecast:
            counts = ", ".join(f"{name} {count:,}" for name, count in self.not_forecast.items())
            told.append(f"Never learnt, so not forecast: {counts}.")
        told.append("Errors of all variables together are in standard deviations of training.")
        return "\n".join([*lines, "", " ".join(told)]) + "\n"


def evaluate_stay_forecasts(
    checkpoint: str | Path | StayForecaster,
    dataset: str | Path,
    split: str = "held_out",
    *,
    alpha: float = 0.1,
    seed: int = 0,
    batch_size: int = 64,
) -> StayForecastReport:
    """Ask a pretrained HyMaTE about the stays of a split.

    Args:
        checkpoint: A pretrained HyMaTE, see `load_stay_forecaster`, or what that gave.
        dataset: Folder of a prepared dataset.
        split: Whose stays.
        alpha: Share of stays that may lie outside their intervals; of a checkpoint that is loaded here.
        seed: Of the times in the stays.
        batch_size: Stays in one forward pass.

    Raises:
        ValueError: No such split, no stay that is long enough, a checkpoint without calibration.
    """
    forecaster = checkpoint if isinstance(checkpoint, StayForecaster) else load_stay_forecaster(checkpoint, alpha=alpha)
    extractor = cast("HyMaTEFeatureExtractor", forecaster.extractor)
    data = EventDataset(dataset)
    known = data.splits["split"].unique().to_list()
    if split not in known:
        raise ValueError(f"split got {split!r}; {dataset} has {sorted(known)}.")
    events = data.events([split])
    times = last_times(events) if extractor.spec.window_start == "before_prediction" else None
    return evaluate_stays(forecaster, build_triplets(events, extractor.spec, times), seed=seed, batch_size=batch_size)


def evaluate_stays(
    forecaster: StayForecaster, table: TripletTable, *, seed: int = 0, batch_size: int = 64
) -> StayForecastReport:
    """Ask a pretrained HyMaTE about some stays; see `evaluate_stay_forecasts`."""
    calibration = forecaster.calibration
    if calibration is None:
        raise ValueError(
            "this checkpoint does not say what it forecasts: config.forecast_calibration is None. Fit it first: "
            "ehrseq.training.calibrate_stay_forecasts(model, extractor, tuning, train, horizons=...)."
        )
    extractor = cast("HyMaTEFeatureExtractor", forecaster.extractor)
    model = cast("HyMaTEForPreTraining", forecaster.model)
    rows = ForecastRows(
        table,
        extractor,
        horizons=tuple(calibration.horizons),
        first_minute=calibration.first_minute,
        max_length=model.config.max_position_embeddings,
        epochs=1,
        seed=seed,
    )
    given = forecast_rows(model, extractor, rows, batch_size=batch_size, progress=False)
    minutes = np.array([rows.last_minute_of_input(row) for row in range(len(rows))])
    foretold = stay_values(
        extractor, calibration, given.predictions, given.measured, minutes, minutes, forecaster.alpha
    )
    targets = np.stack([rows.targets(row) for row in range(len(rows))])  # as measured, [n, H, V]
    means = np.asarray(extractor.value_means)
    everything = np.arange(extractor.num_variables)
    last = np.where(given.measured, extractor.denormalise(everything, np.nan_to_num(given.last_values)), means)
    asked = _Asked(
        targets=targets,
        clipped=np.clip(targets, extractor.value_lower, extractor.value_upper),
        forecasts={
            "model": foretold.values,
            "last value": np.broadcast_to(last[:, None, :], targets.shape),
            "mean": np.broadcast_to(means, targets.shape),
        },
        low=foretold.low,
        high=foretold.high,
        deviations=np.asarray(extractor.value_deviations),
    )
    unlearnt = (~np.isnan(targets) & np.isnan(foretold.values)).sum((0, 1))
    together, variables = [], []
    for window, horizon in enumerate(forecaster.windows):
        together.append(asked.errors("all", None, horizon, window, None))
        variables += [
            asked.errors(name, calibration.units.get(name), horizon, window, place)
            for place, name in enumerate(extractor.variables)
        ]
    names = extractor.variables
    return StayForecastReport(
        alpha=forecaster.alpha,
        stays=len(rows),
        skipped=rows.skipped,
        not_forecast={names[place]: int(unlearnt[place]) for place in np.flatnonzero(unlearnt).tolist()},
        together=tuple(entry for entry in together if entry.targets),
        variables=tuple(entry for entry in variables if entry.targets),
    )


@dataclass(frozen=True)
class _Asked:
    """Values that were asked for, [n, H, V], NaN where none was, and what was said of them.

    Attributes:
        targets: As measured.
        clipped: In the range of the training stays.
        forecasts: Of each of `VALUE_FORECASTS`; the model's are NaN where it has none.
        low: Lower ends of the model's intervals.
        high: Upper ends.
        deviations: Standard deviation of each variable, [V].
    """

    targets: NDArray[np.float64]
    clipped: NDArray[np.float64]
    forecasts: dict[str, NDArray[np.float64]]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    deviations: NDArray[np.float64]

    def errors(
        self, name: str, unit: str | None, horizon: str | None, window: int, variable: int | None
    ) -> ValueErrors:
        """Of one variable in its own unit, or (None) of all in standard deviations."""
        one = slice(None) if variable is None else slice(variable, variable + 1)
        scale = self.deviations if variable is None else np.ones(1)

        def part(array: NDArray[np.float64]) -> NDArray[np.float64]:
            return array[:, window, one]

        known = ~np.isnan(part(self.targets)) & ~np.isnan(part(self.forecasts["model"]))
        count = int(known.sum())
        off = {
            who: ((part(values) - part(self.clipped)) / scale)[known] for who, values in self.forecasts.items() if count
        }
        bounded = known & ~np.isnan(part(self.low))
        inside = (part(self.targets) >= part(self.low)) & (part(self.targets) <= part(self.high))
        intervals = int(bounded.sum())
        coverage = float(inside[bounded].mean()) if intervals else None
        return ValueErrors(
            variable=name,
            unit=unit,
            horizon=horizon,
            targets=count,
            rmse={who: float(np.sqrt(np.mean(error**2))) for who, error in off.items()},
            mae={who: float(np.mean(np.abs(error))) for who, error in off.items()},
            deviation=1.0 if variable is None else float(self.deviations[variable]),
            intervals=intervals,
            coverage=coverage,
            coverage_error=None if coverage is None else math.sqrt(coverage * (1 - coverage) / intervals),
            width=float(((part(self.high) - part(self.low)) / scale)[bounded].mean()) if intervals else None,
        )

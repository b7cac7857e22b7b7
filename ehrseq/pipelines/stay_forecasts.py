"""What a stay's next values are: the answers of `pipeline("ehr-forecast")` on a HyMaTE that was pretrained to forecast.

HyMaTE reads the triplets of a stay up to the last one, and forecasts the first value of each variable in the window (or
windows) after that one; how long they are stands in `config.forecast_calibration`, and so does how far a forecast may
be off. Values are clipped to the range of the training stays (the extractor's 0.1 and 99.9 percentiles), since the
model has never seen another as an input or as a target.

What cannot be told is None and has a `reason`; nothing is guessed, and no 0 stands for it.

Glossary: b stays, H windows, V variables.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

VALUE_REASONS = {
    "window_over": "the window ended before the prediction time: nothing was measured in the stay since it began",
    "never_learnt": "the training stays hold no measurement of the variable that could be forecast",
    "no_calibration": "no interval: the checkpoint holds none, it was pretrained without tuning stays",
    "too_early": "no interval: the stay has not lasted as long as those that the model has learnt from",
    "too_few": "no interval: too few tuning stays measure the variable for one that holds at this level",
}
"""Why a value, or its interval, is None. The first two leave no value."""

WITHOUT_VALUE = ("window_over", "never_learnt")


class _Calibration(Protocol):
    """What a config knows of its forecasts (`ForecastCalibration`)."""

    @property
    def variables(self) -> Sequence[str]: ...

    @property
    def horizons(self) -> Sequence[float]: ...

    @property
    def first_minute(self) -> float: ...

    @property
    def learnt(self) -> np.ndarray: ...

    @property
    def units(self) -> Mapping[str, str]: ...

    def at(self, alpha: float) -> np.ndarray: ...


class _StayExtractor(Protocol):
    """What reads stays (`HyMaTEFeatureExtractor`)."""

    @property
    def value_counts(self) -> Sequence[int]: ...

    @property
    def value_lower(self) -> Sequence[float]: ...

    @property
    def value_upper(self) -> Sequence[float]: ...

    @property
    def task_reasons(self) -> Mapping[str, str]: ...

    @property
    def unanswerable_reasons(self) -> Collection[str]: ...

    @property
    def variables(self) -> Sequence[str]: ...

    def denormalise(self, variable_ids: np.ndarray, values: np.ndarray) -> np.ndarray: ...

    def sourced_rows(self, patient: Any, tasks: Any, prediction_time: Any, max_length: int | None) -> Any: ...

    def reasons_against(
        self, patient: Any, tasks: Sequence[Mapping[str, Any]], prediction_time: Any
    ) -> list[str | None]: ...

    def report_left_out(self, skipped: Any, unknown: Any, known: int) -> None: ...


@dataclass(frozen=True)
class StayValues:
    """Forecasts of some stays, in the variables' own units.

    Attributes:
        values: Expected values, float64 [b, H, V]; NaN where there is none.
        low: Lower ends of their intervals, [b, H, V]; NaN where there is none.
        high: Upper ends.
        reasons: Why something is NaN, keys of `VALUE_REASONS`, object [b, H, V]; None where nothing is.
    """

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    reasons: np.ndarray


def expected_values(extractor: _StayExtractor, predictions: np.ndarray) -> np.ndarray:
    """Predictions of the model, z-scores [..., V], as values in the variables' own units, float64 [..., V].

    Raises:
        ValueError: A prediction is not finite.
    """
    if not np.isfinite(predictions).all():
        raise ValueError(
            "the model forecasts values that are not finite: its weights are damaged, or overflow in their type. Load "
            "it again, or with dtype='float32'."
        )
    values = extractor.denormalise(np.arange(predictions.shape[-1]), predictions)
    array: np.ndarray = np.clip(values, extractor.value_lower, extractor.value_upper)
    return array


def stay_values(
    extractor: _StayExtractor,
    calibration: _Calibration | None,
    predictions: np.ndarray,
    measured: np.ndarray,
    last_minutes: np.ndarray,
    asked_minutes: np.ndarray,
    alpha: float,
) -> StayValues:
    """Forecasts of some stays with their intervals.

    Args:
        extractor: The checkpoint's feature extractor.
        calibration: What its config knows of its forecasts.
        predictions: Of the model, z-scores [b, H, V].
        measured: Whether the row that the model read holds the variable, bool [b, V].
        last_minutes: Minute of the last triplet, [b].
        asked_minutes: Minute of the prediction time, [b].
        alpha: Share of stays that may lie outside their interval.

    Raises:
        ValueError: A prediction that is not finite, or an alpha that no intervals were fitted for.
    """
    values = expected_values(extractor, predictions)
    reasons = np.full(values.shape, None, object)
    if calibration is None:
        reasons[:] = "no_calibration"
        learnt = np.broadcast_to(np.asarray(extractor.value_counts) > 0, values.shape[1:])
        widths = np.full(values.shape, np.nan)
    else:
        learnt = calibration.learnt > 0
        both = calibration.at(alpha)
        widths = np.where(measured[:, None, :], both[1], both[0])
        reasons[np.isnan(widths)] = "too_few"
        early = last_minutes < calibration.first_minute
        widths[early], reasons[early] = np.nan, "too_early"
    unlearnt = np.broadcast_to(~learnt, values.shape)
    reasons[unlearnt] = "never_learnt"
    none = unlearnt
    if calibration is not None:
        ends = last_minutes[:, None] + np.asarray(calibration.horizons)
        over = np.broadcast_to((ends < asked_minutes[:, None])[..., None], values.shape)
        reasons[over] = "window_over"
        none = unlearnt | over
    values = np.where(none, np.nan, values)
    low = np.maximum(values - widths, extractor.value_lower)
    high = np.minimum(values + widths, extractor.value_upper)
    return StayValues(values, low, high, reasons)


def window_names(calibration: _Calibration | None, num_horizons: int) -> list[str | None]:
    """The windows in words: "2h" up to two hours after the last triplet, "2h-6h" the one behind it."""
    if calibration is None:  # nobody knows
        return [None] if num_horizons == 1 else [f"window {number + 1}" for number in range(num_horizons)]
    ends = [_duration(end) for end in calibration.horizons]
    return [ends[0], *(f"{begun}-{end}" for begun, end in pairwise(ends))]


class StayForecaster:
    """Forecasts of the values of stays, one row of the model each.

    Args:
        model: A trained `HyMaTEForPreTraining`; it is put into evaluation mode.
        extractor: The feature extractor of the checkpoint.
        alpha: Share of stays that may lie outside their intervals, one that the checkpoint's were fitted for.

    Raises:
        ValueError: A model without a trained forecast head, another model's extractor, an alpha without intervals.
    """

    def __init__(self, model: Any, extractor: Any, *, alpha: float = 0.1) -> None:
        name = getattr(model.config, "name_or_path", "") or type(model).__name__
        if not hasattr(model, "forecast_head") or hasattr(model, "classifier"):
            raise ValueError(
                f"{name} is a {type(model).__name__}, which has no forecasting head: give the pretrained checkpoint "
                "(AutoModelForPreTraining), not the one that was finetuned on an outcome."
            )
        if untrained := model.untrained_weights():
            raise ValueError(
                f"{name} lacks {untrained}, which were drawn at random: it was saved by another class than "
                f"{type(model).__name__} (finetuned on an outcome?). Give the pretrained checkpoint."
            )
        if not hasattr(extractor, "sourced_rows") or not hasattr(extractor, "denormalise"):
            raise ValueError(
                f"the feature extractor of {name} is a {type(extractor).__name__}, which reads no stays: import ehrseq "
                "first, or pass trust_remote_code=True to use the checkpoint's own."
            )
        self.model = model.eval()
        self.extractor: _StayExtractor = extractor
        self.calibration: _Calibration | None = model.config.read_calibration()
        known = None if self.calibration is None else list(self.calibration.variables)
        if len(extractor.variables) != model.config.num_variables or known not in (None, list(extractor.variables)):
            raise ValueError(
                f"{name} forecasts {model.config.num_variables} variables {(known or [])[:5]}, and its feature "
                f"extractor reads {len(extractor.variables)}, {list(extractor.variables)[:5]}: they belong apart."
            )
        self.alpha = alpha
        self.check_alpha(alpha)
        if self.calibration is None:
            logger.warning(f"{name}: forecasts have no interval, and nobody knows their horizon. No calibration.")
        self._other_units: set[str] = set()

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why a stay has no values, in words."""
        return self.extractor.task_reasons

    def check_alpha(self, alpha: float) -> None:
        """Raise a ValueError where the checkpoint has intervals, and none for `alpha`."""
        if self.calibration is not None:
            self.calibration.at(alpha)

    @property
    def windows(self) -> list[str | None]:
        """The model's windows in words, [H]."""
        return window_names(self.calibration, self.model.config.num_horizons)

    def rows(self, patient: Any, prediction_time: Any = None, max_length: int | None = None) -> dict[str, Any]:
        """The model's inputs of one stay.

        Args:
            patient: A patient, a table of one subject or a stay of triplets, see `HyMaTEFeatureExtractor`.
            prediction_time: Patients only: nothing later is read; default: the patient's own, else the last row's.
            max_length: Triplets that the model reads, the most recent ones; default: `config.max_position_embeddings`.

        Returns:
            The channels as tensors `[1, n]` and `[1, D]`, and under "stay" what `answer` needs, no tensor.

        Raises:
            ValueError: A patient that cannot be read, or without a value of a known variable.
        """
        length = self.model.config.max_position_embeddings if max_length is None else max_length
        read = self.extractor.sourced_rows(patient, (), prediction_time, length)
        stay = read.stay
        self.extractor.report_left_out(stay.skipped, stay.unknown, len(read.kept))
        (reason,) = self.extractor.reasons_against(patient, [{"name": "forecast"}], prediction_time)
        last = {int(variable): place for place, variable in enumerate(stay.variable_ids)}
        dated = stay.start is not None
        asked = (read.prediction_time - stay.start) / _MINUTE_US if dated else float(stay.minutes[-1])
        about = {
            "reason": reason if reason in self.extractor.unanswerable_reasons else None,
            "start": stay.start,
            "last_minute": float(stay.minutes[-1]),
            "asked_minute": max(asked, float(stay.minutes[-1])),
            "last_values": {variable: float(stay.values[place]) for variable, place in last.items()},
            "last_minutes": {variable: float(stay.minutes[place]) for variable, place in last.items()},
            "units": {variable: read.events[stay.sources[place]].unit for variable, place in last.items()},
            "measured": sorted(set(stay.variable_ids[read.kept].tolist())),
        }
        tensors = {name: torch.as_tensor(channel).unsqueeze(0) for name, channel in read.channels.items()}
        return {**tensors, "stay": about}

    def answer(self, predictions: Tensor, stay: Mapping[str, Any], *, alpha: float | None = None) -> dict[str, Any]:
        """The answer for one stay.

        Args:
            predictions: Of the model for this row: `[V]`, or `[H, V]` with several windows, or with a 1 before.
            stay: What `rows` gave under "stay".
            alpha: Share of stays that may lie outside their intervals, another than the forecaster's.

        Returns:
            `outcomes`, always empty, and `values`: for each window and variable `variable`, `unit` (None where nobody
            knows), `horizon`, `value`, `low`, `high`, `last_value` and `last_time` (None where the stay has none; in
            minutes where it has no dates), and a `reason` where something else is None. The patient's death leaves no
            values, and a `reason`.
        """
        if stay["reason"] is not None:
            return {"outcomes": [], "values": [], "reason": stay["reason"]}
        config, names = self.model.config, list(self.extractor.variables)
        scores = predictions.detach().float().cpu().numpy().astype(np.float64)
        measured = np.zeros((1, len(names)), bool)
        measured[0, stay["measured"]] = True
        foretold = stay_values(
            self.extractor,
            self.calibration,
            scores.reshape(1, config.num_horizons, config.num_variables),
            measured,
            np.array([stay["last_minute"]]),
            np.array([stay["asked_minute"]]),
            self.alpha if alpha is None else alpha,
        )
        values = []
        for window, horizon in enumerate(self.windows):
            for variable, name in enumerate(names):
                at = (0, window, variable)
                entry = {
                    "variable": name,
                    "unit": self._unit(name, stay["units"].get(variable)),
                    "horizon": horizon,
                    "value": _number(foretold.values[at]),
                    "low": _number(foretold.low[at]),
                    "high": _number(foretold.high[at]),
                    "last_value": stay["last_values"].get(variable),
                    "last_time": _time(stay["start"], stay["last_minutes"].get(variable)),
                }
                if foretold.reasons[at] is not None:
                    entry["reason"] = foretold.reasons[at]
                values.append(entry)
        return {"outcomes": [], "values": values}

    def _unit(self, name: str, own: str | None) -> str | None:
        """The unit that a variable is forecast in; the patient's own where the checkpoint knows none."""
        known = None if self.calibration is None else self.calibration.units.get(name)
        if known is not None and own is not None and known != own and name not in self._other_units:
            self._other_units.add(name)
            logger.warning(
                f"{name} is measured in {own!r}, and the model was trained in {known!r}: where these are not the same "
                "unit, the forecasts mean nothing. Named once."
            )
        return known if known is not None else own


_MINUTE_US = 60_000_000
_EPOCH = datetime(1970, 1, 1)


def _time(start: int | None, minute: float | None) -> Any:
    """ISO 8601 of a minute of a stay, the minute itself where the stay has no dates."""
    if minute is None or start is None:
        return minute
    return (_EPOCH + timedelta(microseconds=start + round(minute * _MINUTE_US))).isoformat()


def _number(value: np.float64) -> float | None:
    return None if math.isnan(value) else float(value)


def _duration(minutes: float) -> str:
    return f"{minutes / 60:g}h" if minutes % 60 == 0 else f"{minutes:g}min"

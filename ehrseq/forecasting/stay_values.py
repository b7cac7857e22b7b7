"""Forecasts of the values of many stays: one table, the same numbers as `pipeline("ehr-forecast")` gives for each.

    table = forecast_stays("hymate/pretrained", events)                 # every stay, at the end of its window
    table = forecast_stays("hymate/pretrained", events, moments)        # at the times of a table

A stay that cannot be read, or whose patient is dead, has one row without a variable, and its `reason`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.batches.forecast_scoring import forecast_rows
from ehrseq.batches.readable_stays import ReadableStays, readable_stays
from ehrseq.batches.reasons import leaves_nothing_to_foretell, with_reasons
from ehrseq.batches.triplet_rows import TripletRows
from ehrseq.data.schema import LABEL_KEYS, validate_events
from ehrseq.hub.checkpoints import check_checkpoint_files, load_parts, quiet_loading
from ehrseq.pipelines.stay_forecasts import StayForecaster, StayValues, stay_values

if TYPE_CHECKING:
    from ehrseq.encode.triplets import TripletTable
    from ehrseq.modeling.modeling_hymate import HyMaTEForPreTraining
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

STAY_VALUES_SCHEMA = {
    "subject_id": pl.Int64(),
    "prediction_time": pl.Datetime("us"),
    "variable": pl.String(),
    "unit": pl.String(),
    "horizon": pl.String(),
    "value": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "last_value": pl.Float64(),
    "last_time": pl.Datetime("us"),
    "reason": pl.String(),
}
_MINUTE_US = 60_000_000
_ASKED = {"forecast": {"name": "forecast"}}  # a question that death alone speaks against


def foretells_values(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is of the family that reads stays and foretells values (HyMaTE).

    Raises:
        ValueError: It is no checkpoint.
        OSError: There is none.
    """
    from transformers import AutoConfig

    check_checkpoint_files(str(checkpoint))
    with quiet_loading():
        return bool(AutoConfig.from_pretrained(str(checkpoint), trust_remote_code=False).model_type == "hymate")


def load_stay_forecaster(checkpoint: str | Path, *, alpha: float = 0.1) -> StayForecaster:
    """Load a pretrained HyMaTE with its feature extractor.

    Args:
        checkpoint: Folder, such as `pretrained` in that of `ehrseq train`, or `owner/name` on the Hub.
        alpha: Share of stays that may lie outside their intervals.

    Raises:
        ValueError: A checkpoint of another family, without a trained forecast head, or without intervals for `alpha`.
        OSError: There is none.
    """
    if not foretells_values(checkpoint):
        raise ValueError(f"{checkpoint} holds a model of events; expected HyMaTE, which reads stays.")
    model, extractor, _ = load_parts(str(checkpoint), "AutoModelForPreTraining")
    return StayForecaster(model, extractor, alpha=alpha)


def forecast_stays(
    checkpoint: str | Path | StayForecaster,
    events: pl.DataFrame,
    moments: pl.DataFrame | None = None,
    *,
    alpha: float = 0.1,
    batch_size: int = 64,
    is_part: bool = False,
    notes: Counter[str] | None = None,
    progress: bool = True,
) -> pl.DataFrame:
    """Forecast the values of all stays of an event table.

    Args:
        checkpoint: A pretrained HyMaTE, see `load_stay_forecaster`, or what that gave.
        events: Event table of whole patients.
        moments: Table of subject_id, prediction_time; None = every stay, at the end of its window.
        alpha: Share of stays that may lie outside their intervals; of a checkpoint that is loaded here.
        batch_size: Stays in one forward pass.
        is_part: These are some patients of a larger dataset: that no stay begins is no error.
        notes: Counts what was left out, where given.
        progress: Show a progress bar.

    Returns:
        A row for each stay, window and variable, see `STAY_VALUES_SCHEMA`: the entries of `StayForecaster.answer`.

    Raises:
        ValueError: No stay begins in these events; a checkpoint that does not forecast stays.
    """
    forecaster = checkpoint if isinstance(checkpoint, StayForecaster) else load_stay_forecaster(checkpoint, alpha=alpha)
    extractor = cast("HyMaTEFeatureExtractor", forecaster.extractor)
    events = validate_events(events)
    counted: Counter[str] = Counter()
    stays = readable_stays(events, extractor, moments, counted, is_part=is_part)
    stays = _without_the_dead(stays, events, extractor, counted)
    for name, count in counted.items():
        if notes is not None:
            notes[name.replace("risks not given", "forecasts not given").replace("not scored", "not forecast")] += count
    silent = stays.answers.filter(pl.col("row").is_null()).select(*LABEL_KEYS, "reason")
    table = silent.cast({"reason": pl.String})
    if stays.table is not None and len(stays.table):
        table = pl.concat([table, _forecasts(forecaster, stays.table, batch_size, progress)], how="diagonal")
    absent = [
        pl.lit(None, dtype).alias(name) for name, dtype in STAY_VALUES_SCHEMA.items() if name not in table.columns
    ]
    return (
        table.with_columns(absent)
        .select(*STAY_VALUES_SCHEMA)
        .cast(STAY_VALUES_SCHEMA)  # type: ignore[arg-type]
        .sort(LABEL_KEYS, maintain_order=True)
    )


def _without_the_dead(
    stays: ReadableStays, events: pl.DataFrame, extractor: HyMaTEFeatureExtractor, notes: Counter[str]
) -> ReadableStays:
    """The stays whose patients may live at their prediction time; the others keep a row without a stay."""
    if stays.answers.is_empty():
        return stays
    asked = stays.answers.select(*LABEL_KEYS, task=pl.lit("forecast"))
    told = with_reasons(events, asked, _ASKED, extractor.kind_of)
    dead = leaves_nothing_to_foretell()
    answers = stays.answers.with_columns(
        told.select(why=pl.when(dead).then("reason")).to_series().alias("why"),
    )
    for (reason,), rows in answers.drop_nulls("why").group_by("why"):
        notes[f"forecasts not given: {extractor.task_reasons[str(reason)]}"] += rows.height
    answers = answers.with_columns(
        reason=pl.coalesce("why", "reason"), row=pl.when(pl.col("why").is_null()).then("row")
    ).drop("why")
    kept = answers["row"].drop_nulls().to_numpy()
    table = None if stays.table is None else stays.table.subset(kept)
    places = pl.when(pl.col("row").is_not_null()).then(pl.col("row").is_not_null().cum_sum() - 1)
    return ReadableStays(answers.with_columns(row=places.cast(pl.Int64)), table)


def _forecasts(forecaster: StayForecaster, table: TripletTable, batch_size: int, progress: bool) -> pl.DataFrame:
    """The rows of stays that can be read."""
    extractor = cast("HyMaTEFeatureExtractor", forecaster.extractor)
    model = cast("HyMaTEForPreTraining", forecaster.model)
    rows = TripletRows(table, extractor, max_length=model.config.max_position_embeddings)
    given = forecast_rows(model, extractor, rows, batch_size=batch_size, progress=progress)
    read = rows.table
    last = read.minutes[read.offsets[1:] - 1]
    asked = (read.prediction_times - read.starts).astype("timedelta64[us]").astype(np.int64) / _MINUTE_US
    foretold = stay_values(
        extractor,
        forecaster.calibration,
        given.predictions,
        given.measured,
        last,
        np.maximum(asked, last),
        forecaster.alpha,
    )
    return _as_table(forecaster, read, foretold)


def _as_table(forecaster: StayForecaster, table: TripletTable, foretold: StayValues) -> pl.DataFrame:
    """Forecasts `[b, H, V]` as one row each, beside what the stays measured last."""
    names = list(forecaster.extractor.variables)
    windows = forecaster.windows
    stays, sizes = len(table), foretold.values.shape
    last_values = np.full((stays, len(names)), np.nan)
    last_times = np.full((stays, len(names)), np.datetime64("NaT", "us"), "datetime64[us]")
    at = (table.stay_ids, table.variable_ids)  # in order of time: the last one stays
    last_values[at] = table.values
    micros = np.rint(table.minutes * _MINUTE_US).astype("timedelta64[us]")
    last_times[at] = table.starts.astype("datetime64[us]")[table.stay_ids] + micros
    units = {} if forecaster.calibration is None else forecaster.calibration.units

    def each(array: NDArray[np.generic]) -> NDArray[np.generic]:
        """`[b, V]` for every window."""
        return np.repeat(array[:, None, :], sizes[1], axis=1).ravel()

    per_stay = sizes[1] * sizes[2]
    return pl.DataFrame(
        {
            "subject_id": np.repeat(table.subject_ids, per_stay),
            "prediction_time": np.repeat(table.prediction_times.astype("datetime64[us]"), per_stay),
            "variable": pl.Series(names * (stays * sizes[1]), dtype=pl.String),
            "unit": pl.Series([units.get(name) for name in names] * (stays * sizes[1]), dtype=pl.String),
            "horizon": pl.Series([window for window in windows for _ in names] * stays, dtype=pl.String),
            "value": foretold.values.ravel(),
            "low": foretold.low.ravel(),
            "high": foretold.high.ravel(),
            "last_value": each(last_values),
            "last_time": each(last_times),
            "reason": pl.Series(foretold.reasons.ravel().tolist(), dtype=pl.String),
        }
    ).with_columns(pl.col("value", "low", "high", "last_value").fill_nan(None))

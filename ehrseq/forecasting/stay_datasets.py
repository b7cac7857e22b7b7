"""Forecasts of the values of many stays: of a folder of records, or of a prepared dataset file by file, resumable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import polars as pl

from ehrseq.batches.requests import check_request
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import validate_events
from ehrseq.data.shards import ShardPart, dataset_shards, read_blocks, scan_shard
from ehrseq.data.sources import load_events
from ehrseq.forecasting.datasets import ForecastCounts
from ehrseq.forecasting.stay_values import STAY_VALUES_SCHEMA, forecast_stays, load_stay_forecaster
from ehrseq.hub.checkpoints import checkpoint_digest
from ehrseq.pipelines.stay_forecasts import StayForecaster
from ehrseq.tasks.moments import check_known, checked_times
from ehrseq.work.engine import Engine
from ehrseq.work.files import remove, write_whole
from ehrseq.work.parts import kept_parts, run_parts, table_digest

_ORDER = ("subject_id", "prediction_time")


@lru_cache(maxsize=1)
def kept_stay_forecaster(checkpoint: str, digest: str, alpha: float) -> StayForecaster:
    """`load_stay_forecaster`, once for many calls of a worker; loaded again where its files have changed."""
    return load_stay_forecaster(checkpoint, alpha=alpha)


@dataclass(frozen=True)
class StayForecastPart(ShardPart[ForecastCounts]):
    """Forecasts of the stays of one file.

    Attributes:
        checkpoint: Folder or name of the checkpoint.
        alpha: Share of stays that may lie outside their intervals.
        moments: Parquet file of subject_id, prediction_time; None = the end of each window.
    """

    checkpoint: str
    alpha: float
    moments: str | None

    def make(self) -> ForecastCounts:
        """See `RecordedPart.make`."""
        forecaster = kept_stay_forecaster(self.checkpoint, checkpoint_digest(self.checkpoint), self.alpha)
        moments = None if self.moments is None else pl.read_parquet(self.moments)
        report = ConversionReport()
        tables = [pl.DataFrame(schema=STAY_VALUES_SCHEMA)]
        for events in read_blocks(self.shard):
            report.events_written += events.height
            report.subjects += events["subject_id"].n_unique()
            tables.append(_of_block(forecaster, events, moments, report.notes))
        write_whole(self.beside(".values.parquet"), pl.concat(tables).write_parquet)
        return {"events": report.events_written, "subjects": report.subjects, "notes": dict(report.notes)}


def forecast_stay_records(
    checkpoint: str | Path,
    data: str | Path | pl.DataFrame,
    *,
    prediction_times: str | Path | pl.DataFrame | None = None,
    alpha: float = 0.1,
    on_error: str = "raise",
    progress: bool = True,
) -> tuple[pl.DataFrame, ConversionReport]:
    """Forecast the stays of an event table, or of a folder of records.

    Args:
        checkpoint: Folder of a pretrained HyMaTE with its feature extractor, or `owner/name` on the Hub.
        data: FHIR or MEDS (folder or file), or an event table.
        prediction_times: Table (or Parquet or CSV file) of subject_id, prediction_time; None = the end of each stay's
            window. Nothing later than it is read.
        alpha: Share of stays that may lie outside their intervals.
        on_error: FHIR only: "raise" or "skip" (counted in the report).
        progress: Show progress bars.

    Returns:
        The table of `forecast_stays`, and what was read and left out.

    Raises:
        ValueError: A checkpoint that does not forecast stays, unreadable data, prediction times of unknown patients, no
            stay.
    """
    check_request(data, None, prediction_times, None)
    forecaster = load_stay_forecaster(checkpoint, alpha=alpha)
    if isinstance(data, pl.DataFrame):
        events, report = validate_events(data), ConversionReport()
    else:
        events, report = load_events(data, on_error=on_error, progress=progress)
    if events.is_empty():
        raise ValueError(f"the data hold no event, so there is no stay to forecast. What was read:\n{report}")
    moments = _moments(prediction_times, events["subject_id"].unique())
    return forecast_stays(forecaster, events, moments, notes=report.notes, progress=progress), report


def forecast_stay_dataset(
    checkpoint: str | Path,
    dataset: str | Path,
    parts: str | Path,
    *,
    prediction_times: str | Path | pl.DataFrame | None = None,
    alpha: float = 0.1,
    splits: Sequence[str] | None = None,
    engine: Engine | None = None,
) -> tuple[pl.DataFrame, ConversionReport]:
    """Forecast the stays of a prepared dataset, file by file.

    Args:
        checkpoint: As of `forecast_stay_records`.
        dataset: Folder of a prepared dataset.
        parts: Folder for the forecasts of each file: a run that was stopped goes on where it was. Removed at the end.
        prediction_times: As of `forecast_stay_records`.
        alpha: As of `forecast_stay_records`.
        splits: Splits whose patients are forecast, None = all.
        engine: Where to work, default all cores of this machine.

    Returns:
        As `forecast_stay_records`.

    Raises:
        ValueError: No prepared dataset, an unknown split, or what `forecast_stay_records` refuses.
    """
    check_request(dataset, None, prediction_times, None)
    shards = dataset_shards(dataset, splits)
    digest = checkpoint_digest(checkpoint)
    kept_stay_forecaster(str(checkpoint), digest, alpha)  # refused here, and not by a worker
    report = ConversionReport(source=str(dataset), format="meds", files=len(shards))
    subjects = pl.concat([scan_shard(shard).select(pl.col("subject_id").unique()).collect() for shard in shards])
    moments = _moments(prediction_times, subjects["subject_id"])
    key = [str(Path(dataset).resolve()), digest, alpha, None if moments is None else table_digest(moments)]
    with kept_parts(Path(parts) / "values", key) as folder:
        moments_file = None if moments is None else str(folder / "moments.parquet")
        if moments is not None:
            write_whole(folder / "moments.parquet", moments.write_parquet)
        work = [StayForecastPart(shard, str(folder), str(checkpoint), alpha, moments_file) for shard in shards]
        for counts in run_parts(work, desc="Forecasting", folder=parts, engine=engine):
            report.events_written += counts["events"]
            report.subjects += counts["subjects"]
            report.notes.update(counts["notes"])
        files = [part.beside(".values.parquet") for part in work]
        table = pl.concat([pl.read_parquet(file, hive_partitioning=False) for file in files])
        if table.is_empty():
            raise ValueError(f"{dataset} holds no stay to forecast. What was read:\n{report}")
    remove(Path(parts))
    return table.sort(*_ORDER, maintain_order=True), report


def _of_block(
    forecaster: StayForecaster, events: pl.DataFrame, moments: pl.DataFrame | None, notes: Counter[str]
) -> pl.DataFrame:
    """Forecasts of some patients of a dataset, at their own times."""
    if moments is not None:
        moments = moments.filter(pl.col("subject_id").is_in(events["subject_id"].unique().implode()))
        if moments.is_empty():
            return pl.DataFrame(schema=STAY_VALUES_SCHEMA)
    return forecast_stays(forecaster, events, moments, is_part=True, notes=notes, progress=False)


def _moments(prediction_times: str | Path | pl.DataFrame | None, subjects: pl.Series) -> pl.DataFrame | None:
    if prediction_times is None:
        return None
    moments = checked_times(prediction_times)
    check_known(moments, subjects)
    return moments

"""Forecasts of many patients: of a table, of a folder of records, or of a prepared dataset file by file.

The same bytes whatever the workers, blocks and restarts, since what is drawn depends on the record and the seed alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import polars as pl

from ehrseq.batches.requests import check_request
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import validate_events
from ehrseq.data.shards import ShardPart, dataset_shards, read_blocks, scan_shard
from ehrseq.data.sources import load_events
from ehrseq.forecasting.prompts import (
    ForecastSettings,
    asked_digest,
    check_forecast_settings,
    draw,
    draw_futures,
    groups_of,
    kept_forecaster,
    load_forecaster,
    moments_here,
    read_asked,
    records_at,
)
from ehrseq.forecasting.task_forecast import TaskForecast
from ehrseq.forecasting.trajectory_files import TokenRows, no_trajectories, write_trajectories
from ehrseq.hub.checkpoints import checkpoint_digest
from ehrseq.pipelines.ehr_forecast import EhrForecastPipeline
from ehrseq.tasks.moments import (
    LabelSource,
    check_known,
    checked_times,
    last_times,
    moments_of_all,
    moments_of_labels,
    of_patients,
    read_labelled_times,
)
from ehrseq.tokenization.ehr_forecast_prompts import REASONS_AGAINST_FORECAST
from ehrseq.work.engine import Engine
from ehrseq.work.files import remove, write_whole
from ehrseq.work.parts import kept_parts, run_parts, table_digest

FORECAST_SCHEMA = pl.Schema(
    {
        "subject_id": pl.Int64(),
        "prediction_time": pl.Datetime("us"),
        "task": pl.String(),
        "score": pl.Float64(),
        "standard_error": pl.Float64(),
        "effective_number": pl.Float64(),
        "num_trajectories": pl.Int64(),
        "cut": pl.Float64(),
        "horizon_days": pl.Float64(),
        "reason": pl.String(),
    }
)
"""Columns of a table of forecasts: `score` is the probability, the rest as of `OutcomeEstimate`; null with a reason."""

INCIDENCE_SCHEMA = pl.Schema(
    {
        "subject_id": pl.Int64(),
        "prediction_time": pl.Datetime("us"),
        "task": pl.String(),
        "days": pl.Float64(),
        "probability": pl.Float64(),
        "standard_error": pl.Float64(),
    }
)
"""Columns of a table of cumulative incidence, one row a day of the grid."""

_AT_ONCE = 64  # records at hand
_ORDER = ("subject_id", "prediction_time", "task")


@dataclass
class ForecastTables:
    """Forecasts of many patients.

    Attributes:
        forecasts: In the columns of `FORECAST_SCHEMA`.
        incidence: In those of `INCIDENCE_SCHEMA`; without a row where no steps were asked for.
        trajectories: With the number of each (`TokenRows.table`); without a row where they are in files, or not kept.
        asked: The questions, with the words in which an estimate differs from them.
        report: What was read and left out.
        notice: What everybody must know of the model.
    """

    forecasts: pl.DataFrame
    incidence: pl.DataFrame
    trajectories: pl.DataFrame
    asked: tuple[TaskForecast, ...]
    report: ConversionReport = field(default_factory=ConversionReport)
    notice: str = ""


class ForecastCounts(TypedDict):
    """What was read of one file."""

    events: int
    subjects: int
    notes: dict[str, int]


@dataclass(frozen=True)
class ForecastPart(ShardPart[ForecastCounts]):
    """Forecasts of the patients of one file.

    Attributes:
        checkpoint: Folder or name of the checkpoint.
        asked: The questions.
        settings: How they are answered.
        moments: Parquet file of subject_id, prediction_time, task; None = the end of each record.
        apart: Whether each question has times of its own.
    """

    checkpoint: str
    asked: tuple[TaskForecast, ...]
    settings: ForecastSettings
    moments: str | None
    apart: bool

    def make(self) -> ForecastCounts:
        """See `RecordedPart.make`."""
        forecaster = kept_forecaster(self.checkpoint, checkpoint_digest(self.checkpoint))
        moments = None if self.moments is None else pl.read_parquet(self.moments)
        report = ConversionReport()
        parts = []
        for events in read_blocks(self.shard):
            report.events_written += events.height
            report.subjects += events["subject_id"].n_unique()
            parts.append(
                forecast_events(
                    forecaster, events, moments, self.asked, self.settings, notes=report.notes, apart=self.apart
                )
            )
        for name in ("forecasts", "incidence", "trajectories"):
            table = pl.concat([getattr(_no_tables(), name), *(getattr(part, name) for part in parts)])
            write_whole(self.beside(f".{name}.parquet"), table.write_parquet)
        return {"events": report.events_written, "subjects": report.subjects, "notes": dict(report.notes)}


def forecast_patients(
    checkpoint: str | Path | EhrForecastPipeline,
    data: str | Path | pl.DataFrame,
    *,
    tasks: Sequence[str | Path] = (),
    outcomes: Mapping[str, Any] | None = None,
    horizon: Any = None,
    until: Any = None,
    settings: ForecastSettings | None = None,
    prediction_times: str | Path | pl.DataFrame | None = None,
    labels: LabelSource | None = None,
    on_error: str = "raise",
    progress: bool = True,
) -> ForecastTables:
    """Forecast the patients of an event table, or of a folder of records.

    Args:
        checkpoint: Folder of a pretrained event model with its tokenizer, `owner/name` on the Hub, or one that is
            loaded (`load_forecaster`).
        data: FHIR or MEDS (folder or file), or an event table.
        tasks: As of `read_asked`.
        outcomes: As of `read_asked`.
        horizon: As of `read_asked`.
        until: As of `read_asked`.
        settings: How forecasts are made.
        prediction_times: Table (or Parquet or CSV file) of subject_id, prediction_time; None = the last event of each
            patient. Nothing later than it is read.
        labels: Labels whose times are the prediction times, each task at its own: a dataset with `labels/`, a folder
            of labels, a label table (Parquet), or task -> table. The answers in it are not read.
        on_error: FHIR only: "raise" or "skip" (counted in the report).
        progress: Show progress bars.

    Raises:
        ValueError: What cannot be asked or drawn, unreadable data, prediction times of unknown patients, nobody to
            forecast.
    """
    settings = ForecastSettings() if settings is None else settings
    check_request(data, None, prediction_times, labels)
    forecaster = checkpoint if isinstance(checkpoint, EhrForecastPipeline) else load_forecaster(checkpoint)
    asked = read_asked(forecaster, tasks, outcomes, horizon=horizon, until=until)
    check_forecast_settings(forecaster, asked, settings)
    if isinstance(data, pl.DataFrame):
        events, report = validate_events(data), ConversionReport()
    else:
        events, report = load_events(data, on_error=on_error, progress=progress)
    if events.is_empty():
        raise ValueError(f"the data hold no event, so there is nobody to forecast. What was read:\n{report}")
    moments = _moments(asked, prediction_times, labels, events["subject_id"].unique(), report.notes)
    tables = forecast_events(forecaster, events, moments, asked, settings, notes=report.notes, apart=labels is not None)
    if tables.forecasts.is_empty():
        raise ValueError(f"the data hold nobody to forecast. What was read:\n{report}")
    tables.report = report
    return tables


def forecast_dataset(
    checkpoint: str | Path,
    dataset: str | Path,
    parts: str | Path,
    *,
    tasks: Sequence[str | Path] = (),
    outcomes: Mapping[str, Any] | None = None,
    horizon: Any = None,
    until: Any = None,
    settings: ForecastSettings | None = None,
    prediction_times: str | Path | pl.DataFrame | None = None,
    labels: LabelSource | None = None,
    splits: Sequence[str] | None = None,
    trajectories: str | Path | None = None,
    engine: Engine | None = None,
) -> ForecastTables:
    """Forecast the patients of a prepared dataset, file by file.

    Args:
        checkpoint: Folder or `owner/name`, as of `forecast_patients`.
        dataset: Folder of a prepared dataset.
        parts: Folder for the forecasts of each file: a run that was stopped goes on where it was. Removed at the end.
        tasks: As of `forecast_patients`.
        outcomes: As of `forecast_patients`.
        horizon: As of `forecast_patients`.
        until: As of `forecast_patients`.
        settings: As of `forecast_patients`.
        prediction_times: As of `forecast_patients`.
        labels: As of `forecast_patients`.
        splits: Splits whose patients are forecast, None = all.
        trajectories: Folder for the trajectories where the settings keep them, see `write_trajectories`.
        engine: Where to work, default all cores of this machine.

    Returns:
        As `forecast_patients`; trajectories are in their files.

    Raises:
        ValueError: No prepared dataset, an unknown split, or what `forecast_patients` refuses.
    """
    settings = ForecastSettings() if settings is None else settings
    check_request(dataset, None, prediction_times, labels)
    shards = dataset_shards(dataset, splits)
    forecaster = kept_forecaster(str(checkpoint), checkpoint_digest(checkpoint))
    asked = read_asked(forecaster, tasks, outcomes, horizon=horizon, until=until)
    check_forecast_settings(forecaster, asked, settings)
    report = ConversionReport(source=str(dataset), format="meds", files=len(shards))
    subjects = pl.concat([scan_shard(shard).select(pl.col("subject_id").unique()).collect() for shard in shards])
    moments = _moments(asked, prediction_times, labels, subjects["subject_id"], report.notes)
    key: list[object] = [str(Path(dataset).resolve()), asked_digest(asked, checkpoint), asdict(settings)]
    key.append(None if moments is None else table_digest(moments))
    with kept_parts(Path(parts) / "forecasts", key) as folder:
        moments_file = None if moments is None else str(folder / "moments.parquet")
        if moments is not None:
            write_whole(folder / "moments.parquet", moments.write_parquet)
        work = [
            ForecastPart(shard, str(folder), str(checkpoint), asked, settings, moments_file, labels is not None)
            for shard in shards
        ]
        for counts in run_parts(work, desc="Forecasting", folder=parts, engine=engine):
            report.events_written += counts["events"]
            report.subjects += counts["subjects"]
            report.notes.update(counts["notes"])

        def whole(name: str) -> pl.DataFrame:
            files = [part.beside(f".{name}.parquet") for part in work]
            return pl.concat([pl.read_parquet(file, hive_partitioning=False) for file in files])

        forecasts, incidence = _sorted(whole("forecasts")), _sorted(whole("incidence"))
        if forecasts.is_empty():
            raise ValueError(f"{dataset} holds nobody to forecast. What was read:\n{report}")
        if trajectories is not None:
            write_trajectories([part.beside(".trajectories.parquet") for part in work], trajectories, settings.num)
    remove(Path(parts))
    return ForecastTables(forecasts, incidence, no_trajectories(), asked, report, _notice(forecaster))


def forecast_events(
    forecaster: EhrForecastPipeline,
    events: pl.DataFrame,
    moments: pl.DataFrame | None,
    asked: Sequence[TaskForecast],
    settings: ForecastSettings,
    *,
    notes: Counter[str],
    apart: bool = False,
) -> ForecastTables:
    """Forecast whole patients.

    Args:
        forecaster: From `load_forecaster`.
        events: Event table of whole patients.
        moments: subject_id, prediction_time, task; None = the end of each record.
        asked: The questions.
        settings: How they are answered.
        notes: Counts what was left out.
        apart: Whether each question has times of its own.
    """
    rows: list[tuple[Any, ...]] = []
    points: list[tuple[Any, ...]] = []
    untimed = events["subject_id"].n_unique() - last_times(events).height if moments is None else 0
    if untimed:
        notes["patients without a timed event, not forecast"] += untimed
    for group in groups_of(asked, apart=apart):
        times = moments_here(events, moments, [each.name for each in group])
        records = records_at(forecaster, events, times)
        while chunk := list(islice(records, _AT_ONCE)):
            drawn = draw(forecaster, [record for _, _, record in chunk if record.reason is None], group, settings)
            for subject, time, record in chunk:
                estimates = next(drawn).estimates if record.reason is None else [None] * len(group)
                for each, estimate in zip(group, estimates, strict=True):
                    rows.append((subject, time, each.name, *_numbers(estimate), each.horizon_days, record.reason))
                    if estimate is not None and settings.steps and not each.outcome.complement:
                        days = zip(estimate.grid_days, estimate.incidence, estimate.incidence_errors, strict=True)
                        points += [(subject, time, each.name, *point) for point in days]
    forecasts = _sorted(pl.DataFrame(rows, schema=FORECAST_SCHEMA, orient="row"))
    for reason, words in REASONS_AGAINST_FORECAST.items():
        count = int((forecasts["reason"] == reason).sum())
        if count:
            notes[f"forecasts not given: {words}"] += count
    cut = int((forecasts["cut"] > 0).sum())
    if cut:
        notes["forecasts with trajectories that were cut at the longest length, too low"] += cut
    incidence = _sorted(pl.DataFrame(points, schema=INCIDENCE_SCHEMA, orient="row"))
    futures = _futures(forecaster, events, moments, asked, settings)
    return ForecastTables(forecasts, incidence, futures, tuple(asked), notice=_notice(forecaster))


def _futures(
    forecaster: EhrForecastPipeline,
    events: pl.DataFrame,
    moments: pl.DataFrame | None,
    asked: Sequence[TaskForecast],
    settings: ForecastSettings,
) -> pl.DataFrame:
    """Ordinary trajectories of every (subject, prediction time), where they are kept."""
    tables = [no_trajectories()]
    if settings.trajectories:
        tokenizer: Any = forecaster.tokenizer
        to_rows = TokenRows(tokenizer.token_meanings(), len(tokenizer))
        times = moments_here(events, moments, [each.name for each in asked])
        records = records_at(forecaster, events, times)
        while chunk := list(islice(records, _AT_ONCE)):
            living = [(subject, record) for subject, _, record in chunk if record.reason is None]
            drawn = draw_futures(forecaster, [record for _, record in living], asked, settings)
            for (subject, record), each in zip(living, drawn, strict=True):
                tables.append(to_rows.table(subject, record.prediction_time or 0, each.trajectories))
    return pl.concat(tables)


def _moments(
    asked: Sequence[TaskForecast],
    prediction_times: str | Path | pl.DataFrame | None,
    labels: LabelSource | None,
    subjects: pl.Series,
    notes: Counter[str],
) -> pl.DataFrame | None:
    """subject_id, prediction_time, task of the patients that are there; None = the end of each record."""
    names = [each.name for each in asked]
    if labels is not None:
        return of_patients(moments_of_labels(read_labelled_times(labels), names, notes), subjects, notes)
    if prediction_times is None:
        return None
    moments = moments_of_all(checked_times(prediction_times), names)
    check_known(moments, subjects)
    return moments


def _numbers(estimate: Any) -> tuple[Any, ...]:
    if estimate is None:
        return (None,) * 5
    return (
        estimate.probability,
        estimate.standard_error,
        estimate.effective_number,
        estimate.num,
        estimate.cut,
    )


def _sorted(table: pl.DataFrame) -> pl.DataFrame:
    return table.sort(*_ORDER, maintain_order=True)


def _notice(forecaster: EhrForecastPipeline) -> str:
    return str(getattr(forecaster.model.config, "notice", None) or "")


def _no_tables() -> ForecastTables:
    return ForecastTables(
        pl.DataFrame(schema=FORECAST_SCHEMA), pl.DataFrame(schema=INCIDENCE_SCHEMA), no_trajectories(), ()
    )

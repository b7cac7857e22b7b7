"""`ehrseq forecast`: what comes next for many patients, from a pretrained model."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ehrseq.cli.options import EngineName, EngineOption, Workers, check_folder, is_writable

if TYPE_CHECKING:
    from ehrseq.forecasting.datasets import ForecastTables
    from ehrseq.work.engine import Engine

PAGE_STEPS = 30
"""Points of a curve on the page."""


class EstimatorName(StrEnum):
    """How probabilities are estimated."""

    reach = "reach"
    scope = "scope"
    monte_carlo = "monte_carlo"


def forecast_command(
    data: Annotated[Path, typer.Option(help="FHIR (NDJSON, Bundles) or MEDS: folder or file, or a prepared dataset.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a pretrained model (of events, or of stays), or owner/name on the Hub. Default: the "
            "package's own, of events."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Parquet file to write.")] = Path("forecasts.parquet"),
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task to forecast: a name of `ehrseq label`, or a YAML file of ours or of ACES; repeat."),
    ] = None,
    outcome: Annotated[
        list[str] | None,
        typer.Option(
            help="name=CODE, a * at the end for all that begin so; name=death; or name=JSON of a union or a limit "
            "of a value. Repeat. Default, without --task: death and any_admission."
        ),
    ] = None,
    horizon: Annotated[str | None, typer.Option(help="Of the outcomes, like 30d or 48h. Default: 30d.")] = None,
    until: Annotated[
        str | None, typer.Option(help="Of the outcomes: visit_end, or a code after which nothing counts.")
    ] = None,
    times: Annotated[
        Path | None,
        typer.Option(help="Parquet or CSV with subject_id, prediction_time. Default: the end of each record."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Forecast each task at its own labelled times: dataset with labels/, folder of labels, or label table."
        ),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Trajectories a patient, of reach a patient and outcome.")] = 32,
    estimator: Annotated[EstimatorName, typer.Option(help="How probabilities are estimated.")] = EstimatorName.reach,
    standard_error: Annotated[
        float | None, typer.Option(help="Draw more, beginning with --num, until no error is above this.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the trajectories.")] = 0,
    trajectories: Annotated[
        Path | None, typer.Option(help="Folder for --num ordinary trajectories a patient, as MEDS files.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="HTML file of the cumulative incidence.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Models of stays: share of values that may lie outside their intervals [0.1].")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Dataset in files: forecast patients of this split; repeat. Default: all.")
    ] = None,
    skip_bad_lines: Annotated[bool, typer.Option(help="FHIR: count and skip unreadable resources.")] = False,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
) -> None:
    """Write how probable outcomes are for every patient, with the error of each probability.

    Columns: subject_id, prediction_time, task, score (the probability), standard_error, effective_number,
    num_trajectories, cut, horizon_days, reason. The reason says why there is no forecast. A dataset of `ehrseq prepare`
    is read file by file, with --engine and --workers; a stopped run goes on. With --labels, what is written is what
    `ehrseq evaluate` wants.

    A model of stays (HyMaTE) writes values instead: subject_id, prediction_time, variable, unit, horizon, value, low,
    high, last_value, last_time, reason; by default at the end of each stay's window.
    """
    from ehrseq.data.metadata import written_by_us
    from ehrseq.forecasting.datasets import forecast_dataset, forecast_patients
    from ehrseq.forecasting.page import write_forecast_page
    from ehrseq.forecasting.prompts import ForecastSettings
    from ehrseq.forecasting.stay_values import foretells_values
    from ehrseq.forecasting.trajectory_files import check_trajectory_folder, write_trajectories
    from ehrseq.hub.families import STARTER_FORECAST
    from ehrseq.work.engine import get_engine
    from ehrseq.work.files import check_apart, write_whole

    if labels is not None and times is not None:
        raise ValueError("--labels and --times both say when to forecast; give one of them.")
    if out.is_dir() or out.suffix != ".parquet" or not is_writable(out.parent):
        raise ValueError(f"{out} cannot be written; give the name of a .parquet file in a folder of yours.")
    if page is not None and (page.is_dir() or page.suffix != ".html" or not is_writable(page.parent)):
        raise ValueError(f"{page} cannot be written; give the name of a .html file in a folder of yours.")
    if trajectories is not None:
        check_folder(trajectories)
        check_trajectory_folder(trajectories)
        check_apart(trajectories, data)
    checkpoint = str(STARTER_FORECAST) if model is None else model
    here = get_engine(engine.value, num_workers=workers) if written_by_us(data) else None
    if here is None and (engine is not EngineName.local or workers is not None or split):
        raise ValueError(
            f"--engine, --workers and --split need a dataset in files; run `ehrseq prepare {data} FOLDER` first."
        )
    on_error = "skip" if skip_bad_lines else "raise"
    if foretells_values(checkpoint):
        given: dict[str, Any] = {"--task": task, "--outcome": outcome, "--horizon": horizon, "--until": until}
        given |= {"--standard-error": standard_error, "--trajectories": trajectories, "--page": page}
        given |= {"--labels": labels}
        _forecast_values(checkpoint, data, out, times, alpha, split, here, on_error, given)
        return
    if alpha is not None:
        raise ValueError(f"--alpha is for models of stays; {checkpoint} forecasts events: leave it out.")
    settings = ForecastSettings(
        num=num,
        estimator=estimator.value,
        standard_error=standard_error,
        seed=seed,
        steps=PAGE_STEPS if page is not None else 0,
        trajectories=trajectories is not None,
    )
    asked: dict[str, Any] = {
        "tasks": task or [],
        "outcomes": read_outcome_options(outcome or []),
        "horizon": horizon,
        "until": until,
        "settings": settings,
        "prediction_times": times,
        "labels": labels,
    }
    if here is not None:
        tables = forecast_dataset(
            checkpoint,
            data,
            _parts(out),
            **asked,
            splits=split or None,
            trajectories=trajectories,
            engine=here,
        )
    else:
        tables = forecast_patients(checkpoint, data, **asked, on_error=on_error)
        if trajectories is not None:
            write_trajectories(tables.trajectories, trajectories, num)
    write_whole(out, tables.forecasts.write_parquet)
    if page is not None:
        write_forecast_page(tables, page)
    _tell(tables, out)


def _parts(out: Path) -> Path:
    """Where a run that is stopped leaves what it has done."""
    return out.with_name(f".{out.name}.parts")


def _forecast_values(
    checkpoint: str,
    data: Path,
    out: Path,
    times: Path | None,
    alpha: float | None,
    split: list[str] | None,
    engine: Engine | None,
    on_error: str,
    given: dict[str, Any],
) -> None:
    """The values of stays, from a model that reads stays.

    Raises:
        ValueError: Options that such a model has no use for.
    """
    from ehrseq.forecasting.stay_datasets import forecast_stay_dataset, forecast_stay_records
    from ehrseq.work.files import write_whole

    if unused := [name for name, value in given.items() if value]:
        raise ValueError(
            f"{checkpoint} reads stays and forecasts values within its own windows: it has no use for "
            f"{', '.join(unused)}."
        )
    share = 0.1 if alpha is None else alpha
    if engine is not None:
        table, report = forecast_stay_dataset(
            checkpoint, data, _parts(out), prediction_times=times, alpha=share, splits=split or None, engine=engine
        )
    else:
        table, report = forecast_stay_records(checkpoint, data, prediction_times=times, alpha=share, on_error=on_error)
    write_whole(out, table.write_parquet)
    typer.echo(str(report))
    stays = table.select("subject_id", "prediction_time").n_unique()
    typer.echo(
        f"{stays:,} stays, {table.height:,} rows in {out}: {table['value'].count():,} values, {table['low'].count():,} "
        f"of them with an interval, {table['reason'].count():,} with a reason why something is missing"
    )


def read_outcome_options(options: list[str]) -> dict[str, Any]:
    """Outcomes of the command line, name -> what stands for it.

    Raises:
        ValueError: One without a name or a code, twice the same name, or JSON that is none.
    """
    outcomes: dict[str, Any] = {}
    for option in options:
        name, separator, spec = option.partition("=")
        name, spec = name.strip(), spec.strip()
        if not separator or not name or not spec:
            raise ValueError(f"--outcome got {option!r}; expected name=CODE, such as icu=ICU_ADMISSION//*.")
        if name in outcomes:
            raise ValueError(f"--outcome {name} stands twice; give each a name of its own.")
        try:
            outcomes[name] = json.loads(spec) if spec[0] in "[{" else spec
        except json.JSONDecodeError as error:
            raise ValueError(f"--outcome {name} begins as JSON and is none ({error}); check its quotes.") from error
    return outcomes


def _tell(tables: ForecastTables, out: Path) -> None:
    typer.echo(str(tables.report))
    for each in tables.asked:
        for note in each.notes:
            typer.echo(f"{each.name}: {note}")
    if tables.notice:
        typer.echo(tables.notice)
    forecasts = tables.forecasts
    given = forecasts.height - forecasts["score"].null_count()
    typer.echo(
        f"{forecasts['subject_id'].n_unique():,} patients, {forecasts.height:,} rows in {out}: {given:,} with a "
        f"probability, {forecasts['reason'].count():,} with a reason why there is none"
    )

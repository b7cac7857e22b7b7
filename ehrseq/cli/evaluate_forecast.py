"""`ehrseq evaluate-forecast`: how good are the forecasts: of next events, of times, of what comes within a horizon?"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from ehrseq.cli.options import check_folder


def evaluate_forecast_command(
    data: Annotated[
        Path, typer.Option(help="Dataset of `ehrseq prepare`, or FHIR (NDJSON, Bundles) or MEDS: folder or file.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a pretrained model, or owner/name on the Hub. Default: the package's own, of events."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write: report.html, .md, results.json, .csv.")] = Path(
        "forecast_evaluation"
    ),
    split: Annotated[
        list[str] | None,
        typer.Option(help="Dataset in files: patients of this split; repeat for several. Default: held_out."),
    ] = None,
    horizon: Annotated[str, typer.Option(help="How far trajectories go, such as 48h or 30d.")] = "30d",
    n: Annotated[
        int, typer.Option("--n", min=0, help="Trajectories of each prediction time; 0: next events and times alone.")
    ] = 20,
    outcome: Annotated[
        list[str] | None,
        typer.Option(
            help="name=code whose incidence is held against what came (`*` at the end: all that begin so); repeat. "
            "Default: death and any admission."
        ),
    ] = None,
    estimator: Annotated[str, typer.Option(help="monte_carlo, scope or reach.")] = "monte_carlo",
    times: Annotated[
        Path | None,
        typer.Option(help="Parquet or CSV with subject_id, prediction_time. Default: the ends of visits."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Ask at the labelled times: dataset with labels/, folder of labels, or label table."),
    ] = None,
    end_of_data: Annotated[
        datetime | None, typer.Option(help="Until when records were kept (UTC). Default: the last event of the data.")
    ] = None,
    max_predictions: Annotated[int, typer.Option(min=1, help="Most prediction times, drawn by chance.")] = 1000,
    max_patients: Annotated[int, typer.Option(min=1, help="Most patients, drawn by chance.")] = 2000,
    context: Annotated[
        int | None, typer.Option(min=8, help="Tokens of a row. Default: what the model was trained with.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in one forward pass of the next events.")] = 16,
    resamples: Annotated[int, typer.Option(min=0, help="Bootstrap resamples of patients.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 0,
) -> None:
    """Evaluate the forecasts of a pretrained model on records.

    Next events by kind, first occurrences apart from repeats; days to the next visit; incidence of outcomes over the
    horizon against what was observed, with death and censoring; how like records the drawn trajectories are. Each
    beside forecasts that only count.
    """
    from ehrseq.forecasting.evaluation_files import ForecastQuestions, evaluate_forecast_files
    from ehrseq.hub.families import STARTER_FORECAST

    check_folder(out)
    questions = ForecastQuestions(
        horizon_days=_days(horizon),
        num=n,
        estimator=estimator,
        outcomes=_outcomes(outcome),
        prediction_times=times,
        labels=labels,
        max_predictions=max_predictions,
        max_patients=max_patients,
        context=context,
        batch_size=batch_size,
        num_resamples=resamples,
        seed=seed,
    )
    report = evaluate_forecast_files(
        model or STARTER_FORECAST, data, out=out, questions=questions, splits=split or None, end_of_data=end_of_data
    )
    typer.echo(report)
    page = out / "report.html"
    typer.echo(f"Written to {out}" + (f"; the page is {page}" if page.is_file() else ""))


def _days(horizon: str) -> float:
    """A duration in days."""
    from ehrseq.tokenization.ehr_durations import DURATION_FORM, parse_duration

    try:
        duration = parse_duration(horizon)
    except OverflowError:
        duration = None
    if not duration:
        raise ValueError(f"--horizon got {horizon!r}; expected {DURATION_FORM}.")
    return duration / timedelta(days=1)


def _outcomes(given: list[str] | None) -> dict[str, Any] | None:
    """`name=code` texts by name; several of one name are a union."""
    if not given:
        return None
    outcomes: dict[str, Any] = {}
    for text in given:
        name, equals, code = text.partition("=")
        if not equals or not name.strip() or not code.strip():
            raise ValueError(f"--outcome got {text!r}; expected name=code, like icu=ICU_ADMISSION//*.")
        outcomes.setdefault(name.strip(), []).append(code.strip())
    return outcomes

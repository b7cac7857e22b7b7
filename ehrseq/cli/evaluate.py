"""`ehrseq evaluate`: how good are the scores, for whom, and for how long?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate_command(
    predictions: Annotated[
        Path, typer.Argument(help="Parquet of `ehrseq predict`, or in the schema of MEDS evaluation.")
    ],
    labels: Annotated[
        Path | None,
        typer.Option(help="Dataset with labels/, a folder of labels, or a label table. Default: in the predictions."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="MEDS dataset of the patients, for subgroups by sex, ethnicity, site and age.")
    ] = None,
    tuning: Annotated[
        Path | None, typer.Option(help="Predictions of the tuning patients, from which F1's threshold is chosen.")
    ] = None,
    alert_rate: Annotated[
        float, typer.Option(help="Without tuning rows, the threshold alerts for this share of the rows.")
    ] = 0.05,
    task: Annotated[list[str] | None, typer.Option(help="Task to evaluate; repeat. Default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write: evaluation.html, .md, .json, predictions/.")] = Path(
        "evaluation"
    ),
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples of patients.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
) -> None:
    """Evaluate scores against labels, on a page with the curves.

    Discrimination, calibration, decisions, subgroups, years. Writes one page with the curves, and its numbers.
    Every number has its interval over patients; what cannot be estimated, and a task that cannot be evaluated, says
    why.
    """
    from ehrseq.evaluation.files import evaluate_files

    report = evaluate_files(
        predictions,
        labels=labels,
        data=data,
        tuning=tuning,
        tasks=task,
        out=out,
        alert_rate=alert_rate,
        num_resamples=resamples,
        seed=seed,
    )
    typer.echo(report)
    typer.echo(f"Written to {out}; the page is {out / 'evaluation.html'}")

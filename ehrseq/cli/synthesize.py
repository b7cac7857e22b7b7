"""`ehrseq synthesize`: patients that nobody lived, drawn from a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ehrseq.cli.options import EngineName, EngineOption, Workers, check_new_folder


def synthesize_command(
    like: Annotated[Path, typer.Option(help="Dataset of `ehrseq prepare` whose patients they are like.")],
    out: Annotated[Path, typer.Option(help="Folder to write (must not hold anything yet).")],
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a pretrained EhrMamba, or owner/name on the Hub. Default: the package's own."),
    ] = None,
    patients: Annotated[int, typer.Option("--patients", "-n", min=1, help="Number of patients.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal patients.")] = 0,
    max_years: Annotated[float | None, typer.Option(help="Longest observation of a patient, years.")] = None,
    until_end: Annotated[
        bool,
        typer.Option(help="Observe everybody until the dataset's last event. Default: as long as its patients are."),
    ] = False,
    max_copied: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Events in a row that a patient may share with a training patient. Default: what 99 % of the "
            "held-out patients share, at least 20.",
        ),
    ] = None,
    allow_copies: Annotated[bool, typer.Option(help="Write patients whatever run they share.")] = False,
    task: Annotated[
        list[str] | None, typer.Option(help="Task to train on synthetic and test on real patients; repeat.")
    ] = None,
    fhir: Annotated[bool, typer.Option(help="Write FHIR R4 NDJSON files too, into OUT/fhir.")] = False,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
) -> None:
    """Write synthetic patients, and a report on fidelity and privacy.

    A dataset as `ehrseq prepare` writes it; OUT/synthesis holds the report. Who shares a longer run of events with a
    training patient than is natural is drawn anew. A stopped run goes on.
    """
    check_new_folder(out)
    from ehrseq.forecasting.synthesis import synthesize
    from ehrseq.hub.families import STARTER_FORECAST
    from ehrseq.work.engine import get_engine

    report = synthesize(
        STARTER_FORECAST if model is None else model,
        like,
        patients,
        out,
        seed=seed,
        max_years=max_years,
        until_end=until_end,
        max_copied=max_copied,
        allow_copies=allow_copies,
        tasks=tuple(task or ()),
        fhir=fhir,
        engine=get_engine(engine.value, num_workers=workers),
    )
    typer.echo(str(report))
    typer.echo(f"The report is {out / 'synthesis' / 'report.html'}")

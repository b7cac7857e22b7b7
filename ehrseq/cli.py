"""`ehrseq ...`: simulate records or stays, run the demo, score patients with a checkpoint.

Heavy imports stand inside the commands, so that `ehrseq --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ehrseq.cli_audit import audit, stats
from ehrseq.cli_benchmark import benchmark
from ehrseq.cli_encode import EngineName, EngineOption, Workers, label, tokenize
from ehrseq.cli_evaluate import evaluate
from ehrseq.cli_prepare import prepare, split
from ehrseq.version import __version__

app = typer.Typer(
    name="ehrseq",
    help="Risks from patient records: EhrMamba and HyMaTE on FHIR R4 or MEDS.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.command()(prepare)
app.command()(split)
app.command()(label)
app.command()(tokenize)
app.command()(audit)
app.command()(stats)
app.command()(evaluate)
app.command()(benchmark)


class EventFormat(StrEnum):
    """What `simulate` writes."""

    fhir = "fhir"
    meds = "meds"


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ehrseq {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Risks from patient records: EhrMamba and HyMaTE on FHIR R4 or MEDS."""


@app.command()
def simulate(
    output: Annotated[Path, typer.Argument(help="Folder to write (must not hold anything yet).")],
    patients: Annotated[int, typer.Option("--patients", "-n", min=1, help="Number of patients.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal patients.")] = 0,
    format: Annotated[EventFormat, typer.Option(help="FHIR R4 NDJSON files, or a MEDS dataset.")] = EventFormat.fhir,
    compress: Annotated[bool, typer.Option(help="Gzip the NDJSON files.")] = False,
) -> None:
    """Write the records of simulated patients."""
    _check_new_folder(output)
    from ehrseq.data.simulate import simulate as simulate_cohort
    from ehrseq.data.simulate import simulated_name

    cohort = simulate_cohort(patients, seed)
    if format is EventFormat.fhir:
        cohort.write_fhir(output, compress=compress)
    else:
        from ehrseq.data.dataset import write_dataset

        write_dataset(cohort.events(), output, dataset_name=simulated_name(seed))
    typer.echo(f"{patients:,} simulated patients (seed {seed}) in {output}")


@app.command()
def simulate_stays(
    output: Annotated[Path, typer.Argument(help="Folder to write (must not hold anything yet).")],
    stays: Annotated[int, typer.Option("--stays", "-n", min=1, help="Number of stays.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal stays.")] = 0,
) -> None:
    """Write simulated ICU stays in the files of the PhysioNet challenge 2012, with their outcomes."""
    _check_new_folder(output)
    from ehrseq.data.simulate_stays import simulate_stays as simulate_icu_stays

    simulate_icu_stays(stays, seed).write(output)
    typer.echo(f"{stays:,} simulated stays (seed {seed}) in {output}")


@app.command()
def demo(
    data: Annotated[
        Path | None, typer.Option(help="FHIR or MEDS folder to use instead of simulated patients.", exists=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path("demo_output"),
    patients: Annotated[int | None, typer.Option(min=50, help="Number of simulated patients.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the patients and of training.")] = 0,
) -> None:
    """From records to risks in a few minutes: train a small model, evaluate it, score patients, draw one."""
    from ehrseq.demo import DemoSettings, run_demo

    _check_folder(output)
    settings = DemoSettings(seed=seed) if patients is None else DemoSettings(seed=seed, num_patients=patients)
    run_demo(output, data=data, settings=settings, say=typer.echo)


@app.command()
def predict(
    model: Annotated[str, typer.Option(help="Folder of a finetuned checkpoint, or owner/name on the Hub.")],
    data: Annotated[
        Path, typer.Option(help="FHIR (NDJSON, Bundles), MEDS or the PhysioNet challenge 2012: folder or file.")
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")] = Path("predictions.parquet"),
    task: Annotated[list[str] | None, typer.Option(help="Task to score; repeat for several. Default: all.")] = None,
    times: Annotated[
        Path | None,
        typer.Option(
            help="Parquet or CSV with subject_id, prediction_time. Default: the end of each record, or of each stay."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows (patient, task) in one forward pass.")] = 32,
    skip_bad_lines: Annotated[bool, typer.Option(help="FHIR: count and skip unreadable resources.")] = False,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
) -> None:
    """Write the risk of every patient (or stay): subject_id, prediction_time, task, label, score, reason.

    The reason says why a task does not apply then; where nothing is left to foretell, there is no score. A dataset of
    `ehrseq prepare` is scored file by file, with --engine and --workers; a stopped run goes on.
    """
    from ehrseq.data.meds import written_by_us
    from ehrseq.engine import get_engine
    from ehrseq.predict import predict_risks
    from ehrseq.predict_shards import predict_dataset

    if out.is_dir() or out.suffix != ".parquet" or not _is_writable(out.parent):
        raise ValueError(f"{out} cannot be written; give the name of a .parquet file in a folder of yours.")
    if written_by_us(data):
        risks, report = predict_dataset(
            model,
            data,
            out.with_name(f".{out.name}.parts"),
            tasks=task or None,
            prediction_times=times,
            batch_size=batch_size,
            engine=get_engine(engine.value, num_workers=workers),
        )
    elif engine is not EngineName.local or workers is not None:
        raise ValueError(f"--engine and --workers need a dataset in files; run `ehrseq prepare {data} FOLDER` first.")
    else:
        risks, report = predict_risks(
            model,
            data,
            tasks=task or None,
            prediction_times=times,
            batch_size=batch_size,
            on_error="skip" if skip_bad_lines else "raise",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".part")
    risks.write_parquet(unfinished)
    unfinished.replace(out)
    typer.echo(str(report))
    scored = risks.height - risks["score"].null_count()
    typer.echo(
        f"{risks['subject_id'].n_unique():,} patients, {risks.height:,} rows in {out}: {scored:,} with a risk, "
        f"{risks['reason'].count():,} with a reason why the task does not apply"
    )


def _is_writable(folder: Path) -> bool:
    """Whether files can be written into a folder, or into one that is made on the way to it."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def _check_folder(folder: Path) -> None:
    """Refuse a folder for the output that is a file, or lies where nothing can be written, before the work."""
    if not _is_writable(folder):
        raise ValueError(f"{folder} cannot be written; give the name of a new folder in a folder of yours.")


def _check_new_folder(folder: Path) -> None:
    """Refuse a folder for the output that holds something already."""
    _check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty; give a new folder, so that nothing is overwritten.")


@app.command()
def doctor() -> None:
    """Say which fast kernels this machine has, and test them for two seconds."""
    import torch

    from ehrseq.kernels.doctor import check_backends, describe_machine, report_checks, report_machine
    from ehrseq.modeling import causal_conv, selective_scan

    typer.echo(report_machine(describe_machine()))
    operators = selective_scan.selective_scan, causal_conv.causal_conv1d
    tables = selective_scan.backend_table(), causal_conv.backend_table()
    wrong = False
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        checks = check_backends(*operators, *tables, device)
        typer.echo("\n" + report_checks(checks, device))
        wrong |= any(check.wrong for check in checks)
    if wrong:
        raise typer.Exit(code=1)


def main() -> None:
    """Run the command line; an error of the input is one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)

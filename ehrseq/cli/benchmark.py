"""`ehrseq benchmark`: every system of the paper's table on one dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def benchmark_command(
    dataset: Annotated[
        Path | None, typer.Argument(help="MEDS dataset with splits (`ehrseq prepare`), or use --train and --test.")
    ] = None,
    train: Annotated[Path | None, typer.Option(help="Dataset to train on, where --test is another one.")] = None,
    test: Annotated[Path | None, typer.Option(help="Dataset all of whose patients are reported on.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks, comma-separated: packaged ones or the dataset's own. Default: the six.")
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="Systems, comma-separated, of xgboost, logistic, lstm, cehrbert, bigbird, multibird, ehrmamba_single, "
            "ehrmamba. Default: all."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds; more can be added later.")] = 1,
    budget: Annotated[
        str, typer.Option(help="quick, simulated, simulated_long, full, or a YAML file: what each system may compute.")
    ] = "quick",
    kinds: Annotated[str, typer.Option(help="What enters a sequence: all, or paper (for the *_paper tasks).")] = "all",
    reference: Annotated[str, typer.Option(help="The system that the others are held against.")] = "ehrmamba",
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command goes on with it.")] = Path("benchmark"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Models trained at a time. Default: one a core; one on a GPU.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples of patients.")] = 1000,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="The table of what is there; no training.")
    ] = False,
) -> None:
    """Train every system under one budget, and compare them.

    All have the same data and are evaluated on patients that none has seen. Writes results.md, results.csv,
    report.html and all predictions. A stopped run goes on with what is missing.
    """
    from ehrseq.benchmark import run_benchmark

    if (dataset is None) == (train is None) or (train is None) != (test is None):
        raise ValueError("give one DATASET, or both --train and --test.")
    source = dataset if dataset is not None else train
    report = run_benchmark(
        source,
        out=out,
        test=test,
        tasks=_names(tasks),
        models=_names(models),
        seeds=seeds,
        budget=budget,
        kinds=kinds,
        reference=reference,
        workers=workers,
        num_resamples=resamples,
        report_only=report_only,
    )
    typer.echo(report)
    typer.echo(f"Written to {out}")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]

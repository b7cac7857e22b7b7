"""`ehrseq probe`: what a straight line reads off a model's vectors, and from how few labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ehrseq.cli.options import check_folder


def probe_command(
    embeddings: Annotated[
        list[Path], typer.Option(help="File of `ehrseq embed`, made at the labels' times; repeat to compare several.")
    ],
    data: Annotated[Path, typer.Option(help="Prepared dataset: its splits say who trains and who is held out.")],
    labels: Annotated[
        Path | None, typer.Option(help="Folder of labels, or a label table. Default: those of the dataset.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("probe"),
    task: Annotated[list[str] | None, typer.Option(help="Task to probe; repeat. Default: all with labels.")] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(help="Number of training labels, half of them positive; repeat. Default: 10 to 10,000."),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of each size.")] = 5,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples of patients.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of draws and bootstrap.")] = 0,
) -> None:
    """Learn tasks from vectors by logistic regression, from few labels to all of them.

    Writes tables, curves, and the held-out risks of the fit to all labels.
    """
    from ehrseq.representations.probe import SHOT_SIZES, check_probe_folder, probe_tasks, write_probe

    check_folder(out)
    check_probe_folder(out)
    names = [file.stem for file in embeddings]
    if len(set(names)) < len(names):
        raise ValueError(f"two files of vectors are both called {sorted(names)[0]}; give them names that differ.")
    report = probe_tasks(
        dict(zip(names, embeddings, strict=True)),
        data,
        labels=labels,
        tasks=task or None,
        sizes=sorted(set(size)) if size else SHOT_SIZES,
        draws=draws,
        num_resamples=resamples,
        seed=seed,
    )
    page = write_probe(report, out)
    typer.echo(report.to_markdown())
    typer.echo(f"The page is {page}")

"""`ehrseq demo`: from records to risks in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ehrseq.cli.options import check_folder


def demo_command(
    data: Annotated[
        Path | None, typer.Option(help="FHIR or MEDS folder to use instead of simulated patients.", exists=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path("demo_output"),
    patients: Annotated[int, typer.Option(min=50, help="Number of simulated patients.")] = 4000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the patients and of training.")] = 0,
    recipe: Annotated[str, typer.Option(help="What is trained: a recipe as of `ehrseq train`.")] = "demo",
) -> None:
    """From records to risks in a few minutes.

    Simulate, prepare, label, train, predict, and a picture.
    """
    from ehrseq.demo.run import run_demo

    check_folder(output)
    run_demo(output, data=data, num_patients=patients, seed=seed, recipe=recipe, say=typer.echo)

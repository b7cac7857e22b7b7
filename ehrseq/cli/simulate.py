"""`ehrseq simulate`, `ehrseq simulate-stays`: records and stays of patients that never lived."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ehrseq.cli.options import check_new_folder


class EventFormat(StrEnum):
    """What `simulate` writes."""

    fhir = "fhir"
    meds = "meds"


def simulate_command(
    output: Annotated[Path, typer.Argument(help="Folder to write (must not hold anything yet).")],
    patients: Annotated[int, typer.Option("--patients", "-n", min=1, help="Number of patients.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal patients.")] = 0,
    format: Annotated[EventFormat, typer.Option(help="FHIR R4 NDJSON files, or a MEDS dataset.")] = EventFormat.fhir,
    compress: Annotated[bool, typer.Option(help="Gzip the NDJSON files.")] = False,
) -> None:
    """Write the records of simulated patients."""
    check_new_folder(output)
    from ehrseq.data.simulate.cohort import simulate as simulate_cohort
    from ehrseq.data.simulate.cohort import simulated_name

    cohort = simulate_cohort(patients, seed)
    if format is EventFormat.fhir:
        cohort.write_fhir(output, compress=compress)
    else:
        from ehrseq.data.dataset import write_dataset

        write_dataset(cohort.events(), output, dataset_name=simulated_name(seed))
    typer.echo(f"{patients:,} simulated patients (seed {seed}) in {output}")


def simulate_stays_command(
    output: Annotated[Path, typer.Argument(help="Folder to write (must not hold anything yet).")],
    stays: Annotated[int, typer.Option("--stays", "-n", min=1, help="Number of stays.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal stays.")] = 0,
) -> None:
    """Write simulated ICU stays, with their outcomes.

    In the files of the PhysioNet challenge 2012.
    """
    check_new_folder(output)
    from ehrseq.data.simulate.stays import simulate_stays as simulate_icu_stays

    simulate_icu_stays(stays, seed).write(output)
    typer.echo(f"{stays:,} simulated stays (seed {seed}) in {output}")

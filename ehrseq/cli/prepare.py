"""`ehrseq prepare`, `ehrseq split`: any source becomes a prepared dataset, and a dataset gets other splits."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ehrseq.cli.options import Dataset, EngineName, EngineOption, Workers


class OnError(StrEnum):
    """What happens to what cannot be read."""

    stop = "stop"
    skip = "skip"


Fractions = Annotated[
    str | None,
    typer.Option(help="Splits and their shares, as pretrain=0.57,train=0.22,tuning=0.06,held_out=0.15 (the default)."),
]
Seed = Annotated[int, typer.Option(min=0, help="Another seed, other splits.")]


def prepare_command(
    source: Annotated[
        Path, typer.Argument(help="FHIR R4 (NDJSON, Bundles), MEDS or the PhysioNet challenge 2012: folder or file.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write (must not hold anything yet).")],
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
    on_error: Annotated[
        OnError, typer.Option(help="What cannot be read stops the run, or is skipped, counted and listed.")
    ] = OnError.stop,
    fractions: Fractions = None,
    seed: Seed = 0,
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Rows that a worker holds at once, about; bounds its memory.")
    ] = 750_000,
    name: Annotated[str | None, typer.Option(help="Name of the dataset. Default: the source's.")] = None,
    timezone: Annotated[
        str | None,
        typer.Option(
            help="The hospital's zone (Europe/Berlin, -07:00), whose days tell a transfer from a readmission; FHIR: "
            "also that of dates and times that state none; MEDS: it replaces zones in the source's rows. Default: what "
            "the source says."
        ),
    ] = None,
    encounter_class: Annotated[
        list[str] | None,
        typer.Option(
            help="FHIR: what a class of encounters means that is not known, as 'Inpatient stay=IMP' (code, display or "
            "system|code; IMP is an admission). May be given several times."
        ),
    ] = None,
    code_map: Annotated[
        list[str] | None,
        typer.Option(
            help="MEDS: what a code that is not known stands for, as '^ADT/IN$=visit_start:IMP' (a regular expression "
            "and a kind; visit_start:IMP is an admission, visit_end:IMP its end). May be given several times."
        ),
    ] = None,
) -> None:
    """Turn records of any size into a sharded MEDS dataset.

    A run that was stopped goes on where it was.
    """
    from ehrseq.prepare import prepare_dataset
    from ehrseq.work.engine import get_engine

    report = prepare_dataset(
        source,
        output,
        engine=get_engine(engine.value, num_workers=workers),
        on_error=on_error.value,
        fractions=_fractions(fractions),
        seed=seed,
        shard_rows=shard_rows,
        dataset_name=name,
        timezone=timezone,
        encounter_classes=_classes(encounter_class),
        code_map=_pairs(code_map),
    )
    typer.echo(str(report))


def split_command(
    dataset: Dataset,
    fractions: Fractions = None,
    seed: Seed = 0,
    stratify: Annotated[
        str | None, typer.Option(help="Task with labels in the dataset, whose positives each split shall have.")
    ] = None,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
) -> None:
    """Give a prepared dataset other splits, by patient.

    Changes data/<split>/ and metadata/subject_splits.parquet.
    """
    from ehrseq.prepare.resplit import lines, split_dataset
    from ehrseq.work.engine import get_engine

    sizes = split_dataset(
        dataset,
        fractions=_fractions(fractions),
        seed=seed,
        stratify=stratify,
        engine=get_engine(engine.value, num_workers=workers),
    )
    for line in lines(sizes):
        typer.echo(line)


def _classes(pairs: list[str] | None) -> dict[str, str] | None:
    """Spelling -> class of `spelling=class`."""
    classes: dict[str, str] = {}
    for pair in pairs or ():
        spelling, equals, of_class = pair.rpartition("=")
        if not equals:
            raise ValueError(f"--encounter-class got {pair!r}; expected spelling=class, such as 'Inpatient stay=IMP'.")
        classes[spelling] = of_class.strip()
    return classes or None


def _pairs(rules: list[str] | None) -> list[list[str]] | None:
    """[regular expression, kind] of `expression=kind`."""
    pairs = []
    for rule in rules or ():
        pattern, equals, kind = rule.rpartition("=")
        if not equals or not pattern:
            raise ValueError(f"--code-map got {rule!r}; expected expression=kind, such as '^ADT/IN$=visit_start:IMP'.")
        pairs.append([pattern, kind.strip()])
    return pairs or None


def _fractions(text: str | None) -> dict[str, float] | None:
    """Split -> share of `name=share,name=share`."""
    if text is None:
        return None
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, share = part.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not equals or not name.strip() or value < 0 or name.strip() in shares:
            raise ValueError(f"--fractions got {part!r}; expected name=share, each name once, such as train=0.8.")
        shares[name.strip()] = value
    return shares

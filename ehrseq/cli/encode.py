"""`ehrseq label`, `ehrseq tokenize`: a prepared dataset becomes labels, a tokenizer and encoded rows, file by file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ehrseq.cli.options import Dataset, EngineName, EngineOption, Workers


class RowFormat(StrEnum):
    """How encoded rows are kept."""

    arrow = "arrow"
    parquet = "parquet"


def label_command(
    dataset: Dataset,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task by name, or a YAML file (ours or ACES's); repeat for several. Default: the paper's six."
        ),
    ] = None,
    end_of_data: Annotated[
        str | None, typer.Option(help="Last moment that the data cover, ISO 8601. Default: the last event's.")
    ] = None,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
) -> None:
    """Label every admission for clinical tasks.

    Writes labels/<task>/ in the dataset, with the count of what has no label.
    """
    from ehrseq.tasks import load_task
    from ehrseq.tasks.aces import is_aces_file, label_dataset_aces
    from ehrseq.tasks.shards import label_dataset
    from ehrseq.work.engine import get_engine

    asked = task or [
        *("mortality_30d", "long_stay_7d", "readmission_30d"),
        *("hypertension", "fluid_disorder", "lipid_disorder"),
    ]
    foreign = [name for name in asked if name.endswith((".yaml", ".yml")) and is_aces_file(name)]
    ours = [load_task(name) for name in asked if name not in foreign]
    runner = get_engine(engine.value, num_workers=workers)
    if ours:
        typer.echo(str(label_dataset(dataset, ours, end_of_data=end_of_data, engine=runner)))
    elif end_of_data is not None:
        raise ValueError("--end-of-data says nothing to tasks of ACES; leave it out, or write the task as ours.")
    for name in foreign:
        of, labels = label_dataset_aces(dataset, name, engine=runner)
        positives = int(labels["boolean_value"].sum())
        patients = labels["subject_id"].n_unique()
        typer.echo(f"{of} (ACES): {labels.height} labels of {patients} patients, {positives} positive")


def tokenize_command(
    dataset: Dataset,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write: tokenizer/, data/, encoded.json. Default: DATASET/encoded.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Encode with this tokenizer instead of fitting one.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task that gets a token, by name or YAML file; repeat. Default: those with labels."),
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Split to fit the tokenizer on; repeat. Default: pretrain and train.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Most tokens; the frequent ones stay.")] = None,
    min_count: Annotated[int | None, typer.Option(min=1, help="Rows that a token needs. Default: 1.")] = None,
    value_bins: Annotated[int | None, typer.Option(min=1, help="Bins of a code's values. Default: 5.")] = None,
    kinds: Annotated[
        str | None, typer.Option(help="What enters a sequence: all, paper, or kinds with commas between. Default: all.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=8, help="Context kept in the tokenizer. Default: 2048.")] = None,
    format: Annotated[
        RowFormat, typer.Option(help="arrow: mapped for training; parquet: a third of it, to keep or stream.")
    ] = RowFormat.arrow,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
) -> None:
    """Fit a tokenizer and encode every patient.

    It is fitted on the training patients. Files are encoded one by one; a stopped run goes on.
    """
    from ehrseq.encode import tokenize_dataset
    from ehrseq.encode.fitting import FITTED_SPLITS
    from ehrseq.tasks import load_task
    from ehrseq.work.engine import get_engine

    settings = {
        "max_vocab_size": vocab_size,
        "min_count": min_count,
        "num_value_bins": value_bins,
        "input_kinds": kinds.split(",") if kinds and "," in kinds else kinds,
        "model_max_length": context,
    }
    summary = tokenize_dataset(
        dataset,
        output,
        tokenizer=tokenizer,
        tasks=None if task is None else [load_task(name).to_config() for name in task],
        fit_splits=tuple(split or FITTED_SPLITS),
        format=format.value,
        engine=get_engine(engine.value, num_workers=workers),
        **{name: value for name, value in settings.items() if value is not None},
    )
    folder = dataset / "encoded" if output is None else output
    fitted = summary["fitted"]
    typer.echo(
        f"{summary['vocabulary']:,} tokens, fitted on {fitted['subjects']:,} patients; edges of value bins "
        + (f"within {fitted['bin_rank_error']:.2%} of their rank" if fitted["bin_rank_error"] else "exact")
    )
    typer.echo(
        f"{summary['patients']:,} patients, {summary['rows']:,} events, {summary['tokens']:,} tokens in {folder} "
        f"({summary['bytes'] / 1e6:,.1f} MB, {summary['bytes'] / summary['source_bytes']:.2f} times the dataset); "
        f"{summary['unknown_rows']:,} events of unknown codes, read as [UNK]"
    )

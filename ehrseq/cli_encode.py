"""`ehrseq label`, `ehrseq tokenize`: a prepared dataset becomes labels, a tokenizer and encoded rows, file by file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class EngineName(StrEnum):
    """Where work is done."""

    local = "local"
    ray = "ray"


Dataset = Annotated[Path, typer.Argument(help="Folder that `ehrseq prepare` wrote.")]
EngineOption = Annotated[EngineName, typer.Option(help="Processes of this machine, or a Ray cluster.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Tasks at a time. Default: one a core.")]


def label(
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
    """Label every admission for clinical tasks: labels/<task>/ in the dataset, with the count of what has no label."""
    from ehrseq.engine import get_engine
    from ehrseq.tasks import load_task
    from ehrseq.tasks.aces import is_aces_file, label_dataset_aces
    from ehrseq.tasks.shards import label_dataset

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

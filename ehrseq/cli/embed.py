"""`ehrseq embed`: vectors of patients and visits from a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ehrseq.cli.options import EngineName, EngineOption, Workers, is_writable


def embed_command(
    model: Annotated[
        str, typer.Option(help="Folder of a pretrained or finetuned checkpoint, or owner/name on the Hub.")
    ],
    data: Annotated[
        Path, typer.Option(help="FHIR (NDJSON, Bundles), MEDS or the PhysioNet challenge 2012: folder or file.")
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")] = Path("embeddings.parquet"),
    times: Annotated[
        Path | None,
        typer.Option(
            help="Parquet or CSV with subject_id, prediction_time. Default: the end of each record, or of each stay."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Embed at the labelled times: dataset with labels/, folder of labels, or label table."),
    ] = None,
    level: Annotated[str, typer.Option(help="patient: one vector a time; visit: one for each visit so far.")] = (
        "patient"
    ),
    pooling: Annotated[
        str | None,
        typer.Option(help="last, mean, first, ends or fused. Default: what the model's own classifier reads."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Put this task's question at the end of each record.")] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Dataset in files: embed the patients of this split; repeat. Default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in one forward pass.")] = 32,
    skip_bad_lines: Annotated[bool, typer.Option(help="FHIR: count and skip unreadable resources.")] = False,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
) -> None:
    """Write vectors of patients or visits, of any model of the package.

    Columns: subject_id, prediction_time, vector; of visits also visit, start, end. Nothing later than a vector's time
    is read. A stopped run goes on. `ehrseq phenotypes` groups them, `ehrseq probe` learns tasks from them.
    """
    from ehrseq.representations.embeddings import embed_dataset
    from ehrseq.work.engine import get_engine

    if labels is not None and times is not None:
        raise ValueError("--labels and --times both say when to embed; give one of them.")
    if out.is_dir() or out.suffix != ".parquet" or not is_writable(out.parent):
        raise ValueError(f"{out} cannot be written; give the name of a .parquet file in a folder of yours.")
    report = embed_dataset(
        model,
        data,
        out,
        level=level,
        pooling=pooling,
        task=task,
        prediction_times=times,
        labels=labels,
        splits=split or None,
        batch_size=batch_size,
        parts=out.with_name(f".{out.name}.parts"),
        on_error="skip" if skip_bad_lines else "raise",
        engine=get_engine(engine.value, num_workers=workers),
    )
    typer.echo(str(report))
    typer.echo(f"{report.notes['vectors written']:,} vectors in {out}")

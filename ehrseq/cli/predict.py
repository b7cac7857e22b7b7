"""`ehrseq predict`: the risks of many patients, from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ehrseq.cli.options import EngineName, EngineOption, Workers, is_writable


def predict_command(
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
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Score each task at its own labelled times: dataset with labels/, folder of labels, or label table."
        ),
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Dataset in files: score the patients of this split; repeat. Default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows (patient, task) in one forward pass.")] = 32,
    skip_bad_lines: Annotated[bool, typer.Option(help="FHIR: count and skip unreadable resources.")] = False,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
) -> None:
    """Write the risk of every patient (or stay): subject_id, prediction_time, task, label, score, reason.

    The reason says why a task does not apply then; where nothing is left to foretell, there is no score. A dataset of
    `ehrseq prepare` is scored file by file, with --engine and --workers; a stopped run goes on. With --labels, what is
    written is what `ehrseq evaluate` wants.
    """
    from ehrseq.data.metadata import written_by_us
    from ehrseq.prediction.datasets import predict_dataset
    from ehrseq.prediction.risks import predict_risks
    from ehrseq.work.engine import get_engine
    from ehrseq.work.files import write_whole

    if labels is not None and times is not None:
        raise ValueError("--labels and --times both say when to score; give one of them.")
    if out.is_dir() or out.suffix != ".parquet" or not is_writable(out.parent):
        raise ValueError(f"{out} cannot be written; give the name of a .parquet file in a folder of yours.")
    if written_by_us(data):
        risks, report = predict_dataset(
            model,
            data,
            out.with_name(f".{out.name}.parts"),
            tasks=task or None,
            prediction_times=times,
            labels=labels,
            splits=split or None,
            batch_size=batch_size,
            engine=get_engine(engine.value, num_workers=workers),
        )
    elif engine is not EngineName.local or workers is not None or split:
        raise ValueError(
            f"--engine, --workers and --split need a dataset in files; run `ehrseq prepare {data} FOLDER` first."
        )
    else:
        risks, report = predict_risks(
            model,
            data,
            tasks=task or None,
            prediction_times=times,
            labels=labels,
            batch_size=batch_size,
            on_error="skip" if skip_bad_lines else "raise",
        )
    write_whole(out, risks.write_parquet)
    typer.echo(str(report))
    scored = risks.height - risks["score"].null_count()
    typer.echo(
        f"{risks['subject_id'].n_unique():,} patients, {risks.height:,} rows in {out}: {scored:,} with a risk, "
        f"{risks['reason'].count():,} with a reason why the task does not apply"
    )

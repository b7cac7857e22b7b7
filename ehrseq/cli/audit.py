"""`ehrseq audit`, `ehrseq stats`: does a dataset tell the answers, and what does it hold?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ehrseq.cli.options import Dataset, EngineName, EngineOption, Workers


def audit_command(
    dataset: Dataset,
    labels: Annotated[
        Path, typer.Argument(help="The dataset again (its labels/), a folder of labels, or a label table (.parquet).")
    ],
    model: Annotated[
        str | None, typer.Option(help="Checkpoint (folder or owner/name): whom was its tokenizer fitted on?")
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="Folder of `ehrseq tokenize`, or tables of encoded rows.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="YAML file of a task that does not come with the package; repeatable.")
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(help="Finding that is known: KIND, KIND:TASK, KIND:TASK:ITEM, or a YAML file; repeatable."),
    ] = None,
    bound: Annotated[float, typer.Option(help="AUROC of a single code from which on it is listed.")] = 0.9,
    end_of_data: Annotated[
        str | None, typer.Option(help="Last moment that the data cover, ISO 8601. Default: as beside the labels.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the report to.")] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for intermediate files, so that a stopped run goes on. Default: a temporary one."),
    ] = None,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
) -> None:
    """Look for leaks of the outcome into what a model reads.

    Future events in rows, outcomes at the prediction, shared patients, codes that are the label, and more. Ends
    with 1 where a finding is not accepted.
    """
    from ehrseq.audit import audit_dataset
    from ehrseq.work.engine import get_engine
    from ehrseq.work.files import write_json

    report = audit_dataset(
        dataset,
        labels,
        model=model,
        rows=rows,
        tasks=task or [],
        accept=accept or [],
        bound=bound,
        end_of_data=end_of_data,
        work=work,
        engine=get_engine(engine.value, num_workers=workers),
    )
    typer.echo(str(report))
    if out is not None:
        write_json(out, report.to_dict(), indent=2)
    if report.open:
        raise typer.Exit(code=1)


def stats_command(
    dataset: Dataset,
    labels: Annotated[
        Path | None, typer.Option(help="Labels for the prevalences, as of `audit`. Default: the dataset's own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: DATASET/stats.")] = None,
    least_patients: Annotated[
        int, typer.Option(min=1, help="Codes, months and periods of fewer are left out; set it before passing on.")
    ] = 1,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for intermediate files, so that a stopped run goes on. Default: a temporary one."),
    ] = None,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
) -> None:
    """Write a page of plots and tables of a dataset.

    Codes, events per patient, missing times, prevalence over calendar time.
    """
    from ehrseq.stats import count_dataset, write_statistics
    from ehrseq.stats.page import check_page_folder
    from ehrseq.work.engine import get_engine

    folder = dataset / "stats" if out is None else out
    check_page_folder(folder)  # before the work
    runner = get_engine(engine.value, num_workers=workers)
    statistics = count_dataset(dataset, labels, work=work, engine=runner)
    page = write_statistics(statistics, folder, least_patients=least_patients)
    patients, codes = sum(statistics.patients.values()), statistics.codes.height
    typer.echo(f"{patients:,} patients, {statistics.events:,} events, {codes:,} codes")
    missing = statistics.kinds.filter(statistics.kinds["without_time"] > 0)
    for kind, count, rows in missing.select("kind", "without_time", "rows").iter_rows():
        typer.echo(f"  {kind}: {count:,} of {rows:,} rows without a time")
    typer.echo(f"The page is {page}")

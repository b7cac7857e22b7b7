"""`ehrseq explain`: why a checkpoint gives the risks that it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ehrseq.cli.options import EngineName, EngineOption, Workers, check_folder
from ehrseq.hub.families import STARTER


def explain_command(
    data: Annotated[
        Path, typer.Option(help="FHIR (NDJSON, Bundles), MEDS or the PhysioNet challenge 2012: folder or file.")
    ],
    model: Annotated[
        str,
        typer.Option(
            help="Folder of a finetuned checkpoint, or owner/name on the Hub.",
            show_default="the small one of simulated patients that comes with the package",
        ),
    ] = str(STARTER),
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("explanations"),
    subject: Annotated[
        list[int] | None, typer.Option(help="Write a page of this patient; repeat for several. Default: all, no pages.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Task to explain; repeat for several. Default: all.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Method; repeat for several. Default: the one recommended for the model.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="Setting of a method, as name=value or method.name=value (groups=code, nodes=16); repeat."),
    ] = None,
    times: Annotated[
        Path | None,
        typer.Option(
            help="Parquet or CSV with subject_id, prediction_time. Default: the end of each record, or of each stay."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Explain each task at its own labelled times: dataset with labels/, folder of labels, or label table."
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Dataset in files: explain the patients of this split; repeat. Default: all."),
    ] = None,
    by: Annotated[str | None, typer.Option(help="Cohort: sum by code, parent or kind. Default: code.")] = None,
    threshold: Annotated[float, typer.Option(help="Cohort: predictions are positive from this risk on.")] = 0.5,
    resamples: Annotated[int, typer.Option(min=1, help="Cohort: bootstrap resamples of patients.")] = 1000,
    png: Annotated[bool, typer.Option("--png", help="Patients: a picture beside each page.")] = False,
    skip_bad_lines: Annotated[bool, typer.Option(help="FHIR: count and skip unreadable resources.")] = False,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
) -> None:
    """Write what contributed to each risk.

    With --subject a page for each of these patients. Without it contributions.parquet of all of them, a row for
    each event, with the mean contribution of each code over the cohort in cohort.parquet and on a page for each task
    and method; a stopped run goes on. Contributions are log-odds: baseline + contributions + remainder = log-odds of
    the score.
    """
    check_folder(out)
    if labels is not None and times is not None:
        raise ValueError("--labels and --times both say when to explain; give one of them.")
    asked = {
        "tasks": task or None,
        "methods": method or None,
        "settings": _settings(setting or [], method or []),
        "prediction_times": times,
        "labels": labels,
        "splits": split or None,
        "on_error": "skip" if skip_bad_lines else "raise",
    }
    if subject:
        _explain_some(model, data, out, subject, asked, png)
    elif png:
        raise ValueError("--png makes pictures of patients; name them by --subject.")
    else:
        _explain_all(model, data, out, asked, (by, threshold, resamples), (engine, workers))


def _explain_some(model: str, data: Path, out: Path, subjects: list[int], asked: dict[str, Any], png: bool) -> None:
    """Pages of some patients."""
    from ehrseq.interpretability.subjects import explain_subjects, write_pages

    answers, report = explain_subjects(model, data, subjects, **asked)
    files = write_pages(model, answers, out, png=png)
    typer.echo(str(report))
    _tell_notice(model)
    for answer in answers:
        if answer.reason is not None:
            who, when, what = answer.moment
            typer.echo(f"patient {who} at {when} cannot be read for {what}: {answer.reason}")
    for file in files:
        typer.echo(f"Written: {file}")
    if not files:
        raise ValueError("there is nothing to show: none of these patients can be read then.")


def _explain_all(
    model: str,
    data: Path,
    out: Path,
    asked: dict[str, Any],
    cohort: tuple[str | None, float, int],
    work: tuple[EngineName, int | None],
) -> None:
    """Contributions of all patients, and what their codes contribute on average."""
    import polars as pl

    from ehrseq.interpretability.cohort import check_cohort, cohort_contributions, cohort_words
    from ehrseq.interpretability.cohort_page import write_cohort_page
    from ehrseq.interpretability.datasets import explain_dataset
    from ehrseq.work.engine import get_engine
    from ehrseq.work.files import write_whole

    by, threshold, resamples = cohort
    check_cohort(by, threshold, resamples)
    engine, workers = work
    file = out / "contributions.parquet"
    report = explain_dataset(
        model, data, file, parts=out / ".parts", engine=get_engine(engine.value, num_workers=workers), **asked
    )
    typer.echo(str(report))
    _tell_notice(model)
    questions = pl.scan_parquet(file).select("subject_id", "prediction_time", "task", "score").unique().collect()
    scored = questions["score"].count()
    typer.echo(
        f"{questions['subject_id'].n_unique():,} patients, {questions.height:,} questions in {file}: {scored:,} "
        f"answered, {questions.height - scored:,} without an answer"
    )
    if not scored:
        typer.echo("No question has an answer, so there is no page of the cohort.")
        return
    table = cohort_contributions(file, by, threshold=threshold, num_resamples=resamples)
    write_whole(out / "cohort.parquet", table.write_parquet)
    words = cohort_words(file, threshold)
    for (task, method), rows in table.group_by("task", "method", maintain_order=True):
        page = write_cohort_page(
            rows, out / f"cohort_{task}_{method}.html", task=str(task), method=str(method), words=words
        )
        typer.echo(f"Written: {page}")


def _tell_notice(model: str) -> None:
    """What must be known of the model, as `pipeline("ehr-risk")` says it at every call."""
    from ehrseq.hub.checkpoints import checkpoint_digest, kept_checkpoint, notice_of

    if notice := notice_of(kept_checkpoint(model, checkpoint_digest(model))):
        typer.echo(notice)


def _settings(given: list[str], methods: list[str]) -> dict[str, dict[str, Any]] | None:
    """Settings by method, from `name=value` or `method.name=value`."""
    if not given:
        return None
    settings: dict[str, dict[str, Any]] = {}
    for text in given:
        name, found, value = text.partition("=")
        owner, has_owner, rest = name.rpartition(".")
        if not found or not rest:
            raise ValueError(f"--setting got {text!r}; expected name=value, such as groups=code.")
        if not has_owner:
            if len(methods) != 1:
                raise ValueError(f"--setting {text} is of which method? Give one --method, or method.{text}.")
            owner = methods[0]
        try:
            settings.setdefault(owner, {})[rest] = json.loads(value)
        except json.JSONDecodeError:
            settings.setdefault(owner, {})[rest] = value
    return settings

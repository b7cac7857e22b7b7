"""Risks of many patients at once, from a checkpoint and a folder of records, by the columnar path.

`pipeline("ehr-risk")` answers for a patient in hand; this is the same model on a whole export, encoded as one table.

A task is learnt at one kind of moment (a discharge, 24 hours after an admission) of patients for whom the answer is
open. Rows outside of that stay in the table with their `reason`, and are counted in the report: the score is null where
nothing is left to foretell (`died_before_prediction`, `earlier_code`, `stay_ended`) and given, to be read with care,
where the moment is another one (`no_discharge`, `off_anchor`). Rows with a null reason are what evaluations speak of.

A checkpoint of HyMaTE has a feature extractor in the place of the tokenizer and reads stays: see
`ehrseq.prediction.stays`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ehrseq.hub.checkpoints import load_checkpoint

RISK_SCHEMA: dict[str, Any] = {
    "subject_id": pl.Int64,
    "prediction_time": pl.Datetime("us"),
    "task": pl.String,
    "label": pl.String,
    "score": pl.Float64,
    "reason": pl.String,
}


def predict_risks(
    checkpoint: str | Path,
    data: str | Path | pl.DataFrame,
    *,
    tasks: Sequence[str] | str | None = None,
    prediction_times: str | Path | pl.DataFrame | None = None,
    batch_size: int = 32,
    on_error: str = "raise",
    progress: bool = True,
) -> tuple[pl.DataFrame, Any]:
    """Score patients.

    Args:
        checkpoint: Folder of a finetuned checkpoint with its tokenizer, or `owner/name` on the Hub.
        data: FHIR or MEDS (folder or file), or an event table.
        tasks: Names of the tasks, or one name; None = all of the checkpoint.
        prediction_times: Table (or Parquet or CSV file) of subject_id, prediction_time; None = the last event of each
            patient, or where a checkpoint reads stays the end of each stay's window. Nothing later than it is read.
        batch_size: Rows (patient, time, task) in one forward pass.
        on_error: FHIR only: "raise" or "skip" (counted in the report).
        progress: Show progress bars.

    Returns:
        `(risks, report)`: a table subject_id, prediction_time, task, label (the positive outcome), score (its
        probability, null where there is nothing to foretell), reason (why the task does not apply, null where it does),
        and what was read and skipped.

    Raises:
        ValueError: An unknown task or patient, a checkpoint without tasks, tokenizer or trained head, unreadable data.
    """
    from ehrseq.data.report import ConversionReport
    from ehrseq.data.schema import validate_events
    from ehrseq.data.sources import load_events

    check_request(data, tasks, prediction_times, batch_size)
    model, encoder = load_checkpoint(checkpoint)
    asked = asked_tasks(model, checkpoint, tasks)
    if isinstance(data, pl.DataFrame):
        events, report = validate_events(data), ConversionReport()
    else:
        events, report = load_events(data, on_error=on_error, progress=progress)
    if events.is_empty():
        raise ValueError(f"the data hold no event, so there is nobody to score. What was read:\n{report}")
    times = None if prediction_times is None else checked_times(prediction_times)
    if times is not None:
        check_known(times, events["subject_id"].unique())
    risks = score_events(model, encoder, events, times, asked, report=report, batch_size=batch_size, progress=progress)
    return checked_risks(risks, checkpoint), report


def score_events(
    model: Any,
    encoder: Any,
    events: pl.DataFrame,
    times: pl.DataFrame | None,
    tasks: dict[str, Any],
    *,
    report: Any,
    batch_size: int,
    progress: bool,
) -> pl.DataFrame:
    """Risks of an event table's patients.

    Args:
        model: A finetuned model.
        encoder: Its tokenizer or feature extractor.
        events: Event table of whole patients.
        times: From `checked_times`; None = the end of each record, or of each stay.
        tasks: From `asked_tasks`.
        report: `ConversionReport` whose notes count what was left out.
        batch_size: Rows in one forward pass.
        progress: Show progress bars.

    Raises:
        NoStayError: The model reads stays, and there is none.
    """
    options: dict[str, Any] = {"report": report, "batch_size": batch_size, "progress": progress}
    if hasattr(encoder, "task_tokens"):
        asked = _last_times(events) if times is None else times
        if times is None:
            report.notes["patients without a timed event, not scored"] += events["subject_id"].n_unique() - asked.height
        return _prompted_risks(model, encoder, events, asked, tasks, **options)
    from ehrseq.prediction.stays import stay_risks

    at_ends = times is None and encoder.spec.window_start == "before_prediction"
    risks = stay_risks(model, encoder, events, _last_times(events) if at_ends else times, tasks, **options)
    if times is None:
        scored = risks["subject_id"].n_unique()
        report.notes["patients without a stay, not scored"] += events["subject_id"].n_unique() - scored
    return risks


def checked_risks(risks: pl.DataFrame, checkpoint: str | Path) -> pl.DataFrame:
    """Risks in the columns of `RISK_SCHEMA`, sorted.

    Raises:
        ValueError: One is no number.
    """
    scores = risks["score"].drop_nulls().to_numpy()
    if not np.isfinite(scores).all():
        raise ValueError(
            f"{checkpoint} gives {scores[~np.isfinite(scores)][0]} as a risk: its weights are damaged. Save it again."
        )
    return risks.match_to_schema(pl.Schema(RISK_SCHEMA)).sort("subject_id", "prediction_time", maintain_order=True)


def asked_tasks(model: Any, checkpoint: str | Path, tasks: Sequence[str] | str | None) -> dict[str, Any]:
    """Entries of the checkpoint's `config.tasks` by name, those that are asked for.

    Raises:
        ValueError: It has none, or none of these.
    """
    known = {task["name"]: task for task in getattr(model.config, "tasks", None) or []}
    if not known:
        raise ValueError(f"{checkpoint} has no tasks in its config; finetune it first (examples/03_finetune.py).")
    wanted = list(known) if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
    unknown = [task for task in wanted if task not in known]
    if unknown or not wanted:
        raise ValueError(f"unknown tasks {unknown}; this checkpoint knows {list(known)}, name at least one.")
    return {name: known[name] for name in wanted}


def check_request(data: Any, tasks: Any, prediction_times: Any, batch_size: Any) -> None:
    """Refuse arguments of `predict_risks` that are of no use, before anything is loaded.

    Raises:
        ValueError: See above.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size got {batch_size!r}; expected a whole number of at least 1.")
    for name, given in (("data", data), ("prediction_times", prediction_times)):
        if not isinstance(given, str | Path | pl.DataFrame) and not (given is None and name == "prediction_times"):
            raise ValueError(f"{name} got {type(given).__name__}; expected a path or a polars DataFrame.")
    if tasks is not None and not isinstance(tasks, str | list | tuple | set):
        raise ValueError(f"tasks got {tasks!r} ({type(tasks).__name__}); expected the name of a task, or a list.")


def _prompted_risks(
    model: Any,
    tokenizer: Any,
    events: pl.DataFrame,
    times: pl.DataFrame,
    tasks: dict[str, Any],
    *,
    report: Any,
    batch_size: int,
    progress: bool,
) -> pl.DataFrame:
    """Risks (`RISK_SCHEMA`) of a model that is prompted: every task at every time."""
    from ehrseq.batches.prompts import prompted_dataset
    from ehrseq.batches.scoring import score_rows

    rows = times.with_columns(boolean_value=pl.lit(False))
    dataset = prompted_dataset(tokenizer, events, dict.fromkeys(tasks, rows), model.config.max_position_embeddings)
    # Such a risk is the model's guess for somebody of whom it read nothing.
    report.notes["events of unknown codes, read as [UNK]"] += tokenizer.coverage(events)["lost_events"]
    report.notes["risks without a timed event up to the prediction time"] += int((dataset.index.end == 0).sum())
    scores = score_rows(model, tokenizer, dataset, batch_size=batch_size, progress=progress)
    names = tokenizer.tasks
    reasons = _reasons(tokenizer, events, times, tasks)
    asked = zip(dataset.subject_ids.tolist(), _microseconds(dataset.prediction_times), dataset.task_ids, strict=True)
    why = [reasons[subject, at].get(names[task_id]) for subject, at, task_id in asked]
    for reason, words in tokenizer.task_reasons.items():
        kind = "risks not given" if reason in tokenizer.unanswerable_reasons else "risks outside their task"
        report.notes[f"{kind}: {words}"] += why.count(reason)
    return pl.DataFrame(
        {
            "subject_id": dataset.subject_ids,
            "prediction_time": dataset.prediction_times,
            "task": [names[task_id] for task_id in dataset.task_ids],
            "label": [tasks[names[task_id]].get("positive_label") for task_id in dataset.task_ids],
            "score": [
                None if reason in tokenizer.unanswerable_reasons else score
                for reason, score in zip(why, scores.tolist(), strict=True)
            ],
            "reason": why,
        },
        schema=RISK_SCHEMA,
    )


def _reasons(
    tokenizer: Any, events: pl.DataFrame, times: pl.DataFrame, tasks: dict[str, Any]
) -> dict[tuple[int, int], dict[str, str | None]]:
    """(subject, prediction time in microseconds) -> task -> why it does not apply, None where it does."""
    from ehrseq.tokenization.ehr_anchors import matters, reasons_against
    from ehrseq.tokenization.ehr_sequence import Event

    kind_of = tokenizer.vocabulary.kind
    codes = [code for code in events["code"].unique().to_list() if matters(code, kind_of, tasks.values())]
    rows = events.filter(pl.col("code").is_in(codes)).select(
        "subject_id", pl.col("time").to_physical(), "code", "visit_id"
    )
    of_subject: dict[int, list[Event]] = {}
    for subject, time, code, visit_id in rows.iter_rows():
        of_subject.setdefault(subject, []).append(Event(time, code, visit_id=visit_id))
    return {
        (subject, at): dict(
            zip(tasks, reasons_against(of_subject.get(subject, []), kind_of, list(tasks.values()), at), strict=True)
        )
        for subject, at in times.select("subject_id", pl.col("prediction_time").to_physical()).iter_rows()
    }


def _microseconds(times: np.ndarray) -> list[int]:
    return times.astype("datetime64[us]").astype(np.int64).tolist()


def _last_times(events: pl.DataFrame) -> pl.DataFrame:
    """The end of each record."""
    return (
        events.filter(pl.col("time").is_not_null())
        .group_by("subject_id", maintain_order=True)
        .agg(pl.col("time").max().alias("prediction_time"))
    )


def checked_times(given: str | Path | pl.DataFrame) -> pl.DataFrame:
    """One (subject_id, prediction_time) per row that is asked for.

    Raises:
        ValueError: A file that cannot be read, or no table of whole numbers and times.
    """
    if not isinstance(given, pl.DataFrame):
        given = _read_times(Path(given))
    missing = {"subject_id", "prediction_time"} - set(given.columns)
    if missing:
        raise ValueError(
            f"prediction times lack {sorted(missing)}; expected subject_id, prediction_time, got {given.columns}."
        )
    subjects = given["subject_id"]
    if subjects.dtype.is_float() and (subjects != subjects.round()).any():
        raise ValueError("prediction times name patients by fractions; expected whole numbers.")
    try:
        times = given.select(pl.col("subject_id").cast(pl.Int64), pl.col("prediction_time").cast(pl.Datetime("us")))
    except pl.exceptions.PolarsError as error:
        types = {name: str(given.schema[name]) for name in ("subject_id", "prediction_time")}
        raise ValueError(
            f"prediction times have the types {types}; expected whole numbers and times such as 2024-03-01T08:30:00."
        ) from error
    if times.is_empty():
        raise ValueError("the table of prediction times has no row; leave it out to score at the end of each record.")
    nulls = times.filter(pl.any_horizontal(pl.all().is_null())).height
    if nulls:
        raise ValueError(f"{nulls} prediction times lack the patient or the time; fill them in, or leave them out.")
    return times.unique(maintain_order=True)


def check_known(times: pl.DataFrame, subjects: pl.Series) -> None:
    """Refuse prediction times of patients that are not there.

    Raises:
        ValueError: There are such.
    """
    strangers = times.filter(~pl.col("subject_id").is_in(subjects.implode()))["subject_id"]
    if len(strangers):
        raise ValueError(
            f"prediction times name {len(strangers)} patients without events, e.g. {int(np.asarray(strangers)[0])}."
        )


def _read_times(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise ValueError(f"no file {path}; give a Parquet or CSV file of subject_id, prediction_time.")
    try:
        return pl.read_csv(path, try_parse_dates=True) if path.suffix == ".csv" else pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as {path.suffix or 'Parquet'}: {reason}") from error

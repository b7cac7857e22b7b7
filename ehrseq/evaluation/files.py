"""`ehrseq evaluate`: predictions and labels in; a page, a report, its numbers and MEDS predictions out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from ehrseq.data.shards import dataset_shards, scan_shard
from ehrseq.evaluation.assessment import NO_TUNING, assess
from ehrseq.evaluation.decisions import ALERT_RATE
from ehrseq.evaluation.page import EvaluatedTask, evaluation_page
from ehrseq.evaluation.predictions import match_predictions, read_predictions, write_meds_predictions
from ehrseq.evaluation.report_tables import ReportTable
from ehrseq.evaluation.subgroups import STATIC_CODES, assess_subgroups, row_attributes, subgroup_table
from ehrseq.tasks.label_sources import AuditedTask, read_audited
from ehrseq.version import __version__
from ehrseq.work.files import write_json, write_text
from ehrseq.work.progress import progress_bar

logger = logging.getLogger(__name__)

SUBGROUP_RESAMPLES = 500  # of each of many cells


def evaluate_files(
    predictions: str | Path,
    *,
    labels: str | Path | None = None,
    data: str | Path | None = None,
    tuning: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    outcomes: Mapping[str, str] | None = None,
    out: str | Path,
    alert_rate: float = ALERT_RATE,
    num_resamples: int = 1000,
    seed: int = 0,
) -> str:
    """Evaluate the scores of a file, task by task; what cannot be evaluated is named with its reason.

    A task with one class only, or with few rows of one, is reported with its counts, and why it has no metrics.

    Labels of patients that the predictions do not hold at all are left out and counted: predictions are often of the
    held-out patients alone. A label of a patient that they do hold needs its score.

    Args:
        predictions: Parquet file or folder, see `match_predictions`.
        labels: Dataset with `labels/`, folder of labels, or label table; None where the predictions hold their own.
        data: MEDS dataset of the patients, for subgroups; without it there is the year alone.
        tuning: Predictions of tuning patients, from which F1's threshold is chosen; their labels are in `labels` too.
        tasks: Tasks; None = all that have scores or labels.
        outcomes: Task -> its positive outcome in words; by default as the predictions or the labels say it.
        out: Folder that gets `evaluation.html`, `evaluation.md`, `evaluation.json` and `predictions/<task>.parquet`.
        alert_rate: Without tuning rows of a task, its threshold is the one from which on this share of rows alerts.
        num_resamples: Bootstrap resamples of patients; subgroups take 500 at most.
        seed: Seed of the bootstrap.

    Returns:
        The report as Markdown.

    Raises:
        ValueError: Files that cannot be read, a rate out of range, or no task that can be evaluated, with the reasons.
    """
    if not 0 < alert_rate <= 1:
        raise ValueError(f"alert_rate got {alert_rate}; expected a share of the rows, above 0 and at most 1.")
    sources = _Sources(
        read_predictions(predictions),
        str(predictions),
        None if labels is None else {task.name: task for task in read_audited(labels)},
    )
    tuned = None if tuning is None else replace(sources, table=read_predictions(tuning), name=str(tuning))
    events = None if data is None else _about_patients(Path(data), sources.table["subject_id"])
    evaluated, not_evaluated, words_of = [], {}, outcomes or {}
    for name in progress_bar(sources.tasks(tasks), desc="Evaluating", unit="task"):
        try:
            rows = sources.rows(name)
        except ValueError as error:
            not_evaluated[name] = str(error)
            continue
        tuning_rows, why = _tuning_rows(tuned, name)
        assessment = assess(
            rows, name, tuning=tuning_rows, alert_rate=alert_rate, num_resamples=num_resamples, seed=seed
        )
        if why:
            rule = assessment.threshold_from.replace(NO_TUNING, f"of the tuning rows: {why}")
            assessment = replace(assessment, threshold_from=rule)
        groups = assess_subgroups(
            rows,
            row_attributes(rows, events),
            threshold=assessment.threshold,
            num_resamples=min(num_resamples, SUBGROUP_RESAMPLES),
            seed=seed,
        )
        evaluated.append(EvaluatedTask(assessment, rows, groups, words_of.get(name) or sources.outcome(name)))
    if not evaluated:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in not_evaluated.items())
        raise ValueError(f"no task of {predictions} can be evaluated. {reasons}")
    words = (
        f"Scores: {predictions}. Labels: {labels or 'in the same file'}. Tuning rows: {tuning or 'none'}. Patients: "
        f"{data or 'not given'}.",
        f"95 % intervals by {num_resamples:,} bootstrap resamples of patients (seed {seed}), of subgroups by "
        f"{min(num_resamples, SUBGROUP_RESAMPLES):,}. ehrseq {__version__}.",
    )
    return _write(Path(out), evaluated, not_evaluated, words, {"predictions": str(predictions), "seed": seed})


@dataclass(frozen=True)
class _Sources:
    """Scores with the labels that they are held against.

    Attributes:
        table: The predictions.
        name: Where they come from, in messages.
        labels: Labels by task, None where the predictions hold their own.
    """

    table: pl.DataFrame
    name: str
    labels: Mapping[str, AuditedTask] | None

    @property
    def scored(self) -> list[str] | None:
        """Tasks that the predictions name, None where they name none."""
        return self.table["task"].unique(maintain_order=True).to_list() if "task" in self.table.columns else None

    def tasks(self, wanted: Sequence[str] | None) -> list[str]:
        """Names of the tasks to look at: those that are wanted, or all that have scores or labels."""
        if self.scored is None:
            if self.labels is not None and len(self.labels) != 1 and len(wanted or ()) != 1:
                raise ValueError(f"{self.name} names no task and the labels have {list(self.labels)}: say which.")
            return list(wanted or self.labels or [Path(self.name).stem])
        return list(dict.fromkeys(wanted or [*self.scored, *(self.labels or ())]))

    def rows(self, name: str) -> pl.DataFrame:
        """The labelled rows of a task.

        Raises:
            ValueError: It has no scores or no labels, or they do not match.
        """
        if self.scored is not None and name not in self.scored:
            raise ValueError(f"no predictions; {self.name} has those of {self.scored}")
        labels = None
        if self.labels is not None:
            if name not in self.labels:
                raise ValueError(f"no labels; there are those of {list(self.labels)}")
            labels = self.labels[name].labels
            known = labels.filter(pl.col("subject_id").is_in(self.table["subject_id"].unique().implode()))
            if known.height < labels.height:
                others = labels.height - known.height
                logger.warning("%s: %s labels are of patients that %s does not hold.", name, f"{others:,}", self.name)
            labels = known
        rows = match_predictions(self.table, labels, task=name if self.scored is not None else None, source=self.name)
        if not rows.height:
            raise ValueError(f"no labels of a patient that {self.name} holds")
        return rows

    def outcome(self, name: str) -> str:
        """The positive outcome in words, as the predictions or the task's definition say it."""
        if "label" in self.table.columns and self.table.schema["label"] == pl.String and self.scored is not None:
            texts = self.table.filter(pl.col("task") == name)["label"].drop_nulls()
            if len(texts):
                return str(texts[0])
        definition = None if self.labels is None or name not in self.labels else self.labels[name].definition
        return "" if definition is None else definition.positive_label


def _tuning_rows(tuned: _Sources | None, name: str) -> tuple[pl.DataFrame | None, str]:
    """The tuning rows of a task, or why there are none though tuning predictions were given."""
    if tuned is None:
        return None, ""
    try:
        return tuned.rows(name), ""
    except ValueError as error:
        return None, str(error)


def _write(
    out: Path,
    tasks: Sequence[EvaluatedTask],
    not_evaluated: Mapping[str, str],
    words: Sequence[str],
    settings: Mapping[str, object],
) -> str:
    """Write page, report, numbers and MEDS predictions; returns the report as Markdown."""
    texts = [task.assessment.to_markdown() + "\n" + subgroup_table(task.groups) for task in tasks]
    if not_evaluated:
        rows = [[name, reason] for name, reason in not_evaluated.items()]
        texts.append(ReportTable("Not evaluated", ["task", "reason"], rows).to_markdown())
    report = "# Evaluation\n\n" + "\n".join(texts)
    results = {
        task.assessment.task: task.assessment.to_dict() | {"subgroups": [group.to_dict() for group in task.groups]}
        for task in tasks
    }
    for task in tasks:
        file = out / "predictions" / f"{task.assessment.task}.parquet"
        write_meds_predictions(task.rows, file, threshold=task.assessment.threshold)
    write_json(out / "evaluation.json", {**settings, "tasks": results, "not_evaluated": not_evaluated})
    write_text(out / "evaluation.md", report)
    write_text(out / "evaluation.html", evaluation_page(tasks, not_evaluated, words))
    return report


def _about_patients(dataset: Path, subjects: pl.Series) -> pl.DataFrame:
    """The events that say what these patients are."""
    wanted = [kind for kinds in STATIC_CODES.values() for kind in kinds]
    frames = [
        scan_shard(shard)
        .filter(
            (pl.col("code") == "MEDS_BIRTH") | pl.col("code").str.split("//").list.first().is_in(wanted),
            pl.col("subject_id").is_in(subjects.unique().to_list()),
        )
        .select("subject_id", "time", "code")
        .collect()
        for shard in dataset_shards(dataset)
    ]
    if not frames:
        raise ValueError(f"{dataset} holds no MEDS files (data/**/*.parquet).")
    return pl.concat(frames)

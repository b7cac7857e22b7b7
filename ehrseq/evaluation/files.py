"""`ehrseq evaluate`: predictions and labels in; a report, its numbers and MEDS predictions out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl
from tqdm.auto import tqdm

from ehrseq.data.shards import dataset_shards, scan_shard
from ehrseq.evaluation.assessment import assess
from ehrseq.evaluation.predictions import match_predictions, read_predictions, write_meds_predictions
from ehrseq.evaluation.subgroups import STATIC_CODES, assess_subgroups, row_attributes, subgroup_table
from ehrseq.tasks.label_sources import read_audited
from ehrseq.work.files import write_json, write_text

logger = logging.getLogger(__name__)

SUBGROUP_RESAMPLES = 500  # of each of many cells


def evaluate_files(
    predictions: str | Path,
    *,
    labels: str | Path | None = None,
    data: str | Path | None = None,
    tuning: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    out: str | Path,
    num_resamples: int = 1000,
    seed: int = 0,
) -> str:
    """Evaluate the scores of a file.

    Labels of patients that the predictions do not hold at all are left out and counted: predictions are often of the
    held-out patients alone. A label of a patient that they do hold needs its score.

    Args:
        predictions: Parquet file or folder, see `match_predictions`.
        labels: Dataset with `labels/`, folder of labels, or label table; None where the predictions hold their own.
        data: MEDS dataset of the patients, for subgroups; without it there is the year alone.
        tuning: Predictions of tuning patients, from which F1's threshold is chosen; their labels are in `labels` too.
        tasks: Tasks; None = all that have labels.
        out: Folder that gets `evaluation.md`, `evaluation.json` and `predictions/<task>.parquet`.
        num_resamples: Bootstrap resamples of patients; subgroups take 500 at most.
        seed: Seed of the bootstrap.

    Returns:
        The report as Markdown.

    Raises:
        ValueError: Files that cannot be read or do not match, see `match_predictions`; an unknown task; no task.
    """
    table = read_predictions(predictions)
    tuned = None if tuning is None else read_predictions(tuning)
    truth = None if labels is None else {task.name: task.labels for task in read_audited(labels)}
    events = None if data is None else _about_patients(Path(data), table["subject_id"])
    texts, results = [], {}
    for name in tqdm(_tasks(table, truth, tasks, str(predictions)), desc="Evaluating"):
        rows = _rows(table, truth, name, str(predictions))
        tuning_rows = None if tuned is None else _rows(tuned, truth, name, str(tuning))
        found = assess(rows, name, tuning=tuning_rows, num_resamples=num_resamples, seed=seed)
        attributes = row_attributes(rows, events)
        groups = assess_subgroups(
            rows,
            attributes,
            threshold=found.threshold,
            num_resamples=min(num_resamples, SUBGROUP_RESAMPLES),
            seed=seed,
        )
        texts.append(found.to_markdown() + "\n" + subgroup_table(groups))
        results[name] = found.to_dict() | {"subgroups": [group.to_dict() for group in groups]}
        write_meds_predictions(rows, Path(out) / "predictions" / f"{name}.parquet", threshold=found.threshold)
    report = "# Evaluation\n\n" + "\n".join(texts)
    write_json(Path(out) / "evaluation.json", {"predictions": str(predictions), "seed": seed, "tasks": results})
    write_text(Path(out) / "evaluation.md", report)
    return report


def _tasks(
    table: pl.DataFrame, truth: Mapping[str, pl.DataFrame] | None, asked: Sequence[str] | None, source: str
) -> list[str]:
    """Names of the tasks to evaluate."""
    scored = table["task"].unique(maintain_order=True).to_list() if "task" in table.columns else None
    if scored is None:
        if truth is not None and len(truth) != 1 and len(asked or ()) != 1:
            raise ValueError(f"{source} names no task and the labels have {list(truth)}: say which.")
        return list(asked or truth or [Path(source).stem])
    known = scored if truth is None else [name for name in scored if name in truth]
    unknown = [name for name in asked or () if name not in known]
    if unknown or not known:
        has = "no labels" if truth is None else f"labels of {list(truth)}"
        raise ValueError(f"{source} has scores of {scored}, and there are {has}; {unknown or 'no task'} is in both.")
    return list(asked or known)


def _rows(table: pl.DataFrame, truth: Mapping[str, pl.DataFrame] | None, name: str, source: str) -> pl.DataFrame:
    """The labelled rows of a task."""
    labels = None
    if truth is not None:
        if name not in truth:
            raise ValueError(f"there are no labels of {name!r}; there are those of {list(truth)}.")
        labels = truth[name].filter(pl.col("subject_id").is_in(table["subject_id"].unique().to_list()))
        others = truth[name].height - labels.height
        if others:
            logger.warning("%s: %s labels are of patients that %s does not hold.", name, f"{others:,}", source)
    return match_predictions(table, labels, task=name if "task" in table.columns else None, source=source)


def _about_patients(dataset: Path, subjects: pl.Series) -> pl.DataFrame:
    """The events that say what these patients are."""
    wanted = [kind for kinds in STATIC_CODES.values() for kind in kinds]
    found = [
        scan_shard(shard)
        .filter(
            (pl.col("code") == "MEDS_BIRTH") | pl.col("code").str.split("//").list.first().is_in(wanted),
            pl.col("subject_id").is_in(subjects.unique().to_list()),
        )
        .select("subject_id", "time", "code")
        .collect()
        for shard in dataset_shards(dataset)
    ]
    if not found:
        raise ValueError(f"{dataset} holds no MEDS files (data/**/*.parquet).")
    return pl.concat(found)

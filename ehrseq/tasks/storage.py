"""Label tables on disk: `<dataset>/labels/<task>/labels.parquet`, as MEDS lays them out, beside how they came about."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.data.parquet import check_parquet
from ehrseq.data.schema import LABEL_SCHEMA, validate_labels
from ehrseq.tasks.labelling import LabelResult
from ehrseq.work.files import write_whole

logger = logging.getLogger(__name__)

LABEL_RULES = 2
"""Version of the rules that make labels, kept in the report beside them. 1 (not written down): positives whose horizon
passed the end of the data were kept, and unknown ends of stays and days of death were guessed."""


def write_labels(result: LabelResult, dataset_path: str | Path) -> list[Path]:
    """Write the labels of every task, each folder whole or not at all; labels of the same tasks are replaced.

    `report.json` beside them holds the task's definition, the end of the data and the count of every dropped label.

    Args:
        result: What `label_events` returned.
        dataset_path: Folder of the dataset.

    Returns:
        The folders written, one per task.

    Raises:
        ValueError: `dataset_path` is no folder.
    """
    root = _dataset(dataset_path) / "labels"
    for name, labels in result.labels.items():
        checked = validate_labels(labels, source=f"labels of {name}")
        write_label_folder(root / name, checked, _report(result, name))
    return [root / name for name in result.labels]


def write_label_folder(folder: Path, labels: pl.DataFrame, report: Mapping[str, Any]) -> None:
    """Write the labels of one task and what is to stand in `report.json`, whole or not at all."""
    checked = validate_labels(labels, source=f"labels of {folder.name}")

    def write(temporary: Path) -> None:
        temporary.mkdir()
        checked.write_parquet(temporary / "labels.parquet")
        (temporary / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    write_whole(folder, write)


def read_labels(dataset_path: str | Path, tasks: Sequence[str] | None = None) -> dict[str, pl.DataFrame]:
    """Read label tables, our own or those of another MEDS tool.

    Args:
        dataset_path: Folder of the dataset.
        tasks: Names of tasks (folders below `labels/`), default all.

    Returns:
        task -> subject_id, prediction_time, boolean_value, sorted by subject and time.

    Raises:
        ValueError: No labels there, an unknown task, a file that is no label table, a null in one of its columns.
    """
    root = _dataset(dataset_path) / "labels"
    present = [folder.name for folder in _label_folders(root)]
    if not present:
        raise ValueError(f"{root} holds no labels; write them with write_labels(label_events(...), dataset).")
    wanted = present if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
    unknown = [name for name in wanted if name not in present]
    if unknown:
        raise ValueError(f"{root} has no labels of {unknown}; it has {present}.")
    for name in wanted:
        file = root / name / "report.json"
        warn_of_old_rules(name, json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
    return {name: read_label_table(root / name) for name in wanted}


def warn_of_old_rules(name: str, report: Mapping[str, Any]) -> None:
    """Log that labels were made by rules of ours that are no longer those."""
    made_by_us = "candidates" in report
    if made_by_us and report.get("rules", 1) < LABEL_RULES:
        logger.warning(
            f"The labels of {name} were made by an earlier version: near the end of the data only positives were kept, "
            "and stays without an end counted as long ones. Make them again: `ehrseq label`."
        )


def labelled_tasks(dataset_path: str | Path) -> list[dict[str, Any]]:
    """`config.tasks` entries of the tasks that a dataset has labels of, packaged ones first; empty without labels.

    They are those of the labels' reports; labels of another tool give a name, and the name in brackets as its token.
    """
    from ehrseq.tasks.registry import list_tasks

    root = _dataset(dataset_path) / "labels"
    rank = {name: place for place, name in enumerate(list_tasks(retrospective=None))}
    tasks = []
    for folder in sorted(_label_folders(root), key=lambda folder: (rank.get(folder.name, len(rank)), folder.name)):
        report, name = folder / "report.json", folder.name
        known = json.loads(report.read_text(encoding="utf-8")).get("task", {}) if report.is_file() else {}
        unknown = {"definition": "labels of the dataset", "positive_label": name}
        tasks.append({"name": name, "token": f"[{name.upper()}]", **(known or unknown)})
    return tasks


def end_of_labels(dataset_path: str | Path) -> str:
    """Where follow-up ended for the labels of a dataset, ISO 8601, as the reports beside them say.

    Raises:
        ValueError: No report says it, or they say different things.
    """
    root = _dataset(dataset_path) / "labels"
    reports = [folder / "report.json" for folder in _label_folders(root)]
    known = {json.loads(file.read_text(encoding="utf-8")).get("end_of_data") for file in reports if file.is_file()}
    ends = sorted(end for end in known if isinstance(end, str))
    if len(ends) != 1:
        found = f"say {ends}" if ends else "do not say where follow-up ended"
        raise ValueError(
            f"the labels of {root} {found}; expected one end of the data. Give it as ISO 8601 text (follow_up: "
            "2024-12-31), or make the labels again: `ehrseq label --end-of-data`."
        )
    return ends[0]


def label_tokens(dataset_path: str | Path) -> dict[str, str]:
    """Task -> token of every task that a dataset has labels of, in the order of `labelled_tasks`."""
    return {task["name"]: task["token"] for task in labelled_tasks(dataset_path)}


def _label_folders(root: Path) -> list[Path]:
    return [
        folder
        for folder in (sorted(root.iterdir()) if root.is_dir() else [])
        if folder.is_dir() and not folder.name.startswith(".") and next(folder.rglob("*.parquet"), None) is not None
    ]


def _dataset(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected a dataset (data/, metadata/).")
    return folder


def read_label_table(path: str | Path) -> pl.DataFrame:
    """The labels of one task: a Parquet file, or every Parquet file below a folder.

    Raises:
        ValueError: No such file, one that is no label table, a null in one of its columns.
    """
    frames = []
    path = Path(path)
    files = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{path} holds no label table (.parquet); expected {list(LABEL_SCHEMA)}.")
    for file in files:
        check_parquet(file)
        try:
            frame = pl.read_parquet(file)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise ValueError(f"{file} cannot be read as Parquet: {error}") from error
        frames.append(validate_labels(frame, source=str(file)))
    return pl.concat(frames).sort("subject_id", "prediction_time", maintain_order=True)


def _report(result: LabelResult, name: str) -> dict[str, Any]:
    task, labels = result.tasks[name], result.labels[name]
    return {
        "rules": LABEL_RULES,
        "task": task.to_config(),
        "retrospective": task.retrospective,
        "end_of_data": result.end_of_data.isoformat(),
        "candidates": result.candidates[name],
        "labels": labels.height,
        "positives": int(labels["boolean_value"].sum()),
        "dropped": result.report[name],
        "competing": result.competing[name],
    }

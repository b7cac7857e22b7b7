"""The labels that a dataset or a file holds, with the task that each answers, where it is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import polars as pl

from ehrseq.data.metadata import read_json
from ehrseq.tasks.registry import list_tasks, load_task
from ehrseq.tasks.schema import Task
from ehrseq.tasks.storage import read_label_table, warn_of_old_rules
from ehrseq.tasks.timeline import as_instant


@dataclass(frozen=True)
class AuditedTask:
    """Labels of one task.

    Attributes:
        name: The task, as its folder is called.
        labels: subject_id, prediction_time, boolean_value.
        definition: The task itself, None where it is not known.
        unknown: Why it is not known, empty where it is.
        end_of_data: Where follow-up ended, as the report beside the labels says; None without one.
    """

    name: str
    labels: pl.DataFrame
    definition: Task | None
    unknown: str
    end_of_data: datetime | None


def read_audited(path: str | Path, definitions: Sequence[str | Path | Task] = ()) -> list[AuditedTask]:
    """Read every label table below a path.

    Args:
        path: A dataset (with `labels/`), a folder with one folder a task, the folder of one task, or a Parquet file
            (then named after the task, or `labels.parquet` in a folder that is).
        definitions: Tasks whose definition is not among the packaged ones: names, files or tasks.

    Raises:
        ValueError: Nothing to read, a table that is no label table, a definition without labels.
    """
    by_name = {task.name: task for task in (d if isinstance(d, Task) else load_task(d) for d in definitions)}
    places = _places(Path(path))
    without = [name for name in by_name if name not in places]
    if without:
        raise ValueError(f"{path} has no labels of the task(s) {without}; it has {sorted(places)}.")
    return [_read(name, place, by_name) for name, place in sorted(places.items())]


def _places(path: Path) -> dict[str, Path]:
    """Task -> where its labels lie."""
    if path.suffix == ".parquet":
        if not path.is_file():
            raise ValueError(f"{path} does not exist; give a folder of labels, or a label table.")
        return {(path.parent.name if path.stem == "labels" else path.stem): path}
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; give a dataset, its labels/ folder, or a label table (.parquet).")
    root = path / "labels" if (path / "labels").is_dir() else path
    if any(root.glob("*.parquet")):
        return {root.name: root}
    folders = {
        folder.name: folder
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".") and next(folder.rglob("*.parquet"), None) is not None
    }
    if not folders:
        raise ValueError(f"{root} holds no labels; write them with `ehrseq label`, or write_labels(...).")
    return folders


def _read(name: str, place: Path, by_name: dict[str, Task]) -> AuditedTask:
    labels = read_label_table(place)
    file = (place if place.is_dir() else place.parent) / "report.json"
    report = read_json(file) if file.is_file() else {}
    stored = report.get("task") if isinstance(report.get("task"), dict) else {}
    warn_of_old_rules(name, report)
    end = report.get("end_of_data")
    end_of_data = as_instant(end) if isinstance(end, str) else None
    if name in by_name:
        return AuditedTask(name, labels, by_name[name], "", end_of_data)
    if name not in list_tasks(retrospective=None, paper=None):
        return AuditedTask(name, labels, None, "no packaged task has this name; give its file", end_of_data)
    task = load_task(name)
    if stored and stored.get("definition") != task.definition:
        why = "the labels were made by another definition than the packaged task's; give its file"
        return AuditedTask(name, labels, None, why, end_of_data)
    return AuditedTask(name, labels, task, "", end_of_data)

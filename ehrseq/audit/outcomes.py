"""Labels held against the events that they are about: the outcome at or before the prediction, predictions for the
dead, prediction times that are no moments of the task, labels that the task would not give.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import TypedDict

import polars as pl

from ehrseq.tasks.deaths import ends_in_death
from ehrseq.tasks.labelling import judge
from ehrseq.tasks.schema import Task
from ehrseq.tasks.timeline import read_timeline

_KNOWN_BEFORE = ("earlier_code", "earlier_value")
"""Reasons of the labelling engine that say that the outcome was recorded by the time of the prediction."""


class RowFinding(TypedDict):
    """Label rows of one task with the same fault: how many, how many of them positive, and the first as an example."""

    kind: str
    task: str
    item: str
    count: int
    positives: int
    subject_id: int
    prediction_time: str
    text: str


def merged(findings: Iterable[RowFinding]) -> list[RowFinding]:
    """One finding for each kind, task and item, in the order of the first ones."""
    whole: dict[tuple[str, str, str], RowFinding] = {}
    for one in findings:
        key = (one["kind"], one["task"], one["item"])
        if key in whole:
            whole[key]["count"] += one["count"]
            whole[key]["positives"] += one["positives"]
        else:
            whole[key] = one.copy()
    return list(whole.values())


def outcome_findings(
    events: pl.DataFrame,
    rows: pl.DataFrame,
    names: list[str],
    definitions: Mapping[int, tuple[Task, datetime]],
    kinds: pl.DataFrame,
    code_map: tuple[tuple[str, ...], ...] | None,
    timezone: str | None = None,
) -> Iterator[RowFinding]:
    """Findings of one block of patients.

    Args:
        events: Rows of the event table.
        rows: Labels of these patients (`ROW_SCHEMA`).
        names: Name of each task number.
        definitions: Task number -> its definition and the end of its data, where known.
        kinds: code, kind.
        code_map: As of `label_events`.
        timezone: Zone of patients whose rows name none.
    """
    yield from _after_death(events, rows, names, set(definitions), kinds)
    for end in sorted({end for _, end in definitions.values()}):
        numbers = {number: task for number, (task, until) in definitions.items() if until == end}
        timeline = read_timeline(
            events,
            list(numbers.values()),
            end_of_data=end,
            code_map=code_map,
            default_timezone=timezone,
            is_part=True,
        )
        for number, task in numbers.items():
            labelled = rows.filter(pl.col("task") == number)
            judged = (
                judge(timeline, task)
                .filter(pl.col("prediction_time").is_not_null())
                .select("subject_id", "prediction_time", pl.col("label").alias("expected"), "dropped")
                .sort("dropped", nulls_last=False)
                .unique(["subject_id", "prediction_time"], keep="first", maintain_order=True)
            )
            held = labelled.join(judged, on=["subject_id", "prediction_time"], how="left")
            yield from _held(held, names[number], task)


def _held(held: pl.DataFrame, name: str, task: Task) -> Iterator[RowFinding]:
    """What is wrong with labels beside what the task says of their moments."""
    dropped, unknown = pl.col("dropped"), pl.col("expected").is_null()
    excluded = sorted(held["dropped"].drop_nulls().unique().to_list())
    cases: list[tuple[str, str, pl.Expr, str]] = [
        (
            "label_dependent_window",
            "moment",
            unknown,
            f"the task is asked {task.offset} after each {task.anchor}; at this time there is none",
        )
    ]
    for reason in excluded:
        kind = "label_differs"
        if reason in _KNOWN_BEFORE:
            kind = "outcome_at_prediction"
        elif reason == "died_before_prediction":
            kind = "prediction_after_death"
        cases.append((kind, reason, dropped == reason, f"the task gives this moment no label: {reason}"))
    for value, other in ((True, False), (False, True)):
        wrong = ~unknown & dropped.is_null() & (pl.col("label") == value) & (pl.col("expected") == other)
        cases.append(("label_differs", str(value).lower(), wrong, f"the task's label is {str(other).lower()}"))
    for kind, item, condition, text in cases:
        yield from _finding(held.filter(condition), kind, name, item, text)


def _after_death(
    events: pl.DataFrame, rows: pl.DataFrame, names: list[str], known: set[int], kinds: pl.DataFrame
) -> Iterator[RowFinding]:
    """Rows of tasks of unknown definition whose patient is dead; a recorded death wins over a discharge's word."""
    marked = kinds.with_columns(ends_in_death().alias("expired")).filter(pl.col("kind").eq("death") | pl.col("expired"))
    deaths = (
        events.filter(pl.col("time").is_not_null())
        .join(marked.select("code", "expired"), on="code")
        .group_by("subject_id")
        .agg(
            pl.col("time").filter(~pl.col("expired")).min().alias("recorded"),
            pl.col("time").filter("expired").min().alias("disposed"),
        )
        .select("subject_id", pl.coalesce("recorded", "disposed").alias("death"))
    )
    late = rows.join(deaths, on="subject_id").filter(pl.col("death") <= pl.col("prediction_time"))
    for number in late["task"].unique().sort().to_list():
        if number not in known:
            of_task = late.filter(pl.col("task") == number)
            text = f"died at {of_task['death'][0]}"
            yield from _finding(of_task, "prediction_after_death", names[number], "died", text)


def _finding(rows: pl.DataFrame, kind: str, name: str, item: str, text: str) -> Iterator[RowFinding]:
    if rows.is_empty():
        return
    first = rows.row(0, named=True)
    yield {
        "kind": kind,
        "task": name,
        "item": item,
        "count": rows.height,
        "positives": int(rows["label"].sum()),
        "subject_id": first["subject_id"],
        "prediction_time": str(first["prediction_time"]),
        "text": f"label {str(first['label']).lower()}; {text}",
    }

"""Why tasks do not apply to patients at times, of whole tables: what `reasons_against` says of one patient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import polars as pl

from ehrseq.batches.requests import TaskConfigs
from ehrseq.data.schema import LABEL_KEYS
from ehrseq.tokenization.ehr_anchors import REASONS_AGAINST, UNANSWERABLE, matters, reasons_against
from ehrseq.tokenization.ehr_sequence import Event


def with_reasons(
    events: pl.DataFrame,
    moments: pl.DataFrame,
    tasks: TaskConfigs,
    kind_of: Callable[[str], tuple[str, str | None]],
) -> pl.DataFrame:
    """Moments with their reason: why the task does not apply then, null where it does.

    Args:
        events: Event table of whole patients.
        moments: subject_id, prediction_time, task.
        tasks: The tasks.
        kind_of: Kind and encounter class of a code, as the checkpoint reads it.
    """
    codes = [code for code in events["code"].unique().to_list() if matters(code, kind_of, tasks.values())]
    rows = events.filter(pl.col("code").is_in(codes)).select(
        "subject_id", pl.col("time").to_physical(), "code", "text_value", "visit_id"
    )
    of_subject: dict[int, list[Event]] = {}
    for subject, time, code, text, visit_id in rows.iter_rows():
        of_subject.setdefault(subject, []).append(Event(time, code, text=text, visit_id=visit_id))
    reasons: list[str | None] = [None] * moments.height
    by_time = moments.with_row_index("place").group_by(*LABEL_KEYS, maintain_order=True).agg("place", "task")
    for subject, at, places, names in by_time.with_columns(pl.col("prediction_time").to_physical()).iter_rows():
        against = reasons_against(of_subject.get(subject, []), kind_of, [tasks[name] for name in names], at)
        for place, reason in zip(places, against, strict=True):
            reasons[place] = reason
    return moments.with_columns(reason=pl.Series(reasons, dtype=pl.String))


def leaves_nothing_to_foretell() -> pl.Expr:
    """Whether the column `reason` holds one with which there is no score."""
    return pl.col("reason").is_in(list(UNANSWERABLE)).fill_null(value=False)


def count_reasons(table: pl.DataFrame, notes: Counter[str]) -> None:
    """Count the rows of a table by what its column `reason` says."""
    for reason, words in REASONS_AGAINST.items():
        kind = "risks not given" if reason in UNANSWERABLE else "risks outside their task"
        notes[f"{kind}: {words}"] = int((table["reason"] == reason).sum())

"""One engine for every task: admissions in, labels and the reasons of what has no label out.

Each admission is a candidate of each task. It is dropped for the first reason that holds, in the order of `REASONS`, or
labelled; `candidates == labels + sum(dropped)` always. An interval is open at the prediction time and closed at the
horizon's end: what happens at the prediction time is known, what happens at exactly the horizon counts.

Follow-up ends at death or at `end_of_data`. A patient's own last event ends nothing: patients who stay away are
observed to stay away. A row whose horizon passes `end_of_data` is dropped whichever way it would turn out: to keep
what has been seen to be positive would make the last year all positive. Only a death within the horizon leaves nothing
to be seen behind it, so that such a row is kept. The rows of the last horizon are therefore those of the dead alone,
and `ehrseq stats` tells no prevalence of them.

A death known to the month or year gives a label only where every day of it gives the same.

Died in hospital means: the death stands at or before the discharge, or a discharge disposition of the stay says
"expired". The disposition wins over the clock, because a death known to the day only stands at the day's end, after the
discharge that it caused, and because some sources date such discharges at midnight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path

import polars as pl

from ehrseq.data.schema import LABEL_SCHEMA
from ehrseq.data.unread_codes import UNREAD_DEATHS, count_codes, warn_of_unread_deaths, warn_without_admissions
from ehrseq.tasks.admissions import CLOSED, END_UNKNOWN, IN_PROGRESS
from ehrseq.tasks.measures import value_columns
from ehrseq.tasks.registry import load_task
from ehrseq.tasks.schema import Task
from ehrseq.tasks.timeline import Timeline, read_timeline
from ehrseq.tokenization.ehr_codes import YEAR_US
from ehrseq.work.progress import progress_bar

logger = logging.getLogger(__name__)

_STAYS = {"admission": "admissions", "icu": "stays in intensive care", "visit": "visits"}

REASONS: dict[str, str] = {
    "other_admission": "the task takes one admission of a patient, and this is another",
    "admitted_after_death": "the admission starts on a day after the recorded death",
    "died_before_prediction": "the patient died at or before the prediction time (discharge: the stay ended in death)",
    "no_discharge": "the admission is still open, or nobody knows when it ended",
    "stay_ended": "the stay ended at or before the prediction time",
    "outside_age": "the patient is younger or older than the task asks, or the birth is unknown",
    "earlier_code": "a code of the outcome was recorded at or before the prediction time",
    "earlier_value": "a value of the outcome was measured in the stay, at or before the prediction time",
    "no_baseline": "no value is known that a change could be counted from",
    "follow_up_ends": "the horizon (or the prediction time itself) lies after the end of the data",
    "death_time_unknown": "the patient died, nobody knows when, and the label depends on it",
    "outcome_pending": "an admission within the horizon is still open: its codes are unknown",
    "not_measured": "nothing is measured within the horizon, so that the outcome cannot be known",
}
"""Why an admission has no label, in the order in which the reasons are tried."""


@dataclass(frozen=True)
class LabelResult:
    """Labels of several tasks.

    Attributes:
        labels: task -> DataFrame (subject_id Int64, prediction_time Datetime("us"), boolean_value Boolean), sorted.
        report: task -> reason (see `REASONS`) -> dropped admissions; every reason that the task knows, zeros included.
        candidates: task -> admissions looked at.
        competing: task -> competing event -> labels that are 0 because of it.
        notes: Counts of the table itself: encounters, admissions, open and unpaired ones, and patients without a death
            who have a code that looks like one.
        end_of_data: Where follow-up ended.
        tasks: The tasks, by name.
    """

    labels: dict[str, pl.DataFrame]
    report: dict[str, dict[str, int]]
    candidates: dict[str, int]
    competing: dict[str, dict[str, int]]
    notes: dict[str, int]
    end_of_data: datetime
    tasks: dict[str, Task] = field(repr=False)

    def summary(self) -> pl.DataFrame:
        """One row per task, as a readable table.

        Returns:
            task, patients, candidates, labels, positives, prevalence (null without labels), then a column
            `dropped:<reason>` and `competing:<event>` for each that any of the tasks knows, null where a task does not.
        """
        reasons = [reason for reason in REASONS if any(reason in report for report in self.report.values())]
        events = sorted({event for counts in self.competing.values() for event in counts})
        rows = []
        for name, labels in self.labels.items():
            positives = int(labels["boolean_value"].sum())
            rows.append(
                {
                    "task": name,
                    "patients": labels["subject_id"].n_unique(),
                    "candidates": self.candidates[name],
                    "labels": labels.height,
                    "positives": positives,
                    "prevalence": positives / labels.height if labels.height else None,
                    **{f"dropped:{reason}": self.report[name].get(reason) for reason in reasons},
                    **{f"competing:{event}": self.competing[name].get(event) for event in events},
                }
            )
        counts = ["patients", "candidates", "labels", "positives"]
        schema: dict[str, pl.DataType] = {
            "task": pl.String(),
            **{name: pl.Int64() for name in counts},
            "prevalence": pl.Float64(),
            **{f"dropped:{reason}": pl.Int64() for reason in reasons},
            **{f"competing:{event}": pl.Int64() for event in events},
        }
        return pl.DataFrame(rows, schema=schema)

    def __str__(self) -> str:
        """The summary as text, one block per task, zeros left out."""
        lines = [f"labels up to {self.end_of_data}"]
        for row in self.summary().iter_rows(named=True):
            share = "-" if row["prevalence"] is None else f"{row['prevalence']:.1%}"
            lines.append(
                f"{row['task']}: {row['labels']} labels of {row['patients']} patients, {row['positives']} positive "
                f"({share}), out of {row['candidates']} {_STAYS[self.tasks[row['task']].stays]}"
            )
            lines += [
                f"  {key.replace(':', ' ')}: {count}"
                for key, count in row.items()
                if ":" in key and count is not None and count > 0
            ]
        lines += [f"{note}: {count}" for note, count in self.notes.items() if note.startswith(UNREAD_DEATHS)]
        return "\n".join(lines)


def label_events(
    events: pl.DataFrame | pl.LazyFrame,
    tasks: Sequence[str | Path | Task] | str | Path | Task,
    *,
    end_of_data: datetime | date | str | None = None,
    code_map: Sequence[Sequence[str]] | None = None,
    timezone: str | None = None,
    default_timezone: str | None = None,
    is_part: bool = False,
    progress: bool = True,
) -> LabelResult:
    """Label every admission for every task.

    Args:
        events: MEDS events (subject_id, time, code; visit_id where known), in any order; a LazyFrame is read without
            being held in memory.
        tasks: `Task`s, names of packaged tasks or paths of task files; one or several.
        end_of_data: Last moment that the data cover, the extraction: a datetime (UTC where it has no zone), a date (its
            last instant) or ISO 8601 text. Later events are left out. Default: the table's last event, with a warning.
        code_map: [regular expression, kind] pairs that tell visits and deaths, default that of the tokenizer.
        timezone: Zone of the hospital, whose days tell a transfer from a readmission: a name of the IANA database or an
            offset (`-07:00`). Default: what the rows `TIMEZONE//<zone>` say, else the days of the times as they stand.
        default_timezone: Zone of patients whose rows name none, where `timezone` is not given.
        is_part: The events are those of some patients of a dataset: what is wrong with it as a whole is for others to
            say.
        progress: Show a bar over the tasks where it takes longer than a second.

    Returns:
        Labels, and the counts of what has none.

    Raises:
        ValueError: An unknown task, a task named twice, columns missing or of another type, rows without subject_id, no
            timed row at all, an unreadable `end_of_data` or `code_map`, an unknown zone.
    """
    chosen = resolve_tasks(tasks)
    timeline = read_timeline(
        events,
        list(chosen.values()),
        end_of_data=end_of_data,
        code_map=code_map,
        timezone=timezone,
        default_timezone=default_timezone,
        is_part=is_part,
    )
    result = LabelResult({}, {}, {}, {}, timeline.notes, timeline.end_of_data, chosen)
    bar = progress_bar(chosen.values(), desc="Labelling", unit="task", delay=1.0, disable=not progress)
    for task in bar:
        judged = judge(timeline, task)
        kept = judged.filter(pl.col("dropped").is_null())
        result.labels[task.name] = kept.select(
            "subject_id", "prediction_time", pl.col("label").alias("boolean_value")
        ).cast(pl.Schema(LABEL_SCHEMA))
        result.candidates[task.name] = judged.height
        dropped = dict(judged["dropped"].drop_nulls().value_counts().iter_rows())
        result.report[task.name] = {reason: int(dropped.get(reason, 0)) for reason in reasons_of(task)}
        result.competing[task.name] = {event: int(kept[f"competing:{event}"].sum()) for event in task.competing}
    if not is_part:
        if timeline.admissions.is_empty():
            warn_without_admissions(count_codes(events.lazy()), code_map, has_been_read=True)
        warn_of_unread_deaths(result.notes)
        warn_of_tasks_without_labels(result)
    return result


def warn_of_tasks_without_labels(result: LabelResult) -> None:
    """Log which tasks have candidates and no label, and why: an empty table is no quiet success."""
    for name, labels in result.labels.items():
        if labels.is_empty() and result.candidates[name]:
            why = ", ".join(f"{reason} {count:,}" for reason, count in result.report[name].items() if count)
            logger.warning(f"{name}: no label out of {result.candidates[name]:,} candidates ({why}).")


def reasons_of(task: Task) -> list[str]:
    """Reasons that can drop a label of this task, in the order in which they are tried."""
    known = {
        "other_admission": task.admissions != "every",
        "admitted_after_death": True,
        "died_before_prediction": "dead" in task.exclude,
        "no_discharge": task.side == "end" or _needs_end(task),
        "stay_ended": "stay_ended" in task.exclude,
        "outside_age": task.ages != (None, None),
        "earlier_code": "earlier_code" in task.exclude,
        "earlier_value": "earlier_value" in task.exclude,
        "no_baseline": any(rule.since == "prediction" for rule in task.rules),
        "follow_up_ends": True,
        "death_time_unknown": True,
        "outcome_pending": task.outcome == "code_at_admission",
        "not_measured": task.outcome == "value" and task.unmeasured == "drop",
    }
    return [reason for reason in REASONS if known[reason]]


def judge(timeline: Timeline, task: Task) -> pl.DataFrame:
    """Every stay (see `ANCHORS`) with its fate under a task.

    Returns:
        One row per stay, sorted: subject_id, admission, prediction_time, label, dropped (a reason or null), and a
        boolean `competing:<event>` for each competing event of the task.
    """
    table = timeline.stays[task.stays]
    if task.name in timeline.first_codes:
        table = table.join(timeline.first_codes[task.name], on="subject_id", how="left", maintain_order="left")
    table = table.join(timeline.births, on="subject_id", how="left", maintain_order="left")
    judged = _fates(table, timeline, task)

    # Who died in a month or a year has a label where the end of its first day gives the same as that of its last.
    is_vague = pl.col("death").ne_missing(pl.col("death_first"))
    vague = table.filter(is_vague.any().over("subject_id"))
    if vague.height:
        first = vague.with_columns(pl.col("death_first").alias("death"), pl.col("death_first_day").alias("death_day"))
        other = _fates(first, timeline, task).select(
            "admission",
            pl.col("label").alias("other_label"),
            pl.col("dropped").alias("other"),
            pl.lit(True).alias("vague"),
        )
        judged = judged.join(other, on="admission", how="left", maintain_order="left")
        differ = pl.col("label").ne_missing(pl.col("other_label")) | pl.col("dropped").ne_missing(pl.col("other"))
        unknown = pl.col("vague") & differ
        judged = judged.with_columns(
            pl.when(unknown).then(pl.lit("death_time_unknown")).otherwise("dropped").alias("dropped")
        ).drop("other_label", "other", "vague")
    return judged.sort("subject_id", "prediction_time", "admission", nulls_last=True)


def _fates(table: pl.DataFrame, timeline: Timeline, task: Task) -> pl.DataFrame:
    """What `judge` returns, unsorted, with each death at its one time."""
    end_of_data = pl.lit(timeline.end_of_data, dtype=pl.Datetime("us"))

    # 1. The moments. A stay ends with the discharge or the death in it; one in progress has not ended.
    status, death = pl.col("status"), pl.col("death")
    in_stay = pl.col("expired") | (
        pl.when(status == CLOSED).then(death <= pl.col("end")).when(status == IN_PROGRESS).then(death.is_not_null())
    ).fill_null(False)
    table = table.with_columns(
        in_stay.alias("died_in_stay"),
        pl.when(in_stay).then(pl.min_horizontal("end", "death")).otherwise(pl.col("end")).alias("stay_end"),
        (pl.col(task.side) + task.offset).alias("prediction_time"),
    ).with_columns(
        (
            pl.col("stay_end")
            if task.to_stay_end
            else pl.col("prediction_time")
            + (task.horizon if task.horizon_from == "prediction" else task.horizon - task.offset)
        ).alias("horizon_end")
    )
    table = _with_outcome_columns(table, timeline, task, end_of_data)
    prediction, horizon_end = pl.col("prediction_time"), pl.col("horizon_end")

    # 2. The label, and the competing events of those that are 0.
    label = _outcome(task, end_of_data).fill_null(False)
    table = table.with_columns(label.alias("label")).with_columns(
        [
            (~pl.col("label") & happened.fill_null(False)).alias(f"competing:{event}")
            for event, happened in _competing(task).items()
        ]
    )

    # 3. The first reason that holds drops the row.
    dead = (death <= prediction) | (pl.col("stay_end") <= prediction) & pl.col("died_in_stay")
    if task.side == "end":
        dead = dead.fill_null(False) | pl.col("died_in_stay")
    beyond = horizon_end.is_null() if task.to_stay_end else horizon_end > end_of_data
    followed_to_death = (death > prediction) & (death <= horizon_end)
    unfinished = status == END_UNKNOWN if task.side == "start" else pl.col("end").is_null()
    last_followed = pl.col("next_start").is_not_null() & pl.col("next_start").shift(-1).over("subject_id").is_null()
    conditions = {
        "other_admission": {
            "every": pl.lit(False),
            "last": pl.col("next_start").is_not_null(),
            "last_followed": ~last_followed,
        }[task.admissions],
        "admitted_after_death": pl.col("start_day") > pl.col("death_day"),
        "died_before_prediction": dead,
        "no_discharge": unfinished,
        "stay_ended": pl.col("stay_end") <= prediction,
        "outside_age": ~_in_age(task),
        "earlier_code": pl.col("first_code") <= prediction,
        "earlier_value": pl.col("value_earlier"),
        "no_baseline": ~pl.col("value_baseline"),
        # A task without censoring still cannot tell the length of a stay that has not ended.
        "follow_up_ends": (prediction > end_of_data)
        | beyond
        & ~followed_to_death.fill_null(False)
        & (pl.lit(task.censoring) | pl.lit(_needs_end(task)) & pl.col("stay_end").is_null()),
        "death_time_unknown": pl.col("death_untimed") & pl.lit(task.outcome in ("death", "death_in_stay")),
        "outcome_pending": (pl.col("in_progress_start") > prediction) & (pl.col("in_progress_start") <= horizon_end),
        # Whoever died, or was seen to have the outcome, needs no measurement.
        "not_measured": ~pl.col("label")
        & ~pl.col("value_measured")
        & ~pl.any_horizontal(pl.lit(False), *(f"competing:{event}" for event in task.competing)),
    }
    dropped = pl.coalesce(
        pl.when(conditions[reason].fill_null(False)).then(pl.lit(reason)) for reason in reasons_of(task)
    )
    table = table.with_columns(dropped.alias("dropped"))
    return table.select(
        "subject_id",
        "admission",
        "prediction_time",
        "label",
        "dropped",
        *(f"competing:{event}" for event in task.competing),
    )


def _needs_end(task: Task) -> bool:
    """Whether the outcome cannot be told of a stay whose end was never recorded."""
    return task.outcome in ("length_of_stay", "death_in_stay") or task.to_stay_end


def _in_age(task: Task) -> pl.Expr:
    """Whether the age at the prediction time lies within the task's; unknown: no."""
    age = (pl.col("prediction_time") - pl.col("birth")).dt.total_microseconds() / YEAR_US
    low, high = task.ages
    within = age.is_not_null()
    if low is not None:
        within &= age >= low
    if high is not None:
        within &= age < high
    return within.fill_null(False)


def _with_outcome_columns(table: pl.DataFrame, timeline: Timeline, task: Task, end_of_data: pl.Expr) -> pl.DataFrame:
    """Adds what the outcome is told from beside the stay itself: `following` (start of the next stay of the kind that
    it looks for), `value_hit`, `value_earlier`, `value_measured`, `value_baseline`.
    """
    if task.outcome == "value":
        return table.with_columns(**value_columns(table, timeline.values[task.name], task.rules, end_of_data))
    wanted = {"admission": "admission", "icu_admission": "icu"}.get(task.outcome)
    if wanted is None:
        return table
    if wanted == task.stays:
        return table.with_columns(pl.col("next_start").alias("following"))
    starts = timeline.stays[wanted].select("subject_id", pl.col("start").alias("following")).sort("following")
    return (
        table.sort("prediction_time", nulls_last=True)
        .join_asof(
            starts,
            left_on="prediction_time",
            right_on="following",
            by="subject_id",
            strategy="forward",
            allow_exact_matches=False,
            coalesce=False,
            check_sortedness=False,
        )
        .sort("subject_id", "start")
    )


def _outcome(task: Task, end_of_data: pl.Expr) -> pl.Expr:
    """Whether the outcome happens; null counts as no."""
    prediction, horizon_end = pl.col("prediction_time"), pl.col("horizon_end")
    match task.outcome:
        case "death":
            # Deaths before the prediction time are positives only for tasks that do not exclude the dead.
            return pl.col("death") <= horizon_end
        case "death_in_stay":
            return pl.col("died_in_stay") & (pl.col("stay_end") <= horizon_end)
        case "admission" | "icu_admission":
            return (pl.col("following") > prediction) & (pl.col("following") <= horizon_end)
        case "first_code":
            # Without an end the stay goes on, up to the end of the data.
            return (pl.col("first_code") > prediction) & (pl.col("first_code") <= pl.coalesce(horizon_end, end_of_data))
        case "value":
            return pl.col("value_hit")
        case "length_of_stay":
            # Without an end the stay goes on at the end of the data; it was long if the horizon lies before that.
            return (pl.col("stay_end") > horizon_end) | (pl.col("stay_end").is_null() & (horizon_end <= end_of_data))
        case "code_at_admission":
            return (pl.col("first_code_start") > prediction) & (pl.col("first_code_start") <= horizon_end)
        case _:
            return pl.col("first_code").is_not_null()


def _competing(task: Task) -> dict[str, pl.Expr]:
    """Events that make the outcome impossible, each true where it happened within the horizon."""
    prediction, horizon_end = pl.col("prediction_time"), pl.col("horizon_end")
    death = (pl.col("death") > prediction) & (pl.col("death") <= horizon_end)
    if task.outcome == "length_of_stay" or task.to_stay_end:
        death = pl.col("died_in_stay") & (pl.col("stay_end") <= horizon_end)
    happened = {"death": death}
    if task.outcome == "code_at_admission":
        elsewhere = pl.col("first_code_start").is_null() | (pl.col("first_code_start") <= prediction)
        happened["code_elsewhere"] = (
            (pl.col("first_code") > prediction) & (pl.col("first_code") <= horizon_end) & elsewhere
        )
    return {event: happened[event] for event in task.competing}


def resolve_tasks(tasks: Sequence[str | Path | Task] | str | Path | Task) -> dict[str, Task]:
    """Tasks by name."""
    several: Iterable[str | Path | Task] = [tasks] if isinstance(tasks, (str, Path, Task)) else tasks
    if isinstance(several, Mapping) or not isinstance(several, Iterable):
        raise ValueError(f"tasks is a {type(tasks).__name__}; expected a list of names, Task objects or .yaml paths.")
    chosen: dict[str, Task] = {}
    for entry in several:
        task = entry if isinstance(entry, Task) else load_task(entry)
        if task.name in chosen:
            raise ValueError(f"The task {task.name!r} was given twice; give each task once.")
        chosen[task.name] = task
    if not chosen:
        raise ValueError("tasks is empty; give at least one name, Task object or .yaml path, for example list_tasks().")
    return chosen

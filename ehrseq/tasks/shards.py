"""Labels of a prepared dataset of any size, file by file: equal row for row to `label_events` on the whole table.

The labels of a patient depend on the rows of this patient and on where follow-up ends, which is one moment for the
whole dataset: it is found first (given, or the last event of all), then every file is labelled by itself, in blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import TypedDict

import polars as pl

from ehrseq.data.instants import check_zone
from ehrseq.data.meds import read_parquet
from ehrseq.data.metadata import read_notes, read_settings, written_by_us
from ehrseq.data.schema import LABEL_SCHEMA
from ehrseq.data.shards import BLOCK_ROWS, Shard, ShardPart, dataset_shards, latest_time, read_blocks, scan_shard
from ehrseq.data.unread_codes import count_codes, unread_deaths, warn_of_unread_deaths, warn_without_admissions
from ehrseq.tasks.labelling import LabelResult, label_events, resolve_tasks, warn_of_tasks_without_labels
from ehrseq.tasks.schema import Task
from ehrseq.tasks.storage import LABEL_RULES, write_labels
from ehrseq.tasks.timeline import as_instant
from ehrseq.work.engine import Engine
from ehrseq.work.files import write_whole
from ehrseq.work.parts import kept_parts, run_parts

logger = logging.getLogger(__name__)

_LATE = "events_after_end_of_data"


class LabelCounts(TypedDict):
    """What `LabelResult` counts, of one file."""

    notes: dict[str, int]
    candidates: dict[str, int]
    report: dict[str, dict[str, int]]
    competing: dict[str, dict[str, int]]


@dataclass(frozen=True)
class LabelPart(ShardPart[LabelCounts]):
    """Labels of one file, those of all tasks in one table.

    Attributes:
        tasks: Every task.
        end_of_data: Where follow-up ends.
        code_map: See `label_events`.
        timezone: See `label_events`.
        default_timezone: Zone of patients whose rows name none, where `timezone` is not given.
    """

    tasks: tuple[Task, ...]
    end_of_data: datetime
    code_map: tuple[tuple[str, ...], ...] | None
    timezone: str | None
    default_timezone: str | None

    def make(self) -> LabelCounts:
        """See `RecordedPart.make`."""
        result = _empty_result({task.name: task for task in self.tasks}, self.end_of_data)
        frames = [pl.DataFrame(schema={"task": pl.String, **LABEL_SCHEMA})]
        values = ("numeric_value", "unit") if any(task.measures for task in self.tasks) else ()
        columns = ("subject_id", "time", "code", *values[:1], "text_value", "visit_id", *values[1:])
        for block in read_blocks(self.shard, rows=BLOCK_ROWS, columns=columns):
            labelled = label_events(
                block,
                self.tasks,
                end_of_data=self.end_of_data,
                code_map=self.code_map,
                timezone=self.timezone,
                default_timezone=self.default_timezone,
                is_part=True,
                progress=False,
            )
            _add_counts(result, _counts(labelled))
            frames += [
                labels.select(pl.lit(name).alias("task"), *LABEL_SCHEMA) for name, labels in labelled.labels.items()
            ]
        write_whole(self.beside(".parquet"), pl.concat(frames).write_parquet)
        return _counts(result)


def label_dataset(
    dataset: str | Path,
    tasks: Sequence[str | Path | Task] | str | Path | Task,
    *,
    end_of_data: datetime | date | str | None = None,
    code_map: Sequence[Sequence[str]] | None = None,
    timezone: str | None = None,
    engine: Engine | None = None,
) -> LabelResult:
    """Label every admission of a prepared dataset for every task, and write the labels as `write_labels` does.

    A run that was stopped goes on where it was: finished files are kept below `labels/` until the labels are written,
    and each is used again only where file, tasks and the end of the data are the same.

    Args:
        dataset: Folder of a prepared dataset.
        tasks: As of `label_events`.
        end_of_data: As of `label_events`; default: the last event of the whole dataset, with a warning.
        code_map: As of `label_events`; default: that of the dataset's metadata before the tokenizer's.
        timezone: As of `label_events`; default: what the rows say, else `timezone` of `metadata/dataset.json`.
        engine: Where to work, default all cores of this machine.

    Returns:
        Labels and counts of all files together.

    Raises:
        ValueError: No prepared dataset, or what `label_events` refuses.
    """
    chosen = resolve_tasks(tasks)
    shards = dataset_shards(dataset)
    kept = read_settings(dataset)
    rules = kept.rules if code_map is None else tuple((pattern, kind) for pattern, kind in code_map)
    end = as_instant(end_of_data)
    if end is None:
        end = latest_time(shards)
        if end is None:
            raise ValueError(f"{dataset} holds no row with a time, so nothing can be labelled.")
        logger.warning(
            f"No end_of_data was given: follow-up is taken to end with the last event, {end}. If the data were "
            "extracted at a known date, give it: otherwise the last labels are censored at the wrong moment."
        )
    if timezone is not None:
        check_zone(timezone)
    settings = [
        LABEL_RULES,
        [{**task.to_config(), "all": repr(task)} for task in chosen.values()],
        end.isoformat(),
        rules,
        [timezone, kept.timezone],
    ]
    result = _empty_result(chosen, end)
    frames = []
    with kept_parts(Path(dataset) / "labels" / ".parts", settings) as folder:
        parts = [
            LabelPart(shard, str(folder), tuple(chosen.values()), end, rules, timezone, kept.timezone)
            for shard in shards
        ]
        reports = run_parts(parts, desc="Labelling", folder=folder, engine=engine)
        for part, counted in zip(parts, reports, strict=True):
            frames.append(pl.read_parquet(part.beside(".parquet"), hive_partitioning=False))
            _add_counts(result, counted)
        labels = pl.concat(frames)
        for name in chosen:
            # A subject's rows stand in one file, in their order.
            result.labels[name] = (
                labels.filter(pl.col("task") == name)
                .select(list(LABEL_SCHEMA))
                .sort("subject_id", "prediction_time", maintain_order=True)
            )
        late = result.notes.get(_LATE)
        if late:
            logger.warning(f"{late} events after end_of_data ({end}) are left out of the labels.")
        names = _codes(Path(dataset), shards)
        result.notes.update(unread_deaths(pl.concat(map(scan_shard, shards)), names, rules))
        write_labels(result, dataset)
    if not result.notes.get("admissions"):
        codes = count_codes(pl.concat(map(scan_shard, shards)))
        warn_without_admissions(codes, rules, notes=read_notes(dataset), source=str(dataset))
    warn_of_unread_deaths(result.notes)
    warn_of_tasks_without_labels(result)
    return result


def _codes(dataset: Path, shards: Sequence[Shard]) -> list[str]:
    """The distinct codes of a dataset: as its metadata list them where we wrote them, else counted."""
    listed = dataset / "metadata" / "codes.parquet"
    if written_by_us(dataset) and listed.is_file():
        return read_parquet(listed)["code"].to_list()
    codes = pl.concat(map(scan_shard, shards)).select(pl.col("code").cast(pl.String).unique()).collect()
    return codes["code"].to_list()


def _empty_result(tasks: dict[str, Task], end_of_data: datetime) -> LabelResult:
    return LabelResult(
        {}, {name: {} for name in tasks}, dict.fromkeys(tasks, 0), {name: {} for name in tasks}, {}, end_of_data, tasks
    )


def _counts(result: LabelResult) -> LabelCounts:
    return {
        "notes": result.notes,
        "candidates": result.candidates,
        "report": result.report,
        "competing": result.competing,
    }


def _add_counts(result: LabelResult, counts: LabelCounts) -> None:
    """Add the counts of some patients to those of others."""
    _add(result.notes, counts["notes"])
    _add(result.candidates, counts["candidates"])
    for name in result.tasks:
        _add(result.report[name], counts["report"][name])
        _add(result.competing[name], counts["competing"][name])


def _add(total: dict[str, int], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count

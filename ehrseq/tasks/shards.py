"""Labels of a prepared dataset of any size, file by file: equal row for row to `label_events` on the whole table.

The labels of a patient depend on the rows of this patient and on where follow-up ends, which is one moment for the
whole dataset: it is found first (given, or the last event of all), then every file is labelled by itself, in blocks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.data.schema import LABEL_SCHEMA
from ehrseq.data.shards import Shard, dataset_shards, latest_time, read_blocks
from ehrseq.tasks.labelling import LabelResult, label_events, resolve_tasks
from ehrseq.tasks.schema import Task
from ehrseq.tasks.storage import write_labels
from ehrseq.tasks.timeline import as_instant
from ehrseq.work.engine import Engine, get_engine
from ehrseq.work.files import file_digest, remove, remove_unfinished, write_whole

logger = logging.getLogger(__name__)

_REPORT = b"ehrseq.labels"
"""Key of the counts in the metadata of a part's Parquet file."""
_COUNTS = ("notes", "candidates", "report", "competing")
_LATE = "events_after_end_of_data"
_BLOCK_ROWS = 2_000_000  # rows labelled at once: bounds the memory of a worker


@dataclass(frozen=True)
class LabelWork:
    """One file to label.

    Attributes:
        shard: The file.
        part: Where its labels go.
        tasks: Every task.
        end_of_data: Where follow-up ends.
        code_map: See `label_events`.
    """

    shard: Shard
    part: str
    tasks: tuple[Task, ...]
    end_of_data: datetime
    code_map: tuple[tuple[str, ...], ...] | None

    @property
    def name(self) -> str:
        """The file, in messages."""
        return self.shard.path


def label_dataset(
    dataset: str | Path,
    tasks: Sequence[str | Path | Task] | str | Path | Task,
    *,
    end_of_data: datetime | date | str | None = None,
    code_map: Sequence[Sequence[str]] | None = None,
    engine: Engine | None = None,
) -> LabelResult:
    """Label every admission of a prepared dataset for every task, and write the labels as `write_labels` does.

    A run that was stopped goes on where it was: finished files are kept below `labels/` until the labels are written,
    and each is used again only where file, tasks and the end of the data are the same.

    Args:
        dataset: Folder of a prepared dataset.
        tasks: As of `label_events`.
        end_of_data: As of `label_events`; default: the last event of the whole dataset, with a warning.
        code_map: As of `label_events`.
        engine: Where to work, default all cores of this machine.

    Returns:
        Labels and counts of all files together.

    Raises:
        ValueError: No prepared dataset, or what `label_events` refuses.
    """
    chosen = resolve_tasks(tasks)
    rules = None if code_map is None else tuple(tuple(pair) for pair in code_map)
    shards = dataset_shards(dataset)
    end = as_instant(end_of_data)
    if end is None:
        end = latest_time(shards)
        if end is None:
            raise ValueError(f"{dataset} holds no row with a time, so nothing can be labelled.")
        logger.warning(
            f"No end_of_data was given: follow-up is taken to end with the last event, {end}. If the data were "
            "extracted at a known date, give it: otherwise the last labels are censored at the wrong moment."
        )
    asked = [{**task.to_config(), "all": repr(task)} for task in chosen.values()]
    key = hashlib.sha256(json.dumps([asked, end.isoformat(), rules], sort_keys=True).encode()).hexdigest()[:16]
    root = Path(dataset) / "labels"
    folder = root / f".parts-{key}"
    if folder.is_dir():
        remove_unfinished(folder)
    work = [
        LabelWork(shard, str(folder / f"{shard.split}-{shard.number}.parquet"), tuple(chosen.values()), end, rules)
        for shard in shards
    ]
    result = _empty_result(chosen, end)
    frames = []
    for part in (engine or get_engine()).map(label_shard, work, desc="Labelling"):
        frame, counts = _read_part(part)
        frames.append(frame)
        _add_counts(result, counts)
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
    write_labels(result, dataset)
    remove(folder)
    return result


def label_shard(work: LabelWork) -> str:
    """Label one file, if its part is not there already; returns the part's path."""
    digest = file_digest(work.shard.path)
    part = Path(work.part)
    if part.is_file() and _read_metadata(part).get("source") == digest:
        return work.part
    result = _empty_result({task.name: task for task in work.tasks}, work.end_of_data)
    frames = [pl.DataFrame(schema={"task": pl.String(), **LABEL_SCHEMA})]
    in_time = pl.col("time").is_null() | (pl.col("time") <= work.end_of_data)
    values = ("numeric_value", "unit") if any(task.measures for task in work.tasks) else ()
    columns = ("subject_id", "time", "code", *values[:1], "visit_id", *values[1:])
    for block in read_blocks(work.shard, rows=_BLOCK_ROWS, columns=columns):
        # What comes too late is left out here and counted: the warning is for the whole dataset to give, once.
        known = block.filter(in_time)
        found = label_events(known, work.tasks, end_of_data=work.end_of_data, code_map=work.code_map, progress=False)
        found.notes[_LATE] += block.height - known.height
        _add_counts(result, {name: getattr(found, name) for name in _COUNTS})
        frames += [labels.select(pl.lit(name).alias("task"), *LABEL_SCHEMA) for name, labels in found.labels.items()]
    counts = {"source": digest, **{name: getattr(result, name) for name in _COUNTS}}
    table = pl.concat(frames)
    write_whole(part, lambda file: _write_part(table, counts, file))
    return work.part


def _write_part(table: pl.DataFrame, counts: Mapping[str, Any], file: Path) -> None:
    import pyarrow.parquet as pq

    arrow = table.to_arrow()
    pq.write_table(arrow.replace_schema_metadata({_REPORT: json.dumps(counts)}), file, compression="zstd")


def _read_part(part: str) -> tuple[pl.DataFrame, dict[str, Any]]:
    return pl.read_parquet(part, hive_partitioning=False), _read_metadata(Path(part))


def _read_metadata(part: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    return json.loads((pq.read_schema(part).metadata or {}).get(_REPORT, b"{}"))


def _empty_result(tasks: dict[str, Task], end_of_data: datetime) -> LabelResult:
    return LabelResult(
        {}, {name: {} for name in tasks}, dict.fromkeys(tasks, 0), {name: {} for name in tasks}, {}, end_of_data, tasks
    )


def _add_counts(result: LabelResult, counts: Mapping[str, Any]) -> None:
    """Add the `_COUNTS` of some patients to those of others."""
    _add(result.notes, counts["notes"])
    _add(result.candidates, counts["candidates"])
    for name in result.tasks:
        _add(result.report[name], counts["report"][name])
        _add(result.competing[name], counts["competing"][name])


def _add(total: dict[str, int], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count

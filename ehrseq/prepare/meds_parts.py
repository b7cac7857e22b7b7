"""Foreign MEDS datasets: rows of the files go to pieces by patient, and each partition becomes shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ehrseq.data.meds import collect_meds, deaths_at_the_end_of_their_day, scan_meds_file
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import EVENT_COLUMNS, EVENT_SCHEMA, sort_events, validate_events
from ehrseq.prepare.shard_files import ShardPlan, is_done, write_shards
from ehrseq.prepare.spill import partition_of_subjects, read_partition, write_piece
from ehrseq.work.files import write_json

PART_ROWS = 1_000_000
"""Rows of a file that are read at once."""


@dataclass(frozen=True)
class MedsPart:
    """Some rows of a file.

    Attributes:
        number: Number of the part.
        path: The file.
        start, rows: Which rows.
        folder: Where its piece goes.
        partitions: Number of partitions.
        skip_errors: Count a file that cannot be read and go on.
    """

    number: int
    path: str
    start: int
    rows: int
    folder: str
    partitions: int
    skip_errors: bool

    @property
    def name(self) -> str:
        """The file, in messages."""
        return self.path

    @property
    def record(self) -> Path:
        """The file that says that the part is done, and what it held."""
        return Path(self.folder) / f"{self.number}.json"


def spill_part(part: MedsPart) -> str:
    """Write one part's piece, if that is not done yet; returns the path of its record."""
    if part.record.is_file():
        return str(part.record)
    content: dict[str, object] = {"piece": "", "groups": [], "error": ""}
    try:
        path = Path(part.path)
        rows = collect_meds(scan_meds_file(path).slice(part.start, part.rows), path)
        unknown = _count_non_finite(rows)
        # Sorting is left to the partitions, which hold whole patients.
        checked = validate_events(rows, source=part.path, sort=False)
    except ValueError as error:
        if not part.skip_errors:
            raise
        content["error"] = str(error)
    else:
        piece = part.record.with_suffix(".parquet")
        partition = partition_of_subjects(checked["subject_id"].to_numpy(), part.partitions)
        content |= {"piece": piece.name, "groups": write_piece(checked.to_arrow(), partition, piece)}
        content["not_finite"] = unknown
    write_json(part.record, content)
    return str(part.record)


def _count_non_finite(rows: pl.DataFrame) -> int:
    if "numeric_value" not in rows.columns or not rows["numeric_value"].dtype.is_float():
        return 0
    return int((~rows["numeric_value"].cast(pl.Float32, strict=False).is_finite()).sum())


@dataclass(frozen=True)
class MedsPartition:
    """The patients of one partition.

    Attributes:
        number: Its number.
        spill: Folder of the pieces, with `index.json`.
        plan: How its shards are written.
        ours: Whether this package wrote the source: then deaths are where they belong.
    """

    number: int
    spill: str
    plan: ShardPlan
    ours: bool

    @property
    def name(self) -> str:
        """The partition, in messages."""
        return f"partition {self.number}"


def index_parts(spill: Path, records: Sequence[str], report: ConversionReport) -> None:
    """Read the records of all parts: fill the report, and write `index.json`."""
    pieces = []
    failed: dict[str, str] = {}
    for record in records:
        content = json.loads(Path(record).read_text(encoding="utf-8"))
        if content["error"]:
            failed.setdefault(content["error"], record)
            continue
        pieces.append([content["piece"], content["groups"]])
        if content["not_finite"]:
            report.notes["values that are NaN, infinite or beyond float32, read as missing"] += content["not_finite"]
    if failed:
        report.skipped["file that cannot be read"] += len(failed)
        report.errors += list(failed)
    write_json(spill / "index.json", pieces)


def sort_partition(task: MedsPartition) -> str:
    """Make the shards of one partition, if that is not done yet; returns the path of its record."""
    record = task.plan.record(task.number)
    if is_done(record):
        return str(record)
    spill = Path(task.spill)
    frames = [pl.DataFrame(schema=EVENT_SCHEMA)]
    for piece, groups in json.loads((spill / "index.json").read_text(encoding="utf-8")):
        table = read_partition(spill / piece, groups, task.number)
        if table is not None:
            frames.append(pl.DataFrame(table).select(EVENT_COLUMNS))
    report = ConversionReport(format="meds")
    rows = pl.concat(frames)
    del frames
    events = sort_events(rows).unique(maintain_order=True)
    report.duplicates_dropped = rows.height - events.height
    if not task.ours:
        events, moved = deaths_at_the_end_of_their_day(events)
        report.notes["deaths known to the day"] += moved
    report.notes["static rows"] += events["time"].null_count()
    write_shards(events, report, task.plan, task.number)
    return str(record)

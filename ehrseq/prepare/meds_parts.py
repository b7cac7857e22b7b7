"""Foreign MEDS datasets: rows of the files go to pieces by patient, and each partition becomes shards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import polars as pl

from ehrseq.data.meds import read_meds_rows, scan_meds_file, with_zone
from ehrseq.data.metadata import CodeMap
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import EVENT_COLUMNS, EVENT_SCHEMA, sort_events
from ehrseq.prepare.shard_files import PartitionPart, ShardReport, write_shards
from ehrseq.prepare.spill import partition_of_subjects, read_partition, write_piece
from ehrseq.work.files import write_json
from ehrseq.work.parts import RecordedPart

PART_ROWS = 1_000_000
"""Rows of a file that are read at once."""


class MedsPartReport(TypedDict):
    """What a part of the files held.

    Attributes:
        piece, groups: Its piece, and the partitions of the row groups (`write_piece`).
        notes: What was mended, counted.
        error: Why it could not be read, empty where it was.
    """

    piece: str
    groups: list[int]
    notes: dict[str, int]
    error: str


@dataclass(frozen=True)
class MedsPart(RecordedPart[MedsPartReport]):
    """Some rows of a file.

    Attributes:
        number: Number of the part.
        path: The file.
        start, rows: Which rows.
        folder: Where its piece goes.
        partitions: Number of partitions.
        skip_errors: Count a file that cannot be read and go on.
        ours: Whether this package wrote the source: then there is nothing to mend.
        code_map: As of `read_meds_rows`.
    """

    number: int
    path: str
    start: int
    rows: int
    folder: str
    partitions: int
    skip_errors: bool
    ours: bool
    code_map: CodeMap | None = None

    @property
    def name(self) -> str:
        """The file, in messages."""
        return self.path

    @property
    def record(self) -> Path:
        """See `RecordedPart.record`."""
        return Path(self.folder) / f"{self.number}.json"

    def make(self) -> MedsPartReport:
        """Write the rows, by partition."""
        try:
            path = Path(self.path)
            # Sorting is left to the partitions, which hold whole patients.
            lazy = scan_meds_file(path).slice(self.start, self.rows)
            checked, notes = read_meds_rows(lazy, path, ours=self.ours, code_map=self.code_map)
        except ValueError as error:
            if not self.skip_errors:
                raise
            return {"piece": "", "groups": [], "notes": {}, "error": str(error)}
        piece = self.beside(".parquet")
        partition = partition_of_subjects(checked["subject_id"].to_numpy(), self.partitions)
        groups = write_piece(checked.to_arrow(), partition, piece)
        return {"piece": piece.name, "groups": groups, "notes": dict(notes), "error": ""}


def meds_parts(
    files: Sequence[Path],
    folder: Path,
    *,
    shard_rows: int,
    skip_errors: bool,
    ours: bool,
    code_map: CodeMap | None = None,
) -> tuple[list[MedsPart], int]:
    """The parts of MEDS files, and the number of partitions."""
    heights = [_height(file) for file in files]
    partitions = max(1, math.ceil(sum(heights) / shard_rows))
    ranges = [
        (str(file), start)
        for file, height in zip(files, heights, strict=True)
        for start in range(0, max(height, 1), PART_ROWS)
    ]
    return [
        MedsPart(number, path, start, PART_ROWS, str(folder), partitions, skip_errors, ours, code_map)
        for number, (path, start) in enumerate(ranges)
    ], partitions


def _height(file: Path) -> int:
    """Rows of a file; 0 of one that cannot be read, which reading it then says."""
    try:
        return int(scan_meds_file(file).select(pl.len()).collect().item())
    except (ValueError, pl.exceptions.PolarsError, OSError):
        return 0


@dataclass(frozen=True)
class MedsPartition(PartitionPart):
    """The patients of one partition of MEDS files.

    Attributes:
        timezone: The hospital's zone, as of `with_zone`.
        replace_zones: Whether it was said now, and counts for everybody.
    """

    timezone: str | None = None
    replace_zones: bool = False

    def make(self) -> ShardReport:
        """Sort the rows, and write them as shards."""
        spill = Path(self.spill)
        frames = [pl.DataFrame(schema=EVENT_SCHEMA)]
        for piece, groups in json.loads((spill / "index.json").read_text(encoding="utf-8")):
            table = read_partition(spill / piece, groups, self.number)
            if table is not None:
                frames.append(pl.DataFrame(table).select(EVENT_COLUMNS))
        report = ConversionReport(format="meds")
        rows = pl.concat(frames)
        del frames
        rows = sort_events(with_zone(rows, self.timezone, report.notes, replace=self.replace_zones))
        events = rows.unique(maintain_order=True)
        report.duplicates_dropped = rows.height - events.height
        report.notes["static rows"] += events["time"].null_count()
        return write_shards(events, report, self.plan, self.number)


def index_parts(spill: Path, parts: Iterable[MedsPartReport], report: ConversionReport) -> None:
    """Fill the report from those of all parts, and write `index.json`: the pieces, and where they hold what."""
    pieces: list[tuple[str, list[int]]] = []
    errors: dict[str, None] = {}
    for part in parts:
        if part["error"]:
            errors[part["error"]] = None
            continue
        pieces.append((part["piece"], part["groups"]))
        report.notes.update(part["notes"])
    if errors:
        report.skipped["file that cannot be read"] += len(errors)
        report.errors += list(errors)
    write_json(spill / "index.json", pieces)

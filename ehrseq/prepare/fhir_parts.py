"""FHIR, first stage: a part of the files is parsed by the same readers as in memory, and its rows go to pieces on disk.

A row still holds references (keys of its patient and encounter); they are followed in the second stage, where a
patient's resources meet. Patients and medications, which any row may name, are kept beside the pieces.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from ehrseq.data.fhir.blocks import Block, ReadTask, read_task
from ehrseq.data.fhir.plan import plan_reading, size_of
from ehrseq.data.fhir.rows import TABLE_OF
from ehrseq.data.fhir.versions import version_columns
from ehrseq.data.metadata import NO_SETTINGS, DatasetSettings
from ehrseq.data.report import MAX_ERRORS
from ehrseq.prepare.spill import partition_of_keys, write_piece, write_table
from ehrseq.work.parts import RecordedPart

BYTES_PER_EVENT = 430
"""Bytes of FHIR text that become an event, at least as a rule: MIMIC-IV has 1,230, Synthea 710, our simulator 430.
Where it is less, partitions hold more rows than was asked for.
"""
PART_BYTES = 128 << 20
"""Bytes of text in a part, about."""
STRIPE_BYTES = 1 << 30
"""Bytes of text in a part of a gzip file, about: each of its parts decompresses all of it."""
_MOST_STRIPES = 8
PIECE_ROWS = 400_000
"""Rows of a piece, about: what is held before it is written."""
_VERSION = (("updated", pa.int64()), ("place", pa.int64()))
VISIT_SCHEMA = pa.schema(
    [
        ("keys", pa.list_(pa.string())),
        ("name", pa.string()),
        ("subject", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("offset", pa.int32()),
        ("part_of", pa.string()),
        *_VERSION,
    ]
)
PATIENT_SCHEMA = pa.schema(
    [("keys", pa.list_(pa.string())), ("id", pa.string()), ("links", pa.list_(pa.string())), *_VERSION]
)
MEDICATION_SCHEMA = pa.schema([("keys", pa.list_(pa.string())), ("codes", pa.list_(pa.string())), *_VERSION])
NUMBERS = {"time": np.int64, "value": np.float32, "place": np.int64, "updated": np.int64, "resource": np.int64}
"""Columns of the rows beside `TABLE_OF`."""


class FhirPartReport(TypedDict):
    """What a part of the files held.

    Attributes:
        pieces: Each piece: its two files, and the partitions of their row groups.
        tables: Which of the tables `patients`, `medications` and `shared` (encounters that name no patient) stand
            beside the record.
        counts: [table of the conversion's report, entry, number].
        errors: The first [(file, position in it), message].
        bytes_read: Bytes of text.
        identifiers: Keys of subjects that are identifiers.
        displays: Code -> display text.
        deleted: (type and id, when) of resources that the source deletes.
    """

    pieces: list[FhirPiece]
    tables: list[str]
    counts: list[tuple[str, str, int]]
    errors: list[tuple[tuple[int, int], str]]
    bytes_read: int
    identifiers: list[str]
    displays: dict[str, str]
    deleted: list[tuple[str, int]]


class FhirPiece(TypedDict):
    """Files of a piece, and the partitions of their row groups (`write_piece`)."""

    rows: str
    row_groups: list[int]
    visits: str
    visit_groups: list[int]


@dataclass(frozen=True)
class FhirPart(RecordedPart[FhirPartReport]):
    """A part of the files: some small files, or some bytes of a large one.

    Attributes:
        number: Number of the part.
        tasks: What to read, in order.
        folder: Where its pieces go.
        partitions: Number of partitions.
    """

    number: int
    tasks: tuple[ReadTask, ...]
    folder: str
    partitions: int

    @property
    def name(self) -> str:
        """The first file, in messages."""
        return self.tasks[0].path

    @property
    def record(self) -> Path:
        """See `RecordedPart.record`."""
        return Path(self.folder) / f"{self.number}.json"

    def make(self) -> FhirPartReport:
        """Parse the files."""
        spill = _Spill(self)
        for task in self.tasks:
            for block in read_task(task):
                spill.add(block)
        return spill.finish()


def fhir_parts(
    files: Sequence[Path], folder: Path, *, shard_rows: int, skip_errors: bool, settings: DatasetSettings = NO_SETTINGS
) -> tuple[list[FhirPart], int]:
    """The parts of FHIR files, and the number of partitions.

    Both follow from the source and the settings, not from the machine: the same source gives the same bytes, whatever
    the number of workers.
    """
    sizes = [size_of(file) for file in files]
    tasks = plan_reading(
        files, sizes, part_bytes=PART_BYTES, stripes_of=_stripes_of, skip_errors=skip_errors, settings=settings
    )
    partitions = max(1, math.ceil(sum(sizes) / (shard_rows * BYTES_PER_EVENT)))
    return [
        FhirPart(number, tuple(group), str(folder), partitions) for number, group in enumerate(_grouped(tasks))
    ], partitions


def _stripes_of(size: int) -> int:
    return min(_MOST_STRIPES, max(1, math.ceil(size / STRIPE_BYTES)))


def _grouped(tasks: Sequence[ReadTask]) -> list[list[ReadTask]]:
    """Neighbours together, as long as they are not more than a part."""
    groups: list[list[ReadTask]] = []
    cost = 0
    for task in tasks:
        if not groups or cost + task.cost > PART_BYTES:
            groups.append([])
            cost = 0
        groups[-1].append(task)
        cost += task.cost
    return groups


class _Spill:
    """Gathers blocks and writes pieces of them."""

    def __init__(self, part: FhirPart) -> None:
        self.part = part
        self.counts: Counter[tuple[str, str]] = Counter()
        self.errors: list[tuple[tuple[int, int], str]] = []
        self._bytes_read = 0
        self._displays: dict[str, str] = {}
        self._pieces: list[FhirPiece] = []
        self._shared: list[Any] = []
        self._patients: list[Any] = []
        self._medications: list[Any] = []
        self._identifiers: set[str] = set()
        self._deleted: list[tuple[str, int]] = []
        self._partition_of: dict[str, int] = {}
        self._clear()

    def _clear(self) -> None:
        self._tables: dict[str, dict[str, int]] = {name: {"": 0} for name in TABLE_OF.values()}
        self._columns: list[dict[str, np.ndarray]] = []
        self._visits: list[Any] = []
        self._rows = 0

    def add(self, block: Block) -> None:
        """Take a block."""
        first, updated = block.place, block.updated
        maps = {name: self._intern(name, strings) for name, strings in block.tables.items()}
        columns = {name: np.frombuffer(column, dtype=column.typecode) for name, column in block.columns.items()}
        columns |= {name: maps[table][columns[name]] for name, table in TABLE_OF.items()}
        self._columns.append(columns | version_columns(block))
        self._rows += len(columns["time"])
        subjects = block.tables["subjects"]
        for keys, name, subject, *rest, i in block.visits:
            visit = (keys, name, subjects[subject], *rest, updated[i], first + i)
            (self._visits if subject else self._shared).append(visit)
        self._patients += [(keys, name, links, updated[i], first + i) for keys, name, links, i in block.patients]
        self._deleted += block.deleted
        self._medications += [(keys, codes, updated[i], first + i) for keys, codes, i in block.medications]
        self._identifiers.update(key for key in subjects if key.startswith("|"))
        self.counts.update(block.counts)
        self.errors += [(block.order, error) for error in block.errors]
        self._displays.update(block.displays)
        self._bytes_read += block.bytes_read
        if self._rows >= PIECE_ROWS:
            self._write()

    def _intern(self, name: str, strings: list[str]) -> np.ndarray:
        table = self._tables[name]
        return np.fromiter((table.setdefault(text, len(table)) for text in strings), dtype=np.int32, count=len(strings))

    def _write(self) -> None:
        if not self._rows and not self._visits:
            return
        stem = f"{self.part.number}-{len(self._pieces)}"
        folder = Path(self.part.folder)
        columns = {name: np.concatenate([part[name] for part in self._columns]) for name in self._columns[0]}
        partition = self._partitions(list(self._tables["subjects"]))[columns["subject"]]
        arrays: dict[str, pa.Array] = {
            name: pa.DictionaryArray.from_arrays(columns[name], pa.array(list(self._tables[table]), pa.string()))
            for name, table in TABLE_OF.items()
        }
        arrays |= {name: pa.array(columns[name]) for name in NUMBERS}
        visits = _table(self._visits, VISIT_SCHEMA)
        self._pieces.append(
            {
                "rows": f"{stem}.rows.parquet",
                "row_groups": write_piece(pa.table(arrays), partition, folder / f"{stem}.rows.parquet"),
                "visits": f"{stem}.visits.parquet",
                "visit_groups": write_piece(
                    visits, self._partitions([visit[2] for visit in self._visits]), folder / f"{stem}.visits.parquet"
                ),
            }
        )
        self._clear()

    def _partitions(self, keys: list[str]) -> np.ndarray:
        known = self._partition_of
        new = [key for key in dict.fromkeys(keys) if key not in known]
        known.update(zip(new, partition_of_keys(new, self.part.partitions).tolist(), strict=True))
        return np.fromiter((known[key] for key in keys), dtype=np.int32, count=len(keys))

    def finish(self) -> FhirPartReport:
        """Write what is left; what the part held."""
        self._write()
        tables = {
            "patients": _table(self._patients, PATIENT_SCHEMA),
            "medications": _table(self._medications, MEDICATION_SCHEMA),
            "shared": _table(self._shared, VISIT_SCHEMA),
        }
        for name, table in tables.items():
            if table.num_rows:
                write_table(table, self.part.beside(f".{name}.parquet"))
        return {
            "pieces": self._pieces,
            "tables": [name for name, table in tables.items() if table.num_rows],
            "counts": [(table, entry, number) for (table, entry), number in sorted(self.counts.items())],
            "errors": sorted(self.errors)[:MAX_ERRORS],
            "bytes_read": self._bytes_read,
            "identifiers": sorted(self._identifiers),
            "displays": self._displays,
            "deleted": self._deleted,
        }


def _table(rows: list[Any], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table([pa.array(column, item.type) for column, item in zip(columns, schema, strict=True)], schema=schema)

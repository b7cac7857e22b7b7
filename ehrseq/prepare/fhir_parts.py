"""FHIR, first stage: a part of the files is parsed by the same readers as in memory, and its rows go to pieces on disk.

A row still holds references (keys of its patient and encounter); they are followed in the second stage, where a
patient's resources meet. Patients and medications, which any row may name, are kept beside the pieces.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ehrseq.data.fhir.blocks import MAX_ERRORS, Block, Task, read_task
from ehrseq.data.fhir.versions import version_columns
from ehrseq.prepare.spill import partition_of_keys, write_piece, write_table
from ehrseq.work.files import write_json

PIECE_ROWS = 400_000
"""Rows of a piece, about: what is held before it is written."""
TABLES = {"subject": "subjects", "encounter": "encounters", "code": "codes", "text": "texts", "unit": "units"}
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
PATIENT_SCHEMA = pa.schema([("keys", pa.list_(pa.string())), ("id", pa.string()), *_VERSION])
MEDICATION_SCHEMA = pa.schema([("keys", pa.list_(pa.string())), ("codes", pa.list_(pa.string())), *_VERSION])
NUMBERS = {"time": np.int64, "value": np.float32, "place": np.int64, "updated": np.int64, "resource": np.int64}
"""Columns of the rows beside `TABLES`."""


@dataclass(frozen=True)
class FhirPart:
    """A part of the files: some small files, or some bytes of a large one.

    Attributes:
        number: Number of the part.
        tasks: What to read, in order.
        folder: Where its pieces go.
        partitions: Number of partitions.
        skip_errors: Count what cannot be read and go on.
    """

    number: int
    tasks: tuple[Task, ...]
    folder: str
    partitions: int
    skip_errors: bool

    @property
    def name(self) -> str:
        """The first file, in messages."""
        return self.tasks[0].path

    @property
    def record(self) -> Path:
        """The file that says that the part is done, and what it held."""
        return Path(self.folder) / f"{self.number}.json"


def parse_part(part: FhirPart) -> str:
    """Parse one part, if that is not done yet; returns the path of its record."""
    if part.record.is_file():
        return str(part.record)
    spill = _Spill(part)
    for task in part.tasks:
        for block in read_task(task, skip_errors=part.skip_errors):
            spill.add(block)
    spill.finish()
    return str(part.record)


class _Spill:
    """Gathers blocks and writes pieces of them."""

    def __init__(self, part: FhirPart) -> None:
        self.part = part
        self.counts: Counter[tuple[str, str]] = Counter()
        self.errors: list[tuple[tuple[int, int], str]] = []
        self._bytes_read = 0
        self._displays: dict[str, str] = {}
        self._pieces: list[dict[str, Any]] = []
        self._shared: list[Any] = []
        self._patients: list[Any] = []
        self._medications: list[Any] = []
        self._identifiers: set[str] = set()
        self._partition_of: dict[str, int] = {}
        self._clear()

    def _clear(self) -> None:
        self._tables: dict[str, dict[str, int]] = {name: {"": 0} for name in TABLES.values()}
        self._columns: list[dict[str, np.ndarray]] = []
        self._visits: list[Any] = []
        self._rows = 0

    def add(self, block: Block) -> None:
        """Take a block."""
        first, updated = block.place, block.updated
        maps = {name: self._intern(name, strings) for name, strings in block.tables.items()}
        columns = {name: np.frombuffer(column, dtype=column.typecode) for name, column in block.columns.items()}
        columns |= {name: maps[table][columns[name]] for name, table in TABLES.items()}
        self._columns.append(columns | version_columns(block))
        self._rows += len(columns["time"])
        subjects = block.tables["subjects"]
        for keys, name, subject, *rest, i in block.visits:
            visit = (keys, name, subjects[subject], *rest, updated[i], first + i)
            (self._visits if subject else self._shared).append(visit)
        self._patients += [(keys, name, updated[i], first + i) for keys, name, i in block.patients]
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
            for name, table in TABLES.items()
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

    def finish(self) -> None:
        """Write what is left, then the record, by which the part counts as done."""
        self._write()
        record, stem = self.part.record, str(self.part.number)
        for kind, rows, schema in (
            ("patients", self._patients, PATIENT_SCHEMA),
            ("medications", self._medications, MEDICATION_SCHEMA),
            ("shared", self._shared, VISIT_SCHEMA),
        ):
            if rows:
                table = _table(rows, schema)
                write_table(table, record.with_name(f"{stem}.{kind}.parquet"))
        content = {
            "pieces": self._pieces,
            "files": {"patients": bool(self._patients), "medications": bool(self._medications)}
            | {"shared": bool(self._shared)},
            "counts": [[table, entry, number] for (table, entry), number in sorted(self.counts.items())],
            "errors": sorted(self.errors)[:MAX_ERRORS],
            "bytes_read": self._bytes_read,
            "identifiers": sorted(self._identifiers),
            "displays": self._displays,
        }
        write_json(record, content)


def _table(rows: list[Any], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table([pa.array(column, item.type) for column, item in zip(columns, schema, strict=True)], schema=schema)

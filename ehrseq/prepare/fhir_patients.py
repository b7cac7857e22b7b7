"""FHIR, second stage: who the patients are, and then partition by partition what each of them had.

References may name a patient by more than its id (an identifier, the fullUrl of a Bundle's entry), and such a key may
lie in another partition than the patient itself. `index_patients` finds out which, so that a partition also reads the
rows of those that are its patients under another name.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ehrseq.data.fhir.assemble import Assembler, source_ids, subject_ids_of
from ehrseq.data.fhir.references import Resolver
from ehrseq.data.fhir.resources import MEDICATION_REFERENCE
from ehrseq.data.fhir.versions import last_versions
from ehrseq.data.report import ConversionReport
from ehrseq.prepare.fhir_parts import NUMBERS, TABLES
from ehrseq.prepare.shard_files import ShardPlan, is_done, write_shards
from ehrseq.prepare.spill import codes_of, partition_of_keys, read_partition, write_piece, write_table
from ehrseq.work.files import write_json

_DICTIONARIES = tuple(TABLES)


@dataclass(frozen=True)
class FhirPartition:
    """The patients of one partition.

    Attributes:
        number: Its number.
        spill: Folder of the pieces and the index.
        plan: How its shards are written.
    """

    number: int
    spill: str
    plan: ShardPlan

    @property
    def name(self) -> str:
        """The partition, in messages."""
        return f"partition {self.number}"


def index_patients(spill: Path, records: Sequence[str], partitions: int, report: ConversionReport) -> None:
    """Read the records of all parts: fill the report, number the patients, and say where whose rows lie.

    Args:
        spill: Folder of the pieces; takes `index.json` and tables beside it.
        records: What `parse_part` returned, in order.
        partitions: Number of partitions.
        report: Takes counts, errors, descriptions and the ids of the source.

    Raises:
        ValueError: No Patient, or two patients whose ids have the same hash.
    """
    errors: list[Any] = []
    identifiers: set[str] = set()
    pieces: list[dict[str, Any]] = []
    tables: dict[str, list[pa.Table]] = {"patients": [], "medications": [], "shared": []}
    for record in records:
        content = json.loads(Path(record).read_text(encoding="utf-8"))
        for table, entry, number in content["counts"]:
            getattr(report, table)[entry] += number
        errors += content["errors"]
        identifiers.update(content["identifiers"])
        report.code_descriptions.update(content["displays"])
        report.bytes_read += content["bytes_read"]
        pieces += content["pieces"]
        for kind, there in content["files"].items():
            if there:
                tables[kind].append(pq.read_table(str(Path(record).with_suffix("")) + f".{kind}.parquet"))
    report.errors = [message for _, message in sorted(errors)]
    if not tables["patients"]:
        raise ValueError(
            f"{report.source} holds no Patient resource (read: {dict(report.resources_read) or 'nothing'}); events "
            "need the patients that they refer to: give the whole export folder."
        )
    patients = pa.concat_tables(tables["patients"]).sort_by("place")
    elsewhere = _write_patients(spill, patients, identifiers, partitions, report)
    for kind in ("medications", "shared"):
        if tables[kind]:
            whole = pa.concat_tables(tables[kind]).sort_by("place")
            write_table(whole, spill / f"{kind}.parquet")
    index = {"pieces": pieces, "patients": elsewhere["groups"], "elsewhere": elsewhere["elsewhere"]}
    write_json(spill / "index.json", index)


def _write_patients(
    spill: Path, table: pa.Table, identifiers: set[str], partitions: int, report: ConversionReport
) -> dict[str, Any]:
    """Write each key of each patient into the partition of the key; returns its groups, and where rows of the patients
    of a partition may lie beside that.
    """
    patients = last_versions(_given(table))
    names = source_ids(patients)
    mapping = subject_ids_of(names)
    report.subject_ids = {name: number for name, number in mapping.items() if str(number) != name}
    keys = [key for own, *_ in patients for key in own]
    lengths = [len(own) for own, *_ in patients]
    partition = partition_of_keys(keys, partitions)
    first = np.cumsum([0, *lengths[:-1]])
    homes = np.repeat(partition[first], lengths)
    numbers = np.repeat(np.arange(len(patients), dtype=np.int32), lengths)
    subjects = np.repeat(np.array([mapping[name] for name in names], dtype=np.int64), lengths)
    columns = {"key": pa.array(keys, pa.string()), "patient": numbers, "home": homes, "subject_id": subjects}
    groups = write_piece(pa.table(columns), partition, spill / "patients.parquet")
    elsewhere: dict[int, set[int]] = defaultdict(set)
    for number in np.flatnonzero(partition != homes).tolist():
        # Every patient has identifiers; only those that some resource refers to matter.
        if not keys[number].startswith("|") or keys[number] in identifiers:
            elsewhere[int(homes[number])].add(int(partition[number]))
    return {"groups": groups, "elsewhere": {str(home): sorted(found) for home, found in sorted(elsewhere.items())}}


def assemble_partition(task: FhirPartition) -> str:
    """Make the shards of one partition, if that is not done yet; returns the path of its record."""
    record = task.plan.record(task.number)
    if is_done(record):
        return str(record)
    spill = Path(task.spill)
    index = json.loads((spill / "index.json").read_text(encoding="utf-8"))
    report = ConversionReport(format="fhir")
    reader = _Reader(spill, index, task.number)
    assembler = Assembler(report, reader.subjects)
    for tables, columns, visits in reader.rows():
        assembler.add_rows(tables, columns, visits)
    if reader.has_references and (spill / "medications.parquet").is_file():
        assembler.medications += _given(pq.read_table(spill / "medications.parquet"))
    if (spill / "shared.parquet").is_file():
        shared = _visits(pq.read_table(spill / "shared.parquet"), {"": 0})
        assembler.add_encounters_of_nobody(shared, counted=task.number == 0)
    events = assembler.events() if reader.found else pl.DataFrame()
    write_shards(events, report, task.plan, task.number)
    return str(record)


class _Reader:
    """The rows of one partition, from all pieces.

    Attributes:
        subjects: Key -> subject_id of the patients of the partition; filled while rows are read.
        found: Whether there were any.
        has_references: Whether a code is still a reference to a Medication.
    """

    def __init__(self, spill: Path, index: dict[str, Any], number: int) -> None:
        self._spill, self._index, self._number = spill, index, number
        self.subjects: dict[str, int] = {}
        self.found = self.has_references = False

    def rows(self) -> Any:
        """(tables, columns, visits) of each piece, see `Assembler.add_rows`."""
        for partition in [self._number, *self._index["elsewhere"].get(str(self._number), [])]:
            whose = _Whose(self._spill, self._index["patients"], partition)
            for piece in self._index["pieces"]:
                rows = read_partition(
                    self._spill / piece["rows"], piece["row_groups"], partition, dictionaries=_DICTIONARIES
                )
                visits = read_partition(self._spill / piece["visits"], piece["visit_groups"], partition)
                if rows is not None or visits is not None:
                    yield self._piece(rows, visits, whose, partition)

    def _piece(self, rows: pa.Table | None, visits: pa.Table | None, whose: _Whose, partition: int) -> Any:
        columns: dict[str, np.ndarray] = {
            **{name: np.zeros(0, np.int32) for name in TABLES},
            **{name: np.zeros(0, dtype) for name, dtype in NUMBERS.items()},
        }
        tables: dict[str, list[str]] = {table: [""] for table in TABLES.values()}
        if rows is not None:
            for name, table in TABLES.items():
                tables[table], columns[name] = codes_of(rows[name])
            columns |= {name: rows[name].to_numpy() for name in NUMBERS}
            self.has_references |= any(code.startswith(MEDICATION_REFERENCE) for code in tables["codes"])
        # A key that names nobody at all is counted where it lies, one of another partition's patient there.
        keep = np.array([self._is_here(key, whose, partition) for key in tables["subjects"]], dtype=bool)
        if not keep.all():
            mask = keep[columns["subject"]]
            columns = {name: column[mask] for name, column in columns.items()}
            tables["subjects"] = [key if kept else "" for key, kept in zip(tables["subjects"], keep, strict=True)]
        places = {key: number for number, key in enumerate(tables["subjects"])}
        found = []
        if visits is not None:
            for subject in dict.fromkeys(visits["subject"].to_pylist()):
                if subject not in places and self._is_here(subject, whose, partition):
                    places[subject] = len(tables["subjects"])
                    tables["subjects"].append(subject)
            found = _visits(visits, places)
        self.found |= bool(len(columns["time"]) or found)
        return tables, columns, found

    def _is_here(self, key: str, whose: _Whose, partition: int) -> bool:
        home, subject_id = whose.find(key)
        if home == self._number:
            self.subjects[key] = subject_id
            return True
        return home < 0 and partition == self._number


class _Whose:
    """Whom the keys in one partition name."""

    def __init__(self, spill: Path, groups: list[int], partition: int) -> None:
        table = read_partition(spill / "patients.parquet", groups, partition)
        self._home: list[int] = []
        self._subject: list[int] = []
        self._known: dict[str, tuple[int, int]] = {"": (-1, -1)}
        keys: list[list[str]] = []
        last = -1
        for key, patient, home, subject in () if table is None else _tuples(table):
            if patient != last:
                keys.append([])
                self._home.append(home)
                self._subject.append(subject)
                last = patient
            keys[-1].append(key)
        self._resolver = Resolver("Patient", keys)

    def find(self, key: str) -> tuple[int, int]:
        """(partition, subject_id) of the patient that a key names; -1 where there is none."""
        known = self._known.get(key)
        if known is None:
            number = self._resolver.find(key)
            known = self._known[key] = (self._home[number], self._subject[number]) if number >= 0 else (-1, -1)
        return known


def _given(table: pa.Table) -> list[Any]:
    """Resources as the assembler takes them: their columns, and the version as a pair."""
    return [(*rest, (updated, place)) for *rest, updated, place in _tuples(table)]


def _visits(table: pa.Table, places: dict[str, int]) -> list[Any]:
    """Encounters whose subject is among `places`, with its place there."""
    return [(keys, name, places[who], *rest) for keys, name, who, *rest in _given(table) if who in places]


def _tuples(table: pa.Table) -> Any:
    return zip(*(column.to_pylist() for column in table.columns), strict=True)

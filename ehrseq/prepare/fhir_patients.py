"""FHIR, second stage: who the patients are, and then partition by partition what each of them had.

References may name a patient by more than its id (an identifier, the fullUrl of a Bundle's entry), and such a key may
lie in another partition than the patient itself. `index_patients` finds out which, so that a partition also reads the
rows of those that are its patients under another name.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ehrseq.data.fhir.assemble import Assembler
from ehrseq.data.fhir.references import Resolver
from ehrseq.data.fhir.rows import MEDICATION_REFERENCE, TABLE_OF
from ehrseq.data.fhir.subjects import people_of
from ehrseq.data.fhir.versions import (
    Deletions,
    MedicationVersion,
    PatientVersion,
    Version,
    VisitVersion,
    last_versions,
)
from ehrseq.data.metadata import NO_SETTINGS, DatasetSettings
from ehrseq.data.report import ConversionReport
from ehrseq.prepare.fhir_parts import NUMBERS, FhirPart, FhirPartReport, FhirPiece
from ehrseq.prepare.shard_files import PartitionPart, ShardReport, write_shards
from ehrseq.prepare.spill import codes_of, partition_of_keys, read_partition, write_piece, write_table
from ehrseq.work.files import write_json

_DICTIONARIES = tuple(TABLE_OF)


class SpillIndex(TypedDict):
    """Where the rows of each partition lie.

    Attributes:
        pieces: The pieces of all parts.
        patients: Partitions of the row groups of the table of patients' keys.
        elsewhere: Partition -> other partitions that hold keys of its patients.
        deleted: (type and id, when) of resources that the source deletes.
    """

    pieces: list[FhirPiece]
    patients: list[int]
    elsewhere: dict[str, list[int]]
    deleted: list[tuple[str, int]]


def index_patients(
    spill: Path, parts: Iterable[tuple[FhirPart, FhirPartReport]], partitions: int, report: ConversionReport
) -> None:
    """Fill the report from those of all parts, number the patients, and say where whose rows lie.

    Args:
        spill: Folder of the pieces; takes `index.json` and tables beside it.
        parts: The parts, each with its report, in order.
        partitions: Number of partitions.
        report: Takes counts, errors, descriptions and the ids of the source.

    Raises:
        ValueError: No Patient, or two patients whose ids have the same hash.
    """
    errors: list[tuple[tuple[int, int], str]] = []
    identifiers: set[str] = set()
    pieces: list[FhirPiece] = []
    deleted: list[tuple[str, int]] = []
    tables: dict[str, list[pa.Table]] = {"patients": [], "medications": [], "shared": []}
    for part, content in parts:
        for table, entry, number in content["counts"]:
            getattr(report, table)[entry] += number
        errors += content["errors"]
        identifiers.update(content["identifiers"])
        report.code_descriptions.update(content["displays"])
        report.bytes_read += content["bytes_read"]
        pieces += content["pieces"]
        deleted += [(name, when) for name, when in content["deleted"]]
        for kind in content["tables"]:
            tables[kind].append(pq.read_table(part.beside(f".{kind}.parquet")))
    report.errors = [message for _, message in sorted(errors)]
    if not tables["patients"]:
        raise ValueError(
            f"{report.source} holds no Patient resource (read: {dict(report.resources_read) or 'nothing'}); events "
            "need the patients that they refer to: give the whole export folder."
        )
    patients = pa.concat_tables(tables["patients"]).sort_by("place")
    groups, elsewhere = _write_patients(spill, patients, identifiers, partitions, deleted, report)
    for kind in ("medications", "shared"):
        if tables[kind]:
            whole = pa.concat_tables(tables[kind]).sort_by("place")
            write_table(whole, spill / f"{kind}.parquet")
    index: SpillIndex = {"pieces": pieces, "patients": groups, "elsewhere": elsewhere, "deleted": deleted}
    write_json(spill / "index.json", index)


def _write_patients(
    spill: Path,
    table: pa.Table,
    identifiers: set[str],
    partitions: int,
    deleted: list[tuple[str, int]],
    report: ConversionReport,
) -> tuple[list[int], dict[str, list[int]]]:
    """Write each key of each person into the partition of the key; returns `patients` and `elsewhere` of the index."""
    versions = [
        PatientVersion(keys, name, links, Version(updated, place))
        for keys, name, links, updated, place in _tuples(table)
    ]
    people = people_of(last_versions(Deletions(deleted).remaining(versions, "Patient")), report)
    keys = [key for keys in people.keys for key in keys]
    lengths = [len(keys) for keys in people.keys]
    partition = partition_of_keys(keys, partitions)
    first = np.cumsum([0, *lengths[:-1]])
    homes = np.repeat(partition[first], lengths)
    numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    subjects = np.repeat(np.array(people.subject_ids, dtype=np.int64), lengths)
    columns = {"key": pa.array(keys, pa.string()), "patient": numbers, "home": homes, "subject_id": subjects}
    groups = write_piece(pa.table(columns), partition, spill / "patients.parquet")
    elsewhere: dict[int, set[int]] = defaultdict(set)
    for number in np.flatnonzero(partition != homes).tolist():
        # Every patient has identifiers; only those that some resource refers to matter.
        if not keys[number].startswith("|") or keys[number] in identifiers:
            elsewhere[int(homes[number])].add(int(partition[number]))
    return groups, {str(home): sorted(others) for home, others in sorted(elsewhere.items())}


@dataclass(frozen=True)
class FhirPartition(PartitionPart):
    """The patients of one partition of FHIR files.

    Attributes:
        settings: What the user says about the source.
    """

    settings: DatasetSettings = NO_SETTINGS

    def make(self) -> ShardReport:
        """Put the rows together, and write them as shards."""
        spill = Path(self.spill)
        report = ConversionReport(format="fhir")
        reader = _PartitionReader(spill, self.number)
        assembler = Assembler(report, reader.subjects, self.settings)
        assembler.deleted = reader.deleted
        for tables, columns, visits in reader.rows():
            assembler.add_rows(tables, columns, visits)
        if reader.has_references and (spill / "medications.parquet").is_file():
            assembler.medications += [
                MedicationVersion(keys, codes, Version(updated, place))
                for keys, codes, updated, place in _tuples(pq.read_table(spill / "medications.parquet"))
            ]
        if (spill / "shared.parquet").is_file():
            shared = _visits(pq.read_table(spill / "shared.parquet"), {"": 0})
            assembler.add_encounters_of_nobody(shared, counted=self.number == 0)
        if not reader.has_rows:
            assembler.count_encounters_of_nobody()
        events = assembler.events() if reader.has_rows else pl.DataFrame()
        return write_shards(events, report, self.plan, self.number)


_Piece = tuple[dict[str, list[str]], dict[str, np.ndarray], list[VisitVersion]]
"""(tables, columns, visits), see `Assembler.add_rows`."""


class _PartitionReader:
    """The rows of one partition, from all pieces.

    Attributes:
        subjects: Key -> subject_id of the patients of the partition; filled while rows are read.
        deleted: (type and id, when) of resources that the source deletes.
        has_rows: Whether there are any.
        has_references: Whether a code is still a reference to a Medication.
    """

    def __init__(self, spill: Path, number: int) -> None:
        self._spill, self._number = spill, number
        self._index: SpillIndex = json.loads((spill / "index.json").read_text(encoding="utf-8"))
        self.subjects: dict[str, int] = {}
        self.deleted: list[tuple[str, int]] = [(name, when) for name, when in self._index["deleted"]]
        self.has_rows = self.has_references = False

    def rows(self) -> Iterator[_Piece]:
        """The rows of each piece."""
        for partition in [self._number, *self._index["elsewhere"].get(str(self._number), [])]:
            patients = KeyIndex(self._spill, self._index["patients"], partition)
            for piece in self._index["pieces"]:
                rows = read_partition(
                    self._spill / piece["rows"], piece["row_groups"], partition, dictionaries=_DICTIONARIES
                )
                visits = read_partition(self._spill / piece["visits"], piece["visit_groups"], partition)
                if rows is not None or visits is not None:
                    yield self._of_this_partition(rows, visits, patients, partition)

    def _of_this_partition(
        self, rows: pa.Table | None, visits: pa.Table | None, patients: KeyIndex, partition: int
    ) -> _Piece:
        columns: dict[str, np.ndarray] = {
            **{name: np.zeros(0, np.int32) for name in TABLE_OF},
            **{name: np.zeros(0, dtype) for name, dtype in NUMBERS.items()},
        }
        tables: dict[str, list[str]] = {table: [""] for table in TABLE_OF.values()}
        if rows is not None:
            for name, table in TABLE_OF.items():
                tables[table], columns[name] = codes_of(rows[name])
            columns |= {name: rows[name].to_numpy() for name in NUMBERS}
            self.has_references |= any(code.startswith(MEDICATION_REFERENCE) for code in tables["codes"])
        keep = np.array([self._belongs_here(key, patients, partition) for key in tables["subjects"]], dtype=bool)
        if not keep.all():
            mask = keep[columns["subject"]]
            columns = {name: column[mask] for name, column in columns.items()}
            tables["subjects"] = [key if kept else "" for key, kept in zip(tables["subjects"], keep, strict=True)]
        places = {key: number for number, key in enumerate(tables["subjects"])}
        encounters: list[VisitVersion] = []
        if visits is not None:
            for subject in dict.fromkeys(visits["subject"].to_pylist()):
                if subject not in places and self._belongs_here(subject, patients, partition):
                    places[subject] = len(tables["subjects"])
                    tables["subjects"].append(subject)
            encounters = _visits(visits, places)
        self.has_rows |= bool(len(columns["time"]) or encounters)
        return tables, columns, encounters

    def _belongs_here(self, key: str, patients: KeyIndex, partition: int) -> bool:
        """Whether the rows of a key, read from a partition, are this partition's.

        Those of its patients are, wherever they lie. So are those that name no known patient and lie in this partition:
        it counts them as unresolved, and nobody else does.
        """
        home, subject_id = patients.find(key)
        if home == self._number:
            self.subjects[key] = subject_id
            return True
        return home < 0 and partition == self._number


class KeyIndex:
    """Which patients the keys in one partition name.

    Args:
        spill: Folder of the index.
        groups: `patients` of the index.
        partition: The partition.
    """

    def __init__(self, spill: Path, groups: list[int], partition: int) -> None:
        table = read_partition(spill / "patients.parquet", groups, partition)
        self._patients: list[tuple[int, int]] = []
        self._known: dict[str, tuple[int, int]] = {"": (-1, -1)}
        keys: list[list[str]] = []
        last = -1
        for key, patient, home, subject in () if table is None else _tuples(table):
            if patient != last:
                keys.append([])
                self._patients.append((home, subject))
                last = patient
            keys[-1].append(key)
        self._resolver = Resolver("Patient", keys)

    def find(self, key: str) -> tuple[int, int]:
        """(partition, subject_id) of the patient that a key names; -1 where there is none."""
        known = self._known.get(key)
        if known is None:
            number = self._resolver.find(key)
            known = self._known[key] = self._patients[number] if number >= 0 else (-1, -1)
        return known


def _visits(table: pa.Table, places: dict[str, int]) -> list[VisitVersion]:
    """Encounters whose subject is among `places`, with its place there."""
    return [
        VisitVersion(keys, name, places[subject], start, end, offset, part_of, Version(updated, place))
        for keys, name, subject, start, end, offset, part_of, updated, place in _tuples(table)
        if subject in places
    ]


def _tuples(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    return zip(*(column.to_pylist() for column in table.columns), strict=True)

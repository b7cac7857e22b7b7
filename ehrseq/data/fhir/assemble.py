"""Blocks of FHIR rows meet: references become subjects, visits, ends of encounters and medication codes; then one
sorted event table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from ehrseq.data.fhir.blocks import Block
from ehrseq.data.fhir.encounters import ANYBODY, Encounters
from ehrseq.data.fhir.references import NOTHING, Resolver, bare_id
from ehrseq.data.fhir.rows import (
    MEDICATION_REFERENCE,
    RESOURCE_TYPES,
    TABLE_OF,
    TIME_FROM_ENCOUNTER,
    TIME_STATIC,
    TIME_UNKNOWN,
)
from ehrseq.data.fhir.versions import (
    MedicationVersion,
    PatientVersion,
    Version,
    VisitVersion,
    last_versions,
    old_versions,
    version_columns,
)
from ehrseq.data.instants import LOCAL_TICK
from ehrseq.data.report import MAX_ERRORS, ConversionReport
from ehrseq.data.schema import EVENT_COLUMNS, EVENT_SCHEMA, code_rank
from ehrseq.tokenization.ehr_codes import DAY_US, MINUTE_US

_MAX_INT64 = 2**63 - 1


class Assembler:
    """Collects blocks in any order and makes the event table.

    Args:
        report: Filled with what was read, skipped and not resolved.
        subjects: Key of a patient -> subject_id, where the patients are known already; keys that it lacks name nobody.
            Default: worked out from the patients of the blocks.

    Attributes:
        medications: Each Medication; for whoever adds rows without blocks to fill.
    """

    def __init__(self, report: ConversionReport, subjects: Mapping[str, int] | None = None) -> None:
        self.report = report
        self._known_subjects = subjects
        self._tables: dict[str, dict[str, int]] = {name: {"": 0} for name in TABLE_OF.values()}
        self._columns: list[dict[str, np.ndarray]] = []
        self._patients: list[PatientVersion] = []
        self._visits: list[VisitVersion] = []
        self._counts_encounters_of_nobody = True
        self.medications: list[MedicationVersion] = []
        self._errors: list[tuple[tuple[int, int], str]] = []

    def add(self, block: Block) -> None:
        """Take a block; its indices become indices into the common tables."""
        columns = {name: np.frombuffer(column, dtype=column.typecode) for name, column in block.columns.items()}

        def version(resource: int) -> Version:
            return Version(block.updated[resource], block.place + resource)

        visits = [VisitVersion(*visit[:-1], version(visit.resource)) for visit in block.visits]
        self.add_rows(block.tables, columns | version_columns(block), visits)
        self._patients += [PatientVersion(keys, name, version(n)) for keys, name, n in block.patients]
        self.medications += [MedicationVersion(keys, codes, version(n)) for keys, codes, n in block.medications]
        for (table, entry), number in block.counts.items():
            getattr(self.report, table)[entry] += number
        self.report.code_descriptions.update(block.displays)
        self.report.bytes_read += block.bytes_read
        self._errors += [(block.order, error) for error in block.errors]

    def add_rows(
        self, tables: Mapping[str, list[str]], columns: Mapping[str, np.ndarray], visits: list[VisitVersion]
    ) -> None:
        """Take rows and encounters.

        Args:
            tables: The distinct strings that the columns (and the subjects of the encounters) are indices into, by the
                names in `Block.tables`.
            columns: Those of `Block.columns` and of `version_columns`.
            visits: Encounters.
        """
        maps = {name: self._intern(name, strings) for name, strings in tables.items()}
        self._columns.append({**columns, **{name: maps[table][columns[name]] for name, table in TABLE_OF.items()}})
        subjects = maps["subjects"]
        self._visits += [visit._replace(subject=int(subjects[visit.subject])) for visit in visits]

    def add_encounters_of_nobody(self, visits: list[VisitVersion], *, counted: bool) -> None:
        """Take encounters that name no patient: any row may refer to them. Several tables may share them, and one of
        them counts what is wrong with them.
        """
        self._visits += visits
        self._counts_encounters_of_nobody = counted

    def events(self) -> pl.DataFrame:
        """The event table of everything added.

        Raises:
            ValueError: No Patient was given, or ids of two patients have the same hash.
        """
        if not self._patients and self._known_subjects is None:
            read = dict(self.report.resources_read) or "nothing"
            raise ValueError(
                f"{self.report.source or 'The input'} holds no Patient resource (read: {read}); events need the "
                "patients that they refer to: "
                "give the whole export folder, or a Bundle with its Patient."
            )
        columns = self._in_source_order()

        # 1. Subjects: rows of nobody go, first of all, so that later counts are of rows that could be kept.
        subject_ids, nobody = self._resolve_subjects()
        subject = columns.pop("subject")
        columns["subject_id"] = subject_ids[subject]
        known = columns["subject_id"] != nobody
        if not known.all():
            named = np.unique(subject[~known])
            if missing := int(np.count_nonzero(named != self._tables["subjects"][NOTHING])):
                self.report.unresolved_references["Patient (distinct references)"] += missing
            lost = int(np.count_nonzero(~known & (columns["code"] != 0)))
            if lost:
                self.report.skipped["rows of a subject that was not given"] += lost
            columns = {name: column[known] for name, column in columns.items()}
        columns = self._mark_old_versions(columns)

        # 2. Encounters: the visit of a row, and the end of its encounter.
        encounters = self._encounters(subject_ids, nobody)
        keys = columns.pop("encounter")
        columns["visit"], ends = encounters.resolve(columns["subject_id"], keys, self._tables["encounters"])
        missing = int(np.count_nonzero((columns["visit"] < 0) & (keys > 0)))
        if missing:
            self.report.unresolved_references["Encounter (rows kept, without a visit)"] += missing
        columns = self._times_from_encounters(columns, ends)

        # 3. Dates without zone are days of the patient's own wall clock.
        columns["time"] = self._shift_local_dates(columns["time"], columns["subject_id"], encounters.offsets)

        # 4. Medications by reference, perhaps several codes for one.
        columns, codes = self._resolve_medications(columns)
        return self._frame(columns, codes, encounters.names)

    def _in_source_order(self) -> dict[str, np.ndarray]:
        """All rows, those of the source's first file and line first."""
        parts = sorted(self._columns, key=lambda part: part["place"][0] if len(part["place"]) else -1)
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self._columns.clear()
        place = columns["place"]
        if not (place[1:] >= place[:-1]).all():
            order = np.argsort(place, kind="stable")
            columns = {name: column[order] for name, column in columns.items()}
        return columns

    def _intern(self, name: str, strings: list[str]) -> np.ndarray:
        table = self._tables[name]
        return np.fromiter((table.setdefault(text, len(table)) for text in strings), dtype=np.int32, count=len(strings))

    def _mark_old_versions(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Whether a row is that of a version of its resource that a later one replaces (`old`); rows that only say that
        a resource has nothing more to say go.
        """
        versions = {name: columns.pop(name) for name in ("resource", "place", "updated")}
        columns["old"], again, replaced = old_versions(columns["subject_id"], versions)
        if replaced:
            self.report.notes["resources that a later version of them replaces"] += replaced
            self._note_other_births(columns, again)
        has_code = columns["code"] != 0
        return columns if has_code.all() else {name: column[has_code] for name, column in columns.items()}

    def _note_other_births(self, columns: dict[str, np.ndarray], again: np.ndarray) -> None:
        """A patient whose resources of one id are born at different times may be two, whose records got one id."""
        birth = self._tables["codes"].get("MEDS_BIRTH", -1)
        rows = again[columns["code"][again] == birth]
        births = pl.DataFrame({"who": columns["subject_id"][rows], "when": columns["time"][rows]}).unique()
        if several := births.filter(pl.col("who").is_duplicated())["who"].n_unique():
            self.report.notes["patients given again with another birth date (two patients under one id?)"] += several

    def _resolve_subjects(self) -> tuple[np.ndarray, int]:
        """subject_id of each subject key; a value that no subject has stands for nobody."""
        nobody = -1
        keys = list(self._tables["subjects"])
        known = self._known_subjects
        if known is None:
            patients = last_versions(self._patients)
            names = source_ids(patients)
            mapping = subject_ids_of(names)
            self.report.subject_ids = {name: number for name, number in mapping.items() if str(number) != name}
            resolver = Resolver("Patient", [patient.keys for patient in patients])
            numbers = [resolver.find(key) if key != NOTHING else -1 for key in keys]
            ids = np.array([mapping[names[number]] if number >= 0 else nobody for number in numbers], dtype=np.int64)
        else:
            ids = np.array([known.get(key, nobody) for key in keys], dtype=np.int64)
        return ids, nobody

    def _encounters(self, subject_ids: np.ndarray, nobody: int) -> Encounters:
        """The encounters of the patients that are known, and of those that name none."""
        visits = [
            visit._replace(subject=int(subject_ids[visit.subject]) if visit.subject else ANYBODY)
            for visit in self._visits
        ]
        known = [visit for visit in visits if visit.subject != nobody]
        return Encounters(known, self.report, None if self._counts_encounters_of_nobody else ANYBODY)

    def _times_from_encounters(self, columns: dict[str, np.ndarray], ends: np.ndarray) -> dict[str, np.ndarray]:
        time = columns["time"]
        waiting = (time >= TIME_FROM_ENCOUNTER) & (time < TIME_FROM_ENCOUNTER + len(RESOURCE_TYPES))
        if not waiting.any():
            return columns
        kinds = (time[waiting] - TIME_FROM_ENCOUNTER).astype(np.int64)
        known = ends[waiting] != TIME_UNKNOWN
        for number, count in enumerate(np.bincount(kinds[known], minlength=len(RESOURCE_TYPES)).tolist()):
            if count:
                self.report.time_from_encounter_end[RESOURCE_TYPES[number]] += count
        for number, count in enumerate(np.bincount(kinds[~known], minlength=len(RESOURCE_TYPES)).tolist()):
            if count:
                self.report.skipped[f"{RESOURCE_TYPES[number]}: no time, and no end of its encounter"] += count
        columns["time"] = np.where(waiting, ends, time)
        mask = ~waiting
        mask[waiting] = known
        return {name: column[mask] for name, column in columns.items()}

    def _shift_local_dates(self, time: np.ndarray, subject_id: np.ndarray, offsets: dict[int, int]) -> np.ndarray:
        local = (time % DAY_US == LOCAL_TICK) & (time != TIME_STATIC)
        count = int(np.count_nonzero(local))
        if not count:
            return time
        self.report.notes["dates without a time, read as the end of the day"] += count
        owners, inverse = np.unique(subject_id[local], return_inverse=True)
        shift = np.array([offsets.get(int(owner), 0) for owner in owners], dtype=np.int64)[inverse] * MINUTE_US
        moved = int(np.count_nonzero(shift))
        if moved:
            self.report.notes["dates moved to the zone of the patient's encounters"] += moved
        time = time.copy()
        time[local] -= shift
        return time

    def _resolve_medications(self, columns: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Codes that are still references become those of their Medication; a mixture is one row per ingredient."""
        table = dict(self._tables["codes"])
        waiting = {text: number for text, number in table.items() if text.startswith(MEDICATION_REFERENCE)}
        if not waiting:
            return columns, list(table)
        medications = last_versions(self.medications)
        resolver = Resolver("Medication", [medication.keys for medication in medications])
        known = [medication.codes for medication in medications]
        codes_of: dict[int, list[int]] = {}
        unknown: list[int] = []
        for text, number in waiting.items():
            codes = _medication_codes(text, resolver, known, depth=0)
            if codes is None:
                unknown.append(number)
                display = text.rsplit(MEDICATION_REFERENCE, 1)[1]
                codes = [f"MEDICATION//TEXT//{display}"] if display else []
            codes_of[number] = [table.setdefault(code, len(table)) for code in codes]
        code = columns["code"]
        if missing := int(np.isin(code, unknown).sum()):
            self.report.unresolved_references["Medication (rows; kept where the reference has a display text)"] += (
                missing
            )
        # times[i]: into how many rows the rows of code i turn
        times = np.ones(len(table), dtype=np.int64)
        for number, numbers in codes_of.items():
            times[number] = len(numbers)
        repeats = times[code]
        lost = int(np.count_nonzero(repeats == 0))
        if lost:
            self.report.skipped["medication without a code"] += lost
        starts = np.cumsum(repeats) - repeats
        columns = {name: np.repeat(column, repeats) for name, column in columns.items()}
        nth = np.arange(len(columns["code"])) - np.repeat(starts, repeats)
        width = max((len(numbers) for numbers in codes_of.values()), default=1) or 1
        translation = np.tile(np.arange(len(table), dtype=np.int32)[:, None], (1, width))
        for number, numbers in codes_of.items():
            translation[number, : len(numbers)] = numbers
        columns["code"] = translation[columns["code"], nth]
        return columns, list(table)

    def _frame(self, columns: dict[str, np.ndarray], codes: list[str], visit_names: list[str]) -> pl.DataFrame:
        """Sorted event table without repeated rows."""
        rows = pl.DataFrame(
            {
                **{name: columns[name] for name in ("subject_id", "time", "code", "text", "visit", "unit")},
                "value": pl.Series(columns["value"], nan_to_null=True),
            }
        )
        rank = code_rank(pl.Series(codes, dtype=pl.String)).to_numpy()
        rows = rows.with_columns(pl.Series("rank", rank[columns["code"]]))
        count, whole, facts = rows.height, rows, rows.columns
        old = pl.Series("old", columns["old"])
        rows = rows.with_columns(old).unique(subset=facts, keep="first", maintain_order=True)
        self.report.duplicates_dropped = count - rows.height
        if old.any():
            # What only an earlier version of its resource stated; what both say stays where it was stated first.
            stated = whole.filter(~old)
            outdated = (
                rows.with_row_index("row").filter("old").join(stated, on=facts, how="anti", nulls_equal=True)["row"]
            )
            if len(outdated):
                self.report.skipped["facts that a later version of their resource no longer states"] += len(outdated)
                rows = rows.with_row_index("row").filter(~pl.col("row").is_in(outdated.implode())).drop("row")
        # Static rows carry the smallest time: they come first, before any null handling.
        rows = rows.sort(["subject_id", "time", "rank"], maintain_order=True)
        events = rows.select(
            "subject_id",
            pl.when(pl.col("time") != TIME_STATIC).then(pl.col("time")).cast(pl.Datetime("us")).alias("time"),
            _strings(codes, "code").alias("code"),
            pl.col("value").cast(pl.Float32).alias("numeric_value"),
            _strings([None, *list(self._tables["texts"])[1:]], "text").alias("text_value"),
            _strings([*visit_names, None], "visit").alias("visit_id"),
            _strings([None, *list(self._tables["units"])[1:]], "unit").alias("unit"),
        )
        used = set(rows["code"].unique().to_list())
        descriptions = self.report.code_descriptions
        self.report.code_descriptions = {
            codes[i]: descriptions[codes[i]] for i in sorted(used) if codes[i] in descriptions
        }
        for code, note in (("MEDS_BIRTH", "births"), ("MEDS_DEATH", "deaths")):
            # Resources of one id that contradict each other; every row stays, the earliest counts.
            subjects = rows.filter(pl.col("code") == codes.index(code))["subject_id"] if code in codes else None
            if subjects is not None and (twice := len(subjects) - subjects.n_unique()):
                self.report.notes[f"further {note} of a patient who has one"] += twice
        self.report.events_written = events.height
        self.report.subjects = events["subject_id"].n_unique()
        self.report.errors += [error for _, error in sorted(self._errors)][:MAX_ERRORS]
        return events.select(pl.col(name).cast(EVENT_SCHEMA[name]) for name in EVENT_COLUMNS)


def _medication_codes(text: str, resolver: Resolver, known: list[list[str]], depth: int) -> list[str] | None:
    """Codes of a reference to a Medication; None where there is none, or it refers back to itself."""
    _, key, _ = text.split(MEDICATION_REFERENCE, 2)
    medication = resolver.find(key) if key else -1
    if medication < 0 or depth > 5:
        return None
    codes: list[str] = []
    for code in known[medication]:
        inner = _medication_codes(code, resolver, known, depth + 1) if code.startswith(MEDICATION_REFERENCE) else [code]
        codes += inner or []
    return list(dict.fromkeys(codes))


def _strings(values: list[Any], column: str) -> pl.Expr:
    """A column of indices as the strings they stand for (index -1: the last one)."""
    series = pl.Series(values, dtype=pl.String)
    index = pl.col(column)
    safe = pl.when(index < 0).then(len(values) - 1).otherwise(index)
    return pl.lit(series).gather(safe)


def source_ids(patients: Sequence[PatientVersion]) -> list[str]:
    """Each patient's id at its source; its full URL where two servers use one id for (perhaps) two patients."""
    servers: dict[str, set[str]] = {}
    first = [patient.keys[0] for patient in patients]
    for key in first:
        servers.setdefault(bare_id(key), set()).add(key)
    return [key if len(servers[bare_id(key)]) > 1 else bare_id(key) for key in first]


def subject_ids_of(names: Iterable[str]) -> dict[str, int]:
    """subject_id of each source id: the number itself where all ids are whole numbers that fit, else a 63-bit hash of
    the id.

    The hash (BLAKE2b, first 8 bytes, big-endian, without its lowest bit) depends on the id only: a patient keeps its
    subject_id in every conversion, also when read alone.

    Raises:
        ValueError: Two ids have the same hash (once in about 10^8 conversions of 300,000 patients).

    Example:
        >>> subject_ids_of(["12", "7"])
        {'12': 12, '7': 7}
    """
    unique = list(dict.fromkeys(names))
    if all(name.isascii() and name.isdigit() and str(int(name)) == name and int(name) <= _MAX_INT64 for name in unique):
        return {name: int(name) for name in unique}
    mapping = {
        name: int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1 for name in unique
    }
    if len(set(mapping.values())) < len(mapping):
        first: dict[int, str] = {}
        for name, number in mapping.items():
            if number in first:
                raise ValueError(f"Patient ids {first[number]!r} and {name!r} have the same hash; rename one of them.")
            first[number] = name
    return mapping

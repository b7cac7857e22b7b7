"""Blocks of FHIR rows meet: references become subjects, visits, ends of encounters and medication codes; then one
sorted event table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from ehrseq.data.fhir.blocks import Block
from ehrseq.data.fhir.encounters import ANYBODY, WITHIN_ANOTHER, Encounters
from ehrseq.data.fhir.local_times import move_rows
from ehrseq.data.fhir.medications import CUT, ReferencedCodes
from ehrseq.data.fhir.references import NOTHING, Resolver
from ehrseq.data.fhir.rows import (
    MEDICATION_REFERENCE,
    RESOURCE_TYPES,
    TABLE_OF,
    TIME_FROM_ENCOUNTER,
    TIME_STATIC,
    TIME_UNKNOWN,
)
from ehrseq.data.fhir.subjects import people_of
from ehrseq.data.fhir.versions import (
    Deletions,
    MedicationVersion,
    PatientVersion,
    Version,
    VisitVersion,
    last_versions,
    old_versions,
    version_columns,
)
from ehrseq.data.instants import offset_name
from ehrseq.data.metadata import NO_SETTINGS, DatasetSettings
from ehrseq.data.report import MAX_ERRORS, ConversionReport
from ehrseq.data.schema import EVENT_COLUMNS, EVENT_SCHEMA, code_rank
from ehrseq.tokenization.ehr_codes import TIMEZONE


class Assembler:
    """Collects blocks in any order and makes the event table.

    Args:
        report: Filled with what was read, skipped and not resolved.
        subjects: Key of a patient -> subject_id, where the patients are known already; keys that it lacks name nobody.
            Default: worked out from the patients of the blocks.
        settings: What the user says about the source.

    Attributes:
        medications: Each Medication; for whoever adds rows without blocks to fill.
        deleted: (type and id, when) of each resource that is deleted; likewise.
    """

    def __init__(
        self,
        report: ConversionReport,
        subjects: Mapping[str, int] | None = None,
        settings: DatasetSettings = NO_SETTINGS,
    ) -> None:
        self.report = report
        self._timezone = settings.timezone
        self._known_subjects = subjects
        self._tables: dict[str, dict[str, int]] = {name: {"": 0} for name in TABLE_OF.values()}
        self._columns: list[dict[str, np.ndarray]] = []
        self._patients: list[PatientVersion] = []
        self._visits: list[VisitVersion] = []
        self._counts_encounters_of_nobody = True
        self.medications: list[MedicationVersion] = []
        self.deleted: list[tuple[str, int]] = []
        self._errors: list[tuple[tuple[int, int], str]] = []

    def add(self, block: Block) -> None:
        """Take a block; its indices become indices into the common tables."""
        columns = {name: np.frombuffer(column, dtype=column.typecode) for name, column in block.columns.items()}

        def version(resource: int) -> Version:
            return Version(block.updated[resource], block.place + resource)

        visits = [VisitVersion(*visit[:-1], version(visit.resource)) for visit in block.visits]
        self.add_rows(block.tables, columns | version_columns(block), visits)
        self._patients += [PatientVersion(keys, name, links, version(n)) for keys, name, links, n in block.patients]
        self.deleted += block.deleted
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

    def count_encounters_of_nobody(self) -> None:
        """Count what is wrong with them where there are no rows, and so no `events`."""
        self._encounters(np.zeros(1, dtype=np.int64), nobody=-1)

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
        columns = self._without_deleted(self._in_source_order())

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
        known_encounters = self._tables["encounters"]
        columns["visit"], ends, columns["offset"], columns["encounter"] = encounters.resolve(
            columns["subject_id"], keys, known_encounters
        )
        missing = int(np.count_nonzero((columns["visit"] < 0) & (keys > 0)))
        if missing:
            self.report.unresolved_references["Encounter (rows kept, without a visit)"] += missing
        columns = self._times_from_encounters(columns, ends)

        # 3. Times without zone are those of the hospital's wall clock.
        offsets = columns.pop("offset")
        columns["time"] = move_rows(columns, offsets, encounters.offsets, self._timezone, self.report)
        columns = self._without_inner_levels(columns, encounters)
        columns = self._with_zones(columns, encounters)

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

    def _without_deleted(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows, patients, encounters and medications that are not deleted."""
        if not self.deleted:
            return columns
        deletions = Deletions(self.deleted)
        self._patients = deletions.remaining(self._patients, "Patient")
        self._visits = deletions.remaining(self._visits, "Encounter")
        self.medications = deletions.remaining(self.medications, "Medication")
        gone = deletions.rows(columns)
        if lost := int(np.count_nonzero(gone & (columns["code"] != 0))):
            self.report.skipped["rows of resources that the source deleted"] += lost
        return {name: column[~gone] for name, column in columns.items()}

    def _without_inner_levels(self, columns: dict[str, np.ndarray], encounters: Encounters) -> dict[str, np.ndarray]:
        """The rows without the starts and ends of encounters that another one of their visit stands for."""
        number = columns.pop("encounter")
        table = list(self._tables["codes"])
        is_start = np.array([code.startswith("VISIT_START//") for code in table], dtype=bool)[columns["code"]]
        is_end = np.array([code.startswith("VISIT_END//") for code in table], dtype=bool)[columns["code"]]
        rows = np.flatnonzero((is_start | is_end) & (number >= 0) & ~columns["old"])
        named = {name: columns[name][rows] for name in ("subject_id", "visit", "code", "time")}
        within = encounters.within_others(pl.DataFrame(named | {"encounter": number[rows], "start": is_start[rows]}))
        if not within:
            return columns
        self.report.notes[WITHIN_ANOTHER] += len(within)
        kept = ~((is_start | is_end) & np.isin(number, list(within)))
        return {name: column[kept] for name, column in columns.items()}

    def _with_zones(self, columns: dict[str, np.ndarray], encounters: Encounters) -> dict[str, np.ndarray]:
        """The rows, and static ones that tell the zone of patients and visits whose clocks do not show UTC."""
        zones = encounters.zones() if self._timezone is None else []
        if self._timezone is None and not zones:
            return columns
        known = set(pl.Series(columns["subject_id"]).unique().to_list())
        if self._timezone is None:
            told = [(subject, visit, offset_name(offset)) for subject, visit, offset in zones if subject in known]
        else:
            told = [(subject, -1, self._timezone) for subject in known]
        if not told:
            return columns
        table = self._tables["codes"]
        names = dict.fromkeys(name for _, _, name in told)
        codes = {name: table.setdefault(f"{TIMEZONE}{name}", len(table)) for name in names}
        kept = [(subject, visit, codes[name]) for subject, visit, name in told]
        n = len(kept)
        added = dict(zip(("subject_id", "visit", "code"), np.array(kept, dtype=np.int64).T, strict=True))
        added |= {"time": np.full(n, TIME_STATIC), "value": np.full(n, np.nan)}
        return {
            name: np.concatenate([column, added.get(name, np.zeros(n)).astype(column.dtype)])
            for name, column in columns.items()
        }

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
            people = people_of(last_versions(self._patients), self.report)
            resolver = Resolver("Patient", people.keys)
            numbers = [resolver.find(key) if key != NOTHING else -1 for key in keys]
            ids = np.array([people.subject_ids[n] if n >= 0 else nobody for n in numbers], dtype=np.int64)
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
        uncounted = None if self._counts_encounters_of_nobody else ANYBODY
        return Encounters(known, self.report, self._timezone, uncounted)

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

    def _resolve_medications(self, columns: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Codes that are still references become those of their Medication; a mixture is one row per ingredient."""
        table = dict(self._tables["codes"])
        waiting = {text: number for text, number in table.items() if text.startswith(MEDICATION_REFERENCE)}
        if not waiting:
            return columns, list(table)
        medications = last_versions(self.medications)
        resolver = Resolver("Medication", [medication.keys for medication in medications])
        referenced = ReferencedCodes(resolver, [medication.codes for medication in medications])
        codes_of: dict[int, list[int]] = {}
        unknown: list[int] = []
        for text, number in waiting.items():
            codes = referenced.find(text)
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
        if referenced.cut:
            self.report.notes[CUT] += referenced.cut
        nth = np.arange(len(columns["code"])) - np.repeat(starts, repeats)
        first = np.cumsum(times) - times  # of the codes of code i in one list of all
        flat = np.array([code for number in range(len(table)) for code in codes_of.get(number, [number])], np.int32)
        columns["code"] = flat[first[columns["code"]] + nth]
        return columns, list(table)

    def _frame(self, columns: dict[str, np.ndarray], codes: list[str], visit_names: list[str]) -> pl.DataFrame:
        """Sorted event table without repeated rows."""
        rank = code_rank(pl.Series(codes, dtype=pl.String)).to_numpy()
        facts = {
            **{name: columns[name] for name in ("subject_id", "time", "code", "text", "visit", "unit")},
            "value": pl.Series(columns["value"], nan_to_null=True),
            "rank": rank[columns["code"]],
        }
        whole = pl.DataFrame({**facts, "old": columns["old"]})
        # Static rows carry the smallest time: they come first, before any null handling.
        rows = (
            whole.lazy()
            .unique(subset=list(facts), keep="first", maintain_order=True)
            .sort(["subject_id", "time", "rank"], maintain_order=True)
            .collect()
        )
        self.report.duplicates_dropped = whole.height - rows.height
        if columns["old"].any():
            # What only an earlier version of its resource stated; what both say stays where it was stated first.
            stated = whole.filter(~pl.col("old"))
            outdated = (
                rows.with_row_index("row")
                .filter("old")
                .join(stated, on=list(facts), how="anti", nulls_equal=True)["row"]
            )
            if len(outdated):
                self.report.skipped["facts that a later version of their resource no longer states"] += len(outdated)
                rows = rows.with_row_index("row").filter(~pl.col("row").is_in(outdated.implode())).drop("row")
        content = {
            "subject_id": pl.col("subject_id"),
            "time": pl.when(pl.col("time") != TIME_STATIC).then(pl.col("time")),
            "code": _strings(codes, "code"),
            "numeric_value": pl.col("value"),
            "text_value": _strings([None, *list(self._tables["texts"])[1:]], "text"),
            "visit_id": _strings([*visit_names, None], "visit"),
            "unit": _strings([None, *list(self._tables["units"])[1:]], "unit"),
        }
        events = rows.select(content[name].cast(EVENT_SCHEMA[name]).alias(name) for name in EVENT_COLUMNS)
        used = set(rows["code"].unique().to_list())
        descriptions = self.report.code_descriptions
        self.report.code_descriptions = {
            codes[i]: descriptions[codes[i]] for i in sorted(used) if codes[i] in descriptions
        }
        code_of, subject_of = rows["code"].to_numpy(), rows["subject_id"].to_numpy()
        for code, note in (("MEDS_BIRTH", "births"), ("MEDS_DEATH", "deaths")):
            # Resources of one id that contradict each other; every row stays, the earliest counts.
            subjects = subject_of[code_of == codes.index(code)] if code in codes else subject_of[:0]
            if twice := len(subjects) - len(np.unique(subjects)):
                self.report.notes[f"further {note} of a patient who has one"] += twice
        self.report.events_written = events.height
        self.report.subjects = events["subject_id"].n_unique()
        self.report.errors += [error for _, error in sorted(self._errors)][:MAX_ERRORS]
        return events


def _strings(values: list[Any], column: str) -> pl.Expr:
    """A column of indices as the strings they stand for (index -1: the last one)."""
    series = pl.Series(values, dtype=pl.String)
    index = pl.col(column)
    safe = pl.when(index < 0).then(len(values) - 1).otherwise(index)
    return pl.lit(series).gather(safe)

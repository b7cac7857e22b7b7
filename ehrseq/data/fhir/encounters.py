"""Encounters of many patients: which of them a row's reference means, what visit that is part of, when it ended.

An encounter belongs to its patient: rows of another patient do not meet it, and two patients may each have an encounter
`1`. One that names no patient is anybody's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from ehrseq.data.fhir.local_times import NO_OFFSET, moved_by_offset, moved_to_zone, on_the_wall
from ehrseq.data.fhir.references import Resolver, bare_id
from ehrseq.data.fhir.rows import TIME_STATIC, TIME_UNKNOWN
from ehrseq.data.fhir.versions import VisitVersion, last_versions
from ehrseq.data.report import ConversionReport

ANYBODY = -2
"""Stands for the patient of an encounter that names none."""

WITHIN_ANOTHER = (
    "encounters that begin or end with another one of their visit and lie within it, read as a part of that"
)
"""Note of a report."""


class Encounters:
    """The encounters of some patients.

    Args:
        visits: The encounters, with the subject_id of their patient (`ANYBODY`: none is named); several versions of one
            count once.
        report: Takes what is not resolved.
        timezone: Zone of times that state none, where the user gave it.
        uncounted: subject_id whose encounters somebody else counts.

    Attributes:
        names: Ids of the visits.
        offsets: subject_id -> UTC offset in minutes of its latest encounter that states one.
    """

    def __init__(
        self,
        visits: Sequence[VisitVersion],
        report: ConversionReport,
        timezone: str | None = None,
        uncounted: int | None = None,
    ) -> None:
        self._visits = last_versions(visits, key=lambda visit: (visit.keys[0], visit.subject))
        self._report = report
        self._owners = [visit.subject for visit in self._visits]
        self._all = Resolver("Encounter", [visit.keys for visit in self._visits])
        self._contested = self._find_contested()
        self._numbers_of: dict[int, list[int]] = {}
        for number, owner in enumerate(self._owners):
            self._numbers_of.setdefault(owner, []).append(number)
        self._by_owner: dict[int, tuple[Resolver, list[int]]] = {}
        counted = [owner != uncounted for owner in self._owners]
        self._parent = parents = self._parents(counted)
        names: dict[str, int] = {}
        roots = [self._root(number, parents, counted[number]) for number in range(len(self._visits))]
        self._named = [names.setdefault(self._visits[root].id, len(names)) for root in roots]
        self.names = list(names)
        self.offsets = self._offsets()
        self._ends = self._ends_in_utc(timezone)

    def find(self, owner: int, key: str) -> int:
        """Number of the encounter that a reference of a patient's resource means, -1 where there is none."""
        if bare_id(key) not in self._contested:
            number = self._all.find(key)
            return number if number >= 0 and self._owners[number] in (owner, ANYBODY) else -1
        if owner not in self._by_owner:
            own = self._numbers_of.get(owner, [])
            numbers = sorted({*own, *self._numbers_of.get(ANYBODY, [])})
            self._by_owner[owner] = Resolver("Encounter", [self._visits[number].keys for number in numbers]), numbers
        resolver, numbers = self._by_owner[owner]
        place = resolver.find(key)
        return numbers[place] if place >= 0 else -1

    def resolve(
        self, owners: np.ndarray, keys: np.ndarray, table: Mapping[str, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Visit, end, offset and number of the encounter of many rows.

        Args:
            owners: int64 `[n]`, subject_id of each row.
            keys: int32 `[n]`, number of each row's key.
            table: Key -> number; "" is 0.

        Returns:
            int32 `[n]`, position of the visit in `names` or -1; int64 `[n]`, end of the encounter (UTC) or
            `TIME_UNKNOWN`; int32 `[n]`, the UTC offset in minutes that it states or `NO_OFFSET`; int64 `[n]`, its
            number or -1.
        """
        number = np.full(len(table), -1, dtype=np.int64)
        contested = np.zeros(len(table), dtype=bool)
        for key, place in table.items():
            if key:
                contested[place] = bare_id(key) in self._contested
                number[place] = -1 if contested[place] else self._all.find(key)
        encounter = number[keys]
        owner = np.array([*self._owners, ANYBODY], dtype=np.int64)[encounter]
        encounter = np.where((owner == owners) | (owner == ANYBODY), encounter, -1)
        rows = np.flatnonzero(contested[keys])
        if len(rows):
            names = list(table)
            pairs, inverse = np.unique(np.stack([owners[rows], keys[rows]], axis=1), axis=0, return_inverse=True)
            numbers = [self.find(subject, names[key]) for subject, key in pairs.tolist()]
            encounter[rows] = np.array(numbers, dtype=np.int64)[inverse.reshape(-1)]
        visit = np.array([*self._named, -1], dtype=np.int32)[encounter]
        end = np.array([*self._ends, TIME_UNKNOWN], dtype=np.int64)[encounter]
        stated = [NO_OFFSET if visit.offset is None else visit.offset for visit in self._visits]
        return visit, end, np.array([*stated, NO_OFFSET], dtype=np.int32)[encounter], encounter

    def within_others(self, boundaries: pl.DataFrame) -> set[int]:
        """Numbers of the encounters whose rows say nothing that another one's of their visit does not say.

        The levels of one stay (a hospital's, a department's, a ward's encounter) often begin or end at one instant.
        Their rows would then be one row, and the end of the inner encounter that of the outer. Of those that begin
        together the one that ends last stands for all (the outermost, where its end is not known), of those that end
        together the one that begins first.

        Args:
            boundaries: encounter (number), subject_id, visit, code, time, start (whether it is a start or an end).
        """
        if all(parent < 0 for parent in self._parent):
            return set()
        roots = [number for number, parent in enumerate(self._parent) if parent < 0]
        stays = (
            boundaries.filter("start")
            .unique("encounter", keep="last", maintain_order=True)
            .join(
                boundaries.filter(~pl.col("start"))
                .unique("encounter", keep="last", maintain_order=True)
                .select("encounter", pl.col("time").alias("end"), pl.col("code").alias("end_code")),
                on="encounter",
                how="left",
            )
            .with_columns((pl.col("end") != TIME_STATIC).fill_null(value=False).alias("ended"))
            .with_columns(
                pl.when("ended")
                .then("end")
                .when(pl.col("encounter").is_in(roots))
                .then(np.iinfo(np.int64).max)
                .otherwise(TIME_STATIC)
                .alias("reach")
            )
        )
        visit = ["subject_id", "visit", "code"]
        first = stays.sort("reach", "encounter", descending=[True, False]).unique(
            [*visit, "time"], keep="first", maintain_order=True
        )
        ended = first.filter("ended").sort("time", "encounter")
        last = ended.unique([*visit, "end", "end_code"], keep="first", maintain_order=True)
        kept = {*first.filter(~pl.col("ended"))["encounter"], *last["encounter"]}
        return {number for number in stays["encounter"] if number not in kept}

    def zones(self) -> list[tuple[int, int, int]]:
        """Where wall clocks differ from UTC: (subject_id, position of the visit in `names` or -1, offset in minutes).

        -1 stands for all visits of the subject that are not named themselves. An encounter that names no patient tells
        nothing of anybody's wall clock.
        """
        zones: list[tuple[int, int, int]] = []
        told = {owner: offset for owner, offset in self.offsets.items() if owner != ANYBODY}
        zones += [(owner, -1, offset) for owner, offset in told.items() if offset]
        others: dict[tuple[int, int], int] = {}
        for number, visit in enumerate(self._visits):
            if visit.offset is not None and visit.subject != ANYBODY:
                others.setdefault((visit.subject, self._named[number]), visit.offset)
        zones += [(owner, named, offset) for (owner, named), offset in others.items() if offset != told[owner]]
        return zones

    def _ends_in_utc(self, timezone: str | None) -> np.ndarray:
        """The end of each encounter; one without zone in its own, its patient's or the user's."""
        ends = np.array([visit.end for visit in self._visits], dtype=np.int64)
        if not on_the_wall(ends).any():
            return ends
        if timezone is not None:
            return moved_to_zone(ends, timezone)
        offsets = [
            visit.offset if visit.offset is not None else self.offsets.get(visit.subject, 0) for visit in self._visits
        ]
        return moved_by_offset(ends, np.array(offsets, dtype=np.int64))

    def _find_contested(self) -> set[str]:
        """Ids inside keys of encounters of several patients."""
        owner_of: dict[str, int] = {}
        contested: set[str] = set()
        for visit in self._visits:
            for key in visit.keys:
                if owner_of.setdefault(bare_id(key), visit.subject) != visit.subject:
                    contested.add(bare_id(key))
        return contested

    def _parents(self, counted: list[bool]) -> list[int]:
        parents = []
        missing = 0
        for visit, count in zip(self._visits, counted, strict=True):
            parents.append(self.find(visit.subject, visit.part_of) if visit.part_of else -1)
            missing += count and bool(visit.part_of) and parents[-1] < 0
        if missing:
            self._report.unresolved_references["Encounter (partOf)"] += missing
        return parents

    def _root(self, number: int, parents: list[int], counted: bool) -> int:
        """Topmost encounter; a circle of partOf (HL7's own example has one) ends where it closes."""
        seen = {number}
        while parents[number] >= 0 and parents[number] not in seen:
            number = parents[number]
            seen.add(number)
        if parents[number] >= 0 and counted:
            self._report.notes["encounters that are part of themselves"] += 1
        return number

    def _offsets(self) -> dict[int, int]:
        latest: dict[int, tuple[int, int]] = {}
        for visit in self._visits:
            moment = visit.start if visit.start != TIME_UNKNOWN else visit.end
            if visit.offset is not None and moment >= latest.get(visit.subject, (TIME_UNKNOWN, 0))[0]:
                latest[visit.subject] = (moment, visit.offset)
        return {owner: offset for owner, (_, offset) in latest.items()}

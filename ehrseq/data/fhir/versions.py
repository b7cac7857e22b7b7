"""Of a resource that is given several times the last version counts: by `meta.lastUpdated`, then by its place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, TypeVar

import numpy as np
import polars as pl

from ehrseq.data.fhir.blocks import Block
from ehrseq.data.fhir.rows import TIME_UNKNOWN


class Version(NamedTuple):
    """One version of a resource.

    Attributes:
        updated: When it was written (`TIME_UNKNOWN` where it does not say).
        place: Where it stands in the source (`Block.place`).
    """

    updated: int
    place: int


class PatientVersion(NamedTuple):
    """A Patient, see `Extractor.patients`."""

    keys: list[str]
    id: str
    links: list[str]
    version: Version


class VisitVersion(NamedTuple):
    """An Encounter, see `Visit`."""

    keys: list[str]
    id: str
    subject: int
    start: int
    end: int
    offset: int | None
    part_of: str
    version: Version


class MedicationVersion(NamedTuple):
    """A Medication, see `Extractor.medications`."""

    keys: list[str]
    codes: list[str]
    version: Version


_Resource = TypeVar("_Resource", PatientVersion, VisitVersion, MedicationVersion)
_HASH_SEED = 20  # any, but one: rows that meet were perhaps hashed by different processes


def last_versions(
    versions: Iterable[_Resource], *, key: Callable[[_Resource], Hashable] = lambda resource: resource.keys[0]
) -> list[_Resource]:
    """One version of each resource, the last; in the order of the source.

    Args:
        versions: Resources, perhaps several versions of some.
        key: What the versions of a resource have in common.
    """
    last: dict[Hashable, _Resource] = {}
    for resource in sorted(versions, key=lambda resource: resource.version):
        last[key(resource)] = resource
    return sorted(last.values(), key=lambda resource: resource.version.place)


class Deletions:
    """Resources that are deleted: those that were not written again afterwards are as if they had never been given.

    Args:
        deleted: (type and id, when) of each.
    """

    def __init__(self, deleted: Iterable[tuple[str, int]]) -> None:
        self._when: dict[str, int] = {}
        for name, when in deleted:
            self._when[name] = max(when, self._when.get(name, when))
        self._hashes = _hashes(pl.Series(list(self._when), dtype=pl.String))
        self._times = np.fromiter(self._when.values(), dtype=np.int64, count=len(self._when))

    def __bool__(self) -> bool:
        return bool(self._when)

    def rows(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Which rows (bool `[n]`, see `version_columns`) are of resources that are deleted."""
        order = np.argsort(self._hashes)
        hashes, times = self._hashes[order], self._times[order]
        place = np.minimum(np.searchsorted(hashes, columns["resource"]), len(hashes) - 1)
        when, updated = times[place], columns["updated"]
        later = (updated > when) & (when != TIME_UNKNOWN)
        deleted: np.ndarray = (hashes[place] == columns["resource"]) & ~later
        return deleted

    def remaining(self, resources: Iterable[_Resource], kind: str) -> list[_Resource]:
        """The patients, encounters or medications that are not deleted."""
        return [resource for resource in resources if not self._is_deleted(resource, kind)]

    def _is_deleted(self, resource: _Resource, kind: str) -> bool:
        key = resource.keys[0]
        when = self._when.get(key if "://" in key else f"{kind}/{key}")
        return when is not None and (when == TIME_UNKNOWN or resource.version.updated <= when)


def _hashes(names: pl.Series) -> np.ndarray:
    # Of a frame: a series would be hashed by a query, which costs more than the hashes of a small block.
    hashed: np.ndarray = names.to_frame().hash_rows(_HASH_SEED).to_numpy().view(np.int64)
    return hashed


def version_columns(block: Block) -> dict[str, np.ndarray]:
    """Of each row of a block: `place` and `updated` of its resource, and `resource`, a hash of type and id (0 without
    an id).
    """
    sizes = np.frombuffer(block.sizes, dtype=block.sizes.typecode)
    names = pl.Series(block.names, dtype=pl.String)
    hashes = np.where((names == "").to_numpy(), 0, _hashes(names))
    return {
        "place": np.repeat(np.arange(block.place, block.place + len(sizes)), sizes),
        "updated": np.repeat(np.frombuffer(block.updated, dtype=block.updated.typecode), sizes),
        "resource": np.repeat(hashes, sizes),
    }


def old_versions(subject_id: np.ndarray, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, int]:
    """Which rows are of a version that a later one replaces.

    Args:
        subject_id: int64 `[n]`; one id of resources of two patients is no version.
        columns: Those of `version_columns`.

    Returns:
        bool `[n]`; positions of all rows of resources that are given several times; number of versions replaced.
    """
    resource, place, updated = columns["resource"], columns["place"], columns["updated"]
    old = np.zeros(len(resource), dtype=bool)
    named = np.sort(resource[np.diff(place, prepend=-1) != 0])  # once for each version, whose rows stand together
    twice = named[1:][(named[1:] == named[:-1]) & (named[1:] != 0)]
    again = np.flatnonzero(np.isin(resource, twice)) if len(twice) else twice
    if not len(again):
        return old, again, 0
    rows = pl.DataFrame(
        {
            "subject_id": subject_id[again],
            "resource": resource[again],
            "place": place[again],
            "updated": updated[again],
        }
    )
    keys = ["subject_id", "resource"]
    versions = rows.unique(subset=[*keys, "place"])
    last = versions.sort("updated", "place").group_by(keys).agg(pl.col("place").last().alias("last"))
    replaced = versions.height - last.height
    if replaced:
        joined = rows.join(last, on=keys, how="left", maintain_order="left")
        old[again] = (joined["place"] != joined["last"]).to_numpy()
    return old, again, replaced

"""Of a resource that is given several times the last version counts: by `meta.lastUpdated`, then by its place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import numpy as np
import polars as pl

from ehrseq.data.fhir.blocks import Block

Version = tuple[int, int]
"""When a version of a resource was written (`NO_TIME` where it does not say), and where it stands in the source."""

GivenPatient = tuple[list[str], str, Version]
GivenVisit = tuple[list[str], str, int, int, int, int | None, str, Version]
GivenMedication = tuple[list[str], list[str], Version]
"""See `Extractor.patients`, `visits` and `medications`; with the version in place of the index."""

_Given = TypeVar("_Given", GivenPatient, GivenVisit, GivenMedication)
_HASH_SEED = 20  # any, but one: rows that meet were perhaps hashed by different processes


def _first_key(item: Any) -> Hashable:
    return item[0][0]


def last_versions(given: Iterable[_Given], *, key: Callable[[_Given], Hashable] = _first_key) -> list[_Given]:
    """One version of each resource, the last; in the order of the source.

    Args:
        given: Resources, perhaps several versions of some.
        key: What the versions of a resource have in common.
    """
    last: dict[Hashable, _Given] = {}
    for item in sorted(given, key=_version):
        last[key(item)] = item
    return sorted(last.values(), key=_place)


def _version(item: Any) -> Version:
    return item[-1]


def _place(item: Any) -> int:
    return item[-1][1]


def version_columns(block: Block) -> dict[str, np.ndarray]:
    """Of each row of a block: `place` and `updated` of its resource, and `resource`, a hash of type and id (0 without
    an id).
    """
    sizes = np.frombuffer(block.sizes, dtype=block.sizes.typecode)
    names = pl.Series(block.names, dtype=pl.String)
    hashes = np.where((names == "").to_numpy(), 0, names.hash(_HASH_SEED).to_numpy().view(np.int64))
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
    again = np.flatnonzero(pl.Series(resource).is_duplicated().to_numpy() & (resource != 0))
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

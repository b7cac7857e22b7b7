"""Times that state no zone meet the zone that they were written in, by one rule.

The zone is the one that the user gives; without that the offset that the row's own encounter states, else that of the
patient's latest encounter that states one, else UTC. What was assumed is counted.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from ehrseq.data.fhir.rows import ON_THE_WALL
from ehrseq.data.instants import walls_to_utc
from ehrseq.data.report import ConversionReport
from ehrseq.tokenization.ehr_codes import DAY_US, MINUTE_US

NO_OFFSET = np.iinfo(np.int32).min
"""Stands for an encounter that states no offset."""


def on_the_wall(times: np.ndarray) -> np.ndarray:
    """Which times state no zone, bool `[n]`."""
    marked: np.ndarray = times > ON_THE_WALL // 2
    return marked


def moved_by_offset(times: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Times, those on the wall as UTC.

    Args:
        times: int64 `[n]`.
        offsets: int64 `[n]`, UTC offset of each in minutes.
    """
    marked = on_the_wall(times)
    return np.where(marked, times - ON_THE_WALL - offsets * MINUTE_US, times)


def moved_to_zone(times: np.ndarray, name: str) -> np.ndarray:
    """Times, those on the wall as UTC.

    Args:
        times: int64 `[n]`.
        name: Zone of those that state none.
    """
    marked = np.flatnonzero(on_the_wall(times))
    if not len(marked):
        return times
    wall = pl.Series(times[marked] - ON_THE_WALL).cast(pl.Datetime("us"))
    times = times.copy()
    times[marked] = pl.select(walls_to_utc(pl.lit(wall), name).cast(pl.Int64)).to_series().to_numpy()
    return times


def move_rows(
    columns: dict[str, np.ndarray],
    offsets: np.ndarray,
    latest: Mapping[int, int],
    timezone: str | None,
    report: ConversionReport,
) -> np.ndarray:
    """Times of rows in UTC.

    Args:
        columns: `time` and `subject_id`, int64 `[n]`.
        offsets: int32 `[n]`, the offset that the encounter of each row states, or `NO_OFFSET`.
        latest: subject_id -> offset of the latest encounter that states one.
        timezone: What the user gave.
        report: Takes what was assumed.
    """
    time, subject_id = columns["time"], columns["subject_id"]
    marked = np.flatnonzero(on_the_wall(time))
    if not len(marked):
        return time
    wall = time[marked] - ON_THE_WALL
    days = int(np.count_nonzero(wall % DAY_US == DAY_US - 1))
    if days:
        report.notes["dates without a time, read as the end of the day"] += days
    if timezone is not None:
        report.notes[f"dates and times without a zone, read in {timezone} (given)"] += len(marked)
        return moved_to_zone(time, timezone)
    own = offsets[marked].astype(np.int64)
    owners, inverse = np.unique(subject_id[marked], return_inverse=True)
    theirs = np.array([latest.get(int(owner), NO_OFFSET) for owner in owners], dtype=np.int64)[inverse]
    offset = np.where(own != NO_OFFSET, own, theirs)
    unknown = offset == NO_OFFSET
    offset = np.where(unknown, 0, offset)
    for count, note in (
        (
            np.count_nonzero(unknown),
            "dates and times without a zone, read as UTC: no encounter of the patient states one",
        ),
        (np.count_nonzero(offset), "dates moved to the zone of the patient's encounters"),
    ):
        if count:
            report.notes[note] += int(count)
    time = time.copy()
    time[marked] = wall - offset * MINUTE_US
    return time

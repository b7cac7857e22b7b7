"""Periods of encounters: when a stay began, when it ended, and what is known where its end is not.

The start is the first instant of a date, the end the last, so that a stay of one day is not empty however precisely
either is given. An end that stands for none (year 9999), or that lies before the start, is unknown.

| status of an encounter without a usable end | row |
|---|---|
| ended (`finished`, R5 `completed`, `discharged` ...) | `VISIT_END//<disposition or class>` without time |
| going on (`in-progress`, `arrived`, `triaged`, `onleave` ...) | `VISIT_END//in-progress` without time |
| `unknown`, absent | none |
"""

from __future__ import annotations

from collections import Counter
from datetime import tzinfo
from functools import lru_cache
from typing import Any

from ehrseq.data.fhir.rows import ON_THE_WALL, TIME_UNKNOWN, Times
from ehrseq.data.instants import LONGEST_STAY_US, offset_minutes, wall_to_utc
from ehrseq.tokenization.ehr_codes import MINUTE_US

OVER = frozenset(("finished", "completed", "discharged", "discontinued"))
"""Statuses of an encounter that has ended."""

ONGOING = frozenset(("in-progress", "arrived", "triaged", "onleave", "on-hold"))
"""Statuses of an encounter that goes on."""

STILL_THERE = "in-progress"
"""Name of the end, without time, of an encounter that goes on."""


def plain_status(status: Any) -> Any:
    """A status as FHIR writes it: `FINISHED` and `In Progress` are sent, too. What is no text stays."""
    return _plain_text(status) if isinstance(status, str) else status


@lru_cache(maxsize=1000)
def _plain_text(status: str) -> str:
    return "-".join(status.casefold().replace("_", " ").split())


def span_of(
    period: Any, times: Times, starts: Times, zone: tzinfo | None, counts: Counter[tuple[str, str]]
) -> tuple[int, int, int | None]:
    """When an encounter was.

    Args:
        period: Its Period, None where it has none.
        times, starts: Last and first instants of dates.
        zone: The hospital's, None where the user did not say.
        counts: Takes what is to be told.

    Returns:
        Start and end, or `TIME_UNKNOWN`, and the UTC offset in minutes that either states.

    Raises:
        ValueError: A date that is none.
    """
    period = period or {}
    start, end = period.get("start"), period.get("end")
    started = starts[start] if start else TIME_UNKNOWN
    ended = times[end] if end else TIME_UNKNOWN
    if (start and started == TIME_UNKNOWN) or (end and ended == TIME_UNKNOWN):
        counts["notes", "encounters with a placeholder (year 0001, 9999 ...) as start or end, read as unknown"] += 1
    # What stands for no time states no zone either: 9999-12-31T23:59:59Z, or year 1 in local mean time.
    offset = offset_minutes(start) if started != TIME_UNKNOWN else None
    if offset is None and ended != TIME_UNKNOWN:
        offset = offset_minutes(end)
    if started != TIME_UNKNOWN and ended != TIME_UNKNOWN:
        # Of two times only one of which has a zone the other is in the same.
        if started > ON_THE_WALL // 2 > ended:
            started = _absolute(started, offset, zone, first=True)
        elif ended > ON_THE_WALL // 2 > started:
            ended = _absolute(ended, offset, zone, first=False)
        if ended < started:
            counts["notes", "encounters that end before they start: end unknown"] += 1
            ended = TIME_UNKNOWN
        elif ended - started > LONGEST_STAY_US:
            counts["notes", "encounters that end 50 years after their start or later: end unknown"] += 1
            ended = TIME_UNKNOWN
    return started, ended, offset


def _absolute(time: int, offset: int | None, zone: tzinfo | None, *, first: bool) -> int:
    wall = time - ON_THE_WALL
    return wall_to_utc(wall, zone, first=first) if zone is not None else wall - (offset or 0) * MINUTE_US

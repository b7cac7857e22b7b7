"""Visits: which encounters there are, and when a visit ends.

An *encounter* is one VISIT_START / VISIT_END pair; a *visit* is what the rows make of them: overlapping encounters
are one visit, a same-day transfer between admissions too, and rows outside every encounter form implicit visits.
Segmentation is an online process: the visit of a row depends on rows at or before it only, so that cutting a
tokenised history equals tokenising the cut one. `ehr_sequence.py` holds the rules as a plain state machine.

Where the end of an encounter is not recorded, it would hold its visit open for good. So an encounter *lapses*:

- It lapses when a row of another visit_id, or of none, arrives more than `silence_us` of its class after the last row
  of its visit_id. A VISIT_END never makes another encounter lapse. An encounter without a visit_id is made to lapse by
  rows without one as well, since nobody knows whether they belong to it.
- It then counts as ended at its last row. Once no other encounter is open, the visit is closed.
- A VISIT_END that comes after all closes nothing, and later rows of that visit_id come too late for the visit.
- Encounters that share a visit_id lapse together, after the longest silence allowed to those that have started since
  none of them was open.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from .ehr_codes import DAY_US, INPATIENT_CLASSES, RANK_START

SILENCE_DAYS = {**dict.fromkeys([*sorted(INPATIENT_CLASSES), "ICU"], 30), "EMER": 3, "OBSENC": 3}
"""Days without a row of its own after which an open encounter of a class lapses."""
OTHER_SILENCE_DAYS = 1
"""The same for all other classes: an outpatient visit."""


def silence_us(encounter_class: str | None) -> int:
    """Microseconds without a row of its own after which an open encounter lapses."""
    return SILENCE_DAYS.get(encounter_class or "", OTHER_SILENCE_DAYS) * DAY_US


Boundary: TypeAlias = tuple[int, int, str | None, str | None]
"""Time, rank (`RANK_START` or `RANK_END`), encounter class and visit_id of a start or an end of an encounter."""


@dataclass(slots=True)
class Encounter:
    """An encounter; `end` is None where it is open."""

    visit_id: str | None
    encounter_class: str | None
    start: int
    end: int | None = None


def pair_encounters(boundaries: Iterable[Boundary]) -> tuple[list[Encounter], int]:
    """The encounters of one subject.

    Args:
        boundaries: Starts and ends, in the order of time and rank.

    Returns:
        The encounters, in the order of their starts, and the number of ends that close nothing.
    """
    encounters: list[Encounter] = []
    by_visit: dict[str | None, list[tuple[int, str | None, Encounter | None]]] = {}
    for time, rank, encounter_class, visit_id in boundaries:
        started: Encounter | None = None
        if rank == RANK_START:
            started = Encounter(visit_id, encounter_class, time)
            encounters.append(started)
        by_visit.setdefault(visit_id, []).append((time, encounter_class, started))
    return encounters, sum(_pair_ends(visit_id, rows) for visit_id, rows in by_visit.items())


def _pair_ends(visit_id: str | None, rows: list[tuple[int, str | None, Encounter | None]]) -> int:
    """Write the end of each encounter of one visit_id; returns the number of ends that close nothing.

    Args:
        visit_id: The id that the rows share.
        rows: (time, class, encounter that starts; None at an end), in order.
    """
    # 1. Ends of a class that has an open encounter. The others, of a class without one as well, are left for any
    # encounter.
    paired: set[int] = set()  # positions of starts, and of ends
    open_of_class: dict[str | None, list[tuple[int, Encounter]]] = {}
    for position, (time, encounter_class, started) in enumerate(rows):
        stack = open_of_class.setdefault(encounter_class, [])
        if started is not None:
            stack.append((position, started))
        elif stack:
            start, encounter = stack.pop()
            encounter.end = time
            paired |= {start, position}
    # 2. Any end, any encounter.
    unpaired = 0
    waiting: list[Encounter] = []
    for position, (time, _, started) in enumerate(rows):
        if position in paired:
            continue
        if started is not None:
            waiting.append(started)
        elif waiting:
            outside = (
                [k for k, encounter in enumerate(waiting) if encounter.encounter_class not in INPATIENT_CLASSES]
                if visit_id is not None
                else []
            )
            waiting.pop(outside[-1] if outside else -1).end = time
        else:
            unpaired += 1
    return unpaired

"""Visits of a table of events: encounters, and which visit each row belongs to.

An *encounter* is one VISIT_START / VISIT_END pair; a *visit* is what the rows make of them: overlapping encounters
are one visit, a same-day transfer between admissions too, and rows outside every encounter form implicit visits.
Segmentation is an online process: the visit of a row depends on rows at or before it only, so that cutting a
tokenised history equals tokenising the cut one. `ehr_sequence.py` holds the same rules as a plain state machine.

Encounters whose end is not recorded would hold their visit open for good. So a silent encounter *lapses*: when a row
arrives that is not its own, later than `silence_us` of its class after the last row of its visit_id, then it counts as
over, and the visit as closed at its last row, as soon as no other encounter is open. Ends never make another encounter
lapse; of rows without a visit_id nobody knows whose they are, so they do, also where the silent encounter has none. An
end that comes after all finds nothing to close, and later rows of that visit_id are late ones. Encounters that share a
visit_id lapse together, by the longest patience among those started since none of them was open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .ehr_codes import DAY_US, INPATIENT_CLASSES

# Order at one instant inside a subject: birth, visit starts, everything else in source order, visit ends, death.
RANK_STATIC, RANK_BIRTH, RANK_START, RANK_OTHER, RANK_END, RANK_DEATH = range(6)
KIND_RANKS = {"birth": RANK_BIRTH, "visit_start": RANK_START, "visit_end": RANK_END, "death": RANK_DEATH}

SILENCE_DAYS = {**dict.fromkeys([*sorted(INPATIENT_CLASSES), "ICU"], 30), "EMER": 3, "OBSENC": 3}
"""Days without a row of its own after which an open encounter of a class lapses."""
OTHER_SILENCE_DAYS = 1
"""The same for all other classes: an outpatient visit."""


def silence_us(encounter_class: str | None) -> int:
    """Microseconds without a row of its own after which an open encounter lapses."""
    return SILENCE_DAYS.get(encounter_class or "", OTHER_SILENCE_DAYS) * DAY_US


def pair_ends(visit_id: str | None, rows: Sequence[tuple[str, str | None, Any]]) -> int:
    """Write the end of each encounter of one visit_id.

    Args:
        visit_id: The id that the rows share.
        rows: In time order, (kind, class, encounter) of a start and (kind, class, time) of an end; the encounter is
            [subject, visit_id, class, start, end].

    Returns:
        Number of ends that close nothing.
    """
    # 1. Ends of a class that has an open encounter. The others, of a class without one as well, are left for any
    # encounter.
    taken: set[int] = set()  # positions of starts and ends that have found each other
    open_of_class: dict[str | None, list[int]] = {}
    for position, (kind, encounter_class, content) in enumerate(rows):
        stack = open_of_class.setdefault(encounter_class, [])
        if kind == "visit_start":
            stack.append(position)
        elif stack:
            start = stack.pop()
            rows[start][2][4] = content
            taken |= {start, position}
    # 2. Any end, any encounter.
    unpaired = 0
    waiting: list[list[Any]] = []
    for position, (kind, _, content) in enumerate(rows):
        if position in taken:
            continue
        if kind == "visit_start":
            waiting.append(content)
        elif waiting:
            outside = (
                [k for k, encounter in enumerate(waiting) if encounter[2] not in INPATIENT_CLASSES]
                if visit_id is not None
                else []
            )
            waiting.pop(outside[-1] if outside else -1)[4] = content
        else:
            unpaired += 1
    return unpaired

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
from typing import TYPE_CHECKING, Any

from ehrseq.data.tables import as_column, check_columns, microseconds, require

from .ehr_codes import INPATIENT_CLASSES, code_kinds, split_kind
from .ehr_vocabulary import DAY_US

if TYPE_CHECKING:
    try:  # noqa: SIM105  (guarded, or transformers would ask for polars before it loads this file from a checkpoint)
        import polars as pl
    except ImportError:
        pass

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


def encounters(
    events: pl.DataFrame, code_map: Sequence[Sequence[str]] | None = None, *, report: dict[str, int] | None = None
) -> pl.DataFrame:
    """Encounters of every subject.

    A VISIT_END closes the latest open encounter of its class and visit_id (a child encounter shares its root's
    visit_id). One that does not tell its class (it carries a discharge disposition) closes what no such end is left
    for: an emergency, ICU or outpatient encounter before an inpatient one, which outlasts the others of its visit,
    and the latest of several. Ends and starts without visit_id pair among themselves, the latest first.

    Args:
        events: Event table; `visit_id` is optional, rows may stand in any order.
        code_map: [regular expression, kind] pairs, default `DEFAULT_CODE_MAP`.
        report: Where given, receives the counts `encounters`, `open_encounters`, `unpaired_visit_ends` and
            `visit_rows_without_time`.

    Returns:
        `subject_id` Int64, `visit_id` String (null where the source has none), `encounter_class` String, `start` and
        `end` Datetime("us"), `end` null where the encounter is still open; sorted by subject and start.

    Raises:
        ValueError: A required column is missing.
    """
    pl = require("polars")
    events = check_columns(events, ("subject_id", "time", "code"), "encounters(): the event table")
    unique = events["code"].unique().drop_nulls().cast(pl.String).to_list()
    boundary = {
        code: split_kind(kind)
        for code, kind in zip(unique, code_kinds(unique, code_map), strict=True)
        if kind.startswith("visit_")
    }
    rows = (
        events.select(
            as_column(events, "subject_id", pl.Int64, "events"),
            microseconds(events, "time", "events"),
            as_column(events, "code", pl.String, "events"),
            as_column(events, "visit_id", pl.String, "events"),
        )
        .filter(pl.col("code").is_in(list(boundary)))
        .with_columns(
            pl.col("code")
            .replace_strict({c: KIND_RANKS[k[0]] for c, k in boundary.items()}, return_dtype=pl.Int8, default=None)
            .alias("rank")
        )
    )
    untimed = rows["time"].null_count()
    rows = rows.filter(pl.col("time").is_not_null()).sort("subject_id", "time", "rank", maintain_order=True)

    found: list[list[Any]] = []  # subject, visit_id, class, start, end
    unpaired = 0
    subject: int | None = None
    by_visit: dict[str | None, list[tuple[str, str | None, Any]]] = {}
    for row_subject, time, code, visit_id, _ in rows.iter_rows():
        if row_subject != subject:
            unpaired += sum(pair_ends(visit, of_visit) for visit, of_visit in by_visit.items())
            subject, by_visit = row_subject, {}
        kind, encounter_class = boundary[code]
        if kind == "visit_start":
            found.append([row_subject, visit_id, encounter_class, time, None])
        by_visit.setdefault(visit_id, []).append((kind, encounter_class, found[-1] if kind == "visit_start" else time))
    unpaired += sum(pair_ends(visit, of_visit) for visit, of_visit in by_visit.items())
    if report is not None:
        report["encounters"] = report.get("encounters", 0) + len(found)
        report["open_encounters"] = report.get("open_encounters", 0) + sum(row[4] is None for row in found)
        report["unpaired_visit_ends"] = report.get("unpaired_visit_ends", 0) + unpaired
        report["visit_rows_without_time"] = report.get("visit_rows_without_time", 0) + untimed
    schema = {
        "subject_id": pl.Int64,
        "visit_id": pl.String,
        "encounter_class": pl.String,
        "start": pl.Int64,
        "end": pl.Int64,
    }
    table = pl.DataFrame(found, schema=schema, orient="row")
    return table.with_columns(pl.col("start", "end").cast(pl.Datetime("us"))).sort(
        "subject_id", "start", maintain_order=True
    )


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

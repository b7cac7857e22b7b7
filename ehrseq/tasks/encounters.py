"""Encounters of a table of events: each VISIT_START with its VISIT_END, and what is known of an end without a time.

A VISIT_END whose time is null says that the encounter of its visit_id is over and nobody knows since when;
`VISIT_END//in-progress` without a time says that it goes on, by the source's own word; one that says that the patient
died (`VISIT_END//exp`), that it went on until the death. None of them enters a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import Any

import polars as pl

from ehrseq.data.instants import LONGEST_STAY_US
from ehrseq.data.tables import as_column, check_columns, microseconds
from ehrseq.tokenization.ehr_codes import (
    EXPIRED,
    GOES_ON,
    INPATIENT_CLASSES,
    KIND_RANKS,
    RANK_END,
    code_kinds,
    split_kind,
)
from ehrseq.tokenization.ehr_visits import Encounter, pair_encounters

ENDED, CONTINUES = "ended", "in_progress"
"""What a source says of an encounter without an end: it is over, nobody knows since when; it goes on."""

_BOUNDARY = ("subject_id", "time", "rank", "class", "visit_id")


def encounters(
    events: pl.DataFrame,
    code_map: Sequence[Sequence[str]] | None = None,
    *,
    until: datetime | None = None,
    report: dict[str, int] | None = None,
) -> pl.DataFrame:
    """Encounters of every subject.

    A VISIT_END closes the latest open encounter of its class and visit_id (a child encounter shares its root's
    visit_id). One that does not tell its class (it carries a discharge disposition) closes what no such end is left
    for: an emergency, ICU or outpatient encounter before an inpatient one, which outlasts the others of its visit,
    and the latest of several. Ends and starts without visit_id pair among themselves, the latest first.

    One that ended in death at an unknown time goes on until the death, as one does whose patient died in it.

    An encounter whose visit_id has an end that closes nothing (it stands before the start) has ended, nobody knows
    when; so has one whose end stands without a time, or further away than anybody stays (`LONGEST_STAY_US`).

    Args:
        events: Event table; `visit_id` is optional, rows may stand in any order.
        code_map: [regular expression, kind] pairs, default `DEFAULT_CODE_MAP`.
        until: End of the data: encounters that start later are left out, those that end later go on.
        report: Where given, receives the counts `encounters`, `open_encounters`, `unpaired_visit_ends` and
            `visit_rows_without_time`.

    Returns:
        `subject_id` Int64, `visit_id` String (null where the source has none), `encounter_class` String, `start` and
        `end` Datetime("us"), `end` null where none is known, `open` String: of those without an end `ENDED`,
        `CONTINUES` or null (the source does not say); sorted by subject and start.

    Raises:
        ValueError: A required column is missing.
    """
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
        .select(
            "subject_id",
            "time",
            _replaced({code: KIND_RANKS[kind] for code, (kind, _) in boundary.items()}, pl.Int8).alias("rank"),
            _replaced({code: of_class for code, (_, of_class) in boundary.items()}, pl.String).alias("class"),
            "visit_id",
            pl.when(pl.col("code").str.contains(GOES_ON) | pl.col("code").str.contains(EXPIRED))
            .then(pl.lit(CONTINUES))
            .otherwise(pl.lit(ENDED))
            .alias("word"),
        )
    )
    untimed = rows.filter(pl.col("time").is_null())
    rows = rows.filter(pl.col("time").is_not_null()).sort("subject_id", "time", "rank", maintain_order=True)
    words: dict[int, list[tuple[str | None, str | None, str]]] = {}
    untimed_ends = untimed.filter(pl.col("rank") == RANK_END)
    for subject, of_class, visit_id, word in untimed_ends.select("subject_id", "class", "visit_id", "word").iter_rows():
        words.setdefault(subject, []).append((of_class, visit_id, word))

    visits: list[tuple[int, str | None, str | None, int, int | None, str | None]] = []
    unpaired = 0
    for subject, group in groupby(rows.select(_BOUNDARY).iter_rows(), key=itemgetter(0)):
        of_subject = [row[1:] for row in group]
        of_one, closing_nothing = pair_encounters(of_subject)
        said: dict[int, str] = {}
        if closing_nothing:
            said = _ended_before_their_start(of_one, of_subject)
        for encounter in of_one:
            if encounter.end is not None and encounter.end - encounter.start > LONGEST_STAY_US:
                encounter.end, said[id(encounter)] = None, ENDED
        for word in words.get(subject, ()):
            _say(of_one, said, *word)
        visits += [
            (subject, e.visit_id, e.encounter_class, e.start, e.end, said.get(id(e)) if e.end is None else None)
            for e in of_one
        ]
        unpaired += closing_nothing
    schema = {
        "subject_id": pl.Int64,
        "visit_id": pl.String,
        "encounter_class": pl.String,
        "start": pl.Int64,
        "end": pl.Int64,
        "open": pl.String,
    }
    table = (
        pl.DataFrame(visits, schema=schema, orient="row")
        .with_columns(pl.col("start", "end").cast(pl.Datetime("us")))
        .sort("subject_id", "start", maintain_order=True)
    )
    if until is not None:
        late = (pl.col("end") > until).fill_null(False)
        table = table.filter(pl.col("start") <= until).with_columns(
            pl.when(late).then(pl.lit(CONTINUES)).otherwise("open").alias("open"),
            pl.when(~late).then("end").alias("end"),
        )
    if report is not None:
        counts = {
            "encounters": table.height,
            "open_encounters": table["end"].null_count(),
            "unpaired_visit_ends": unpaired,
            "visit_rows_without_time": untimed.height,
        }
        for name, count in counts.items():
            report[name] = report.get(name, 0) + count
    return table


def _ended_before_their_start(of_one: Iterable[Encounter], rows: Sequence[tuple[Any, ...]]) -> dict[int, str]:
    """The open encounters of visit_ids that have more ends than encounters that end."""
    surplus: dict[str | None, int] = {}
    for _, rank, _, visit_id in rows:
        surplus[visit_id] = surplus.get(visit_id, 0) + (rank == RANK_END)
    for encounter in of_one:
        surplus[encounter.visit_id] -= encounter.end is not None
    return {id(e): ENDED for e in of_one if e.end is None and e.visit_id is not None and surplus.get(e.visit_id, 0) > 0}


def _say(
    of_one: Iterable[Encounter], said: dict[int, str], of_class: str | None, visit_id: str | None, word: str
) -> None:
    """Write the word of an end without a time to the open encounter of its visit_id that it is about."""
    candidates = [e for e in of_one if e.end is None and e.visit_id == visit_id and id(e) not in said]
    if visit_id is None or not candidates:
        return
    of_its_class = [e for e in candidates if e.encounter_class == of_class]
    inpatient = [e for e in candidates if e.encounter_class in INPATIENT_CLASSES]
    said[id((of_its_class or inpatient or candidates)[-1])] = word


def _replaced(of_code: dict[str, Any], dtype: type[pl.DataType]) -> pl.Expr:
    """What a dictionary says of each code."""
    return pl.col("code").replace_strict(of_code, return_dtype=dtype, default=None)

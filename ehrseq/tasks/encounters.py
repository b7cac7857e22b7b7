"""Encounters of a table of events: each VISIT_START with its VISIT_END."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import polars as pl

from ehrseq.data.tables import as_column, check_columns, microseconds
from ehrseq.tokenization.ehr_codes import KIND_RANKS, code_kinds, split_kind
from ehrseq.tokenization.ehr_visits import pair_encounters


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
        )
    )
    untimed = rows["time"].null_count()
    rows = rows.filter(pl.col("time").is_not_null()).sort("subject_id", "time", "rank", maintain_order=True)

    visits: list[tuple[int, str | None, str | None, int, int | None]] = []
    unpaired = 0
    for subject, of_subject in groupby(rows.iter_rows(), key=itemgetter(0)):
        of_one, closing_nothing = pair_encounters(row[1:] for row in of_subject)
        visits += [(subject, e.visit_id, e.encounter_class, e.start, e.end) for e in of_one]
        unpaired += closing_nothing
    if report is not None:
        report["encounters"] = report.get("encounters", 0) + len(visits)
        report["open_encounters"] = report.get("open_encounters", 0) + sum(row[4] is None for row in visits)
        report["unpaired_visit_ends"] = report.get("unpaired_visit_ends", 0) + unpaired
        report["visit_rows_without_time"] = report.get("visit_rows_without_time", 0) + untimed
    schema = {
        "subject_id": pl.Int64,
        "visit_id": pl.String,
        "encounter_class": pl.String,
        "start": pl.Int64,
        "end": pl.Int64,
    }
    table = pl.DataFrame(visits, schema=schema, orient="row")
    return table.with_columns(pl.col("start", "end").cast(pl.Datetime("us"))).sort(
        "subject_id", "start", maintain_order=True
    )


def _replaced(of_code: dict[str, Any], dtype: type[pl.DataType]) -> pl.Expr:
    """What a dictionary says of each code."""
    return pl.col("code").replace_strict(of_code, return_dtype=dtype, default=None)

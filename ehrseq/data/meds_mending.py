"""What files of other converters write otherwise than the event table does, brought to its form, row by row.

- Birth and death under other codes become `MEDS_BIRTH` and `MEDS_DEATH`: those of MEDS before 0.3 and codes of SNOMED
  CT that say so (`OLD_CODES`), the words themselves in any spelling (`SPELLINGS`), every `Death Type` of OMOP. A row
  whose value says no (`DEATH` with 0) stays as it is, and so do codes that the user's code map names.
- A column `end` on the row of a visit (meds_etl) becomes a row `VISIT_END//<class>` at that time, and one without a
  time where it lies before the start: the visit is over, nobody knows since when.
- A placeholder (before the year 2, from 2999 on, midnight of 1900-01-01 and its like) as the end of a visit or as a
  death is the same without a time; any other row before the year 2 or from 2999 on is left out.
- A death at midnight, under whatever code, is a date: it moves to the end of its day.

Each row is mended by itself, so that a part of a file gives what the whole file would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime

import polars as pl

from ehrseq.data.instants import FIRST_YEAR, LAST_YEAR, PLACEHOLDER_DAYS
from ehrseq.data.metadata import CodeMap
from ehrseq.data.schema import BIRTH_CODE, DEATH_CODE, EVENT_COLUMNS, code_rank
from ehrseq.data.unread_codes import SNOMED_DEATHS, looks_like_death, says_no
from ehrseq.tokenization.ehr_codes import (
    RANK_DEATH,
    RANK_END,
    code_kinds,
    is_unknown_omop_visit,
    split_kind,
    unmapped_codes,
)

_SNOMED = {"184099003": BIRTH_CODE, "3950001": BIRTH_CODE} | dict.fromkeys(sorted(SNOMED_DEATHS), DEATH_CODE)
OLD_CODES = {f"SNOMED{slash}{code}": new for slash in ("/", "//") for code, new in _SNOMED.items()} | {
    "Condition Type/OMOP4822053": DEATH_CODE,
    "Death Type/OMOP generated": DEATH_CODE,
}
"""Codes of birth and death that MEDS before 0.3, FEMR, meds_etl and exports of SNOMED CT write -> those of today."""

SPELLINGS = {
    "death": DEATH_CODE,
    "deceased": DEATH_CODE,
    "dod": DEATH_CODE,
    "meds death": DEATH_CODE,
    "meds birth": BIRTH_CODE,
}
"""Whole codes in any case, `_` and `-` like a blank -> those of today; of deaths also what a first slash ends."""

DEATH_TYPE = "Death Type/"
"""How OMOP's codes of where a death is known from begin; each is a death."""

_FIRST, _AFTER = datetime(FIRST_YEAR, 1, 1), datetime(LAST_YEAR + 1, 1, 1)
_FIRST_DAYS = [datetime.fromisoformat(day) for day in sorted(PLACEHOLDER_DAYS)]


def mend_rows(
    events: pl.DataFrame, ends: pl.Series | None, code_map: CodeMap | None = None
) -> tuple[pl.DataFrame, Counter[str]]:
    """Mend rows of a foreign dataset.

    Args:
        events: Checked rows (`validate_events`), in any order.
        ends: The end of each row, Datetime("us"), where the file has such a column.
        code_map: What tells which rows are visits; default `DEFAULT_CODE_MAP`.

    Returns:
        The rows, unsorted, and what was mended, counted.
    """
    notes: Counter[str] = Counter()
    codes = events["code"].unique()
    todays = {code: new for code in codes if (new := _code_of_today(code)) not in (None, code)}
    todays = {code: todays[code] for code in unmapped_codes(todays, code_map)}
    if todays:
        is_other = pl.col("code").is_in(list(todays)) & ~says_no(events.columns)
        notes["births and deaths under other codes than those of today"] += int(events.select(is_other.sum()).item())
        events = events.with_columns(pl.when(is_other).then(pl.col("code").replace(todays)).otherwise("code"))
    named = codes.filter(codes.str.starts_with("Visit")).to_list()
    kind_of = dict(zip(named, code_kinds(named, code_map), strict=True))
    unknown = [code for code in named if kind_of[code] == "visit_start:AMB" and is_unknown_omop_visit(code)]
    for code, rows in events.filter(pl.col("code").is_in(unknown))["code"].value_counts().iter_rows():
        notes[f"visits of kinds not known, read as AMB: {code}"] += rows
    if ends is not None and ends.null_count() < len(ends):
        events = _with_ends(events, ends, dict(zip(codes, code_kinds(codes.to_list(), code_map), strict=True)), notes)
    deaths = []
    if code_map is not None:
        deaths = [code for code, kind in zip(codes, code_kinds(codes, code_map), strict=True) if kind == "death"]
    events = _without_placeholders(events, deaths, notes)
    return _deaths_at_the_end_of_their_day(events, deaths, notes), notes


def _code_of_today(code: str) -> str | None:
    """`MEDS_BIRTH` or `MEDS_DEATH` of a code that is one of them by another name."""
    if code.startswith(DEATH_TYPE):
        return DEATH_CODE
    if code in OLD_CODES:
        return OLD_CODES[code]
    first, *more = code.split("/", 1)
    of_today = SPELLINGS.get(first.strip().casefold().replace("_", " ").replace("-", " "))
    return of_today if not more or (of_today == DEATH_CODE and looks_like_death(code)) else None


def _with_ends(events: pl.DataFrame, ends: pl.Series, kind_of: Mapping[str, str], notes: Counter[str]) -> pl.DataFrame:
    """Adds a row for the end of each visit that has one."""
    kinds = {code: split_kind(kind) for code, kind in kind_of.items()}
    classes = {code: of for code, (kind, of) in kinds.items() if kind == "visit_start"}
    if not classes:
        return events
    late = events.with_columns(ends.alias("end")).filter(
        pl.col("end").is_not_null() & pl.col("code").is_in(list(classes))
    )
    before = pl.col("end") < pl.col("time")
    notes["visits whose end stands in a column"] += late.height
    notes["visits that end before their start, end unknown"] += int(late.select(before.sum()).item())
    rows = late.select(
        "subject_id",
        pl.when(~before).then(pl.col("end")).alias("time"),
        (pl.lit("VISIT_END//") + pl.col("code").replace_strict(classes, return_dtype=pl.String)).alias("code"),
        *(pl.lit(None, events.schema[name]).alias(name) for name in ("numeric_value", "text_value")),
        "visit_id",
        pl.lit(None, pl.String).alias("unit"),
    )
    return pl.concat([events, rows.select(EVENT_COLUMNS)])


def _without_placeholders(events: pl.DataFrame, deaths: list[str], notes: Counter[str]) -> pl.DataFrame:
    """Ends and deaths at placeholders lose their time, other rows go.

    Args:
        events: The rows.
        deaths: Codes that the user says are deaths.
        notes: Counts.
    """
    time = pl.col("time")
    is_outside = (time < _FIRST) | (time >= _AFTER)
    is_placeholder = is_outside | (time.is_in(_FIRST_DAYS))
    suspects = events.select(pl.col("code").filter(is_placeholder).unique())["code"]
    if suspects.is_empty():
        return events
    happened = suspects.filter(code_rank(suspects).is_in([RANK_END, RANK_DEATH]) | suspects.is_in(deaths))
    untimed = is_placeholder & pl.col("code").is_in(happened.implode())
    lost = is_outside & ~pl.col("code").is_in(happened.implode())
    counts = events.select(untimed=untimed.sum(), lost=lost.sum()).row(0)
    notes["ends of visits and deaths at a placeholder (0001, 1900, 9999), time unknown"] += counts[0]
    notes["rows at a placeholder (0001, 9999), left out"] += counts[1]
    return events.filter(~lost.fill_null(value=False)).with_columns(
        pl.when(~untimed.fill_null(value=False)).then(time).alias("time")
    )


def _deaths_at_the_end_of_their_day(events: pl.DataFrame, deaths: list[str], notes: Counter[str]) -> pl.DataFrame:
    """A death at 00:00:00 is a date (MIMIC-IV's `dod`), and a death known to the day is the end of that day.

    At its first instant it would stand before everything of the patient's last day, and be known before it happened.
    """
    is_death = pl.col("code").str.starts_with(DEATH_CODE) | pl.col("code").is_in(deaths)
    is_date = is_death & (pl.col("time") == pl.col("time").dt.truncate("1d"))
    moved = int(events.select(is_date.sum()).item())
    notes["deaths known to the day"] += moved
    if not moved:
        return events
    end_of_day = pl.col("time") + pl.duration(days=1) - pl.duration(microseconds=1)
    return events.with_columns(pl.when(is_date).then(end_of_day).otherwise("time").alias("time"))

"""Outcomes that are values: which rows are measurements of what (`Measure`), and when one is the outcome (`Rule`).

    outcome:
      event: value
      values:                                     # rows that measure it, brought to one unit
        - {codes: ['^LAB//LOINC//2160-0$'], unit: mg/dL}
        - {codes: ['^LAB//LOINC//2160-0$'], unit: umol/L, times: 0.011312}
        - {codes: ['^Weight'], times: 0.45359237}          # without a unit: of any
      any_of:                                     # one of these makes the outcome
        - {at_least: 4.0}
        - {rise: 0.3, within: 48h}                # over the lowest of the 48 hours before the measurement
        - {rise_to: 1.5, within: 7d}              # to 1.5 times that
        - {fall_to: 0.95, within: 30d, since: prediction}   # from the last value known at the prediction time

Some sources write the unit into the code (`LAB//RESULT//50912//mg/dL` of MIMIC-IV as MEDS): where a row has no unit of
its own, what stands behind the last `//` is its unit and what stands before it its code.

Sources write numbers in single precision: comparisons leave out the last millionth of a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import polars as pl

from ehrseq.data.units import canonical_unit

LIMITS = ("above", "below", "at_least", "at_most")
"""Kinds of rules about a value by itself."""

CHANGES = ("rise", "fall", "rise_to", "fall_to")
"""Kinds of rules about a value and an earlier one: by how much it lies above or below it, or at which multiple."""

SINCE = ("window", "prediction")
"""What a change is counted from: the extreme of the values in the time `within` before each measurement, itself
excluded, or the last value known at the prediction time, at most `within` old."""

_UNIT_IN_CODE = r"^(.+//.+)//(/?[^/]+(?:/[^/]+)*)$"
_RELATIVE = 1e-6  # of a value: what single precision may have lost of it


@dataclass(frozen=True)
class Measure:
    """Rows that measure something.

    Attributes:
        codes: Regular expressions (Rust syntax, searched anywhere in the code).
        unit: Unit that the row must have, however it is spelled (`canonical_unit`); None: any.
        times: Factor that brings the value to the unit of the rules.
    """

    codes: tuple[str, ...]
    unit: str | None = None
    times: float = 1.0


@dataclass(frozen=True)
class Rule:
    """When a value is the outcome.

    Attributes:
        kind: One of `LIMITS` or `CHANGES`.
        amount: Threshold, difference or multiple.
        within: How far back a change may reach; zero for limits.
        since: One of `SINCE`.
    """

    kind: str
    amount: float
    within: timedelta = timedelta(0)
    since: str = "window"


def select_values(rows: pl.DataFrame, measures: tuple[Measure, ...]) -> pl.DataFrame:
    """subject_id, time, value (Float64, in the unit of the rules), sorted; rows without a time or a number left out.

    Args:
        rows: subject_id, time, code, numeric_value, unit.
        measures: The first that fits a row reads it.
    """
    in_code = pl.col("unit").is_null() & pl.col("code").str.contains(_UNIT_IN_CODE)
    unit = pl.when(in_code).then(pl.col("code").str.extract(_UNIT_IN_CODE, 2)).otherwise("unit")
    code = pl.when(in_code).then(code_without_unit()).otherwise("code")
    rows = rows.with_columns(unit.fill_null("").alias("plain"), code.alias("base"))
    spellings = rows["plain"].unique().to_list()
    known = {spelling: canonical_unit(spelling) for spelling in spellings}
    rows = rows.with_columns(pl.col("plain").replace_strict(known, return_dtype=pl.String))
    chain = pl.lit(None, pl.Float64)
    for measure in reversed(measures):
        of = "code" if measure.unit is None else "base"
        fits = pl.any_horizontal(pl.col(of).str.contains(pattern) for pattern in measure.codes)
        if measure.unit is not None:
            fits &= pl.col("plain") == canonical_unit(measure.unit)
        chain = pl.when(fits).then(pl.col("numeric_value").cast(pl.Float64) * measure.times).otherwise(chain)
    return (
        rows.filter(pl.col("time").is_not_null() & pl.col("numeric_value").is_finite())
        .select("subject_id", "time", chain.alias("value"))
        .drop_nulls("value")
        .sort("subject_id", "time", "value")
    )


def code_without_unit() -> pl.Expr:
    """The column `code` without the unit at its end, null where it has none."""
    return pl.col("code").str.extract(_UNIT_IN_CODE, 1)


def value_columns(
    table: pl.DataFrame, values: pl.DataFrame, rules: tuple[Rule, ...], end_of_data: pl.Expr
) -> dict[str, pl.Series]:
    """What the values say about each candidate.

    Args:
        table: Candidates: subject_id, start (of the stay), prediction_time, horizon_end (null: open, then the end of
            the data); any may be null.
        values: As `select_values` gives them.
        rules: The outcome.
        end_of_data: Last instant that the data cover.

    Returns:
        `value_hit` (a rule holds within the horizon), `value_earlier` (one held between the start of the stay and the
        prediction time, both included), `value_measured` (anything is measured within the horizon), `value_baseline`
        (what a change since the prediction is counted from is known).
    """
    bounds = table.select(
        "subject_id", "start", "prediction_time", pl.coalesce("horizon_end", end_of_data).alias("horizon_end")
    )
    at = {name: _count_until(values, bounds, name) for name in ("prediction_time", "horizon_end")}
    at["before_start"] = _count_until(values, bounds.with_columns(pl.col("start").dt.offset_by("-1us")), "start")
    first, last = at["prediction_time"], np.maximum(at["prediction_time"], at["horizon_end"])
    flags = np.zeros(len(values), np.int64)
    for rule in rules:
        if rule.since == "window":
            flags |= _holds(values, rule)
    total = np.concatenate([[0], np.cumsum(flags)])
    hit = total[last] > total[first]
    has_baseline = np.ones(len(bounds), bool)
    for rule in rules:
        if rule.since == "prediction":
            baseline = _baseline(values, bounds, first, rule.within)
            has_baseline &= ~np.isnan(baseline)
            hit |= _changed(values["value"].to_numpy(), baseline, first, last, rule)
    return {
        "value_hit": pl.Series(hit),
        "value_earlier": pl.Series(total[first] > total[np.minimum(at["before_start"], first)]),
        "value_measured": pl.Series(last > first),
        "value_baseline": pl.Series(has_baseline),
    }


def _count_until(values: pl.DataFrame, bounds: pl.DataFrame, name: str) -> np.ndarray:
    """For each candidate the values of smaller subjects, and its own up to and including a moment: [candidates]."""
    query = bounds.select("subject_id", pl.col(name).alias("time")).with_row_index("place")
    both = pl.concat(
        [
            values.select(pl.lit(None, pl.UInt32).alias("place"), "subject_id", "time", pl.lit(0).alias("kind")),
            # Without a moment nothing counts: it sorts before every value of the subject.
            query.select("place", "subject_id", "time", pl.lit(1).alias("kind")),
        ]
    ).sort("subject_id", "time", "kind", nulls_last=False)
    through = both.select("place", pl.col("place").is_null().cum_sum().alias("n")).drop_nulls("place").sort("place")
    return through["n"].to_numpy().astype(np.int64)


def _holds(values: pl.DataFrame, rule: Rule) -> np.ndarray:
    """Whether each value makes the outcome by a rule that needs no prediction time: [values] 0 or 1."""
    value = pl.col("value")
    slack = value.abs() * _RELATIVE
    if rule.kind in LIMITS:
        amount = rule.amount
        limits = {
            "above": value > amount + slack,
            "below": value < amount - slack,
            "at_least": value >= amount - slack,
            "at_most": value <= amount + slack,
        }
        return values.select(limits[rule.kind].alias("holds"))["holds"].cast(pl.Int64).to_numpy()
    down = rule.kind in ("fall", "fall_to")
    window: Mapping[str, object] = {"window_size": rule.within, "closed": "left"}
    extreme = value.rolling_max_by("time", **window) if down else value.rolling_min_by("time", **window)  # type: ignore[arg-type]
    held = values.with_columns(extreme.over("subject_id").alias("reference")).select(
        _change(value, pl.col("reference"), rule).fill_null(False).cast(pl.Int64).alias("holds")
    )
    return held["holds"].to_numpy()


def _change(value: pl.Expr, reference: pl.Expr, rule: Rule) -> pl.Expr:
    slack = value.abs() * _RELATIVE
    match rule.kind:
        case "rise":
            return value - reference >= rule.amount - slack
        case "fall":
            return reference - value >= rule.amount - slack
        case "rise_to":
            return value >= rule.amount * reference - slack
        case _:
            return value <= rule.amount * reference + slack


def _baseline(values: pl.DataFrame, bounds: pl.DataFrame, first: np.ndarray, within: timedelta) -> np.ndarray:
    """The last value at or before each prediction time, NaN where there is none or it is too old: [candidates]."""
    place = np.maximum(first - 1, 0)
    if not len(values):
        return np.full(len(bounds), np.nan)
    rows = values[place]
    ours = (rows["subject_id"] == bounds["subject_id"]) & (rows["time"] >= bounds["prediction_time"] - within)
    known = ours.fill_null(False).to_numpy() & (first > 0)
    return np.where(known, rows["value"].to_numpy(), np.nan)


def _changed(values: np.ndarray, baseline: np.ndarray, first: np.ndarray, last: np.ndarray, rule: Rule) -> np.ndarray:
    """Whether any value within the horizon has changed so much from the baseline: [candidates]."""
    rows = np.flatnonzero((last > first) & ~np.isnan(baseline))
    out = np.zeros(len(first), bool)
    if not len(rows):
        return out
    down = rule.kind in ("fall", "fall_to")
    # Every second piece of `reduceat` is one candidate's; a number behind the last makes its end a place.
    edges = np.stack([first[rows], last[rows]], axis=1).reshape(-1)
    padded = np.append(values, np.inf if down else -np.inf)
    reduce = np.minimum if down else np.maximum
    extreme = reduce.reduceat(padded, edges)[::2]
    frame = pl.DataFrame({"value": extreme, "reference": baseline[rows]})
    out[rows] = frame.select(_change(pl.col("value"), pl.col("reference"), rule).alias("c"))["c"].to_numpy()
    return out

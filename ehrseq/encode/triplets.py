"""The triplet view of a MEDS dataset: (time, variable, value) of every stay, columnar.

    table = build_triplets(events, PHYSIONET2012, labels)               # numpy arrays and offsets
    spec = TripletSpec(select_variables(events, prefixes=["LAB//"], min_subjects=20), window_hours=24)
    table = build_triplets(events, spec, labels)                        # any other MEDS dataset

What becomes triplets is a `TripletSpec` (see `ehrseq.tokenization.triplet_stays`, whose `read_stay` makes the same of
one patient). Nothing later than the prediction time enters: neither a triplet nor a static value.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from ehrseq.data.physionet2012.codes import (
    ADMISSION_CODE,
    AGE_CODE,
    GENDER_CODES,
    HEIGHT_CODE,
    ICU_TYPE_CODES,
    VARIABLES,
    WINDOW_HOURS,
)
from ehrseq.data.schema import BIRTH_CODE, DEATH_CODE, validate_labels
from ehrseq.data.units import canonical_unit
from ehrseq.tokenization.ehr_codes import MINUTE_US, YEAR_US
from ehrseq.tokenization.triplet_stays import StaticFeature, TripletSpec

logger = logging.getLogger(__name__)

PHYSIONET2012 = TripletSpec(
    variables=tuple((name, (code,)) for name, code in VARIABLES.items()),
    static_features=(
        StaticFeature("Age", "numeric", (AGE_CODE,)),
        StaticFeature("Gender", "category", GENDER_CODES, drop_first=True, missing_flag=True),
        StaticFeature("Height", "numeric", (HEIGHT_CODE,), missing_flag=True),
        StaticFeature("ICUType", "category", ICU_TYPE_CODES),
    ),
    window_hours=WINDOW_HOURS,
    start_codes=f"^{ADMISSION_CODE}$",
)
"""The challenge of 2012 as STraTS and HyMaTE read it: 37 variables, 48 hours, 9 static columns."""

_BLOCK = 20_000  # stays joined with their subjects' rows at a time: bounds the memory of many stays a subject


@dataclass(frozen=True)
class TripletTable:
    """Stays as triplets.

    Attributes:
        spec: What became triplets.
        subject_ids: `[s]` int64 subject of each stay.
        starts: `[s]` datetime64[us], the window's start.
        prediction_times: `[s]` datetime64[us]; nothing later was read.
        offsets: `[s + 1]` int64: stay k holds the triplets offsets[k] to offsets[k + 1].
        minutes: `[n]` float64 minutes since the window's start, ascending in a stay.
        variable_ids: `[n]` int64, ascending among equal minutes.
        values: `[n]` float64, as measured.
        static: `[s, D]` float64, as measured; NaN = unknown.
        labels: `[s]` int64, 0 or 1; None where no labels were given.
        skipped: Reason -> number of stays or rows that were left out.
    """

    spec: TripletSpec
    subject_ids: NDArray[np.int64]
    starts: NDArray[np.datetime64]
    prediction_times: NDArray[np.datetime64]
    offsets: NDArray[np.int64]
    minutes: NDArray[np.float64]
    variable_ids: NDArray[np.int64]
    values: NDArray[np.float64]
    static: NDArray[np.float64]
    labels: NDArray[np.int64] | None = None
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.subject_ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[s]` triplets of each stay."""
        return np.diff(self.offsets)

    @property
    def stay_ids(self) -> NDArray[np.int64]:
        """`[n]` stay of each triplet."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def row(self, stay: int) -> dict[str, Any]:
        """One stay as the feature extractor takes it: subject_id, times (minutes), variables (ids), values, static."""
        if not -len(self) <= stay < len(self):
            raise IndexError(f"stay {stay} is outside 0..{len(self) - 1}")
        stay %= len(self)
        place = slice(int(self.offsets[stay]), int(self.offsets[stay + 1]))
        return {
            "subject_id": int(self.subject_ids[stay]),
            "times": self.minutes[place],
            "variables": self.variable_ids[place],
            "values": self.values[place],
            "static": self.static[stay],
        }

    def subset(self, stays: ArrayLike) -> TripletTable:
        """The table of these stays (positions, or a mask `[s]` of bools), in this order."""
        chosen = np.asarray(stays)
        rows = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        if chosen.dtype == bool and len(chosen) != len(self):
            raise ValueError(f"a mask of {len(chosen)} stays was given, the table has {len(self)}.")
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64)
        places = np.repeat(self.offsets[:-1][rows] - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])
        return replace(
            self,
            subject_ids=self.subject_ids[rows],
            starts=self.starts[rows],
            prediction_times=self.prediction_times[rows],
            offsets=offsets,
            minutes=self.minutes[places],
            variable_ids=self.variable_ids[places],
            values=self.values[places],
            static=self.static[rows],
            labels=None if self.labels is None else self.labels[rows],
            skipped=Counter(),
        )

    def of_subjects(self, subject_ids: Any) -> TripletTable:
        """The table of the stays of these subjects."""
        return self.subset(np.isin(self.subject_ids, np.asarray(subject_ids)))


def select_variables(
    events: pl.DataFrame,
    *,
    prefixes: Sequence[str] | None = None,
    min_count: int = 1,
    min_subjects: int = 1,
    max_variables: int | None = None,
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Codes with numeric values as variables of a `TripletSpec`, each under its own name, in alphabetical order.

    Args:
        events: Event table of the training subjects.
        prefixes: Only codes that begin with one of these; None = all.
        min_count: Numeric rows that a code needs.
        min_subjects: Subjects that a code needs.
        max_variables: The most frequent ones stay.

    Raises:
        ValueError: No code is left.
    """
    rows = events.filter(pl.col("time").is_not_null() & pl.col("numeric_value").is_not_null())
    if prefixes is not None:
        rows = rows.filter(pl.any_horizontal(pl.col("code").str.starts_with(prefix) for prefix in prefixes))
    counts = rows.group_by("code").agg(pl.len().alias("rows"), pl.col("subject_id").n_unique().alias("subjects"))
    kept = counts.filter((pl.col("rows") >= min_count) & (pl.col("subjects") >= min_subjects))
    kept = kept.sort("rows", "code", descending=[True, False]).head(max_variables or kept.height)
    if kept.is_empty():
        raise ValueError(
            f"no code with numeric values has {min_count} rows of {min_subjects} subjects"
            f"{'' if prefixes is None else f' and begins with one of {list(prefixes)}'}; lower the thresholds."
        )
    return tuple((code, (code,)) for code in sorted(kept["code"].to_list()))


def variable_units(events: pl.DataFrame, spec: TripletSpec) -> dict[str, str]:
    """Unit of each variable, as the events write it; variables whose rows have none, or several, are absent.

    Args:
        events: Event table of the training subjects.
        spec: What becomes triplets.
    """
    if "unit" not in events.columns:
        return {}
    names = {code: name for name, codes in spec.variables for code in codes}
    rows = events.filter(pl.col("code").is_in(list(names)) & pl.col("numeric_value").is_not_null())
    pairs = rows.select("code", "unit").drop_nulls().unique().sort("code", "unit").iter_rows()
    units: dict[str, dict[str, str]] = {}
    for code, unit in pairs:
        units.setdefault(names[code], {}).setdefault(canonical_unit(unit), unit)
    return {name: next(iter(units[name].values())) for name in spec.variable_names if len(units.get(name, {})) == 1}


class NoStayError(ValueError):
    """No stay begins in the events: an error of a whole dataset, nothing special in a part of one."""


def build_triplets(
    events: pl.DataFrame, spec: TripletSpec, labels: pl.DataFrame | None = None, *, keep_empty: bool = False
) -> TripletTable:
    """Cut the stays out of an event table.

    Args:
        events: Event table (see `ehrseq.data.schema`), rows in any order.
        spec: What becomes triplets.
        labels: Label table: one stay a row, which ends at its prediction_time; without the column boolean_value the
            stays have no labels. None: one stay for each start (each admission; each subject with "first_event"), which
            ends with its window.
        keep_empty: Keep stays without a triplet; by default they are left out, counted.

    Returns:
        The stays, by subject and prediction time, and what was left out in `skipped`.

    Raises:
        NoStayError: No stay at all, a ValueError.
        ValueError: A label table that is none, or "before_prediction" without labels.
    """
    skipped: Counter[str] = Counter()
    ids = spec.code_ids
    used = {code for feature in spec.static_features for code in feature.codes} | {BIRTH_CODE, DEATH_CODE}
    stays = _stays(events, spec, labels, skipped)
    if stays.is_empty():
        raise NoStayError(
            f"no stay begins in these events ({dict(skipped)}): window_start={spec.window_start!r}, start_codes="
            f"{spec.start_codes!r}. Are they the codes of this dataset's admissions?"
        )
    code_ids = pl.DataFrame(
        {"code": list(ids), "variable": list(ids.values())}, schema_overrides={"variable": pl.Int64}
    )
    numeric = events.filter(pl.col("time").is_not_null() & pl.col("numeric_value").is_not_null())
    finite = numeric.filter(pl.col("numeric_value").is_finite())
    if finite.height < numeric.height:
        skipped["values that are NaN, infinite or beyond float32"] += numeric.height - finite.height
    other = finite.filter(~pl.col("code").is_in([*ids, *used])).height
    if other:
        skipped["numeric rows of codes that are no variable"] += other
    measured = finite.join(code_ids, on="code").select("subject_id", "time", "variable", "numeric_value")
    parts = [_triplets(measured, block, skipped) for block in stays.iter_slices(_BLOCK)]
    triplets = pl.concat(parts)

    lengths = np.bincount(triplets["stay"].to_numpy(), minlength=stays.height).astype(np.int64)
    table = TripletTable(
        spec=spec,
        subject_ids=stays["subject_id"].to_numpy(),
        starts=stays["start"].to_numpy(),
        prediction_times=stays["prediction_time"].to_numpy(),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        minutes=triplets["micros"].to_numpy() / MINUTE_US,
        variable_ids=triplets["variable"].to_numpy(),
        values=triplets["value"].to_numpy(),
        static=_static(events, spec, stays),
        labels=stays["label"].to_numpy().astype(np.int64) if "label" in stays.columns else None,
    )
    empty = int((lengths == 0).sum())
    if empty and not keep_empty:
        skipped["stays without a triplet"] += empty
        table = table.subset(lengths > 0)
    if not len(table):
        raise ValueError(
            f"none of {stays.height} stays holds a row of the {len(ids)} codes of spec.variables; are they this "
            "dataset's codes?"
        )
    left_out = {
        reason: count for reason, count in skipped.items() if reason != "numeric rows of codes that are no variable"
    }
    if left_out:
        logger.info(f"Triplets of {len(table)} stays; left out: {left_out}.")
    return replace(table, skipped=skipped)


def _stays(events: pl.DataFrame, spec: TripletSpec, labels: pl.DataFrame | None, skipped: Counter[str]) -> pl.DataFrame:
    """Columns stay (row number), subject_id, start, end, prediction_time, label?; sorted."""
    window = pl.duration(microseconds=round(spec.window_minutes * MINUTE_US))
    starts = _starts(events, spec)
    if labels is None:
        if spec.window_start == "before_prediction":
            raise ValueError("window_start='before_prediction' needs labels (or a table of prediction times).")
        stays = starts.with_columns((pl.col("start") + window).alias("prediction_time"))
    else:
        if "boolean_value" in labels.columns:
            asked = validate_labels(labels).rename({"boolean_value": "label"})
        else:
            asked = validate_labels(labels.with_columns(boolean_value=pl.lit(False))).drop("boolean_value")
        known = asked.filter(pl.col("subject_id").is_in(events["subject_id"].unique().implode()))
        if known.height < asked.height:
            skipped["labels of subjects without events"] += asked.height - known.height
        if spec.window_start == "before_prediction":
            stays = known.with_columns((pl.col("prediction_time") - window).alias("start"))
        else:
            stays = known.join_asof(
                starts,
                left_on="prediction_time",
                right_on="start",
                by="subject_id",
                coalesce=False,
                check_sortedness=False,
            )
            without = stays["start"].null_count()
            if without:
                skipped["labels without a window that begins before them"] += without
            stays = stays.filter(pl.col("start").is_not_null())
    stays = stays.with_columns(pl.min_horizontal(pl.col("start") + window, "prediction_time").alias("end"))
    return stays.sort("subject_id", "prediction_time", maintain_order=True).with_row_index("stay")


def _starts(events: pl.DataFrame, spec: TripletSpec) -> pl.DataFrame:
    """Columns subject_id, start of every window, sorted."""
    timed = events.filter(pl.col("time").is_not_null())
    if spec.window_start == "first_event":
        timed = timed.filter(~pl.col("code").is_in([BIRTH_CODE, DEATH_CODE]))
        starts = timed.group_by("subject_id").agg(pl.col("time").min().alias("start"))
    else:
        codes = [code for code in timed["code"].unique().to_list() if spec.is_start(code)]
        starts = timed.filter(pl.col("code").is_in(codes)).select("subject_id", pl.col("time").alias("start")).unique()
    return starts.sort("start", "subject_id")


def _triplets(measured: pl.DataFrame, stays: pl.DataFrame, skipped: Counter[str]) -> pl.DataFrame:
    """Columns stay, micros (since the start), variable, value of some stays, in order, repeated ones left out."""
    rows = measured.join(stays.select("stay", "subject_id", "start", "end"), on="subject_id").filter(
        pl.col("time").is_between("start", "end")
    )
    rows = rows.select(
        "stay",
        (pl.col("time") - pl.col("start")).dt.total_microseconds().alias("micros"),
        "variable",
        pl.col("numeric_value").cast(pl.Float64).alias("value"),
    )
    distinct = rows.unique()
    if distinct.height < rows.height:
        skipped["repeated triplets"] += rows.height - distinct.height
    return distinct.sort("stay", "micros", "variable", "value")


def _static(events: pl.DataFrame, spec: TripletSpec, stays: pl.DataFrame) -> NDArray[np.float64]:
    """`[s, D]` static values, NaN = unknown."""
    out = np.full((stays.height, len(spec.static_columns)), np.nan)
    column = 0
    for feature in spec.static_features:
        codes = [BIRTH_CODE] if feature.kind == "age" else list(feature.codes)
        rows = events.filter(pl.col("code").is_in(codes))
        if feature.kind == "numeric":
            rows = rows.filter(pl.col("numeric_value").is_finite())
        elif feature.kind == "age":
            rows = rows.filter(pl.col("time").is_not_null())
        first = (
            rows.select("subject_id", "time", "code", pl.col("numeric_value").cast(pl.Float64).alias("value"))
            .sort("time", nulls_last=False, maintain_order=True)
            .join(
                stays.select("stay", "subject_id", "start", "prediction_time"), on="subject_id", maintain_order="left"
            )
            .filter(pl.col("time").is_null() | (pl.col("time") <= pl.col("prediction_time")))
            .unique("stay", keep="first", maintain_order=True)
        )
        at = first["stay"].to_numpy()
        width = len(feature.columns) - feature.missing_flag
        block = np.full((stays.height, width), np.nan)
        if feature.kind == "age":
            micros = (first["start"] - first["time"]).dt.total_microseconds().to_numpy()
            block[at, 0] = np.maximum(0.0, micros / YEAR_US)
        elif feature.kind == "numeric":
            block[at, 0] = first["value"].to_numpy()
        else:
            shown = list(feature.codes[feature.drop_first :])
            block[at] = np.stack([(first["code"] == code).to_numpy() for code in shown], axis=1).astype(np.float64)
        out[:, column : column + width] = block
        if feature.missing_flag:
            out[:, column + width] = np.isnan(block[:, 0])
        column += len(feature.columns)
    return out


__all__ = [
    "PHYSIONET2012",
    "StaticFeature",
    "TripletSpec",
    "TripletTable",
    "build_triplets",
    "select_variables",
    "variable_units",
]


def hold_out_stays(table: TripletTable, share: float = 0.2, seed: int = 0) -> tuple[TripletTable, TripletTable]:
    """Split stays into training and tuning ones, by subject, with as many positives a share in both.

    Args:
        table: Stays with labels.
        share: Share of the tuning stays.
        seed: Seed.

    Returns:
        (training stays, tuning stays).

    Raises:
        ValueError: No labels, or too few stays of a class.
    """
    if table.labels is None:
        raise ValueError("the stays have no labels; build the table with build_triplets(events, spec, labels).")
    subjects = np.unique(table.subject_ids)
    positive = np.zeros(len(subjects), bool)
    np.logical_or.at(positive, np.searchsorted(subjects, table.subject_ids), table.labels > 0)
    rng = np.random.default_rng(seed)
    tuning: list[np.ndarray] = []
    for kind in (False, True):
        own = subjects[positive == kind]
        count = round(share * len(own))
        if not 0 < count < len(own):
            raise ValueError(
                f"{len(own)} {'positive' if kind else 'negative'} subjects cannot be split by {share:g}: expected "
                "some of them on both sides."
            )
        tuning.append(rng.permutation(own)[:count])
    held = np.isin(table.subject_ids, np.concatenate(tuning))
    return table.subset(~held), table.subset(held)

"""Does the score serve all patients alike, and does it last? Metrics by subgroup and by year, against all others.

Every difference is of a subgroup to the rest of the patients, with its interval under resamples of all patients. The
intervals are not adjusted for the number of subgroups: of twenty, one is expected to exclude 0 by chance alone. A cell
with fewer patients, positives or negatives than the minimum is not estimable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.evaluation.bootstrap import Interval, MetricOfWeights, bootstrap_intervals
from ehrseq.evaluation.calibration import check_probabilities
from ehrseq.evaluation.metrics import FloatArray, Ranking, check_scores
from ehrseq.evaluation.reports import NOT_ESTIMABLE

MIN_PATIENTS = 20
MIN_CLASS_ROWS = 20
AGE_BANDS = (18, 40, 65, 80)
UNKNOWN = "unknown"
# First parts of codes that say what a patient is, in the package's own form and in MIMIC-IV's of MEDS.
STATIC_CODES = {"sex": ("GENDER", "SEX"), "ethnicity": ("ETHNICITY", "RACE"), "site": ("SITE", "HOSPITAL")}
_DAYS_A_YEAR = 365.25

GROUP_METRICS = {
    "auroc": "AUROC",
    "sensitivity": "sensitivity",
    "false_positive_rate": "false positive rate",
    "calibration_gap": "mean score - prevalence",
}


@dataclass(frozen=True)
class Subgroup:
    """One subgroup's metrics and their differences to the rest.

    Attributes:
        attribute: What divides the patients, for example "sex".
        value: The subgroup's value.
        patients: Patients with a row in it.
        labels: Rows.
        positives: Positive rows.
        metrics: Name of `GROUP_METRICS` -> the metric with its interval.
        differences: Name -> subgroup minus rest with its interval; empty where the rest is too small.
        reason: Why nothing could be estimated, None where it was.
    """

    attribute: str
    value: str
    patients: int
    labels: int
    positives: int
    metrics: Mapping[str, Interval]
    differences: Mapping[str, Interval]
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def row_attributes(
    table: pl.DataFrame, events: pl.DataFrame | None = None, *, age_bands: Sequence[float] = AGE_BANDS
) -> pl.DataFrame:
    """What divides the rows: sex, ethnicity and site where the record has them, age band and year of the prediction.

    Args:
        table: Rows with subject_id and prediction_time.
        events: MEDS events of these patients: `MEDS_BIRTH`, and static codes such as `GENDER//F` or `RACE//ASIAN`;
            None = only the year is known.
        age_bands: Years at which bands begin, rising; the first band is everything below.

    Returns:
        A column a property, a row a row of `table`; "unknown" where the record is silent. A property that the record
        of no patient holds has no column.

    Raises:
        ValueError: Bands that do not rise.
    """
    if list(age_bands) != sorted(set(age_bands)):
        raise ValueError(f"age_bands got {list(age_bands)}; expected rising years.")
    columns: dict[str, pl.Series] = {} if events is None else _of_record(table, events, age_bands)
    columns["year"] = table["prediction_time"].dt.year().cast(pl.String)
    return pl.DataFrame(columns)


def _of_record(table: pl.DataFrame, events: pl.DataFrame, age_bands: Sequence[float]) -> dict[str, pl.Series]:
    """What the events say about the patient of each row."""
    columns: dict[str, pl.Series] = {}
    parts = pl.col("code").str.split_exact("//", 1)
    of_patients = events.select("subject_id", parts.struct.field("field_0").alias("kind"), "code")
    for name, kinds in STATIC_CODES.items():
        known = (
            of_patients.filter(pl.col("kind").is_in(kinds))
            .with_columns(value=pl.col("code").str.replace(r"^[^/]+//", ""))
            .filter(pl.col("value") != pl.col("kind"))
            .unique("subject_id", keep="first", maintain_order=True)
        )
        if known.height:
            joined = table.select("subject_id").join(
                known.select("subject_id", "value"), on="subject_id", how="left", maintain_order="left"
            )
            columns[name] = joined["value"].fill_null(UNKNOWN)
    births = (
        events.filter((pl.col("code") == "MEDS_BIRTH") & pl.col("time").is_not_null())
        .unique("subject_id", keep="first", maintain_order=True)
        .select("subject_id", birth="time")
    )
    if births.height:
        joined = table.select("subject_id", "prediction_time").join(
            births, on="subject_id", how="left", maintain_order="left"
        )
        years = ((joined["prediction_time"] - joined["birth"]).dt.total_hours() / 24 / _DAYS_A_YEAR).to_numpy()
        columns["age"] = pl.Series([_band(age, age_bands) for age in years])
    return columns


def assess_subgroups(
    table: pl.DataFrame,
    attributes: pl.DataFrame,
    *,
    threshold: float = 0.5,
    min_patients: int = MIN_PATIENTS,
    min_class_rows: int = MIN_CLASS_ROWS,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[Subgroup]:
    """Metrics of every value of every attribute, against all other rows.

    Args:
        table: What `match_predictions` returns: subject_id, prediction_time, label, score.
        attributes: A column a property and a row a row of `table`; nulls count as "unknown".
        threshold: From which score on a row counts as predicted positive.
        min_patients: Patients below which a subgroup, or the rest, is not estimable.
        min_class_rows: Positive and negative rows, likewise.
        num_resamples: Bootstrap resamples of all patients.
        seed: Seed of the bootstrap.

    Returns:
        Subgroups by attribute, then by value.

    Raises:
        ValueError: Another number of rows, scores outside [0, 1], minima below 1.
    """
    if attributes.height != table.height:
        raise ValueError(
            f"attributes have {attributes.height:,} rows, the table {table.height:,}: one each is expected."
        )
    if min_patients < 1 or min_class_rows < 1:
        raise ValueError(f"expected minima of at least 1, got {min_patients} patients and {min_class_rows} rows.")
    check_probabilities(table["score"].to_numpy())
    groups = []
    for attribute in attributes.columns:
        values = attributes[attribute].cast(pl.String).fill_null(UNKNOWN).to_numpy()
        for value in sorted(set(values)):
            inside = values == value
            groups.append(
                _subgroup(
                    table, attribute, str(value), inside, threshold, (min_patients, min_class_rows), num_resamples, seed
                )
            )
    return groups


def subgroup_columns(subgroups: Sequence[Subgroup]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of subgroups, as texts."""
    titles = [text for title in GROUP_METRICS.values() for text in (title, "against the rest")]
    rows = []
    for group in subgroups:
        counts = [f"{group.patients:,}", f"{group.labels:,}", f"{group.positives:,}"]
        if group.reason is not None:
            cells = [f"{NOT_ESTIMABLE}: {group.reason}", *[""] * (2 * len(GROUP_METRICS) - 1)]
        else:
            both = (group.metrics, group.differences)
            cells = [str(each[name]) if name in each else "-" for name in GROUP_METRICS for each in both]
        rows.append([f"{group.attribute}: {group.value}", *counts, *cells])
    return ["subgroup", "patients", "labels", "positives", *titles], rows


def subgroup_table(subgroups: Sequence[Subgroup]) -> str:
    """The subgroups as a Markdown table."""
    header, rows = subgroup_columns(subgroups)
    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _band(age: float, bands: Sequence[float]) -> str:
    if not math.isfinite(age):
        return UNKNOWN
    place = int(np.searchsorted(bands, age, side="right"))
    if place == 0:
        return f"below {bands[0]:g}" if bands else "all"
    return f"{bands[place - 1]:g} and over" if place == len(bands) else f"{bands[place - 1]:g} to {bands[place]:g}"


class _Cell:
    """The metrics of some of the rows, under weights of all rows."""

    def __init__(self, truth: NDArray[np.bool_], scores: FloatArray, rows: NDArray[np.bool_], threshold: float) -> None:
        self.rows = np.flatnonzero(rows)
        self.truth, self.scores = truth[rows], scores[rows]
        self.ranking = Ranking(self.truth, self.scores)
        self.predicted = self.scores >= threshold

    def ways(self) -> Iterator[tuple[str, MetricOfWeights]]:
        """(name, metric of weights `[B, all rows]`)."""
        negative = ~self.truth
        yield "auroc", lambda w: self.ranking.auroc(None if w is None else w[:, self.rows])
        yield "sensitivity", lambda w: self._mean(w, self.predicted, self.truth)
        yield "false_positive_rate", lambda w: self._mean(w, self.predicted, negative)
        yield "calibration_gap", lambda w: self._mean(w, self.scores - self.truth, np.ones(len(self.rows), bool))

    def _mean(self, weights: FloatArray | None, values: NDArray[Any], among: NDArray[np.bool_]) -> FloatArray:
        drawn = np.ones((1, len(self.rows))) if weights is None else weights[:, self.rows]
        with np.errstate(invalid="ignore", divide="ignore"):
            return drawn @ (values * among).astype(np.float64) / (drawn @ among.astype(np.float64))


def _too_small(patients: int, positives: int, negatives: int, minima: tuple[int, int]) -> str | None:
    if patients < minima[0]:
        return f"{patients} patients (needs {minima[0]})"
    for count, name in ((positives, "positives"), (negatives, "negatives")):
        if count < minima[1]:
            return f"{count} {name} (needs {minima[1]})"
    return None


def _subgroup(
    table: pl.DataFrame,
    attribute: str,
    value: str,
    inside: NDArray[np.bool_],
    threshold: float,
    minima: tuple[int, int],
    num_resamples: int,
    seed: int,
) -> Subgroup:
    truth, scores = check_scores(table["label"].to_numpy(), table["score"].to_numpy())
    subjects: NDArray[Any] = table["subject_id"].to_numpy()

    def counts(rows: NDArray[np.bool_]) -> tuple[int, int, int]:
        positives = int(truth[rows].sum())
        return len(np.unique(subjects[rows])), positives, int(rows.sum()) - positives

    patients, positives, negatives = counts(inside)
    shared = (attribute, value, patients, positives + negatives, positives)
    reason = _too_small(patients, positives, negatives, minima)
    if reason is not None:
        return Subgroup(*shared, metrics={}, differences={}, reason=reason)
    ways = dict(_Cell(truth, scores, inside, threshold).ways())
    differences = {}
    if _too_small(*counts(~inside), minima) is None:
        rest = dict(_Cell(truth, scores, ~inside, threshold).ways())
        differences = {
            f"-{name}": lambda w, ours=ours, theirs=rest[name]: ours(w) - theirs(w) for name, ours in ways.items()
        }
    intervals = bootstrap_intervals(ways | differences, subjects, num_resamples=num_resamples, seed=seed)
    return Subgroup(
        *shared,
        metrics={name: intervals[name] for name in ways},
        differences={name: intervals[f"-{name}"] for name in ways if f"-{name}" in intervals},
    )

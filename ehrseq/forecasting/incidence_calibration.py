"""Does as much come as was foretold, by each day? Predicted cumulative incidence against what was observed.

A record that ends with the data has not been followed to the horizon, and who dies first never has the outcome: shares
of those who were seen to have it would be too low for the one reason and could not be told from censoring for the
other. The Aalen-Johansen estimator counts both rightly. With d_k(t) outcomes of cause k (the outcome, or death before
it) at day t among the n(t) who are still followed and have had neither:

    S(t) = product over days s <= t of (1 - (d_1(s) + d_2(s)) / n(s))       neither has come
    F_k(t) = sum over days s <= t of S(s-) d_k(s) / n(s)                    cause k has come

(Aalen and Johansen 1978.) Predicted and observed are compared over all patients, and within groups of equal size by the
risk predicted at the horizon. Intervals are over patients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ehrseq.evaluation.bootstrap import Interval, patient_weights
from ehrseq.evaluation.metrics import FloatArray, check_scores
from ehrseq.evaluation.report_tables import json_ready

CENSORED, CAME, DIED_FIRST = 0, 1, 2
NUM_GROUPS = 5


def aalen_johansen(
    days: ArrayLike, causes: ArrayLike, grid: ArrayLike, weights: ArrayLike | None = None, *, num_causes: int = 2
) -> FloatArray:
    """Cumulative incidence of competing causes from censored observations.

    Args:
        days: `[n]` day on which each was last followed: of its cause, or of the end of what is known.
        causes: `[n]` 1 .. num_causes, 0 = censored. What ends on the day of an event was still followed on it.
        grid: `[g]` days at which the incidence is wanted.
        weights: `[B, n]` weights of the observations, None = all ones.
        num_causes: Number of causes.

    Returns:
        `[B, num_causes, g]`; NaN beyond the last day on which anybody was followed, unless nobody was left by then
        because all had a cause.

    Raises:
        ValueError: Shapes that differ, days that are negative or NaN, an unknown cause.
    """
    ends, kinds, wanted = np.asarray(days, np.float64), np.asarray(causes), np.asarray(grid, np.float64)
    if ends.ndim != 1 or kinds.shape != ends.shape:
        raise ValueError(f"days and causes must be [n] each, got {ends.shape} and {kinds.shape}.")
    if not (ends >= 0).all():
        raise ValueError(f"days must be at least 0, got {ends[~(ends >= 0)][0]}; count them from the prediction time.")
    if not np.isin(kinds, range(num_causes + 1)).all():
        raise ValueError(f"causes must be 0 (censored) to {num_causes}, got {sorted(set(kinds.tolist()))}.")
    drawn = np.ones((1, len(ends))) if weights is None else np.atleast_2d(np.asarray(weights, np.float64))
    if drawn.shape[1] != len(ends):
        raise ValueError(f"weights must be [B, {len(ends)}], got {drawn.shape}.")
    if not len(ends):
        return np.full((len(drawn), num_causes, len(wanted)), np.nan)
    # 1. Days of events, and who is at risk on each: everybody whose end is not before it.
    times, place = np.unique(ends, return_inverse=True)
    count = len(times)
    leaving = _sums(drawn, place, count)
    at_risk = leaving[:, ::-1].cumsum(1)[:, ::-1]  # [B, T]
    events = np.stack([_sums(drawn * (kinds == cause), place, count) for cause in range(1, num_causes + 1)], axis=1)
    # 2. Hazards, survival before each day, incidences.
    with np.errstate(invalid="ignore", divide="ignore"):
        hazards = np.where(at_risk[:, None] > 0, events / at_risk[:, None], 0.0)
    stay = 1 - hazards.sum(1)
    before = np.concatenate([np.ones((len(drawn), 1)), stay.cumprod(1)[:, :-1]], axis=1)
    incidence = (before[:, None] * hazards).cumsum(2)
    # 3. Steps at the grid's days.
    step = np.searchsorted(times, wanted, side="right") - 1
    values: FloatArray = np.where(step >= 0, incidence[:, :, step.clip(min=0)], 0.0)
    followed = np.where(at_risk > 0, times, -np.inf).max(1)  # [B]
    all_gone = before[:, -1] * stay[:, -1] <= 1e-12
    unknown = (wanted > followed[:, None]) & ~all_gone[:, None]
    return np.where(unknown[:, None], np.nan, values)


def _sums(values: FloatArray, place: NDArray[np.int64], count: int) -> FloatArray:
    """Sums of columns by place: [B, n] -> [B, count]."""
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(count))
    sums: FloatArray = np.add.reduceat(values[:, order], starts, axis=1)
    return sums


def observed_causes(
    outcome_days: ArrayLike, death_days: ArrayLike, followed_days: ArrayLike, horizon_days: float
) -> tuple[FloatArray, NDArray[np.int64]]:
    """Days and causes for `aalen_johansen` from what a record holds after the prediction time.

    Args:
        outcome_days: `[n]` day of the first outcome, infinite = none.
        death_days: `[n]` day of death, infinite = none. A death on the day of the outcome comes after it.
        followed_days: `[n]` days until the data end.
        horizon_days: Beyond it nothing counts.

    Returns:
        `[n]` days and `[n]` causes.
    """
    outcome, death = np.asarray(outcome_days, np.float64), np.asarray(death_days, np.float64)
    end = np.minimum(np.asarray(followed_days, np.float64), horizon_days)
    is_outcome = (outcome <= death) & (outcome <= end)
    is_death = ~is_outcome & (death <= end)
    days = np.where(is_outcome, outcome, np.where(is_death, death, end))
    return days, np.where(is_outcome, CAME, np.where(is_death, DIED_FIRST, CENSORED))


@dataclass(frozen=True)
class IncidenceGroup:
    """Patients of similar predicted risk.

    Attributes:
        rows: Predictions.
        predicted: Mean predicted incidence at each day of the grid.
        observed: Aalen-Johansen's.
        low, high: Ends of its 95 % interval over patients.
    """

    rows: int
    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class IncidenceCalibration:
    """Predicted and observed incidence of one outcome.

    Attributes:
        outcome: Its name.
        part: "all", "first occurrences", "repeats".
        grid_days: Days.
        rows: Predictions (patient and time).
        patients: Patients.
        events: Outcomes observed within the horizon.
        deaths: Deaths before an outcome within the horizon.
        censored: Predictions not followed to the horizon.
        everybody: All of them.
        difference: Observed minus predicted at each day, with its interval.
        groups: By predicted risk at the horizon, lowest first.
        worst_group: Largest difference of a group's observed and predicted incidence at the horizon.
    """

    outcome: str
    part: str
    grid_days: tuple[float, ...]
    rows: int
    patients: int
    events: int
    deaths: int
    censored: int
    everybody: IncidenceGroup
    difference: tuple[Interval, ...]
    groups: tuple[IncidenceGroup, ...]
    worst_group: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; None where something is not known."""
        fields: dict[str, Any] = json_ready(asdict(self))
        return fields


def calibrate_incidence(
    outcome: str,
    predicted: ArrayLike,
    days: ArrayLike,
    causes: ArrayLike,
    subjects: ArrayLike,
    grid_days: Sequence[float],
    *,
    part: str = "all",
    num_groups: int = NUM_GROUPS,
    num_resamples: int = 500,
    seed: int = 0,
) -> IncidenceCalibration:
    """Hold predicted incidences against what was observed.

    Args:
        outcome: Name of the outcome.
        predicted: `[n, g]` predicted incidence by each day of the grid.
        days: `[n]` as of `aalen_johansen`, see `observed_causes`.
        causes: `[n]` likewise: 0 censored, 1 the outcome, 2 death.
        subjects: `[n]` patient of each prediction.
        grid_days: `[g]`, ascending; the last one is the horizon.
        part: Which predictions these are, in words.
        num_groups: Groups by the predicted risk at the horizon; equal risks share one.
        num_resamples: Resamples of patients.
        seed: Of the resamples.

    Raises:
        ValueError: Shapes that differ, no prediction, a grid that does not ascend, probabilities outside [0, 1].
    """
    grid = np.asarray(grid_days, np.float64)
    risks, ends, kinds, whose = np.asarray(predicted, np.float64), np.asarray(days), np.asarray(causes), subjects
    whose = np.asarray(whose)
    if not len(grid) or (np.diff(grid) <= 0).any() or not (grid > 0).all():
        raise ValueError(f"grid_days got {list(grid_days)}; expected days above 0 that ascend.")
    if risks.shape != (len(ends), len(grid)) or kinds.shape != ends.shape or whose.shape != ends.shape:
        raise ValueError(
            f"predicted must be [n, {len(grid)}] and days, causes, subjects [n]; got {risks.shape}, {ends.shape}, "
            f"{kinds.shape}, {whose.shape}."
        )
    if not len(ends):
        raise ValueError(f"there is no prediction of {outcome} to hold against anything.")
    check_scores(np.zeros(len(risks)), risks[:, -1])
    if not ((risks >= -1e-9) & (risks <= 1 + 1e-9)).all():
        raise ValueError(f"predicted incidences of {outcome} must lie in [0, 1]; SCOPE's estimates are cut before.")
    # 1. Groups of equal size by the last column.
    edges = np.unique(np.quantile(risks[:, -1], np.arange(1, num_groups) / num_groups))
    _, group = np.unique(np.searchsorted(edges, risks[:, -1], side="left"), return_inverse=True)
    members = [np.arange(len(ends)), *(np.flatnonzero(group == number) for number in range(group.max() + 1))]
    # 2. Each group's incidence, and that of every resample of the patients.
    resampled: list[list[FloatArray]] = [[] for _ in members]
    differences = []
    for weights in patient_weights(whose, num_resamples, seed=seed):
        for number, rows in enumerate(members):
            of_group = weights[:, rows]
            resampled[number].append(aalen_johansen(ends[rows], kinds[rows], grid, of_group)[:, 0])
        with np.errstate(invalid="ignore", divide="ignore"):
            differences.append(resampled[0][-1] - weights @ risks / weights.sum(1, keepdims=True))
    made = [
        _group(risks[rows], aalen_johansen(ends[rows], kinds[rows], grid)[0, 0], drawn)
        for rows, drawn in zip(members, resampled, strict=True)
    ]
    everybody, groups = made[0], made[1:]
    low, high = _ends(differences, len(grid))
    difference = tuple(
        Interval(o - p, a, b) for o, p, a, b in zip(everybody.observed, everybody.predicted, low, high, strict=True)
    )
    gaps = [abs(each.observed[-1] - each.predicted[-1]) for each in groups]
    known = [gap for gap in gaps if math.isfinite(gap)]
    horizon = grid[-1]
    return IncidenceCalibration(
        outcome,
        part,
        tuple(grid.tolist()),
        len(ends),
        len(np.unique(whose)),
        int((kinds == CAME).sum()),
        int((kinds == DIED_FIRST).sum()),
        int(((kinds == CENSORED) & (ends < horizon)).sum()),
        everybody,
        difference,
        tuple(groups),
        max(known) if known else math.nan,
    )


def _group(risks: FloatArray, observed: FloatArray, drawn: Sequence[FloatArray]) -> IncidenceGroup:
    low, high = _ends(drawn, risks.shape[1])
    return IncidenceGroup(len(risks), tuple(risks.mean(0).tolist()), tuple(observed.tolist()), low, high)


def _ends(drawn: Sequence[FloatArray], count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Ends of the 95 % intervals of resamples [B, g]; NaN where there is none."""
    values = np.concatenate(drawn) if drawn else np.empty((0, count))
    ends = []
    for column in values.T if len(values) else np.full((count, 1), np.nan):
        known = column[np.isfinite(column)]
        ends.append(np.quantile(known, (0.025, 0.975)).tolist() if len(known) else [math.nan, math.nan])
    return tuple(end[0] for end in ends), tuple(end[1] for end in ends)

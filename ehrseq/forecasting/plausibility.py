"""Are drawn trajectories like records? Their marginals against what came to the same patients within the same horizon.

    codes                   which events: Jensen-Shannon divergence (bits, 0 to 1) of their shares
    intervals               which interval tokens: the same
    days to the next visit  from a prediction time outside of a visit: Kolmogorov distance of the distributions
    days between visits     from the end of a visit within the horizon to the next one
    days of a visit         from its start to its last event; visits that began and ended within the horizon
    events of a visit       the same visits
    visits                  started within the horizon, a patient
    events                  within the horizon, a patient

A distance of 0 is not to be had: two samples of one distribution differ. The yardstick is the distance between two
random halves of the recorded patients (mean of `NUM_HALVINGS`). A drawn set that is as near to the records as these are
to each other cannot be told from them by that measure alone.

Rates (by kind of event, and by age) are events per 100 patient-days, drawn and recorded, and their ratio with an
interval over patients. Predictions that were not followed to the horizon are left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ehrseq.evaluation.bootstrap import Interval, patient_weights
from ehrseq.evaluation.report_tables import json_ready
from ehrseq.forecasting.evaluation import KIND_OF_TYPE
from ehrseq.forecasting.recorded_futures import RecordedFuture
from ehrseq.modeling.ehr_trajectories import PatientTrajectories, TrajectoryEnd
from ehrseq.tokenization.ehr_vocabulary import TYPE_INTERVAL, TYPE_VE, TYPE_VS

NUM_HALVINGS = 20
AGE_GROUPS = (0, 18, 40, 65, 80)
SHARES_COMPARED = ("codes", "intervals")
NUMBERS_COMPARED = (
    "days to the next visit",
    "days between visits",
    "days of a visit",
    "events of a visit",
    "visits",
    "events",
)
_FEWEST = 20  # values of each side, below which a distance says nothing

FloatArray = NDArray[np.float64]


def jensen_shannon(first: ArrayLike, second: ArrayLike) -> float:
    """Jensen-Shannon divergence of two sets of counts, in bits: 0 = equal shares, 1 = nothing in common.

    >>> jensen_shannon([1, 1], [3, 3]), jensen_shannon([1, 0], [0, 1])
    (0.0, 1.0)
    """
    counts = [np.asarray(each, np.float64) for each in (first, second)]
    if not all(each.sum() > 0 for each in counts):
        return math.nan
    p, q = (each / each.sum() for each in counts)
    middle = (p + q) / 2

    def from_middle(shares: FloatArray) -> float:
        some = shares > 0
        return float((shares[some] * np.log2(shares[some] / middle[some])).sum())

    return max(0.0, (from_middle(p) + from_middle(q)) / 2)


def kolmogorov(first: ArrayLike, second: ArrayLike) -> float:
    """Largest distance of two empirical distribution functions; NaN where one is empty.

    >>> kolmogorov([1, 2], [1, 2]), kolmogorov([0, 1], [2, 3])
    (0.0, 1.0)
    """
    a, b = np.sort(np.asarray(first, np.float64)), np.sort(np.asarray(second, np.float64))
    if not len(a) or not len(b):
        return math.nan
    values = np.concatenate([a, b])
    gaps = np.searchsorted(a, values, side="right") / len(a) - np.searchsorted(b, values, side="right") / len(b)
    return float(np.abs(gaps).max())


@dataclass(frozen=True)
class FutureDistance:
    """One marginal of drawn trajectories against the records.

    Attributes:
        measure: One of `SHARES_COMPARED` or `NUMBERS_COMPARED`.
        distance: Jensen-Shannon divergence or Kolmogorov distance, NaN where there is too little of it.
        yardstick: Mean distance of two halves of the records.
        drawn, recorded: How many values: events, intervals, visits, futures.
        drawn_mean, recorded_mean: Of the values; NaN of shares.
    """

    measure: str
    distance: float
    yardstick: float
    drawn: int
    recorded: int
    drawn_mean: float
    recorded_mean: float


@dataclass(frozen=True)
class FutureRate:
    """How often something comes.

    Attributes:
        group: Kind of event, "visits", "deaths"; or an age group and what is counted.
        patients: Patients.
        drawn, recorded: Per 100 patient-days.
        ratio: Drawn by recorded; None where none was recorded.
    """

    group: str
    patients: int
    drawn: float
    recorded: float
    ratio: Interval | None


@dataclass(frozen=True)
class PlausibilityReport:
    """What `compare_futures` found.

    Attributes:
        horizon_days: How far both were followed.
        predictions: Prompts that were followed to the horizon.
        patients: Their patients.
        left_out: Prompts that were not.
        trajectories: Trajectories drawn.
        cut: Share of them that reached the longest length before the horizon: what would have come is missing.
        distances: One a measure.
        kinds: Rates by kind of event, of visits, of deaths.
        ages: Rates by age.
        codes: Code -> (drawn, recorded) per 100 patient-days, those that differ most in number first.
    """

    horizon_days: float
    predictions: int
    patients: int
    left_out: int
    trajectories: int
    cut: float
    distances: tuple[FutureDistance, ...]
    kinds: tuple[FutureRate, ...]
    ages: tuple[FutureRate, ...]
    codes: Mapping[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        fields: dict[str, Any] = json_ready(asdict(self))
        return fields


class FutureSample:
    """Futures as flat arrays, each value with its patient.

    Args:
        types: `[vocabulary]` type of each token.
    """

    def __init__(self, types: NDArray[np.int64]) -> None:
        self.types = types
        self._values: dict[str, list[FloatArray]] = {name: [] for name in (*SHARES_COMPARED, *NUMBERS_COMPARED)}
        self._whose: dict[str, list[NDArray[np.int64]]] = {name: [] for name in self._values}
        self._counts: list[tuple[float, ...]] = []
        self.subjects: list[int] = []
        self.ages: list[float] = []

    def add(
        self,
        subject: int,
        age: float,
        tokens: NDArray[np.int64],
        days: FloatArray,
        patient_days: float,
        *,
        died: bool,
    ) -> None:
        """One future.

        Args:
            subject: Number of the patient.
            age: Years.
            tokens: Within the horizon.
            days: Of each.
            patient_days: Days until the death or the horizon.
            died: Whether it ended in death.
        """
        kinds = self.types[tokens]
        event = np.isin(kinds, list(KIND_OF_TYPE))
        starts, closes = np.flatnonzero(kinds == TYPE_VS), np.flatnonzero(kinds == TYPE_VE)
        # Visits that began and ended here: a [VS] and the next [VE].
        following = np.searchsorted(closes, starts)
        whole = following < len(closes)
        begins, ends = starts[whole], closes[following[whole]] if len(closes) else closes
        running = np.concatenate([[0], np.cumsum(event)])
        latest = _latest(days)
        before = np.where(starts > 0, latest[np.maximum(starts - 1, 0)], 0.0)
        # What stands before the first end of a visit began before the prediction time: only its rest is here.
        rest = np.searchsorted(closes, starts) == 0
        values: dict[str, Any] = {
            "codes": tokens[event],
            "intervals": tokens[kinds == TYPE_INTERVAL],
            "days to the next visit": days[starts][rest][:1],
            "days between visits": (days[starts] - before)[~rest],
            "days of a visit": latest[ends] - days[begins],
            "events of a visit": running[ends] - running[begins],
            "visits": [len(starts)],
            "events": [int(event.sum())],
        }
        for name, these in values.items():
            self._values[name].append(np.asarray(these, np.float64))
            self._whose[name].append(np.full(len(these), subject))
        by_kind = [int((kinds == kind).sum()) for kind in KIND_OF_TYPE]
        self._counts.append((patient_days, *by_kind, len(starts), float(died)))
        self.subjects.append(subject)
        self.ages.append(age)

    def values(self, name: str) -> tuple[FloatArray, NDArray[np.int64]]:
        """Values of a measure, and the patient of each."""
        values, whose = self._values[name], self._whose[name]
        return np.concatenate(values or [np.empty(0)]), np.concatenate(whose or [np.empty(0, np.int64)])

    def counts(self) -> FloatArray:
        """[futures, 1 + kinds + 2]: patient-days, events by kind, visits, deaths."""
        return np.array(self._counts, np.float64).reshape(-1, 3 + len(KIND_OF_TYPE))


def _latest(days: FloatArray) -> FloatArray:
    """The last known day up to each token; 0 before the first one."""
    places = np.where(np.isnan(days), -1, np.arange(len(days)))
    places = np.maximum.accumulate(places) if len(places) else places
    latest: FloatArray = np.where(places >= 0, days[places.clip(min=0)], 0.0) if len(days) else days
    return latest


def compare_futures(
    drawn: Sequence[PatientTrajectories],
    recorded: Sequence[RecordedFuture],
    *,
    horizon_days: float,
    types: ArrayLike,
    names: Sequence[str],
    death_ids: Sequence[int] = (),
    num_resamples: int = 500,
    seed: int = 0,
    num_codes: int = 20,
) -> PlausibilityReport:
    """Hold drawn trajectories against the records of the same patients.

    Args:
        drawn: Of each prompt, with tokens.
        recorded: What came after each prompt, in the same order.
        horizon_days: Of both.
        types: `[vocabulary]` type of each token.
        names: `[vocabulary]` name of each token.
        death_ids: Tokens of death.
        num_resamples: Resamples of patients for the intervals.
        seed: Of resamples and splits.
        num_codes: Codes that are listed.

    Raises:
        ValueError: Lists of different length, trajectories without tokens, or nobody who was followed to the horizon.
    """
    if len(drawn) != len(recorded):
        raise ValueError(f"there are trajectories of {len(drawn)} prompts and {len(recorded)} recorded futures.")
    if any(each.tokens is None or each.days is None for each in drawn):
        raise ValueError("the trajectories hold no tokens; draw them with keep_tokens=True.")
    kinds = np.asarray(types, np.int64)
    samples = FutureSample(kinds), FutureSample(kinds)
    whole = [k for k, each in enumerate(recorded) if _is_followed(each, death_ids, horizon_days)]
    if not whole:
        raise ValueError(
            f"none of the {len(recorded):,} predictions was followed for {horizon_days:g} days: the data end before "
            "that. Give a shorter horizon, or earlier prediction times."
        )
    numbers = {subject: number for number, subject in enumerate(dict.fromkeys(recorded[k].subject_id for k in whole))}
    trajectories = cut = 0
    for k in whole:
        each, known = drawn[k], recorded[k]
        number = numbers[known.subject_id]
        death = known.first_day(death_ids)
        alive = slice(None if math.isinf(death) else 1 + int(np.isin(known.tokens, death_ids).argmax()))
        tokens, days = known.tokens[alive], known.days[alive]
        samples[1].add(number, known.age, tokens, days, min(death, horizon_days), died=math.isfinite(death))
        ends = each.ends if each.ends.ndim == 1 else each.ends[:, 0]
        last = each.end_days if each.end_days.ndim == 1 else each.end_days[:, 0]
        for tokens, days, end, day in zip(each.tokens or (), each.days or (), ends, last, strict=True):
            died, is_cut = end == TrajectoryEnd.DEATH, end == TrajectoryEnd.LENGTH
            followed = float(day) if died or is_cut else horizon_days
            samples[0].add(number, known.age, tokens, days, followed, died=died)
            trajectories, cut = trajectories + 1, cut + int(is_cut)
    rng = np.random.default_rng(seed)
    halves = [rng.permutation(len(numbers)) < len(numbers) // 2 for _ in range(NUM_HALVINGS)]
    distances = tuple(_distance(name, *samples, halves, len(kinds)) for name in (*SHARES_COMPARED, *NUMBERS_COMPARED))
    return PlausibilityReport(
        horizon_days,
        len(whole),
        len(numbers),
        len(recorded) - len(whole),
        trajectories,
        cut / trajectories,
        distances,
        _rates_by_kind(*samples, num_resamples, seed),
        _rates_by_age(*samples, num_resamples, seed),
        _code_rates(*samples, names, num_codes),
    )


def _is_followed(future: RecordedFuture, death_ids: Sequence[int], horizon_days: float) -> bool:
    return future.followed_days >= horizon_days or math.isfinite(future.first_day(death_ids))


def _distance(
    name: str, drawn: FutureSample, recorded: FutureSample, halves: Sequence[NDArray[np.bool_]], size: int
) -> FutureDistance:
    (ours, _), (theirs, whose) = drawn.values(name), recorded.values(name)
    shares = name in SHARES_COMPARED

    def between(a: FloatArray, b: FloatArray) -> float:
        if min(len(a), len(b)) < _FEWEST:
            return math.nan
        if shares:
            return jensen_shannon(*(np.bincount(each.astype(np.int64), minlength=size) for each in (a, b)))
        return kolmogorov(a, b)

    split = [between(theirs[half[whose]], theirs[~half[whose]]) for half in halves]
    known = [each for each in split if math.isfinite(each)]
    means = [math.nan if shares or not len(each) else float(each.mean()) for each in (ours, theirs)]
    yardstick = float(np.mean(known)) if known else math.nan
    return FutureDistance(name, between(ours, theirs), yardstick, len(ours), len(theirs), *means)


_COUNTED = (*KIND_OF_TYPE.values(), "visits", "deaths")


def _by_patient(sample: FutureSample, rows: NDArray[np.bool_], size: int) -> FloatArray:
    """Sums of the counts of each patient: [patients, counts]."""
    sums = np.zeros((size, sample.counts().shape[1]))
    np.add.at(sums, np.asarray(sample.subjects)[rows], sample.counts()[rows])
    return sums


def _rates(
    drawn: FloatArray, recorded: FloatArray, names: Mapping[str, int], num_resamples: int, seed: int
) -> tuple[FutureRate, ...]:
    """Rates of some columns of counts [patients, columns]; column 0 holds the patient-days."""
    present = (drawn[:, 0] > 0) | (recorded[:, 0] > 0)
    drawn, recorded = drawn[present], recorded[present]
    weights = np.concatenate(
        [*patient_weights(np.arange(len(drawn)), num_resamples, seed=seed), np.empty((0, len(drawn)))]
    )

    def rate(counts: FloatArray, column: int, drawn_weights: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore", divide="ignore"):
            rates: FloatArray = 100 * (drawn_weights @ counts[:, column]) / (drawn_weights @ counts[:, 0])
        return rates

    rates = []
    for name, column in names.items():
        one = np.ones((1, len(drawn)))
        ours, theirs = (float(rate(counts, column, one)[0]) for counts in (drawn, recorded))
        ratio = None
        if theirs > 0:
            with np.errstate(invalid="ignore", divide="ignore"):
                resampled = rate(drawn, column, weights) / rate(recorded, column, weights)
            resampled = resampled[np.isfinite(resampled)]
            ends = np.quantile(resampled, (0.025, 0.975)) if len(resampled) else (math.nan, math.nan)
            ratio = Interval(ours / theirs, float(ends[0]), float(ends[1]))
        if ours > 0 or theirs > 0:
            rates.append(FutureRate(name, len(drawn), ours, theirs, ratio))
    return tuple(rates)


def _rates_by_kind(
    drawn: FutureSample, recorded: FutureSample, num_resamples: int, seed: int
) -> tuple[FutureRate, ...]:
    size = max(recorded.subjects) + 1
    sums = [_by_patient(each, np.ones(len(each.subjects), bool), size) for each in (drawn, recorded)]
    columns = {name: 1 + place for place, name in enumerate(_COUNTED)}
    return _rates(sums[0], sums[1], columns, num_resamples, seed)


def _rates_by_age(drawn: FutureSample, recorded: FutureSample, num_resamples: int, seed: int) -> tuple[FutureRate, ...]:
    size = max(recorded.subjects) + 1
    rates: list[FutureRate] = []
    for place, first in enumerate(AGE_GROUPS):
        behind = AGE_GROUPS[place + 1] if place + 1 < len(AGE_GROUPS) else math.inf
        title = f"{first} to {behind - 1} years" if math.isfinite(behind) else f"{first} years and older"
        rows = [(np.asarray(each.ages) >= first) & (np.asarray(each.ages) < behind) for each in (drawn, recorded)]
        if not rows[1].any():
            continue
        ours, theirs = (_by_patient(each, some, size) for each, some in zip((drawn, recorded), rows, strict=True))
        with_all = [np.column_stack([each, each[:, 1 : 1 + len(KIND_OF_TYPE)].sum(1)]) for each in (ours, theirs)]
        columns = {f"{title}: events": with_all[0].shape[1] - 1}
        columns |= {f"{title}: {name}": 1 + _COUNTED.index(name) for name in ("visits", "deaths")}
        rates += _rates(with_all[0], with_all[1], columns, num_resamples, seed)
    return tuple(rates)


def _code_rates(
    drawn: FutureSample, recorded: FutureSample, names: Sequence[str], num_codes: int
) -> dict[str, tuple[float, float]]:
    rates = []
    for sample in (drawn, recorded):
        counts = np.bincount(sample.values("codes")[0].astype(np.int64), minlength=len(names))
        rates.append(100 * counts / max(sample.counts()[:, 0].sum(), 1e-12))
    order = np.argsort(-np.abs(rates[0] - rates[1]), kind="stable")[:num_codes]
    return {
        names[code]: (float(rates[0][code]), float(rates[1][code]))
        for code in order.tolist()
        if rates[0][code] or rates[1][code]
    }

"""Scores and probabilities of the simulated disease process: what is recorded decides what happens.

Every probability of an outcome is `sigmoid(intercept + weights @ features)`, where the features are functions of the
rows recorded up to the prediction time t and of nothing else. The features, with z the standardised value of a
measurement (`Channel`), read back from the rounded row in its unit:

- `<channel>`: tanh(1.5 z_last) * 2^(-(t - t_last) / 120 days), the latest reading, faded by its age; for a pair of
  treatments z_last is -1 or +1, the one that was given last. Within a phase of a stay a channel is read twice, once
  low and once high, in an order that is random: the *order* carries the risk, the multiset of values (what a count
  sees) nothing.
- `gap`: tanh(log(30 days / gap)), gap from the end of the previous visit to the start of this one: short gaps are
  positive.
- `utilisation`: log2 of 1 + the sum over the admissions started up to t of 2^(-(t - start) / 120 days).
- `crp_measured`, `lactate_measured`: 1 where the present visit has such a row (informative missingness), else 0.
- `ldl_mean`, `glucose_mean`: sum of z over all rows / (1 + their number).
- `age`: (age in years - 62) / 14.
- `<chronic disease>`: 1 where a diagnosis of it has been recorded, else 0.
- `male`: 1 or 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ehrseq.data.simulate.codes import (
    CHANNEL_INDEX,
    CHRONIC,
    CONDITION_TASKS,
    IS_LOGARITHMIC,
    IS_PAIR,
    LOCATIONS,
    LOG_LOCATIONS,
    MEASUREMENTS,
    SCALES,
)
from ehrseq.data.simulate.state import DAY, YEAR_MINUTES

READING_HALF_LIFE_DAYS = 120.0
UTILISATION_HALF_LIFE_DAYS = 120.0

FEATURES: tuple[str, ...] = (
    *(channel.name for channel in MEASUREMENTS),
    *(name for name, _, _ in CHRONIC),
    "gap",
    "utilisation",
    "crp_measured",
    "lactate_measured",
    "ldl_mean",
    "glucose_mean",
    "age",
    "male",
)
FEATURE_INDEX = {name: k for k, name in enumerate(FEATURES)}

SCORES: tuple[str, ...] = ("mortality_30d", "long_stay_7d", "readmission_30d", *CONDITION_TASKS)
"""Tasks of the simulator; the order of every array with one column a task."""

ORDER_DEPENDENT_TASKS: tuple[str, ...] = (
    "mortality_30d",
    "long_stay_7d",
    "readmission_30d",
    "hypertension",
    "fluid_disorder",
)
"""Tasks whose risk lies in order and timing; `lipid_disorder` lies in levels, which counts of binned values hold."""

INTERCEPTS: dict[str, float] = {
    "mortality_30d": -4.3,
    "long_stay_7d": -2.7,
    "readmission_30d": -3.2,
    "hypertension": -3.0,
    "fluid_disorder": -3.0,
    "lipid_disorder": -3.2,
}

RISK_WEIGHTS: dict[str, dict[str, float]] = {
    "mortality_30d": {
        "lactate": 1.2,
        "hemoglobin": -1.0,
        "anticoagulant": 0.8,
        "lactate_measured": 0.4,
        "cancer": 1.4,
        "dementia": 1.0,
        "liver": 1.0,
        "heart_failure": 0.7,
        "age": 0.8,
    },
    "long_stay_7d": {
        "crp": 1.2,
        "heart_rate": 1.0,
        "diuretic": 0.8,
        "crp_measured": 0.4,
        "gap": 0.3,
        "copd": 0.9,
        "dementia": 1.1,
        "diabetes": 0.8,
        "cancer": 0.7,
        "age": 0.4,
    },
    "readmission_30d": {
        "rate_control": 1.2,
        "sodium": -1.1,
        "gap": 0.7,
        "utilisation": 0.5,
        "heart_failure": 0.9,
        "copd": 0.8,
        "depression": 0.8,
        "liver": 0.8,
    },
    "hypertension": {
        "sbp": 1.4,
        "rate_control": 0.9,
        "potassium": -0.7,
        "obesity": 0.9,
        "kidney": 0.9,
        "diabetes": 0.7,
        "age": 0.6,
    },
    "fluid_disorder": {
        "sodium": -1.2,
        "creatinine": 1.0,
        "diuretic": 0.8,
        "kidney": 1.0,
        "heart_failure": 0.9,
        "liver": 1.0,
        "age": 0.4,
    },
    "lipid_disorder": {
        "ldl_mean": 1.3,
        "glucose_mean": 0.8,
        "statin": 0.4,
        "diabetes": 1.0,
        "obesity": 1.0,
        "age": 0.7,
        "male": 0.6,
    },
}
"""Log-odds of each task per unit of each feature."""

READMISSION_BEFORE_DEATH = 0.3
"""Share of the deaths within 30 days of a discharge that happen in a readmission of less than a day."""

NEXT_ADMISSION = 0.5
"""Probability of an admission in (30, 365] days for who neither died nor was readmitted nor is newly diagnosed."""


SHORT_STAY_HOURS = (29.0, 127.0, 1.6)
"""(a, b, c): a stay that outlasts 24 hours and is not long lasts a + b u^c hours, u uniform in (0, 1)."""


def _weight_matrix() -> np.ndarray:
    matrix = np.zeros((len(SCORES), len(FEATURES)))
    for row, task in enumerate(SCORES):
        for name, weight in RISK_WEIGHTS[task].items():
            matrix[row, FEATURE_INDEX[name]] = weight
    return matrix


WEIGHT_MATRIX = _weight_matrix()
"""float64 `[tasks, features]`."""

INTERCEPT_VECTOR = np.array([INTERCEPTS[task] for task in SCORES])


def standardise(channel: np.ndarray, value: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Read recorded readings back as z.

    Args:
        channel: int64 `[n]`, positions in `MEASUREMENTS`.
        value: float64 `[n]`, the recorded value in the channel's first unit (NaN for a pair of treatments).
        state: float64 `[n]`, -1 or +1, which of a pair of treatments was given (read for pairs only).

    Returns:
        float64 `[n]`.
    """
    linear = value - LOCATIONS[channel]
    recorded = np.where(IS_LOGARITHMIC[channel], np.log(np.maximum(value, 1e-3)) - LOG_LOCATIONS[channel], linear)
    return np.where(IS_PAIR[channel], state, recorded / SCALES[channel])


@dataclass(frozen=True)
class Recorded:
    """What the scores see of n patients, each at a time of its own.

    Attributes:
        z_last: float64 `[n, channels]`, the latest reading, 0 for none.
        t_last: int64 `[n, channels]`, its minutes, long ago for none.
        z_mean: float64 `[n, channels]`, sum of the readings / (1 + their number); read where `FEATURES` has a mean.
        chronic: bool `[n, diseases]`, recorded chronic diseases.
        utilisation: float64 `[n]`, the faded number of admissions at the time `utilisation_at`.
        utilisation_at: int64 `[n]`, minutes of the start of the latest admission.
        visit_start: int64 `[n]`, minutes of the start of the present visit.
        gap: float64 `[n]`, days from the end of the visit before to `visit_start`.
        birth: int64 `[n]`, minutes.
        male: bool `[n]`.
    """

    z_last: np.ndarray
    t_last: np.ndarray
    z_mean: np.ndarray
    chronic: np.ndarray
    utilisation: np.ndarray
    utilisation_at: np.ndarray
    visit_start: np.ndarray
    gap: np.ndarray
    birth: np.ndarray
    male: np.ndarray

    def features(self, now: np.ndarray) -> np.ndarray:
        """Features of the scores at `now` (int64 `[n]`, minutes): float64 `[n, features]`, columns as `FEATURES`."""
        age_of_reading = (now[:, None] - self.t_last) / DAY
        latest = np.tanh(1.5 * self.z_last) * 2.0 ** (-age_of_reading / READING_HALF_LIFE_DAYS)
        elapsed = (now - self.utilisation_at) / DAY
        seen = self.t_last >= self.visit_start[:, None]
        columns = [
            np.tanh(np.log(30.0 / self.gap)),
            np.log2(1.0 + self.utilisation * 2.0 ** (-elapsed / UTILISATION_HALF_LIFE_DAYS)),
            seen[:, CHANNEL_INDEX["crp"]],
            seen[:, CHANNEL_INDEX["lactate"]],
            self.z_mean[:, CHANNEL_INDEX["ldl"]],
            self.z_mean[:, CHANNEL_INDEX["glucose"]],
            ((now - self.birth) / YEAR_MINUTES - 62.0) / 14.0,
            self.male,
        ]
        return np.concatenate([latest, self.chronic, np.stack(columns, axis=1)], axis=1).astype(np.float64)


def score_probabilities(features: np.ndarray) -> np.ndarray:
    """Probabilities of the draws of the process.

    Args:
        features: float64 `[n, features]`, columns as `FEATURES`.

    Returns:
        float64 `[n, tasks]`, columns as `SCORES`: the Bernoulli parameter of each draw, before the draws compete (see
        `outcome_risks`).
    """
    logits = features @ WEIGHT_MATRIX.T + INTERCEPT_VECTOR
    probabilities: np.ndarray = 1.0 / (1.0 + np.exp(-logits))
    return probabilities


def outcome_risks(draws: np.ndarray, diagnosed: np.ndarray, blocked: np.ndarray) -> dict[str, np.ndarray]:
    """Probabilities of the discharge tasks' positive labels, in closed form.

    At a discharge the draws come in this order: death within 30 days (d); the new conditions within 365 days (c_k,
    each independent, 0 where diagnosed already); the readmission within 30 days (r). Who is drawn for a new condition
    is next admitted for it; where the previous discharge lies less than 365 days back (`blocked`) that admission must
    start after that discharge's own window, so more than 30 days from now. Hence

        P(death)         = d
        P(condition k)   = (1 - d) c_k
        P(readmission)   = d * READMISSION_BEFORE_DEATH + (1 - d) * r * (prod_k (1 - c_k) if blocked else 1)

    Args:
        draws: float64 `[n, tasks]` of `score_probabilities`.
        diagnosed: bool `[n, 3]`, conditions recorded already.
        blocked: bool `[n]`.

    Returns:
        task -> float64 `[n]`; NaN where a condition has been diagnosed already (no label).
    """
    death = draws[:, 0]
    conditions = np.where(diagnosed, 0.0, draws[:, 3:])
    no_carrier = np.where(blocked, np.prod(1.0 - conditions, axis=1), 1.0)
    risks = {
        "mortality_30d": death,
        "readmission_30d": death * READMISSION_BEFORE_DEATH + (1.0 - death) * draws[:, 2] * no_carrier,
    }
    for k, task in enumerate(CONDITION_TASKS):
        risks[task] = np.where(diagnosed[:, k], np.nan, (1.0 - death) * conditions[:, k])
    return risks


def long_stay_while_open(probability: np.ndarray, minutes: np.ndarray) -> np.ndarray:
    """P(the stay lasts over 168 hours | its draw's probability, and that it is not over), by Bayes' rule.

    A long stay is always still going on then, a short one with probability 1 - ((h - a) / b)^(1/c), a, b, c of
    `SHORT_STAY_HOURS`.

    Args:
        probability: float64 `[n]`, the draw's at 24 hours.
        minutes: int64 `[n]`, whole minutes since the start of the admission, at most 168 hours.

    Returns:
        float64 `[n]`; the probability itself up to 29 hours, 1 from 156 hours on.
    """
    least, width, power = SHORT_STAY_HOURS
    # Ends are cut to whole minutes: to be open at a minute means not to end before the next.
    ended = np.clip(((minutes + 1) / 60.0 - least) / width, 0.0, 1.0) ** (1.0 / power)
    return probability / (probability + (1.0 - probability) * (1.0 - ended))

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

import numpy as np

from ehrseq.data.simulate_codes import CHANNELS, CHRONIC, CONDITION_TASKS

READING_HALF_LIFE_DAYS = 120.0
UTILISATION_HALF_LIFE_DAYS = 120.0

FEATURES: tuple[str, ...] = (
    *(channel.name for channel in CHANNELS),
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

WEIGHTS: dict[str, dict[str, float]] = {
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


def _weight_matrix() -> np.ndarray:
    matrix = np.zeros((len(SCORES), len(FEATURES)))
    for row, task in enumerate(SCORES):
        for name, weight in WEIGHTS[task].items():
            matrix[row, FEATURE_INDEX[name]] = weight
    return matrix


WEIGHT_MATRIX = _weight_matrix()
"""float64 `[tasks, features]`."""

INTERCEPT_VECTOR = np.array([INTERCEPTS[task] for task in SCORES])


def score_probabilities(features: np.ndarray) -> np.ndarray:
    """Probabilities of the draws of the process.

    Args:
        features: float64 `[n, features]`, columns as `FEATURES`.

    Returns:
        float64 `[n, tasks]`, columns as `SCORES`: the Bernoulli parameter of each draw, before the draws compete (see
        `outcome_risks`).
    """
    return 1.0 / (1.0 + np.exp(-(features @ WEIGHT_MATRIX.T + INTERCEPT_VECTOR)))


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

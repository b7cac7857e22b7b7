"""What is asked of a trajectory sampler, and what it answers: futures of patients drawn from a model of next tokens.

A *trajectory* is one future of one patient: the tokens that the model draws after the record, each with its time, up to
the horizon, the patient's death, an event that the caller waits for (`until`), or the longest length. Days are counted
from the prediction time; the horizon's last instant counts.

Glossary: n trajectories of a patient, m outcomes, g times of the grid, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from torch import Tensor

Estimator = Literal["monte_carlo", "scope", "reach"]
ESTIMATORS: tuple[Estimator, ...] = ("monte_carlo", "scope", "reach")


class TrajectoryEnd(IntEnum):
    """Why a trajectory ended."""

    HORIZON = 0
    DEATH = 1
    UNTIL = 2
    LENGTH = 3  # cut at the longest length before any of the others: what would have come is not known
    OUTCOME = 4  # every outcome asked for has happened, and nobody asked for the rest; of "reach": it cannot be avoided


@dataclass(frozen=True)
class OutcomeTokens:
    """An outcome as tokens of the vocabulary: it happens when the first of them does.

    Attributes:
        name: As the caller named it.
        ids: Token ids, int64, ascending, at least one.
        complement: Whether what is asked for is that none of them comes up to the horizon (a stay that goes on). Such
            an outcome has no cumulative incidence before the horizon.
    """

    name: str
    ids: np.ndarray
    complement: bool = False


@dataclass(frozen=True)
class ForecastPrompt:
    """One record, as the model reads it before the future begins.

    Attributes:
        inputs: The tokenizer's channels, each [1, l], unpadded: what `EhrTokenizer.encode_patient` gives, which ends in
            [VE] [REG] where the last visit is closed.
        elapsed_days: Days from the record's last event to the prediction time, at least 0: nothing happened in them.
        key: What makes the random numbers of this patient differ from those of others, any int (subject and time).
    """

    inputs: Mapping[str, Tensor]
    elapsed_days: float
    key: int


@dataclass(frozen=True)
class TrajectoryRequest:
    """What futures are drawn, the same for all prompts of a call.

    Attributes:
        horizon_days: How far, above 0.
        num: Trajectories a prompt (for "reach": a prompt and outcome), at least 1.
        first: Number of the first of them: trajectory k is the same whichever call draws it.
        seed: Of the whole call.
        outcomes: What is looked for.
        estimator: How probabilities are estimated, see `PatientTrajectories.incidence`.
        grid_days: Days at which the cumulative incidence is told, ascending, the last one the horizon; () = (horizon,).
        death_ids: Tokens of the patient's death, which ends a trajectory.
        until_ids: Tokens that end a trajectory as well, after they were drawn.
        keep_tokens: Whether the tokens and their times are kept. "reach" keeps those of the first outcome's pool.
        stop_at_outcomes: End a trajectory once all outcomes have happened (never where tokens are kept).
        max_tokens: Longest trajectory.
        temperature, top_k, top_p: Anything but 1.0, None, None makes the estimate that of another model.
    """

    horizon_days: float
    num: int = 32
    first: int = 0
    seed: int = 0
    outcomes: tuple[OutcomeTokens, ...] = ()
    estimator: Estimator = "monte_carlo"
    grid_days: tuple[float, ...] = ()
    death_ids: tuple[int, ...] = ()
    until_ids: tuple[int, ...] = ()
    keep_tokens: bool = False
    stop_at_outcomes: bool = True
    max_tokens: int = 4096
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    @property
    def grid(self) -> tuple[float, ...]:
        """The days of the grid, the horizon alone where none were given."""
        return self.grid_days or (self.horizon_days,)


@dataclass
class PatientTrajectories:
    """The trajectories of one prompt.

    Attributes:
        incidence: float64 [n, m, g], what each trajectory says of the probability that the outcome has happened by a
            day of the grid. Their mean estimates it.
            "monte_carlo": 1 where it has, else 0.
            "scope": the sum of h over the steps up to the outcome, h the probability that the step's next event is the
            outcome and comes by that day.
            "reach": the outcome's tokens are never drawn within the horizon; the sum of W h, W the product of 1 - h(H)
            over the steps before, H the horizon. At the horizon that is 1 - product of (1 - h(H)), within [0, 1].
            (arXiv:2602.03730. A `complement` outcome: 1 minus that of its tokens.)
        first_days: float64 [n, m], day of the outcome's first token in the trajectory, infinite where there is none. Of
            "reach", whose trajectories avoid it: infinite.
        ends: int8 [n], `TrajectoryEnd`; of "reach" [n, m].
        end_days: float64 [n] or [n, m], day on which the trajectory ended (the horizon, the death, the last event).
        lengths: int64 [n] or [n, m], tokens drawn within the horizon.
        tokens: With `keep_tokens` a list of n int64 arrays, the tokens within the horizon.
        days: A list of n float64 arrays, day of each token; NaN for interval tokens, which have no time. At least 0.
    """

    incidence: np.ndarray
    first_days: np.ndarray
    ends: np.ndarray
    end_days: np.ndarray
    lengths: np.ndarray
    tokens: list[np.ndarray] | None = None
    days: list[np.ndarray] | None = None


__all__ = [
    "ESTIMATORS",
    "Estimator",
    "ForecastPrompt",
    "OutcomeTokens",
    "PatientTrajectories",
    "TrajectoryEnd",
    "TrajectoryRequest",
]

"""From trajectories to probabilities: what n futures of a patient say, how far off that may be, and when n is enough.

Every estimator gives a number a trajectory (`PatientTrajectories.incidence`); their mean estimates the probability. Its
standard error is:

- *Monte Carlo*, whose numbers are 0 and 1: sqrt(p (1 - p) / n) with p the share after adding z^2 / 2 trajectories of
  each kind, z = 1.96 (Agresti and Coull 1998, doi:10.1080/00031305.1998.10480550; their n + z^2 belongs to an interval
  around that p, not around the estimate). So 0 of 20 is 0 +- 0.06 and never 0 +- 0.
- *SCOPE* and *REACH*: that of the sample, its sum of squares taking in two further trajectories, one that says 0 (or 1,
  where that is nearer) and one as far on the other side of the mean. A few trajectories that happen to lie close
  together therefore do not look certain, and from some dozens on it makes no difference. Where all agree to the last
  digit (one trajectory among them), they say no more than Monte Carlo's would, and the error is Monte Carlo's. What few
  trajectories say of an outcome that hangs on rare turns (a number that is near 0 in most of them) is skewed: intervals
  of 95 % then cover 88 to 93 % of the time with 10 to 60 of them. Where the one turn that matters is in none of them,
  they agree on a number near 0 and cannot know better; so nobody's error is taken for reached before `LEAST_TRUSTED`.

The *effective number* is that of Monte Carlo trajectories which would have this standard error: for Monte Carlo itself
n, for a better estimator more.

Trajectories that were cut at the longest length say nothing of what would have come: whatever they had not seen counts
as not happened, so that the estimate is too low by up to their share (`cut`), of a complement too high.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from transformers.utils import logging

from .ehr_trajectories import (
    ESTIMATORS,
    ForecastPrompt,
    OutcomeTokens,
    PatientTrajectories,
    TrajectoryEnd,
    TrajectoryRequest,
)

logger = logging.get_logger(__name__)

_Z2 = 1.959963984540054**2  # of 95 %
_FEWEST, _MOST = 1e-6, 1e12  # effective numbers that are told
LEAST_TRUSTED = 128
"""Trajectories of SCOPE or REACH below which a small standard error may be that of a turn that none of them took."""

Draw = Callable[[Sequence[ForecastPrompt], TrajectoryRequest], Iterator[PatientTrajectories]]
"""What draws trajectories (`EhrMambaForCausalLM.trajectories`): one answer a prompt, in their order."""


@dataclass(frozen=True)
class OutcomeEstimate:
    """How probable an outcome is for one patient.

    Attributes:
        name: As of `OutcomeTokens`.
        probability: That it happens by the horizon, within [0, 1] (SCOPE's mean may lie beyond: then the bound).
        standard_error: Of `probability`, above 0.
        effective_number: Monte Carlo trajectories that would have this standard error.
        horizon_days: How far ahead.
        num: Trajectories that were drawn.
        cut: Share of them that ended at the longest length, see the module's text.
        grid_days: Days of the cumulative incidence, the last one the horizon; of a complement the horizon alone.
        incidence: Probability that it has happened by each of them.
        incidence_errors: Standard error of each.
    """

    name: str
    probability: float
    standard_error: float
    effective_number: float
    horizon_days: float
    num: int
    cut: float
    grid_days: tuple[float, ...]
    incidence: tuple[float, ...]
    incidence_errors: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def estimate_outcomes(trajectories: PatientTrajectories, request: TrajectoryRequest) -> list[OutcomeEstimate]:
    """What the trajectories of one patient say, outcome by outcome.

    Args:
        trajectories: Of one prompt; how many they are is read from them.
        request: What they were drawn for.

    Raises:
        ValueError: No trajectory, or trajectories of another request.
    """
    incidence = _checked(trajectories, request)
    num = incidence.shape[0]
    is_binary = request.estimator == "monte_carlo"
    estimates = []
    for column, outcome in enumerate(request.outcomes):
        grid, values = request.grid, incidence[:, column]
        if outcome.complement:
            grid, values = grid[-1:], values[:, -1:]
        means = np.clip(values.mean(0), 0.0, 1.0)
        errors = standard_errors(values, is_binary=is_binary)
        ends = trajectories.ends if trajectories.ends.ndim == 1 else trajectories.ends[:, column]
        estimates.append(
            OutcomeEstimate(
                name=outcome.name,
                probability=float(means[-1]),
                standard_error=float(errors[-1]),
                effective_number=float(num) if is_binary else effective_number(float(means[-1]), float(errors[-1])),
                horizon_days=float(request.horizon_days),
                num=num,
                cut=float((ends == TrajectoryEnd.LENGTH).mean()),
                grid_days=tuple(map(float, grid)),
                incidence=tuple(means.tolist()),
                incidence_errors=tuple(errors.tolist()),
            )
        )
    return estimates


def standard_errors(values: np.ndarray, *, is_binary: bool) -> np.ndarray:
    """Standard error of the mean of each column, above 0: float64 [...].

    Args:
        values: One row a trajectory, [n, ...].
        is_binary: Whether they are 0 and 1 (Monte Carlo). The module's text says what is done with either.
    """
    values = np.asarray(values, dtype=np.float64)
    num = len(values)
    means = np.clip(values.mean(0), 0.0, 1.0)
    binomial = _binomial_error(means, num)
    if is_binary or num == 1:
        return binomial
    squares = ((values - values.mean(0)) ** 2).sum(0) + 2 * np.minimum(means, 1 - means) ** 2
    agree = values.max(0) == values.min(0)
    return np.where(agree, binomial, np.sqrt(squares / ((num - 1) * num)))


def effective_number(probability: float, standard_error: float) -> float:
    """How many Monte Carlo trajectories would have a standard error, in a patient of this probability.

    About p (1 - p) / SE^2, and exactly what turns the error of n trajectories back into n.
    """
    few, many = _FEWEST, _MOST  # the error falls with the number: halved in logarithms
    for _ in range(100):
        middle = float(np.sqrt(few * many))
        is_too_few = _binomial_error(np.float64(probability), middle) > standard_error
        few, many = (middle, many) if is_too_few else (few, middle)
    return many


def estimate_to_error(
    draw: Draw,
    prompts: Iterable[ForecastPrompt],
    request: TrajectoryRequest,
    *,
    standard_error: float,
    max_num: int = 4096,
) -> list[list[OutcomeEstimate]]:
    """Draw until every outcome of a patient is known to a standard error, patient by patient.

    The first round draws `request.num` trajectories of everybody, each further one doubles those of the patients who
    need more; of SCOPE and REACH everybody gets `LEAST_TRUSTED` at least. Trajectory k is the same whichever round
    draws it, so a patient's answer does not depend on the others. (To stop where the error looks small favours small
    errors a little; what keeps them above 0 keeps that small.)

    Args:
        draw: Gives the trajectories of each prompt, in order.
        prompts: Records.
        request: Of the first round.
        standard_error: The largest that is wanted, between 0 and 0.5.
        max_num: Most trajectories of a patient. Where that was not enough, a warning tells of how many patients.

    Returns:
        One list a prompt, as `estimate_outcomes` gives it of all the patient's trajectories.

    Raises:
        ValueError: An error out of range, `max_num` below `request.num`, or a request without outcomes.
    """
    if not isinstance(standard_error, (int, float)) or not 0.0 < standard_error < 0.5:
        raise ValueError(f"standard_error got {standard_error!r}; expected a number above 0 and below 0.5, like 0.02.")
    if max_num < request.num:
        raise ValueError(f"max_num={max_num} is less than the first round's num={request.num}; give at least as many.")
    if not request.outcomes:
        raise ValueError("the request names no outcome; without one there is no error to wait for.")
    waiting = list(enumerate(prompts))
    drawn: list[PatientTrajectories | None] = [None] * len(waiting)
    estimates: list[list[OutcomeEstimate]] = [[] for _ in waiting]
    step = replace(request, keep_tokens=False)
    least = 1 if request.estimator == "monte_carlo" else min(LEAST_TRUSTED, max_num)
    short = 0
    while waiting:
        still = []
        answers = draw([prompt for _, prompt in waiting], step)
        for (place, prompt), answer in zip(waiting, answers, strict=True):
            earlier = drawn[place]
            whole = answer if earlier is None else _joined(earlier, answer)
            estimates[place] = estimate_outcomes(whole, request)
            is_known = max(estimate.standard_error for estimate in estimates[place]) <= standard_error
            if is_known and len(whole.incidence) >= least:
                drawn[place] = None
            elif len(whole.incidence) >= max_num:
                drawn[place], short = None, short + 1
            else:
                drawn[place] = whole
                still.append((place, prompt))
        waiting = still
        first = step.first + step.num
        so_far = first - request.first
        step = replace(step, first=first, num=max(1, min(so_far, max_num - so_far)))
    if short:
        logger.warning(
            f"{short} of {len(estimates)} patients have a standard error above {standard_error:g} after {max_num} "
            "trajectories; allow more by max_num, or a larger error."
        )
    return estimates


def check_outcomes(outcomes: Sequence[OutcomeTokens], request: TrajectoryRequest) -> None:
    """Refuse what an estimator cannot answer.

    Raises:
        ValueError: An unknown estimator, a number below 1, no outcome, one without tokens or of a name that stands
            twice, or a complement of which the incidence before the horizon is asked.
    """
    if request.estimator not in ESTIMATORS:
        raise ValueError(f"estimator got {request.estimator!r}; expected one of {list(ESTIMATORS)}.")
    if isinstance(request.num, bool) or not isinstance(request.num, (int, np.integer)) or request.num < 1:
        raise ValueError(f"num got {request.num!r}; expected at least 1 trajectory a patient, like 32.")
    if not outcomes:
        raise ValueError("no outcome is asked for; name at least one, like {'death': 'death'}.")
    names = [outcome.name for outcome in outcomes]
    for outcome in outcomes:
        if names.count(outcome.name) > 1:
            raise ValueError(f"the outcome {outcome.name!r} stands twice; give each a name of its own.")
        if not len(outcome.ids):
            raise ValueError(f"the outcome {outcome.name!r} has no token; an empty one would silently be 0.")
        if outcome.complement and len(request.grid) > 1:
            raise ValueError(
                f"the outcome {outcome.name!r} is that something does not come up to the horizon: it has no incidence "
                f"before it. Ask for it without the days {list(request.grid[:-1])}."
            )


def _checked(trajectories: PatientTrajectories, request: TrajectoryRequest) -> np.ndarray:
    """The incidence as float64 [n, m, g]."""
    incidence = np.asarray(trajectories.incidence, dtype=np.float64)
    expected = (len(request.outcomes), len(request.grid))
    if incidence.ndim != 3 or incidence.shape[1:] != expected:
        raise ValueError(
            f"the trajectories' incidence is {list(incidence.shape)}; expected [n, {expected[0]}, {expected[1]}] of "
            "the request's outcomes and days. Give the request that they were drawn for."
        )
    if not len(incidence):
        raise ValueError("there is no trajectory; no probability can be estimated from none. Draw at least one.")
    if not np.isfinite(incidence).all():
        raise ValueError("the trajectories' incidence holds NaN or infinite values; the model's logits probably do.")
    return incidence


def _binomial_error(means: np.ndarray | np.float64, num: float) -> np.ndarray:
    """Standard error of a share among `num`, of the share that Agresti and Coull's interval lies around."""
    shrunk = (means * num + _Z2 / 2) / (num + _Z2)
    return np.asarray(np.sqrt(shrunk * (1 - shrunk) / num))


def _joined(first: PatientTrajectories, second: PatientTrajectories) -> PatientTrajectories:
    def both(name: str) -> np.ndarray:
        return np.concatenate([getattr(first, name), getattr(second, name)])

    return PatientTrajectories(
        incidence=both("incidence"),
        first_days=both("first_days"),
        ends=both("ends"),
        end_days=both("end_days"),
        lengths=both("lengths"),
    )


__all__ = [
    "Draw",
    "OutcomeEstimate",
    "check_outcomes",
    "effective_number",
    "estimate_outcomes",
    "estimate_to_error",
    "standard_errors",
]

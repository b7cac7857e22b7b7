"""What a forecast says of one patient, from estimates and trajectories: `outcomes`, `next` and `trajectories`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from statistics import median
from typing import Any, Protocol

import numpy as np

MOST_NEXT = 10
"""Events that are told under `next`."""

_EPOCH = datetime(1970, 1, 1)


class _Meaning(Protocol):
    """What an event's token says (`TokenMeaning`)."""

    @property
    def code(self) -> str: ...

    @property
    def low(self) -> float | None: ...

    @property
    def high(self) -> float | None: ...

    @property
    def unit(self) -> str | None: ...


Meanings = Mapping[int, _Meaning]
"""Token id -> what it says; marks of visits, intervals and questions are not in it."""


def outcome_answers(question: Any, estimates: Sequence[Any]) -> list[dict[str, Any]]:
    """One entry an outcome; without estimates the probabilities are None.

    Args:
        question: `ForecastQuestion`.
        estimates: `OutcomeEstimate`, one an outcome, or none.
    """
    if not estimates:
        nothing = {"probability": None, "standard_error": None, "horizon": question.horizon}
        return [{"outcome": outcome.name, **nothing} for outcome in question.outcomes]
    answers = []
    for estimate in estimates:
        answer = {
            "outcome": estimate.name,
            "probability": estimate.probability,
            "standard_error": estimate.standard_error,
            "horizon": question.horizon,
        }
        if question.grid_days:
            days = zip(estimate.grid_days, estimate.incidence, estimate.incidence_errors, strict=True)
            answer["incidence"] = [
                {"days": day, "probability": value, "standard_error": error} for day, value, error in days
            ]
        answers.append(answer)
    return answers


def next_events(trajectories: Any, meanings: Meanings, prediction_time: int, unknown: int) -> list[dict[str, Any]]:
    """The codes that most trajectories hold, with the median time of their first occurrence.

    Args:
        trajectories: `PatientTrajectories` with their tokens.
        meanings: Of the model's tokens.
        prediction_time: Microseconds.
        unknown: Id of [UNK], which names no event.
    """
    first: dict[str, list[float]] = {}
    for tokens, days in zip(trajectories.tokens, trajectories.days, strict=True):
        seen: set[str] = set()
        for token, day in zip(tokens.tolist(), days.tolist(), strict=True):
            meaning = meanings.get(token)
            if meaning is None or token == unknown or meaning.code in seen:
                continue
            seen.add(meaning.code)
            first.setdefault(meaning.code, []).append(day)
    total = len(trajectories.tokens)
    ranked = sorted(first.items(), key=lambda entry: (-len(entry[1]), median(entry[1]), entry[0]))
    return [
        {"code": code, "probability": len(days) / total, "time": time_after(prediction_time, median(days))}
        for code, days in ranked[:MOST_NEXT]
    ]


def trajectory_answers(trajectories: Any, meanings: Meanings, prediction_time: int) -> list[list[dict[str, Any]]]:
    """The events of each trajectory, in order; a value is told by the range of its bin."""
    answers = []
    for tokens, days in zip(trajectories.tokens, trajectories.days, strict=True):
        events = []
        for token, day in zip(tokens.tolist(), days.tolist(), strict=True):
            meaning = meanings.get(token)
            if meaning is None:
                continue
            event: dict[str, Any] = {"time": time_after(prediction_time, day), "code": meaning.code}
            if meaning.low is not None or meaning.high is not None:
                event |= {"low": meaning.low, "high": meaning.high}
                if meaning.unit is not None:
                    event["unit"] = meaning.unit
            events.append(event)
        answers.append(events)
    return answers


def time_after(prediction_time: int, days: float) -> str | None:
    """ISO 8601 of so many days after an instant (microseconds), in whole seconds; None beyond the year 9999."""
    if not np.isfinite(days):
        return None
    try:
        return (_EPOCH + timedelta(microseconds=prediction_time) + timedelta(days=days)).isoformat(timespec="seconds")
    except OverflowError:
        return None


def words_of_counts(counts: Counter[str], words: Mapping[str, str]) -> str:
    """Reasons in words with their numbers, the most frequent first."""
    return "; ".join(f"{words.get(reason, reason)} ({count})" for reason, count in counts.most_common())

"""What a task asks of a forecast."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

from ehrseq.modeling.ehr_trajectories import OutcomeTokens

LONGEST_STAY_DAYS = 365.0
"""How far a forecast looks for the end of a stay where a task's horizon is that end."""


@dataclass(frozen=True)
class TaskForecast:
    """What a task asks of a forecast.

    Attributes:
        name: Of the task.
        horizon_days: From the prediction time.
        outcome: What is looked for.
        until_ids: Tokens at which a trajectory ends: nothing that comes later counts. Often ().
        death_ids: Tokens of the patient's death, which ends it as well: a competing event, or the outcome itself.
        needs_time_head: Whether the answer rests on the time within a visit, which only a model with a time head has.
        moments: When and about whom the task is asked, in words: its labels name these moments.
        notes: Where what is estimated differs from what the task's labels say, in words.
    """

    name: str
    horizon_days: float
    outcome: OutcomeTokens
    until_ids: tuple[int, ...]
    death_ids: tuple[int, ...]
    needs_time_head: bool
    moments: str
    notes: tuple[str, ...]


def codes_that_match(codes: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The codes in which one of some regular expressions finds something, in Rust's syntax, as labels are made."""
    names = pl.Series(sorted(codes), dtype=pl.String)
    return set().union(*(names.filter(names.str.contains(pattern)).to_list() for pattern in patterns))


__all__ = ["LONGEST_STAY_DAYS", "TaskForecast", "codes_that_match"]

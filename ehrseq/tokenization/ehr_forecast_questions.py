"""What is asked of a forecast, in a user's words, as a model is asked it: days, and tokens of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np

from .ehr_durations import DURATION_FORM, parse_duration
from .ehr_outcomes import ReadOutcome, death_ids, event_tokens, read_outcomes, visit_end_ids
from .ehr_vocabulary import UNK, EventVocabulary, bin_token

DEFAULT_OUTCOMES = ("death", "any_admission")
"""What is told where nothing is asked for."""

LONGEST_HORIZON = timedelta(days=3653)
"""Ten years: no record that a model learns from says much of later times."""

VISIT_END = "visit_end"
"""`until`: the end of the visit, by its last token or by what is said of the discharge."""

_LAST_INTERVAL_DAYS = 366
_DAY = timedelta(days=1)


class ForecastQuestion(NamedTuple):
    """What is asked, alike of every patient.

    Attributes:
        horizon: In the user's words.
        horizon_days: From the prediction time.
        outcomes: What is looked for.
        grid_days: Days at which the cumulative incidence is told, ascending, the last one the horizon; () = only there.
        until_ids: Tokens after which nothing counts.
        death_ids: Tokens of the patient's death.
        notes: Where what is estimated differs from what was asked, in words.
    """

    horizon: str
    horizon_days: float
    outcomes: tuple[ReadOutcome, ...]
    grid_days: tuple[float, ...]
    until_ids: tuple[int, ...]
    death_ids: tuple[int, ...]
    notes: tuple[str, ...]


class TokenMeaning(NamedTuple):
    """What an event's token says.

    Attributes:
        code: Of the event.
        low, high: Its value lies above `low`, and up to `high`; None where it is open, or the token says no value.
        unit: Of the value, None where it has none.
    """

    code: str
    low: float | None = None
    high: float | None = None
    unit: str | None = None


def read_forecast_question(
    vocabulary: EventVocabulary,
    horizon: Any,
    outcomes: Any = None,
    *,
    grid: Any = None,
    until: Any = None,
    time_head: bool = False,
) -> ForecastQuestion:
    """Read what is asked for.

    Args:
        vocabulary: Of the model's tokenizer.
        horizon: Such as "30d" or "48h", or a timedelta; up to ten years.
        outcomes: Name -> what stands for it (`ehr_outcomes.py`), a code or word, or a list of them; None = those of
            `DEFAULT_OUTCOMES` that the vocabulary has.
        grid: Durations at which the cumulative incidence is told, or a number of steps up to the horizon.
        until: "visit_end", or what may stand for an outcome: nothing that comes after it counts.
        time_head: Whether the model has a time of its own for the events of a visit.

    Raises:
        ValueError: A horizon, grid, outcome or end that cannot be read, or that no token stands for.
    """
    span = read_horizon(horizon)
    days = span / _DAY
    notes: list[str] = []
    read = _read_outcomes(outcomes, vocabulary, time_head, notes)
    notes += [f"{outcome.name}: {words}" for outcome in read for words in outcome.notes]
    deaths = death_ids(vocabulary)
    if not deaths:
        notes.append("the vocabulary has no token of a death: no trajectory ends in one")
    if not time_head and span < _DAY:
        notes.append(
            f"a horizon of {horizon} lies below a day, and the model has no time within visits: what it foretells for "
            "the rest of the visit counts whenever it comes"
        )
    if not time_head and days > _LAST_INTERVAL_DAYS:
        notes.append("times between visits of more than a year are one token of the model, drawn around 547 days")
    return ForecastQuestion(
        horizon=horizon if isinstance(horizon, str) else spell_days(days),
        horizon_days=days,
        outcomes=read,
        grid_days=_read_grid(grid, days),
        until_ids=_read_until(until, vocabulary, time_head),
        death_ids=deaths,
        notes=tuple(notes),
    )


def read_horizon(horizon: Any) -> timedelta:
    """How far a forecast looks.

    Raises:
        ValueError: No duration, 0 or less, or more than `LONGEST_HORIZON`.
    """
    span = _duration("horizon", horizon)
    if span > LONGEST_HORIZON:
        raise ValueError(
            f"horizon got {horizon!r}, which is more than ten years: the model never learnt from times so far ahead. "
            "Ask for at most 3653d."
        )
    return span


def spell_days(days: float) -> str:
    """Days in the largest unit that makes a whole number of them.

    >>> [spell_days(d) for d in (30.0, 14.0, 2 / 24, 0.5 / 24)]
    ['30d', '14d', '2h', '30m']
    """
    for unit, length in (("d", 1.0), ("h", 24.0), ("m", 1440.0)):
        if abs(days * length - round(days * length)) < 1e-6:
            return f"{round(days * length)}{unit}"
    return f"{days:g}d"


def token_meanings(vocabulary: EventVocabulary) -> dict[int, TokenMeaning]:
    """Token id -> what it says, for every token that an event can become, and [UNK]: one of a code that is too rare."""
    meanings = {number: TokenMeaning(token) for token, number in event_tokens(vocabulary)}
    for code, units in vocabulary.value_bins.items():
        for unit, edges in units.items():
            bounds = [None, *edges, None]
            for k in range(len(edges) + 1):
                number = vocabulary.token_ids.get(bin_token(code, unit, k))
                if number in meanings:
                    meanings[number] = TokenMeaning(code, bounds[k], bounds[k + 1], unit or None)
    meanings[vocabulary.token_ids[UNK]] = TokenMeaning(UNK)
    return meanings


def _duration(name: str, value: Any) -> timedelta:
    try:
        span = value if isinstance(value, timedelta) else parse_duration(value)
    except OverflowError:
        span = timedelta.max
    if span is None or span <= timedelta(0):
        raise ValueError(f"{name} got {value!r}; expected {DURATION_FORM}, above 0.")
    return span


def _read_outcomes(
    outcomes: Any, vocabulary: EventVocabulary, time_head: bool, notes: list[str]
) -> tuple[ReadOutcome, ...]:
    if outcomes is not None:
        return read_outcomes(_named(outcomes), vocabulary, time_head=time_head)
    read: list[ReadOutcome] = []
    missing: dict[str, str] = {}
    for word in DEFAULT_OUTCOMES:
        try:
            read += read_outcomes({word: word}, vocabulary, time_head=time_head)
        except ValueError as error:
            missing[word] = str(error)
    if not read:
        raise ValueError(
            f"no outcomes were given, and the model has none of {list(DEFAULT_OUTCOMES)}; name some of its codes. "
            f"{' '.join(missing.values())}"
        )
    notes += [f"{word} is not told: {why}" for word, why in missing.items()]
    return tuple(read)


def _named(outcomes: Any) -> Mapping[str, Any]:
    """Outcomes with their names: a code or a word is its own name."""
    if isinstance(outcomes, Mapping):
        return outcomes
    several = [outcomes] if isinstance(outcomes, str) else outcomes
    if not isinstance(several, Sequence) or not all(isinstance(each, str) for each in several):
        raise ValueError(
            f"outcomes got {outcomes!r}; expected a mapping of name -> codes, like {{'icu': 'ICU_ADMISSION//*'}}, a "
            "code, or a list of codes."
        )
    return {each: each for each in several}


def _read_grid(grid: Any, horizon_days: float) -> tuple[float, ...]:
    if grid is None:
        return ()
    if isinstance(grid, (int, np.integer)) and not isinstance(grid, bool):
        if not 1 <= grid <= 1000:
            raise ValueError(f"grid got {grid}; expected 1 to 1000 steps up to the horizon, or durations.")
        return (*(step * horizon_days / int(grid) for step in range(1, int(grid))), horizon_days)
    if isinstance(grid, str) or not isinstance(grid, Sequence) or not grid:
        raise ValueError(f"grid got {grid!r}; expected durations such as ['1d', '7d'], or a number of steps.")
    days = sorted({_duration("grid", each) / _DAY for each in grid} | {horizon_days})
    if days[-1] > horizon_days:
        raise ValueError(f"grid got {grid!r}, which goes beyond the horizon of {spell_days(horizon_days)}.")
    return tuple(days)


def _read_until(until: Any, vocabulary: EventVocabulary, time_head: bool) -> tuple[int, ...]:
    if until is None:
        return ()
    if until == VISIT_END:
        return tuple(sorted(set(visit_end_ids(vocabulary))))
    read = read_outcomes({"until": until}, vocabulary, time_head=time_head)[0]
    if read.complement:
        raise ValueError(f"until got {until!r}; expected what ends the forecast, not that something does not come.")
    return tuple(read.ids.tolist())

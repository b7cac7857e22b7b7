"""Whether a task can be asked about a patient at a time.

A model learns each task at one kind of moment (24 hours after an admission, a discharge) of patients for whom the
answer is open. Asked about somebody else it still gives a number. `reasons_against` says what is wrong with such a
question; the rules are those of the labelling engine (`ehrseq.tasks`), as far as `config.tasks` carries them under
"asked".

| reason | what it means | score |
|---|---|---|
| `died_before_prediction` | the patient is dead | none |
| `death_time_unknown` | the patient has died, perhaps before that time: nobody knows when | none |
| `earlier_code` | the diagnosis that the task foretells is recorded already | none |
| `stay_ended` | the task is about a stay in hospital, and the patient is in none | none |
| `no_discharge` | the task is asked at a discharge, and the patient is in hospital or has never been | given |
| `off_anchor` | the moment at which the task is asked is more than a day away | given |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np

from .ehr_codes import DAY_US, EXPIRED, GOES_ON, HOUR_US, INPATIENT_CLASSES, KIND_RANKS
from .ehr_sequence import Event, asked_at
from .ehr_visits import Boundary, pair_encounters

REASONS_AGAINST = {
    "died_before_prediction": "the patient died at or before the prediction time",
    "death_time_unknown": "the patient has died, and it is not known whether before the prediction time",
    "earlier_code": "the diagnosis was recorded before the prediction time",
    "stay_ended": "the patient is in no hospital stay at the prediction time",
    "no_discharge": "the patient has not been discharged from a hospital stay at the prediction time",
    "off_anchor": "the prediction time is not within a day of the moment that the task is asked at",
}
"""Why a task cannot be asked, in words, in the order in which they are tried."""

UNANSWERABLE = ("died_before_prediction", "death_time_unknown", "earlier_code", "stay_ended")
"""Reasons that leave nothing to foretell: no score is given. With the others it is, outside of what was learnt."""


def reasons_against(
    events: Sequence[Event],
    kind_of: Callable[[str], tuple[str, str | None]],
    tasks: Sequence[Mapping[str, Any]],
    prediction_time: int | None,
) -> list[str | None]:
    """For each task the first of `REASONS_AGAINST` that speaks against it, None where it can be asked.

    Args:
        events: The patient's events, in any order.
        kind_of: Kind and encounter class of a code (`EventVocabulary.kind`).
        tasks: Entries of `config.tasks`. Without "asked" (anchor, offset_hours, exclude, codes) only death counts.
        prediction_time: Microseconds; later events are not looked at. None: the last event.

    Raises:
        ValueError: A code pattern that is no regular expression.
    """
    known = _Known(events, kind_of, prediction_time)
    return [known.against(task) for task in tasks]


def matters(code: str, kind_of: Callable[[str], tuple[str, str | None]], tasks: Iterable[Mapping[str, Any]]) -> bool:
    """Whether rows of a code can speak against one of the tasks; the others may be left out."""
    if kind_of(code)[0] in ("death", "visit_start", "visit_end"):
        return True
    patterns = {pattern for task in tasks for pattern in _asked(task).get("codes", ())}
    return any(_pattern(pattern).search(code) for pattern in patterns)


def _asked(task: Mapping[str, Any]) -> Mapping[str, Any]:
    asked = task.get("asked") or {}
    if not isinstance(asked, Mapping):
        raise ValueError(
            f"config.tasks: 'asked' of {task.get('name')!r} is {asked!r}; expected a mapping with anchor, "
            "offset_hours, exclude and codes (Task.to_config())."
        )
    return asked


@dataclass(slots=True)
class _Stay:
    """The latest admission: inpatient encounters that overlap or follow one another on one day."""

    start: int
    end: int | None
    is_open: bool


class _Known:
    """What is known of a patient at a time."""

    def __init__(
        self, events: Sequence[Event], kind_of: Callable[[str], tuple[str, str | None]], prediction_time: int | None
    ) -> None:
        self.now = asked_at(events, prediction_time)
        self.codes: set[str] = set()
        self.is_dead = False
        self.may_be_dead = False
        boundaries: list[Boundary] = []
        ended: set[str] = set()
        for event in events:
            if event.time is not None and self.now is not None and event.time > self.now:
                continue
            self.codes.add(event.code)
            kind, encounter_class = kind_of(event.code)
            if kind == "death" or (kind == "visit_end" and re.search(EXPIRED, event.code)):
                first, last = (event.time, event.time) if event.time is not None else _reduced(event.text)
                self.is_dead |= last is not None and self.now is not None and last <= self.now
                self.may_be_dead |= first is None or self.now is None or first <= self.now
            if kind in ("visit_start", "visit_end") and event.time is not None:
                boundaries.append((event.time, KIND_RANKS[kind], encounter_class, event.visit_id))
            elif kind == "visit_end" and event.visit_id is not None and not re.search(GOES_ON, event.code):
                ended.add(event.visit_id)
        # A death whose time is known says more than one whose time is not.
        dated = any(e.time is not None and kind_of(e.code)[0] == "death" for e in events)
        self.may_be_dead &= not dated
        self.stay = _latest_stay(boundaries, ended)

    def against(self, task: Mapping[str, Any]) -> str | None:
        """The first reason that holds, see `reasons_against`."""
        asked = _asked(task)
        excluded = asked.get("exclude", ()) if asked else ("dead",)
        if self.is_dead and "dead" in excluded:
            return "died_before_prediction"
        if self.may_be_dead and "dead" in excluded:
            return "death_time_unknown"
        if not asked:
            return None
        if "earlier_code" in excluded and any(
            _pattern(pattern).search(code) for code in self.codes for pattern in asked.get("codes", ())
        ):
            return "earlier_code"
        stay = self.stay
        if asked.get("anchor") == "admission":
            if stay is None or not stay.is_open:
                return "stay_ended"
            anchor: int | None = stay.start
        elif asked.get("anchor") == "discharge":
            if stay is None or stay.is_open or stay.end is None:
                return "no_discharge"
            anchor = stay.end
        else:
            return None
        if anchor is None or self.now is None:
            return None
        late = self.now - anchor - asked.get("offset_hours", 0) * HOUR_US
        return None if 0 <= late <= DAY_US else "off_anchor"


def _reduced(text: str | None) -> tuple[int | None, int | None]:
    """First and last instant (microseconds) of the year or month that the text of a death names, else nothing."""
    match = re.fullmatch(r"(\d{4})(?:-(\d{2}))?", text or "")
    if match is None or not int(match[1]) or not 1 <= int(match[2] or 1) <= 12:
        return None, None
    month, months = int(match[2] or 1), 1 if match[2] else 12
    begins = [np.datetime64(f"{match[1]}-{month:02d}", "M") + step for step in (0, months)]
    first, after = (int(moment.astype("datetime64[us]").astype(np.int64)) for moment in begins)
    return first, after - 1


def _latest_stay(boundaries: list[Boundary], ended: Collection[str]) -> _Stay | None:
    """The latest admission of starts and ends in any order; `ended`: visit_ids that have ended, nobody knows when."""
    encounters, _ = pair_encounters(sorted(boundaries, key=itemgetter(0, 1)))
    inpatient = [encounter for encounter in encounters if encounter.encounter_class in INPATIENT_CLASSES]
    stay: _Stay | None = None
    reach = 0
    for k, encounter in enumerate(inpatient):
        visit_id, start, end = encounter.visit_id, encounter.start, encounter.end
        # Without an end: in progress, unless another admission came after it; then its end was never recorded.
        superseded = end is None and any(
            other.start > start and (visit_id is None or other.visit_id != visit_id) for other in inpatient[k + 1 :]
        )
        is_open = end is None and not superseded and visit_id not in ended
        if stay is None or (not stay.is_open and start // DAY_US > reach // DAY_US):
            stay, reach = _Stay(start, end, is_open), start
        else:
            stay.is_open = stay.is_open or is_open
            stay.end = end if stay.end is None or (end is not None and end > stay.end) else stay.end
        reach = max(reach, start if end is None else end)
    return stay


@lru_cache(maxsize=1024)
def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"config.tasks: Python cannot read the code pattern {pattern!r} ({error}); write it in what Rust's and "
            "Python's regular expressions have in common."
        ) from error

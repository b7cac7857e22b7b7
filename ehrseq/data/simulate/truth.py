"""Which events carry the true risk: how it changes when an event is taken out of a simulated record.

    truth = true_changes(events, "mortality_30d", discharge)      # one patient's rows of `Simulation.events()`
    truth.by_event, truth.carries                                 # one number, one bool a row

The risks of the simulator are a closed formula of the recorded rows (`risk`), so that what an explanation of a model
can only guess is known here: the log-odds of the risk with all rows, and with all rows but one. No part of it depends
on a method of explanation.

Two things follow from the formula and are no fault of it. Of several records of a chronic disease none changes the risk
when it alone is taken out, though together they do: `carries` counts all of them, `by_code` takes all rows of a code
out at once. And a row matters through its latest reading only: the potassium of last year changes nothing.

The rows of a visit's start and end, of birth and of death say when the question is asked and of whom: without them it
would be another question. They are held, and have no change (NaN).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.data.simulate.codes import CHRONIC, CONDITION_CODES, MEASUREMENTS, VOCABULARY
from ehrseq.data.simulate.history import RecordedHistory
from ehrseq.data.simulate.risk import SCORES
from ehrseq.data.simulate.state import STATIC, UNITS
from ehrseq.tokenization.ehr_codes import MINUTE_US

_HELD = ("MEDS_BIRTH", "MEDS_DEATH", "VISIT_START//", "VISIT_END//")
_CHRONIC = frozenset(f"DIAGNOSIS//ICD10CM//{code}" for _, code, _ in CHRONIC)
_NO_ENCOUNTER = -1
_LEAST_CHANGE = 1e-9
"""Changes of the log-odds below this are rounding."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class TrueChanges:
    """What `true_changes` finds; arrays have one entry a row of the event table.

    Attributes:
        risk: The true risk at the time; NaN where there is no answer.
        log_odds: Of it.
        by_event: float64 `[n]`, log-odds with all rows - log-odds without this one. NaN: the row is held, is not
            known yet at the time, or there is no answer with or without it.
        by_code: float64 `[n]`, the same without any row of this row's code.
        carries: bool `[n]`, whether the row bears on the risk: it changes it when it alone is taken out, or it is one
            of several records of a chronic disease that together do.
    """

    risk: float
    log_odds: float
    by_event: FloatArray
    by_code: FloatArray
    carries: NDArray[np.bool_]


def recorded_columns(events: pl.DataFrame) -> dict[str, NDArray[Any]]:
    """Rows of the MEDS table as the columns that `RecordedHistory` reads, all of patient 0; unknown codes are left out.

    Args:
        events: Event table of one simulated patient, with the columns of `Simulation.events()`.

    Returns:
        row, minutes, code, value, unit, encounter, and `place`: the position of each in the table.

    Raises:
        ValueError: A column is missing, or the table is of several patients.
    """
    missing = [name for name in ("time", "code", "numeric_value", "unit", "visit_id") if name not in events.columns]
    if missing:
        raise ValueError(f"the events lack the columns {missing}; give rows of Simulation.events().")
    if "subject_id" in events.columns and events["subject_id"].n_unique() > 1:
        raise ValueError(f"the events are of {events['subject_id'].n_unique()} patients; give those of one.")
    codes = events["code"].replace_strict(VOCABULARY.index, default=-1, return_dtype=pl.Int64).to_numpy()
    time = events["time"].cast(pl.Datetime("us"))
    minutes = np.where(time.is_null().to_numpy(), STATIC, time.dt.epoch("us").fill_null(0).to_numpy() // MINUTE_US)
    values = events["numeric_value"].cast(pl.Float64).fill_null(np.nan).to_numpy()
    known = {unit: number for number, unit in enumerate(UNITS) if unit}
    units = events["unit"].cast(pl.String).replace_strict(known, default=0, return_dtype=pl.Int64).to_numpy()
    numbers = events["visit_id"].cast(pl.String).str.split("-").list.last()
    encounters = numbers.cast(pl.Int64, strict=False).fill_null(_NO_ENCOUNTER).to_numpy()
    keep = np.flatnonzero(codes >= 0)
    columns = {"minutes": minutes, "code": codes, "value": values, "unit": units, "encounter": encounters}
    return {"row": np.zeros(len(keep), np.int64), "place": keep, **{name: c[keep] for name, c in columns.items()}}


def true_risk_of(events: pl.DataFrame, task: str, time: datetime) -> float:
    """The true risk of any record in the simulator's words, also of one that the process never drew.

    For a record as drawn it is what `Simulation.true_risk` gives, to the precision of the table's float32 values.

    Args:
        events: Event table of one patient; rows after `time` do not matter.
        task: One of `SIMULATED_TASKS`.
        time: When the question is asked, UTC, read to the whole minute.

    Raises:
        ValueError: See `recorded_columns`; an unknown task.
    """
    return float(_risks(recorded_columns(events), 1, task, _minutes(time))[0])


def true_changes(events: pl.DataFrame, task: str, time: datetime) -> TrueChanges:
    """How the true risk changes without each event, and without each code.

    Args:
        events: Event table of one simulated patient, in any order.
        task: One of `SIMULATED_TASKS`.
        time: When the question is asked, UTC, read to the whole minute.

    Raises:
        ValueError: See `recorded_columns`; an unknown task.
    """
    columns = recorded_columns(events)
    minute = _minutes(time)
    is_held = events["code"].str.contains("|".join(f"^{code}" for code in _HELD)).to_numpy()
    known = (events["time"].is_null() | (events["time"].cast(pl.Datetime("us")) <= time)).to_numpy()
    whole = _log_odds(_risks(columns, 1, task, minute))[0]

    # 1. Rows that no feature reads change nothing; only the others are tried, one copy of the record for each.
    by_event = np.where(known & ~is_held & np.isfinite(whole), 0.0, np.nan)
    by_code = by_event.copy()
    read = _READ[columns["code"]]
    columns = {name: column[read] for name, column in columns.items()}
    place = columns.pop("place")
    tried = np.flatnonzero(~np.isnan(by_event[place]))
    without = _without(columns, [np.array([one]) for one in tried])
    by_event[place[tried]] = whole - _log_odds(_risks(without, len(tried), task, minute))

    # 2. The same without all rows of a code.
    codes = np.unique(columns["code"][tried])
    groups = [tried[columns["code"][tried] == code] for code in codes]
    changes = whole - _log_odds(_risks(_without(columns, groups), len(groups), task, minute))
    for group, change in zip(groups, changes, strict=True):
        by_code[place[group]] = change

    chronic = events["code"].is_in(list(_CHRONIC)).to_numpy()
    carries = (np.abs(by_event) > _LEAST_CHANGE) | (chronic & (np.abs(by_code) > _LEAST_CHANGE))
    return TrueChanges(float(1.0 / (1.0 + np.exp(-whole))), float(whole), by_event, by_code, carries)


def true_deltas(events: pl.DataFrame, task: str, time: datetime) -> FloatArray:
    """How the true risk moved with each event as it was recorded: what prefix deltas of a model are to be held against.

    The log-odds of the record as far as an event, asked at that event's time, less those of the record as far as the
    event before it, asked then: time that passes is in the difference.

    Args:
        events: Event table of one simulated patient, in the order of `Simulation.events()`.
        task: One of `SIMULATED_TASKS`.
        time: When the question is asked, UTC; later events have no delta.

    Returns:
        float64 `[n]`; NaN for events without time, later ones, and where there is no answer before or after.

    Raises:
        ValueError: See `recorded_columns`; an unknown task.
    """
    columns = recorded_columns(events)
    place = columns.pop("place")
    minutes = columns["minutes"]
    timed = np.flatnonzero((minutes != STATIC) & (minutes <= _minutes(time)))
    kept = _READ[columns["code"]]
    count = np.cumsum(kept)
    # Patient k has the rows that are read among those up to the k-th timed event.
    rows = [np.flatnonzero(kept)[: count[k]] for k in timed]
    patient = np.repeat(np.arange(len(timed)), [len(row) for row in rows])
    prefixes = {name: column[np.concatenate(rows)] for name, column in columns.items()} if len(timed) else columns
    log_odds = np.full(len(timed), np.nan)
    if len(timed):
        history = RecordedHistory({**prefixes, "row": patient}, len(timed))
        log_odds = _log_odds(history.risk(_known(task), np.arange(len(timed)), minutes[timed]))
    deltas = np.full(events.height, np.nan)
    deltas[place[timed[1:]]] = np.diff(log_odds)
    return deltas


def _known(task: str) -> str:
    if task not in SCORES:
        raise ValueError(f"got task {task!r}; expected one of {list(SCORES)}, whose true risk is known.")
    return task


def _minutes(time: datetime) -> int:
    return int(np.datetime64(time.replace(tzinfo=None), "m").astype(np.int64))


def _without(columns: dict[str, NDArray[Any]], groups: list[NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
    """One copy of a record for each group of its rows, without that group; patient k lacks group k."""
    count = len(columns["code"])
    keep = np.ones((len(groups), count), dtype=bool)
    for number, group in enumerate(groups):
        keep[number, group] = False
    patient, row = np.nonzero(keep)
    return {name: patient if name == "row" else column[row] for name, column in columns.items()}


def _risks(columns: dict[str, NDArray[Any]], count: int, task: str, minute: int) -> FloatArray:
    if count == 0:
        return np.empty(0)
    rows = np.arange(count)
    risks: FloatArray = RecordedHistory(columns, count).risk(_known(task), rows, np.full(count, minute))
    return risks


def _log_odds(risks: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore"):
        odds: FloatArray = np.log(risks) - np.log1p(-risks)
    return odds


def _read_codes() -> NDArray[np.bool_]:
    """Which codes `RecordedHistory` reads, by id."""
    read = {code for channel in MEASUREMENTS for code in channel.codes} | _CHRONIC | {"GENDER//M"}
    read |= {f"DIAGNOSIS//ICD10CM//{code}" for options in CONDITION_CODES.values() for code, _ in options}
    return np.array([code in read or code.startswith(_HELD) for code in VOCABULARY.codes])


_READ = _read_codes()

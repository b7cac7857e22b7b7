"""A record as a pretrained model continues it: its tokens, how long ago the last of them was, and what makes its random
numbers its own.

A prompt for a risk ends in the task's token, which carries the prediction time. A record that is continued ends in its
last event, or in [VE] [REG] where the last visit is over; the time since then is told beside it, so that a forecast can
be conditioned on nothing having happened in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .ehr_anchors import reasons_against
from .ehr_codes import DAY_US
from .ehr_prompts import PatientPrompts
from .ehr_rows import HistoryRows
from .ehr_vocabulary import UNK

NOTHING_KNOWN, SILENT_TOO_LONG = "nothing_known", "silent_too_long"
LONGEST_SILENCE_DAYS = 50 * 365.25
"""Days before the prediction time without any event, beyond which no model has learnt what comes."""
REASONS_AGAINST_FORECAST = {
    "died_before_prediction": "the patient died at or before the prediction time",
    "death_time_unknown": "the patient has died, and it is not known whether before the prediction time",
    NOTHING_KNOWN: "no timed event that the model reads is known at the prediction time",
    SILENT_TOO_LONG: "the last event lies more than 50 years before the prediction time",
}
"""Why a record has no forecast, in words, in the order in which they are tried."""


class RecordToForecast(NamedTuple):
    """One record, as `EhrTokenizer.forecast_prompt` gives it.

    Attributes:
        inputs: Channel -> [l], as pretraining rows hold them.
        elapsed_days: Days from the last token to the prediction time, at least 0.
        key: Of subject and prediction time, 0 <= key < 2**63: the same on every machine.
        prediction_time: Microseconds since 1970; the last event where none was given; None where nothing has a time.
        reason: A key of `REASONS_AGAINST_FORECAST` where there is nothing to forecast, else None.
    """

    inputs: Mapping[str, np.ndarray]
    elapsed_days: float
    key: int
    prediction_time: int | None
    reason: str | None


def close_lapsed(rows: HistoryRows, prediction_time: int | None) -> HistoryRows:
    """The rows of one patient, the last visit closed where it has lapsed by the prediction time (microseconds).

    While a record is read, a visit lapses when the next row comes; here none comes, but that visit is as much over.
    """
    if prediction_time is None or rows.open_until is None or prediction_time <= rows.open_until:
        return rows
    is_open = rows.is_open.copy()
    is_open[-1:] = False
    return replace(rows, is_open=is_open, open_until=None)


def record_to_forecast(
    prompts: PatientPrompts, kind_of: Callable[[str], tuple[str, str | None]], subject_id: Any
) -> RecordToForecast:
    """What a model continues, of the unprompted row of one patient.

    Args:
        prompts: That row, the only one.
        kind_of: Kind and encounter class of a code (`EventVocabulary.kind`).
        subject_id: As given; an id and its text are the same subject.
    """
    asked = prompts.prediction_time
    last = _last_token_time(prompts.rows)
    reason = reasons_against(prompts.events, kind_of, [{"name": "forecast"}], asked)[0]
    if reason is None and (last is None or not _names_an_event(prompts)):
        reason = NOTHING_KNOWN
    elapsed = 0.0 if last is None or asked is None else max(0, asked - last) / DAY_US
    if reason is None and elapsed > LONGEST_SILENCE_DAYS:
        reason = SILENT_TOO_LONG
    return RecordToForecast(prompts.row(0), elapsed, forecast_key(subject_id, asked), asked, reason)


def forecast_key(subject_id: Any, prediction_time: int | None) -> int:
    """A number of 63 bits that stands for this subject at this time."""
    named = f"{subject_id}\n{prediction_time}".encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "big") >> 1


def _names_an_event(prompts: PatientPrompts) -> bool:
    """Whether any timed event has a code that the vocabulary knows, itself or by a parent."""
    own = prompts.rows.ids[prompts.rows.types > 0]
    return bool((own != prompts.history.vocabulary.token_ids[UNK]).any())


def _last_token_time(rows: HistoryRows) -> int | None:
    """Instant of the row that the last token comes from: any row where the last visit is closed (its closing marks have
    the time of the last row), else the last one with a token of its own.
    """
    if len(rows.time) and not rows.is_open[-1]:
        return int(rows.time[-1])
    with_token = np.flatnonzero((rows.types > 0) | rows.opens)
    return int(rows.time[with_token[-1]]) if len(with_token) else None

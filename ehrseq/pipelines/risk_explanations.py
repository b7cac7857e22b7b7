"""`pipeline("ehr-risk")(patient, explain=True)`: what each event contributes to a score, in log-odds.

Prefix deltas travel with a checkpoint: the change of the log-odds with every event, from the record without timed
events on (`ehr_prefixes.py` of the encoder says what is asked, the model's `prefix_logits` answers). All other methods
are the package's (`ehrseq.interpretability`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

TRAVELLING_METHOD = "prefix_deltas"
TOLD_FROM = 1e-6
"""From this size on (log-odds) what the contributions leave unexplained is told."""

_EPOCH = datetime(1970, 1, 1)
_OF_THE_ROW = ("static_values", "task_ids")  # inputs of the model that are no channel of tokens


@dataclass
class RowToExplain:
    """What the explanation of one row needs beside the row.

    Attributes:
        method: Name of the method.
        patient: The record, for the package's methods.
        task: Name of the task.
        prediction_time: As the caller gave it.
        max_length: Context length.
        prefixes: `RowPrefixes` of the row, for prefix deltas.
        records: `{"time", "code", "value"}` of each of them but the first.
    """

    method: str
    patient: Any
    task: str
    prediction_time: Any
    max_length: int | None
    prefixes: Any = None
    records: list[dict[str, Any]] | None = None


def method_asked_for(model: Any, encoder: Any, explain: Any) -> str | None:
    """The method that `explain` asks for: None for False, the recommended one for True.

    Raises:
        ValueError: Neither a truth value nor the name of a method that this model has here.
    """
    if explain is None or explain is False:
        return None
    if explain is not True and not isinstance(explain, str):
        raise ValueError(f"explain got {explain!r} ({type(explain).__name__}); expected True or the name of a method.")
    if not hasattr(model, "prefix_logits") or not hasattr(encoder, "sourced_rows"):
        raise ValueError(
            f"{type(model).__name__} or {type(encoder).__name__} is of an older version, which explains nothing: save "
            "the checkpoint again with this one."
        )
    methods = _methods()
    if methods is None:
        if explain not in (True, TRAVELLING_METHOD):
            raise ValueError(
                f"explain={explain!r} needs the package ehrseq, which is not installed here: pip install ehrseq, or "
                f"take explain={TRAVELLING_METHOD!r}."
            )
        return TRAVELLING_METHOD
    name = methods.default_method(model) if explain is True else str(explain)
    if not methods.choose_method(model, name).explains:
        sums = [method for method, entry in methods.methods_of(model).items() if entry.explains]
        raise ValueError(f"explain={explain!r} gives weights, which sum to no score; this model has {sums}.")
    return name


def rows_to_explain(
    encoder: Any, method: str, patient: Any, tasks: list[str], prediction_time: Any, max_length: int | None
) -> list[RowToExplain]:
    """What the explanations of a patient's rows need, one for each task."""
    rows = [RowToExplain(method, patient, task, prediction_time, max_length) for task in tasks]
    if method != TRAVELLING_METHOD:
        return rows
    sourced = encoder.sourced_rows(patient, tasks, prediction_time, max_length)
    for number, row in enumerate(rows):
        row.patient = None
        row.prefixes = sourced.prefixes(number)
        row.records = _records(row.prefixes, sourced.events)
    return rows


def _records(prefixes: Any, events: Any) -> list[dict[str, Any]]:
    """`{"time", "code", "value"}` of the event that each prefix but the first ends with."""
    records = []
    for source, time in zip(prefixes.sources[1:].tolist(), prefixes.times[1:].tolist(), strict=True):
        event = events[source] if source >= 0 else None  # None: time that passes after the last event
        instant = time if event is None else event.time
        records.append(
            {
                "time": None if instant is None else (_EPOCH + timedelta(microseconds=instant)).isoformat(),
                "code": None if event is None else event.code,
                "value": None if event is None else event.value,
            }
        )
    return records


def explain_rows(
    model: Any, encoder: Any, inputs: Mapping[str, Tensor], logits: Tensor, rows: list[RowToExplain | None]
) -> list[dict[str, Any] | None]:
    """`{"baseline", "contributions"}` of each row of a batch, with a "remainder" where there is one.

    Args:
        model: The classifier.
        encoder: Its encoder.
        inputs: The batch, as the model has read it.
        logits: What came of it, [b, 2].
        rows: What is to be explained; None = nothing.
    """
    log_odds = model.log_odds(logits, inputs["task_ids"])
    explained: list[dict[str, Any] | None] = []
    for number, row in enumerate(rows):
        if row is None:
            explained.append(None)
            continue
        whole = float(log_odds[number])
        if row.method == TRAVELLING_METHOD:
            one = {name: channel[number : number + 1] for name, channel in inputs.items()}
            baseline, contributions = _by_prefixes(model, one, row, whole)
        else:
            baseline, contributions = _by_package(model, encoder, row)
        answer = {"baseline": baseline, "contributions": contributions}
        remainder = whole - baseline - sum(entry["contribution"] for entry in contributions)
        if not abs(remainder) <= TOLD_FROM:
            answer["remainder"] = remainder
        explained.append(answer)
    return explained


def _by_prefixes(
    model: Any, inputs: dict[str, Tensor], row: RowToExplain, log_odds: float
) -> tuple[float, list[dict[str, Any]]]:
    """Baseline and contributions by prefix deltas; inputs [1, l], padding on either side."""
    prefixes, task_id = row.prefixes, inputs.pop("task_ids")
    mask = inputs["attention_mask"][0].bool()
    inputs = {name: channel if name in _OF_THE_ROW else channel[:, mask] for name, channel in inputs.items()}
    ends, tail_lengths = (torch.from_numpy(array).to(mask.device) for array in (prefixes.ends, prefixes.tail_lengths))
    tails = {name: torch.from_numpy(tail).to(mask.device) for name, tail in prefixes.tails.items()}
    logits = model.prefix_logits(inputs, ends, tails, tail_lengths)
    after = model.log_odds(logits, task_id.expand(len(ends))).double().cpu().numpy()
    after[-1] = log_odds  # the last prefix is the row itself, whose score was computed in its batch
    deltas = np.diff(after).tolist()
    contributions = [{**record, "contribution": delta} for record, delta in zip(row.records or [], deltas, strict=True)]
    return float(after[0]), contributions


def _by_package(model: Any, encoder: Any, row: RowToExplain) -> tuple[float, list[dict[str, Any]]]:
    """Baseline and contributions by a method of the package."""
    explain = cast(ModuleType, _methods()).explain
    with torch.enable_grad():
        explanation = explain((model, encoder), row.patient, row.task, row.method, row.prediction_time, row.max_length)
    return explanation.baseline, explanation.to_records()


def _methods() -> ModuleType | None:
    """The package's methods; None where it is not installed."""
    try:
        from ehrseq.interpretability import methods
    except ImportError:
        return None
    return methods

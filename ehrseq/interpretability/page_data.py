"""What the page of a patient shows, as compact JSON: columns, each text once, each event once for all explanations.

A record of ten thousand events under twelve explanations is 2.4 megabytes: the events stand once, an explanation refers
to them by runs of places and adds its contributions. Every untrusted text (codes, names, values) is a JSON
string, and nothing in it can end the element that it stands in.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from ehrseq.interpretability.methods import METHODS
from ehrseq.interpretability.record_timeline import record_before, record_visits
from ehrseq.tokenization.ehr_sequence import EPOCH

if TYPE_CHECKING:
    from ehrseq.interpretability.attention_weights import AttentionWeights
    from ehrseq.interpretability.explanation import Explanation

_MOST_TEXT = 160  # characters of one text of an event; a note of a ward round is no label of a bar
_DIGITS = 6  # significant ones of a contribution
MOST_ATTENTION = 1_500_000
"""Weights that a page holds, a byte each: beyond, heads are averaged, then only the last tokens are shown."""
_ITEM = ("position", "event", "time", "code", "value", "text", "unit", "visit", "kind", "display", "group")


def page_data(
    explanations: Sequence[Explanation],
    *,
    tasks: Sequence[Mapping[str, Any]] = (),
    record: pl.DataFrame | None = None,
    attention: Sequence[AttentionWeights] = (),
    fusion: Sequence[AttentionWeights] = (),
    notice: str = "",
) -> dict[str, Any]:
    """What the page's scripts read.

    Args:
        explanations: Explanations of one patient, checked.
        tasks: Entries of `config.tasks`, for the definitions.
        record: The patient's events.
        attention: Matrices of attention.
        fusion: Weights of the triplets of a stay.
        notice: What everybody must know of the model.
    """
    first = explanations[0]
    strings = _Strings()
    items = _Items(strings)
    defined = {str(task.get("name")): str(task.get("definition") or "") for task in tasks}
    answers = [_answer(each, defined.get(each.task, ""), items) for each in explanations]
    return {
        "patient": "" if first.subject_id is None else str(first.subject_id),
        "time": _milliseconds(first.prediction_time),
        "notice": notice,
        "answers": answers,
        "items": items.columns(),
        "record": None if record is None else _record(record, first, explanations, strings),
        "attention": [_weights(each, strings) for each in attention if each.layers],
        "fusion": [_weights(each, strings) for each in fusion if each.layers],
        "strings": strings.texts,
    }


def as_json(data: Mapping[str, Any]) -> str:
    """JSON that may stand in a `<script>`: no `<` ends it, no line separator breaks it, equal data give equal text."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written as UTF-8
    # Outside of strings JSON has none of these characters.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


class _Strings:
    """Texts, each once; -1 stands for none."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, text: str | None) -> int:
        if text is None:
            return -1
        if len(text) > _MOST_TEXT:
            text = text[: _MOST_TEXT - 1] + "…"
        place = self._places.get(text)
        if place is None:
            place = self._places[text] = len(self.texts)
            self.texts.append(text)
        return place


class _Items:
    """Tokens, triplets and groups that anything was said of, each once."""

    def __init__(self, strings: _Strings) -> None:
        self._strings = strings
        self._rows: list[tuple[Any, ...]] = []
        self._places: dict[tuple[Any, ...], int] = {}

    def runs(self, contributions: pl.DataFrame) -> list[int]:
        """[start, length, start, length, ...] of the places of a table's rows."""
        runs: list[int] = []
        for row in contributions.select(_ITEM).iter_rows():
            place = self._places.get(row)
            if place is None:
                place = self._places[row] = len(self._rows)
                self._rows.append(row)
            if runs and runs[-2] + runs[-1] == place:
                runs[-1] += 1
            else:
                runs += [place, 1]
        return runs

    def columns(self) -> dict[str, list[Any]]:
        """Columns of plain numbers: texts by their place, times as differences in milliseconds."""
        by_name: dict[str, tuple[Any, ...]] = dict.fromkeys(_ITEM, ())
        if self._rows:
            by_name = dict(zip(_ITEM, zip(*self._rows, strict=True), strict=True))
        texts = {name: [self._strings.place(text) for text in by_name[name]] for name in _ITEM if name in _TEXTS}
        times = [_milliseconds(time) for time in by_name["time"]]
        return {
            "event": [-1 if event is None else event for event in by_name["event"]],
            "time": _differences(times),
            "value": [_number(value) for value in by_name["value"]],
            "visit": [0 if visit is None else visit for visit in by_name["visit"]],
            **texts,
        }


_TEXTS = frozenset({"code", "text", "unit", "kind", "display", "group"})


def _answer(explanation: Explanation, definition: str, items: _Items) -> dict[str, Any]:
    """One explanation: what it says of itself, and its numbers."""
    table = explanation.contributions
    after = table["score_after"].to_list()
    # Where a model lies on somebody's disk is nobody's business.
    model = Path(explanation.model).name if Path(explanation.model).is_absolute() else explanation.model
    settings = {**explanation.settings, "model": model}
    return {
        "task": explanation.task,
        "label": explanation.label,
        "definition": definition,
        "score": _number(explanation.score),
        "logOdds": _number(explanation.log_odds),
        "baseline": _number(explanation.baseline),
        "baselineName": explanation.baseline_name,
        "remainder": _number(explanation.remainder) if table.height else None,
        "method": explanation.method,
        "methodWords": _method_words(explanation.method),
        "settings": [[name, _setting(value)] for name, value in settings.items() if value is not None],
        "notes": [[name, count] for name, count in sorted(explanation.notes.items())],
        "reason": explanation.reason,
        "runs": items.runs(table),
        "contribution": [_number(value) for value in table["contribution"].to_list()],
        "after": [_number(value) for value in after] if any(value is not None for value in after) else None,
    }


def _method_words(name: str) -> str:
    """A method in a sentence, empty where it is none of ours."""
    method = METHODS.get(name)
    return "" if method is None else method.summary


def _setting(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _record(
    record: pl.DataFrame, first: Explanation, explanations: Sequence[Explanation], strings: _Strings
) -> dict[str, Any]:
    """The record up to the prediction time: its visits, and the events of it that no explanation speaks of.

    Where explanations speak of events at all, and not of groups alone, the model has not seen those others.
    """
    known = record_before(record, first.prediction_time)
    seen = {event for each in explanations for event in each.contributions["event"].drop_nulls().to_list()}
    others = known.filter(~pl.col("event").is_in(seen), pl.col("time").is_not_null())
    visits = record_visits(known, first.prediction_time)
    return {
        "visits": [
            [_milliseconds(row["start"]), _milliseconds(row["end"]), row["name"]]
            for row in visits.iter_rows(named=True)
        ],
        "seenIsKnown": bool(seen),
        "otherTime": _differences([_milliseconds(time) for time in others["time"].to_list()]),
        "otherKind": [strings.place(kind) for kind in others["kind"].to_list()],
    }


def _weights(weights: AttentionWeights, strings: _Strings) -> dict[str, Any]:
    """Weights as bytes of their largest, layer by layer; what does not fit is averaged or left out, and it is told.

    A layer is [tokens] (a weight a token), [to, from] (a matrix) or [heads, to, from].
    """
    layers = [np.nan_to_num(np.asarray(layer, np.float64)) for layer in weights.layers]
    remarks = []
    tokens = weights.tokens
    matrix = layers[0].ndim > 1
    shares = all(np.allclose(layer.sum(-1), 1.0, atol=0.01) for layer in layers)
    if matrix:
        layers = [layer if layer.ndim == 3 else layer[None] for layer in layers]
        if sum(layer.size for layer in layers) > MOST_ATTENTION and any(len(layer) > 1 for layer in layers):
            layers = [layer.mean(axis=0, keepdims=True) for layer in layers]
            remarks.append("The mean of each layer's heads.")
        most = math.isqrt(MOST_ATTENTION // sum(len(layer) for layer in layers))
        if tokens.height > most:
            layers = [layer[:, -most:, -most:] for layer in layers]
            remarks.append(f"The last {most:,} of {tokens.height:,} tokens.")
            tokens = tokens.tail(most)
    else:
        layers = [layer[None] for layer in layers]
    scales = [[float(head.max(initial=0.0)) for head in layer] for layer in layers]
    return {
        "what": weights.what,
        "remarks": remarks,
        "matrix": matrix,
        "shares": shares,
        "numbers": [number + 1 for number in weights.numbers],
        "time": _differences([_milliseconds(time) for time in tokens["time"].to_list()]),
        "code": [strings.place(code) for code in tokens["code"].to_list()],
        "display": [strings.place(name) for name in _column(tokens, "display")],
        "value": [_number(value) for value in _column(tokens, "value")],
        "unit": [strings.place(name) for name in _column(tokens, "unit")],
        "scale": [[_number(scale) for scale in each] for each in scales],
        "bytes": [
            [_as_bytes(head, scale) for head, scale in zip(layer, each, strict=True)]
            for layer, each in zip(layers, scales, strict=True)
        ],
    }


def _column(table: pl.DataFrame, name: str) -> list[Any]:
    return table[name].to_list() if name in table.columns else [None] * table.height


def _as_bytes(values: np.ndarray, largest: float) -> str:
    """Base64 of the values, 255 for the largest."""
    whole = np.zeros(values.shape, np.uint8)
    if largest > 0:
        whole = np.rint(np.clip(values / largest, 0.0, 1.0) * 255).astype(np.uint8)
    return base64.b64encode(whole.tobytes()).decode("ascii")


def _milliseconds(time: datetime | None) -> int | None:
    """Since 1970, as the page's scripts count."""
    if time is None:
        return None
    span = time.replace(tzinfo=None) - EPOCH
    return span.days * 86_400_000 + span.seconds * 1000 + span.microseconds // 1000


def _differences(times: Sequence[int | None]) -> list[int | None]:
    """Each time less the one before it, which are short numbers; None has no time."""
    before, differences = 0, list[int | None]()
    for time in times:
        if time is None:
            differences.append(None)
        else:
            differences.append(time - before)
            before = time
    return differences


def _number(value: float | None) -> float | int | None:
    """A number of a few digits; None where it is none."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short

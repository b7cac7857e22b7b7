"""Explanations of made-up patients, without a model: what a page is drawn from."""

from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import polars as pl

from ehrseq.interpretability.attention_weights import AttentionWeights
from ehrseq.interpretability.explanation import CONTRIBUTION_SCHEMA as SCHEMA
from ehrseq.interpretability.explanation import Explanation

KINDS = ("lab", "medication", "diagnosis", "vital", "procedure")
TASKS = [
    {"name": "mortality_30d", "definition": "At every discharge: death within 30 days.", "positive_label": "death"},
    {"name": "readmission_30d", "definition": "At every discharge: another admission.", "positive_label": "return"},
]


def rows_of(events, visits, seed=0, visits_known=True):
    """Tokens of a record: each visit opens and closes by a mark, and has its share of the events."""
    draw = np.random.default_rng(seed)
    rows, event, position, time = [], 0, 0, datetime(2012, 3, 1, 8)
    rows.append(_row(0, 0, None, "GENDER//F", "static", 0, display="female"))
    event, position = 1, 1
    for visit in range(1, visits + 1):
        time += timedelta(days=int(draw.integers(5, 120)))
        own = (events - 1) // visits + (visit <= (events - 1) % visits)
        rows.append(_row(position, None, time, "[VS]", "structure", visit))
        position += 1
        for place in range(own):
            time += timedelta(minutes=int(draw.integers(1, 90)))
            kind = (
                KINDS[int(draw.integers(len(KINDS)))]
                if 0 < place < own - 1
                else ("visit_end", "visit_start")[not place]
            )
            number = int(draw.integers(40))
            is_edge = kind.startswith("visit")
            code = f"{kind.upper()}//{('IMP', 'AMB', 'EMER')[visit % 3] if is_edge else f'SYSTEM//{number}'}"
            value = round(float(draw.normal(100, 30)), 1) if kind in ("lab", "vital") else None
            unit = "mg/dL" if value is not None else None
            name = f"{kind} number {number}" if number % 3 and not is_edge else None
            rows.append(_row(position, event, time, code, kind, visit, value, unit, name))
            position, event = position + 1, event + 1
        rows.append(_row(position, None, time, "[VE]", "structure", visit))
        position += 1
    rows.append(_row(position, None, None, "[MOR_1M]", "question", 0))
    return [row | {"visit": row["visit"] or None} if visits_known else row | {"visit": None} for row in rows]


def _row(position, event, time, code, kind, visit, value=None, unit=None, display=None):
    row = dict.fromkeys(SCHEMA)
    return row | {
        **{"position": position, "event": event, "time": time, "code": code, "kind": kind, "visit": visit},
        **{"value": value, "unit": unit, "display": display},
    }


def explained(rows, task=TASKS[0], method="prefix_deltas", seed=0, baseline=-3.0, subject=17, **changes):
    """An explanation whose contributions are drawn, few of them large."""
    draw = np.random.default_rng(seed)
    values = draw.standard_t(2, len(rows)) * 0.6 / np.sqrt(len(rows))
    after = 1 / (1 + np.exp(-(baseline + np.cumsum(values))))
    table = pl.DataFrame(
        [
            row | {"contribution": float(value), "score_after": float(score) if method == "prefix_deltas" else None}
            for row, value, score in zip(rows, values, after, strict=True)
        ],
        schema=SCHEMA,
    )
    remainder = 0.0 if method == "prefix_deltas" else 0.07
    log_odds = baseline + float(values.sum()) + remainder
    timed = [row["time"] for row in rows if row["time"] is not None]
    now = max(timed, default=datetime(2024, 5, 1)) + timedelta(hours=1)
    given = {
        **{"subject_id": subject, "prediction_time": now, "task": task["name"]},
        **{"label": task["positive_label"], "score": float(1 / (1 + np.exp(-log_odds))), "log_odds": log_odds},
        **{"baseline": baseline, "baseline_name": "the record without events", "method": method, "model": "ehrmamba"},
        **{"settings": {"by": "event"}, "notes": {"events of unknown codes, read as [UNK]": 3}, "reason": None},
        "contributions": table,
    }
    return Explanation(**(given | changes))


def unanswered(task=TASKS[1], reason="died_before_prediction", **changes):
    """What a task that does not apply gives."""
    nothing = dict.fromkeys(("score", "log_odds", "baseline"), float("nan")) | {"notes": {}, "reason": reason}
    return replace(explained([], task), **(nothing | changes))


def several(events=400, visits=12, seed=0):
    """Two tasks by two methods."""
    rows = rows_of(events, visits, seed)
    return [
        explained([*rows[:-1], rows[-1] | {"code": f"[{task['name']}]"}], task, method, seed=10 * place + number)
        for place, task in enumerate(TASKS)
        for number, method in enumerate(("prefix_deltas", "integrated_gradients"))
    ]


def record_of(rows):
    """The event table that the rows were made of; an event's place in it is its number."""
    events = [row for row in rows if row["event"] is not None]
    table = pl.DataFrame(events, schema=SCHEMA).sort("event")
    return table.select("time", "code", pl.col("visit").cast(pl.String).alias("visit_id"))


def weights_of(layers, what, tokens):
    """Weights of a model's layers."""
    return AttentionWeights(layers, what, tokens, tuple(range(len(layers))))

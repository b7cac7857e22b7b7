"""Records for the triplet tests: hand-made ones and random ones, as tables and as patients."""

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl

from ehrseq.data.schema import EVENT_SCHEMA, validate_events
from ehrseq.encode.triplets import StaticFeature, TripletSpec

START = datetime(2150, 1, 1)
SPEC = TripletSpec(
    variables=(("hr", ("VITAL//HR", "VITAL//PULSE")), ("k", ("LAB//K",)), ("temp", ("VITAL//T",))),
    static_features=(
        StaticFeature("age", "age", missing_flag=True),
        StaticFeature("sex", "category", ("GENDER//F", "GENDER//M"), drop_first=True, missing_flag=True),
        StaticFeature("height", "numeric", ("VITAL//HEIGHT",), missing_flag=True),
        StaticFeature("unit", "category", ("UNIT//A", "UNIT//B")),
    ),
    window_hours=24,
)


def at(hours: float | None) -> datetime | None:
    return None if hours is None else START + timedelta(hours=hours)


def event(hours: float | None, code: str, value: float | None = None) -> dict[str, Any]:
    return {"time": at(hours), "code": code, "numeric_value": value}


def table(records: dict[int, list[dict[str, Any]]]) -> pl.DataFrame:
    rows = [{"subject_id": subject, **row} for subject, record in records.items() for row in record]
    return validate_events(pl.DataFrame(rows, schema={name: EVENT_SCHEMA[name] for name in rows[0]}, orient="row"))


def labels(rows: list[tuple[int, float, bool]]) -> pl.DataFrame:
    return pl.DataFrame(
        [(subject, at(hours), value) for subject, hours, value in rows],
        schema={"subject_id": pl.Int64, "prediction_time": pl.Datetime("us"), "boolean_value": pl.Boolean},
        orient="row",
    )


def random_records(number: int, seed: int) -> dict[int, list[dict[str, Any]]]:
    """Records with several admissions, repeats, strangers, values that are no numbers, and rows in any order."""
    rng = np.random.default_rng(seed)
    records = {}
    for subject in range(1, number + 1):
        rows = []
        if rng.random() < 0.8:
            rows.append(event(-24 * 365.25 * rng.uniform(20, 90), "MEDS_BIRTH"))
        if rng.random() < 0.8:
            rows.append(event(None, rng.choice(["GENDER//F", "GENDER//M"])))
        if rng.random() < 0.5:
            rows.append(event(rng.choice([None, rng.uniform(-50, 80)]), "VITAL//HEIGHT", rng.normal(170, 9)))
        for hours in rng.uniform(0, 100, rng.integers(1, 4)):
            rows.append(event(float(hours), "VISIT_START//IMP"))
            rows.append(event(float(hours + rng.uniform(-1, 5)), rng.choice(["UNIT//A", "UNIT//B"])))
            for _ in range(rng.integers(0, 12)):
                code = rng.choice(["VITAL//HR", "VITAL//PULSE", "LAB//K", "VITAL//T", "LAB//OTHER", "VISIT_END//X"])
                value = None if rng.random() < 0.1 else float(rng.choice([1.5, 80.25, 37.1, 200.0]))
                row = event(float(hours + np.round(rng.uniform(-2, 30), 2)), code, value)
                rows += [row] * int(rng.integers(1, 3))
        rng.shuffle(rows)
        records[subject] = rows
    return records

"""The stays and the task that the committed checkpoint of HyMaTE was trained on (make.py)."""

import random
from datetime import datetime, timedelta
from typing import Any

HYMATE_TASKS = [
    {
        "name": "in_hospital_mortality",
        "horizon": "the rest of the stay",
        "definition": "Death in hospital, told 48 hours after the stay's start.",
        "positive_label": "death in hospital",
        "log_odds_shift": 0.7,
    }
]
SEXES = ["GENDER//F", "GENDER//M"]
CODES = ["LAB//A//lactate", "VITAL//A//heart rate", "VITAL//A//urine"]


def make_stay(subject_id: int) -> dict[str, Any]:
    """A patient whose stay holds a few dozen values; the sick ones have a fast heart and high lactate."""
    draw = random.Random(subject_id)
    sick = subject_id % 2 == 1
    start = datetime(2150, 1, 1) + timedelta(days=draw.randrange(300))
    events: list[dict[str, Any]] = [{"time": None, "code": draw.choice(SEXES)}]
    time = start
    for _ in range(draw.randint(5, 12)):
        time += timedelta(minutes=draw.randint(10, 180))
        code = draw.choice(CODES)
        mean = {CODES[0]: 4.0 if sick else 1.0, CODES[1]: 120 if sick else 75, CODES[2]: 60}[code]
        events.append({"time": time, "code": code, "numeric_value": draw.gauss(mean, mean / 10)})
    return {"subject_id": subject_id, "events": events}

"""The patients and tasks that the committed checkpoints of event models were trained on (make.py)."""

import random
from datetime import datetime, timedelta
from typing import Any

TASKS = [
    {
        "name": "mortality_30d",
        "token": "[MOR_1M]",
        "horizon": "30 days",
        "definition": "Death within 30 days of a discharge alive.",
        "positive_label": "death within 30 days",
    },
    {
        "name": "long_stay_7d",
        "token": "[LOS_1W]",
        "horizon": "7 days",
        "definition": "A stay of over 168 hours, told 24 hours after admission.",
        "positive_label": "stay over 7 days",
    },
    {
        "name": "readmission_30d",
        "token": "[REA_1M]",
        "horizon": "30 days",
        "definition": "An admission within 30 days of a discharge alive.",
        "positive_label": "readmission within 30 days",
    },
]
RISKY = "DIAGNOSIS//ICD10CM//I50"
CODES = [RISKY, "DIAGNOSIS//ICD10CM//E11", "MEDICATION//RXNORM//860975", "PROCEDURE//SNOMED//33195004"]
LAB = "LAB//LOINC//2345-7"


def make_patient(subject_id: int, seed: int = 0) -> dict[str, Any]:
    """A patient with a few admissions of random codes; the sick ones have `RISKY` and high glucose."""
    draw = random.Random(f"{seed}/{subject_id}")
    sick = draw.random() < 0.5
    events: list[dict[str, Any]] = [{"time": datetime(1950 + draw.randrange(40), 5, 1), "code": "MEDS_BIRTH"}]
    time = datetime(2150, 1, 1) + timedelta(days=draw.randrange(300))
    for visit in range(draw.randint(1, 3)):
        visit_id = f"{subject_id}-{visit}"
        events.append({"time": time, "code": "VISIT_START//IMP", "visit_id": visit_id})
        for _ in range(draw.randint(2, 6)):
            time += timedelta(hours=draw.randint(1, 20))
            code = RISKY if sick and draw.random() < 0.5 else draw.choice(CODES[1:])
            events.append({"time": time, "code": code, "visit_id": visit_id})
            glucose = draw.gauss(200 if sick else 100, 10)
            events.append({"time": time, "code": LAB, "numeric_value": glucose, "unit": "mg/dL", "visit_id": visit_id})
        time += timedelta(hours=5)
        events.append({"time": time, "code": "VISIT_END//HOME", "visit_id": visit_id})
        time += timedelta(days=draw.randint(5, 200))
    return {"subject_id": subject_id, "events": events}


def is_sick(patient: dict[str, Any]) -> bool:
    return any(event["code"] == RISKY for event in patient["events"])


def make_table(patients: list[dict[str, Any]]) -> Any:
    """The patients' rows as one MEDS table."""
    import polars as pl

    from ehrseq.data.schema import EVENT_SCHEMA

    rows = [{"subject_id": patient["subject_id"], **event} for patient in patients for event in patient["events"]]
    return pl.DataFrame(rows, schema_overrides=EVENT_SCHEMA)

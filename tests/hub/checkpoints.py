"""A tiny trained checkpoint: what the pipeline and Hub tests load, push and load again."""

import random
from datetime import datetime, timedelta
from pathlib import Path
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
# What a family needs at the width of these tests.
TRANSFORMER = {"num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.1}
FIELDS = {"cehrbert": TRANSFORMER, "ehr_bigbird": {**TRANSFORMER, "block_size": 8, "num_random_blocks": 2}}


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


def train_checkpoint(folder: Path, steps: int = 12, model_type: str = "ehrmamba") -> Path:
    """Train a small classifier of a family with the unmodified Trainer, and save it with its tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

    from ehrseq import EhrTokenizer

    set_seed(0)
    patients = [make_patient(subject_id) for subject_id in range(40)]
    tokenizer = EhrTokenizer.train(make_table(patients), tasks=TASKS, min_count=1)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        max_position_embeddings=64,
        tasks=TASKS,
        pad_token_id=tokenizer.pad_token_id,
        **FIELDS.get(model_type, {}),
    )
    model = AutoModelForSequenceClassification.from_config(config)
    rows = []
    for patient in patients:
        for task_id, task in enumerate(TASKS):
            row = tokenizer(patient, task=task["name"], truncation=True, max_length=64)
            rows.append({**row, "labels": int(is_sick(patient) and task_id != 1), "task_ids": task_id})
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        label_names=["labels", "task_ids"],
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    # Inference has to take the sampler's shift back: a task with one makes the tests see it.
    model.config.tasks = [dict(task, log_odds_shift=0.7 if i == 0 else 0.0) for i, task in enumerate(TASKS)]
    trainer.save_model(str(folder))
    return folder

"""A tiny trained HyMaTE checkpoint and its patients, for the pipeline, remote-code and Hub tests."""

import random
from datetime import datetime, timedelta
from pathlib import Path
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


def train_hymate(folder: Path, steps: int = 6) -> Path:
    """Train a small classifier with the unmodified Trainer, and save it with its feature extractor."""
    import polars as pl
    from transformers import Trainer, TrainingArguments, set_seed

    from ehrseq import HyMaTEConfig, HyMaTEFeatureExtractor, HyMaTEForSequenceClassification
    from ehrseq.data.schema import EVENT_SCHEMA
    from ehrseq.encode.triplets import build_triplets
    from ehrseq.tokenization.triplet_stays import StaticFeature, TripletSpec

    set_seed(0)
    stays = [make_stay(subject_id) for subject_id in range(24)]
    rows = [{"subject_id": stay["subject_id"], **event} for stay in stays for event in stay["events"]]
    events = pl.DataFrame(rows, schema_overrides=EVENT_SCHEMA)
    variables = [(code.split("//")[-1], [code]) for code in CODES]
    spec = TripletSpec(variables, [StaticFeature("sex", "category", SEXES)], window_start="first_event")
    extractor = HyMaTEFeatureExtractor.fit(build_triplets(events, spec))
    config = HyMaTEConfig(
        num_variables=extractor.num_variables,
        num_static=extractor.num_static,
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=64,
        tasks=HYMATE_TASKS,
    )
    dataset = [{**extractor(stay), "labels": stay["subject_id"] % 2} for stay in stays]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    model = HyMaTEForSequenceClassification(config)
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, processing_class=extractor)
    trainer.train()
    trainer.save_model(str(folder))
    return folder

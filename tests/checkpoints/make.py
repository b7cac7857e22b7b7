"""Train the checkpoints of this folder: one of each family, tiny, with the unmodified Trainer.

    python -m tests.checkpoints.make               # all of them, here; a minute
    python -m tests.checkpoints.make --output DIR  # elsewhere

A checkpoint here is its config, its weights, and its tokenizer or feature extractor. The code that travels with one
is the package's at the time of a test: `complete.py` adds it. The same machine gives the same weights; another one
gives weights that differ in the last digits.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ehrseq import EhrTokenizer, HyMaTEConfig, HyMaTEFeatureExtractor, HyMaTEForSequenceClassification
from ehrseq.data.schema import EVENT_SCHEMA
from ehrseq.encode.triplets import build_triplets
from ehrseq.tokenization.triplet_stays import StaticFeature, TripletSpec
from tests.checkpoints.patients import TASKS, is_sick, make_patient, make_table
from tests.checkpoints.stays import CODES, HYMATE_TASKS, SEXES, make_stay

FOLDER = Path(__file__).parent
EVENT_FAMILIES = ("ehrmamba", "ehr_lstm", "cehrbert", "ehr_bigbird")
FAMILIES = (*EVENT_FAMILIES, "hymate")
# What a family needs at the width of these checkpoints.
TRANSFORMER = {"num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.1}
FIELDS = {"cehrbert": TRANSFORMER, "ehr_bigbird": {**TRANSFORMER, "block_size": 8, "num_random_blocks": 2}}


def train(model_type: str, folder: Path, steps: int | None = None) -> Path:
    """Train a classifier of a family and save it as Trainer does, code included.

    Args:
        model_type: One of `FAMILIES`.
        folder: Where to.
        steps: Optimizer steps; by default those of the committed checkpoint.
    """
    set_seed(0)
    if model_type == "hymate":
        return _train_hymate(folder, steps or 40)
    return _train_events(model_type, folder, steps or 200)


def _train_events(model_type: str, folder: Path, steps: int) -> Path:
    patients = [make_patient(subject_id) for subject_id in range(40)]
    tokenizer = EhrTokenizer.train(make_table(patients), tasks=TASKS, min_count=1)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        max_position_embeddings=64,
        max_num_visits=16,
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
    trainer = _fit(model, rows, tokenizer, folder, steps, batch=16, label_names=["labels", "task_ids"])
    # Inference has to take the sampler's shift back: a task with one makes the tests see it.
    model.config.tasks = [dict(task, log_odds_shift=0.7 if i == 0 else 0.0) for i, task in enumerate(TASKS)]
    trainer.save_model(str(folder))
    return folder


def _train_hymate(folder: Path, steps: int) -> Path:
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
    model = HyMaTEForSequenceClassification(config)
    dataset = [{**extractor(stay), "labels": stay["subject_id"] % 2} for stay in stays]
    _fit(model, dataset, extractor, folder, steps, batch=8).save_model(str(folder))
    return folder


def _fit(
    model: PreTrainedModel,
    rows: list[dict[str, Any]],
    encoder: Any,
    folder: Path,
    steps: int,
    batch: int,
    **options: Any,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=5e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=encoder)
    trainer.train()
    return trainer


def main() -> None:
    """Write every checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the checkpoints")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    for model_type in FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            trained = train(model_type, Path(scratch) / "checkpoint")
            target = output / model_type
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for file in [*trained.glob("*.json"), trained / "model.safetensors"]:
                shutil.copyfile(file, target / file.name)


if __name__ == "__main__":
    main()

"""Small datasets on disk for the benchmark's tests: simulated ones, and ones of which all is known about the labels."""

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from ehrseq.data.dataset import write_dataset
from ehrseq.data.schema import EVENT_SCHEMA
from ehrseq.data.simulate.cohort import simulate

FIELDS = {
    "hidden_size": 32,
    "num_layers": 1,
    "context": 64,
    "pretrain_tokens": 4_000,
    "finetune_tokens": 8_000,
    "batch_rows": 16,
    "pretrain_rate": 3.0e-3,
    "finetune_rates": [3.0e-3],
    "max_rows_per_task": 200,
    "finetune_splits": ["pretrain", "train"],
}
CODES = [f"MEDICATION//RXNORM//{number}" for number in range(12)]
MARKS = ("PROCEDURE//SNOMED//1", "PROCEDURE//SNOMED//2")


def write_budget(folder: Path, **changes) -> Path:
    """A YAML file of a tiny budget."""
    import yaml

    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({**FIELDS, **changes}))
    return file


def write_simulated(folder: Path, patients: int = 120, seed: int = 5) -> Path:
    """A dataset as `ehrseq simulate --format meds` writes it."""
    events = simulate(patients, seed, progress=False).events()
    write_dataset(events, folder, dataset_name=f"ehrseq-simulated-seed-{seed}", splits=split(events["subject_id"]))
    return folder


def write_known(folder: Path, *, planted: bool, patients: int = 600, seed: int = 0) -> Path:
    """One stay and one label of the task "planted" a patient.

    Labels are drawn by coin; with `planted` the last code before the prediction tells which, without it nothing does.
    """
    draw = np.random.default_rng(seed)
    rows, labels = [], []
    for subject_id in range(1, patients + 1):
        positive, visit = bool(draw.random() < 0.5), f"{subject_id}-0"
        time = datetime(2150, 1, 1) + timedelta(days=int(draw.integers(0, 300)))
        rows.append({"subject_id": subject_id, "time": datetime(2100, 1, 1), "code": "MEDS_BIRTH"})
        rows.append({"subject_id": subject_id, "time": time, "code": "VISIT_START//IMP", "visit_id": visit})
        codes = [CODES[int(k)] for k in draw.integers(0, len(CODES), int(draw.integers(3, 12)))]
        for code in [*codes, *([MARKS[positive]] if planted else [])]:
            time += timedelta(hours=2)
            rows.append({"subject_id": subject_id, "time": time, "code": code, "visit_id": visit})
        time += timedelta(hours=1)
        rows.append({"subject_id": subject_id, "time": time, "code": "VISIT_END//IMP", "visit_id": visit})
        labels.append({"subject_id": subject_id, "prediction_time": time, "boolean_value": positive})
    events = pl.DataFrame(rows, schema=EVENT_SCHEMA)
    write_dataset(events, folder, dataset_name="known", splits=split(events["subject_id"]))
    task = folder / "labels" / "planted"
    task.mkdir(parents=True)
    pl.DataFrame(labels).write_parquet(task / "labels.parquet")
    return folder


def split(subjects: pl.Series) -> pl.DataFrame:
    """Half to train on, a sixth to tune on, a third to test on: small cohorts need tests that can be estimated."""
    unique = subjects.unique().sort()
    turn = np.arange(len(unique)) % 6
    names = np.array(["pretrain", "train", "train", "tuning", "held_out", "held_out"])[turn]
    return pl.DataFrame({"subject_id": unique, "split": names})

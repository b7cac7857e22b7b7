"""A small event model that was trained on nothing, with its tokenizer: its forecasts are the same every time."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import ehrseq
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.training.trainer import model_config
from tests.checkpoints.patients import TASKS, make_patient, make_table


def mortal_patient(subject_id: int) -> dict[str, Any]:
    """One of `make_patient`; every third dies a day after the last event, every second goes to a clinic before that."""
    patient = make_patient(subject_id)
    last = patient["events"][-1]["time"]
    if subject_id % 2:
        visit = {"visit_id": f"{subject_id}-clinic"}
        patient["events"] += [
            {"time": last + timedelta(hours=9), "code": "VISIT_START//AMB", **visit},
            {"time": last + timedelta(hours=10), "code": "VISIT_END//AMB", **visit},
        ]
    if subject_id % 3 == 0:
        patient["events"].append({"time": last + timedelta(days=1), "code": "MEDS_DEATH"})
    return patient


def forecast_tokenizer() -> EhrTokenizer:
    """Fitted on forty of them."""
    return EhrTokenizer.train(make_table([mortal_patient(number) for number in range(40)]), tasks=TASKS)


def forecast_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Save a model and its tokenizer into `folder`, as training does."""
    tokenizer = forecast_tokenizer()
    torch.manual_seed(seed)
    config = model_config(tokenizer, hidden_size=16, num_hidden_layers=2, state_size=4, max_position_embeddings=64)
    ehrseq.EhrMambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

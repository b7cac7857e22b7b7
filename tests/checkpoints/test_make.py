"""The script that makes the committed checkpoints: Trainer teaches every family, and twice the same."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import pipeline

from tests.checkpoints.make import EVENT_FAMILIES, FAMILIES, FOLDER, train
from tests.checkpoints.patients import is_sick, make_patient
from tests.checkpoints.stays import make_stay


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_teaches_every_family(family, tmp_path):
    risk = pipeline("ehr-risk", model=str(train(family, tmp_path / "checkpoint")), device="cpu")
    if family in EVENT_FAMILIES:
        patients = [make_patient(subject_id) for subject_id in range(600, 640)]
        sick = np.array([is_sick(patient) for patient in patients])
    else:
        patients = [make_stay(subject_id) for subject_id in range(600, 640)]
        sick = np.arange(600, 640) % 2 == 1
    scores = np.array([answers[0]["score"] for answers in risk(patients, batch_size=8)])
    assert scores[sick].mean() > scores[~sick].mean() + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_twice_gives_the_same_bytes(family, tmp_path):
    for name in ("one", "two"):
        train(family, tmp_path / name, steps=3)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_committed_is_small_and_finite(family):
    files = {file.name: file.stat().st_size for file in (FOLDER / family).iterdir()}
    encoder = {"preprocessor_config.json"} if family == "hymate" else {"tokenizer.json", "tokenizer_config.json"}
    assert set(files) == {"config.json", "model.safetensors", *encoder}
    assert sum(files.values()) < 150_000
    assert all(np.isfinite(weight).all() for weight in load_file(FOLDER / family / "model.safetensors").values())

"""Baselines are checkpoints like the others: trained by Trainer, in the pipeline, and loaded without the package."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from ehrseq.prediction.risks import predict_risks
from tests.checkpoints.complete import complete_checkpoint
from tests.checkpoints.patients import TASKS, is_sick, make_patient, make_table
from tests.hub.bare_interpreter import link_packages, run_python

FAMILIES = ("ehr_lstm", "cehrbert", "ehr_bigbird")
PATIENTS = [make_patient(subject_id) for subject_id in range(500, 506)]

LOAD = """
from transformers import AutoModel, pipeline
loaded = {}
for family, model in given["models"].items():
    risk = pipeline("ehr-risk", model=model, device="cpu", trust_remote_code=True)
    backbone = AutoModel.from_pretrained(model, trust_remote_code=True)
    loaded[family] = {"answers": risk(given["patients"], batch_size=4), "backbone": type(backbone).__name__}
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: complete_checkpoint(family, tmp_path_factory.mktemp(family) / family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: Any) -> str:
    return request.param


@pytest.fixture
def checkpoint(family: str, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[family]


@pytest.fixture(scope="module")
def without_package(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one interpreter without ehrseq makes of all three."""
    folder = tmp_path_factory.mktemp("bare")
    patients = json.loads(json.dumps(PATIENTS, default=lambda time: time.isoformat()))
    models = {family: str(path) for family, path in checkpoints.items()}
    environment = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    return run_python(LOAD, {"models": models, "patients": patients}, environment, link_packages(folder / "packages"))


def test_trainer_teaches_it_and_the_pipeline_tells_risks(checkpoint: Path) -> None:
    risk = pipeline("ehr-risk", model=str(checkpoint), device="cpu")
    patients = [make_patient(subject_id) for subject_id in range(600, 640)]
    scores = np.array([[answer["score"] for answer in answers] for answers in risk(patients, batch_size=8)])
    assert scores.shape == (40, len(TASKS))
    sick = np.array([is_sick(patient) for patient in patients])
    assert scores[sick, 0].mean() > scores[~sick, 0].mean() + 0.2
    alone = [answer["score"] for answer in risk(patients[3])]
    np.testing.assert_allclose(alone, scores[3], atol=1e-6)


def test_without_the_package_the_folder_gives_the_same(
    checkpoint: Path, family: str, without_package: dict[str, Any]
) -> None:
    loaded = without_package[family]
    expected = pipeline("ehr-risk", model=str(checkpoint), device="cpu")(PATIENTS)
    for found, answers in zip(loaded["answers"], expected, strict=True):
        for one, two in zip(found, answers, strict=True):
            assert one["task"] == two["task"]
            assert one["score"] == pytest.approx(two["score"], abs=1e-6)
    assert loaded["backbone"].endswith("Model")


def test_a_table_of_patients_is_scored(checkpoint: Path) -> None:
    predictions, _ = predict_risks(str(checkpoint), make_table(PATIENTS), progress=False)
    assert predictions["subject_id"].n_unique() == len(PATIENTS)


def test_every_baseline_knows_its_tokenizer(checkpoint: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert type(AutoTokenizer.from_pretrained(checkpoint)).__name__ == "EhrTokenizer"
    assert model.config.tasks[0]["log_odds_shift"] == 0.7
    assert all(torch.isfinite(weight).all() for weight in model.parameters())

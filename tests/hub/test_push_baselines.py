"""Baselines are checkpoints like the others: trained by Trainer, in the pipeline, and loaded without the package."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from ehrseq.prediction.risks import predict_risks
from tests.checkpoints.patients import TASKS, is_sick, make_patient, make_table
from tests.hub.conftest import BASELINES


@pytest.fixture(params=BASELINES)
def family(request: Any) -> str:
    return request.param


@pytest.fixture
def baseline(family: str, baselines: dict[str, Path]) -> Path:
    return baselines[family]


def test_trainer_teaches_it_and_the_pipeline_tells_risks(baseline: Path) -> None:
    risk = pipeline("ehr-risk", model=str(baseline), device="cpu")
    patients = [make_patient(subject_id) for subject_id in range(600, 640)]
    scores = np.array([[answer["score"] for answer in answers] for answers in risk(patients, batch_size=8)])
    assert scores.shape == (40, len(TASKS))
    sick = np.array([is_sick(patient) for patient in patients])
    assert scores[sick, 0].mean() > scores[~sick, 0].mean() + 0.2
    alone = [answer["score"] for answer in risk(patients[3])]
    np.testing.assert_allclose(alone, scores[3], atol=1e-6)


def test_without_the_package_the_folder_gives_the_same(
    baseline: Path, family: str, without_package: dict[str, Any], patients: dict[str, Any]
) -> None:
    loaded = without_package["baselines"][family]
    expected = pipeline("ehr-risk", model=str(baseline), device="cpu")(patients["baselines"])
    for found, answers in zip(loaded["answers"], expected, strict=True):
        for one, two in zip(found, answers, strict=True):
            assert one["task"] == two["task"]
            assert one["score"] == pytest.approx(two["score"], abs=1e-6)
    assert loaded["backbone"].endswith("Model")


def test_a_table_of_patients_is_scored(baseline: Path, patients: dict[str, Any]) -> None:
    scored = patients["baselines"]
    predictions, _ = predict_risks(str(baseline), make_table(scored), progress=False)
    assert predictions["subject_id"].n_unique() == len(scored)


def test_every_baseline_knows_its_tokenizer(baseline: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(baseline)
    assert type(AutoTokenizer.from_pretrained(baseline)).__name__ == "EhrTokenizer"
    assert model.config.tasks[0]["log_odds_shift"] == 0.7
    assert all(torch.isfinite(weight).all() for weight in model.parameters())

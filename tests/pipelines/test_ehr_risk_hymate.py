"""`pipeline("ehr-risk")` on a HyMaTE checkpoint: the same answers, from a feature extractor instead of a tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    pipeline,
)

import ehrseq
from tests.checkpoints.stays import HYMATE_TASKS
from tests.pipelines.conftest import STAYS as PATIENTS


@pytest.fixture(scope="module")
def risk(hymate: Path) -> Any:
    return pipeline("ehr-risk", model=str(hymate), device="cpu")


def scores(answers: list[list[dict[str, Any]]]) -> np.ndarray:
    return np.array([[item["score"] for item in answer] for answer in answers])


def test_the_feature_extractor_is_the_encoder(risk: Any) -> None:
    assert type(risk) is ehrseq.EhrRiskPipeline
    assert type(risk.feature_extractor) is ehrseq.HyMaTEFeatureExtractor
    assert risk.tokenizer is None
    answer = risk(PATIENTS[0])
    assert [(item["task"], item["label"]) for item in answer] == [("in_hospital_mortality", "death in hospital")]
    assert 0 < answer[0]["score"] < 1
    json.dumps(answer)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_scores_equal_the_forward_of_the_model_with_the_shift_taken_back(
    risk: Any, hymate: Path, side: str, batch_size: int
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(hymate).eval()
    extractor = AutoFeatureExtractor.from_pretrained(hymate, padding_side=side)
    expected = []
    for patient in PATIENTS:
        with torch.no_grad():
            negative, positive = model(**extractor([patient], return_tensors="pt")).logits[0].tolist()
        expected.append(1 / (1 + np.exp(-(positive - negative - HYMATE_TASKS[0]["log_odds_shift"]))))
    padded = pipeline("ehr-risk", model=risk.model, feature_extractor=extractor, device="cpu")
    np.testing.assert_allclose(scores(padded(PATIENTS, batch_size=batch_size))[:, 0], expected, atol=1e-6)


def test_nothing_after_the_prediction_time_is_read_and_the_most_recent_are_kept(risk: Any) -> None:
    patient = PATIENTS[1]
    cut = patient["events"][4]["time"]
    known = [event for event in patient["events"] if event["time"] is None or event["time"] <= cut]
    expected = scores([risk({**patient, "events": known})])
    np.testing.assert_allclose(scores([risk(patient, prediction_time=cut)]), expected, atol=1e-6)
    np.testing.assert_allclose(scores([risk({**patient, "prediction_time": cut})]), expected, atol=1e-6)
    assert scores([risk(patient, max_length=2)]) != scores([risk(patient)])


def test_a_stay_of_triplets_is_a_patient_too(risk: Any) -> None:
    stay = {"times": [0, 30, 60], "variables": ["lactate", "heart rate", "lactate"], "values": [4.0, 120, 5.0]}
    assert 0 < risk(stay)[0]["score"] < 1


def test_a_patient_without_a_known_variable_is_refused(risk: Any) -> None:
    with pytest.raises(ValueError, match="holds no triplet of a known variable"):
        risk({"subject_id": 1, "events": [{"time": "2150-03-01T08:00", "code": "LAB//B//other", "numeric_value": 1.0}]})


def test_a_checkpoint_without_its_feature_extractor_is_refused(hymate: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(hymate / name, tmp_path)
    with pytest.raises(ValueError, match=r"neither a tokenizer nor a feature extractor"):
        pipeline("ehr-risk", model=str(tmp_path), device="cpu")


def test_a_pretrained_checkpoint_is_not_mistaken_for_a_risk_model(risk: Any, tmp_path: Path) -> None:
    ehrseq.HyMaTEForPreTraining(risk.model.config).save_pretrained(tmp_path)
    risk.feature_extractor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks .*classifier.*drawn at random"):
        pipeline("ehr-risk", model=str(tmp_path), device="cpu")


@pytest.mark.parametrize("trust", [None, False, True])
def test_with_the_package_its_classes_win_and_no_trust_is_asked(hymate: Path, trust: bool | None) -> None:
    options = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(hymate, **options)) is ehrseq.HyMaTEConfig
    assert type(AutoModel.from_pretrained(hymate, **options)) is ehrseq.HyMaTEModel
    assert type(AutoModelForPreTraining.from_pretrained(hymate, **options)) is ehrseq.HyMaTEForPreTraining
    classifier = AutoModelForSequenceClassification.from_pretrained(hymate, **options)
    assert type(classifier) is ehrseq.HyMaTEForSequenceClassification
    loaded = pipeline("ehr-risk", model=str(hymate), device="cpu", **options)
    assert type(loaded.feature_extractor) is ehrseq.HyMaTEFeatureExtractor


def test_without_the_package_the_folder_scores_a_patient(
    hymate: Path, risk: Any, scored_without_package: dict[str, dict[str, Any]]
) -> None:
    result = scored_without_package["hymate"]
    assert result["forbidden"] == []
    assert all(module.startswith("transformers_modules.") for module in result["modules"])
    expected = scores(risk(PATIENTS))
    np.testing.assert_allclose(scores(result["answers"]), expected, atol=1e-6)
    np.testing.assert_allclose(result["scores"], expected[:, 0], atol=1e-6)
    saved = Path(result["saved"])
    assert {file.name for file in saved.glob("*.py")} == {file.name for file in hymate.glob("*.py")}
    np.testing.assert_allclose(scores(pipeline("ehr-risk", model=str(saved), device="cpu")(PATIENTS)), expected)

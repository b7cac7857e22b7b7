"""`pipeline("ehr-risk")` on a HyMaTE checkpoint: the same answers, from a feature extractor instead of a tokenizer."""

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    Wav2Vec2FeatureExtractor,
    pipeline,
)

import ehrseq
from ehrseq.tasks import load_task
from ehrseq.tokenization.ehr_codes import DEFAULT_CODE_MAP
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
    assert set(risk(stay)[0]) == {"task", "label", "score"}  # without dates nothing speaks against the task
    assert 0 < risk(stay)[0]["score"] < 1


LAST = max(event["time"] for event in PATIENTS[0]["events"] if event["time"] is not None)
HOUR = timedelta(hours=1)

# name -> (rows beside the stay's, prediction time, reason)
DEATHS: dict[str, tuple[list[dict[str, Any]], Any, str | None]] = {
    "dead, nobody knows when": ([{"time": None, "code": "MEDS_DEATH"}], None, "death_time_unknown"),
    "dead in a month that is over": (
        [{"time": None, "code": "MEDS_DEATH", "text_value": "2149-01"}], None, "died_before_prediction"),
    "dead in the year of the stay": (
        [{"time": None, "code": "MEDS_DEATH", "text_value": f"{LAST.year}"}], None, "death_time_unknown"),
    "dead in a year to come": ([{"time": None, "code": "MEDS_DEATH", "text_value": "2152"}], None, None),
    "dead at that instant": ([{"time": LAST, "code": "MEDS_DEATH"}], None, "died_before_prediction"),
    "dead before": ([{"time": LAST - HOUR, "code": "MEDS_DEATH"}], None, "died_before_prediction"),
    "dies later": ([{"time": LAST + HOUR, "code": "MEDS_DEATH"}], LAST, None),
    "the record ends with the death": ([{"time": LAST + HOUR, "code": "MEDS_DEATH"}], None, "died_before_prediction"),
    "a discharge that says so": ([{"time": LAST, "code": "VISIT_END//exp"}], None, "died_before_prediction"),
    "such a discharge at an unknown time": ([{"time": None, "code": "VISIT_END//exp"}], None, "death_time_unknown"),
    "discharged alive": ([{"time": LAST, "code": "VISIT_END//home"}], None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", DEATHS)
def test_the_dead_have_no_risk_and_the_answer_says_why(risk: Any, name: str) -> None:
    rows, time, reason = DEATHS[name]
    record = {**PATIENTS[0], "events": [*PATIENTS[0]["events"], *rows]}
    (answer,) = risk(record, prediction_time=time)
    assert answer.get("reason") == reason
    if reason is None:
        assert answer["score"] == pytest.approx(risk(PATIENTS[0])[0]["score"], abs=1e-6)
    else:
        assert answer["score"] is None
    table = pl.DataFrame([{"subject_id": 100, **event} for event in record["events"]], infer_schema_length=None)
    assert risk(table, prediction_time=time)[0].get("reason") == reason


def test_reasons_are_those_of_a_tokenizer_for_every_task_that_says_when_it_is_asked(risk: Any) -> None:
    times = [LAST - timedelta(hours=hours) for hours in (30, 24, 2, 0)]
    rows = [(times[0], "VISIT_START//IMP"), (times[2], "DIAGNOSIS//ICD10CM//I10"), (times[3], "VISIT_END//home")]
    events = [*PATIENTS[0]["events"], *({"time": time, "code": code, "visit_id": "a"} for time, code in rows)]
    tokenizer = ehrseq.EhrTokenizer.train(pl.DataFrame([{"subject_id": 1, **event} for event in events]))
    tasks = [load_task(name).to_config() for name in ("mortality_30d", "long_stay_7d", "hypertension")]
    told = []
    for time in times:
        told.append(risk.feature_extractor.reasons_against({"events": events}, tasks, time))
        assert told[-1] == tokenizer.reasons_against({"events": events}, tasks, time)
    assert told == [
        ["no_discharge", "off_anchor", "no_discharge"],  # at the admission
        ["no_discharge", "off_anchor", "no_discharge"],  # 6 hours after it, 24 are learnt
        ["no_discharge", None, "earlier_code"],  # 28 hours after it, the diagnosis is recorded
        [None, "stay_ended", "earlier_code"],  # at the discharge
    ]


def test_a_batch_of_the_living_and_the_dead_is_one_warning(risk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("ehrseq.pipelines.ehr_risk.logger.warning", said.append)
    dead = {**PATIENTS[1], "events": [{"time": None, "code": "MEDS_DEATH"}, *PATIENTS[1]["events"]]}
    answers = risk([PATIENTS[0], dead, PATIENTS[2]], batch_size=2)
    assert [answer[0]["score"] is None for answer in answers] == [False, True, False]
    assert [answer[0].get("reason") for answer in answers] == [None, "death_time_unknown", None]
    assert len(said) == 1
    assert "it is not known whether before the prediction time (no score): in_hospital_mortality 1" in said[0]


def test_deaths_of_a_dataset_s_own_codes_are_deaths_to_its_extractor(risk: Any, tmp_path: Path) -> None:
    content = risk.feature_extractor.to_dict()
    assert "code_map" not in content  # checkpoints without one stay as they are
    rules = [["MORTE$", "death"], *DEFAULT_CODE_MAP]
    ehrseq.HyMaTEFeatureExtractor(**{**content, "code_map": rules}).save_pretrained(tmp_path)
    again = ehrseq.HyMaTEFeatureExtractor.from_pretrained(tmp_path)
    assert again.code_map == rules
    record = {"events": [*PATIENTS[0]["events"], {"time": None, "code": "MORTE"}]}
    assert again.reasons_against(record, HYMATE_TASKS) == ["death_time_unknown"]
    assert risk.feature_extractor.reasons_against(record, HYMATE_TASKS) == [None]


@pytest.mark.parametrize("code_map", [[["(", "death"]], [["X", "dead"]], 5])
def test_a_code_map_that_is_none_is_refused(risk: Any, code_map: Any) -> None:
    with pytest.raises(ValueError, match="code_map"):
        ehrseq.HyMaTEFeatureExtractor(**risk.feature_extractor.to_dict(), code_map=code_map)


def test_a_feature_extractor_that_knows_no_reasons_is_refused(risk: Any) -> None:
    with pytest.raises(ValueError, match=r"loaded as Wav2Vec2FeatureExtractor, which cannot say whether a task"):
        pipeline("ehr-risk", model=risk.model, feature_extractor=Wav2Vec2FeatureExtractor(), device="cpu")


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
    reasons = [(item["score"], item["reason"]) for answer in result["dead"] for item in answer]
    assert reasons == [(None, "death_time_unknown"), (None, "died_before_prediction")]
    saved = Path(result["saved"])
    assert {file.name for file in saved.glob("*.py")} == {file.name for file in hymate.glob("*.py")}
    np.testing.assert_allclose(scores(pipeline("ehr-risk", model=str(saved), device="cpu")(PATIENTS)), expected)

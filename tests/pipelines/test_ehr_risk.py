"""`pipeline("ehr-risk")`: the answers' form, equality with the model's own forward, and every refusal."""

import json
import math
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import ehrseq
from ehrseq.tasks import load_task
from tests.checkpoints.patients import TASKS, make_patient, make_table

NAMES = [task["name"] for task in TASKS]
PATIENTS = [make_patient(subject_id, seed=1) for subject_id in range(4)]


@pytest.fixture(scope="module")
def risk(checkpoint: Path) -> Any:
    return pipeline("ehr-risk", model=str(checkpoint), device="cpu")


def scores(answer: list[dict[str, Any]]) -> list[float]:
    return [item["score"] for item in answer]


def test_one_patient_gives_task_label_and_score_in_the_order_of_the_config(risk: Any) -> None:
    answer = risk(PATIENTS[0])
    assert [set(item) for item in answer] == [{"task", "label", "score"}] * 3
    assert [item["task"] for item in answer] == NAMES
    assert [item["label"] for item in answer] == [task["positive_label"] for task in TASKS]
    assert all(isinstance(item["score"], float) and 0 < item["score"] < 1 for item in answer)
    json.dumps(answer)


def test_patients_give_one_list_each_equal_to_the_single_answers(risk: Any) -> None:
    answers = risk(PATIENTS)
    assert len(answers) == len(PATIENTS)
    for patient, answer in zip(PATIENTS, answers, strict=True):
        np.testing.assert_allclose(scores(answer), scores(risk(patient)), atol=1e-6)


def test_scores_equal_the_forward_of_the_model_with_the_shift_taken_back(risk: Any, checkpoint: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    shifts = [task["log_odds_shift"] for task in model.config.tasks]
    assert shifts == [0.7, 0.0, 0.0]
    for patient in PATIENTS:
        expected = []
        for name, shift in zip(NAMES, shifts, strict=True):
            inputs = tokenizer([patient], task=name, return_tensors="pt", truncation=True, max_length=64)
            with torch.no_grad():
                negative, positive = model(**inputs).logits[0].tolist()
            expected.append(1 / (1 + math.exp(-(positive - negative - shift))))
        np.testing.assert_allclose(scores(risk(patient)), expected, atol=1e-6)


def test_batch_size_counts_rows_of_patient_and_task(risk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, forward = [], risk.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].shape[0])
        return forward(*args, **kwargs)

    expected = risk(PATIENTS[:3])
    monkeypatch.setattr(risk.model, "forward", counting)
    answers = risk(PATIENTS[:3], batch_size=4)
    assert sizes == [4, 4, 1]
    for answer, alone in zip(answers, expected, strict=True):
        np.testing.assert_allclose(scores(answer), scores(alone), atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_different_lengths_are_padded_on_either_side(risk: Any, checkpoint: Path, side: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side=side)
    padded = pipeline("ehr-risk", model=risk.model, tokenizer=tokenizer, device="cpu", batch_size=12)(PATIENTS)
    for answer, patient in zip(padded, PATIENTS, strict=True):
        np.testing.assert_allclose(scores(answer), scores(risk(patient)), atol=1e-6)


@pytest.mark.parametrize("tasks", ["readmission_30d", ["readmission_30d", "mortality_30d"], ("mortality_30d",) * 2])
def test_a_subset_of_tasks_comes_in_the_asked_order(risk: Any, tasks: Any) -> None:
    by_name = {item["task"]: item["score"] for item in risk(PATIENTS[0])}
    asked = [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    answer = risk(PATIENTS[0], tasks=tasks)
    assert [item["task"] for item in answer] == asked
    np.testing.assert_allclose(scores(answer), [by_name[name] for name in asked], atol=1e-6)


def test_tasks_of_the_constructor_hold_until_a_call_names_others(risk: Any) -> None:
    only = pipeline("ehr-risk", model=risk.model, tokenizer=risk.tokenizer, device="cpu", tasks="long_stay_7d")
    assert [item["task"] for item in only(PATIENTS[0])] == ["long_stay_7d"]
    assert [item["task"] for item in only(PATIENTS[0], tasks="mortality_30d")] == ["mortality_30d"]


def test_no_patients_give_no_answers(risk: Any) -> None:
    assert risk([]) == []
    assert risk(()) == []
    assert list(risk(patient for patient in [])) == []


def test_generators_iterators_and_datasets_are_scored_as_they_are_read(risk: Any) -> None:
    class Dataset(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(PATIENTS)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return PATIENTS[index]

    expected = risk(PATIENTS)
    read: list[int] = []

    def generate() -> Any:
        for index, patient in enumerate(PATIENTS):
            read.append(index)
            yield patient

    answers = iter(risk(generate()))
    next(answers)
    assert len(read) < len(PATIENTS)
    for source in (generate(), iter(PATIENTS), Dataset(), tuple(PATIENTS)):
        for answer, wanted in zip(risk(source, batch_size=3), expected, strict=True):
            np.testing.assert_allclose(scores(answer), scores(wanted), atol=1e-6)


def test_a_table_of_one_subject_scores_like_its_dict(risk: Any) -> None:
    for patient in PATIENTS[:2]:
        np.testing.assert_allclose(scores(risk(make_table([patient]))), scores(risk(patient)), atol=1e-6)


def test_nothing_after_the_prediction_time_is_read(risk: Any) -> None:
    patient = PATIENTS[1]
    cut = patient["events"][len(patient["events"]) // 2]["time"]
    known = [event for event in patient["events"] if event["time"] <= cut]
    expected = scores(risk({**patient, "events": known, "prediction_time": cut}))
    np.testing.assert_allclose(scores(risk(patient, prediction_time=cut)), expected, atol=1e-6)
    np.testing.assert_allclose(scores(risk({**patient, "prediction_time": cut})), expected, atol=1e-6)
    np.testing.assert_allclose(scores(risk(patient, prediction_time=cut.isoformat())), expected, atol=1e-6)
    assert np.abs(np.subtract(scores(risk(patient)), expected)).max() > 1e-6


def test_a_long_record_keeps_its_most_recent_events(risk: Any) -> None:
    patient = PATIENTS[2]
    assert scores(risk(patient, max_length=12)) != scores(risk(patient))
    inputs = risk.tokenizer(patient, task=NAMES[0], truncation=True, max_length=12)
    assert len(np.ravel(inputs["input_ids"])) == 12


def bundle_of(patient_id: str = "p1") -> dict[str, Any]:
    subject = {"reference": f"Patient/{patient_id}"}
    icd = "http://hl7.org/fhir/sid/icd-10-cm"
    resources = [
        {"resourceType": "Patient", "id": patient_id, "birthDate": "1960-05-01", "gender": "female"},
        {
            "resourceType": "Condition",
            "id": "c1",
            "subject": subject,
            "recordedDate": "2150-03-01T08:00:00Z",
            "code": {"coding": [{"system": icd, "code": "I50"}]},
        },
    ]
    return {"resourceType": "Bundle", "type": "collection", "entry": [{"resource": item} for item in resources]}


def test_a_fhir_bundle_scores_like_its_patient(risk: Any) -> None:
    patient = ehrseq.patient_from_bundle(bundle_of())
    np.testing.assert_allclose(scores(risk(bundle_of())), scores(risk(patient)), atol=1e-6)
    np.testing.assert_allclose(scores(risk([bundle_of()])[0]), scores(risk(patient)), atol=1e-6)


def test_a_fhir_bundle_without_the_package_names_the_package(risk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ehrseq.data", None)
    with pytest.raises(ImportError, match="pip install ehrseq"):
        risk(bundle_of())


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (PATIENTS[0], {"tasks": "lipid_disorder"}, r"Unknown task.*lipid_disorder.*mortality_30d"),
        (PATIENTS[0], {"tasks": ["mortality_30d", 3]}, r"Unknown task.*3"),
        (PATIENTS[0], {"tasks": []}, "name at least one"),
        ([], {"tasks": "lipid_disorder"}, "Unknown task"),
        (PATIENTS[0], {"batch_size": 0}, "batch_size got 0; expected a whole number of at least 1"),
        (PATIENTS, {"batch_size": -1}, "batch_size got -1"),
        ([], {"batch_size": 2.5}, "batch_size got 2.5"),
        (PATIENTS[0], {"top_k": 1}, r"Unknown argument.*top_k"),
        ({"resourceType": "Patient", "id": "p1"}, {}, "expected a Bundle"),
        ({"resourceType": "Bundle", "entry": []}, {}, "Patient"),
        ({"subject_id": 1}, {}, "events"),
        ({"subject_id": 1, "events": []}, {}, "event"),
        ({"subject_id": 1, "events": [{"time": "soon", "code": "X"}]}, {}, "soon"),
        ("patient 1", {}, "reads patients, not text"),
        ([PATIENTS[0], 7], {}, "int"),
        (make_table(PATIENTS), {}, "subject"),
        (PATIENTS[0], {"prediction_time": "yesterday"}, "yesterday"),
        (PATIENTS[0], {"max_length": 1}, "max_length|context"),
        (PATIENTS[0], {"max_length": 0}, "max_length got 0"),
        (PATIENTS[0], {"tasks": 5}, "tasks got 5"),
    ],
    ids=lambda value: None,
)
def test_bad_input_is_refused(risk: Any, given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        risk(given, **options)


def test_a_constructor_refuses_a_batch_without_rows(risk: Any) -> None:
    with pytest.raises(ValueError, match="batch_size got 0"):
        pipeline("ehr-risk", model=risk.model, tokenizer=risk.tokenizer, device="cpu", batch_size=0)


@pytest.mark.parametrize(
    ("event", "options"),
    [
        ({"time": "2150-01-01", "code": "NOBODY//KNOWS//THIS"}, {}),
        ({"time": None, "code": "GENDER//F"}, {}),
        (PATIENTS[0]["events"][-1], {"prediction_time": "1800-01-01"}),
    ],
    ids=["unknown code", "static only", "nothing yet"],
)
def test_a_risk_of_somebody_unknown_is_a_warning_every_time(
    risk: Any, event: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("ehrseq.pipelines.ehr_risk.logger.warning", said.append)
    risk([{"subject_id": 7, "events": [event]}] * 2 + [PATIENTS[0]] * (not options), **options)
    assert len(said) == 2
    assert all("Subject 7 has no event of a known code" in text for text in said)


@pytest.fixture(scope="module")
def asking(risk: Any, checkpoint: Path) -> Any:
    """The same pipeline with tasks that say when they are asked."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    model.config.tasks = [task | {"asked": load_task(task["name"]).to_config()["asked"]} for task in model.config.tasks]
    return pipeline("ehr-risk", model=model, tokenizer=risk.tokenizer, device="cpu")


def dead(patient: dict[str, Any]) -> dict[str, Any]:
    end = patient["events"][-1]["time"]
    return {**patient, "events": [*patient["events"], {"time": end + timedelta(days=90), "code": "MEDS_DEATH"}]}


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_question_that_does_not_apply_has_a_reason_and_one_warning(
    risk: Any, asking: Any, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("ehrseq.pipelines.ehr_risk.logger.warning", said.append)
    # Each record ends with a discharge: the two tasks of a discharge apply, that of a stay does not.
    answers = asking([PATIENTS[0], dead(PATIENTS[1]), PATIENTS[2]], batch_size=batch_size)
    assert [[item.get("reason") for item in answer] for answer in answers] == [
        [None, "stay_ended", None],
        ["died_before_prediction"] * 3,
        [None, "stay_ended", None],
    ]
    assert [[item["score"] is None for item in answer] for answer in answers] == [
        [False, True, False],
        [True] * 3,
        [False, True, False],
    ]
    for place in (0, 2):
        expected = risk(PATIENTS[place])
        for k in (0, 2):
            assert set(answers[place][k]) == {"task", "label", "score"}
            assert answers[place][k]["score"] == pytest.approx(expected[k]["score"], abs=1e-6)
    json.dumps(answers)
    (text,) = said
    assert (
        "died at or before the prediction time (no score): mortality_30d 1, long_stay_7d 1, readmission_30d 1" in text
    )
    assert "in no hospital stay at the prediction time (no score): long_stay_7d 2" in text


def test_another_moment_is_scored_and_said(risk: Any, asking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("ehrseq.pipelines.ehr_risk.logger.warning", said.append)
    patient = PATIENTS[0]
    inside = patient["events"][3]["time"]
    (answer,) = asking(patient, tasks="mortality_30d", prediction_time=inside)
    assert answer["reason"] == "no_discharge"
    (expected,) = risk(patient, tasks="mortality_30d", prediction_time=inside)
    assert answer["score"] == pytest.approx(expected["score"], abs=1e-6)
    assert len(said) == 1
    assert "(scored all the same): mortality_30d 1" in said[0]
    asking(patient, tasks="mortality_30d")
    assert len(said) == 1, "the counts are those of one call"


def test_a_generator_warns_when_it_has_been_read(asking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("ehrseq.pipelines.ehr_risk.logger.warning", said.append)
    answers = asking((dead(patient) for patient in PATIENTS), tasks="mortality_30d", batch_size=2)
    assert [answer[0]["score"] for answer in answers] == [None] * len(PATIENTS)
    assert len(said) == 1
    assert "mortality_30d 4" in said[0]


def test_without_rules_the_dead_alone_have_no_score(risk: Any) -> None:
    assert [item["reason"] for item in risk(dead(PATIENTS[0]))] == ["died_before_prediction"] * 3
    before = PATIENTS[0]["events"][-1]["time"]
    assert scores(risk(dead(PATIENTS[0]), prediction_time=before)) == scores(risk(PATIENTS[0]))


def test_a_checkpoint_without_its_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, tmp_path)
    with pytest.raises(ValueError, match=r"neither a tokenizer nor a feature extractor.*save_pretrained"):
        pipeline("ehr-risk", model=str(tmp_path), device="cpu")


def test_the_pipeline_refuses_parts_that_do_not_fit(risk: Any, checkpoint: Path) -> None:
    from transformers import TokenizersBackend

    def build(**changes: Any) -> Any:
        return pipeline("ehr-risk", **{"model": risk.model, "tokenizer": risk.tokenizer, "device": "cpu"} | changes)

    with pytest.raises(ValueError, match="reads text"):
        build(tokenizer=TokenizersBackend.from_pretrained(checkpoint))
    with pytest.raises(ValueError, match="exactly one"):
        build(feature_extractor=object())
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    model.config.tasks = [*TASKS, {**TASKS[0], "name": "new_task", "token": "[NEW]"}]
    with pytest.raises(ValueError, match=r"no token for \['new_task'\]"):
        build(model=model)
    model.config.tasks = []
    with pytest.raises(ValueError, match=r"config\.tasks .* is empty"):
        build(model=model)


def test_a_task_without_a_label_is_labelled_by_its_name(risk: Any, checkpoint: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    model.config.tasks = [{"name": name} for name in NAMES]
    answer = pipeline("ehr-risk", model=model, tokenizer=risk.tokenizer, device="cpu")(PATIENTS[0])
    assert [item["label"] for item in answer] == NAMES


def test_damaged_weights_give_an_error_and_no_risk(checkpoint: Path) -> None:
    broken = pipeline("ehr-risk", model=str(checkpoint), device="cpu")
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="weights are damaged"):
        broken(PATIENTS[0])


def test_a_pretrained_checkpoint_is_not_mistaken_for_a_risk_model(risk: Any, checkpoint: Path, tmp_path: Path) -> None:
    pretrained = ehrseq.EhrMambaForCausalLM(risk.model.config)
    pretrained.save_pretrained(tmp_path)
    risk.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks .*classifier.*drawn at random"):
        pipeline("ehr-risk", model=str(tmp_path), device="cpu")


def test_a_pretrained_checkpoint_is_a_risk_model_once_its_head_was_trained(risk: Any, tmp_path: Path) -> None:
    ehrseq.EhrMambaForCausalLM(risk.model.config).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert set(model.untrained_weights()) == {name for name, _ in model.named_parameters() if "classifier" in name}
    with torch.no_grad():
        for weight in model.classifier.parameters():
            weight.add_(0.01)
    assert model.untrained_weights() == []
    assert len(pipeline("ehr-risk", model=model, tokenizer=risk.tokenizer, device="cpu")(PATIENTS[0])) == 3


def test_a_saved_pipeline_loads_without_trust_and_scores_the_same(risk: Any, tmp_path: Path) -> None:
    risk.save_pretrained(tmp_path)
    assert not hasattr(risk.model.config, "custom_pipelines")
    assert "ehr-risk" in json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]
    again = pipeline("ehr-risk", model=str(tmp_path), device="cpu")
    assert type(again) is ehrseq.EhrRiskPipeline
    assert scores(again(PATIENTS[0])) == scores(risk(PATIENTS[0]))


def test_times_may_be_text(risk: Any) -> None:
    patient = PATIENTS[0]
    as_text = [{**event, "time": datetime.isoformat(event["time"])} for event in patient["events"]]
    assert scores(risk({**patient, "events": as_text})) == scores(risk(patient))

"""`pipeline("ehr-risk")(..., explain=...)`: what each event contributes to each score."""

import json
import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from ehrseq.interpretability import methods as methods_module
from ehrseq.interpretability import prefix_deltas, read_question
from ehrseq.interpretability.methods import Method
from ehrseq.pipelines import risk_explanations
from tests.checkpoints.patients import TASKS, make_patient
from tests.interpretability.asked import EVENT_FAMILIES
from tests.pipelines.conftest import PATIENTS, STAYS

NAMES = [task["name"] for task in TASKS]
FOLDERS = {name: Path(__file__).parents[1] / "checkpoints" / name for name in (*EVENT_FAMILIES, "hymate")}


@pytest.fixture(scope="module")
def risk() -> Any:
    return pipeline("ehr-risk", model=str(FOLDERS["ehrmamba"]), device="cpu")


def log_odds(score: float) -> float:
    return math.log(score / (1 - score))


def told(item: dict[str, Any]) -> float:
    """Baseline, contributions and remainder of an answer together."""
    contributions = sum(entry["contribution"] for entry in item["contributions"])
    return float(item["baseline"] + contributions + item.get("remainder", 0.0))


def assert_same_explanations(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [item["task"] for item in actual] == [item["task"] for item in expected]
    for one, other in zip(actual, expected, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)
        assert one["baseline"] == pytest.approx(other["baseline"], abs=1e-5)
        for entry, same in zip(one["contributions"], other["contributions"], strict=True):
            assert {**entry, "contribution": 0} == {**same, "contribution": 0}
            assert entry["contribution"] == pytest.approx(same["contribution"], abs=1e-5)


@pytest.mark.parametrize("family", FOLDERS)
def test_baseline_and_contributions_are_the_log_odds_of_the_score(family: str) -> None:
    pipe = pipeline("ehr-risk", model=str(FOLDERS[family]), device="cpu")
    patient = STAYS[0] if family == "hymate" else PATIENTS[0]
    plain, explained = pipe(patient), pipe(patient, explain="prefix_deltas")
    json.dumps(explained)
    for item, same in zip(explained, plain, strict=True):
        assert set(item) - set(same) == {"baseline", "contributions"}
        assert item["score"] == pytest.approx(same["score"], abs=1e-6)
        assert told(item) == pytest.approx(log_odds(item["score"]), abs=1e-5)
        assert all(set(entry) == {"time", "code", "value", "contribution"} for entry in item["contributions"])


def test_contributions_are_those_of_the_function(risk: Any) -> None:
    checkpoint = (
        AutoModelForSequenceClassification.from_pretrained(FOLDERS["ehrmamba"]).eval(),
        AutoTokenizer.from_pretrained(FOLDERS["ehrmamba"]),
    )
    for item in risk(PATIENTS[1], explain=True):
        explanation = prefix_deltas(read_question(checkpoint, PATIENTS[1], item["task"]))
        assert item["baseline"] == pytest.approx(explanation.baseline, abs=1e-5)
        for entry, same in zip(item["contributions"], explanation.to_records(), strict=True):
            assert {**entry, "contribution": 0} == {**same, "contribution": 0}
            assert entry["contribution"] == pytest.approx(same["contribution"], abs=1e-5)
        events = [event for event in PATIENTS[1]["events"] if event["code"] != "MEDS_BIRTH"]
        assert [entry["time"] for entry in item["contributions"]] == [event["time"].isoformat() for event in events]
        assert [entry["value"] for entry in item["contributions"]] == [e.get("numeric_value") for e in events]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_and_padding_change_nothing(risk: Any, batch_size: int, side: str) -> None:
    expected = [risk(patient, explain=True) for patient in PATIENTS]
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["ehrmamba"], padding_side=side)
    padded = pipeline("ehr-risk", model=risk.model, tokenizer=tokenizer, device="cpu")
    for actual, same in zip(padded(PATIENTS, explain=True, batch_size=batch_size), expected, strict=True):
        assert_same_explanations(actual, same)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generators_are_explained_one_by_one(risk: Any, batch_size: int) -> None:
    answers = risk((patient for patient in PATIENTS), explain=True, tasks=NAMES[:2], batch_size=batch_size)
    for actual, patient in zip(answers, PATIENTS, strict=True):
        assert_same_explanations(actual, risk(patient, explain=True, tasks=NAMES[:2]))


def test_stays_in_batches() -> None:
    pipe = pipeline("ehr-risk", model=str(FOLDERS["hymate"]), device="cpu")
    for actual, stay in zip(pipe(STAYS, explain="prefix_deltas", batch_size=3), STAYS, strict=True):
        assert_same_explanations(actual, pipe(stay, explain="prefix_deltas"))
        numbers = [event["numeric_value"] for event in stay["events"] if event["time"] is not None]
        assert [entry["value"] for entry in actual[0]["contributions"]] == numbers[1:]
    bare = {"times": [1.0, 2.0, 3.0], "variables": [0, 1, 0], "values": [1.0, 2.0, 3.0]}
    assert [entry["time"] for entry in pipe(bare, explain="prefix_deltas")[0]["contributions"]] == [None, None]


def test_it_is_off_unless_asked_for_and_can_be_asked_once_for_all(risk: Any) -> None:
    assert "contributions" not in risk(PATIENTS[0], explain=False)[0]
    always = pipeline("ehr-risk", model=risk.model, tokenizer=risk.tokenizer, device="cpu", explain=True)
    assert "contributions" in always(PATIENTS[0])[0]
    assert "contributions" not in always(PATIENTS[0], explain=False)[0]


def test_time_that_passes_has_no_code(risk: Any) -> None:
    patient = PATIENTS[0]
    later = patient["events"][-1]["time"] + timedelta(days=1)
    item = risk(patient, explain=True, prediction_time=later, tasks="mortality_30d")[0]
    assert {**item["contributions"][-1], "contribution": 0} == {
        "time": later.isoformat(),
        "code": None,
        "value": None,
        "contribution": 0,
    }
    assert told(item) == pytest.approx(log_odds(item["score"]), abs=1e-5)


def test_answers_without_a_score_have_no_explanation_and_others_do(risk: Any) -> None:
    patient = make_patient(5, seed=1)
    dead = {"events": [*patient["events"], {"time": patient["events"][-1]["time"], "code": "MEDS_DEATH"}]}
    answers = risk([dead, patient, dead], explain=True, batch_size=4)
    for item in (*answers[0], *answers[2]):
        assert item["score"] is None
        assert set(item) == {"task", "label", "score", "reason"}
    assert_same_explanations(answers[1], risk(patient, explain=True))


def test_what_a_method_leaves_unexplained_is_told(risk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_remainder = {"baseline": 0.0, "contributions": [{"time": None, "code": "X", "value": None, "contribution": 1}]}
    monkeypatch.setattr(risk_explanations, "_by_prefixes", lambda *_: tuple(with_remainder.values()))
    item = risk(PATIENTS[0], explain=True, tasks="mortality_30d")[0]
    assert item["remainder"] == pytest.approx(log_odds(item["score"]) - 1.0, abs=1e-5)
    assert told(item) == pytest.approx(log_odds(item["score"]), abs=1e-5)


def test_other_methods_are_the_package_s(risk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def by_hand(question: Any) -> Any:
        asked.append((torch.is_grad_enabled(), question.prediction_time))
        return prefix_deltas(question)

    monkeypatch.setitem(methods_module.METHODS, "by_hand", Method("x:by_hand", ("ehrmamba",), "A method of the test."))
    monkeypatch.setattr(Method, "load", lambda self: by_hand)
    time = PATIENTS[0]["events"][6]["time"]
    answers = risk([PATIENTS[0], PATIENTS[1]], explain="by_hand", prediction_time=time, batch_size=4)
    assert len(asked) == 2 * len(NAMES)
    assert all(gradients for gradients, _ in asked)
    assert len({when for _, when in asked}) == 1
    assert_same_explanations(answers[0], risk(PATIENTS[0], explain="prefix_deltas", prediction_time=time))


BAD = {
    "an unknown method": ("lime", r"method got 'lime'; a model of the family 'ehrmamba' has \['prefix_deltas'"),
    "weights": ("hidden_attention", r"explain='hidden_attention' gives weights, which sum to no score; this model has"),
    "another family's": ("fusion_weights", "method got 'fusion_weights'"),
    "a number": (3, r"explain got 3 \(int\); expected True or the name of a method"),
    "a list": (["prefix_deltas"], "expected True or the name of a method"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_method_is_refused(risk: Any, case: str) -> None:
    explain, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        risk(PATIENTS[0], explain=explain)
    with pytest.raises(ValueError, match=message):
        risk([], explain=explain)


def test_without_the_package_other_methods_are_refused_and_prefix_deltas_are_not(
    risk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ehrseq.interpretability", None)
    expected = (
        "explain='integrated_gradients' needs the package ehrseq, which is not installed here: pip install ehrseq"
    )
    with pytest.raises(ValueError, match=expected):
        risk(PATIENTS[0], explain="integrated_gradients")
    assert "contributions" in risk(PATIENTS[0], explain=True)[0]


def test_a_model_of_an_older_version_is_told_so(risk: Any) -> None:
    with pytest.raises(ValueError, match="object or EhrTokenizer is of an older version, which explains nothing"):
        risk_explanations.method_asked_for(object(), risk.tokenizer, True)


def test_half_precision_tells_its_score(risk: Any) -> None:
    half = pipeline("ehr-risk", model=str(FOLDERS["ehrmamba"]), device="cpu", dtype="bfloat16")
    for item in half(PATIENTS[0], explain=True):
        assert told(item) == pytest.approx(log_odds(item["score"]), abs=1e-4)


def test_without_the_package_a_checkpoint_explains_alike(
    scored_without_package: dict[str, dict[str, Any]], checkpoint: Path, hymate: Path
) -> None:
    for name, folder, patients in (("ehrmamba", checkpoint, PATIENTS), ("hymate", hymate, STAYS)):
        pipe = pipeline("ehr-risk", model=str(folder), device="cpu")
        expected = [pipe(patient, explain="prefix_deltas") for patient in patients]
        for actual, same in zip(scored_without_package[name]["explained"], expected, strict=True):
            assert_same_explanations(actual, same)
    assert "needs the package ehrseq" in scored_without_package["ehrmamba"]["refusals"]["method"]


def test_contributions_are_plain_numbers(risk: Any) -> None:
    """Contributions are numbers of the language, not of numpy: JSON has them as they are."""
    item = risk(PATIENTS[0], explain=True)[0]
    assert all(type(entry["contribution"]) is float for entry in item["contributions"])
    assert type(item["baseline"]) is float
    assert np.isfinite([entry["contribution"] for entry in item["contributions"]]).all()

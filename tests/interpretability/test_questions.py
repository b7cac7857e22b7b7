"""Questions: the row that the pipeline asks, the events behind it, and what is refused."""

import math
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from ehrseq.hub.checkpoints import Checkpoint
from ehrseq.interpretability import read_question
from tests.interpretability.asked import CHECKPOINTS, FAMILIES, checkpoint_of, patient_of, task_of


@pytest.mark.parametrize("family", FAMILIES)
def test_its_log_odds_are_those_of_the_pipeline_s_score(family: str) -> None:
    model, encoder = checkpoint_of(family)
    parts: dict[str, Any] = {"feature_extractor" if family == "hymate" else "tokenizer": encoder}
    single = AutoModelForSequenceClassification.from_pretrained(CHECKPOINTS / family).eval()
    for task in [entry["name"] for entry in model.config.tasks or []]:
        answer = pipeline("ehr-risk", model=single, device="cpu", **parts)(patient_of(family), tasks=task)[0]
        question = read_question((single, encoder), patient_of(family), task)
        assert question.reason == answer.get("reason")
        assert question.has_answer == (answer["score"] is not None)
        log_odds = question.log_odds()
        assert log_odds.shape == (1,)
        assert log_odds.requires_grad
        if answer["score"] is not None:
            assert float(torch.sigmoid(log_odds.detach())) == pytest.approx(answer["score"], abs=1e-6)


def test_the_shift_of_training_is_taken_back() -> None:
    model, encoder = checkpoint_of("hymate")
    shift = (model.config.tasks or [])[0]["log_odds_shift"]
    question = read_question((model, encoder), patient_of("hymate"), task_of("hymate"))
    with torch.no_grad():
        logits = model(**question.inputs).logits[0]
        assert float(question.log_odds()[0]) == pytest.approx(float(logits[1] - logits[0]) - shift, abs=1e-12)
        assert question.log_odds().dtype == torch.float64


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_knows_its_event(family: str) -> None:
    patient = patient_of(family)
    question = read_question(checkpoint_of(family), patient, task_of(family))
    length = next(iter(question.inputs.values())).shape[1]
    assert len(question.event_of) == len(question.visit_of) == length
    assert [event.code for event in question.events] == [event["code"] for event in patient["events"]]
    assert len(question.seen) == len(patient["events"])
    assert set(question.event_of[question.event_of >= 0].tolist()) <= set(np.flatnonzero(question.seen).tolist())
    assert question.subject_id == patient["subject_id"]
    if family != "hymate":
        assert question.visit_of.tolist() == question.inputs["visit_orders"][0].tolist()


def test_a_table_is_a_patient_too() -> None:
    patient = patient_of("ehrmamba")
    table = pl.DataFrame(patient["events"]).with_columns(subject_id=pl.lit(patient["subject_id"]))
    one, two = (read_question(checkpoint_of("ehrmamba"), record, "long_stay_7d") for record in (patient, table))
    assert one.subject_id == two.subject_id
    assert one.task["name"] == "long_stay_7d"
    assert one.task_id == two.task_id == 1
    for name, channel in one.inputs.items():
        assert torch.equal(channel, two.inputs[name])


def test_the_time_is_that_of_the_call_the_patient_or_the_last_event() -> None:
    patient = patient_of("ehrmamba")
    last, early = patient["events"][-1]["time"], patient["events"][3]["time"]
    checkpoint, task = checkpoint_of("ehrmamba"), task_of("ehrmamba")

    def microseconds(time: datetime) -> int:
        return round((time - datetime(1970, 1, 1)).total_seconds() * 1e6)

    assert read_question(checkpoint, patient, task).prediction_time == microseconds(last)
    assert read_question(checkpoint, {**patient, "prediction_time": early}, task).prediction_time == microseconds(early)
    assert read_question(checkpoint, patient, task, early).prediction_time == microseconds(early)


def test_the_model_s_own_context_is_the_default() -> None:
    model, encoder = checkpoint_of("ehrmamba")
    assert model.config.max_position_embeddings is not None
    codes = [{"time": datetime(2150, 1, 1), "code": f"LAB//{k}"} for k in range(model.config.max_position_embeddings)]
    question = read_question(Checkpoint(model, encoder), {"events": codes}, task_of("ehrmamba"))
    assert len(question.event_of) == model.config.max_position_embeddings
    assert question.notes["events before the context, not seen"] > 0


def test_a_stay_of_bare_triplets_can_be_asked() -> None:
    model, encoder = checkpoint_of("hymate")
    stay = {"times": [1.0, 2.0], "variables": [0, 1], "values": [1.0, 2.0]}
    question = read_question((model, encoder), stay, task_of("hymate"))
    assert question.prediction_time is None
    assert question.event_of.tolist() == [0, 1]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown task": ({"task": "death"}, r"Unknown task 'death': this model was trained for \['mortality_30d'"),
    "no patient": ({"patient": 3}, "a patient must be"),
    "an empty record": ({"patient": {"events": []}}, "without events"),
    "text as time": ({"prediction_time": "soon"}, "prediction_time got 'soon'; expected ISO 8601"),
    "a context of nothing": ({"max_length": 2}, "max_length got 2"),
    "an event without a code": ({"patient": {"events": [{"time": None, "code": ""}]}}, "event 0 has code ''"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_asked_is_refused(case: str) -> None:
    changes, message = BAD[case]
    arguments = {"patient": patient_of("ehrmamba"), "task": "mortality_30d", **changes}
    with pytest.raises(ValueError, match=message):
        read_question(checkpoint_of("ehrmamba"), **arguments)


def test_another_number_of_classes_is_refused() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        CHECKPOINTS / "ehrmamba", num_labels=3, ignore_mismatched_sizes=True
    )
    with pytest.raises(ValueError, match="this model has 3 classes; what is explained is the risk of class 1 of two"):
        read_question((model, checkpoint_of("ehrmamba").encoder), patient_of("ehrmamba"), "mortality_30d")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_log_odds_in_float32(dtype: torch.dtype) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(CHECKPOINTS / "ehrmamba", dtype=dtype)
    encoder = checkpoint_of("ehrmamba").encoder
    question = read_question((model, encoder), patient_of("ehrmamba"), "mortality_30d")
    log_odds = question.log_odds().detach()
    assert log_odds.dtype == torch.float32
    assert math.isfinite(float(log_odds))

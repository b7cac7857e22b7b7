"""Prefix deltas: they sum to the risk less that of the empty record; each is a step of the record that grows."""

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch

from ehrseq.interpretability import prefix_deltas, read_question
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from tests.interpretability.asked import EVENT_FAMILIES, FAMILIES, checkpoint_of, patient_of, task_of


def forward(family: str, record: dict[str, Any], time: Any) -> float:
    """The model's log-odds of a row that the encoder makes of a record, in float64."""
    model, encoder = checkpoint_of(family)
    if family == "hymate":
        row = encoder(record, prediction_time=time)
    else:
        assert isinstance(encoder, EhrTokenizer)
        row = encoder.encode_patient(record, task_of(family), time)
    inputs = {name: torch.as_tensor(channel)[None] for name, channel in row.items()}
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        logits = model(**inputs).logits
        return float(model.log_odds(logits, torch.zeros(1, dtype=torch.int64))[0])  # type: ignore[attr-defined]


@pytest.mark.parametrize("by", ["event", "visit", "day", "hour"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_they_sum_to_the_risk_less_that_of_the_empty_record(family: str, by: str, dtype: torch.dtype) -> None:
    if family == "hymate" and by == "visit":
        pytest.skip("a stay has no visits")
    model, encoder = checkpoint_of(family)
    patient = patient_of(family)
    try:
        model.to(dtype)  # type: ignore[attr-defined]
        question = read_question((model, encoder), patient, task_of(family))
        explanation = prefix_deltas(question, by)
        whole = float(question.log_odds().detach())
    finally:
        model.to(torch.float64)  # type: ignore[attr-defined]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert explanation.log_odds == pytest.approx(whole, abs=tolerance)
    assert abs(explanation.remainder) < 1e-9
    assert explanation.baseline + explanation.total == pytest.approx(whole, abs=tolerance)
    assert explanation.score == pytest.approx(1 / (1 + np.exp(-whole)))
    assert explanation.contributions["score_after"][-1] == pytest.approx(explanation.score)


@pytest.mark.parametrize("family", EVENT_FAMILIES)
def test_each_is_a_step_of_the_record_that_grows(family: str) -> None:
    patient = patient_of(family)
    events = patient["events"]  # in order of time; the birth first, pairs of events at one time in the row's order
    last = events[-1]["time"]
    explanation = prefix_deltas(
        read_question(checkpoint_of(family), patient, task_of(family), last + timedelta(days=2))
    )
    expected = [forward(family, {"events": events[:1]}, events[1]["time"])]
    for k in range(1, len(events)):
        expected.append(forward(family, {"events": events[: k + 1]}, events[k]["time"]))
    expected.append(forward(family, patient, last + timedelta(days=2)))
    table = explanation.contributions
    np.testing.assert_allclose(table["contribution"], np.diff(expected), atol=1e-9)
    assert explanation.baseline == pytest.approx(expected[0], abs=1e-9)
    np.testing.assert_allclose(table["score_after"], 1 / (1 + np.exp(-np.array(expected[1:]))), atol=1e-9)
    assert table["event"].to_list() == [*range(1, len(events)), None]
    assert table["code"].to_list() == [*(event["code"] for event in events[1:]), None]
    assert table["kind"].to_list()[-1] == "time"
    assert table["time"].to_list() == [*(event["time"] for event in events[1:]), last + timedelta(days=2)]


@pytest.mark.parametrize("family", EVENT_FAMILIES)
def test_a_visit_s_step_is_the_sum_of_its_events(family: str) -> None:
    question = read_question(checkpoint_of(family), patient_of(family, 5), task_of(family))
    events, visits = prefix_deltas(question), prefix_deltas(question, "visit")
    sums = events.by("visit")
    assert len(sums) == len(visits.contributions) > 1
    expected = dict(zip(sums["visit"], sums["contribution"], strict=True))
    found = dict(zip(visits.contributions["visit"], visits.contributions["contribution"], strict=True))
    assert found == pytest.approx(expected, abs=1e-9)
    assert visits.contributions["group"].to_list() == [f"visit {k}" for k in sorted(expected)]
    assert set(visits.contributions["kind"]) == {"visit"}


def test_the_steps_of_a_stay_are_its_triplets() -> None:
    stay = patient_of("hymate")
    question = read_question(checkpoint_of("hymate"), stay, task_of("hymate"))
    explanation = prefix_deltas(question)
    timed = [k for k, event in enumerate(stay["events"]) if event["time"] is not None]
    expected = []
    for k in timed:
        known = [
            event for event in stay["events"] if event["time"] is None or event["time"] <= stay["events"][k]["time"]
        ]
        expected.append(forward("hymate", {"events": known}, stay["events"][k]["time"]))
    np.testing.assert_allclose(explanation.contributions["contribution"], np.diff(expected), atol=1e-9)
    assert explanation.baseline == pytest.approx(expected[0], abs=1e-9)
    assert explanation.baseline_name == "the stay's first triplet and its static values"
    assert explanation.contributions["event"].to_list() == timed[1:]
    with pytest.raises(ValueError, match="by='visit' needs visits"):
        prefix_deltas(question, "visit")


@pytest.mark.parametrize("family", EVENT_FAMILIES)
@pytest.mark.parametrize("max_length", [8, 12, 20])
def test_a_row_that_is_cut_starts_where_it_does(family: str, max_length: int) -> None:
    patient = patient_of(family, 5)
    question = read_question(checkpoint_of(family), patient, task_of(family), max_length=max_length)
    explanation = prefix_deltas(question)
    assert abs(explanation.remainder) < 1e-9
    assert explanation.log_odds == pytest.approx(float(question.log_odds().detach()), abs=1e-10)
    seen = set(np.flatnonzero(question.seen).tolist())
    assert set(explanation.contributions["event"].drop_nulls()) == seen
    assert explanation.notes["events before the context, not seen"] == len(patient["events"]) - 1 - len(seen)


def test_nothing_after_the_prediction_time_is_read() -> None:
    patient = patient_of("ehrmamba", 5)
    time = patient["events"][6]["time"]
    later = [event for event in patient["events"] if event["time"] > time]
    known = {"events": [event for event in patient["events"] if event["time"] <= time]}
    changed = {"events": [*known["events"], *({**event, "code": "LAB//OTHER"} for event in later)]}
    checkpoint, task = checkpoint_of("ehrmamba"), task_of("ehrmamba")
    whole, cut, other = (
        prefix_deltas(read_question(checkpoint, record, task, time)) for record in (patient, known, changed)
    )
    for explanation in (whole, other):
        assert explanation.contributions.drop("event").equals(cut.contributions.drop("event"))
        assert explanation.baseline == cut.baseline
    assert whole.notes["events after the prediction time, not read"] == len(later)


def test_the_order_of_the_events_in_the_record_changes_nothing_but_their_numbers() -> None:
    patient = patient_of("ehrmamba", 5)
    turned = {"events": patient["events"][::-1]}
    checkpoint, task = checkpoint_of("ehrmamba"), task_of("ehrmamba")
    one, two = (prefix_deltas(read_question(checkpoint, record, task), "hour") for record in (patient, turned))
    np.testing.assert_allclose(one.contributions["score_after"][-1], two.contributions["score_after"][-1], atol=0.1)
    events = prefix_deltas(read_question(checkpoint, turned, task)).contributions
    for event, code in zip(events["event"], events["code"], strict=True):
        assert turned["events"][event]["code"] == code


@pytest.mark.parametrize("family", EVENT_FAMILIES)
def test_a_record_of_unknown_codes_says_so(family: str) -> None:
    events = [{"time": f"2150-03-0{day}", "code": f"LAB//NOBODY//{day}"} for day in range(1, 5)]
    question = read_question(checkpoint_of(family), {"events": events}, task_of(family))
    explanation = prefix_deltas(question)
    assert explanation.notes == {"events of unknown codes, read as [UNK]": 4}
    assert abs(explanation.remainder) < 1e-9


def test_a_record_without_timed_events_has_nothing_to_tell() -> None:
    question = read_question(
        checkpoint_of("ehrmamba"), {"events": [{"time": None, "code": "GENDER//F"}]}, task_of("ehrmamba")
    )
    explanation = prefix_deltas(question)
    assert len(explanation.contributions) == 0
    assert explanation.baseline == explanation.log_odds
    assert explanation.prediction_time is None


def test_a_task_that_does_not_apply_has_its_reason_and_no_explanation() -> None:
    patient = patient_of("ehrmamba")
    dead = {"events": [*patient["events"], {"time": patient["events"][-1]["time"], "code": "MEDS_DEATH"}]}
    explanation = prefix_deltas(read_question(checkpoint_of("ehrmamba"), dead, task_of("ehrmamba")))
    assert explanation.reason == "died_before_prediction"
    assert np.isnan(explanation.score)
    assert np.isnan(explanation.baseline)
    assert explanation.contributions.is_empty()


def test_another_step_is_refused() -> None:
    question = read_question(checkpoint_of("ehrmamba"), patient_of("ehrmamba"), task_of("ehrmamba"))
    with pytest.raises(ValueError, match="by got 'month'; expected one of"):
        prefix_deltas(question, "month")

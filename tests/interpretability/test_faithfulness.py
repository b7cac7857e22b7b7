"""Measures of faithfulness: against records that are made and read without the events, scipy and scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from ehrseq.hub.checkpoints import load_checkpoint
from ehrseq.interpretability import (
    integrated_gradients,
    prefix_deltas,
    random_contributions,
    read_question,
)
from ehrseq.interpretability.counterfactuals import occlusion
from ehrseq.interpretability.faithfulness import (
    SHARES,
    agreement,
    completeness,
    event_contributions,
    rank_correlation,
    removable_events,
    removal,
    sanity,
    stability,
    with_random_weights,
)
from tests.checkpoints.patients import make_patient
from tests.checkpoints.stays import make_stay

FAMILIES = ("ehrmamba", "ehr_lstm", "hymate")


@pytest.fixture(scope="module")
def checkpoints():
    folder = Path(__file__).parents[1] / "checkpoints"
    return {family: load_checkpoint(folder / family) for family in FAMILIES}


def patient_of(family):
    return make_stay(1) if family == "hymate" else make_patient(3)


def question_of(checkpoints, family, patient=None):
    checkpoint = checkpoints[family]
    return read_question(checkpoint, patient or patient_of(family), checkpoint.model.config.tasks[0]["name"])


def log_odds_without(checkpoints, family, removed):
    """The model's answer for a record that is written without some events and read as any other."""
    patient = patient_of(family)
    end = max(event["time"] for event in patient["events"] if event["time"] is not None)
    kept = [event for place, event in enumerate(patient["events"]) if place not in set(removed)]
    checkpoint = checkpoints[family]
    shorter = {**patient, "events": kept}
    question = read_question(checkpoint, shorter, checkpoint.model.config.tasks[0]["name"], prediction_time=end)
    with torch.no_grad():
        return question.log_odds().item()


def risk(log_odds):
    return 1 / (1 + np.exp(-log_odds))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [0.001, 0.999])
def test_removal_is_that_of_records_written_without_the_events(family, threshold, checkpoints):
    question = question_of(checkpoints, family)
    whole = question.log_odds().item()
    places = removable_events(question)
    values = np.zeros(len(question.events))
    values[places] = np.random.default_rng(0).normal(size=len(places))
    sign = 1 if risk(whole) >= threshold else -1
    order = sorted(places.tolist(), key=lambda place: -sign * values[place])
    expected = {"top": [], "rest": []}
    for share in SHARES:
        top = max(1, round(share * len(order)))
        for name, removed in (("top", order[:top]), ("rest", order[top:])):
            expected[name].append(log_odds_without(checkpoints, family, removed))
    found = removal(question, values, threshold=threshold)
    assert found.comprehensiveness == pytest.approx(sign * np.mean(whole - np.array(expected["top"])), abs=1e-4)
    assert found.sufficiency == pytest.approx(sign * np.mean(whole - np.array(expected["rest"])), abs=1e-4)
    lost = sign * np.mean(risk(whole) - risk(np.array(expected["top"])))
    assert found.risk_comprehensiveness == pytest.approx(lost, abs=1e-5)
    assert found.risk_sufficiency == pytest.approx(
        sign * np.mean(risk(whole) - risk(np.array(expected["rest"]))), abs=1e-5
    )


def test_no_single_event_is_more_comprehensive_than_that_of_the_counterfactual(checkpoints):
    for number in range(4):
        question = question_of(checkpoints, "ehrmamba", make_patient(number))
        exact = event_contributions(occlusion(question, "event"), question)
        best = removal(question, exact, shares=(0.001,)).comprehensiveness
        for seed in range(4):
            chance = event_contributions(random_contributions(question, seed=seed), question)
            assert best >= removal(question, chance, shares=(0.001,)).comprehensiveness - 1e-5


def test_marks_of_visits_are_no_events_to_take_out(checkpoints):
    question = question_of(checkpoints, "ehrmamba")
    codes = {question.events[place].code for place in removable_events(question)}
    assert codes
    assert not any(code.startswith(("VISIT_", "MEDS_")) for code in codes)


def test_completeness_is_the_share_that_is_left(checkpoints):
    question = question_of(checkpoints, "ehrmamba")
    told = integrated_gradients(question, nodes=2, tolerance=None)
    total = told.contributions["contribution"].sum()
    whole = told.log_odds - told.baseline
    assert completeness(told) == pytest.approx(abs((whole - total) / whole))
    assert completeness(prefix_deltas(question)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_are_others_and_the_same_by_seed(family, checkpoints):
    checkpoint = checkpoints[family]
    before = torch.get_rng_state()
    one, same, other = (with_random_weights(checkpoint, seed).model.state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    trained = checkpoint.model.state_dict()
    assert one.keys() == trained.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = next(name for name in one if name.endswith(("out_proj.weight", "classifier.weight")))
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], trained[name])


def test_sanity_tells_a_method_that_minds_the_model_from_one_that_does_not(checkpoints):
    question = question_of(checkpoints, "ehrmamba")
    always = integrated_gradients(question, nodes=4)
    assert sanity(question, lambda question: always) == pytest.approx(1.0)
    assert abs(sanity(question, integrated_gradients, nodes=4, tolerance=None)) < 0.9


def test_stability_is_one_where_nothing_is_drawn(checkpoints):
    question = question_of(checkpoints, "ehrmamba")
    settings = {"nodes": 4, "tolerance": None}
    assert stability(question, integrated_gradients, [0, 1], **settings) == pytest.approx(1.0)
    assert stability(question, random_contributions, [0, 1, 2]) < 0.9
    with pytest.raises(ValueError, match="expected at least two"):
        stability(question, random_contributions, [0])


def test_agreement_is_that_of_other_libraries():
    rng = np.random.default_rng(1)
    for _ in range(20):
        values, changes = rng.normal(size=(2, 30)).round(1)
        carries = rng.random(30) < 0.3
        found = agreement(values, carries, changes)
        assert found.auroc == pytest.approx(roc_auc_score(carries, np.abs(values)))
        assert found.spearman == pytest.approx(spearmanr(values, changes).statistic)
    assert np.isnan(agreement(values, np.zeros(30, bool), changes).auroc)
    assert np.isnan(agreement(values, carries).spearman)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contributions": [0.0]}, r"got numbers of shape \[1\]"),
        ({"contributions": np.nan}, "of them not finite"),
        ({"shares": ()}, r"shares got \(\)"),
        ({"shares": (0.1, 1.0)}, "expected numbers between 0 and 1"),
        ({"threshold": 0.0}, r"threshold got \[0.0\]"),
    ],
)
def test_bad_input_is_told(changes, message, checkpoints):
    question = question_of(checkpoints, "ehrmamba")
    given = {"contributions": 0.0, **changes}
    values = given.pop("contributions")
    values = values if isinstance(values, list) else np.full(len(question.events), values)
    with pytest.raises(ValueError, match=message):
        removal(question, values, **given)


def test_contributions_of_groups_are_refused(checkpoints):
    question = question_of(checkpoints, "ehrmamba")
    with pytest.raises(ValueError, match="explain by event"):
        event_contributions(occlusion(question, "visit"), question)


def test_other_lengths_are_refused():
    with pytest.raises(ValueError, match="got 2 and 3 numbers"):
        rank_correlation([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"got numbers of shape \[2\]"):
        agreement([1.0, 2.0], [True, False, True])

"""Relevance, hidden attention, attentions and fusion weights of real questions: named tokens, sums, refusals."""

import math
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import pipeline

import ehrseq.interpretability as interpretability
from ehrseq.hub.checkpoints import load_checkpoint
from ehrseq.interpretability import methods
from ehrseq.interpretability.attention_weights import attentions, fusion_weights
from ehrseq.interpretability.mamba_attention import hidden_attention
from ehrseq.interpretability.questions import read_question
from ehrseq.interpretability.relevance_propagation import relevance
from tests.checkpoints.complete import complete_checkpoint
from tests.checkpoints.patients import LAB, make_patient
from tests.checkpoints.stays import make_stay

FAMILIES = ("ehrmamba", "cehrbert", "ehr_bigbird", "ehr_lstm", "hymate")
TASK = {"hymate": "in_hospital_mortality"}
TOKEN_COLUMNS = ["position", "event", "time", "code", "value", "text", "unit", "visit", "kind", "display"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: complete_checkpoint(family, tmp_path_factory.mktemp(family) / "model") for family in FAMILIES}


@pytest.fixture(scope="module")
def checkpoints(folders: dict[str, Path]):
    return {family: load_checkpoint(folder) for family, folder in folders.items()}


def ask(checkpoints, family, **settings):
    patient = make_stay(101) if family == "hymate" else make_patient(3, seed=1)
    return read_question(checkpoints[family], patient, TASK.get(family, "mortality_30d"), **settings)


def dead_question(checkpoints, family="ehrmamba"):
    patient = make_patient(3, seed=1)
    last = patient["events"][-1]["time"]
    patient["events"].append({"time": last + timedelta(days=1), "code": "MEDS_DEATH"})
    return read_question(checkpoints[family], patient, "mortality_30d", last + timedelta(days=2))


@pytest.mark.parametrize("family", ["ehrmamba", "cehrbert", "ehr_bigbird", "hymate"])
def test_relevance_sums_with_its_remainder_to_the_score_of_the_pipeline(checkpoints, folders, family):
    question = ask(checkpoints, family)
    found = relevance(question)
    answer = pipeline("ehr-risk", model=str(folders[family]), device="cpu")(
        make_stay(101) if family == "hymate" else make_patient(3, seed=1)
    )
    score = next(item["score"] for item in answer if item["task"] == question.task["name"])
    assert math.isclose(found.score, score, abs_tol=1e-6)
    total = found.baseline + found.contributions["contribution"].sum() + found.remainder
    assert math.isclose(total, found.log_odds, abs_tol=1e-9)
    assert math.isclose(1 / (1 + math.exp(-total)), score, abs_tol=1e-6)
    assert found.contributions["position"].to_list() == list(range(question.inputs["times"].shape[1]))
    assert (found.method, found.task) == ("relevance", question.task["name"])
    shift = float(question.log_odds_of(torch.zeros(1, 2)))  # training's, taken back
    assert math.isclose(found.baseline, shift + sum(found.settings.get("beside", {}).values()), abs_tol=1e-6)
    assert ("beside" in found.settings) == (family == "hymate")
    if family != "hymate":
        assert found.contributions["kind"].to_list().count("question") >= 1
        labs = found.contributions.filter(pl.col("code") == LAB)
        assert labs["value"].null_count() == 0
        assert labs.height > 0


def test_contributions_of_relevance_are_those_of_the_numbers(checkpoints):
    question = ask(checkpoints, "ehrmamba")
    numbers = interpretability.token_relevance(question.checkpoint.model, question.inputs)
    given = relevance(question, displays={LAB: "Glucose"})
    np.testing.assert_allclose(given.contributions["contribution"].to_numpy(), numbers.tokens[0].numpy(), atol=1e-7)
    assert set(given.contributions.filter(pl.col("code") == LAB)["display"]) == {"Glucose"}
    assert math.isclose(given.remainder, float(numbers.remainder[0]), abs_tol=1e-5)


def test_half_precision_keeps_the_models_own_score(folders):
    checkpoint = load_checkpoint(folders["ehrmamba"])
    question = read_question(checkpoint, make_patient(3, seed=1), "mortality_30d")
    exact = relevance(question)
    checkpoint.model.to(torch.bfloat16)
    found = relevance(question)
    with torch.no_grad():
        assert math.isclose(found.log_odds, float(question.log_odds()[0]), abs_tol=1e-7)
    scale = exact.contributions["contribution"].abs().max()
    difference = found.contributions["contribution"] - exact.contributions["contribution"]
    assert difference.abs().max() < 0.1 * scale


@pytest.mark.parametrize(("family", "layers"), [("ehrmamba", None), ("hymate", None)])
def test_hidden_attention_names_the_tokens_that_it_weighs(checkpoints, family, layers):
    question = ask(checkpoints, family)
    model, length = question.checkpoint.model, question.inputs["times"].shape[1]
    count = model.config.num_hidden_layers if family == "ehrmamba" else model.config.num_mamba_layers
    found = hidden_attention(question)
    assert found.tokens.columns == TOKEN_COLUMNS
    assert [layer.shape for layer in found.layers] == [(length,)] * count
    assert found.numbers == tuple(range(count))
    assert found.mean.shape == (length,)
    assert found.table()["weight"].min() >= 0
    one = hidden_attention(question, layer=count - 1, matrix=True)
    assert one.numbers == (count - 1,)
    assert one.layers[0].shape == (length, length)
    np.testing.assert_allclose(one.layers[0][-1], found.layers[-1], rtol=1e-4, atol=1e-8)
    with pytest.raises(ValueError, match=rf"layer got {count}; this model has the layers 0 .. {count - 1}"):
        hidden_attention(question, layer=count)
    with pytest.raises(ValueError, match=r"are matrices .* take a row"):
        one.table()


@pytest.mark.parametrize("family", ["cehrbert", "ehr_bigbird", "hymate"])
def test_attentions_have_a_row_and_a_column_for_each_named_token(checkpoints, family):
    question = ask(checkpoints, family)
    found, length = attentions(question), question.inputs["times"].shape[1]
    assert found.tokens.height == length
    assert {layer.shape[1:] for layer in found.layers} == {(length, length)}
    np.testing.assert_allclose(found.mean.sum(-1), 1.0, rtol=1e-5)
    if family != "hymate":
        assert found.tokens["kind"][0] == "question"


def test_fusion_weights_stand_beside_time_code_and_value(checkpoints):
    question = ask(checkpoints, "hymate")
    table = fusion_weights(question).table()
    assert table.columns == [*TOKEN_COLUMNS, "weight"]
    assert math.isclose(table["weight"].sum(), 1.0, rel_tol=1e-6)
    events = make_stay(101)["events"]
    for event, code, value, time in table.select("event", "code", "value", "time").iter_rows():
        assert (events[event]["code"], events[event]["numeric_value"], events[event]["time"]) == (code, value, time)


@pytest.mark.parametrize("method", [relevance, hidden_attention])
def test_a_task_that_does_not_apply_has_a_reason_and_nothing_else(checkpoints, method):
    found = method(dead_question(checkpoints))
    assert found.reason == "died_before_prediction"
    if method is relevance:
        assert found.contributions.height == 0
        assert math.isnan(found.score)
    else:
        assert found.layers == []
        assert found.tokens.height == 0
        with pytest.raises(ValueError, match=r"the task does not apply \(died_before_prediction\)"):
            found.table()
    attentive = attentions(dead_question(checkpoints, "cehrbert"))
    assert (attentive.layers, attentive.reason) == ([], "died_before_prediction")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_the_method_says_who_has_it(checkpoints, family):
    question = ask(checkpoints, family)
    offered = methods.methods_of(family)
    for name, method in (
        ("relevance", relevance),
        ("hidden_attention", hidden_attention),
        ("attentions", attentions),
        ("fusion_weights", fusion_weights),
    ):
        assert methods.METHODS[name].load() is method
        if name in offered:
            method(question)
            continue
        with pytest.raises(ValueError, match=f"'{family}' has no"):
            method(question)
        with pytest.raises(ValueError, match=f"a model of the family '{family}' has"):
            methods.choose_method(family, name)


def nothing_but_birth(checkpoints):
    birth = make_patient(3, seed=1)["events"][:1]
    return read_question(checkpoints["ehrmamba"], {"subject_id": 1, "events": birth}, "mortality_30d")


def unknown_codes(checkpoints):
    patient = make_patient(3, seed=1)
    events = [{**event, "code": f"OTHER//X//{i}"} for i, event in enumerate(patient["events"])]
    return read_question(checkpoints["ehrmamba"], {"subject_id": 1, "events": events}, "mortality_30d")


def cut_record(checkpoints):
    patient = make_patient(3, seed=1)
    return read_question(checkpoints["ehrmamba"], patient, "mortality_30d", max_length=8)


@pytest.mark.parametrize("kind", [nothing_but_birth, unknown_codes, cut_record])
def test_thin_records_are_explained_all_the_same(checkpoints, kind):
    question = kind(checkpoints)
    found, weights = relevance(question), hidden_attention(question)
    assert math.isfinite(found.log_odds)
    assert found.contributions.height == weights.tokens.height == question.inputs["times"].shape[1]
    assert math.isclose(found.baseline + found.total + found.remainder, found.log_odds, abs_tol=1e-9)


def test_nothing_after_the_prediction_time_is_read(checkpoints):
    patient = make_patient(3, seed=1)
    when = patient["events"][len(patient["events"]) // 2]["time"]
    whole = read_question(checkpoints["ehrmamba"], patient, "mortality_30d", when)
    known = [event for event in patient["events"] if event["time"] <= when]
    cut = read_question(checkpoints["ehrmamba"], {**patient, "events": known}, "mortality_30d", when)
    assert relevance(whole).contributions.equals(relevance(cut).contributions)
    assert hidden_attention(whole).table().equals(hidden_attention(cut).table())


def test_padding_in_a_questions_row_is_no_token(checkpoints):
    question = ask(checkpoints, "cehrbert")
    length = question.inputs["times"].shape[1]
    inputs = {name: torch.nn.functional.pad(channel, (0, 3)) for name, channel in question.inputs.items()}
    inputs["attention_mask"] = (torch.arange(length + 3) < length).long()[None]
    places = {name: np.pad(getattr(question, name), (0, 3)) for name in ("event_of", "visit_of")}
    padded = replace(question, inputs=inputs, **places)
    assert attentions(padded).tokens.height == length
    np.testing.assert_allclose(attentions(padded).mean, attentions(question).mean, atol=1e-6)


def test_functions_are_no_modules_of_the_same_name():
    for name in ("relevance", "hidden_attention", "attentions", "fusion_weights", "scan_attention"):
        assert callable(getattr(interpretability, name))

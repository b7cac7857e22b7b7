"""Explanations: the table of contributions, their sums by hand, and what methods there are."""

import math
from datetime import datetime

import numpy as np
import polars as pl
import pytest

from ehrseq.interpretability import Attribution, Explanation, Question, explain, methods_of, read_question
from ehrseq.interpretability import methods as methods_module
from ehrseq.interpretability.explanation import CONTRIBUTION_SCHEMA, Places
from ehrseq.interpretability.methods import METHODS, default_method
from ehrseq.pipelines import risk_explanations
from tests.interpretability.asked import FAMILIES, checkpoint_of, patient_of, task_of

START = datetime(2150, 1, 31, 22)
RECORD = {
    "subject_id": 7,
    "events": [
        {"time": START, "code": "DIAGNOSIS//ICD10CM//E11", "visit_id": "a"},
        {"time": START, "code": "LAB//LOINC//2345-7", "numeric_value": 100.0, "unit": "mg/dL", "visit_id": "a"},
        {"time": datetime(2150, 2, 1, 3), "code": "LAB//LOINC//2345-7", "numeric_value": 90.0, "unit": "mg/dL"},
        {"time": datetime(2150, 2, 3), "code": "DIAGNOSIS//ICD10CM//I50", "visit_id": "b"},
    ],
}
# [task] [VS] E11 LAB [VE] [REG] [W_0] [VS] LAB [VE] [REG] [W_0] [VS] I50 [VE] [task]
VALUES = np.array([0.5, 0.25, 1.0, 2.0, 0, 0, 0, 0, -4.0, 0, 0, 0, 0, 8.0, 0, -0.5])
NAMED = {"method": "by_hand", "baseline_name": "nothing"}


@pytest.fixture(scope="module")
def question() -> Question:
    return read_question(checkpoint_of("ehrmamba"), RECORD, "mortality_30d")


@pytest.fixture(scope="module")
def explanation(question: Question) -> Explanation:
    displays = {"DIAGNOSIS//ICD10CM//I50": "Heart failure"}
    return Explanation.of(question, Attribution(VALUES, 2.0, -5.0), displays=displays, settings={"seed": 3}, **NAMED)


def test_every_token_has_its_event_time_value_and_kind(explanation: Explanation) -> None:
    table = explanation.contributions
    assert dict(table.schema) == CONTRIBUTION_SCHEMA
    assert table["position"].to_list() == list(range(16))
    assert table["event"].to_list() == [None, None, 0, 1, *[None] * 4, 2, *[None] * 4, 3, None, None]
    assert table["code"].to_list() == [
        *("[MOR_1M]", "[VS]", "DIAGNOSIS//ICD10CM//E11", "LAB//LOINC//2345-7", "[VE]", "[REG]", "[W_0]"),
        *(
            "[VS]",
            "LAB//LOINC//2345-7",
            "[VE]",
            "[REG]",
            "[W_0]",
            "[VS]",
            "DIAGNOSIS//ICD10CM//I50",
            "[VE]",
            "[MOR_1M]",
        ),
    ]
    lab = table.row(3, named=True)
    assert (lab["time"], lab["value"], lab["unit"], lab["visit"], lab["kind"]) == (START, 100.0, "mg/dL", 1, "lab")
    assert (lab["contribution"], lab["group"], lab["score_after"], lab["display"]) == (2.0, None, None, None)
    assert table["kind"].to_list() == [
        *("question", "structure", "diagnosis", "lab", *["structure"] * 4, "lab", *["structure"] * 4, "diagnosis"),
        *("structure", "question"),
    ]
    assert table["visit"].to_list() == [None, *[1] * 6, *[2] * 5, *[3] * 4]
    assert table["display"][13] == "Heart failure"


def test_baseline_contributions_and_remainder_are_the_log_odds(explanation: Explanation) -> None:
    assert explanation.total == 7.25
    assert explanation.remainder == pytest.approx(2.0 + 5.0 - 7.25)
    assert explanation.score == pytest.approx(1 / (1 + math.exp(-2)))
    assert Attribution(VALUES, 2.0, -5.0).remainder == explanation.remainder
    assert explanation.settings == {"seed": 3}
    assert (explanation.task, explanation.label) == ("mortality_30d", "death within 30 days")
    assert explanation.prediction_time == datetime(2150, 2, 3)
    assert explanation.subject_id == 7


def test_sums(explanation: Explanation) -> None:
    by_code = explanation.by("code")
    assert by_code["code"].to_list()[:3] == ["DIAGNOSIS//ICD10CM//I50", "LAB//LOINC//2345-7", "DIAGNOSIS//ICD10CM//E11"]
    assert by_code["contribution"].to_list()[:3] == [8.0, -2.0, 1.0]
    assert by_code["events"].to_list()[:3] == [1, 2, 1]
    assert by_code["display"][0] == "Heart failure"
    parents = dict(explanation.by("parent").select("parent", "contribution").iter_rows())
    assert parents["DIAGNOSIS//ICD10CM//I00-I99"] == 8.0
    assert parents["DIAGNOSIS//ICD10CM//E00-E99"] == 1.0
    assert parents["LAB//LOINC//2345-7"] == -2.0
    assert dict(explanation.by("visit").select("visit", "contribution").iter_rows()) == {
        1: 3.25,
        2: -4,
        3: 7.5,
        None: 0.5,
    }
    kinds = dict(explanation.by("kind").select("kind", "contribution").iter_rows())
    assert kinds == {"diagnosis": 9.0, "lab": -2.0, "structure": 0.25, "question": 0.0}
    days = dict(explanation.by("day").select("day", "contribution").iter_rows())
    assert days == {datetime(2150, 1, 31): 3.0, datetime(2150, 2, 1): -4.0, datetime(2150, 2, 3): 8.0, None: 0.25}
    months = dict(explanation.by("month").select("month", "contribution").iter_rows())
    assert months == {datetime(2150, 1, 1): 3.0, datetime(2150, 2, 1): 4.0, None: 0.25}
    events = explanation.by("event")
    assert events["contribution"].to_list()[:4] == [8.0, -4.0, 2.0, 1.0]
    assert events["event"].to_list()[:4] == [3, 2, 1, 0]
    for what in ("event", "code", "parent", "visit", "kind", "day", "month"):
        assert explanation.by(what)["contribution"].sum() == explanation.total
    assert explanation.top(2)["contribution"].to_list() == [8.0, -4.0]
    with pytest.raises(ValueError, match="by got 'year'; expected one of"):
        explanation.by("year")


def test_another_spelling_of_a_code_is_no_parent(question: Question) -> None:
    record = {"events": [{"time": START, "code": "DIAGNOSIS//ICD10CM//E87.1"}]}
    asked = read_question(checkpoint_of("ehrmamba"), record, "mortality_30d")
    values = np.ones(len(asked.event_of))
    parents = Explanation.of(asked, Attribution(values, 0.0, 0.0), **NAMED).by("parent")["parent"]
    assert "DIAGNOSIS//ICD10CM//E87" in parents.to_list()


def test_records_are_what_the_pipeline_gives(explanation: Explanation) -> None:
    records = explanation.to_records()
    assert records[3] == {
        "time": "2150-01-31T22:00:00",
        "code": "LAB//LOINC//2345-7",
        "value": 100.0,
        "contribution": 2.0,
    }
    assert records[1] == {"time": None, "code": "[VS]", "value": None, "contribution": 0.25}


def test_groups_have_names_and_no_parts(question: Question) -> None:
    places = Places.of_groups(["labs", "the rest"], times=[0, np.iinfo(np.int64).min])
    grouped = Explanation.of(question, Attribution(np.array([1.0, 2.0]), 4.0, 0.0), places=places, **NAMED)
    table = grouped.contributions
    assert table["group"].to_list() == ["labs", "the rest"]
    assert table["kind"].to_list() == ["group", "group"]
    assert table["time"].to_list() == [datetime(1970, 1, 1), None]
    assert table.select(pl.col("position", "event", "code", "visit").is_null().all()).row(0) == (True,) * 4
    assert grouped.remainder == 1.0
    assert grouped.to_records()[1] == {
        "time": None,
        "code": None,
        "value": None,
        "contribution": 2.0,
        "group": "the rest",
    }
    with pytest.raises(ValueError, match="these contributions are of groups"):
        grouped.by("code")


def test_values_of_something_else_are_refused(question: Question) -> None:
    with pytest.raises(ValueError, match=r"by_hand gave values of shape \[3\]; expected \[16\]"):
        Explanation.of(question, Attribution(np.zeros(3), 0.0, 0.0), **NAMED)


def test_without_an_answer_there_are_no_contributions(question: Question) -> None:
    empty = Explanation.of(question, None, **NAMED)
    assert math.isnan(empty.score)
    assert empty.total == 0.0
    assert empty.to_records() == []
    assert empty.by("code").is_empty()


def test_what_is_certain_does_not_overflow(question: Question) -> None:
    for log_odds, score in ((-800.0, 0.0), (800.0, 1.0)):
        assert Explanation.of(question, Attribution(VALUES, log_odds, 0.0), **NAMED).score == score


# -- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_methods(family: str) -> None:
    assert methods_of(family) == methods_of(checkpoint_of(family).model)
    assert default_method(family) in methods_of(family)
    assert {"prefix_deltas", "occlusion", "integrated_gradients"} <= set(methods_of(family))
    assert ("hidden_attention" in methods_of(family)) == (family in ("ehrmamba", "hymate"))
    assert ("fusion_weights" in methods_of(family)) == (family == "hymate")
    assert all(set(method.families) <= set(FAMILIES) and method.summary for method in METHODS.values())


def test_by_default_ehrmamba_is_explained_by_prefix_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_method("ehrmamba") == "prefix_deltas"
    for installed, expected in ((None, "prefix_deltas"), (object(), "integrated_gradients")):
        monkeypatch.setattr(methods_module, "find_spec", lambda name, there=installed: there)
        assert default_method("hymate") == expected
        assert default_method("ehrmamba") == "prefix_deltas"


def test_explain_is_the_method_by_its_name() -> None:
    patient = patient_of("ehrmamba")
    explanation = explain(checkpoint_of("ehrmamba"), patient, task_of("ehrmamba"), by="day")
    assert explanation.method == "prefix_deltas"
    assert explanation.settings == {"by": "day"}
    time = patient["events"][4]["time"]
    early = explain(checkpoint_of("ehrmamba"), patient, task_of("ehrmamba"), "prefix_deltas", time, 16)
    assert early.prediction_time == time


def test_a_method_that_the_model_lacks_is_refused_with_those_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"method got 'attentions'; .*'ehrmamba' has \['prefix_deltas', "):
        explain(checkpoint_of("ehrmamba"), patient_of("ehrmamba"), task_of("ehrmamba"), "attentions")
    with pytest.raises(ValueError, match=r"method got 'lime'; .*'ehr_lstm' has \['prefix_deltas', "):
        explain(checkpoint_of("ehr_lstm"), patient_of("ehr_lstm"), task_of("ehr_lstm"), "lime")
    monkeypatch.setattr(methods_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'captum, which is not installed: pip install "ehrseq\[explain\]"'):
        explain(checkpoint_of("hymate"), patient_of("hymate"), task_of("hymate"), "integrated_gradients")


def test_what_the_checkpoint_carries_is_what_the_package_says() -> None:
    """The pipeline's own copy of two facts, since it runs without the package too."""
    from ehrseq.interpretability.explanation import TOLD_REMAINDER

    assert risk_explanations.TRAVELLING_METHOD in METHODS
    assert risk_explanations.TOLD_FROM == TOLD_REMAINDER

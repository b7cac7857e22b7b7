"""Occlusion: every contribution is the difference to the reduced patient, read and scored from scratch."""

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import pipeline

from ehrseq.hub.checkpoints import Checkpoint, load_checkpoint
from ehrseq.interpretability.counterfactuals import occlusion
from ehrseq.interpretability.questions import read_question
from tests.checkpoints.patients import make_patient
from tests.checkpoints.stays import make_stay

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
EVENT_FAMILIES = ("ehrmamba", "ehr_lstm", "cehrbert", "ehr_bigbird")
END = "VISIT_END//HOME"
LATER = datetime(2152, 6, 1)


@pytest.fixture(scope="module", params=EVENT_FAMILIES)
def checkpoint(request):
    """A committed checkpoint of each family of events, in float64."""
    model, encoder = load_checkpoint(CHECKPOINTS / request.param)
    return Checkpoint(model.double(), encoder)


@pytest.fixture(scope="module")
def mamba():
    model, encoder = load_checkpoint(CHECKPOINTS / "ehrmamba")
    return Checkpoint(model.double(), encoder)


@pytest.fixture(scope="module")
def hymate():
    model, encoder = load_checkpoint(CHECKPOINTS / "hymate")
    return Checkpoint(model.double(), encoder)


def patient():
    """Three admissions, with a static fact."""
    made = next(
        made for made in map(make_patient, range(100)) if len({event.get("visit_id") for event in made["events"]}) == 4
    )
    return {**made, "events": [*made["events"], {"time": None, "code": "GENDER//F"}]}


def without(record, places):
    return {**record, "events": [event for place, event in enumerate(record["events"]) if place not in places]}


def log_odds_of(checkpoint, record, task, at=None):
    """From scratch: the tokenizer's own rows, the model's own forward."""
    model, encoder = checkpoint
    if "attention_mask" not in encoder.model_input_names or "static_values" in encoder.model_input_names:
        rows = encoder(record, prediction_time=at, return_tensors="pt")
    else:
        limit = model.config.max_position_embeddings
        rows = encoder(record, task=task, prediction_time=at, max_length=limit, return_tensors="pt")
    number = [entry["name"] for entry in model.config.tasks].index(task)
    with torch.no_grad():
        logits = model(**{name: rows[name] for name in rows}).logits
        return float(model.log_odds(logits, torch.tensor([number]))[0])


def assert_exact(checkpoint, record, explanation, members, task, at=None):
    """Every group's contribution, and what the contributions start from."""
    whole = log_odds_of(checkpoint, record, task, at)
    assert explanation.log_odds == pytest.approx(whole, abs=1e-6)
    found = explanation.contributions
    assert found.height == len(members)
    for contribution, places in zip(found["contribution"], members, strict=True):
        reduced = log_odds_of(checkpoint, without(record, set(places)), task, at)
        assert contribution == pytest.approx(whole - reduced, abs=1e-5)
    total = explanation.baseline + explanation.total + explanation.remainder
    assert total == pytest.approx(explanation.log_odds, abs=1e-9)


def members_of(record, explanation, groups):
    """Events of each group of the answer, told from the record alone."""
    events = record["events"]
    seen = [k for k, event in enumerate(events) if event["code"] != "MEDS_BIRTH"]
    if groups == "event":
        return [[k] for k in explanation.contributions["event"]]
    keys = {}
    for k in seen:
        event, time = events[k], events[k]["time"]
        if groups == "code":
            key = event["code"]
        elif groups == "month":
            key = "static facts" if time is None else f"{time:%Y-%m}"
        elif groups == "visit":
            key = event.get("visit_id") or "static facts"
        else:
            continue
        keys.setdefault(key, []).append(k)
    if groups == "visit":
        visits = sorted(key for key in keys if key != "static facts")
        keys = {f"visit {visits.index(key) + 1}" if key in visits else key: places for key, places in keys.items()}
    return [keys[name] for name in explanation.contributions["group"]]


@pytest.mark.parametrize("groups", ["visit", "code", "month", "event"])
def test_every_contribution_is_the_difference_to_the_reduced_patient(checkpoint, groups):
    record, task = patient(), "mortality_30d"
    explanation = occlusion(read_question(checkpoint, record, task, LATER), groups, batch_size=3)
    assert_exact(checkpoint, record, explanation, members_of(record, explanation, groups), task, LATER)
    assert explanation.contributions["contribution"].abs().max() > 1e-3


def test_kinds_and_parents_are_groups_of_codes(mamba):
    record, task = patient(), "mortality_30d"
    question = read_question(mamba, record, task, LATER)
    for groups in ("kind", "parent"):
        names = occlusion(question, groups).contributions["group"].to_list()
        assert len(names) == len(set(names)) > 2
    kinds = occlusion(question, "kind").contributions
    labs = [k for k, event in enumerate(record["events"]) if event["code"].startswith("LAB//")]
    found = kinds.filter(pl.col("group") == "lab")["contribution"].item()
    whole = log_odds_of(mamba, record, task, LATER)
    assert found == pytest.approx(whole - log_odds_of(mamba, without(record, labs), task, LATER), abs=1e-6)


def test_the_pipeline_gives_the_same(mamba):
    """With the released weights as they are: single precision."""
    model, encoder = load_checkpoint(CHECKPOINTS / "ehrmamba")
    ask = pipeline("ehr-risk", model=model, tokenizer=encoder)
    record, task = {**patient(), "prediction_time": LATER}, "mortality_30d"
    explanation = occlusion(read_question(Checkpoint(model, encoder), record, task), "visit")
    events = record["events"]
    for visit, contribution in explanation.contributions.select("visit", "contribution").drop_nulls().iter_rows():
        ids = sorted({event["visit_id"] for event in events if event.get("visit_id")})
        places = {k for k, event in enumerate(events) if event.get("visit_id") == ids[visit - 1]}
        scores = [
            next(answer["score"] for answer in ask(one, tasks=[task]) if answer["task"] == task)
            for one in (record, without(record, places))
        ]
        odds = [np.log(score) - np.log1p(-score) for score in scores]
        assert contribution == pytest.approx(odds[0] - odds[1], abs=1e-4)


def test_without_a_prediction_time_the_question_stays_where_it_was(mamba):
    """Taking the last events out makes nobody ask earlier."""
    record, task = patient(), "mortality_30d"
    last = max(event["time"] for event in record["events"] if event["time"])
    explanation = occlusion(read_question(mamba, record, task), "event")
    assert_exact(mamba, record, explanation, members_of(record, explanation, "event"), task, last)


def test_own_groups_may_overlap_and_name_what_is_not_seen(mamba):
    record, task = patient(), "mortality_30d"
    birth = next(k for k, event in enumerate(record["events"]) if event["code"] == "MEDS_BIRTH")
    groups = {"some": [2, 3, 4], "others": [4, 5], "birth": [birth]}
    explanation = occlusion(read_question(mamba, record, task, LATER), groups)
    assert explanation.contributions["group"].to_list() == list(groups)
    assert explanation.notes["events of the groups that the model has not seen"] == 1
    assert explanation.contributions["contribution"][2] == 0.0
    assert_exact(mamba, record, explanation, [[2, 3, 4], [4, 5], []], task, LATER)
    assert explanation.baseline == pytest.approx(
        log_odds_of(mamba, without(record, {2, 3, 4, 5}), task, LATER), abs=1e-6
    )


def test_two_groups_that_say_the_same_leave_a_remainder(mamba):
    """What is said is told: contributions of single groups do not sum to that of both."""
    question = read_question(mamba, patient(), "mortality_30d", LATER)
    single = occlusion(question, "visit")
    together = occlusion(question, {"all": np.flatnonzero(question.seen).tolist()})
    assert single.baseline == pytest.approx(together.baseline, abs=1e-9)
    assert together.remainder == pytest.approx(0.0, abs=1e-9)
    assert single.remainder == pytest.approx(together.total - single.total, abs=1e-9)


def long_record(count=120):
    """A long record of one visit a week, whose rows are cut to a context of 64."""
    start, events = datetime(2150, 1, 1), []
    for number in range(count):
        visit, time = f"v{number // 4}", start + timedelta(days=7 * (number // 4), hours=number % 4)
        if number % 4 == 0:
            events.append({"time": time, "code": "VISIT_START//IMP", "visit_id": visit})
        code = ("DIAGNOSIS//ICD10CM//I50", "DIAGNOSIS//ICD10CM//E11", "MEDICATION//RXNORM//860975")[number % 3]
        events.append({"time": time + timedelta(minutes=5), "code": code, "visit_id": visit})
        if number % 4 == 3:
            events.append({"time": time + timedelta(hours=1), "code": END, "visit_id": visit})
    return {"subject_id": 1, "events": events}


@pytest.mark.parametrize("context", [40, 41, 42, 43, 44])
def test_nothing_from_before_the_context_comes_in(mamba, context):
    """The reduced record is read whole, and its row is what lies behind the same event."""
    record, task = long_record(), "mortality_30d"
    question = read_question(mamba, record, task, max_length=context)
    assert question.notes["events before the context, not seen"] > 0
    first = int(np.flatnonzero(question.seen)[0])
    explanation = occlusion(question, "event")
    assert explanation.log_odds == pytest.approx(question.log_odds()[0].item(), abs=1e-9)
    encoder = mamba.encoder
    for place, contribution in explanation.contributions.select("event", "contribution").iter_rows():
        assert place >= first
        seen = question.rows.row_without(0, np.arange(len(question.events)) == place)
        gone = {place}
        if record["events"][place]["code"] == "VISIT_START//IMP":  # an end of nothing takes no part
            gone.add(next(k for k in range(place, len(record["events"])) if record["events"][k]["code"] == END))
        codes = encoder.convert_ids_to_tokens(seen["input_ids"].tolist())
        expected = [event["code"] for k, event in enumerate(record["events"]) if k >= first and k not in gone]
        assert [code for code in codes if not code.startswith("[")] == expected
        with torch.no_grad():
            inputs = {name: torch.as_tensor(channel)[None] for name, channel in seen.items()}
            reference = float(question.log_odds(inputs)[0])
        assert contribution == pytest.approx(explanation.log_odds - reference, abs=1e-9)


def test_the_row_without_nothing_is_the_row(mamba, checkpoint):
    for record, context in ((patient(), None), (long_record(), 40), (long_record(), 43)):
        question = read_question(checkpoint, record, "mortality_30d", max_length=context)
        row = question.rows.row_without(0, np.zeros(len(question.events), bool), context)
        for name, channel in row.items():
            np.testing.assert_array_equal(channel, question.inputs[name][0].numpy())


def test_ehrmamba_reads_only_what_comes_after_the_first_event_taken_out(mamba):
    record, task = patient(), "mortality_30d"
    question = read_question(mamba, record, task, LATER)
    explanation = occlusion(question, "event", batch_size=4)
    length, rows = len(question.event_of), question.rows
    tokens = length  # the record once
    everything = question.seen.copy()
    for removed in [np.arange(len(question.events)) == k for k in explanation.contributions["event"]] + [everything]:
        row = rows.row_without(0, removed)
        if len(row["input_ids"]) == length and all(
            np.array_equal(row[name], question.inputs[name][0].numpy()) for name in row
        ):
            continue
        whole = {name: channel[0].numpy() for name, channel in question.inputs.items()}
        shortest = min(length, len(row["input_ids"]))
        differs = np.flatnonzero([any(row[name][k] != whole[name][k] for name in row) for k in range(shortest)])
        common = int(differs[0]) if len(differs) else shortest
        tokens += len(row["input_ids"]) - min(common, len(row["input_ids"]) - 1)
    assert tokens <= explanation.settings["tokens"] <= tokens + 2 * explanation.contributions.height
    assert explanation.settings["tokens"] < 0.7 * length * (explanation.contributions.height + 2)


def test_single_tokens_and_many_in_a_batch_give_the_same(mamba):
    question = read_question(mamba, patient(), "mortality_30d", LATER)
    one, many = occlusion(question, "event", batch_size=1), occlusion(question, "event", batch_size=64)
    np.testing.assert_allclose(one.contributions["contribution"], many.contributions["contribution"], atol=1e-9)


@pytest.mark.parametrize("groups", ["code", "event", "kind"])
def test_stays_are_read_again_without_some_triplets(hymate, groups):
    record, task = make_stay(7), "in_hospital_mortality"
    explanation = occlusion(read_question(hymate, record, task), groups)
    events = record["events"]
    values = [k for k, event in enumerate(events) if "numeric_value" in event]
    last = max(event["time"] for event in events if event["time"])
    whole = log_odds_of(hymate, record, task)
    for name, event, contribution in explanation.contributions.select("group", "event", "contribution").iter_rows():
        places = [event] if groups == "event" else [k for k in values if name in (events[k]["code"], "lab", "vital")]
        if groups == "kind":
            places = [k for k in values if events[k]["code"].startswith(name.upper())]
        reduced = log_odds_of(hymate, without(record, set(places)), task, last)
        assert contribution == pytest.approx(whole - reduced, abs=1e-5)
    first = min(values, key=lambda k: events[k]["time"])
    alone = log_odds_of(hymate, without(record, set(values) - {first}), task, last)
    assert explanation.baseline == pytest.approx(alone, abs=1e-5)


def test_a_stay_without_a_triplet_is_none(hymate):
    question = read_question(hymate, make_stay(7), "in_hospital_mortality")
    explanation = occlusion(question, {"all": np.flatnonzero(question.seen).tolist(), "one": [1]})
    assert explanation.contributions["group"].to_list() == ["one"]
    assert explanation.notes["groups without which nothing is left to read, not measured"] == 1


def test_bare_triplets_have_no_dates(hymate):
    stay = {"times": [0.0, 60.0, 90.0], "variables": ["heart rate"] * 3, "values": [80.0, 90.0, 130.0]}
    names = hymate.encoder.variables
    stay["variables"] = [names[0]] * 3
    question = read_question(hymate, stay, "in_hospital_mortality")
    explanation = occlusion(question, "event")
    whole = log_odds_of(hymate, stay, "in_hospital_mortality")
    for event, contribution in explanation.contributions.select("event", "contribution").iter_rows():
        reduced = {name: [value for k, value in enumerate(column) if k != event] for name, column in stay.items()}
        assert contribution == pytest.approx(whole - log_odds_of(hymate, reduced, "in_hospital_mortality"), abs=1e-6)
    with pytest.raises(ValueError, match="needs dates"):
        occlusion(question, "month")


@pytest.mark.parametrize("context", [3, 5])
def test_a_stay_that_is_cut_gets_none_of_its_older_triplets_back(hymate, context):
    record = make_stay(7)
    question = read_question(hymate, record, "in_hospital_mortality", max_length=context)
    explanation = occlusion(question, "event")
    values = sorted(np.flatnonzero(question.seen).tolist())
    assert len(values) == context
    others = {k for k, event in enumerate(record["events"]) if "numeric_value" in event} - set(values)
    assert question.notes["events before the context, not seen"] == len(others)
    for event, contribution in explanation.contributions.select("event", "contribution").iter_rows():
        kept = [k for k in values if k != event]
        row = question.rows.row_without(0, np.arange(len(question.events)) == event)
        assert len(row["times"]) == len(kept)
        with torch.no_grad():
            inputs = {name: torch.as_tensor(channel)[None] for name, channel in row.items()}
            reference = question.log_odds(inputs).item()
        assert contribution == pytest.approx(explanation.log_odds - reference, abs=1e-9)


def test_static_facts_that_the_context_has_no_room_for_stay_out(mamba):
    record = long_record(20)
    facts = [{"time": None, "code": "GENDER//F"}, {"time": None, "code": "DIAGNOSIS//ICD10CM//I50"}]
    record["events"] = [*record["events"], *facts * 4]
    question = read_question(mamba, record, "mortality_30d", max_length=20)
    assert not question.seen[-8:].any()
    row = question.rows.row_without(0, np.arange(len(question.events)) == np.flatnonzero(question.seen)[-1], 20)
    assert len(row["input_ids"]) < 20
    assert (row["token_type_ids"][1:3] == question.inputs["token_type_ids"][0, 1:3].numpy()).all()


def test_half_precision_is_worked_out_in_single(mamba):
    model, encoder = load_checkpoint(CHECKPOINTS / "ehrmamba")
    half = Checkpoint(model.bfloat16(), encoder)
    rough = occlusion(read_question(half, patient(), "mortality_30d", LATER), "visit").contributions["contribution"]
    fine = occlusion(read_question(mamba, patient(), "mortality_30d", LATER), "visit").contributions["contribution"]
    np.testing.assert_allclose(rough, fine, atol=0.1 * fine.abs().max() + 0.05)


def test_visits_of_a_record_that_is_cut_are_those_of_the_row(mamba):
    question = read_question(mamba, long_record(), "mortality_30d", max_length=40)
    contributions = occlusion(question, "visit").contributions
    assert contributions["visit"].to_list() == sorted(set(question.visit_of[question.visit_of > 0].tolist()))
    last = contributions.row(-1, named=True)
    places = [k for k, event in enumerate(question.events) if event.visit_id == "v29"]
    row = question.rows.row_without(0, np.isin(np.arange(len(question.events)), places))
    with torch.no_grad():
        inputs = {name: torch.as_tensor(channel)[None] for name, channel in row.items()}
        expected = question.log_odds().item() - question.log_odds(inputs).item()
    assert last["contribution"] == pytest.approx(expected, abs=1e-9)


def test_a_visit_without_its_start_falls_apart_and_still_fits(mamba):
    """Taking a start out can make the row longer: it is cut to the context again, from the left."""
    start = datetime(2150, 1, 1)
    events = [{"time": start, "code": "VISIT_START//IMP", "visit_id": "v"}]
    events += [{"time": start + timedelta(days=day), "code": "DIAGNOSIS//ICD10CM//I50"} for day in range(20)]
    events += [{"time": start + timedelta(days=20), "code": "VISIT_END//HOME", "visit_id": "v"}]
    question = read_question(mamba, {"subject_id": 1, "events": events}, "mortality_30d")
    length, context = len(question.event_of), mamba.model.config.max_position_embeddings
    row = question.rows.row_without(0, np.arange(len(events)) == 0, context)
    assert length < context
    assert length < len(row["input_ids"]) <= context
    explanation = occlusion(question, "event")
    reduced = log_odds_of(mamba, {"subject_id": 1, "events": events[1:]}, "mortality_30d", events[-1]["time"])
    first = explanation.contributions.filter(pl.col("event") == 0)["contribution"].item()
    assert first == pytest.approx(explanation.log_odds - reduced, abs=1e-6)


def test_a_question_without_answer_has_its_reason_and_nothing_else(mamba):
    record = patient()
    died = {**record, "events": [*record["events"], {"time": datetime(2152, 1, 1), "code": "MEDS_DEATH"}]}
    explanation = occlusion(read_question(mamba, died, "mortality_30d", LATER))
    assert explanation.reason
    assert np.isnan(explanation.score)
    assert explanation.contributions.is_empty()


def test_a_record_without_a_timed_event(mamba):
    record = {"subject_id": 1, "events": [{"time": None, "code": "GENDER//F"}]}
    explanation = occlusion(read_question(mamba, record, "mortality_30d", LATER))
    assert explanation.contributions["group"].to_list() == ["static facts"]
    nothing = occlusion(
        read_question(mamba, {"subject_id": 1, "events": [{"time": LATER, "code": "MEDS_BIRTH"}]}, "mortality_30d")
    )
    assert nothing.contributions.is_empty()
    assert np.isfinite(nothing.score)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": "day"}, "expected one of \\['visit'"),
        ({"groups": 3}, "groups got 3"),
        ({"groups": {}}, "got no group"),
        ({"groups": {"a": []}}, "at least one"),
        ({"groups": {"a": [10_000]}}, "positions of events"),
        ({"groups": {"a": [-1]}}, "positions of events"),
        ({"groups": {"a": [0.5]}}, "positions of events"),
        ({"groups": {"a": "bc"}}, "positions of events"),
        ({"batch_size": 0}, "batch_size got 0"),
        ({"batch_size": True}, "batch_size got True"),
        ({"groups": "event", "max_tokens": 10}, "at most 10 are allowed"),
    ],
)
def test_bad_input(mamba, options, message):
    with pytest.raises(ValueError, match=message):
        occlusion(read_question(mamba, patient(), "mortality_30d", LATER), **options)


def test_stays_have_no_visits(hymate):
    with pytest.raises(ValueError, match="needs visits"):
        occlusion(read_question(hymate, make_stay(7), "in_hospital_mortality"), "visit")


def test_stays_are_taken_apart_by_code_where_nobody_says_how(hymate):
    question = read_question(hymate, make_stay(7), "in_hospital_mortality")
    assert occlusion(question).contributions.equals(occlusion(question, "code").contributions)

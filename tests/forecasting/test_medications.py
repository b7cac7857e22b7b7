"""Next medications: questions and measures by hand, a line that is scikit-learn's, futures of a model that is known."""

from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from ehrseq.data.schema import validate_events
from ehrseq.forecasting.medication_models import drug_outcomes, line_scores, trajectory_scores
from ehrseq.forecasting.medications import (
    MedicationQuestions,
    assess_medications,
    best_jaccard_threshold,
    frequency_scores,
    jaccard,
    last_visit_scores,
    medication_questions,
    question_records,
    recall_at,
    visit_precision,
)
from ehrseq.modeling.ehr_trajectories import PatientTrajectories
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

DAY = [datetime(2020, 1, 1) + timedelta(days=day) for day in range(60)]
A, B, C, D = (f"MEDICATION//RXNORM//{name}" for name in "ABCD")
DIAGNOSIS = "DIAGNOSIS//ICD10CM//I10"


def visit(subject, number, start, rows, end=2):
    """A visit of two days: its start, rows (hours, code), its end."""
    name = f"{subject}-{number}"
    events = [(DAY[start], "VISIT_START//IMP"), *((DAY[start] + timedelta(hours=at), code) for at, code in rows)]
    if end is not None:
        events.append((DAY[start + end], "VISIT_END//home"))
    return [{"subject_id": subject, "time": at, "code": code, "visit_id": name} for at, code in events]


# patient 1: three visits; 2: one, then a drug outside of any; 3: held out, two visits, the last without an end
EVENTS = validate_events(
    pl.DataFrame(
        [
            {"subject_id": 1, "time": None, "code": "GENDER//F", "visit_id": None},
            *visit(1, 1, 0, [(1, A), (2, B), (40, DIAGNOSIS)]),
            *visit(1, 2, 10, [(1, DIAGNOSIS)]),
            *visit(1, 3, 20, [(1, DIAGNOSIS), (2, B), (3, C), (3, DIAGNOSIS)]),
            *visit(2, 1, 0, [(0, A)]),
            {"subject_id": 2, "time": DAY[30], "code": B, "visit_id": None},
            *visit(3, 1, 0, [(5, A), (5, D)]),
            *visit(3, 2, 5, [(5, A), (6, C)], end=None),
        ]
    )
)
SPLITS = pl.DataFrame({"subject_id": [1, 2, 3], "split": ["train", "train", "held_out"]})


@pytest.fixture(scope="module")
def questions():
    return medication_questions(EVENTS, SPLITS)


def test_questions_are_the_visits_with_drugs(questions):
    columns = questions.table.select("subject_id", "number", "start", "first_drug", "split")
    hour = timedelta(hours=1)
    assert columns.rows() == [
        (1, 1, DAY[0], DAY[0] + hour, "train"),
        (1, 3, DAY[20], DAY[20] + 2 * hour, "train"),
        (2, 1, DAY[0], DAY[0], "train"),
        (3, 1, DAY[0], DAY[0] + 5 * hour, "held_out"),
        (3, 2, DAY[5], DAY[5] + 5 * hour, "held_out"),
    ]
    assert questions.codes == [A, B, C]
    assert questions.given.astype(int).tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert questions.unknown.tolist() == [0, 0, 0, 1, 0]  # D, which no training visit holds
    assert questions.before.astype(int).tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert questions.last.astype(int).tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert questions.notes["visits in which no drug is given"] == 1
    assert questions.notes["drugs given outside of every visit"] == 1
    assert questions.notes["encounters without an end, which end at their last row"] == 1


def test_visits_that_overlap_are_one():
    inner = [{"subject_id": 1, "time": DAY[1], "code": "VISIT_START//ICU", "visit_id": "icu"}]
    inner += [{"subject_id": 1, "time": DAY[4], "code": "VISIT_END//ICU", "visit_id": "icu"}]
    drug = [{"subject_id": 1, "time": DAY[3], "code": A, "visit_id": None}]
    events = validate_events(pl.DataFrame([*visit(1, 1, 0, []), *inner, *drug]).sort("time"))
    found = medication_questions(events, SPLITS)
    assert found.table.select("start", "end").rows() == [(DAY[0], DAY[4])]


@pytest.mark.parametrize(
    ("context", "known"),
    [
        ("start", []),
        ("so_far", [DAY[20] + timedelta(hours=1)]),
        ("visit", [DAY[20] + timedelta(hours=1), DAY[20] + timedelta(hours=3)]),
    ],
)
def test_nothing_but_the_context_is_known_of_the_visit(questions, context, known):
    records = question_records(EVENTS, questions, context)
    of_third = records.filter(pl.col("subject_id") == 1)
    earlier = EVENTS.filter((pl.col("subject_id") == 1) & (pl.col("time") < DAY[20]))
    static = of_third.filter(pl.col("time").is_null())["code"].to_list()
    assert static == ["GENDER//F"]
    timed = of_third.filter(pl.col("time").is_not_null()).sort("time", maintain_order=True)
    assert timed["time"].to_list() == [*earlier["time"], DAY[20], *known]
    assert timed["code"].to_list()[earlier.height] == "VISIT_START//IMP"
    assert set(timed["code"].to_list()[earlier.height + 1 :]) <= {DIAGNOSIS}


def test_scores_that_need_no_model(questions):
    np.testing.assert_allclose(frequency_scores(questions)[0], [2 / 3, 2 / 3, 1 / 3])
    scores = last_visit_scores(questions)
    assert (np.argsort(-scores[4], kind="stable") == [0, 1, 2]).all()
    assert scores[4, 0] > 0.5 > scores[4, 1]


def test_measures_by_hand():
    # three visits, four drugs; the third visit's second drug is unknown to training
    truth = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]], bool)
    more = np.array([0, 0, 1])
    scores = np.array([[0.9, 0.1, 0.8, 0.2], [0.1, 0.2, 0.9, 0.3], [0.5, 0.6, 0.1, 0.2]])
    assert recall_at(scores, truth, more, 2).tolist() == [0.5, 1.0, 0.5]
    assert jaccard(scores >= 0.5, truth, more).tolist() == [1 / 3, 1.0, 1 / 3]
    known = [average_precision_score(t, s) for t, s in zip(truth, scores, strict=True)]
    np.testing.assert_allclose(visit_precision(scores, truth, np.ones_like(truth)), known)
    assert np.isnan(visit_precision(scores, np.zeros_like(truth), np.ones_like(truth))).all()
    hidden = np.where([False, False, True, False], -np.inf, scores)
    assert recall_at(hidden, truth, more, 4).tolist() == [1.0, 0.0, 0.5]
    assert 0.2 < best_jaccard_threshold(scores, truth, more) <= 0.9


def sampled(n=300, c=5, d=4, seed=0):
    """Drugs that a straight line tells, of patients with two visits each."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, d))
    given = rng.random((n, c)) < 1 / (1 + np.exp(-(vectors @ rng.normal(size=(d, c)) * 2 - 0.5)))
    before = rng.random((n, c)) < 0.3
    split = np.repeat(["train", "tuning", "held_out"], [n // 2, n // 6, n - n // 2 - n // 6])
    table = pl.DataFrame(
        {
            "question": np.arange(n),
            "subject_id": np.arange(n) // 2,
            "start": [DAY[0]] * n,
            "number": np.arange(n) % 2 + 1,
            "split": split,
        }
    )
    codes = [f"drug {number}" for number in range(c)]
    return MedicationQuestions(
        table, codes, given, np.zeros(n, np.int64), before, before.copy(), np.arange(n // 2)
    ), vectors


def test_the_line_is_one_logistic_regression_a_drug():
    questions, vectors = sampled()
    scores, penalty = line_scores(questions, vectors)
    train = questions.rows("train")
    mean, spread = vectors[train].mean(0), vectors[train].std(0)
    scaled = (vectors - mean) / spread
    for drug in range(5):
        model = LogisticRegression(C=penalty, max_iter=5000, tol=1e-10).fit(scaled[train], questions.given[train, drug])
        np.testing.assert_allclose(scores[:, drug], model.predict_proba(scaled)[:, 1], atol=1e-3)
    missing = vectors.copy()
    missing[7] = np.nan
    assert np.isnan(line_scores(questions, missing)[0][7]).all()


def test_what_knows_more_measures_better_and_parts_are_apart():
    questions, vectors = sampled()
    systems = {"line": line_scores(questions, vectors)[0], "frequency": frequency_scores(questions)}
    report = assess_medications(questions, systems, num_resamples=20)
    by = {(each.system, each.which, each.part): each for each in report.measures}
    assert set(by) == {
        (system, which, part)
        for system in systems
        for which, parts in (("later", ("all", "started", "repeated")), ("first", ("all",)))
        for part in parts
    }
    for name in ("jaccard", "pr_auc", "pr_auc_macro", "pr_auc_micro"):
        assert by["line", "later", "all"].figures[name].value > by["frequency", "later", "all"].figures[name].value
    rows = questions.rows("held_out")
    rows = rows[questions.table["number"].to_numpy()[rows] > 1]
    started = questions.given[rows] & ~questions.before[rows]
    assert by["line", "later", "started"].visits == int(started.any(1).sum())
    candidates = ~questions.before[rows]
    # visits without any drug started are no question, so the macro average is over the others
    kept = started.any(1)
    known = [
        average_precision_score(started[kept & candidates[:, d], d], systems["line"][rows][kept & candidates[:, d], d])
        for d in range(5)
    ]
    assert by["line", "later", "started"].figures["pr_auc_macro"].value == pytest.approx(np.mean(known))
    text = report.to_markdown()
    assert "### later visits, drugs started" in text
    assert "recall@5" in text


class Known:
    """A stand-in for a model: of each prompt it says that drug number (subject mod drugs) is given."""

    def __init__(self, context):
        self.config = type("Config", (), {"max_position_embeddings": context})
        self.prompts = []

    def trajectories(self, prompts, request):
        self.request = request
        for prompt in prompts:
            self.prompts.append(prompt)
            incidence = np.zeros((request.num, len(request.outcomes), 1))
            incidence[:, prompt.key % len(request.outcomes), 0] = 0.25
            empty = np.zeros(request.num)
            yield PatientTrajectories(incidence, empty[:, None], empty, empty, empty)


@pytest.fixture(scope="module")
def tokenizer():
    return EhrTokenizer.train(EVENTS)


def test_futures_begin_where_the_visit_does(questions, tokenizer):
    records = question_records(EVENTS, questions)
    model = Known(64)
    scores = trajectory_scores(model, tokenizer, questions, records, num=3, estimator="monte_carlo")
    assert scores.tolist() == [[0.25 * (drug == row % 3) for drug in range(3)] for row in range(5)]
    tokens = tokenizer.vocabulary.token_ids
    assert model.request.until_ids == (tokens["[VE]"],)
    for prompt in model.prompts:
        ids = prompt.inputs["input_ids"][0].tolist()
        assert ids[-2:] == [tokens["[VS]"], tokens["VISIT_START//IMP"]]
        assert prompt.elapsed_days == 0
    first = model.prompts[0].inputs["input_ids"][0].tolist()
    assert tokens[A] not in first
    some = trajectory_scores(model, tokenizer, questions, records, num=3, rows=[4])
    assert np.isnan(some[:4]).all()
    assert some[4].tolist() == scores[4].tolist()


def test_doses_are_tokens_of_their_drug():
    rng = np.random.default_rng(0)
    doses = enumerate(rng.integers(1, 99, 40).tolist())
    rows = [{"subject_id": k, "time": DAY[k % 9], "code": A, "numeric_value": v * 1.0, "unit": "mg"} for k, v in doses]
    rows += [{"subject_id": 1, "time": DAY[1], "code": B, "numeric_value": None, "unit": None}]
    tokenizer = EhrTokenizer.train(validate_events(pl.DataFrame(rows)), num_value_bins=4)
    outcomes, held = drug_outcomes(tokenizer, [A, B, "MEDICATION//RXNORM//none"])
    assert held == [0, 1]
    names = tokenizer.convert_ids_to_tokens(outcomes[0].ids.tolist())
    assert len(names) >= 4
    assert all(name.startswith(A) for name in names)
    assert tokenizer.convert_ids_to_tokens(outcomes[1].ids.tolist()) == [B]


def test_a_model_of_the_package_draws_futures(questions, tokenizer):
    from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
    from ehrseq.training.trainer import model_config

    torch.manual_seed(0)
    config = model_config(tokenizer, tasks=[], hidden_size=16, num_hidden_layers=1, max_position_embeddings=64)
    model = EhrMambaForCausalLM(config).eval()
    records = question_records(EVENTS, questions)
    scores = trajectory_scores(model, tokenizer, questions, records, num=4)
    again = trajectory_scores(model, tokenizer, questions, records, num=4)
    assert np.isfinite(scores).all()
    assert (scores == again).all()
    assert scores.max() > 0


BAD = [
    (lambda q: question_records(EVENTS, q, "later"), "context got 'later'"),
    (lambda q: assess_medications(q, {}), "no system"),
    (lambda q: assess_medications(q, {"x": np.zeros((2, 2))}), "expected arrays"),
    (lambda q: assess_medications(q, {"x": np.full(q.given.shape, np.nan)}), "no held-out visit has a score"),
    (lambda q: line_scores(q, np.zeros((2, 2))), "vectors got 2 rows"),
    (lambda q: line_scores(q, np.full((5, 2), np.nan)), "no training visit has a vector"),
    (
        lambda q: medication_questions(EVENTS.filter(~pl.col("code").str.starts_with("MED")), SPLITS),
        "codes of medications",
    ),
    (lambda q: medication_questions(EVENTS, SPLITS.with_columns(split=pl.lit("held_out"))), "could be learnt"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_requests_are_refused(questions, call, message):
    with pytest.raises(ValueError, match=message):
        call(questions)


def test_futures_in_other_words_are_refused(questions, tokenizer):
    records = question_records(EVENTS, questions)
    with pytest.raises(ValueError, match="estimator got 'reach'"):
        trajectory_scores(Known(64), tokenizer, questions, records, estimator="reach")

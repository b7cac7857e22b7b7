"""Means of contributions over a cohort, by hand; what changed between two times of one patient."""

import re
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ehrseq.hub.checkpoints import Checkpoint, load_checkpoint
from ehrseq.interpretability.cohort import COHORT_OUTCOMES, COHORT_SCHEMA, cohort_contributions, cohort_words, compare
from ehrseq.interpretability.cohort_page import write_cohort_page
from ehrseq.interpretability.counterfactuals import occlusion
from ehrseq.interpretability.datasets import EXPLAINED_SCHEMA
from ehrseq.interpretability.questions import read_question
from ehrseq.interpretability.record_prefixes import prefix_deltas
from ehrseq.interpretability.relevance_propagation import relevance
from tests.checkpoints.patients import make_patient

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
I50, I501, GLUCOSE = "DIAGNOSIS//ICD10CM//I50", "DIAGNOSIS//ICD10CM//I501", "LAB//LOINC//2345-7"


def row(subject, score, contribution, code=None, kind="diagnosis", day=1, **changes):
    given = {
        "subject_id": subject,
        "prediction_time": datetime(2150, 1, day),
        "task": "mortality_30d",
        "method": "prefix_deltas",
        "score": score,
        "code": code,
        "kind": kind,
        "contribution": contribution,
    }
    return {**dict.fromkeys(EXPLAINED_SCHEMA), **given, **changes}


def table(*rows):
    return pl.DataFrame(list(rows), schema=EXPLAINED_SCHEMA)


@pytest.fixture
def contributions():
    """Three patients, one of them twice; one question without an answer, one without contributions."""
    return table(
        row(1, 0.9, 1.0, I50, display="heart failure"),
        row(1, 0.9, 0.5, I50),
        row(1, 0.9, -0.25, GLUCOSE, "lab"),
        row(1, 0.9, 0.125, "[VS]", "structure"),
        row(1, 0.2, 0.25, I50, day=2),
        row(2, 0.6, 3.0, I50),
        row(2, 0.6, 0.75, I501),
        row(3, 0.1, -1.0, GLUCOSE, "lab"),
        row(3, 0.1, 0.0625, None, "time"),
        row(4, None, None, None, None, reason="earlier_code"),
        row(5, 0.3, None, None, None),
    )


def found(cohort, outcome="all"):
    rows = cohort.filter(pl.col("outcome") == outcome)
    return {entry["group"]: entry for entry in rows.iter_rows(named=True)}


def test_means_spreads_and_frequencies_by_hand(contributions):
    cohort = cohort_contributions(contributions, num_resamples=50)
    assert cohort.schema == pl.Schema(COHORT_SCHEMA)
    everybody = found(cohort)
    assert set(everybody) == {I50, I501, GLUCOSE, "[VS]", "time"}
    failure = everybody[I50]
    assert (failure["patients"], failure["frequency"], failure["display"]) == (2, 0.5, "heart failure")
    assert failure["mean"] == pytest.approx(np.mean([1.5, 0.25, 3.0]))
    assert failure["spread"] == pytest.approx(np.std([1.5, 0.25, 3.0], ddof=1))
    assert everybody[GLUCOSE]["mean"] == pytest.approx(-0.625)
    single = everybody[I501]
    assert (single["patients"], single["low"], single["high"], single["spread"]) == (1, None, None, None)
    positive, negative = found(cohort, COHORT_OUTCOMES[0]), found(cohort, COHORT_OUTCOMES[1])
    assert positive[I50]["mean"] == pytest.approx(np.mean([1.5, 3.0]))
    assert positive[I50]["frequency"] == 1.0
    assert negative[I50]["mean"] == pytest.approx(0.25)
    assert negative[I50]["frequency"] == pytest.approx(1 / 3)
    order = cohort.filter(pl.col("outcome") == "all")["mean"].abs()
    assert order.is_sorted(descending=True)


def test_the_threshold_says_who_is_positive(contributions):
    positive = found(cohort_contributions(contributions, threshold=0.7, num_resamples=5), COHORT_OUTCOMES[0])
    assert positive[I50]["mean"] == pytest.approx(1.5)
    words = " ".join(cohort_words(contributions, 0.7))
    assert "5 explained risks of 4 patients" in words
    assert re.search(r"from a risk of 0\.7 on: 1 are", words)
    assert "1 questions that have no answer" in words


def test_sums_by_kind_and_by_parent(contributions):
    kinds = found(cohort_contributions(contributions, "kind", num_resamples=5))
    assert kinds["diagnosis"]["mean"] == pytest.approx(np.mean([1.5, 0.25, 3.75]))
    parents = found(cohort_contributions(contributions, "parent", num_resamples=5))
    assert sum(entry["patients"] for entry in parents.values()) >= 4
    assert parents["time"]["mean"] == 0.0625


def naive_interval(values, num_resamples, seed):
    """Draw patients one resample at a time, with the draws of `patient_weights`."""
    subjects = sorted({subject for subject, _ in values})
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(num_resamples):
        drawn = [subjects[k] for k in rng.integers(0, len(subjects), size=len(subjects))]
        taken = [value for one in drawn for subject, value in values if subject == one and value is not None]
        if taken:
            means.append(np.mean(taken))
    return np.quantile(means, [0.025, 0.975])


def test_intervals_are_over_patients():
    draw = np.random.default_rng(5)
    rows, values = [], []
    for subject in range(20):
        for day in range(1, int(draw.integers(2, 5))):
            has = draw.random() < 0.6
            value = float(draw.normal()) if has else None
            values.append((subject, value))
            rows.append(row(subject, 0.5, value if has else 0.1, I50 if has else GLUCOSE, day=day))
    cohort = found(cohort_contributions(table(*rows), num_resamples=200, seed=3))
    low, high = naive_interval(values, 200, 3)
    assert (cohort[I50]["low"], cohort[I50]["high"]) == (pytest.approx(low), pytest.approx(high))


def test_the_memory_of_the_bootstrap_does_not_change_it(contributions, monkeypatch):
    whole = cohort_contributions(contributions, num_resamples=40)
    monkeypatch.setattr("ehrseq.interpretability.cohort._CELLS", 10)
    assert cohort_contributions(contributions, num_resamples=40).equals(whole)


def test_groups_stay_groups():
    rows = [row(k, 0.5, 1.0 + k, None, "visit", group=f"visit {k % 2}") for k in range(4)]
    cohort = found(cohort_contributions(table(*rows), num_resamples=5))
    assert {name: entry["mean"] for name, entry in cohort.items()} == {"visit 0": 2.0, "visit 1": 3.0}
    with pytest.raises(ValueError, match="of groups already"):
        cohort_contributions(table(*rows), "code")


def test_the_order_of_the_rows_does_not_matter(contributions):
    turned = cohort_contributions(contributions.reverse(), num_resamples=30)
    straight = cohort_contributions(contributions, num_resamples=30)
    keys = ["outcome", "group"]
    assert turned.sort(keys).drop("display").equals(straight.sort(keys).drop("display"))


def test_a_page_is_made_of_it(contributions, tmp_path):
    cohort = cohort_contributions(contributions, num_resamples=5)
    page = write_cohort_page(cohort, tmp_path / "cohort.html", task="mortality_30d", words=["so many"])
    text = page.read_text()
    assert "heart failure" in text
    assert "Positive prediction" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": "visit"}, "expected one of"),
        ({"by": "group"}, "of single events"),
        ({"threshold": 1.5}, "expected a risk from 0 to 1"),
        ({"threshold": True}, "threshold got True"),
        ({"threshold": "half"}, "threshold got 'half'"),
        ({"num_resamples": 0}, "num_resamples >= 1"),
        ({"confidence": 1.0}, "confidence < 1"),
        ({"contributions": "nowhere.parquet"}, "cannot be read as Parquet"),
        ({"contributions": pl.DataFrame({"subject_id": [1]})}, "contribution"),
        ({"contributions": [1]}, "contributions got list"),
        ({"contributions": table(row(4, None, None, None, None))}, "none of these questions was explained"),
    ],
)
def test_bad_input_of_cohorts(contributions, change, message):
    with pytest.raises(ValueError, match=message):
        cohort_contributions(**{"contributions": contributions, **change})


# -- two times of one patient ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mamba():
    model, encoder = load_checkpoint(CHECKPOINTS / "ehrmamba")
    return Checkpoint(model.double(), encoder)


def record():
    return next(made for made in map(make_patient, range(100)) if len({e.get("visit_id") for e in made["events"]}) == 4)


def asked(mamba, at, method=prefix_deltas, task="mortality_30d"):
    return method(read_question(mamba, record(), task, at))


@pytest.mark.parametrize("method", [prefix_deltas, occlusion, relevance])
def test_changes_sum_to_the_change_of_the_log_odds(mamba, method):
    times = sorted(event["time"] for event in record()["events"])
    then, now = (asked(mamba, at, method) for at in (times[len(times) // 2], times[-1]))
    comparison = compare(then, now)
    assert comparison.change == now.log_odds - then.log_odds
    total = comparison.baseline + comparison.changes["change"].sum() + comparison.remainder
    assert total == pytest.approx(comparison.change, abs=1e-12)
    assert comparison.by_status()["change"].sum() == pytest.approx(comparison.changes["change"].sum(), abs=1e-12)
    assert comparison.by_status()["rows"].sum() == comparison.changes.height


def test_new_events_are_new_and_old_ones_stay(mamba):
    times = sorted(event["time"] for event in record()["events"])
    middle = times[len(times) // 2]
    then, now = asked(mamba, middle), asked(mamba, times[-1])
    changes = compare(then, now).changes
    events = changes.filter(pl.col("time").is_not_null())
    new = events.filter(pl.col("status") == "new")
    assert (new["time"] > middle).all()
    assert new.height == sum(time > middle for time in times)
    assert (events.filter(pl.col("status") != "new")["time"] <= middle).all()
    assert events.filter(pl.col("status") == "changed").is_empty()  # what an event changed, it has changed


def test_events_that_left_the_context_are_gone(mamba):
    times = sorted(event["time"] for event in record()["events"])
    then = prefix_deltas(read_question(mamba, record(), "mortality_30d", times[8], max_length=12))
    now = prefix_deltas(read_question(mamba, record(), "mortality_30d", times[-1], max_length=12))
    assert "gone" in compare(then, now).changes["status"].to_list()


def test_equal_events_are_told_apart(mamba):
    twice = record()
    twice["events"] = [*twice["events"], *twice["events"][2:4]]
    at = max(event["time"] for event in twice["events"])
    explained = prefix_deltas(read_question(mamba, twice, "mortality_30d", at))
    comparison = compare(explained, explained)
    assert set(comparison.changes["status"]) == {"same"}
    assert comparison.changes.height == explained.contributions.height
    assert comparison.change == 0


def test_bad_input_of_comparisons(mamba):
    times = sorted(event["time"] for event in record()["events"])
    now = asked(mamba, times[-1])
    with pytest.raises(ValueError, match="task 'readmission_30d' and 'mortality_30d'"):
        compare(asked(mamba, times[-1], task="readmission_30d"), now)
    with pytest.raises(ValueError, match="method"):
        compare(asked(mamba, times[-1], occlusion), now)
    dead = record()
    dead["events"] = [*dead["events"], {"time": times[-1] + timedelta(days=1), "code": "MEDS_DEATH"}]
    gone = prefix_deltas(read_question(mamba, dead, "mortality_30d", times[-1] + timedelta(days=2)))
    with pytest.raises(ValueError, match="no answer \\("):
        compare(now, gone)

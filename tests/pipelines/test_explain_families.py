"""Every method of every family, by its name alone: what it tells sums to the score, and nothing later is read."""

import copy
import math
from functools import cache
from pathlib import Path

import pytest
from transformers import pipeline

from ehrseq.interpretability.methods import METHODS
from tests.checkpoints.patients import make_patient
from tests.checkpoints.stays import make_stay

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
WAYS = [(family, name) for name, method in METHODS.items() if method.explains for family in method.families]


@cache
def risk_of(family):
    return pipeline("ehr-risk", model=str(CHECKPOINTS / family), device="cpu")


@pytest.mark.parametrize(("family", "method"), WAYS)
def test_contributions_sum_to_the_score_and_read_nothing_later(family, method):
    patient = make_stay(3) if family == "hymate" else make_patient(3)
    last = max(str(event["time"]) for event in patient["events"] if event["time"] is not None)
    continued = copy.deepcopy(patient)
    continued["events"].append({**continued["events"][-1], "time": "2300-01-01T00:00:00"})
    asked = {"tasks": risk_of(family).model.config.tasks[0]["name"], "prediction_time": last, "explain": method}
    answer, same = risk_of(family)(patient, **asked)[0], risk_of(family)(continued, **asked)[0]
    assert answer == same
    assert answer["contributions"]
    total = sum(each["contribution"] for each in answer["contributions"])
    log_odds = answer["baseline"] + total + answer.get("remainder", 0.0)
    assert 1 / (1 + math.exp(-log_odds)) == pytest.approx(answer["score"], abs=1e-6)

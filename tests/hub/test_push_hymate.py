"""The Hub round trip of a HyMaTE checkpoint: pushed whole, in parts and by a pipeline, loaded in fresh processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import pipeline

from tests.hub.minihub import card_problems


@pytest.fixture
def pushed(all_pushed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return all_pushed["hymate"]


def test_risks_after_a_round_trip_equal_those_before(
    all_loaded: dict[str, dict[str, Any]], hymate: Path, patients: dict[str, Any]
) -> None:
    before = pipeline("ehr-risk", model=str(hymate), device="cpu")(patients["hymate"])
    expected = [answer[0]["score"] for answer in before]
    assert len(all_loaded["hymate"]) == 3
    for name, answers in all_loaded["hymate"].items():
        np.testing.assert_allclose([answer[0]["score"] for answer in answers], expected, atol=1e-6, err_msg=name)


def test_the_cards_speak_of_triplets(pushed: dict[str, Any]) -> None:
    for card in pushed["cards"].values():
        assert card_problems(card) == []
        assert "triplets of time, variable and value" in card
        assert "Context of 64 triplets of 3 variables." in card
        assert "tokenizer" not in card
        assert "- hymate" in card


def test_a_model_without_its_feature_extractor_is_refused(pushed: dict[str, Any]) -> None:
    assert "without it nobody can turn a patient into the model's input" in pushed["refusal"]

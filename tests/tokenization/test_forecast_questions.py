"""Questions of a forecast in a user's words: horizons, grids, ends, and what tokens mean."""

from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from ehrseq.tokenization.ehr_durations import parse_duration
from ehrseq.tokenization.ehr_forecast_questions import TokenMeaning, spell_days
from tests.tokenization.timelines import event, fitted

LAB = "LAB//LOINC//2345-7"
STAY = [
    event(0, "VISIT_START//IMP", "a"),
    *(event(1, LAB, "a", numeric_value=float(value), unit="mg/dL") for value in range(1, 11)),
    event(9, "VISIT_END//home", "a"),
    event(30, "MEDS_DEATH"),
]


@pytest.mark.parametrize(
    ("text", "hours"), [("90m", 1.5), ("48h", 48), ("30d", 720), ("2w", 336), ("0d", 0), ("d", None), ("-3d", None)]
)
def test_durations(text: str, hours: float | None) -> None:
    assert parse_duration(text) == (None if hours is None else timedelta(hours=hours))


def test_days_are_spelt_in_the_largest_unit_that_fits() -> None:
    assert [spell_days(days) for days in (30.0, 0.5, 1.5, 1 / 1440)] == ["30d", "12h", "36h", "1m"]


@pytest.mark.parametrize(
    ("grid", "days"),
    [(None, ()), (2, (15.0, 30.0)), (["7d"], (7.0, 30.0)), (["30d", "1d", "1d"], (1.0, 30.0)), (["12h"], (0.5, 30.0))],
)
def test_grids(grid: Any, days: tuple[float, ...]) -> None:
    assert fitted(STAY).forecast_question("30d", grid=grid).grid_days == days


@pytest.mark.parametrize("steps", range(1, 40))
def test_the_last_step_is_the_horizon_itself(steps: int) -> None:
    question = fitted(STAY).forecast_question("7h", grid=steps)
    assert question.grid_days[-1] == question.horizon_days
    assert len(question.grid_days) == steps


def test_without_outcomes_death_and_any_admission_are_told() -> None:
    question = fitted(STAY).forecast_question("30d")
    assert [outcome.name for outcome in question.outcomes] == ["death", "any_admission"]
    assert question.horizon_days == 30.0
    assert question.notes == ()
    assert len(question.death_ids) == 1


def test_what_a_vocabulary_lacks_is_told_and_the_rest_is_asked() -> None:
    question = fitted(STAY[:-1]).forecast_question("30d")
    assert [outcome.name for outcome in question.outcomes] == ["any_admission"]
    assert any("death is not told" in note for note in question.notes)
    assert any("no token of a death" in note for note in question.notes)
    with pytest.raises(ValueError, match="no outcomes were given, and the model has none"):
        fitted(STAY[1:2]).forecast_question("30d")


def test_the_end_of_the_visit() -> None:
    tokenizer = fitted(STAY)
    ends = tokenizer.forecast_question("30d", until="visit_end").until_ids
    assert set(tokenizer.convert_ids_to_tokens(list(ends))) == {"[VE]", "VISIT_END//home"}


@pytest.mark.parametrize(
    ("horizon", "time_head", "told"),
    [
        ("12h", False, "no time within visits"),
        ("12h", True, ""),
        ("24h", False, ""),
        ("400d", False, "547 days"),
        ("400d", True, ""),
    ],
)
def test_horizons_that_a_model_knows_little_of_are_told(horizon: str, time_head: bool, told: str) -> None:
    notes = fitted(STAY).forecast_question(horizon, time_head=time_head).notes
    assert (told in " ".join(notes)) if told else not notes


def test_what_tokens_mean() -> None:
    tokenizer = fitted(STAY, num_value_bins=2)
    meanings = tokenizer.token_meanings()
    (edge,) = tokenizer.vocabulary.value_bins[LAB]["mg/dL"]
    low, high = (meanings[tokenizer.convert_tokens_to_ids(f"{LAB}//mg/dL_{k}")] for k in (0, 1))
    assert low == TokenMeaning(LAB, None, edge, "mg/dL")
    assert high == TokenMeaning(LAB, edge, None, "mg/dL")
    assert meanings[tokenizer.convert_tokens_to_ids("VISIT_START//IMP")] == TokenMeaning("VISIT_START//IMP")
    assert not {tokenizer.convert_tokens_to_ids(mark) for mark in ("[VS]", "[VE]", "[REG]", "[W_0]")} & set(meanings)
    assert np.isfinite(edge)

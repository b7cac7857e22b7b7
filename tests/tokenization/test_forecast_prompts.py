"""A record as a model continues it: what it ends in, how long ago that was, and when there is nothing to continue."""

from typing import Any

import pytest

from ehrseq.tokenization.ehr_forecast_prompts import REASONS_AGAINST_FORECAST, forecast_key
from tests.tokenization.timelines import at, event, fitted, table

IMP, AMB, HOME = "VISIT_START//IMP", "VISIT_START//AMB", "VISIT_END//home"
STAY = [event(0, IMP, "a"), event(2, "LAB//x", "a"), event(8, "LAB//y", "a"), event(9, HOME, "a")]
DAY = 24.0


def record(events: list[dict[str, Any]], hours: float | None = None, **settings: Any) -> tuple[str, Any]:
    """Tokens of a record's end, and all of it."""
    tokenizer = fitted(STAY)
    asked = None if hours is None else at(hours)
    result = tokenizer.forecast_prompt({"subject_id": 1, "events": events}, asked, **settings)
    return " ".join(tokenizer.convert_ids_to_tokens(result.inputs["input_ids"].tolist())), result


@pytest.mark.parametrize(
    ("hours", "ends", "elapsed_hours"),
    [
        (9, f"LAB//x LAB//y {HOME} [VE] [REG]", 0),
        (9 + 5 * DAY, f"LAB//x LAB//y {HOME} [VE] [REG]", 5 * DAY),
        (8, "LAB//x LAB//y", 0),
        (8.5, "LAB//x LAB//y", 0.5),
        (1, f"[CLS] [VS] {IMP}", 1),
        (None, f"{HOME} [VE] [REG]", 0),
    ],
)
def test_where_a_record_ends_and_how_long_ago(hours: float | None, ends: str, elapsed_hours: float) -> None:
    tokens, result = record(STAY, hours)
    assert tokens.endswith(ends)
    assert result.elapsed_days == pytest.approx(elapsed_hours / 24, abs=1e-12)
    assert result.reason is None


@pytest.mark.parametrize(("days", "closed"), [(29.9, False), (30, False), (30.1, True)])
def test_a_stay_without_an_end_lapses_after_thirty_silent_days(days: float, closed: bool) -> None:
    tokens, result = record(STAY[:3], 8 + days * DAY)
    assert tokens.endswith("[VE] [REG]") == closed
    assert result.elapsed_days == pytest.approx(days, abs=1e-9)


def test_a_lapsed_visit_is_over_as_a_later_row_would_have_shown() -> None:
    """The record with a row that comes after the lapse holds the same tokens up to that row's interval."""
    tokens, _ = record(STAY[:3], 50 * DAY)
    later, _ = record([*STAY[:3], event(50 * DAY, "LAB//x")], 50 * DAY)
    assert later.startswith(f"{tokens} [M_1] [VS]")


def test_a_risk_prompt_does_not_close_the_visit() -> None:
    tokenizer = fitted(STAY)
    row = tokenizer({"events": STAY[:3]}, task="mortality_30d", prediction_time=at(50 * DAY))
    assert "[VE]" not in tokenizer.convert_ids_to_tokens(row["input_ids"])


def test_the_last_token_counts_not_a_row_without_one() -> None:
    """The end of an encounter inside an open visit makes no token here: the gap that is drawn began before it."""
    inside = [event(0, IMP, "a"), event(1, AMB, "b"), event(2, "DIAGNOSIS//x", "a"), event(5, "VISIT_END//AMB", "b")]
    tokenizer = fitted(inside, input_kinds=["diagnosis"])
    result = tokenizer.forecast_prompt({"subject_id": 1, "events": inside}, at(6))
    assert tokenizer.convert_ids_to_tokens(result.inputs["input_ids"].tolist()) == ["[CLS]", "[VS]", "DIAGNOSIS//x"]
    assert result.elapsed_days == pytest.approx(4 / 24)


def test_the_most_recent_tokens_stay() -> None:
    later = [*STAY, event(200 * DAY, "LAB//x")]
    assert record(later)[0] == f"[CLS] [VS] {IMP} LAB//x LAB//y {HOME} [VE] [REG] [M_6] [VS] LAB//x [VE] [REG]"
    assert record(later, max_length=8)[0] == "[CLS] [VS] LAB//x [VE] [REG]"


@pytest.mark.parametrize(
    ("events", "hours", "reason"),
    [
        ([*STAY, event(20, "MEDS_DEATH")], 20, "died_before_prediction"),
        ([*STAY, event(20, "MEDS_DEATH")], None, "died_before_prediction"),
        ([*STAY, event(20, "MEDS_DEATH")], 19, None),
        ([*STAY, event(None, "MEDS_DEATH")], 19, "death_time_unknown"),
        ([*STAY[:-1], event(9, "VISIT_END//exp", "a")], 19, "died_before_prediction"),
        (STAY, -1, "nothing_known"),
        ([event(None, "GENDER//F")], None, "nothing_known"),
        ([event(0, "NOBODY//KNOWS"), event(3, "NOR//THIS")], 5, "nothing_known"),
        (STAY, 51 * 366 * 24, "silent_too_long"),
    ],
)
def test_records_that_have_no_future(events: list[dict[str, Any]], hours: float | None, reason: str | None) -> None:
    assert record(events, hours)[1].reason == reason
    assert reason is None or reason in REASONS_AGAINST_FORECAST


def test_the_key_is_of_subject_and_time() -> None:
    """SHA-like and stable: by hand, BLAKE2b of "1\\n0" in 8 bytes, without its lowest bit."""
    import hashlib

    by_hand = int(hashlib.blake2b(b"1\n0", digest_size=8).hexdigest(), 16) // 2
    assert forecast_key(1, 0) == forecast_key("1", 0) == by_hand
    assert len({forecast_key(subject, time) for subject in range(20) for time in (None, 0, 1)}) == 60
    assert record(STAY, 9)[1].key == record([*STAY, event(20, "LAB//x")], 9)[1].key
    assert 0 <= forecast_key(1, 0) < 2**63


def test_tables_and_dicts_are_one() -> None:
    tokenizer = fitted(STAY)
    by_dict = tokenizer.forecast_prompt({"subject_id": 1, "events": STAY}, at(9))
    by_table = tokenizer.forecast_prompt(table(STAY), at(9))
    assert by_dict.key == by_table.key
    assert all((by_dict.inputs[name] == by_table.inputs[name]).all() for name in by_dict.inputs)


@pytest.mark.parametrize(
    ("patient", "why"),
    [
        ({"subject_id": 1, "events": []}, "without events"),
        ("a text", "patients, not text"),
        ({"subject_id": 1, "events": STAY, "prediction": 1}, "unknown keys"),
    ],
)
def test_what_is_no_patient(patient: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fitted(STAY).forecast_prompt(patient)


def test_a_context_that_holds_no_event() -> None:
    with pytest.raises(ValueError, match="max_length got 3"):
        record(STAY, 9, max_length=3)

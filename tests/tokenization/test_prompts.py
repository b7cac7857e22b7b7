"""Cutting at the prediction time, truncation, task tokens, windows: what a model is shown, and nothing later."""

from typing import Any

import polars as pl
import pytest

from tests.tokenization.timelines import at, event, fitted, table, words

IMP, AMB, HOME = "VISIT_START//IMP", "VISIT_START//AMB", "VISIT_END//home"
TASK = "mortality_30d"


def labs(start: int, count: int, visit_id: str | None) -> list[dict[str, Any]]:
    return [event(start + k, f"LAB//{start + k}", visit_id) for k in range(count)]


STAY = [event(0, IMP, "a"), *labs(1, 3, "a"), event(9, HOME, "a")]
CLINIC = [event(300, AMB, "b"), *labs(301, 2, "b"), event(310, "VISIT_END//AMB", "b")]


def prompt(events: list[dict[str, Any]], hours: float | None = None, **settings: Any) -> str:
    time = None if hours is None else at(hours)
    return words(fitted(STAY + CLINIC), events, task=TASK, prediction_time=time, **settings)


def test_a_closed_visit_ends_on_the_task_in_place_of_reg() -> None:
    assert prompt(STAY + CLINIC, 9) == f"[MOR_1M] [VS] {IMP} LAB//1 LAB//2 LAB//3 {HOME} [VE] [MOR_1M]"


def test_an_open_visit_gets_the_task_appended() -> None:
    assert prompt(STAY + CLINIC, 2.5) == f"[MOR_1M] [VS] {IMP} LAB//1 LAB//2 [MOR_1M]"


def test_known_is_everything_up_to_and_including_the_prediction_time() -> None:
    assert prompt(STAY, 2).endswith("LAB//1 LAB//2 [MOR_1M]")
    assert prompt(STAY, 2 - 1e-9).endswith("LAB//1 [MOR_1M]")


def test_rows_after_the_prediction_time_change_nothing() -> None:
    tokenizer = fitted(STAY + CLINIC)
    for hours in (0, 1.5, 9, 100, 301):
        known = [row for row in STAY + CLINIC if row["time"] <= at(hours)]
        whole = tokenizer({"events": STAY + CLINIC}, task=TASK, prediction_time=at(hours))
        assert whole == tokenizer({"events": known}, task=TASK, prediction_time=at(hours))


def test_the_patients_own_prediction_time_is_used() -> None:
    tokenizer = fitted(STAY + CLINIC)
    own = tokenizer({"events": STAY, "prediction_time": "2020-01-01T02:30:00"}, task=TASK)
    assert own == tokenizer({"events": STAY}, task=TASK, prediction_time=at(2.5))


def test_the_task_token_carries_the_prediction_time() -> None:
    year = 365.25 * 24
    tokenizer = fitted(STAY)
    events = [event(-30 * year, "MEDS_BIRTH"), *STAY]
    row = tokenizer({"events": events}, task=TASK, prediction_time=at(168 * 3))
    assert row["token_type_ids"][0] == 1
    last = {name: row[name][-1] for name in ("token_type_ids", "times", "visit_orders", "visit_segments")}
    assert last == {"token_type_ids": 8, "times": 3.0, "visit_orders": 1, "visit_segments": 1}
    assert row["ages"][-1] == pytest.approx(30 + 168 * 3 / year)
    closing = {name: row[name][-2] for name in ("token_type_ids", "times")}
    assert closing == {"token_type_ids": 3, "times": pytest.approx(9 / 168)}


def test_before_the_first_event_the_task_stands_alone() -> None:
    events = [event(None, "GENDER//F"), *STAY]
    tokenizer = fitted(events)
    assert words(tokenizer, events, task=TASK, prediction_time=at(-1)) == "[MOR_1M] GENDER//F [MOR_1M]"


# -- truncation --------------------------------------------------------------------------------------------------------


def test_truncation_keeps_the_most_recent_and_puts_cls_and_vs_back() -> None:
    tokenizer = fitted(STAY + CLINIC)
    whole = words(tokenizer, STAY + CLINIC)
    assert whole == (
        f"[CLS] [VS] {IMP} LAB//1 LAB//2 LAB//3 {HOME} [VE] [REG] [W_1] [VS] {AMB} LAB//301 LAB//302 [VE] [REG]"
    )
    cut = {
        15: f"[CLS] [VS] LAB//1 LAB//2 LAB//3 {HOME} [VE] [REG] [W_1] [VS] {AMB} LAB//301 LAB//302 [VE] [REG]",
        12: f"[CLS] [VS] {HOME} [VE] [REG] [W_1] [VS] {AMB} LAB//301 LAB//302 [VE] [REG]",
        11: f"[CLS] [VS] {AMB} LAB//301 LAB//302 [VE] [REG]",  # the marks of the first visit do not lead
        8: f"[CLS] [VS] {AMB} LAB//301 LAB//302 [VE] [REG]",
    }
    for length, expected in cut.items():
        assert words(tokenizer, STAY + CLINIC, max_length=length, truncation=True) == expected, length


def test_truncation_counts_visits_anew_and_leaves_times() -> None:
    tokenizer = fitted(STAY + CLINIC)
    row = tokenizer({"events": STAY + CLINIC}, max_length=8, truncation=True)
    assert row["visit_orders"] == [0, *[1] * 6]
    assert row["visit_segments"] == [0, *[1] * 6]
    assert row["times"][1] == pytest.approx(300 / 168), "not rebased"
    inside = tokenizer({"events": [*labs(0, 1, None), event(100, IMP, "a"), *labs(101, 20, "a")]}, max_length=8)
    assert inside["token_type_ids"][1] == 2
    assert inside["times"][1] == pytest.approx(100 / 168), "the [VS] that is put back has the visit's real start"


def test_static_tokens_stay_while_they_take_a_quarter() -> None:
    statics = [event(None, code) for code in ("GENDER//F", "RACE//X", "LANGUAGE//Y")]
    events = [*statics, event(0, IMP, "a"), *labs(1, 40, "a")]
    tokenizer = fitted(events)
    assert words(tokenizer, events, max_length=16).startswith("[CLS] GENDER//F RACE//X LANGUAGE//Y [VS] LAB")
    assert words(tokenizer, events, max_length=15).startswith("[CLS] [VS] LAB")


@pytest.mark.parametrize("length", range(8, 40))
@pytest.mark.parametrize("hours", [0, 2, 20, 21, 400, 401, 420, 430])
def test_the_last_token_of_a_prompt_is_the_task_at_any_length(length: int, hours: float) -> None:
    events = [event(0, IMP, "a"), *labs(1, 19, "a"), event(21, HOME, "a"), event(400, AMB, "b"), *labs(401, 20, "b")]
    tokenizer = fitted(events)
    row = tokenizer({"events": events}, task=TASK, prediction_time=at(hours), max_length=length, truncation=True)
    task = tokenizer.convert_tokens_to_ids("[MOR_1M]")
    assert len(row["input_ids"]) <= length
    assert row["input_ids"][0] == row["input_ids"][-1] == task
    assert row["input_ids"].count(task) == 2
    whole = tokenizer({"events": events}, task=TASK, prediction_time=at(hours))
    kept = len(row["input_ids"]) - 2
    assert row["input_ids"][-kept:] == whole["input_ids"][-kept:], "the most recent tokens"
    assert row["token_type_ids"][1] == 2


# -- windows and labels ------------------------------------------------------------------------------------------------


def test_windows_are_cut_at_visits_and_split_long_ones() -> None:
    events = STAY + CLINIC + labs(5000, 12, "long")
    tokenizer = fitted(events)
    windows = tokenizer.encode_histories(table(events)).windows(10)
    rows = [tokenizer.convert_ids_to_tokens(windows[k]["input_ids"].tolist()) for k in range(len(windows))]
    assert [" ".join(row) for row in rows] == [
        f"[CLS] [VS] {IMP} LAB//1 LAB//2 LAB//3 {HOME} [VE] [REG] [W_1]",
        f"[CLS] [VS] {AMB} LAB//301 LAB//302 [VE] [REG] [M_6]",
        "[CLS] [VS] " + " ".join(f"LAB//{k}" for k in range(5000, 5008)),
        "[CLS] [VS] " + " ".join(f"LAB//{k}" for k in range(5008, 5012)) + " [VE] [REG]",
    ]
    assert windows.lengths.tolist() == [10, 8, 10, 8]


def test_visit_orders_are_clamped() -> None:
    events = [event(48 * k, "LAB//1") for k in range(12)]
    tokenizer = fitted(events, max_num_visits=8)
    row = tokenizer({"events": events})
    assert max(row["visit_orders"]) == 7
    (same,) = tokenizer.encode_table(table(events)).to_pylist()
    assert same["visit_orders"] == row["visit_orders"]
    histories = tokenizer.encode_histories(table(events))
    index = histories.index_labels(
        {TASK: pl.DataFrame({"subject_id": [1], "prediction_time": [at(9999)], "boolean_value": [True]})}
    )
    assert histories.prompted_row(index, 0)["visit_orders"].max() == 7


def test_labels_of_unknown_patients_are_counted() -> None:
    tokenizer = fitted(STAY)
    labels = pl.DataFrame({"subject_id": [1, 99], "prediction_time": [at(2), at(2)], "boolean_value": [True, False]})
    index = tokenizer.encode_histories(table(STAY)).index_labels({TASK: labels})
    assert len(index) == 1
    assert index.skipped == {"subject_without_events": 1}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"sepsis": pl.DataFrame()}, r"\['sepsis'\].*knows \['mortality_30d'"),
        ({TASK: pl.DataFrame({"subject_id": [1]})}, "lacks the columns"),
        ({TASK: pl.DataFrame({"subject_id": [1], "prediction_time": ["x"], "boolean_value": [True]})}, "Datetime"),
        ({TASK: pl.DataFrame({"subject_id": [1], "prediction_time": [at(1)], "boolean_value": [None]})}, "nulls"),
        ({TASK: None}, "polars.DataFrame"),
    ],
)
def test_bad_labels_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(STAY).encode_histories(table(STAY)).index_labels(labels)

"""Encounters, and how rows become visits: hand-made timelines against sequences written down by hand."""

from typing import Any

import polars as pl
import pytest

from ehrseq.tasks.encounters import encounters
from tests.tokenization.timelines import at, event, fitted, table, words

LAB, DRUG = "LAB//LOINC//1", "MEDICATION//RXNORM//2"
IMP, EMER, AMB, ICU = (f"VISIT_START//{name}" for name in ("IMP", "EMER", "AMB", "ICU"))
HOME = "VISIT_END//home"

# name -> (events, sequence). [CLS] and the text of a visit's start or end is its own code.
TIMELINES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a closed admission": (
        [event(1, IMP, "a"), event(2, LAB, "a"), event(30, HOME, "a")],
        f"[CLS] [VS] {IMP} {LAB} {HOME} [VE] [REG]",
    ),
    "an open admission has no closing marks": (
        [event(1, IMP, "a"), event(2, LAB, "a")],
        f"[CLS] [VS] {IMP} {LAB}",
    ),
    "an end that repeats its class makes no token": (
        [event(1, AMB, "a"), event(2, LAB, "a"), event(3, "VISIT_END//AMB", "a")],
        f"[CLS] [VS] {AMB} {LAB} [VE] [REG]",
    ),
    "an emergency visit that overlaps the admission is one visit with it": (
        [event(1, EMER, "e"), event(2, LAB, "e"), event(3, IMP, "a"), event(4, "VISIT_END//EMER", "e"),
         event(5, DRUG, "a"), event(9, HOME, "a")],
        f"[CLS] [VS] {EMER} {LAB} {IMP} {DRUG} {HOME} [VE] [REG]",
    ),
    "a child encounter shares its root's visit_id": (
        [event(1, IMP, "a"), event(2, ICU, "a"), event(3, "VISIT_END//ICU", "a"), event(4, LAB, "a"),
         event(9, HOME, "a")],
        f"[CLS] [VS] {IMP} {ICU} {LAB} {HOME} [VE] [REG]",
    ),
    "a transfer on the same day reopens the admission": (
        [event(1, IMP, "a"), event(5, HOME, "a"), event(7, IMP, "b"), event(8, LAB, "b"), event(9, HOME, "b")],
        f"[CLS] [VS] {IMP} {HOME} {IMP} {LAB} {HOME} [VE] [REG]",
    ),
    "an admission on the next day is another visit": (
        [event(1, IMP, "a"), event(5, HOME, "a"), event(25, IMP, "b")],
        f"[CLS] [VS] {IMP} {HOME} [VE] [REG] [W_0] [VS] {IMP}",
    ),
    "an outpatient visit on the day of discharge is another visit": (
        [event(1, IMP, "a"), event(5, HOME, "a"), event(7, AMB, "b")],
        f"[CLS] [VS] {IMP} {HOME} [VE] [REG] [W_0] [VS] {AMB}",
    ),
    "an admission after an outpatient visit of that day is another visit": (
        [event(1, AMB, "a"), event(5, "VISIT_END//AMB", "a"), event(7, IMP, "b")],
        f"[CLS] [VS] {AMB} [VE] [REG] [W_0] [VS] {IMP}",
    ),
    "a late row is never moved back into its visit": (
        [event(1, IMP, "a"), event(5, HOME, "a"), event(6, LAB, "a"), event(7, DRUG, "a")],
        f"[CLS] [VS] {IMP} {HOME} [VE] [REG] [W_0] [VS] {LAB} {DRUG} [VE] [REG]",
    ),
    "a late row parts an admission from the next of that day": (
        [event(1, IMP, "a"), event(5, HOME, "a"), event(6, LAB, "a"), event(7, IMP, "b")],
        f"[CLS] [VS] {IMP} {HOME} [VE] [REG] [W_0] [VS] {LAB} [VE] [REG] [W_0] [VS] {IMP}",
    ),
    "rows without a visit_id are one visit a day": (
        [event(1, LAB), event(23, DRUG), event(24, LAB)],
        f"[CLS] [VS] {LAB} {DRUG} [VE] [REG] [W_0] [VS] {LAB} [VE] [REG]",
    ),
    "rows with a visit_id are one visit over days": (
        [event(1, LAB, "a"), event(50, DRUG, "a"), event(51, LAB, "b")],
        f"[CLS] [VS] {LAB} {DRUG} [VE] [REG] [W_0] [VS] {LAB} [VE] [REG]",
    ),
    "rows before their visit's start belong to it": (
        [event(1, LAB, "a"), event(50, IMP, "a"), event(51, DRUG, "a"), event(60, HOME, "a")],
        f"[CLS] [VS] {LAB} {IMP} {DRUG} {HOME} [VE] [REG]",
    ),
    "a row without a visit_id joins the open visit": (
        [event(1, IMP, "a"), event(26, LAB), event(27, DRUG, "z"), event(50, HOME, "a")],
        f"[CLS] [VS] {IMP} {LAB} {DRUG} {HOME} [VE] [REG]",
    ),
    "an end without a start makes nothing": (
        [event(1, LAB), event(2, HOME, "a"), event(3, DRUG)],
        f"[CLS] [VS] {LAB} {DRUG} [VE] [REG]",
    ),
    "starts and ends without visit_id pair among themselves": (
        [event(1, EMER), event(2, HOME, "a"), event(3, LAB), event(4, HOME)],
        f"[CLS] [VS] {EMER} {LAB} {HOME} [VE] [REG]",
    ),
    "at one instant starts come first and ends last": (
        [event(5, HOME, "a"), event(5, LAB, "a"), event(5, IMP, "a")],
        f"[CLS] [VS] {IMP} {LAB} {HOME} [VE] [REG]",
    ),
    "a death at the discharge stands behind it": (
        [event(1, IMP, "a"), event(5, "MEDS_DEATH"), event(5, HOME, "a")],
        f"[CLS] [VS] {IMP} {HOME} [VE] [REG] [W_0] [VS] MEDS_DEATH [VE] [REG]",
    ),
    # -- encounters without an end: a day is 24 hours here
    "a silent outpatient encounter lapses when a row of somebody else arrives": (
        [event(1, AMB, "a"), event(2, LAB, "a"), event(26.1, DRUG, "b")],
        f"[CLS] [VS] {AMB} {LAB} [VE] [REG] [W_0] [VS] {DRUG} [VE] [REG]",
    ),
    "after exactly its patience it is still open": (
        [event(1, AMB, "a"), event(2, LAB, "a"), event(26, DRUG, "b")],
        f"[CLS] [VS] {AMB} {LAB} {DRUG}",
    ),
    "outpatient encounters without ends are a visit each": (
        [event(1, AMB, "a"), event(170, AMB, "b"), event(171, LAB, "b"), event(400, AMB, "c")],
        f"[CLS] [VS] {AMB} [VE] [REG] [W_1] [VS] {AMB} {LAB} [VE] [REG] [W_1] [VS] {AMB}",
    ),
    "its own rows keep an encounter open however late": (
        [event(1, AMB, "a"), event(900, LAB, "a"), event(901, "VISIT_END//AMB", "a")],
        f"[CLS] [VS] {AMB} {LAB} [VE] [REG]",
    ),
    "an admission waits for a month": (
        [event(1, IMP, "a"), event(720, DRUG, "b"), event(721.5, DRUG, "b")],
        f"[CLS] [VS] {IMP} {DRUG} [VE] [REG] [W_0] [VS] {DRUG} [VE] [REG]",
    ),
    "an admission that lapsed is not transferred from": (
        [event(1, IMP, "a"), event(720, LAB), event(722, IMP, "b")],
        f"[CLS] [VS] {IMP} {LAB} [VE] [REG] [W_0] [VS] {IMP}",
    ),
    "an end makes no other encounter lapse": (
        [event(1, AMB, "a"), event(2, EMER, "b"), event(60, "VISIT_END//EMER", "b"), event(61, LAB, "a")],
        f"[CLS] [VS] {AMB} {EMER} {LAB}",
    ),
    "an end after the lapse closes nothing, and later rows are late": (
        [event(1, AMB, "a"), event(50, LAB), event(51, "VISIT_END//home", "a"), event(52, DRUG, "a")],
        f"[CLS] [VS] {AMB} [VE] [REG] [W_0] [VS] {LAB} {DRUG} [VE] [REG]",
    ),
    "children lapse with their root, by the longest patience": (
        [event(1, AMB, "a"), event(2, ICU, "a"), event(100, LAB), event(800, DRUG)],
        f"[CLS] [VS] {AMB} {ICU} {LAB} [VE] [REG] [M_0] [VS] {DRUG} [VE] [REG]",
    ),
    "a visit stays open while another encounter of it is": (
        [event(1, EMER, "e"), event(2, IMP, "a"), event(100, LAB, "a"), event(101, HOME, "a")],
        f"[CLS] [VS] {EMER} {IMP} {LAB} {HOME} [VE] [REG]",
    ),
    "without visit_ids silence alone decides": (
        [event(1, AMB), event(20, LAB), event(45, LAB), event(46, AMB), event(47, DRUG)],
        f"[CLS] [VS] {AMB} {LAB} [VE] [REG] [W_0] [VS] {LAB} [VE] [REG] [W_0] [VS] {AMB} {DRUG}",
    ),
    "static rows follow [CLS]; the birth is no token": (
        [event(-9000, "MEDS_BIRTH"), event(1, LAB), event(None, "GENDER//F")],
        f"[CLS] GENDER//F [VS] {LAB} [VE] [REG]",
    ),
    "a death of unknown time is left out": (
        [event(None, "MEDS_DEATH"), event(1, LAB)],
        f"[CLS] [VS] {LAB} [VE] [REG]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMELINES)
def test_sequence(name: str) -> None:
    events, expected = TIMELINES[name]
    tokenizer = fitted(events)
    assert words(tokenizer, events) == expected
    (row,) = tokenizer.encode_table(table(events)).to_pylist()
    assert " ".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) == expected


def test_an_encounter_lapses_when_the_next_row_arrives_and_not_before() -> None:
    events = [event(1, AMB, "a"), event(2, LAB, "a"), event(500, DRUG, "b")]
    tokenizer = fitted(events)
    for hours in (2, 26, 100, 499):
        assert words(tokenizer, events, prediction_time=at(hours)) == f"[CLS] [VS] {AMB} {LAB}"
    row = tokenizer({"events": events})
    closing = tokenizer.convert_ids_to_tokens(row["input_ids"]).index("[VE]")
    assert row["times"][closing] == pytest.approx(1 / 168), "closed at its last row"


def test_encounters_that_lapse_are_counted() -> None:
    open_ended = [event(1, AMB, "a"), event(2, IMP, "b"), event(100, LAB), event(2000, LAB), event(2001, IMP, "c")]
    closed = [event(1, IMP, "a"), event(2, HOME, "a"), event(900, LAB)]
    tokenizer = fitted(open_ended, closed)
    assert tokenizer.coverage(table(open_ended, closed))["lapsed_encounters"] == 2
    assert tokenizer.coverage(table(closed))["lapsed_encounters"] == 0


def test_superseded_closures_leave_no_marks() -> None:
    events, _ = TIMELINES["a transfer on the same day reopens the admission"]
    tokenizer = fitted(events)
    between = words(tokenizer, events, prediction_time=at(6))
    assert between == f"[CLS] [VS] {IMP} {HOME} [VE] [REG]"
    assert words(tokenizer, events, prediction_time=at(7)) == f"[CLS] [VS] {IMP} {HOME} {IMP}"


@pytest.mark.parametrize(
    ("days", "token"),
    [(0, "[W_0]"), (6.99, "[W_0]"), (7, "[W_1]"), (27.99, "[W_3]"), (28, "[M_0]"), (30, "[M_1]"), (365, "[M_12]"),
     (365.99, "[M_12]"), (366, "[LT]"), (4000, "[LT]")],
)  # fmt: skip
def test_intervals_run_from_the_end_of_a_visit_to_the_next_start(days: float, token: str) -> None:
    events = [event(0, IMP, "a"), event(100, HOME, "a"), event(100 + 24 * days, AMB, "b"), event(99_999, LAB, "b")]
    if days == 0:
        events[2]["time"] = at(100.001)
    tokenizer = fitted(events)
    assert f"[REG] {token} [VS] {AMB}" in words(tokenizer, events)
    row = tokenizer({"events": events})
    k = tokenizer.convert_ids_to_tokens(row["input_ids"]).index(token)
    assert [row[name][k] for name in ("token_type_ids", "times", "ages", "visit_orders", "visit_segments")] == [
        4, 0.0, 0.0, 1, 0,
    ]  # fmt: skip


def test_channels_of_a_small_history() -> None:
    year = 365.25 * 24
    events = [
        event(-20 * year, "MEDS_BIRTH"), event(None, "GENDER//F"), event(0, IMP, "a"), event(84, LAB, "a"),
        event(168, HOME, "a"), event(year, DRUG),
    ]  # fmt: skip
    tokenizer = fitted(events)
    row = tokenizer({"events": events})
    week = 1 / 168
    last = year * week
    expected = {
        # [CLS] F [VS] IMP LAB home [VE] [REG] [M_11] [VS] DRUG [VE] [REG]
        "token_type_ids": [1, 12, 2, 11, 5, 11, 3, 8, 4, 2, 6, 3, 8],
        "times": [0, 0, 0, 0, 0.5, 1, 1, 1, 0, last, last, last, last],
        "visit_orders": [0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2],
        "visit_segments": [0, 0, 1, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2],
        "attention_mask": [1] * 13,
    }
    ages = [0, 0, 20, 20, 20 + 84 / year, *[20 + 168 / year] * 3, 0, 21, 21, 21, 21]
    for name, values in expected.items():
        assert row[name] == pytest.approx(values, rel=1e-6), name
    assert row["ages"] == pytest.approx(ages, rel=1e-6)


# -- encounters --------------------------------------------------------------------------------------------------------


def spans(events: list[dict[str, Any]]) -> list[tuple[str | None, str, float, float | None]]:
    """(visit_id, class, start hour, end hour) of each encounter."""
    origin = at(0)
    hours = lambda time: None if time is None else (time - origin).total_seconds() / 3600  # noqa: E731
    return [(v, c, hours(s), hours(e)) for _, v, c, s, e, _ in encounters(table(events)).iter_rows()]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([event(1, IMP, "a"), event(5, HOME, "a")], [("a", "IMP", 1, 5)]),
        ([event(1, IMP, "a")], [("a", "IMP", 1, None)]),
        ([event(1, IMP), event(5, "VISIT_END//IMP")], [(None, "IMP", 1, 5)]),
        ([event(1, EMER), event(2, IMP), event(3, "VISIT_END//EMER"), event(9, "VISIT_END//IMP")],
         [(None, "EMER", 1, 3), (None, "IMP", 2, 9)]),
        ([event(1, IMP, "a"), event(2, ICU, "a"), event(3, "VISIT_END//ICU", "a"), event(9, HOME, "a")],
         [("a", "IMP", 1, 9), ("a", "ICU", 2, 3)]),
        ([event(5, HOME, "a"), event(5, IMP, "a")], [("a", "IMP", 5, 5)]),
        ([event(1, IMP, "a"), event(3, HOME, "b")], [("a", "IMP", 1, None)]),
    ],
)  # fmt: skip
def test_encounters_pair_starts_and_ends(events: list[dict[str, Any]], expected: list[tuple]) -> None:
    assert spans(events) == expected


@pytest.mark.parametrize("code_map", [None, [["VISIT_START//(.+)", r"visit_start:\1"], ["VISIT_END", "visit_end:*"]]])
def test_the_zone_of_a_hospital_changes_no_sequence_also_of_a_tokenizer_that_never_met_one(code_map: Any) -> None:
    """A model reads what it was trained on: its transfers are those of a day in UTC, while those of the labels are
    those of a day at the hospital (`tests/tasks/test_right_answers.py`); and no row of a zone enters.
    """
    # 22:00 and 01:30 UTC: two visits to the model, one admission in Denver
    stays = [event(22, IMP, "a"), event(46, HOME, "a"), event(49.5, IMP, "b"), event(60, HOME, "b")]
    zone = [event(None, "TIMEZONE//America/Denver"), event(None, "TIMEZONE//-07:00", "a")]
    tokenizer = fitted(stays, code_map=code_map)
    assert "TIMEZONE" not in " ".join(tokenizer.get_vocab())
    alone = words(tokenizer, stays)
    assert words(tokenizer, [*zone, *stays]) == alone
    assert alone.count("[VS]") == 2
    both = tokenizer.encode_table(table([*zone, *stays], stays))
    assert both["input_ids"][0].as_py() == both["input_ids"][1].as_py()


def test_encounters_count_what_they_cannot_pair() -> None:
    report: dict[str, int] = {}
    events = table(
        [event(1, IMP, "a"), event(2, HOME, "b"), event(None, IMP, "c")], [event(1, EMER, "a"), event(2, HOME, "a")]
    )
    encounters(events, report=report)
    assert report == {
        "encounters": 2,
        "open_encounters": 1,
        "unpaired_visit_ends": 1,
        "visit_rows_without_time": 1,
    }


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (pl.DataFrame({"subject_id": [1]}), "lacks the columns"),
        (pl.DataFrame({"subject_id": [1], "time": ["2020"], "code": ["X"]}), "expected Datetime"),
        ({"subject_id": [1]}, "polars.DataFrame"),
    ],
)
def test_encounters_refuse_what_is_no_event_table(events: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encounters(events)

"""Which event made which token, and the steps by which a row came to be: against rows of records that end earlier."""

import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoFeatureExtractor

from ehrseq.tokenization.ehr_plans import CHANNELS
from ehrseq.tokenization.ehr_prefixes import NO_EVENT, RowPrefixes
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from tests.checkpoints.patients import make_patient
from tests.checkpoints.stays import make_stay
from tests.tokenization.timelines import at, event, fitted

TASK = "mortality_30d"
YEAR = 365.25 * 24

# Every code once, so that a token's name says its event; in no order, with what makes no token and what takes no part.
RECORD = [
    event(1, "LAB//1", "a"),
    event(None, "GENDER//F"),
    event(0, "VISIT_START//IMP", "a"),
    event(3, "LAB//3", "a"),
    event(-40 * YEAR, "MEDS_BIRTH"),
    event(2, "DIAGNOSIS//ICD10CM//I10", "a"),
    event(None, "RACE//WHITE"),
    event(9, "VISIT_END//home", "a"),
    event(4, "VISIT_END//AMB", "never"),  # of no visit
    event(600, "VISIT_START//AMB", "b"),
    event(600.5, "LAB//4", "b"),
    event(601, "VISIT_END//AMB", "b"),
    event(900, "LAB//5"),
    event(900, "LAB//6"),
    event(2000, "VISIT_START//IMP", "c"),
    event(2001, "LAB//7", "c"),
    event(2002, "VISIT_START//ICU", "c2"),
    event(2003, "VISIT_END//ICU", "c2"),
]
ORDER = [2, 0, 5, 3, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17]
"""Rows that take part, in the order of the record's times."""

SEEN = ["GENDER//F", "RACE//WHITE", "LAB//5", "LAB//6", "LAB//UNSEEN"]


@pytest.fixture(scope="module")
def tokenizer() -> EhrTokenizer:
    return fitted(RECORD)


def row_of(prefixes: RowPrefixes, row: dict[str, Any], k: int) -> dict[str, np.ndarray]:
    """A prefix as a row."""
    length = prefixes.tail_lengths[k]
    return {
        name: np.concatenate([row[name][: prefixes.ends[k]], prefixes.tails[name][k, :length]]) for name in CHANNELS
    }


def assert_same_row(actual: dict[str, Any], expected: dict[str, Any], what: object) -> None:
    for name in CHANNELS:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=f"{name}, {what}")


def cut_after(events: list[dict[str, Any]], known: set[int], hours: float) -> list[dict[str, Any]]:
    """The record as it was: these rows, and of those that make none what had happened."""
    return [row for k, row in enumerate(events) if k in known or row["time"] is None or is_no_row(row, hours)]


def is_no_row(row: dict[str, Any], hours: float) -> bool:
    return row["code"] == "MEDS_BIRTH" or (row["visit_id"] == "never" and row["time"] <= at(hours))


@pytest.mark.parametrize("max_length", [None, 8, 12, 16, 20, 24])
@pytest.mark.parametrize("hours", [None, 2.5, 601, 3000])
def test_a_token_s_event_has_its_code(tokenizer: EhrTokenizer, max_length: int | None, hours: float | None) -> None:
    time = None if hours is None else at(hours)
    rows = tokenizer.sourced_rows({"events": RECORD}, [TASK], time, max_length)
    row = rows.row(0)
    assert_same_row(row, tokenizer.encode_patient({"events": RECORD}, TASK, time, max_length), "row")
    words = tokenizer.convert_ids_to_tokens(row["input_ids"].tolist())
    event_of = rows.event_of(0)
    assert len(event_of) == len(words)
    made = [RECORD[k]["code"] if k != NO_EVENT else None for k in event_of.tolist()]
    assert made == [None if word.startswith("[") else word for word in words]
    in_row = {k for k in event_of.tolist() if k != NO_EVENT}
    assert in_row <= set(np.flatnonzero(rows.known(0)).tolist())


def test_what_is_seen_and_what_is_not_is_told(tokenizer: EhrTokenizer) -> None:
    rows = tokenizer.sourced_rows({"events": [*RECORD, event(900, "LAB//UNSEEN")]}, [TASK], at(901), 12)
    known = rows.known(0)
    seen = [(RECORD[k]["code"] if k < len(RECORD) else "LAB//UNSEEN") for k in np.flatnonzero(known)]
    assert seen == SEEN
    assert rows.notes == {
        "events after the prediction time, not read": 4,
        "events that take no part": 2,  # the birth, and the end of no visit
        "events before the context, not seen": len(RECORD) + 1 - 4 - 2 - int(known.sum()),
        "events of unknown codes, read as [UNK]": 1,
    }
    assert rows.prediction_time == (at(901) - at(0)).total_seconds() * 1e6 + 1577836800e6


def test_each_prefix_is_the_row_of_the_record_that_ends_there(tokenizer: EhrTokenizer) -> None:
    rows = tokenizer.sourced_rows({"events": RECORD}, [TASK], at(2003))
    prefixes, row = rows.prefixes(0), rows.row(0)
    assert prefixes.sources.tolist() == [NO_EVENT, *ORDER]
    assert not prefixes.passes
    baseline = tokenizer.encode_patient({"events": cut_after(RECORD, set(), -1)}, TASK, at(0))
    assert_same_row(row_of(prefixes, row, 0), baseline, "baseline")
    for k, source in enumerate(ORDER, 1):
        time = RECORD[source]["time"]
        hours = (time - at(0)).total_seconds() / 3600
        record = cut_after(RECORD, set(ORDER[:k]), hours)
        assert_same_row(row_of(prefixes, row, k), tokenizer.encode_patient({"events": record}, TASK, time), source)
    assert_same_row(row_of(prefixes, row, len(ORDER)), row, "the row itself")


def test_a_token_is_where_the_step_says(tokenizer: EhrTokenizer) -> None:
    rows = tokenizer.sourced_rows({"events": RECORD}, [TASK], at(2003), 20)
    prefixes, event_of = rows.prefixes(0), rows.event_of(0)
    for token, source in zip(prefixes.tokens.tolist(), prefixes.sources.tolist(), strict=True):
        assert token == -1 or event_of[token] == source
    with_token = {k for k in event_of.tolist() if k != NO_EVENT and RECORD[k]["time"] is not None}
    assert with_token == set(prefixes.sources[prefixes.tokens >= 0].tolist())


def test_time_that_passes_is_a_step_of_its_own(tokenizer: EhrTokenizer) -> None:
    rows = tokenizer.sourced_rows({"events": RECORD}, [TASK], at(5000))
    prefixes = rows.prefixes(0)
    assert prefixes.passes
    assert prefixes.sources[-1] == NO_EVENT
    assert prefixes.is_passage.tolist() == [False] * (len(prefixes) - 1) + [True]
    assert_same_row(row_of(prefixes, rows.row(0), len(prefixes) - 1), rows.row(0), "the row itself")
    before = tokenizer.encode_patient({"events": RECORD}, TASK, at(2003))
    assert_same_row(row_of(prefixes, rows.row(0), len(prefixes) - 2), before, "before time passed")


def test_the_question_of_a_record_without_a_time_is_asked_at_its_last_token(tokenizer: EhrTokenizer) -> None:
    rows = tokenizer.sourced_rows({"events": RECORD}, [TASK])  # ends with a boundary inside an open visit
    prefixes = rows.prefixes(0)
    assert not prefixes.passes
    assert_same_row(row_of(prefixes, rows.row(0), len(prefixes) - 1), rows.row(0), "the row itself")


@pytest.mark.parametrize("max_length", [8, 10, 13, 16, 17, 20, 24])
def test_prefixes_of_a_cut_row_begin_where_it_does(tokenizer: EhrTokenizer, max_length: int) -> None:
    rows = tokenizer.sourced_rows({"events": RECORD}, [TASK], at(2001), max_length)
    prefixes, row = rows.prefixes(0), rows.row(0)
    assert_same_row(row_of(prefixes, row, len(prefixes) - 1), row, "the row itself")
    statics = [k for k in rows.event_of(0).tolist() if k in (1, 6)]
    assert prefixes.ends[0] == 1 + len(statics)
    assert set(prefixes.sources.tolist()) - {NO_EVENT} == set(np.flatnonzero(rows.known(0)).tolist()) - set(statics)
    whole = tokenizer.sourced_rows({"events": RECORD}, [TASK], at(2001)).prefixes(0)
    for k in range(1, len(prefixes)):
        same = whole.sources.tolist().index(prefixes.sources[k])
        assert prefixes.tail_lengths[k] == whole.tail_lengths[same]
        for name in ("input_ids", "times", "ages"):
            np.testing.assert_array_equal(prefixes.tails[name][k], whole.tails[name][same])
    assert prefixes.visits[1] == 1


def test_random_records(tokenizer: EhrTokenizer) -> None:
    """Any record in any order: every prefix is the row of the record that ends there."""
    for seed in range(6):
        patient = make_patient(seed, seed=7)
        patient["events"] = patient["events"][:25]
        random.Random(seed).shuffle(patient["events"])
        own = fitted(patient["events"])
        rows = own.sourced_rows(patient, [TASK])
        prefixes, row = rows.prefixes(0), rows.row(0)
        for k in range(1, len(prefixes)):
            known = set(prefixes.sources[1 : k + 1].tolist())
            record = [e for j, e in enumerate(patient["events"]) if j in known or e["code"] == "MEDS_BIRTH"]
            time = patient["events"][prefixes.sources[k]]["time"]
            assert_same_row(row_of(prefixes, row, k), own.encode_patient({"events": record}, TASK, time), (seed, k))


@pytest.mark.parametrize(
    "events",
    [
        [event(None, "GENDER//F")],
        [event(None, "GENDER//F"), event(-40 * YEAR, "MEDS_BIRTH")],
        [event(5000, "LAB//1")],
    ],
    ids=["static", "born", "nothing known yet"],
)
def test_a_record_without_known_events_is_its_own_baseline(
    tokenizer: EhrTokenizer, events: list[dict[str, Any]]
) -> None:
    rows = tokenizer.sourced_rows({"events": events}, [TASK], at(10))
    prefixes = rows.prefixes(0)
    assert len(prefixes) == 1
    assert_same_row(row_of(prefixes, rows.row(0), 0), rows.row(0), "the row itself")
    for step in ("visit", "day", "hour"):
        assert len(prefixes.by(step)) == 1


def test_steps_are_the_ends_of_visits_days_and_hours(tokenizer: EhrTokenizer) -> None:
    prefixes = tokenizer.sourced_rows({"events": RECORD}, [TASK], at(5000)).prefixes(0)
    last = {step: prefixes.by(step).sources.tolist() for step in ("visit", "day", "hour", "event")}
    assert last["visit"] == [NO_EVENT, 7, 11, 13, 17, NO_EVENT]
    assert last["day"] == [NO_EVENT, 7, 11, 13, 17, NO_EVENT]
    assert last["hour"] == [NO_EVENT, 2, 0, 5, 3, 7, 10, 11, 13, 14, 15, 16, 17, NO_EVENT]
    assert last["event"] == prefixes.sources.tolist()
    assert prefixes.by("visit").passes
    with pytest.raises(ValueError, match=r"by got 'week'; expected one of \['event', 'visit', 'day', 'hour'\]"):
        prefixes.by("week")


def test_a_hundred_thousand_events_are_cut_into_prefixes_in_seconds(tokenizer: EhrTokenizer) -> None:
    events = [event(k / 60, "LAB//1", "a") for k in range(20_000)]
    prefixes = tokenizer.sourced_rows({"events": events}, [TASK]).prefixes(0)
    assert len(prefixes) == 20_001
    assert prefixes.ends[-1] == 20_002


# -- stays -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extractor() -> Any:
    return AutoFeatureExtractor.from_pretrained(Path(__file__).parents[1] / "checkpoints" / "hymate")


@pytest.mark.parametrize("max_length", [None, 1, 4])
def test_a_triplet_s_event_has_its_value(extractor: Any, max_length: int | None) -> None:
    stay = make_stay(3)
    stay["events"] += [dict(stay["events"][1]), {"time": stay["events"][1]["time"], "code": "X", "numeric_value": 1.0}]
    random.Random(0).shuffle(stay["events"])
    rows = extractor.sourced_rows(stay, max_length=max_length)
    row = rows.row(0)
    expected = extractor(stay, max_length=max_length)
    for name in row:
        np.testing.assert_array_equal(row[name], expected[name])
    values = extractor.denormalise(row["variable_ids"], row["values"])
    names = {code: number for number, (_, codes) in enumerate(extractor.spec.variables) for code in codes}
    for place, source in enumerate(rows.event_of(0).tolist()):
        made = stay["events"][source]
        assert names[made["code"]] == row["variable_ids"][place]
        low, high = (
            np.asarray(bound)[row["variable_ids"][place]] for bound in (extractor.value_lower, extractor.value_upper)
        )
        assert values[place] == pytest.approx(np.clip(made["numeric_value"], low, high), rel=1e-5)
    assert rows.known(0).sum() == len(row["values"])
    left_out = sum(rows.notes.values())
    assert left_out == len(stay["events"]) - len(row["values"])


def test_prefixes_of_a_stay_are_its_first_triplets(extractor: Any) -> None:
    stay = make_stay(4)
    rows = extractor.sourced_rows(stay)
    prefixes = rows.prefixes(0)
    assert prefixes.ends.tolist() == list(range(1, len(rows.event_of(0)) + 1))
    assert prefixes.sources.tolist() == [NO_EVENT, *rows.event_of(0).tolist()[1:]]
    times = [stay["events"][k]["time"] for k in rows.event_of(0)]
    assert [times[0] + timedelta(microseconds=int(t - prefixes.times[0])) for t in prefixes.times] == times
    with pytest.raises(ValueError, match=r"by='visit' needs visits"):
        prefixes.by("visit")


def test_a_stay_of_bare_triplets_has_events_without_dates(extractor: Any) -> None:
    names = extractor.variables
    stay = {"times": [5.0, 1.0, 1.0], "variables": [names[0], names[1], "other"], "values": [1.0, 2.0, 3.0]}
    rows = extractor.sourced_rows(stay)
    assert [(e.time, e.code, e.value) for e in rows.events] == [
        (None, names[0], 1.0),
        (None, names[1], 2.0),
        (None, "other", 3.0),
    ]
    assert rows.event_of(0).tolist() == [1, 0]
    by_id = extractor.sourced_rows({**stay, "variables": [0, 1, 1]})
    assert [e.code for e in by_id.events] == [names[0], names[1], names[1]]
    with pytest.raises(ValueError, match=r"by='day' needs dates"):
        rows.prefixes(0).by("day")

"""Drawn tokens become events that the tokenizer reads as the same tokens again."""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl
import pytest

from ehrseq.data.schema import EVENT_SCHEMA, validate_events
from ehrseq.data.simulate.cohort import simulate
from ehrseq.forecasting.cohort_shape import ValueLaw, shape_of
from ehrseq.forecasting.token_events import RecordWriter, meanings_of_tokens, value_within
from ehrseq.tokenization.ehr_codes import DAY_US
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

START = 1_600_000_000_000_000 // DAY_US * DAY_US  # a midnight
HOUR = 1 / 24


@pytest.fixture(scope="module")
def cohort() -> tuple[pl.DataFrame, EhrTokenizer]:
    events = simulate(60, seed=11, progress=False).events()
    return events, EhrTokenizer.train(events, min_text_subjects=1)


@pytest.fixture(scope="module")
def written(cohort):  # type: ignore[no-untyped-def]
    """What a writer makes of tokens by name and hours: (rows, notes, tokens that are read back)."""
    tokenizer = cohort[1]
    ids = tokenizer.get_vocab()
    meanings = meanings_of_tokens(tokenizer.vocabulary, [("LAB//LOINC//600-7", "positive")])

    def write(*tokens: tuple[str, float]) -> tuple[list, Counter, list[str]]:
        writer = RecordWriter(7, START, meanings, {}, np.random.default_rng(0))
        writer.static(["GENDER//F"], START - 40 * 365 * DAY_US)
        writer.open_visit()
        days = np.asarray([np.nan if name.startswith(("[W", "[M", "[L")) else hour * HOUR for name, hour in tokens])
        writer.write(np.asarray([ids[name] for name, _ in tokens]), days)
        rows = writer.finish()
        return rows, writer.notes, read_back(tokenizer, rows)

    return write


def read_back(tokenizer: EhrTokenizer, rows: list) -> list[str]:  # type: ignore[type-arg]
    """Tokens behind the static ones and the first [VS]."""
    history = tokenizer.encode_histories(table(rows))
    return tokenizer.convert_ids_to_tokens(history.ids.tolist())[1:]


def table(rows: list) -> pl.DataFrame:  # type: ignore[type-arg]
    columns = list(zip(*rows, strict=True))
    frame = pl.DataFrame(
        {
            name: pl.Series(name, values, pl.Int64() if name == "time" else dtype)
            for (name, dtype), values in zip(EVENT_SCHEMA.items(), _in_order(columns), strict=True)
        }
    )
    return validate_events(frame.with_columns(pl.col("time").cast(pl.Datetime("us"))))


def _in_order(columns: list) -> list:  # type: ignore[type-arg]
    from ehrseq.forecasting.token_events import DrawnEvent

    by_name = dict(zip(DrawnEvent._fields, columns, strict=True))
    return [by_name[name] for name in EVENT_SCHEMA]


def test_simulated_records_are_written_as_they_were_read(cohort) -> None:  # type: ignore[no-untyped-def]
    events, tokenizer = cohort
    shape = shape_of(events, least_patients=5)
    meanings = meanings_of_tokens(tokenizer.vocabulary, shape.texts)
    histories = tokenizer.encode_histories(events)
    notes: Counter[str] = Counter()
    for k, subject in enumerate(histories.subject_ids.tolist()):
        body = slice(histories.offsets[k], histories.offsets[k + 1])
        ids = histories.ids[body].astype(np.int64)
        days = np.where(histories.types[body] == 4, np.nan, histories.times[body].astype(np.float64) * 7)
        writer = RecordWriter(subject, int(histories.first[k]), meanings, shape.values, np.random.default_rng(k))
        writer.open_visit()
        writer.write(ids[1:], days[1:])
        again = tokenizer.encode_histories(table(writer.finish()))
        assert _sorted_within_instants(again) == _sorted_within_instants(histories, k), subject
        notes += writer.notes
    assert set(notes) <= {
        "encounters that go on when the record ends",
        "values of codes too rare in the dataset: drawn evenly within their bin",
        "encounters that a death ended",
    }, notes


def _sorted_within_instants(histories, k: int = 0) -> list[int]:  # type: ignore[no-untyped-def]
    """The tokens between two marks of visits, sorted: the order inside one instant is the writer's own."""
    ids = histories.ids[histories.offsets[k] : histories.offsets[k + 1]]
    types = histories.types[histories.offsets[k] : histories.offsets[k + 1]]
    result: list[int] = []
    inside: list[int] = []
    for token, kind in zip(ids.tolist(), types.tolist(), strict=True):
        if kind in (2, 3, 4, 8):
            result += [*sorted(inside), token]
            inside = []
        else:
            inside.append(token)
    return result + sorted(inside)


def test_an_admission_ends_where_its_visit_does(written) -> None:  # type: ignore[no-untyped-def]
    tokens = [("VISIT_START//AMB", 0.0), ("DIAGNOSIS//ICD10CM//I10", 2.0), ("[VE]", 3.0), ("[REG]", 3.0)]
    rows, notes, again = written(*tokens)
    timed = [(row.time - START, row.code, row.visit_id) for row in rows if row.time and row.code != "MEDS_BIRTH"]
    hour = DAY_US // 24
    assert timed == [
        (0, "VISIT_START//AMB", "7-1"),
        (2 * hour, "DIAGNOSIS//ICD10CM//I10", "7-1"),
        (3 * hour, "VISIT_END//AMB", "7-1"),
    ]
    assert notes == {}
    assert again == ["VISIT_START//AMB", "DIAGNOSIS//ICD10CM//I10"]


def test_an_emergency_encounter_ends_with_the_admission(written) -> None:  # type: ignore[no-untyped-def]
    rows, _, again = written(
        ("VISIT_START//EMER", 0), ("DIAGNOSIS//ICD10CM//I10", 1), ("VISIT_START//IMP", 2), ("VISIT_END//home", 50),
        ("[VE]", 50), ("[REG]", 50), ("[W_1]", 0), ("[VS]", 50 + 24 * 8), ("VISIT_START//AMB", 50 + 24 * 8),
    )  # fmt: skip
    boundaries = [(row.code, row.visit_id) for row in rows if row.code.startswith("VISIT")]
    assert boundaries == [
        ("VISIT_START//EMER", "7-1"),
        ("VISIT_START//IMP", "7-2"),
        ("VISIT_END//EMER", "7-1"),
        ("VISIT_END//home", "7-2"),
        ("VISIT_START//AMB", "7-3"),
        ("VISIT_END//in-progress", "7-3"),
    ]
    assert again == [
        "VISIT_START//EMER", "DIAGNOSIS//ICD10CM//I10", "VISIT_START//IMP", "VISIT_END//home",
        "[VE]", "[REG]", "[W_1]", "[VS]", "VISIT_START//AMB",
    ]  # fmt: skip


def test_who_is_discharged_dead_has_died(written) -> None:  # type: ignore[no-untyped-def]
    rows, notes, _ = written(("VISIT_START//IMP", 0), ("VISIT_END//exp", 30), ("[VE]", 30), ("[REG]", 30), ("[W_2]", 0))
    assert [row.code for row in rows[-2:]] == ["VISIT_END//exp", "MEDS_DEATH"]
    assert rows[-1].time == rows[-2].time
    assert notes == {"tokens after a discharge of the dead: left out, a death was written": 3}


def test_what_no_record_says_is_left_out_and_counted(written) -> None:  # type: ignore[no-untyped-def]
    _, notes, again = written(
        ("VISIT_START//AMB", 0), ("[UNK]", 1), ("GENDER//M", 1), ("VISIT_END//home", 2), ("[VE]", 2), ("[REG]", 2),
        ("DIAGNOSIS//ICD10CM//I10", 3), ("VISIT_END//home", 3),
    )  # fmt: skip
    assert again == ["VISIT_START//AMB", "VISIT_END//home"]
    assert notes == {
        "[UNK]: left out": 1,
        "static facts inside a record: left out": 1,
        "events outside of every visit: left out": 2,
    }


def test_an_interval_is_kept_where_its_days_were_rounded(written) -> None:  # type: ignore[no-untyped-def]
    seven = 24 * 7
    _, _, again = written(
        ("VISIT_START//AMB", 0), ("[VE]", 0.00014), ("[REG]", 0.00014), ("[W_1]", 0), ("[VS]", seven + 0.00013),
        ("VISIT_START//AMB", seven + 0.00013),
    )  # fmt: skip
    assert again[3] == "[W_1]"


def test_values_lie_within_their_bins() -> None:
    law = ValueLaw((0.0, 2.0, 3.0, 10.0), 1)
    assert value_within(-np.inf, 1.0, law, 0.0) == 0.0
    assert value_within(1.0, 2.0, law, 0.5) == 1.5
    assert value_within(3.0, np.inf, law, 0.5) == 6.5
    assert value_within(1.01, 1.04, law, 0.5) == np.float32(1.025)  # no value of one decimal lies inside
    for uniform in np.linspace(0, 0.999, 50):
        for low, high in ((-np.inf, 5.0), (5.0, 7.5), (7.5, np.inf), (20.0, np.inf), (-np.inf, -3.0)):
            for each in (law, None):
                value = value_within(low, high, each, float(uniform))
                assert low < value <= high
    # Half of the values lie between the first two knots: so do those that are drawn.
    drawn = [value_within(-np.inf, np.inf, ValueLaw((0.0, 1.0, 9.0), 3), u) for u in np.linspace(0.001, 0.999, 400)]
    assert np.mean(np.asarray(drawn) <= 1.0) == pytest.approx(0.5, abs=0.01)

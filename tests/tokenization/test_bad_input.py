"""What is wrong is said: what was given, what is expected, how to mend it."""

from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from transformers.utils import logging

from ehrseq.tokenization import ehr_sequence
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from tests.tokenization.timelines import START, at, event, fitted, table, words

LAB = "LAB//LOINC//1"
EVENTS = [event(1, LAB, "a", numeric_value=1.0, unit="mg/dL"), event(2, "DIAGNOSIS//ICD10CM//I10", "a")]


@pytest.fixture(scope="module")
def tokenizer() -> EhrTokenizer:
    return fitted(EVENTS)


def changed(**fields: Any) -> dict[str, Any]:
    return {"events": [{**EVENTS[0], **fields}]}


@pytest.mark.parametrize(
    ("patient", "message"),
    [
        ({"events": []}, "without events"),
        (pl.DataFrame(schema={"subject_id": pl.Int64, "time": pl.Datetime, "code": pl.String}), "without events"),
        ([], "empty list"),
        ({}, "a dict with the keys"),
        ({"subject_id": 1, "code": LAB}, r"keys \['code', 'subject_id'\]"),
        ({"events": EVENTS, "prediction_tim": "2020-01-01"}, r"unknown keys \['prediction_tim'\]"),
        (None, "got NoneType"),
        (17, "got int"),
        ("LAB//LOINC//1", "patients, not text"),
        ([{"events": EVENTS}, 3], "got int"),
        ({"events": "LAB"}, "list of dicts, got str"),
        ({"events": {"code": LAB}}, "list of dicts, got dict"),
        ({"events": [LAB]}, "event 0 is str"),
        ({"events": [*EVENTS, None]}, "event 2 is NoneType"),
        ({"events": [{"time": at(1)}]}, "event 0 has code None"),
        (
            {"events": [*EVENTS, {"tme": at(1), "code": LAB}]},
            r"event 2 has no 'time', it has the keys \['code', 'tme'\]",
        ),
        (table(EVENTS).drop("time"), "event 0 has no 'time'"),
        (pd.DataFrame(table(EVENTS).to_dicts()).set_index("time"), "event 0 has no 'time'"),
        ({"subject_id": 1, "events": [{**EVENTS[0], "subject_id": 2}]}, r"of the subjects \['1', '2'\]"),
        ({"events": [{**EVENTS[0], "subject_id": 1}, {**EVENTS[1], "subject_id": 2}]}, r"of the subjects \['1', '2'\]"),
        (changed(time=np.datetime64("300000-01-01")), "event 0: time got 300000-01-01.* outside the years 1 to 9999"),
        (changed(time=np.datetime64(10**18, "D")), "outside the years"),
        (changed(code=""), "event 0 has code ''"),
        (changed(code=4), "event 0 has code 4"),
        (changed(time="yesterday"), "event 0: time got 'yesterday'; expected ISO 8601"),
        (changed(time="2020-13-01"), "ISO 8601"),
        (changed(time=1_600_000_000), r"time got 1600000000 \(int\)"),
        (changed(numeric_value="7.1"), r"numeric_value got '7.1' \(str\); expected a number"),
        (changed(numeric_value=True), "numeric_value got True"),
        (changed(numeric_value=10**400), "event 0: numeric_value is an integer of 1329 bits, which no float holds"),
        (changed(time="0001-01-01T00:00:00+14:00"), "event 0: time got .* outside the years 1 to 9999"),
        (changed(text_value=3), "text_value got 3"),
        (changed(unit=3), "unit got 3"),
        (changed(visit_id=3.5), "visit_id got 3.5"),
        ({"events": EVENTS, "prediction_time": "soon"}, "prediction_time got 'soon'"),
        (table(EVENTS, EVENTS), "one subject was expected, this one holds 2"),
    ],
)
def test_bad_patients(tokenizer: EhrTokenizer, patient: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer(patient)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "sepsis"}, r"unknown task 'sepsis'; this tokenizer knows \['mortality_30d', 'readmission_30d'\]"),
        ({"prediction_time": "tomorrow"}, "prediction_time got 'tomorrow'"),
        ({"max_length": 7}, "from 8 tokens on"),
        ({"max_length": 0, "truncation": True}, "from 8 tokens on"),
        ({"max_length": 16.0}, r"max_length got 16.0"),
        ({"text_pair": "x"}, r"got \['text_pair'\]"),
        ({"padding_side": "top", "padding": "max_length", "max_length": 99}, "'left' or 'right'"),
    ],
)
def test_bad_settings(tokenizer: EhrTokenizer, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer({"events": EVENTS}, **settings)


def test_rows_of_different_length_make_no_tensor_unpadded(tokenizer: EhrTokenizer) -> None:
    with pytest.raises(ValueError, match="padding=True"):
        tokenizer([{"events": EVENTS}, {"events": EVENTS[:1]}], return_tensors="np")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_value_bins": 0}, "num_value_bins got 0"),
        ({"min_count": True}, "min_count got True"),
        ({"model_max_length": 4}, "model_max_length got 4; expected an integer of at least 8"),
        ({"max_num_visits": 1}, "max_num_visits got 1"),
        ({"max_vocab_size": 3}, "give at least 27"),
        ({"input_kinds": "everything"}, "'everything' is no preset"),
        ({"input_kinds": ["labs"]}, r"unknown: \['labs'\]"),
        ({"code_map": [["(", "lab"]]}, "no regular expression"),
        ({"tasks": "mortality_30d"}, "list of names"),
        ({"tasks": ["a", "a"]}, "stands twice"),
        ({"tasks": [{"name": "a", "token": "[CLS]"}]}, "special token"),
        ({"tasks": [{"name": "a"}]}, "'name' and 'token'"),
    ],
)
def test_bad_training_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(EVENTS, **settings)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (None, "polars.DataFrame"),
        (pd.DataFrame({"subject_id": [1], "code": ["X"]}), "polars.from_pandas"),
        (pl.DataFrame({"subject_id": [1]}), r"lacks the columns \['code'\]"),
        (table(), "without rows"),
        (table(EVENTS).with_columns(numeric_value=pl.lit("high")), "'numeric_value' is String; expected Float32"),
    ],
)
def test_bad_training_tables(events: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EhrTokenizer.train(events)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (EVENTS, "polars.DataFrame"),
        (table(EVENTS).drop("time"), r"lacks the columns \['time'\]"),
        (table(EVENTS).with_columns(time=pl.lit("2020-01-01")), r"str.to_datetime"),
        (table(EVENTS).with_columns(code=None), "2 rows of the event table have no code"),
        (table(EVENTS).with_columns(subject_id=None), "2 rows of the event table have no subject_id"),
        (table(EVENTS).with_columns(subject_id=pl.lit("p1")), "'subject_id' is String; expected Int64"),
        (table(EVENTS).with_columns(numeric_value=pl.lit("high")), "'numeric_value' is String"),
    ],
)
def test_bad_tables(tokenizer: EhrTokenizer, events: Any, message: str) -> None:
    for read in (tokenizer.encode_table, tokenizer.encode_histories, tokenizer.coverage):
        with pytest.raises(ValueError, match=message):
            read(events)


LABELS = pl.DataFrame({"subject_id": [1], "prediction_time": [at(2)], "boolean_value": [True]})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS, r"labels must be \{task name: table .* got DataFrame; give one table as \{'mortality_30d': table\}"),
        (LABELS.lazy(), "got LazyFrame"),
        ([LABELS], "got list"),
        ("mortality_30d", "got str"),
        ({"sepsis": LABELS}, r"tasks \['sepsis'\]; the tokenizer knows"),
        ({"mortality_30d": LABELS.drop("boolean_value")}, r"lacks the columns \['boolean_value'\]"),
        ({"mortality_30d": LABELS.to_dicts()}, "labels of 'mortality_30d' must be a polars.DataFrame"),
        ({"mortality_30d": LABELS.with_columns(boolean_value=None)}, "have nulls"),
        ({"mortality_30d": LABELS.with_columns(prediction_time=pl.lit("soon"))}, "expected Datetime"),
    ],
)
def test_bad_labels(tokenizer: EhrTokenizer, labels: Any, message: str) -> None:
    for read in (tokenizer.encode_table, lambda events, given: tokenizer.encode_histories(events).index_labels(given)):
        with pytest.raises(ValueError, match=message):
            read(table(EVENTS), labels)


def test_a_context_shorter_than_the_special_tokens(tokenizer: EhrTokenizer) -> None:
    histories = tokenizer.encode_histories(table(EVENTS))
    labels = {"mortality_30d": pl.DataFrame({"subject_id": [1], "prediction_time": [at(2)], "boolean_value": [True]})}
    for call in (
        lambda: tokenizer.encode_table(table(EVENTS), max_length=5),
        lambda: tokenizer.encode_table(table(EVENTS), labels, max_length=5),
        lambda: histories.windows(5),
        lambda: histories.prompted_row(histories.index_labels(labels), 0, 5),
    ):
        with pytest.raises(ValueError, match="max_length got 5; a context holds"):
            call()


def test_a_tokenizer_without_a_vocabulary_says_so() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    bare = EhrTokenizer(tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
    with pytest.raises(ValueError, match=r"EhrTokenizer.train\(events\)"):
        bare({"events": EVENTS})


# -- what is no error ------------------------------------------------------------------------------------------------


def test_fields_that_are_not_read_are_named(tokenizer: EhrTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.get_logger(ehr_sequence.__name__), "warning_once", said.append)
    tokenizer({"subject_id": 1, "events": [{**event, "subject_id": "1"} for event in EVENTS]})
    assert said == []
    tokenizer(changed(value=3.0, hadm_id=5))
    assert len(said) == 1
    assert "fields that are not read: ['hadm_id', 'value']" in said[0]


def test_static_rows_alone_are_a_sequence() -> None:
    events = [event(None, "GENDER//F"), event(None, LAB)]
    tokenizer = fitted(events)
    assert words(tokenizer, events) == f"[CLS] GENDER//F {LAB}"
    assert words(tokenizer, events, task="mortality_30d") == f"[MOR_1M] GENDER//F {LAB} [MOR_1M]"
    (row,) = tokenizer.encode_table(table(events)).to_pylist()
    assert row["input_ids"] == tokenizer({"events": events})["input_ids"]


def test_rows_may_stand_in_any_order(tokenizer: EhrTokenizer) -> None:
    assert tokenizer({"events": EVENTS[::-1]}) == tokenizer({"events": EVENTS})
    assert tokenizer.encode_table(table(EVENTS[::-1])) == tokenizer.encode_table(table(EVENTS))


def test_unknown_codes_are_unk(tokenizer: EhrTokenizer) -> None:
    patient = [event(1, "X//1"), event(2, "X//2", numeric_value=1.0), event(3, "X//3", text_value="a")]
    assert words(tokenizer, patient) == "[CLS] [VS] [UNK] [UNK] [UNK] [VE] [REG]"
    assert tokenizer.coverage(table(patient))["lost"] == 1.0


TIMES = [
    START,
    "2020-01-01T00:00:00",
    "2020-01-01",
    " 2020-01-01T00:00:00Z ",
    "2020-01-01T02:00:00+02:00",
    date(2020, 1, 1),
    datetime(2020, 1, 1, tzinfo=UTC),
    datetime(2019, 12, 31, 19, tzinfo=timezone(timedelta(hours=-5))),
    np.datetime64("2020-01-01T00:00"),
    pd.Timestamp("2020-01-01"),
]


@pytest.mark.parametrize("time", TIMES, ids=repr)
def test_every_form_of_a_time_is_the_same_instant(tokenizer: EhrTokenizer, time: Any) -> None:
    later = event(24, LAB)
    expected = tokenizer({"events": [{"time": START, "code": LAB}, later]}, prediction_time=START)
    assert tokenizer({"events": [{"time": time, "code": LAB}, later]}, prediction_time=time) == expected


@pytest.mark.parametrize("nothing", [None, np.datetime64("NaT"), pd.NaT], ids=repr)
def test_no_time_is_static(tokenizer: EhrTokenizer, nothing: Any) -> None:
    assert words(tokenizer, [{"time": nothing, "code": LAB}]) == f"[CLS] {LAB}"


def test_a_table_in_another_time_zone_is_converted(tokenizer: EhrTokenizer) -> None:
    events = table(EVENTS, [event(23.5, LAB), event(24.5, LAB)])
    zoned = events.with_columns(pl.col("time").dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo"))
    assert tokenizer.encode_table(zoned) == tokenizer.encode_table(events)
    assert tokenizer.encode_table(events.with_columns(pl.col("time").cast(pl.Datetime("ns")))) == (
        tokenizer.encode_table(events)
    )


def test_one_subject_tables_of_any_library(tokenizer: EhrTokenizer) -> None:
    frame = table([*EVENTS, event(None, "GENDER//F")])
    expected = tokenizer({"events": frame.drop("subject_id").to_dicts()})
    assert tokenizer(frame) == expected
    assert tokenizer(frame.to_arrow()) == expected
    assert tokenizer(pd.DataFrame(frame.to_dicts())) == expected
    assert isinstance(frame.to_arrow(), pa.Table)


def test_optional_columns_may_be_absent(tokenizer: EhrTokenizer) -> None:
    bare = table(EVENTS).select("subject_id", "time", "code")
    rows = tokenizer.encode_table(bare)
    assert rows["input_ids"].to_pylist() == [tokenizer(bare)["input_ids"]]
    odd = table(EVENTS).with_columns(
        pl.col("code").cast(pl.Categorical), pl.lit(5).alias("visit_id"), pl.col("numeric_value").cast(pl.Float64)
    )
    assert tokenizer.encode_table(odd).num_rows == 1

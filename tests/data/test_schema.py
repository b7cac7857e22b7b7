"""The event table: casts, order, bad tables."""

from datetime import UTC, date, datetime, timedelta, timezone

import polars as pl
import pyarrow as pa
import pytest

from ehrseq.data.schema import EVENT_COLUMNS, EVENT_SCHEMA, code_rank, validate_events, validate_labels

NOON = datetime(2020, 1, 1, 12)


def table(**columns):
    return {"subject_id": [1], "time": [NOON], "code": ["A"], **columns}


def test_missing_optional_columns_become_nulls_and_others_go():
    events = validate_events({**table(), "emar_id": ["x"]})
    assert dict(events.schema) == EVENT_SCHEMA
    assert tuple(events.columns) == EVENT_COLUMNS
    assert events.row(0) == (1, NOON, "A", None, None, None, None)


@pytest.mark.parametrize(
    "time",
    [
        [NOON],
        ["2020-01-01T12:00:00Z"],
        ["2020-01-01 12:00:00"],
        ["2020-01-01T13:00:00+01:00"],
        [NOON.replace(tzinfo=UTC)],
        [datetime(2020, 1, 1, 8, tzinfo=timezone(timedelta(hours=-4)))],
        pl.Series([NOON], dtype=pl.Datetime("ns")),
        pl.Series([NOON], dtype=pl.Datetime("ms")),
    ],
)
def test_times_become_naive_utc(time):
    assert validate_events(table(time=time))["time"].to_list() == [NOON]


def test_dates_and_categories_are_read():
    events = validate_events(
        pl.DataFrame(
            {
                "subject_id": pl.Series([1], dtype=pl.UInt32),
                "time": [date(2020, 1, 1)],
                "code": pl.Series(["A"], dtype=pl.Categorical),
                "visit_id": [77],
                "numeric_value": [3],
            }
        )
    )
    # a date of a fact is the last instant of its day, as the same date in words is
    assert events.row(0) == (1, datetime(2020, 1, 1, 23, 59, 59, 999999), "A", 3.0, None, "77", None)


def test_an_arrow_table_is_read():
    arrow = pa.table({"subject_id": [1], "time": [NOON], "code": pa.array(["A"]).dictionary_encode()})
    assert validate_events(arrow).row(0)[:3] == (1, NOON, "A")


def test_order_static_birth_start_rest_in_source_order_end_death():
    codes = ["MEDS_DEATH", "VISIT_END//IMP", "B", "A", "VISIT_START//IMP", "MEDS_BIRTH"]
    events = validate_events(
        {"subject_id": [2] * 6 + [1, 2], "time": [NOON] * 6 + [NOON, None], "code": [*codes, "Z", "GENDER//F"]}
    )
    assert events["code"].to_list() == [
        "Z",
        "GENDER//F",
        "MEDS_BIRTH",
        "VISIT_START//IMP",
        "B",
        "A",
        "VISIT_END//IMP",
        "MEDS_DEATH",
    ]


@pytest.mark.parametrize(
    ("code", "rank"),
    [
        ("MEDS_BIRTH", 0),
        ("VISIT_START//AMB", 1),
        ("HOSPITAL_ADMISSION//EW EMER.//ED", 1),
        ("ICU_ADMISSION//MICU", 1),
        ("Visit/IP", 1),
        ("LAB//50912//mg/dL", 2),
        ("TRANSFER_TO//ED", 2),
        ("VISIT_END//home", 3),
        ("HOSPITAL_DISCHARGE//HOME", 3),
        ("ED_OUT", 3),
        ("Visit/IP//end", 3),
        ("MEDS_DEATH", 4),
    ],
)
def test_rank(code, rank):
    assert code_rank(pl.Series([code])).to_list() == [rank]


def test_values_that_are_no_numbers_become_null():
    events = validate_events(
        {
            "subject_id": [1] * 4,
            "time": [NOON] * 4,
            "code": list("abcd"),
            "numeric_value": [float("nan"), float("inf"), 1e300, 2.0],
        }
    )
    assert events["numeric_value"].to_list() == [None, None, None, 2.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"subject_id": [1], "code": ["A"]}, r"column\(s\) \['time'\] are absent"),
        ({}, "are absent"),
        (3, "expected a table"),
        (table(subject_id=[None]), "1 row.s. have no subject_id .first: row 0."),
        (table(code=[None]), "1 row.s. have no code"),
        (table(code=[""]), "row 0 has an empty code"),
        (table(subject_id=["p1"]), "column 'subject_id' must be Int64, row 0 holds 'p1'"),
        (table(subject_id=[1.5]), "not whole"),
        (table(time=["yesterday"]), "column 'time', row 0: 'yesterday' is not a FHIR date"),
        (table(time=[3]), "column 'time' holds Int64; expected timestamps"),
        (table(code=[["A"]]), "expected strings"),
        (table(numeric_value=["high"]), "column 'numeric_value' must be Float32, row 0 holds 'high'"),
        (table(numeric_value=[NOON]), "expected Float32"),
    ],
)
def test_a_bad_table_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        validate_events(given, source="my table")


def test_labels():
    labels = validate_labels(
        {"subject_id": [2, 1], "prediction_time": [NOON, NOON], "boolean_value": [True, False], "extra": [1, 2]}
    )
    assert labels.rows() == [(1, NOON, False), (2, NOON, True)]
    with pytest.raises(ValueError, match="are absent"):
        validate_labels({"subject_id": [2]})
    with pytest.raises(ValueError, match="have no boolean_value"):
        validate_labels({"subject_id": [2], "prediction_time": [NOON], "boolean_value": [None]})

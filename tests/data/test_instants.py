"""FHIR dates and times; the truth is the calendar."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehrseq.data.instants import offset_minutes, parse_birth, parse_instant


def _moment(micros: int) -> str:
    return (datetime(1970, 1, 1) + timedelta(microseconds=micros)).isoformat()


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2012", "2012-12-31T23:59:59.999999"),
        ("2012-02", "2012-02-29T23:59:59.999999"),
        ("2011-02", "2011-02-28T23:59:59.999999"),
        ("2012-12", "2012-12-31T23:59:59.999999"),
        ("2012-05-24", "2012-05-24T23:59:59.999999"),
        ("2012-05-24T10:00", "2012-05-24T10:00:00"),
        ("2012-05-24T10:00:00Z", "2012-05-24T10:00:00"),
        ("2012-05-24T10:00:00", "2012-05-24T10:00:00"),
        ("2012-05-24T10:00:00.5Z", "2012-05-24T10:00:00.500000"),
        ("2011-10-14T23:37:54.530+00:00", "2011-10-14T23:37:54.530000"),
        ("2012-05-24T10:00:00.123456789Z", "2012-05-24T10:00:00.123456"),
        ("2180-05-06T22:23:00-04:00", "2180-05-07T02:23:00"),
        ("2017-02-01T07:15:00+10:00", "2017-01-31T21:15:00"),
        ("2013-12-31T23:30:00-01:30", "2014-01-01T01:00:00"),
        ("1899-05-24T10:00:00Z", "1899-05-24T10:00:00"),
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00"),
        ("2016-12-31T24:00:00Z", "2017-01-01T00:00:00"),
    ],
)
def test_a_date_or_time_is_its_last_instant_in_utc(text, utc):
    assert _moment(parse_instant(text)) == utc


@pytest.mark.parametrize(
    ("text", "utc"),
    [("1980", "1980-01-01T00:00:00"), ("1980-07", "1980-07-01T00:00:00"), ("1980-07-09", "1980-07-09T00:00:00")],
)
def test_a_birth_date_is_its_first_instant(text, utc):
    assert _moment(parse_birth(text)) == utc


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "2012-13",
        "2012-00",
        "2012-02-30",
        "2012-1-1",
        "12-01-01",
        "20120524",
        "2012-05-24T25:00:00Z",
        "2012-05-24X10:00",
    ],
)
def test_what_is_no_date_is_refused(text):
    with pytest.raises(ValueError, match="not a"):
        parse_instant(text)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("2012-05-24T10:00:00Z", 0),
        ("2012-05-24T10:00:00-04:00", -240),
        ("2012-05-24T10:00:00.1+05:30", 330),
        ("2012-05-24", None),
        ("", None),
    ],
)
def test_offset(text, minutes):
    assert offset_minutes(text) == minutes


def test_the_last_microsecond_of_a_day_is_reserved_for_dates():
    assert parse_instant("2012-05-24T23:59:59.999999Z") == parse_instant("2012-05-24") - 1


@given(
    st.datetimes(min_value=datetime(1850, 1, 1), max_value=datetime(2300, 1, 1)).filter(
        lambda t: t.microsecond != 999_999
    ),
    st.integers(-14 * 60, 14 * 60),
)
def test_any_time_with_any_offset(moment, minutes):
    zoned = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    micros = parse_instant(zoned.isoformat())
    assert datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros) == zoned

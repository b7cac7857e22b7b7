"""FHIR dates and times; the truth is the calendar."""

from datetime import UTC, datetime, timedelta, timezone

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehrseq.data.instants import (
    is_placeholder,
    offset_minutes,
    parse_instant,
    read_instant,
    wall_to_utc,
    walls_to_utc,
    zone_of,
)


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
def test_the_start_of_a_period_and_a_birth_are_its_first_instant(text, utc):
    assert _moment(read_instant(text, first=True)[0]) == utc


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
        ("2012-05-24T10:00:00-0400", -240),
        ("2012-05-24T10:00+02", 120),
        ("2012-05-24T10:00:00", None),
        ("2012-05-24T10:00:00.000001", None),
        ("2012-05-24", None),
        ("", None),
    ],
)
def test_offset(text, minutes):
    assert offset_minutes(text) == minutes


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("2012", True),
        ("2012-05-24", True),
        ("2012-05-24T10:00", True),
        ("2012-05-24T10:00:00.123", True),
        ("2012-05-24T24:00:00", True),
        ("2012-05-24T10:00Z", False),
        ("2012-05-24T23:59:59.999999Z", False),
        ("2012-05-24T10:00:00+00:00", False),
        ("2012-05-24T10:00:00+0200", False),
        ("2012-05-24T10:00:00z", False),
        ("2012-05-24T24:00:00z", False),
    ],
)
def test_what_states_no_zone_says_so(text, local):
    assert read_instant(text)[1] is local


def test_a_time_with_a_zone_is_itself_also_at_the_last_microsecond_of_a_day():
    assert _moment(parse_instant("2012-05-24T23:59:59.999999Z")) == "2012-05-24T23:59:59.999999"


@pytest.mark.parametrize(
    ("text", "placeholder"),
    [
        ("0001-01-01", True),
        ("0001-01-01T00:00:00Z", True),
        ("9999-12-31T23:59:59+01:00", True),
        ("2999-12-31", True),
        ("2998-12-31", False),
        ("2099-12-31", False),
        ("4712-12-31", True),
        ("1900-01-01", True),
        ("1753-01-01T00:00:00", True),
        ("1900-01-02", False),
        ("2198-05-01", False),
        ("2031", False),
    ],
)
def test_dates_that_stand_for_an_unknown_one(text, placeholder):
    assert is_placeholder(text) is placeholder


def test_a_birth_may_be_on_the_first_day_of_a_database():
    assert not is_placeholder("1900-01-01", birth=True)
    assert is_placeholder("0001-01-01", birth=True)


@pytest.mark.parametrize(
    ("wall", "zone", "first", "utc"),
    [
        ("2031-05-04T10:00", "Europe/Berlin", False, "2031-05-04T08:00:00"),
        ("2031-01-04T10:00", "Europe/Berlin", False, "2031-01-04T09:00:00"),
        ("2031-01-04T10:00", "-07:00", False, "2031-01-04T17:00:00"),
        # 26 October 2031: 02:30 occurs twice, first in summer time
        ("2031-10-26T02:30", "Europe/Berlin", True, "2031-10-26T00:30:00"),
        ("2031-10-26T02:30", "Europe/Berlin", False, "2031-10-26T01:30:00"),
        # 30 March 2031: 02:30 is skipped; by the offset before it is 03:30 in summer time
        ("2031-03-30T02:30", "Europe/Berlin", True, "2031-03-30T01:30:00"),
        ("2031-03-30T02:30", "Europe/Berlin", False, "2031-03-30T01:30:00"),
        # half an hour is skipped (10:30 ahead before), and a whole day (10 hours behind before)
        ("2030-10-06T02:15", "Australia/Lord_Howe", False, "2030-10-05T15:45:00"),
        ("2011-12-30T12:00", "Pacific/Apia", False, "2011-12-30T22:00:00"),
    ],
)
def test_a_wall_clock_of_a_zone(wall, zone, first, utc):
    assert _moment(wall_to_utc(parse_instant(wall), zone_of(zone), first=first)) == utc
    if not first:
        column = pl.DataFrame({"wall": [datetime.fromisoformat(wall)]}, schema={"wall": pl.Datetime("us")})
        assert column.select(walls_to_utc(pl.col("wall"), zone)).item() == datetime.fromisoformat(utc)


@pytest.mark.parametrize("name", ["Europe/Berlin", "America/Denver", "Australia/Lord_Howe", "Pacific/Apia", "-03:30"])
def test_one_time_and_a_column_are_moved_by_one_rule(name):
    """Every half hour of the days of 60 years on which the zone's clocks are moved."""
    zone, first, day = zone_of(name), datetime(1975, 1, 1, 12), timedelta(days=1)
    noons = [first + number * day for number in range(60 * 365)]
    moved = [
        noon for noon in noons if noon.replace(tzinfo=zone).utcoffset() != (noon + day).replace(tzinfo=zone).utcoffset()
    ]
    walls = [noon + half * timedelta(minutes=30) for noon in moved or noons[:1] for half in range(48)]
    column = pl.select(walls_to_utc(pl.lit(pl.Series(walls, dtype=pl.Datetime("us"))), name)).to_series().to_list()
    alone = [_moment(wall_to_utc(parse_instant(wall.isoformat()), zone)) for wall in walls]
    assert [instant.isoformat() for instant in column] == alone
    assert len(walls) > 1000 or name == "-03:30"


@pytest.mark.parametrize("name", ["Mars/Base", "", "+25:00", "../etc", 3, None])
def test_zones_that_there_are_not(name):
    with pytest.raises(ValueError, match="expected a name of the IANA database"):
        zone_of(name)


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

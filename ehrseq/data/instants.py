"""Dates and times as text, as FHIR writes them: every precision and offset, as naive UTC microseconds since 1970.

A partial date (`2012`, `2012-05`, `2012-05-24`) is a span of time. A fact takes its last instant, so that nothing is
known before it was; the start of a period, and a birth, its first. A date, and a time without zone, is wall-clock time
of an unknown zone: `read_instant` says so, and whoever reads records moves it to the hospital's zone (`zone_of`,
`wall_to_utc`, and `walls_to_utc` of a column). A few dates stand for none (`is_placeholder`).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from ehrseq.tokenization.ehr_codes import DAY_US, YEAR_US

if TYPE_CHECKING:
    import polars as pl  # workers that read, and know their zone, do not load it

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

FIRST_YEAR, LAST_YEAR = 2, 2998
"""Years of dates that are meant, of every source: 0001 and those from 2999 on (9999, Oracle's 4712) stand for
"not known", "never". A date before, and be it in the future, is taken as it stands: de-identification moves whole
records there (MIMIC-IV to 2100 and later), and nothing in a date tells them apart.
"""

PLACEHOLDER_DAYS = frozenset(("1753-01-01", "1899-12-30", "1899-12-31", "1900-01-01"))
"""First days of databases (SQL Server, Excel), which they write where there is none, of every source; a birth may be on
one of them.
"""

LONGEST_STAY_US = int(50 * YEAR_US)
"""Microseconds beyond which the end of a stay is a placeholder (2099-12-31): nobody stays in hospital for 50 years."""

_OFFSET = re.compile(r"([+-])(\d{2}):(\d{2})")
_STATED_OFFSET = re.compile(r"([+-])(\d{2}):?(\d{2})?$", re.ASCII)  # `+0200` and `+02` are ISO 8601, and are sent


def read_instant(text: str, *, first: bool = False) -> tuple[int, bool]:
    """Microseconds since 1970 (UTC) of a FHIR date, dateTime or instant, and whether it states no zone.

    Args:
        text: `YYYY`, `YYYY-MM`, `YYYY-MM-DD` or `YYYY-MM-DDThh:mm[:ss[.fff]][Z|+hh:mm]`. Without a zone it is read as
            if it were UTC.
        first: The first instant of a partial date instead of its last.

    Raises:
        ValueError: Not a date or time.

    Example:
        >>> read_instant("1970-01-01T01:00:00+01:00")
        (0, False)
        >>> read_instant("1970-01-01"), read_instant("1970-01-01", first=True)
        ((86399999999, True), (0, True))
    """
    if len(text) <= 10:
        if first:
            year, month, day = _date_parts(text)
            return _micros(year, month or 1, day or 1, text), True
        return _first_instant_after(text) - 1, True
    if text[10] not in "Tt ":
        raise ValueError(f"{text!r} is not a FHIR date or time; expected a T between date and time.")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = _parse_unusual(text)
    local = moment.tzinfo is None
    if local:
        moment = moment.replace(tzinfo=UTC)
    since = moment - _EPOCH  # its parts: twice as fast as dividing it
    return since.days * DAY_US + since.seconds * 1_000_000 + since.microseconds, local


def parse_instant(text: str) -> int:
    """Microseconds since 1970 (UTC) of a date or time, the last instant of a partial date (see `read_instant`).

    Raises:
        ValueError: Not a date or time.

    Example:
        >>> parse_instant("1970-01-01") == DAY_US - 1
        True
    """
    return read_instant(text)[0]


def is_placeholder(text: str, *, birth: bool = False) -> bool:
    """Whether a date or time stands for an unknown one (year 0001 or 9999, the first day of a database).

    Args:
        text: A date or time that can be read.
        birth: Of a birth, for which the first days of databases may be meant.
    """
    return not FIRST_YEAR <= int(text[:4]) <= LAST_YEAR or (not birth and text[:10] in PLACEHOLDER_DAYS)


def offset_minutes(text: str) -> int | None:
    """UTC offset in minutes that a dateTime states, None where it states none (dates, local times)."""
    return None if len(text) <= 10 else _offset_at_the_end(text[-6:])


@lru_cache(maxsize=4096)
def _offset_at_the_end(text: str) -> int | None:
    """UTC offset in minutes that the last 6 characters of a dateTime state; few are distinct."""
    if text[-1] in "Zz":
        return 0
    stated = _STATED_OFFSET.search(text)
    if stated is None:
        return None
    minutes = 60 * int(stated[2]) + int(stated[3] or 0)
    return -minutes if stated[1] == "-" else minutes


def zone_of(name: str) -> tzinfo:
    """The time zone of a name (`Europe/Berlin`, `UTC`) or fixed offset (`-07:00`).

    Raises:
        ValueError: There is no such zone, or this machine has no table of zones.
    """
    fixed = _OFFSET.fullmatch(name) if isinstance(name, str) else None
    if fixed and int(fixed[2]) <= 14 and int(fixed[3]) < 60:
        minutes = 60 * int(fixed[2]) + int(fixed[3])
        return timezone(timedelta(minutes=-minutes if fixed[1] == "-" else minutes))
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError, TypeError) as error:
        raise ValueError(_no_zone(name)) from error


def check_zone(name: str) -> None:
    """Refuse what is no zone to us and to polars, which has a table of zones of its own and moves the tables.

    Raises:
        ValueError: See `zone_of`.
    """
    import polars as pl

    if zone_of(name).utcoffset(None) is None:
        try:
            pl.Series([0]).cast(pl.Datetime("us")).dt.replace_time_zone(name)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise ValueError(_no_zone(name)) from error


def _no_zone(name: object) -> str:
    return (
        f"timezone got {name!r}, which is not known; expected a name of the IANA database such as 'Europe/Berlin' or a "
        "fixed offset such as '-07:00' (a machine without the table needs the package tzdata)."
    )


@lru_cache(maxsize=4096)
def offset_name(minutes: int) -> str:
    """An offset in minutes as `+05:30`."""
    return f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02d}:{abs(minutes) % 60:02d}"


def wall_to_utc(micros: int, zone: tzinfo, *, first: bool = False) -> int:
    """A wall-clock time (as if it were UTC) of a zone as UTC.

    Of an hour that occurs twice it is the later instant, or the first. A time that the clocks skip is read by the
    offset before it: 02:30 is half an hour after the jump at 02:00.

    Args:
        micros: Microseconds since 1970 on the wall.
        zone: The zone.
        first: Of an hour that occurs twice the earlier instant: of the start of a period.
    """
    wall = (_EPOCH + micros * _MICROSECOND).replace(tzinfo=zone)
    # PEP 495: fold 0 is the first of two instants, and the offset before a jump; fold 1 is the other.
    before, after = (wall.replace(fold=fold).utcoffset() or timedelta(0) for fold in (0, 1))
    return micros - (before if first else min(before, after)) // _MICROSECOND


def walls_to_utc(wall: pl.Expr, name: str) -> pl.Expr:
    """The same of a column (Datetime without a zone): of an hour that occurs twice the later instant.

    Args:
        wall: Times on the wall.
        name: The zone.
    """
    import polars as pl

    fixed = zone_of(name).utcoffset(None)
    if fixed is not None:
        return wall - fixed

    def existing(moment: pl.Expr) -> pl.Expr:
        zoned = moment.dt.replace_time_zone(name, ambiguous="latest", non_existent="null")
        return zoned.dt.convert_time_zone("UTC").dt.replace_time_zone(None)

    day = timedelta(days=1)  # no zone has two jumps within one
    return pl.coalesce(existing(wall), existing(wall - day) + day)


def _date_parts(text: str) -> tuple[int, int, int]:
    """(year, month, day) of a date; 0 for the parts that it leaves out."""
    parts = text.split("-")
    digits = "".join(parts)
    if list(map(len, parts)) != [4, 2, 2][: len(parts)] or not (digits.isascii() and digits.isdigit()):
        raise ValueError(
            f"{text!r} is not a FHIR date or time; expected YYYY, YYYY-MM, YYYY-MM-DD or YYYY-MM-DDThh:mm:ss+zz:zz."
        )
    numbers = [int(part) for part in parts] + [0, 0]
    if numbers[1] > 12 or 0 in numbers[: len(parts)]:
        raise ValueError(f"{text!r} is not a date: there is no such year or month.")
    return numbers[0], numbers[1], numbers[2]


def _first_instant_after(text: str) -> int:
    """First instant after a year, month or day."""
    year, month, day = _date_parts(text)
    if day:
        return _micros(year, month, day, text) + DAY_US
    if 0 < month < 12:
        return _micros(year, month + 1, 1, text)
    return _micros(year, 12, 31, text) + DAY_US


def _micros(year: int, month: int, day: int, text: str) -> int:
    try:
        return (datetime(year, month, day, tzinfo=UTC) - _EPOCH) // _MICROSECOND
    except ValueError as error:
        raise ValueError(f"{text!r} is not a date: {error}") from error


def _parse_unusual(text: str) -> datetime:
    """What `datetime.fromisoformat` refuses but sources write: 24:00:00, the leap second :60, a small z."""
    text = f"{text[:-1]}Z" if text.endswith("z") else text
    odds = (("T24:00:00", "T00:00:00", timedelta(days=1)), (":60", ":59", timedelta(seconds=1)), ("", "", timedelta(0)))
    for odd, usual, extra in odds:
        if odd in text[10:19]:
            try:
                return datetime.fromisoformat(text[:10] + text[10:].replace(odd, usual, 1)) + extra
            except ValueError:
                break
    raise ValueError(
        f"{text!r} is not a FHIR date or time; expected YYYY, YYYY-MM, YYYY-MM-DD or YYYY-MM-DDThh:mm:ss+zz:zz."
    )

"""Dates and times as text, as FHIR writes them: every precision and offset, as naive UTC microseconds since 1970.

A partial date (`2012`, `2012-05`, `2012-05-24`) takes its last instant, so that nothing is known before it was; a birth
date takes its first. A date, and a time without zone, is wall-clock time of an unknown zone. It is read as UTC here;
`LOCAL_TICK` marks the last instant of a date so that the reader can move it to the zone of the patient's own encounters
(see `ehrseq.data.fhir.assemble`).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from ehrseq.tokenization.ehr_codes import DAY_US

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

LOCAL_TICK = DAY_US - 1
"""Time of day (microseconds) of the last instant of a date; full dateTimes never have it (see `parse_instant`)."""


def parse_instant(text: str) -> int:
    """Microseconds since 1970 (UTC) of a FHIR date, dateTime or instant; the last instant of a partial date.

    Args:
        text: `YYYY`, `YYYY-MM`, `YYYY-MM-DD` or `YYYY-MM-DDThh:mm[:ss[.fff]][Z|+hh:mm]`. Without a zone, UTC is
            assumed.

    Raises:
        ValueError: Not a date or time.

    Example:
        >>> parse_instant("1970-01-01T01:00:00+01:00")
        0
        >>> parse_instant("1970-01-01") == DAY_US - 1
        True
    """
    length = len(text)
    if length <= 10:
        return _first_instant_after(text) - 1
    if text[10] not in "Tt ":
        raise ValueError(f"{text!r} is not a FHIR date or time; expected a T between date and time.")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = _parse_unusual(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    micros = (moment - _EPOCH) // _MICROSECOND
    # The tick that marks dates is one microsecond wide: a full dateTime that falls on it steps back by one.
    return micros - 1 if micros % DAY_US == LOCAL_TICK else micros


def parse_birth(text: str) -> int:
    """First instant of a date of birth (microseconds since 1970, UTC); a full dateTime is taken as it is.

    Raises:
        ValueError: Not a date or time.
    """
    if len(text) > 10:
        return parse_instant(text)
    year, month, day = _date_parts(text)
    return _micros(year, month or 1, day or 1, text)


def offset_minutes(text: str) -> int | None:
    """UTC offset in minutes that a dateTime states, None where it states none (dates, local times)."""
    if len(text) <= 10:
        return None
    if text[-1] in "Zz":
        return 0
    sign = text[-6] if text[-3] == ":" else ""
    if sign not in ("+", "-") or not (text[-5:-3].isdigit() and text[-2:].isdigit()):
        return None
    minutes = 60 * int(text[-5:-3]) + int(text[-2:])
    return -minutes if sign == "-" else minutes


def _date_parts(text: str) -> tuple[int, int, int]:
    """(year, month, day) of a date; 0 for the parts that it leaves out."""
    parts = text.split("-")
    if [len(part) for part in parts] != [4, 2, 2][: len(parts)] or not all(
        part.isascii() and part.isdigit() for part in parts
    ):
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
    if month:
        return _micros(year + month // 12, month % 12 + 1, 1, text)
    return _micros(year + 1, 1, 1, text)


def _micros(year: int, month: int, day: int, text: str) -> int:
    try:
        return (datetime(year, month, day, tzinfo=UTC) - _EPOCH) // _MICROSECOND
    except ValueError as error:
        raise ValueError(f"{text!r} is not a date: {error}") from error


def _parse_unusual(text: str) -> datetime:
    """What `datetime.fromisoformat` refuses but sources write: 24:00:00 and the leap second :60."""
    for odd, usual, extra in (("T24:00:00", "T00:00:00", timedelta(days=1)), (":60", ":59", timedelta(seconds=1))):
        if odd in text[10:19]:
            try:
                return datetime.fromisoformat(text[:10] + text[10:].replace(odd, usual, 1)) + extra
            except ValueError:
                break
    raise ValueError(
        f"{text!r} is not a FHIR date or time; expected YYYY, YYYY-MM, YYYY-MM-DD or YYYY-MM-DDThh:mm:ss+zz:zz."
    )

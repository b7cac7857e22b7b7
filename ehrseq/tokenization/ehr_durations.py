"""Durations as tasks and forecasts write them: `90m`, `48h`, `30d`, `2w`."""

from __future__ import annotations

import re
from datetime import timedelta

DURATION_FORM = "a whole number and a unit m, h, d or w, like 24h or 30d"
"""What is expected, for error messages."""

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(r"(\d+)([mhdw])")


def parse_duration(text: object) -> timedelta | None:
    """The duration that a text says, None where it says none.

    Raises:
        OverflowError: More than `timedelta` holds.
    """
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    return None if match is None else timedelta(**{_UNITS[match[2]]: int(match[1])})

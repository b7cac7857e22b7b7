"""Units of quantities: the UCUM code, which computes, before the text beside it, which is for people."""

from __future__ import annotations

from ehrseq.data.fhir.systems import system_name

_MU = str.maketrans({"\u03bc": "\u00b5"})  # the Greek letter and the micro sign are one


def unit_spelling(system: str | None, code: str | None, unit: str | None) -> str:
    """Unit of a Quantity: its code where that is UCUM, else its text, else its code; empty where it has none.

    Raises:
        TypeError: One of them is no text.
    """
    text = unit or code or ""
    if code and unit and code != unit and system and system_name(system, "") == "UCUM":
        text = code
    if not isinstance(text, str):
        raise TypeError(f"a unit must be text, got {text!r}")
    return text.translate(_MU).strip()

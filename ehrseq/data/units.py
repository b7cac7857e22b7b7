"""One spelling for each unit, however written: `µmol/L`, `micromol/l` and `umol/L` are one, `mg%` is `mg/dL`.

Events keep the unit that their source gave; where units are compared, in tasks about values, both sides are brought to
the spelling of UCUM first. Only what is the same unit becomes the same text: nothing is converted by a factor.

Case tells units apart where UCUM says so. A spelling of one letter counts as it is listed (`K` is kelvin, `G` gauss);
one of several letters in any case, but for those that a capital makes another unit (`OTHER_UNITS`: `MU`, megaunits).

What stands in braces (an annotation) names what is counted or measured. To UCUM it is a comment, and to a laboratory
often another quantity: a D-dimer in `mg/L{FEU}` (fibrinogen equivalents) is about twice that in `mg/L{DDU}`, `mmol/mol`
of haemoglobin is none of creatinine. So it stays part of the unit, in capitals that count for nothing; only what counts
single things (`PLAIN_ANNOTATIONS`: cells, beats) is left out, since a number of them is a number.

Sources: UCUM 2.1 (case-sensitive codes, `[lb_av]`, `10*9`), HL7's list of common UCUM units, and how the demonstration
data of MIMIC-IV and Synthea, and version 2 interfaces, write them; Russian laboratories write the same units in their
own letters. A library for UCUM parses far more than a hospital
sends, at the price of a grammar and a second of import; the table below is looked up once a distinct text.
"""

from __future__ import annotations

import re
from functools import lru_cache

UNIT_PARTS: dict[str, tuple[str, ...]] = {
    "kg": ("kg", "кг", "kgs", "kilogram", "kilograms", "kilo", "kilos"),
    "g": ("g", "г", "gm", "gms", "gram", "grams"),
    "mg": ("mg", "мг", "mgs", "milligram", "milligrams"),
    "ug": ("ug", "мкг", "mcg", "mcgs", "microgram", "micrograms"),
    "ng": ("ng", "nanogram", "nanograms"),
    "pg": ("pg", "picogram", "picograms"),
    "mol": ("mol", "моль", "mole", "moles"),
    "mmol": ("mmol", "ммоль", "mmols", "millimol", "millimole", "millimoles"),
    "umol": ("umol", "мкмоль", "mcmol", "micromol", "micromole", "micromoles"),
    "nmol": ("nmol", "nanomol", "nanomole", "nanomoles"),
    "pmol": ("pmol", "picomol", "picomole", "picomoles"),
    "meq": ("meq", "meqs", "milliequivalent", "milliequivalents"),
    "L": ("L", "л", "l", "liter", "litre", "liters", "litres", "ltr"),
    "dL": ("dl", "дл", "deciliter", "decilitre", "deciliters", "100ml", "100.ml", "(100.ml)", "1e2.ml", "100cc"),
    "mL": ("ml", "мл", "milliliter", "millilitre", "milliliters", "millilitres", "cc", "cm3", "cm^3"),
    "uL": ("ul", "mcl", "microliter", "microlitre", "microliters", "mm3", "mm^3", "cmm", "cumm", "cu.mm"),
    "min": ("min", "mins", "minute", "minutes"),
    "h": ("h", "hr", "hrs", "hour", "hours"),
    "s": ("s", "sec", "secs", "second", "seconds"),
    "d": ("d", "day", "days"),
    "U": ("U", "u", "unit", "units"),
    "[IU]": ("iu", "[iu]", "internationalunit", "internationalunits"),
    "m[IU]": ("miu", "m[iu]", "milliiu"),
    "u[IU]": ("uiu", "u[iu]", "mciu", "microiu"),
    "mU": ("mu", "munit", "munits", "milliunit", "milliunits"),
    "10*3": ("10*3", "10^3", "10e3", "1e3", "x10^3", "x10*3", "x10e3", "x10(3)", "10**3", "x10**3", "10(3)",
             "thou", "thousand", "thousands"),
    "10*6": ("10*6", "10^6", "10e6", "1e6", "x10^6", "x10*6", "x10e6", "x10(6)", "10**6", "x10**6", "10(6)",
             "mill", "mio", "million", "millions", "mpt"),
    "10*9": ("10*9", "10^9", "10e9", "1e9", "x10^9", "x10*9", "x10e9", "x10(9)", "10**9", "x10**9", "10(9)",
             "giga", "gpt"),
    "10*12": ("10*12", "10^12", "10e12", "1e12", "x10^12", "x10*12", "x10e12", "x10(12)",
              "10**12", "x10**12", "10(12)", "tera", "tpt"),
    "mm[Hg]": ("mmhg", "mm[hg]"),
    "cm[H2O]": ("cmh2o", "cm[h2o]"),
}  # fmt: skip
"""Parts of a unit: UCUM -> other spellings, without blanks, in lower case where it does not matter."""

WHOLE: dict[str, tuple[str, ...]] = {
    "[lb_av]": ("lb", "lbs", "pound", "pounds", "[lb_av]", "lb_av", "[lbs_av]", "[lb]", "lb.", "lbs."),
    "[oz_av]": ("oz", "ounce", "ounces", "[oz_av]", "oz_av"),
    "[in_i]": ("in", "inch", "inches", "[in_i]", "in_i", "[in_us]", "in."),
    "cm": ("cm", "cms", "centimeter", "centimetre", "centimeters", "centimetres"),
    "m": ("m", "meter", "metre", "meters", "metres"),
    "Cel": ("cel", "C", "degc", "deg.c", "°c", "℃", "celsius", "degreescelsius", "degreec", "degreesc"),
    "[degF]": ("[degf]", "F", "degf", "deg.f", "°f", "℉", "fahrenheit", "degreesfahrenheit", "degreef", "degreesf"),
    "%": ("%", "percent", "pct"),
    "/min": ("/min", "bpm", "{beats}/min", "beats/min", "beats/minute", "{breaths}/min", "breaths/min", "resp/min",
             "breaths/minute", "{beat}/min", "perminute", "1/min", "insp/min"),
    "mg/dL": ("mg%", "mgs%", "mg.%"),
    "g/dL": ("g/dl", "g%", "gm%", "gms%"),
    "10*9/L": ("k/ul", "k/mcl", "k/mm3", "k/mm^3", "k/cmm", "k/cumm", "k/cu.mm", "k/microliter", "/nl", "1/nl"),
    "10*12/L": ("m/ul", "m/mcl", "m/mm3", "m/mm^3", "m/cmm", "m/cumm", "m/cu.mm", "m/microliter", "/pl", "1/pl"),
    "10*6/L": ("/ul", "1/ul", "cells/ul", "{cells}/ul", "/mcl", "/mm3", "/mm^3", "/cmm", "/cumm", "/cu.mm", "cells/mm3",
               "cells/cumm", "cells/mcl"),
    "kg/m2": ("kg/m2", "kg/m^2", "kg/m**2", "kg/(m^2)", "kg/sqm"),
    "mL/min/{1.73_m2}": ("ml/min/{1.73_m2}", "ml/min/1.73m2", "ml/min/1.73m^2", "ml/min/1.73", "ml/min/1.73sqm",
                         "ml/min/[1.73_m2]", "ml/min/1.73sqm2", "ml/min/1.73_m2"),
}  # fmt: skip
"""Whole units: UCUM -> other spellings, as those of `UNIT_PARTS`."""

PLAIN_ANNOTATIONS = frozenset(
    ("cell", "cells", "beat", "beats", "breath", "breaths", "rbc", "rbcs", "wbc", "wbcs", "platelet", "platelets",
     "plt", "count", "counts", "#", "no", "number", "")
)  # fmt: skip
"""Annotations that leave a unit what it is, in lower case: they say which single things a number counts."""

OTHER_UNITS = frozenset(
    ("Mg", "Mmol", "Mmols", "Meq", "MEq", "Ml", "Mu", "MU", "MIU", "Miu", "M[IU]", "M[iu]", "Pg", "Pmol")
)
"""Parts whose first letter is mega or peta, and no milli or pico."""

EQUAL: dict[str, str] = {
    "ug/mL": "mg/L", "ng/mL": "ug/L", "pg/mL": "ng/L", "mg/mL": "g/L", "g/mL": "kg/L", "nmol/mL": "umol/L",
    "pmol/mL": "nmol/L", "umol/mL": "mmol/L", "mmol/mL": "mol/L", "10*3/uL": "10*9/L", "10*6/uL": "10*12/L",
    "10*3/mL": "10*6/L", "10*6/mL": "10*9/L",
    "u[IU]/mL": "m[IU]/L", "m[IU]/mL": "[IU]/L", "mU/mL": "U/L",
}  # fmt: skip
"""Units that are the same quantity: one -> the other."""

_PART = {spelling: unit for unit, spellings in UNIT_PARTS.items() for spelling in spellings}
_WHOLE = {spelling: unit for unit, spellings in WHOLE.items() for spelling in spellings}
_LETTERS = str.maketrans({
    "\u03bc": "u", "\u00b5": "u",  # the Greek letter and the micro sign
    "\u00d7": "x", "\u2215": "/", "\u2044": "/", "\u00ba": "\u00b0",
})  # fmt: skip
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "0123456789")
_POWER = re.compile("(?<=10)([\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079]+)")
_ANNOTATION = re.compile(r"(?<=[^/{])\{([^}]*)\}")
_PER_POWER = re.compile(r"[.\u00b7*]([^\W\d_]+)(?:\^|\*\*)?[-\u2212\u207b]1$")
_PER = re.compile(r"\bper\b", re.IGNORECASE)


@lru_cache(maxsize=65_536)
def canonical_unit(text: str) -> str:
    """The one spelling of a unit; a unit that the table does not know as it is, without outer blanks.

    Args:
        text: A unit as a source writes it.

    Example:
        >>> canonical_unit("micromol / l"), canonical_unit("mg/100mL"), canonical_unit("lbs"), canonical_unit("K/uL")
        ('umol/L', 'mg/dL', '[lb_av]', '10*9/L')
    """
    raised = _POWER.sub(lambda power: "*" + power[1].translate(_RAISED), text)
    plain = "".join(_PER.sub("/", raised.translate(_LETTERS)).translate(_RAISED).split())
    if _found(plain, _WHOLE) is not None:  # {beats}/min, mL/min/{1.73_m2}
        return _composed(plain) or text.strip()
    named = [name for name in _ANNOTATION.findall(plain) if name.casefold() not in PLAIN_ANNOTATIONS]
    if not named:
        return _composed(_ANNOTATION.sub("", plain)) or text.strip()
    # One annotation, and at the end: it stays there. Any other place may change what is meant.
    bare = plain.removesuffix(f"{{{named[0]}}}")
    made = _composed(bare) if len(named) == 1 and "{" not in bare else None
    return text.strip() if made is None else f"{made}{{{named[0].upper()}}}"


def _composed(plain: str) -> str | None:
    """A unit of the tables, or of parts; None where a part is not known."""
    whole = _found(plain, _WHOLE)
    if whole is not None:
        return EQUAL.get(whole, whole)
    parts = [_found(part, _PART) for part in _PER_POWER.sub(r"/\1", plain).split("/")]
    if None in parts:
        return None
    whole = "/".join(part for part in parts if part is not None)
    return EQUAL.get(whole, whole)


def _found(spelling: str, table: dict[str, str]) -> str | None:
    if len(spelling) == 1 or spelling in OTHER_UNITS:
        return table.get(spelling)
    return table.get(spelling.casefold())

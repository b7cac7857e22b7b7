"""Units: one spelling for what is the same unit, and no other is touched."""

import pytest

from ehrseq.data.units import EQUAL, UNIT_PARTS, WHOLE, canonical_unit


@pytest.mark.parametrize(
    ("spellings", "unit"),
    [
        (("umol/L", "\u00b5mol/L", "\u03bcmol/L", "micromol/l", "UMOL/L", "mcmol / L", "micromoles/liter"), "umol/L"),
        (("mg/dL", "mg/dl", "MG/DL", "mg/100mL", "mg/100 ml", "mg%", "mg/(100.mL)", "mg per dl"), "mg/dL"),
        (("lb", "lbs", "LBS", "pounds", "[lb_av]"), "[lb_av]"),
        (
            ("10*9/L", "10^9/L", "x10^9/l", "10\u2079/L", "10e9/L", "K/uL", "10*3/uL", "10^3/\u00b5L", "thou/mm3"),
            "10*9/L",
        ),
        (("mmHg", "mm Hg", "mm[Hg]", "MMHG"), "mm[Hg]"),
        (("Cel", "\u00b0C", "\u00baC", "degC", "C"), "Cel"),
        (("ug/L", "ng/mL", "mcg/L", "\u00b5g/l"), "ug/L"),
        (("meq/L", "mEq/L", "meq/liter"), "meq/L"),
        (("mL/min/{1.73_m2}", "mL/min/1.73m2", "ml/min/1.73 m\u00b2"), "mL/min/{1.73_m2}"),
        (("/min", "bpm", "{beats}/min", "beats/min"), "/min"),
        (("10*12/L", "M/uL", "m/uL", "10*6/uL", "x10E6/uL", "Tpt/L", "/pL"), "10*12/L"),
        (("10*9/L", "x10E3/uL", "10**9/L", "Gpt/l", "k/\u00b5l", "/nL", "K/cumm"), "10*9/L"),
        (("10*6/L", "/uL", "cells/\u00b5L", "/mm3"), "10*6/L"),
        (("ug/dL", "mcg/dL", "Mcg/dL", "\u03bcg/dl", "MCG/DL"), "ug/dL"),
        (("[degF]", "degF", "\u00b0F", "F"), "[degF]"),
        (("U/L", "u/l", "U/l", "units/L"), "U/L"),
        (("g/dL", "G/DL", "gm/dl", "g%"), "g/dL"),
        (("%", "percent"), "%"),
        (("kg/m2", "kg/m\u00b2", "kg/m^2"), "kg/m2"),
        (
            ("mmol/L", "mmol.L-1", "mmol\u00b7L\u207b\u00b9", "mmol*L^-1", "\u043c\u043c\u043e\u043b\u044c/\u043b"),
            "mmol/L",
        ),
        (("10*6/L", "{cells}/uL", "/uL{WBC}", "/uL"), "10*6/L"),
        (("mg/L{FEU}", "ug/mL{FEU}", "\u00b5g/ml{feu}", "mg/L {FEU}"), "mg/L{FEU}"),
    ],
)
def test_spellings_of_one_unit(spellings, unit):
    assert {canonical_unit(text) for text in spellings} == {unit}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mg/dL", "mg/L"),
        ("mmol/L", "umol/L"),
        ("meq/L", "mmol/L"),
        ("U/L", "[IU]/L"),
        ("Cel", "[degF]"),
        ("kg", "[lb_av]"),
        ("g/L", "g/dL"),
        ("mm", "mmol/L"),
        ("10*9/L", "10*12/L"),
        ("mg/L{FEU}", "mg/L"),  # fibrinogen equivalents: a D-dimer twice as high as in DDU
        ("mg/L{FEU}", "mg/L{DDU}"),
        ("ug/mL{FEU}", "mg/L{DDU}"),
        ("mmol/mol{Hb}", "mmol/mol{creat}"),
        ("mg/g{creat}", "mg/g"),
    ],
)
def test_units_that_differ_stay_apart(one, other):
    assert canonical_unit(one) != canonical_unit(other)


@pytest.mark.parametrize("text", ["", "score", "{INR}", "furlong/fortnight", "per high power field"])
def test_what_the_table_does_not_know_stays(text):
    assert canonical_unit(text) == text


def test_every_entry_of_the_tables_is_its_own_canonical_unit():
    for unit in [*WHOLE, *EQUAL.values(), *(unit for unit in UNIT_PARTS if not unit.startswith("10*"))]:
        assert canonical_unit(unit) == unit
    listed = [spelling for table in (UNIT_PARTS, WHOLE) for spellings in table.values() for spelling in spellings]
    for table in (UNIT_PARTS, WHOLE):
        spellings = [spelling for group in table.values() for spelling in group]
        assert len(spellings) == len(set(spellings)), "one spelling of two units"
    assert all(spelling == "".join(spelling.casefold().split()) or len(spelling) == 1 for spelling in listed)


@pytest.mark.parametrize(
    "text",
    ["K", "m/s", "k", "M", "mol/K", "MU/L", "MU", "MIU/mL", "Mg", "Mmol/L", "gr", "G/L", "S", "D", "H", "c", "f"],
)
def test_a_letter_that_is_another_unit_in_ucum_is_not_read_as_a_number_or_a_prefix(text):
    assert canonical_unit(text) == text

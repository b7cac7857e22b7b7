"""Readmission and new conditions on hand-made timelines, each worked out by hand from the definitions."""

import pytest

from tests.tasks.timelines import (
    CLINIC,
    DEATH,
    DIED_OUT,
    ED,
    ED_STAY,
    GOES_ON,
    I10,
    ICU_STAY,
    INDEX,
    OUT,
    check,
    stay,
)

# name, rows, labels {prediction time: label}, dropped {reason: n}, competing {event: n}
READMISSION = [
    (
        "readmission at exactly the horizon",
        [*INDEX, *stay("2020-02-10 12:00", "2020-02-11", "b")],
        {OUT: 1, "2020-02-11": 0},
        {},
        {},
    ),
    (
        "readmission an instant later",
        [*INDEX, *stay("2020-02-10 12:00:00.000001", "2020-02-11", "b")],
        {OUT: 0, "2020-02-11": 0},
        {},
        {},
    ),
    ("a transfer is no readmission", [*INDEX, *stay("2020-01-11 20:00", "2020-01-20", "b")], {"2020-01-20": 0}, {}, {}),
    (
        "a start at the discharge instant is no readmission",
        [*INDEX, *stay(OUT, "2020-01-20", "b")],
        {"2020-01-20": 0},
        {},
        {},
    ),
    (
        "the next day is a readmission",
        [*INDEX, *stay("2020-01-12", "2020-01-20", "b")],
        {OUT: 1, "2020-01-20": 0},
        {},
        {},
    ),
    ("overlapping admissions are one", [*INDEX, *stay("2020-01-05", "2020-01-15", "b")], {"2020-01-15": 0}, {}, {}),
    ("an admission within another", [*INDEX, *stay("2020-01-05", "2020-01-06", "b")], {OUT: 0}, {}, {}),
    (
        "three in a chain",
        [*INDEX, *stay("2020-01-11 13:00", "2020-01-13", "b"), *stay("2020-01-13 23:00", "2020-01-14 08:00", "c")],
        {"2020-01-14 08:00": 0},
        {},
        {},
    ),
    (
        "an emergency visit is no readmission",
        [*INDEX, *stay("2020-01-20", "2020-01-21", "e", **ED_STAY)],
        {OUT: 0},
        {},
        {},
    ),
    (
        "a readmission through the emergency department starts with the admission",
        [
            *INDEX,
            *stay("2020-02-10 10:00", "2020-02-10 14:00", "e", **ED_STAY),
            *stay("2020-02-10 12:01", "2020-02-13", "b"),
        ],
        {OUT: 0, "2020-02-13": 0},
        {},
        {},
    ),
    (
        "an ICU child (partOf) makes no admission of its own",
        [*INDEX, *stay("2020-01-03", "2020-01-05", "a", **ICU_STAY)],
        {OUT: 0},
        {},
        {},
    ),
    (
        "an ICU child of class ACUTE, and one whose end was recorded late",
        [
            *INDEX,
            *stay("2020-01-03", "2020-01-05", "a", start_code="VISIT_START//ACUTE", end_code="VISIT_END//ACUTE"),
            *stay("2020-01-06", "2020-01-12 02:00", "a", **ICU_STAY),
        ],
        {OUT: 0},
        {},
        {},
    ),
    (
        "children of one visit_id, ends by disposition: the emergency department's comes first",
        [
            *stay("2020-01-01 02:00", "2020-01-01 13:00", "a", start_code=ED, end_code="VISIT_END//ADMITTED"),
            *stay("2020-01-01 12:00", OUT, "a", end_code="VISIT_END//HOME HEALTH CARE"),
            *stay("2020-01-10", "2020-01-12 02:00", "a", start_code="VISIT_START//ACUTE", end_code="VISIT_END//ACUTE"),
        ],
        {"2020-01-12 02:00": 0},
        {},
        {},
    ),
    (
        "an ICU encounter of its own",
        [*INDEX, *stay("2020-01-20", "2020-01-21", "i", **ICU_STAY)],
        {OUT: 0},
        {},
        {},
    ),
    ("death without readmission", [*INDEX, ("2020-01-20", DEATH)], {OUT: 0}, {}, {"death": 1}),
    ("death at exactly the horizon", [*INDEX, ("2020-02-10 12:00", DEATH)], {OUT: 0}, {}, {"death": 1}),
    ("death after the horizon", [*INDEX, ("2020-02-10 12:01", DEATH)], {OUT: 0}, {}, {}),
    (
        "readmitted, then dead",
        [*INDEX, *stay("2020-01-20", "2020-01-22", "b", end_code=DIED_OUT), ("2020-01-22", DEATH)],
        {OUT: 1},
        {"died_before_prediction": 1},
        {},
    ),
    ("readmitted and still there", [*INDEX, *stay("2020-01-20", None, "b")], {OUT: 1}, {"no_discharge": 1}, {}),
    (
        "long-term care is inpatient",
        [*INDEX, *stay("2020-01-20", "2020-01-22", "b", start_code="VISIT_START//NONAC")],
        {OUT: 1, "2020-01-22": 0},
        {},
        {},
    ),
    (
        "the same day as the end of the emergency visit, not of the admission",
        [
            *INDEX,
            *stay("2020-01-11 08:00", "2020-01-12 08:00", "e", **ED_STAY),
            *stay("2020-01-12 09:00", "2020-01-13", "b"),
        ],
        {OUT: 1, "2020-01-13": 0},
        {},
        {},
    ),
]


@pytest.mark.parametrize(
    ("rows", "expected", "dropped", "competing"), [c[1:] for c in READMISSION], ids=[c[0] for c in READMISSION]
)
def test_readmission(rows, expected, dropped, competing):
    check("readmission_30d", rows, expected, dropped, competing)


# name, rows, labels {prediction time: label}, dropped {reason: n}, competing {event: n}
NEW_CONDITION = [
    (
        "first diagnosis at the end of an admission within a year",
        [*INDEX, *stay("2020-06-01", "2020-06-04", "b"), ("2020-06-04", I10, "b")],
        {OUT: 1},
        {"earlier_code": 1},
        {},
    ),
    (
        "the admission starts at exactly the horizon, and is coded after it",
        [*INDEX, *stay("2021-01-10 12:00", "2021-02-01", "b"), ("2021-02-01", I10, "b")],
        {OUT: 1},
        {"earlier_code": 1},
        {},
    ),
    (
        "the admission starts an instant after the horizon",
        [*INDEX, *stay("2021-01-10 12:00:00.000001", "2021-02-01", "b"), ("2021-02-01", I10, "b")],
        {OUT: 0},
        {"earlier_code": 1},
        {},
    ),
    ("an earlier diagnosis", [("2019-01-01", I10), *INDEX], {}, {"earlier_code": 1}, {}),
    ("a diagnosis at the very prediction time", [*INDEX, (OUT, I10, "a")], {}, {"earlier_code": 1}, {}),
    ("a static diagnosis has always been known", [(None, I10), *INDEX], {}, {"earlier_code": 1}, {}),
    (
        "a diagnosis of the index stay that is coded late",
        [*INDEX, ("2020-01-15", I10, "a"), *stay("2020-06-01", "2020-06-04", "b"), ("2020-06-04", I10, "b")],
        {OUT: 0},
        {"earlier_code": 1},
        {"code_elsewhere": 1},
    ),
    (
        "a diagnosis in an outpatient visit",
        [*INDEX, *stay("2020-03-01 09:00", "2020-03-01 10:00", "o", **CLINIC), ("2020-03-01 09:30", I10, "o")],
        {OUT: 0},
        {},
        {"code_elsewhere": 1},
    ),
    ("a diagnosis outside every visit", [*INDEX, ("2020-03-01 09:30", I10)], {OUT: 0}, {}, {"code_elsewhere": 1}),
    (
        "an outpatient diagnosis before the admission that repeats it",
        [*INDEX, ("2020-03-01", I10), *stay("2020-06-01", "2020-06-04", "b"), ("2020-06-04", I10, "b")],
        {OUT: 0},
        {"earlier_code": 1},
        {"code_elsewhere": 1},
    ),
    (
        "a diagnosis without visit_id during an admission",
        [*INDEX, *stay("2020-06-01", "2020-06-04", "b"), ("2020-06-03", I10)],
        {OUT: 1},
        {"earlier_code": 1},
        {},
    ),
    (
        "a diagnosis in the emergency department that leads to the admission",
        [
            *INDEX,
            *stay("2020-06-01 01:00", "2020-06-01 05:00", "e", **ED_STAY),
            ("2020-06-01 02:00", I10, "e"),
            *stay("2020-06-01 04:00", "2020-06-04", "b"),
        ],
        {OUT: 1},
        {"earlier_code": 1},
        {},
    ),
    (
        "a diagnosis in an emergency visit that leads nowhere",
        [*INDEX, *stay("2020-06-01 01:00", "2020-06-01 05:00", "e", **ED_STAY), ("2020-06-01 02:00", I10, "e")],
        {OUT: 0},
        {},
        {"code_elsewhere": 1},
    ),
    ("death before any diagnosis", [*INDEX, ("2020-03-01", DEATH)], {OUT: 0}, {}, {"death": 1}),
    (
        "another disease",
        [*INDEX, *stay("2020-06-01", "2020-06-04", "b"), ("2020-06-04", "DIAGNOSIS//ICD10CM//I11", "b")],
        {OUT: 0, "2020-06-04": 0},
        {},
        {},
    ),
    (
        "an admission that is still open may yet be coded",
        [*INDEX, *stay("2020-06-01", None, "b"), (None, GOES_ON, "b")],
        {},
        {"no_discharge": 1, "outcome_pending": 1},
        {},
    ),
]


@pytest.mark.parametrize(
    ("rows", "expected", "dropped", "competing"), [c[1:] for c in NEW_CONDITION], ids=[c[0] for c in NEW_CONDITION]
)
def test_new_condition(rows, expected, dropped, competing):
    check("hypertension", rows, expected, dropped, competing)


# name, task, rows, labels {prediction time: label}, dropped {reason: n}, competing {event: n}
PAPER = [
    ("the paper counts deaths in hospital", "mortality_30d_paper", [*INDEX, (OUT, DEATH)], {OUT: 1}, {}, {}),
    (
        "the paper takes the last discharge",
        "mortality_30d_paper",
        [*INDEX, *stay("2020-02-01", "2020-02-03", "b")],
        {"2020-02-03": 0},
        {"other_admission": 1},
        {},
    ),
    ("the paper's conditions look back", "hypertension_paper", [("2010-01-01", I10), *INDEX], {OUT: 1}, {}, {}),
    ("the paper's conditions look ahead", "hypertension_paper", [*INDEX, ("2029-01-01", I10)], {OUT: 1}, {}, {}),
    (
        "the paper's readmission looks at the last pair",
        "readmission_30d_paper",
        [*INDEX, *stay("2020-01-20", "2020-01-22", "b"), *stay("2021-01-20", "2021-01-22", "c")],
        {"2020-01-22": 0},
        {"other_admission": 2},
        {},
    ),
    ("the paper's long stay", "long_stay_7d_paper", INDEX, {"2020-01-02 12:00": 1}, {}, {}),
]


@pytest.mark.parametrize(
    ("task", "rows", "expected", "dropped", "competing"), [c[1:] for c in PAPER], ids=[c[0] for c in PAPER]
)
def test_paper_variants(task, rows, expected, dropped, competing):
    check(task, rows, expected, dropped, competing)

"""Mortality after discharge and length of stay on hand-made timelines, each worked out by hand from the definitions."""

import pytest

from tests.tasks.timelines import (
    DEATH,
    DIED_OUT,
    ED_STAY,
    GOES_ON,
    INDEX,
    OUT,
    check,
    stay,
)

# name, rows, labels {prediction time: label}, dropped {reason: n}, competing {event: n}
MORTALITY = [
    ("alive", INDEX, {OUT: 0}, {}, {}),
    ("death at exactly the horizon", [*INDEX, ("2020-02-10 12:00", DEATH)], {OUT: 1}, {}, {}),
    ("death an instant later", [*INDEX, ("2020-02-10 12:00:00.000001", DEATH)], {OUT: 0}, {}, {}),
    ("death an instant after discharge", [*INDEX, ("2020-01-11 12:00:00.000001", DEATH)], {OUT: 1}, {}, {}),
    ("death at the discharge instant", [*INDEX, (OUT, DEATH)], {}, {"died_before_prediction": 1}, {}),
    ("death in hospital", [*INDEX, ("2020-01-05", DEATH)], {}, {"died_before_prediction": 1}, {}),
    (
        "death known to the day, discharge says expired",
        [*stay("2020-01-01 12:00", OUT, "a", end_code=DIED_OUT), ("2020-01-11 23:59:59.999999", DEATH)],
        {},
        {"died_before_prediction": 1},
        {},
    ),
    (
        "discharge in MIMIC dated at midnight, died later that day",
        [
            ("2020-01-01 12:00", "HOSPITAL_ADMISSION//EW EMER.//EMERGENCY ROOM", "1"),
            ("2020-01-11", "HOSPITAL_DISCHARGE//DIED", "1"),
            ("2020-01-11 20:50", DEATH, None),
        ],
        {},
        {"died_before_prediction": 1},
        {},
    ),
    (
        "death known to the day, discharged home that day",
        [*INDEX, ("2020-01-11 23:59:59.999999", DEATH)],
        {OUT: 1},
        {},
        {},
    ),
    (
        "expired without a recorded death: dead at the discharge, for the stay before it as well",
        [*INDEX, *stay("2020-02-01 12:00", "2020-02-05 12:00", "b", end_code=DIED_OUT)],
        {OUT: 1},
        {"died_before_prediction": 1},
        {},
    ),
    (
        "expired in the ICU of the stay",
        [
            *INDEX,
            *stay("2020-01-03", "2020-01-11 11:00", "a", start_code="VISIT_START//ICU", end_code="VISIT_END//Expired"),
            ("2020-01-11 23:59:59.999999", DEATH),
        ],
        {},
        {"died_before_prediction": 1},
        {},
    ),
    (
        "expired in UB-04 code",
        stay("2020-01-01", "2020-01-02", "a", end_code="VISIT_END//20"),
        {},
        {"died_before_prediction": 1},
        {},
    ),
    (
        "a disposition that only looks like it",
        stay("2020-01-01 12:00", OUT, "a", end_code="VISIT_END//experimental ward"),
        {OUT: 0},
        {},
        {},
    ),
    (
        "every discharge is a row",
        [*INDEX, *stay("2020-01-20", "2020-01-25", "b"), ("2020-02-11", DEATH)],
        {OUT: 0, "2020-01-25": 1},
        {},
        {},
    ),
    (
        "an admission after the death",
        [*INDEX, ("2020-01-20 10:00", DEATH), *stay("2020-01-21 01:00", "2020-01-22", "donor")],
        {OUT: 1},
        {"admitted_after_death": 1},
        {},
    ),
    ("death without a time", [*INDEX, (None, DEATH)], {}, {"death_time_unknown": 1}, {}),
    ("two deaths: the first counts", [*INDEX, ("2020-01-30", DEATH), ("2021-01-30", DEATH)], {OUT: 1}, {}, {}),
    ("no admission", stay("2020-01-01", "2020-01-02", **ED_STAY), {}, {}, {}),
    ("open admission", stay("2020-01-01", None, "a"), {}, {"no_discharge": 1}, {}),
    (
        "open admission and a death: died in it",
        [*stay("2020-01-01", None, "a"), ("2020-01-04", DEATH)],
        {},
        {"died_before_prediction": 1},
        {},
    ),
    (
        "an end never recorded swallows nothing",
        [*stay("2019-01-01", None, "old"), *INDEX],
        {OUT: 0},
        {"no_discharge": 1},
        {},
    ),
    (
        "null visit ids",
        [*stay("2020-01-01", "2020-01-04"), *stay("2020-03-01", "2020-03-04")],
        {"2020-01-04": 0, "2020-03-04": 0},
        {},
        {},
    ),
]


@pytest.mark.parametrize(
    ("rows", "expected", "dropped", "competing"), [c[1:] for c in MORTALITY], ids=[c[0] for c in MORTALITY]
)
def test_mortality(rows, expected, dropped, competing):
    check("mortality_30d", rows, expected, dropped, competing)


# name, rows, labels {prediction time: label}, dropped {reason: n}, competing {event: n}
LENGTH_OF_STAY = [
    ("168 hours exactly", stay("2020-01-01 12:00", "2020-01-08 12:00", "a"), {"2020-01-02 12:00": 0}, {}, {}),
    (
        "an instant over 168 hours",
        stay("2020-01-01 12:00", "2020-01-08 12:00:00.000001", "a"),
        {"2020-01-02 12:00": 1},
        {},
        {},
    ),
    ("24 hours exactly", stay("2020-01-01 12:00", "2020-01-02 12:00", "a"), {}, {"stay_ended": 1}, {}),
    (
        "an instant over 24 hours",
        stay("2020-01-01 12:00", "2020-01-02 12:00:00.000001", "a"),
        {"2020-01-02 12:00": 0},
        {},
        {},
    ),
    (
        "death in hospital before 168 hours",
        [*stay("2020-01-01 12:00", "2020-01-05 12:00", "a", end_code=DIED_OUT), ("2020-01-05 12:00", DEATH)],
        {"2020-01-02 12:00": 0},
        {},
        {"death": 1},
    ),
    (
        "death in hospital, discharge recorded after 168 hours",
        [*INDEX, ("2020-01-05 12:00", DEATH)],
        {"2020-01-02 12:00": 0},
        {},
        {"death": 1},
    ),
    (
        "death in hospital at exactly 168 hours",
        [*INDEX, ("2020-01-08 12:00", DEATH)],
        {"2020-01-02 12:00": 0},
        {},
        {"death": 1},
    ),
    ("death in hospital after 168 hours", [*INDEX, ("2020-01-09", DEATH)], {"2020-01-02 12:00": 1}, {}, {}),
    (
        "death at home before 168 hours competes with nothing",
        [*stay("2020-01-01 12:00", "2020-01-05 12:00", "a"), ("2020-01-06", DEATH)],
        {"2020-01-02 12:00": 0},
        {},
        {},
    ),
    (
        "death at exactly the prediction time",
        [*INDEX, ("2020-01-02 12:00", DEATH)],
        {},
        {"died_before_prediction": 1},
        {},
    ),
    (
        "death within 24 hours, known to the day",
        [*stay("2020-01-01 00:30", "2020-01-01 20:00", "a", end_code=DIED_OUT), ("2020-01-01 23:59:59.999999", DEATH)],
        {},
        {"died_before_prediction": 1},
        {},
    ),
    (
        "in progress, as the source says: long once 168 hours have passed",
        [*stay("2020-01-01 12:00", None, "a"), (None, GOES_ON, "a")],
        {"2020-01-02 12:00": 1},
        {},
        {},
    ),
    (
        "open admission with a death before 168 hours",
        [*stay("2020-01-01 12:00", None, "a"), ("2020-01-04", DEATH)],
        {"2020-01-02 12:00": 0},
        {},
        {"death": 1},
    ),
    (
        "an end never recorded tells no length",
        [*stay("2019-01-01", None, "old"), *INDEX],
        {"2020-01-02 12:00": 1},
        {"no_discharge": 1},
        {},
    ),
    (
        "a transfer on the day of the discharge goes on, from the first start",
        [*stay("2020-01-01 12:00", "2020-01-04 09:00", "a"), *stay("2020-01-04 23:59", "2020-01-09", "b")],
        {"2020-01-02 12:00": 1},
        {},
        {},
    ),
    (
        "the emergency department does not count into the stay",
        [
            *stay("2020-01-01 02:00", "2020-01-01 13:00", "e", **ED_STAY),
            *stay("2020-01-01 12:00", "2020-01-08 12:00", "a"),
        ],
        {"2020-01-02 12:00": 0},
        {},
        {},
    ),
]


@pytest.mark.parametrize(
    ("rows", "expected", "dropped", "competing"), [c[1:] for c in LENGTH_OF_STAY], ids=[c[0] for c in LENGTH_OF_STAY]
)
def test_length_of_stay(rows, expected, dropped, competing):
    check("long_stay_7d", rows, expected, dropped, competing)

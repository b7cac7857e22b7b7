"""The triplet view: its windows and cuts, against hand-made records and against the single-patient path."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ehrseq.data import load_physionet2012, read_meds
from ehrseq.data.simulate.stays import simulate_stays
from ehrseq.encode.triplets import (
    PHYSIONET2012,
    StaticFeature,
    TripletSpec,
    build_triplets,
    select_variables,
    variable_units,
)
from ehrseq.tokenization.ehr_sequence import read_patient
from ehrseq.tokenization.triplet_stays import read_stay
from tests.encode.triplet_samples import SPEC, START, at, event, labels, random_records, table

RECORD = [
    event(-24 * 365.25 * 40, "MEDS_BIRTH"),
    event(None, "GENDER//M"),
    event(-30, "VITAL//HR", 50),  # before the admission
    event(0, "VISIT_START//IMP"),
    event(0, "VITAL//T", 37),
    event(0, "VITAL//HR", 80),
    event(1, "VITAL//PULSE", 82),  # another code of the same variable
    event(1, "VITAL//PULSE", 82),  # repeated
    event(1, "VITAL//PULSE", 81),  # another value at the same minute
    event(2.5, "LAB//K", 4),
    event(2.5, "LAB//OTHER", 4),  # no variable
    event(3, "LAB//K", None),  # no value
    event(4, "VITAL//HEIGHT", 180),
    event(10, "LAB//K", 5),
    event(24, "VITAL//HR", 90),  # the last minute of the window
    event(24.1, "VITAL//HR", 91),
]


def stay(built, number=0):
    row = built.row(number)
    return list(zip(row["times"].tolist(), row["variables"].tolist(), row["values"].tolist(), strict=True))


def test_a_window_from_the_admission():
    built = build_triplets(table({7: RECORD}), SPEC)
    assert built.subject_ids.tolist() == [7]
    assert built.starts.astype("datetime64[us]").tolist() == [START]
    assert stay(built) == [
        (0.0, 0, 80.0),
        (0.0, 2, 37.0),
        (60.0, 0, 81.0),
        (60.0, 0, 82.0),
        (150.0, 1, 4.0),
        (600.0, 1, 5.0),
        (1440.0, 0, 90.0),
    ]
    assert SPEC.static_columns == [
        "age",
        "age missing",
        "sex=GENDER//M",
        "sex missing",
        "height",
        "height missing",
        "unit=UNIT//A",
        "unit=UNIT//B",
    ]
    np.testing.assert_allclose(built.static, [[40, 0, 1, 0, 180, 0, np.nan, np.nan]], rtol=1e-6)
    assert built.skipped == {"repeated triplets": 1, "numeric rows of codes that are no variable": 1}


def test_nothing_later_than_the_prediction_time_enters():
    asked = labels([(7, 2.5, True), (7, 3.9, False), (7, 100, True)])
    built = build_triplets(table({7: RECORD}), SPEC, asked)
    assert [len(stay(built, number)) for number in range(3)] == [5, 5, 7]
    assert built.labels.tolist() == [1, 0, 1]
    assert np.isnan(built.static[1, 4])  # the height comes at hour 4
    assert built.static[2, 4] == 180
    # Whatever happens later makes no difference.
    later = [*[row for row in RECORD if row["time"] is None or row["time"] <= at(2.5)], event(2.6, "VITAL//HR", 1e6)]
    again = build_triplets(table({7: later}), SPEC, asked.head(1))
    assert stay(again) == stay(built)
    np.testing.assert_array_equal(again.static[0], built.static[0])


@pytest.mark.parametrize(
    ("settings", "first", "number"),
    [({"window_start": "first_event"}, -30, 1), ({"window_start": "before_prediction"}, -21, 5)],
)
def test_other_windows(settings, first, number):
    spec = TripletSpec.from_dict({**SPEC.to_dict(), **settings})
    built = build_triplets(table({7: RECORD}), spec, labels([(7, 3, True)]))
    assert built.starts.astype("datetime64[us]").tolist() == [START + timedelta(hours=first)]
    assert len(stay(built)) == number


def test_the_latest_admission_before_the_prediction_counts():
    record = [
        event(0, "VISIT_START//IMP"),
        event(50, "VISIT_START//IMP"),
        event(1, "LAB//K", 1),
        event(51, "LAB//K", 2),
    ]
    asked = labels([(1, 40, True), (1, 60, False), (1, -1, True), (2, 0, True)])
    built = build_triplets(table({1: record}), SPEC, asked)
    assert [stay(built, number) for number in range(2)] == [[(60.0, 1, 1.0)], [(60.0, 1, 2.0)]]
    assert built.skipped["labels without a window that begins before them"] == 1
    assert built.skipped["labels of subjects without events"] == 1
    assert len(build_triplets(table({1: record}), SPEC)) == 2  # without labels, each admission is a stay


def test_stays_without_triplets_are_left_out_and_counted():
    records = {1: [event(0, "VISIT_START//IMP")], 2: [event(0, "VISIT_START//IMP"), event(1, "LAB//K", 4)]}
    built = build_triplets(table(records), SPEC)
    assert built.subject_ids.tolist() == [2]
    assert built.skipped["stays without a triplet"] == 1
    assert build_triplets(table(records), SPEC, keep_empty=True).lengths.tolist() == [0, 1]


@pytest.mark.parametrize("start", ["code", "first_event", "before_prediction"])
def test_the_single_patient_path_gives_the_same(start):
    spec = TripletSpec.from_dict({**SPEC.to_dict(), "window_start": start})
    records = random_records(60, seed=2)
    rng = np.random.default_rng(5)
    asked = labels([(subject, float(rng.uniform(0, 130)), True) for subject in records for _ in range(3)])
    built = build_triplets(table(records), spec, asked, keep_empty=True)
    found = 0
    for subject, time in asked.select("subject_id", "prediction_time").iter_rows():
        events, _ = read_patient({"events": records[subject]})
        cut = int((time - type(time)(1970, 1, 1)) / timedelta(microseconds=1))
        at_row = (built.subject_ids == subject) & (built.prediction_times.astype(np.int64) == cut)
        if not at_row.any():
            with pytest.raises(ValueError, match="no window begins"):
                read_stay(events, spec, cut)
            continue
        alone, row = read_stay(events, spec, cut), built.row(int(np.flatnonzero(at_row)[0]))
        np.testing.assert_array_equal(alone.minutes, row["times"])
        np.testing.assert_array_equal(alone.variable_ids, row["variables"])
        np.testing.assert_array_equal(alone.values, row["values"])
        np.testing.assert_allclose(alone.static, row["static"], rtol=1e-12)
        found += len(alone.minutes)
    assert found > 200


def test_only_codes_that_nothing_reads_are_unknown():
    events, _ = read_patient({"events": RECORD})
    assert read_stay(events, SPEC).unknown == {"LAB//OTHER": 1}


def test_the_challenge_is_one_preset(tmp_path: Path):
    stays = simulate_stays(50, seed=1)
    loaded = load_physionet2012(stays.write(tmp_path))
    built = build_triplets(loaded.events, PHYSIONET2012, loaded.labels)
    assert len(PHYSIONET2012.variables) == 37
    assert len(PHYSIONET2012.static_columns) == 9
    shown = stays.static["Weight"].to_numpy() != -1
    assert len(built.values) == stays.rows.height + shown.sum()
    known = stays.static["Height"].to_numpy() != -1
    np.testing.assert_allclose(built.static[known, 3], stays.static["Height"].to_numpy()[known], rtol=1e-6)
    assert np.isnan(built.static[~known, 3]).all()
    np.testing.assert_array_equal(built.static[:, 4], ~known)
    np.testing.assert_array_equal(built.static[:, 5:].argmax(1) + 1, stays.static["ICUType"].to_numpy())


def test_subsets_keep_each_stay():
    built = build_triplets(table(random_records(20, seed=4)), SPEC)
    order = np.array([5, 0, 5, 3])
    part = built.subset(order)
    for number, original in enumerate(order):
        assert stay(part, number) == stay(built, int(original))
    assert len(built.subset(built.lengths > 3)) == (built.lengths > 3).sum()
    assert set(built.of_subjects([2, 3]).subject_ids) <= {2, 3}
    with pytest.raises(ValueError, match="a mask of 2 stays"):
        built.subset(np.array([True, False]))
    with pytest.raises(IndexError):
        built.row(len(built))


def test_variables_by_prefix_and_frequency():
    events = table({1: RECORD, 2: [event(0, "LAB//K", 4), event(0, "LAB//RARE", 1)]})
    assert [name for name, _ in select_variables(events, prefixes=["LAB//"])] == ["LAB//K", "LAB//OTHER", "LAB//RARE"]
    assert [name for name, _ in select_variables(events, min_subjects=2)] == ["LAB//K"]
    assert [name for name, _ in select_variables(events, max_variables=1)] == ["VITAL//HR"]
    with pytest.raises(ValueError, match="lower the thresholds"):
        select_variables(events, prefixes=["DRUG//"])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"variables": []}, "at least one"),
        ({"variables": [("a", ["X"]), ("b", ["X"])]}, "every code once"),
        ({"variables": [("a", [])]}, "at least one"),
        ({"window_hours": 0}, "more than 0 hours"),
        ({"window_hours": "48"}, "expected a number of hours"),
        ({"window_start": "icu"}, "window_start got 'icu'"),
        ({"start_codes": "("}, "no regular expression"),
        ({"static_features": [{"name": "x", "kind": "text", "codes": ["A"]}]}, "kind got 'text'"),
        ({"static_features": [{"name": "x", "kind": "age", "codes": ["A"]}]}, "an age comes from MEDS_BIRTH"),
        ({"static_features": [{"name": "x", "kind": "numeric"}]}, "at least one, each once"),
        ({"static_features": [{"name": "x", "colour": "red"}]}, "not a description of triplets"),
        ({"static_features": [{"name": "x", "kind": "age"}] * 2}, "its own name"),
        ({"hours": 3}, "not a description of triplets"),
    ],
)
def test_bad_descriptions(change, error):
    with pytest.raises(ValueError, match=error):
        TripletSpec.from_dict({**SPEC.to_dict(), **change})
    assert TripletSpec.from_dict(SPEC.to_dict()) == SPEC


def test_bad_input():
    events = table({1: RECORD})
    with pytest.raises(ValueError, match="no stay begins"):
        build_triplets(events, TripletSpec.from_dict({**SPEC.to_dict(), "start_codes": "^ICU"}))
    with pytest.raises(ValueError, match="needs labels"):
        build_triplets(events, TripletSpec.from_dict({**SPEC.to_dict(), "window_start": "before_prediction"}))
    with pytest.raises(ValueError, match="holds a row of the 1 codes"):
        build_triplets(events, TripletSpec((("x", ("ABSENT",)),)))
    with pytest.raises(ValueError, match="label table needs"):
        build_triplets(events, SPEC, pl.DataFrame({"subject_id": [1], "boolean_value": [True]}))


def test_prediction_times_without_labels():
    built = build_triplets(table({7: RECORD}), SPEC, labels([(7, 3, True)]).drop("boolean_value"))
    assert built.labels is None
    assert len(stay(built)) == 5


def test_the_mimic_demo(ehr_data: Path):
    events = read_meds(ehr_data / "mimic-iv-demo-meds" / "0.0.1")
    spec = TripletSpec(
        select_variables(events, prefixes=["LAB//"], min_subjects=20),
        (StaticFeature("age", "age"), StaticFeature("sex", "category", ("GENDER//F", "GENDER//M"), drop_first=True)),
        window_hours=24,
        start_codes="^ICU_ADMISSION",
    )
    built = build_triplets(events, spec)
    admissions = events.filter(pl.col("code").str.starts_with("ICU_ADMISSION")).select("subject_id", "time").n_unique()
    assert len(built) + built.skipped["stays without a triplet"] == admissions == 140
    assert built.minutes.min() >= 0
    assert built.minutes.max() <= 24 * 60
    assert np.median(built.lengths) > 300
    assert (built.static[:, 0] > 17).all()
    assert set(built.static[:, 1]) == {0.0, 1.0}
    # The single-patient path, on the first stay of some patients.
    for subject in np.unique(built.subject_ids)[:5]:
        number = int(np.flatnonzero(built.subject_ids == subject)[0])
        record = events.filter(pl.col("subject_id") == subject)
        rows = record.select("time", "code", "numeric_value").to_dicts()
        read, _ = read_patient({"events": rows})
        alone = read_stay(read, spec, int(built.prediction_times[number].astype("datetime64[us]").astype(np.int64)))
        np.testing.assert_array_equal(alone.values, built.row(number)["values"])
        np.testing.assert_allclose(alone.static, built.static[number])


def test_units_of_variables_are_those_of_their_rows():
    """Two spellings of one unit are one; two units are none, and so is a unit of a row without a value."""
    rows = [
        ("VITAL//HR", 80.0, "bpm"), ("VITAL//PULSE", 81.0, "bpm"), ("LAB//K", 4.0, "mmol/L"), ("LAB//K", 4.1, "mmol/l"),
        ("VITAL//T", 37.0, "Cel"), ("VITAL//T", 98.6, "[degF]"), ("VITAL//T", 37.5, None), ("LAB//OTHER", 1.0, "g"),
    ]  # fmt: skip
    record = [{**event(1, code, value), "unit": unit} for code, value, unit in rows]
    assert variable_units(table({1: record}), SPEC) == {"hr": "bpm", "k": "mmol/L"}
    silent = [{**event(1, "VITAL//T", None), "unit": "Cel"}]
    assert variable_units(table({1: silent}), SPEC) == {}
    assert variable_units(table({1: silent}).drop("unit"), SPEC) == {}

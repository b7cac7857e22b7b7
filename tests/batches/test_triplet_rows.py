"""Rows of stays and of forecasts: against naive twins, and the same whatever the order, the workers or the run."""

import numpy as np
import pytest

from ehrseq.batches.triplet_rows import ForecastRows, TripletRows, forecast_baselines
from ehrseq.data.simulate.stays import simulate_stays
from ehrseq.encode.triplets import PHYSIONET2012, TripletSpec, build_triplets
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
from tests.encode.triplet_samples import SPEC, event, table


@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    from ehrseq.data import load_physionet2012

    loaded = load_physionet2012(simulate_stays(40, seed=2).write(tmp_path_factory.mktemp("stays")))
    built = build_triplets(loaded.events, PHYSIONET2012, loaded.labels)
    return built, HyMaTEFeatureExtractor.fit(built)


def small(record):
    built = build_triplets(table({1: [event(0, "VISIT_START//IMP"), *record]}), SPEC)
    return built, HyMaTEFeatureExtractor.fit(built)


def same(row, other):
    assert set(row) == set(other)
    for name in row:
        np.testing.assert_array_equal(row[name], other[name], err_msg=name)


def test_rows_are_those_of_the_extractor(challenge):
    built, extractor = challenge
    rows = TripletRows(built, extractor, max_length=100)
    assert len(rows) == len(built) == len(rows.lengths)
    assert rows.lengths.max() == 100
    for number in (0, 7, -1):
        expected = extractor(built.row(number), max_length=100)
        row = rows[number]
        assert row.pop("labels") == built.labels[number]
        same(row, {name: expected[name] for name in row})
    with pytest.raises(IndexError):
        rows[len(built)]


def test_what_is_random_depends_on_seed_epoch_and_row_alone(challenge):
    built, extractor = challenge
    settings = {"max_length": 60, "truncation": "random", "variable_dropout": 0.2, "seed": 3}
    rows, again = TripletRows(built, extractor, **settings), TripletRows(built, extractor, **settings)
    drawn = [rows[number] for number in range(10)]
    for number in reversed(range(10)):
        same(again[number], drawn[number])
    rows.set_epoch(1)
    assert any(rows[k]["values"].tolist() != drawn[k]["values"].tolist() for k in range(10))
    rows.set_epoch(0)
    same(rows[4], drawn[4])
    other = TripletRows(built, extractor, **{**settings, "seed": 4})
    assert any(other[k]["values"].tolist() != drawn[k]["values"].tolist() for k in range(10))
    for row in drawn:
        assert len(row["times"]) <= 60
        assert (np.diff(row["times"]) >= 0).all()


def naive_targets(built, extractor, stay, t1, horizons):
    """Labels and mask as dictionaries, by walking over the stay."""
    row, found = built.row(stay), {}
    scaled = extractor.normalise(row["variables"], row["values"])
    begin = t1
    for number, end in enumerate(horizons):
        for minute, variable, value in zip(row["times"], row["variables"], scaled, strict=True):
            if begin < minute <= t1 + end:
                found.setdefault(number * extractor.num_variables + int(variable), value)
        begin = t1 + end
    return found


@pytest.mark.parametrize("horizons", [(120.0,), (60.0, 120.0, 720.0)])
def test_forecast_targets_are_the_first_values_behind_the_input(challenge, horizons):
    built, extractor = challenge
    rows = ForecastRows(built, extractor, horizons=horizons, seed=1)
    some = 0
    for epoch in range(3):
        rows.set_epoch(epoch)
        for number in range(len(rows)):
            row, t1, stay = rows[number], rows.last_minute_of_input(number), int(rows.stays[number])
            minutes = built.row(stay)["times"]
            assert t1 in minutes
            assert 720 <= t1 < minutes[-1]
            assert len(row["times"]) == (minutes <= t1).sum()
            assert extractor.minutes_of(row["times"])[-1] == pytest.approx(t1, abs=1e-3)
            expected = naive_targets(built, extractor, stay, t1, horizons)
            assert row["labels"].shape == row["label_mask"].shape == (37 * len(horizons),)
            assert {int(k): row["labels"][k] for k in np.flatnonzero(row["label_mask"])} == expected
            assert (row["labels"][row["label_mask"] == 0] == 0).all()
            some += len(expected)
    assert some > 500


def test_the_last_observation_is_a_target_and_never_an_input():
    built, extractor = small([event(1, "LAB//K", 3), event(13, "VITAL//HR", 80), event(14, "LAB//K", 5)])
    rows = ForecastRows(built, extractor)
    for epoch in range(5):
        rows.set_epoch(epoch)
        assert rows.last_minute_of_input(0) == 13 * 60
        row = rows[0]
        assert row["variable_ids"].tolist() == [1, 0]
        assert row["label_mask"].tolist() == [0, 1, 0]
        np.testing.assert_array_equal(row["labels"][1:2], extractor.normalise(np.array([1]), np.array([5.0])))


def test_the_target_window_is_open_at_its_start_and_closed_at_its_end():
    record = [event(hour, "LAB//K", hour) for hour in (12, 14, 14.01)]
    built, extractor = small(record)
    rows = ForecastRows(built, extractor)
    for epoch in range(20):
        rows.set_epoch(epoch)
        at_noon = rows.last_minute_of_input(0) == 720
        expected = 14 if at_noon else 14.01  # exactly 120 minutes later still counts
        np.testing.assert_allclose(extractor.denormalise(np.array([1]), rows[0]["labels"][1:2]), expected, rtol=1e-4)


def test_every_minute_is_drawn_alike():
    built, extractor = small([event(hour, "LAB//K", hour) for hour in (1, 12, 13, 13, 13, 15, 20)])
    rows = ForecastRows(built, extractor)
    drawn = []
    for epoch in range(3000):
        rows.set_epoch(epoch)
        drawn.append(rows.last_minute_of_input(0))
    minutes, counts = np.unique(drawn, return_counts=True)
    assert minutes.tolist() == [720, 780, 900]
    assert counts.min() > 3000 / 3 - 4 * np.sqrt(3000 * 2 / 9)


def test_validation_has_fixed_times(challenge):
    built, extractor = challenge
    fixed = ForecastRows(built, extractor, epochs=2, seed=1)
    training = ForecastRows(built, extractor, seed=1)
    assert len(fixed) == 2 * len(training) == len(fixed.lengths) == len(fixed.subject_ids)
    first = fixed[3]
    fixed.set_epoch(5)
    same(fixed[3], first)
    same(training[3], first)
    training.set_epoch(1)
    same(fixed[3 + len(training)], training[3])


def test_short_stays_make_no_forecast_and_are_counted(challenge):
    records = {
        1: [event(0, "VISIT_START//IMP"), event(1, "LAB//K", 4), event(2, "LAB//K", 4)],  # ends before 12 hours
        2: [event(0, "VISIT_START//IMP"), event(1, "LAB//K", 4), event(13, "LAB//K", 5)],  # nothing behind hour 13
        3: [event(0, "VISIT_START//IMP"), event(13, "LAB//K", 4), event(20, "LAB//K", 5)],  # nothing within 2 hours
    }
    built = build_triplets(table(records), SPEC)
    extractor = HyMaTEFeatureExtractor.fit(built)
    rows = ForecastRows(built, extractor)
    assert (len(rows), rows.skipped, rows.stays.tolist()) == (1, 2, [2])
    assert rows[0]["label_mask"].sum() == 0
    with pytest.raises(ValueError, match="no target is observed"):
        forecast_baselines(rows)
    with pytest.raises(ValueError, match="lower first_minute"):
        ForecastRows(built.subset([0]), extractor)


def test_carrying_the_last_value_forward(challenge):
    built, extractor = challenge
    rows = ForecastRows(built, extractor, epochs=2)
    found = forecast_baselines(rows)
    errors, squares = [], []
    for number in range(len(rows)):
        stay, t1 = int(rows.stays[number % len(rows.stays)]), rows.last_minute_of_input(number)
        row = built.row(stay)
        scaled = extractor.normalise(row["variables"], row["values"])
        for variable, value in naive_targets(built, extractor, stay, t1, (120.0,)).items():
            before = scaled[(row["times"] <= t1) & (row["variables"] == variable)]
            errors.append((float(value) - (float(before[-1]) if len(before) else 0.0)) ** 2)
            squares.append(float(value) ** 2)
    assert found["targets"] == len(errors)
    assert found["last_value"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert found["mean"] == pytest.approx(np.mean(squares), rel=1e-5)
    assert found["last_value"] < found["mean"]


def test_triplets_of_variables_never_fitted_are_dropped_and_counted():
    built, _ = small([event(1, "LAB//K", 3), event(2, "VITAL//HR", 80), event(3, "LAB//K", 5)])
    without, extractor = small([event(1, "LAB//K", 3), event(2, "LAB//K", 4)])
    rows = TripletRows(built, extractor)
    assert rows.dropped == 1
    assert rows[0]["variable_ids"].tolist() == [1, 1]
    assert TripletRows(without, extractor).dropped == 0


@pytest.mark.parametrize(
    ("rows", "settings", "error"),
    [
        (TripletRows, {"truncation": "oldest"}, "truncation got 'oldest'"),
        (TripletRows, {"max_length": 0}, "max_length got 0"),
        (TripletRows, {"variable_dropout": 1.0}, "variable_dropout got 1.0"),
        (TripletRows, {"seed": -1}, "seed got -1"),
        (TripletRows, {"auxiliary_targets": [1.0]}, "auxiliary_targets got shape"),
        (ForecastRows, {"horizons": ()}, "horizons got"),
        (ForecastRows, {"horizons": (120, 60)}, "ascending minutes"),
        (ForecastRows, {"epochs": 0}, "epochs got 0"),
        (ForecastRows, {"max_length": -3}, "max_length got -3"),
    ],
)
def test_bad_input(challenge, rows, settings, error):
    with pytest.raises(ValueError, match=error):
        rows(*challenge, **settings)


def test_another_extractor_is_an_error(challenge):
    other = TripletSpec(PHYSIONET2012.variables, window_hours=24)
    with pytest.raises(ValueError, match="different triplets"):
        TripletRows(challenge[0], HyMaTEFeatureExtractor.fit(small([event(1, "LAB//K", 3)])[0]))
    assert other != PHYSIONET2012


@pytest.mark.parametrize("horizons", [(120.0,), (60.0, 120.0, 720.0)])
def test_what_a_forecast_is_compared_with_is_told_as_measured(challenge, horizons):
    built, extractor = challenge
    rows = ForecastRows(built, extractor, horizons=horizons, epochs=2, seed=1)
    for number in (0, 5, len(rows) - 1):
        targets, stay = rows.targets(number), int(rows.stays[number % len(rows.stays)])
        t1, row, expected = rows.last_minute_of_input(number), built.row(stay), np.full(targets.shape, np.nan)
        for window, (begin, end) in enumerate(zip((0.0, *horizons), horizons, strict=False)):
            for minute, variable, value in zip(row["times"], row["variables"], row["values"], strict=True):
                if t1 + begin < minute <= t1 + end and np.isnan(expected[window, variable]):
                    expected[window, variable] = value
        np.testing.assert_array_equal(targets, expected)


def test_measurements_that_can_be_a_target_are_counted():
    """Times of forecasts: 700 is too early, and 900 the last, with nothing behind it. So 730, 800 and 845 remain."""
    minutes = {0: "LAB//K", 700: "VITAL//HR", 730: "LAB//K", 800: "VITAL//HR", 845: "LAB//K", 900: "VITAL//HR"}
    built, extractor = small([event(minute / 60, code, 1.0 + minute) for minute, code in minutes.items()])
    counts = ForecastRows(built, extractor, horizons=(60.0, 120.0)).possible_targets()
    # (730, 790], (800, 860], (845, 905] hold K at 845 and HR at 900; (790, 850], (860, 920] both and HR at 800.
    assert dict(zip(extractor.variables, counts.T.tolist(), strict=True)) == {"hr": [1, 2], "k": [1, 1], "temp": [0, 0]}

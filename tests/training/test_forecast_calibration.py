"""Intervals of forecasts: the quantile by hand, its promise by simulation, the fit against a naive twin."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForPreTraining

from ehrseq.batches.triplet_rows import FIRST_MINUTE, ForecastRows
from ehrseq.training import calibrate_stay_forecasts
from ehrseq.training.forecast_calibration import ALPHAS, conformal_quantile, misses
from tests.checkpoints.forecaster import UNITS, make_forecaster

INF = float("inf")


@pytest.fixture(scope="module")
def made():
    return make_forecaster(horizons=(120.0, 480.0))


@pytest.mark.parametrize(
    ("scores", "alpha", "expected"),
    [
        ([3.0, 1.0, 2.0], 0.5, 2.0),  # rank ceil(0.5 * 4) = 2
        ([3.0, 1.0, 2.0], 0.25, 3.0),  # rank 3
        ([3.0, 1.0, 2.0], 0.2, None),  # rank ceil(3.2) = 4 of 3
        (range(1, 10), 0.1, 9.0),  # the least number for 90 %
        (range(1, 9), 0.1, None),
        (range(1, 10), 0.7, 3.0),  # 0.3 * 10 in binary is above 3
        ([1.0] * 9 + [INF], 0.1, None),  # rank 10: nothing finite holds
        ([1.0] * 18 + [INF], 0.1, 1.0),  # rank 18
        ([], 0.5, None),
    ],
)
def test_the_quantile_by_hand(scores, alpha, expected):
    quantile = conformal_quantile(list(scores), alpha)
    assert np.isnan(quantile) if expected is None else quantile == expected


@pytest.mark.parametrize(
    ("scores", "alpha", "message"),
    [([1.0], 0.0, "alpha got 0.0"), ([1.0], 1.0, "alpha got 1.0"), ([1.0, float("nan")], 0.5, "1 of 2 scores are NaN")],
)
def test_what_has_no_quantile_is_refused(scores, alpha, message):
    with pytest.raises(ValueError, match=message):
        conformal_quantile(scores, alpha)


@pytest.mark.parametrize(("size", "alpha"), [(19, 0.1), (30, 0.2), (9, 0.5)])
def test_the_promise_holds_at_a_finite_size(size, alpha):
    """Skewed scores, 20,000 times calibrated and asked: coverage is ceil((1 - alpha)(n + 1)) / (n + 1), exactly."""
    rng = np.random.default_rng(0)
    draws = rng.lognormal(sigma=2.0, size=(20_000, size + 1))
    inside = np.mean([new <= conformal_quantile(scores, alpha) for *scores, new in draws])
    exact = np.ceil(round((1 - alpha) * (size + 1), 9)) / (size + 1)
    assert exact >= 1 - alpha
    assert abs(inside - exact) < 4 * np.sqrt(exact * (1 - exact) / len(draws))


def naive_scores(made, seed=0):
    """(group, window, variable) -> scores, stay by stay."""
    model, extractor = made.model, made.extractor
    rows = ForecastRows(made.tuning, extractor, horizons=(120.0, 480.0), epochs=1, seed=seed + 0x5EED)
    scores: dict[tuple[str, int, int], list[float]] = {}
    for row in range(len(rows)):
        stay = made.tuning.row(int(rows.stays[row]))
        t1 = rows.last_minute_of_input(row)
        known = stay["times"] <= t1
        given = {name: stay[name][known] for name in ("times", "variables", "values")} | {"static": stay["static"]}
        predictions = model(**extractor([given], return_tensors="pt")).predictions[0].detach().numpy()
        for window, (begin, end) in enumerate(((0, 120), (120, 480))):
            asked = (stay["times"] > t1 + begin) & (stay["times"] <= t1 + end)
            for variable in set(stay["variables"][asked].tolist()):
                value = stay["values"][asked & (stay["variables"] == variable)][0]
                low, high = extractor.value_lower[variable], extractor.value_upper[variable]
                mean, deviation = extractor.value_means[variable], extractor.value_deviations[variable]
                forecast = min(max(predictions[window, variable] * deviation + mean, low), high)
                group = "measured" if variable in given["variables"] else "new"
                score = abs(value - forecast) if low <= value <= high else INF
                scores.setdefault((group, window, variable), []).append(score)
    return scores


def test_half_widths_are_those_of_a_naive_twin(made):
    calibration = made.model.config.read_calibration()
    scores = naive_scores(made)
    assert calibration.alphas == list(ALPHAS)
    for place, group in enumerate(("new", "measured")):
        for window in range(2):
            for variable in range(4):
                own = scores.get((group, window, variable), [])
                assert calibration.counts[place, window, variable] == len(own)
                for alpha in ALPHAS:
                    width = calibration.at(alpha)[place, window, variable]
                    np.testing.assert_allclose(width, conformal_quantile(own, alpha), rtol=1e-4)
    assert calibration.counts[1].max() > 20
    assert np.isnan(calibration.at(0.1)).any()


def test_what_the_config_says_beside_the_widths(made):
    calibration = made.model.config.read_calibration()
    assert calibration.variables == tuple(made.extractor.variables)
    assert calibration.horizons == (120.0, 480.0)
    assert calibration.first_minute == FIRST_MINUTE
    assert calibration.units == UNITS
    learnt = ForecastRows(made.train, made.extractor, horizons=(120.0, 480.0)).possible_targets()
    np.testing.assert_array_equal(calibration.learnt, learnt)
    assert learnt[:, made.extractor.variables.index("never")].tolist() == [0, 0]


def test_one_stay_of_a_subject_counts(made):
    """Stays of one patient are alike: ten of them are not ten strangers."""
    few = replace(made.tuning, subject_ids=made.tuning.subject_ids % 10)
    model = copy.deepcopy(made.model)
    calibration = calibrate_stay_forecasts(model, made.extractor, few, made.train, horizons=(120.0, 480.0))
    assert 1 <= calibration.counts.sum(0).max() <= 10


def test_a_saved_model_keeps_them(made, tmp_path):
    made.model.save_pretrained(tmp_path)
    again = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert again.config.read_calibration().to_dict() == made.model.config.forecast_calibration
    assert json.loads((tmp_path / "config.json").read_text())["forecast_calibration"]["units"] == UNITS


def test_a_value_outside_of_the_training_range_lies_in_no_interval(made):
    upper = np.asarray(made.extractor.value_upper)
    values = np.zeros((1, 4))
    targets = np.stack([upper + 1, np.full(4, np.nan)])
    scores = misses(made.extractor, values, targets)
    assert np.isinf(scores[0]).all()
    assert np.isnan(scores[1]).all()


BAD = {
    "other horizons": ({"horizons": (120.0,)}, r"horizons got \(120.0,\); the model has 2"),
    "no share": ({"horizons": (120.0, 480.0), "alphas": [2.0]}, "alpha got 2.0"),
    "short stays": ({"horizons": (120.0, 480.0), "tuning": "short"}, "lower first_minute"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_calibrated_is_refused(made, case):
    options, message = BAD[case]
    tuning = made.tuning
    if options.pop("tuning", None):
        tuning = made.tuning.subset(made.tuning.minutes[made.tuning.offsets[1:] - 1] < 600)
    with pytest.raises(ValueError, match=message):
        calibrate_stay_forecasts(made.model, made.extractor, tuning, made.train, **options)

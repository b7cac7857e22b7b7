"""Errors and coverage of the forecasts of values, against loops over stays."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ehrseq import HyMaTEConfig, HyMaTEFeatureExtractor, HyMaTEForPreTraining
from ehrseq.batches.triplet_rows import ForecastRows
from ehrseq.data.physionet2012.reader import load_physionet2012
from ehrseq.data.simulate.stays import simulate_stays
from ehrseq.encode.triplets import PHYSIONET2012, build_triplets
from ehrseq.forecasting.value_evaluation import VALUE_FORECASTS, evaluate_stay_forecasts, evaluate_stays
from ehrseq.pipelines.stay_forecasts import StayForecaster
from ehrseq.training import calibrate_stay_forecasts
from tests.checkpoints.forecaster import SPEC, events_of, make_forecaster
from tests.checkpoints.stays import make_stay

HORIZONS = (120.0, 480.0)


@pytest.fixture(scope="module")
def made():
    return make_forecaster(HORIZONS, stays=150)


@pytest.fixture(scope="module")
def others():
    return build_triplets(events_of([make_stay(number) for number in range(1000, 1100)]), SPEC)


def naive(made, table, seed):
    """(window, variable) -> [(truth, forecast, last or mean, interval)], stay by stay, by the answers of each."""
    forecaster = StayForecaster(made.model, made.extractor)
    rows = ForecastRows(table, made.extractor, horizons=HORIZONS, epochs=1, seed=seed)
    means = made.extractor.value_means
    lower, upper = made.extractor.value_lower, made.extractor.value_upper
    asked: dict[tuple[int, int], list[tuple[float, ...]]] = {}
    for number in range(len(rows)):
        stay, t1 = table.row(int(rows.stays[number])), rows.last_minute_of_input(number)
        known = stay["times"] <= t1
        given = {name: stay[name][known] for name in ("times", "variables", "values")} | {"static": stay["static"]}
        row = forecaster.rows(given)
        about = row.pop("stay")
        with torch.no_grad():
            answers = forecaster.answer(made.model(**row).predictions, about)["values"]
        for window, (begin, end) in enumerate(((0, 120), (120, 480))):
            for variable in range(4):
                later = (stay["times"] > t1 + begin) & (stay["times"] <= t1 + end) & (stay["variables"] == variable)
                if later.any():
                    answer = answers[window * 4 + variable]
                    last = means[variable] if answer["last_value"] is None else answer["last_value"]
                    last = min(max(last, lower[variable]), upper[variable])
                    bounds = (answer["low"], answer["high"])
                    asked.setdefault((window, variable), []).append(
                        (float(stay["values"][later][0]), answer["value"], last, *bounds)
                    )
    return asked


def test_errors_and_coverage_are_those_of_a_loop(made, others):
    report = evaluate_stays(StayForecaster(made.model, made.extractor), others, seed=4)
    asked = naive(made, others, 4)
    entries = {(entry.horizon, entry.variable): entry for entry in report.variables}
    assert len(entries) == len(asked) == 6
    extractor, standard = made.extractor, {0: [], 1: []}
    for (window, variable), rows in asked.items():
        entry = entries[("2h", "2h-8h")[window], extractor.variables[variable]]
        low, high = extractor.value_lower[variable], extractor.value_upper[variable]
        off = {who: [] for who in VALUE_FORECASTS}
        inside, widths = [], []
        for truth, value, last, bottom, top in rows:
            clipped = min(max(truth, low), high)
            for who, forecast in zip(VALUE_FORECASTS, (value, last, extractor.value_means[variable]), strict=True):
                off[who].append(forecast - clipped)
            if bottom is not None:
                inside.append(bottom <= truth <= top)
                widths.append(top - bottom)
        assert entry.targets == len(rows)
        for who, errors in off.items():
            assert entry.rmse[who] == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(errors)), rel=1e-4)
            assert entry.mae[who] == pytest.approx(sum(map(abs, errors)) / len(errors), rel=1e-4)
        assert entry.intervals == len(inside)
        if inside:
            assert entry.coverage == pytest.approx(sum(inside) / len(inside))
            assert entry.width == pytest.approx(sum(widths) / len(widths), rel=1e-4)
        deviation = extractor.value_deviations[variable]
        assert entry.deviation == deviation
        standard[window] += [error / deviation for error in off["model"]]
    for window, together in enumerate(report.together):
        assert together.targets == len(standard[window])
        assert together.rmse["model"] == pytest.approx(np.sqrt(np.mean(np.square(standard[window]))), rel=1e-4)
    assert report.stays + report.skipped == len(others)
    assert report.not_forecast == {}


def test_intervals_cover_other_stays_at_their_rate(made):
    """A model that has learnt nothing has wide intervals, and they hold all the same."""
    table = build_triplets(events_of([make_stay(number) for number in range(2000, 3200)]), SPEC)
    for alpha in (0.2, 0.5):
        report = evaluate_stays(StayForecaster(made.model, made.extractor, alpha=alpha), table)
        (_, entry) = report.together
        assert entry.intervals > 300
        # 5 standard errors of the stays asked, and of about as many tuning stays
        assert abs(entry.coverage - (1 - alpha)) < 5 * math.sqrt(alpha * (1 - alpha) * (1 / 300 + 1 / 100))
        assert entry.coverage > 1 - alpha - 0.08


def test_values_of_a_variable_that_was_never_learnt_are_counted(made, others):
    model = copy.deepcopy(made.model)
    for window in range(2):
        model.config.forecast_calibration["learnt"][window][1] = 0
    report = evaluate_stays(StayForecaster(model, made.extractor), others)
    asked = sum(len(rows) for (_, variable), rows in naive(made, others, 0).items() if variable == 1)
    assert report.not_forecast == {"heart rate": asked}
    assert not [entry for entry in report.variables if entry.variable == "heart rate"]
    assert f"Never learnt, so not forecast: heart rate {asked}." in report.to_markdown()


def test_a_report_is_a_table_and_a_dictionary(made, others):
    report = evaluate_stays(StayForecaster(made.model, made.extractor), others)
    json.dumps(report.to_dict())
    lines = report.to_markdown().splitlines()
    assert lines[0].count("|") == lines[1].count("|")
    assert all(line.count("|") == lines[0].count("|") for line in lines[: 2 + 2 + 6])
    assert lines[2].startswith("| all | 2h | ")
    assert "| heart rate (bpm) | 2h | " in "\n".join(lines)
    bare = replace(report.variables[0], intervals=0, coverage=None, coverage_error=None, width=None)
    assert "no interval" in replace(report, variables=(bare,)).to_markdown()


def test_stays_of_a_dataset_are_asked(tmp_path):
    loaded = load_physionet2012(simulate_stays(60, seed=2).write(tmp_path / "challenge"))
    loaded.write(tmp_path / "dataset")
    table = build_triplets(loaded.events, PHYSIONET2012)
    extractor = HyMaTEFeatureExtractor.fit(table)
    sizes = {"num_variables": extractor.num_variables, "num_static": extractor.num_static}
    model = HyMaTEForPreTraining(HyMaTEConfig(hidden_size=8, num_mamba_layers=0, num_attention_heads=2, **sizes))
    calibrate_stay_forecasts(model, extractor, table, table)
    report = evaluate_stay_forecasts(StayForecaster(model, extractor), tmp_path / "dataset", "tuning")
    assert 0 < report.stays < 60
    with pytest.raises(ValueError, match=r"split got 'other'; .*'held_out'"):
        evaluate_stay_forecasts(StayForecaster(model, extractor), tmp_path / "dataset", "other")


def test_a_checkpoint_that_does_not_say_what_it_forecasts_is_refused(made, others):
    model = copy.deepcopy(made.model)
    model.config.forecast_calibration = None
    with pytest.raises(ValueError, match="does not say what it forecasts"):
        evaluate_stays(StayForecaster(model, made.extractor), others)

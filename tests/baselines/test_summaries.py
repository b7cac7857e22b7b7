"""Summary statistics against a naive twin, and the models on them: tuned inside the training stays."""

import sys

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ehrseq.baselines import SUMMARIES, BoostedSummaries, LogisticSummaries, summarise
from ehrseq.data import load_physionet2012
from ehrseq.data.simulate.stays import simulate_stays
from ehrseq.encode.triplets import PHYSIONET2012, build_triplets
from tests.encode.triplet_samples import SPEC, event, random_records, table

SMALL_GRID = ({"max_depth": 2, "n_estimators": 40}, {"max_depth": 3, "n_estimators": 40})


@pytest.fixture(scope="module")
def stays(tmp_path_factory):
    simulated = simulate_stays(900, seed=1)
    loaded = load_physionet2012(simulated.write(tmp_path_factory.mktemp("stays")))
    built = build_triplets(loaded.events, PHYSIONET2012, loaded.labels)
    return built.subset(np.arange(600)), built.subset(np.arange(600, len(built)))


def naive(minutes, values, window_hours):
    hours = minutes / 60
    late = values[hours >= window_hours - 12]
    slope = np.polyfit(hours, values, 1)[0] if len(set(hours)) > 1 else np.nan
    return {
        "min": values.min(),
        "max": values.max(),
        "mean": values.mean(),
        "std": values.std(),
        "median": np.median(values),
        "first": values[0],
        "last": values[-1],
        "count": len(values),
        "slope": slope,
        "first_time": hours[0],
        "last_time": hours[-1],
        "mean_last_12h": late.mean() if len(late) else np.nan,
    }


def test_the_statistics_are_those_of_a_loop():
    built = build_triplets(table(random_records(40, seed=6)), SPEC, keep_empty=True)
    features, columns = summarise(built)
    assert features.shape == (len(built), 12 * 3 + 8)
    assert columns[:3] == ["hr min", "hr max", "hr mean"]
    assert columns[36:] == SPEC.static_columns
    checked = 0
    for number in range(len(built)):
        row = built.row(number)
        for variable, name in enumerate(SPEC.variable_names):
            mine = row["variables"] == variable
            got = dict(zip(SUMMARIES, features[number, 12 * variable : 12 * variable + 12], strict=True))
            if not mine.any():
                assert got.pop("count") == 0
                assert np.isnan(list(got.values())).all()
                continue
            expected = naive(row["times"][mine], row["values"][mine], 24)
            for statistic in SUMMARIES:
                np.testing.assert_allclose(
                    got[statistic], expected[statistic], rtol=1e-4, atol=1e-4, err_msg=f"{name} {statistic}"
                )
            checked += 1
    assert checked > 60
    np.testing.assert_array_equal(features[:, 36:], built.static.astype(np.float32))


def test_a_constant_has_no_deviation_and_one_value_no_slope():
    record = [
        event(0, "VISIT_START//IMP"),
        *(event(hour, "LAB//K", 4.1) for hour in range(4)),
        event(1, "VITAL//T", 37),
    ]
    features, columns = summarise(build_triplets(table({1: record}), SPEC))
    row = dict(zip(columns, features[0].tolist(), strict=True))
    assert row["k std"] == 0
    assert row["k slope"] == 0
    assert np.isnan(row["temp slope"])
    assert row["temp std"] == 0


@pytest.mark.parametrize("model_class", [LogisticSummaries, BoostedSummaries])
def test_a_model_finds_the_planted_signal(stays, model_class):
    if model_class is BoostedSummaries:
        pytest.importorskip("xgboost")
        model = BoostedSummaries(grid=SMALL_GRID, num_folds=3)
    else:
        model = LogisticSummaries(grid=({"C": 1e-3}, {"C": 1e-2}), num_folds=3)
    train, test = stays
    risks = model.fit(train).predict_proba(test)
    assert risks.shape == (len(test), 2)
    np.testing.assert_allclose(risks.sum(1), 1, atol=1e-6)
    assert roc_auc_score(test.labels, risks[:, 1]) > 0.68
    assert len(model.tried) == 2
    best = max(model.tried, key=lambda entry: entry["auroc"] + entry["auprc"])
    assert {
        name: model.chosen[name] for name in model.chosen if name in best and name != "n_estimators"
    }.items() <= best.items()
    again = type(model)(grid=model.grid, num_folds=3).fit(train).predict_proba(test)
    np.testing.assert_array_equal(again, risks)


def test_bad_input(stays):
    train, test = stays
    with pytest.raises(ValueError, match="expected 1 to 8"):
        LogisticSummaries(grid=[{"C": 1.0}] * 9)
    with pytest.raises(ValueError, match="num_folds got 1"):
        LogisticSummaries(num_folds=1)
    with pytest.raises(ValueError, match="not fitted"):
        LogisticSummaries().predict_proba(test)
    with pytest.raises(ValueError, match="5 folds need"):
        LogisticSummaries().fit(train.subset(train.labels == 0))
    unlabelled = build_triplets(table(random_records(20, seed=6)), SPEC)
    with pytest.raises(ValueError, match="no labels"):
        LogisticSummaries().fit(unlabelled)
    fitted = LogisticSummaries(grid=[{"C": 1e-3}], num_folds=2).fit(train)
    with pytest.raises(ValueError, match="the same TripletSpec"):
        fitted.predict_proba(unlabelled)


def test_without_xgboost_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(ImportError, match=r"ehrseq\[boosting\]"):
        BoostedSummaries()

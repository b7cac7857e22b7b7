"""Simulated ICU stays: reproducible, readable as the challenge's files, and with the signal that they promise."""

import hashlib

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ehrseq.data import load_physionet2012
from ehrseq.data.simulate import stays as simulator
from ehrseq.data.simulate.stays import simulate_stays


def test_a_stay_does_not_depend_on_the_others():
    many, few = simulate_stays(40, seed=3), simulate_stays(7, seed=3)
    assert many.rows.filter(many.rows["stay"] < 7).equals(few.rows)
    assert many.static.head(7).equals(few.static)
    np.testing.assert_array_equal(many.true_risks[:7], few.true_risks)
    assert not simulate_stays(7, seed=4).rows.equals(few.rows)


def test_the_files_are_those_of_the_challenge(tmp_path):
    stays = simulate_stays(60, seed=1)
    folder = stays.write(tmp_path, "a")
    loaded = load_physionet2012(folder)
    assert loaded.outcomes["subject_id"].to_list() == stays.record_ids.tolist()
    assert loaded.labels["boolean_value"].to_list() == stays.deaths.tolist()
    assert loaded.report.skipped["Height missing (-1)"] == (stays.static["Height"] == -1).sum()
    assert [reason for reason in loaded.report.skipped if "unknown" in reason or "malformed" in reason] == []
    series = loaded.events.filter(loaded.events["numeric_value"].is_not_null() & loaded.events["time"].is_not_null())
    assert series.height == stays.rows.height + (stays.static["Weight"] != -1).sum()
    with pytest.raises(ValueError, match="exists"):
        stays.write(tmp_path, "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Outcomes-a.txt", "set-a"]


def test_deaths_follow_the_true_risk():
    stays = simulate_stays(3000, seed=5)
    risk, deaths = stays.true_risks, stays.deaths
    assert abs(deaths.mean() - risk.mean()) < 3 * np.sqrt((risk * (1 - risk)).sum()) / len(stays)
    assert 0.8 < roc_auc_score(deaths, risk) < 0.88
    # The level alone is not all of it: the trend counts.
    assert roc_auc_score(deaths, risk) > roc_auc_score(deaths, stays.severity.mean(1)) + 0.03


def test_the_defaults_draw_what_version_1_0_drew():
    stays = simulate_stays(60, seed=1)
    lines = hashlib.sha256("\n".join(stays.rows["line"]).encode()).hexdigest()
    assert (stays.rows.height, lines[:16]) == (17826, "152017f77b8b59f8")
    assert simulate_stays(60, seed=1, density=1, shock_effect=0.0).rows.equals(stays.rows)
    assert set(stays.shocks) == {-1}


def test_blocks_of_stays_are_drawn_as_one(monkeypatch):
    whole = simulate_stays(7, seed=2, density=4, shock_effect=2.0)
    monkeypatch.setattr(simulator, "_BLOCK", 8)
    parts = simulate_stays(7, seed=2, density=4, shock_effect=2.0)
    assert parts.rows.equals(whole.rows)
    np.testing.assert_array_equal(parts.true_risks, whole.true_risks)


def test_density_lengthens_the_record_and_leaves_the_stay_as_it_is():
    sparse, dense = simulate_stays(30, seed=6), simulate_stays(30, seed=6, density=30)
    assert 28 < dense.rows.height / sparse.rows.height < 32
    assert dense.rows.height / 30 > 8000
    np.testing.assert_array_equal(dense.true_risks, sparse.true_risks)
    np.testing.assert_array_equal(dense.severity, sparse.severity)
    assert dense.static.equals(sparse.static)
    assert dense.rows["minute"].max() < 48 * 60
    # Slots of two minutes: no variable stands twice in one.
    slots = dense.rows.select("stay", "parameter", dense.rows["minute"] // 2)
    assert slots.n_unique() == slots.height


def test_a_bout_of_shock_shows_in_its_four_hours_only_and_raises_the_risk():
    calm, shocked = (simulate_stays(400, seed=8, density=2, shock_effect=effect) for effect in (0.0, 4.0))
    has = shocked.shocks >= 0
    assert 0.3 < has.mean() < 0.5
    assert set(shocked.shocks[has]) <= set(range(45))
    assert shocked.rows.select("stay", "minute", "parameter").equals(calm.rows.select("stay", "minute", "parameter"))
    since = shocked.rows["minute"].to_numpy() // 60 - shocked.shocks[shocked.rows["stay"].to_numpy()]
    inside = (since >= 0) & (since < 4) & has[shocked.rows["stay"].to_numpy()]
    change = (shocked.rows["value"].cast(float) - calm.rows["value"].cast(float)).to_numpy()
    assert not change[~inside].any()
    pulse = (shocked.rows["parameter"] == "HR").to_numpy()
    assert np.median(change[inside & pulse]) == 39  # 3 spreads of 13
    odds = [np.log(stays.true_risks / (1 - stays.true_risks)) for stays in (calm, shocked)]
    np.testing.assert_allclose(odds[1] - odds[0], 4.0 * has, atol=1e-9)
    np.testing.assert_array_equal(simulate_stays(400, seed=8, shock_effect=1.0).shocks, shocked.shocks)

    told = shocked.in_shock()  # where a value is other than it would have been, but for limits such as no urine at all
    assert told[change != 0].all()
    assert (change[told] != 0).mean() > 0.95
    assert not calm.in_shock().any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_stays": 0}, "expected an integer"),
        ({"num_stays": 2.5}, "expected an integer"),
        ({"num_stays": True}, "expected an integer"),
        ({"num_stays": 3, "seed": -1}, "expected an integer"),
        ({"num_stays": 3, "density": 0}, "density got 0; expected an integer"),
        ({"num_stays": 3, "density": 7}, "density got 7; expected a divisor of 60"),
        ({"num_stays": 3, "density": 120}, "expected a divisor of 60"),
        ({"num_stays": 3, "shock_effect": -1.0}, "shock_effect got -1.0; expected a number of at least 0"),
        ({"num_stays": 3, "shock_effect": float("nan")}, "shock_effect got nan"),
        ({"num_stays": 3, "shock_effect": "4"}, "shock_effect got '4'"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        simulate_stays(**given)

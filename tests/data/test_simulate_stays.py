"""Simulated ICU stays: reproducible, readable as the challenge's files, and with the signal that they promise."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ehrseq.data import load_physionet2012
from ehrseq.data.simulate_stays import simulate_stays


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


@pytest.mark.parametrize(
    "given", [{"num_stays": 0}, {"num_stays": 2.5}, {"num_stays": True}, {"num_stays": 3, "seed": -1}]
)
def test_bad_input(given):
    with pytest.raises(ValueError, match="expected an integer"):
        simulate_stays(**given)

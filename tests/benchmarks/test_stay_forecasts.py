"""The table of forecast values: trained once, printed again from what is there."""

import pytest

from ehrseq.data.simulate.stays import simulate_stays
from tests.in_process import run_module

SCRIPT = "benchmarks.tables.stay_forecasts"


@pytest.fixture(scope="module")
def stays(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for seed, name in enumerate("ab"):
        simulate_stays(80, seed=seed, first_record=1 + 1000 * seed).write(folder / name)
    return folder


def test_a_model_is_trained_once_and_the_table_reports_it(stays, tmp_path):
    command = ("--learn", stays / "a", "--report", stays / "b", "--output", tmp_path, "--alphas", 0.1, 0.5)
    short = ("--set", "pretrain.epochs=1", "--set", "model.hidden_size=8")
    first = run_module(SCRIPT, *command, *short)
    assert first.returncode == 0, first.stderr
    assert "RMSE: last value" in first.stdout
    assert "inside 90 %" in first.stdout
    assert "inside 50 %" in first.stdout
    assert "| HR (bpm) | 2h | " in first.stdout
    assert run_module(SCRIPT, *command, *short).stdout == first.stdout


def test_a_recipe_of_the_other_family_is_refused(stays, tmp_path):
    command = ("--learn", stays / "a", "--report", stays / "b", "--output", tmp_path)
    done = run_module(SCRIPT, *command, "--recipe", "ehrmamba_quick")
    assert done.returncode != 0
    assert "expected one of hymate" in done.stderr

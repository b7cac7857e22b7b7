"""The table of estimators: a small run, and its figures against those of one pool drawn here."""

import importlib
import json

import pytest

from ehrseq.modeling import trajectory_slots
from tests.in_process import run_module

SCRIPT = "benchmarks.tables.forecast_estimators"


@pytest.fixture(autouse=True)
def _blocks_as_before(monkeypatch):
    monkeypatch.setattr(trajectory_slots, "BLOCK_SLOTS", trajectory_slots.BLOCK_SLOTS)


def test_a_small_run_prints_both_models_and_keeps_every_figure(tmp_path):
    script = importlib.import_module(SCRIPT)
    done = run_module(SCRIPT, "--quick", "--output", tmp_path, "--num-time-head", 120)
    assert done.returncode == 0, done.stderr
    for name in script.OUTCOMES:
        assert done.stdout.count(f"| {name} |") == 2
    written = json.loads((tmp_path / "result.json").read_text())
    for model in ("spans", "time_head"):
        assert len(written[model]) == 3 * len(script.OUTCOMES)
        for row in written[model]:
            assert abs(row["estimate"] - row["truth"]) <= 6 * row["standard_error"]
            assert 0 <= row["covered"] <= 1
    of_monte_carlo = [row for row in written["spans"] if row["estimator"] == "monte_carlo"]
    for row in of_monte_carlo:
        assert row["variance"] == pytest.approx(
            row["estimate"] * (1 - row["estimate"]) / (row["truth"] * (1 - row["truth"]))
        )


@pytest.mark.parametrize("arguments", [("--num", 1), ("--num", 50, "--block", 60)])
def test_too_few_trajectories_are_refused(tmp_path, arguments):
    done = run_module(SCRIPT, "--output", tmp_path, *arguments)
    assert done.returncode == 2
    assert "expected at least 2" in done.stderr

"""The context-length curve of HyMaTE: cells are run once and kept, and the best possible score is the simulator's."""

import importlib
import json

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from ehrseq.data.simulate.stays import simulate_stays
from tests.in_process import run_module

SCRIPT = "benchmarks.tables.hymate_context"


def run(*arguments):
    return run_module(SCRIPT, *arguments)


@pytest.fixture(scope="module")
def script():
    return importlib.import_module(SCRIPT)


@pytest.fixture(scope="module")
def simulated(script):
    settings = {"stays": 300, "reported": 40, "stays_seed": 3, "density": 2, "shock_effect": 4.0}
    return script.Stays(settings)["stays"]


@pytest.fixture
def _one_process(script, monkeypatch):
    """Costs of the shorter context are measured in a process of their own, which takes seconds of imports."""
    in_own_process = script.costs_in_own_process

    def costs(row, max_length, threads):
        return in_own_process(row, max_length, threads) if max_length == 40 else script.measure_costs(row, max_length)

    monkeypatch.setattr(script, "costs_in_own_process", costs)


@pytest.mark.usefixtures("_one_process")
def test_quick_runs_every_cell_once_and_the_table_reports_them(tmp_path):
    command = ("--quick", "--rows", "mamba_attention", "--output", tmp_path)
    first = run(*command)
    assert first.returncode == 0, first.stderr
    assert "'stays_seed': 0" in first.stderr
    assert "training seeds [0]" in first.stderr
    lines = first.stdout.splitlines()
    rows = [line for line in lines if "| mamba_attention | 1 |" in line]
    assert [line.split("|")[1].strip() for line in rows] == ["40", "320"]
    for line, length in zip(rows, (40, 320), strict=True):
        folder = tmp_path / "mamba_attention" / str(length) / "seed0"
        result = json.loads((folder / "result.json").read_text())
        scores = pl.read_parquet(folder / "scores.parquet")
        auroc = roc_auc_score(scores["label"], scores["score"])
        assert result["auroc"] == pytest.approx(auroc)
        assert f"| {auroc:.3f} [" in line
        assert all(result["costs"][name] > 0 for name in ("training_stays_per_cpu_second", "forward_cpu_ms_per_stay"))
        assert not list(folder.glob("*.part"))
    assert "density 2" in lines[-1]

    again = run(*command)
    assert again.stdout == first.stdout
    assert "simulating" not in again.stderr
    assert run("--output", tmp_path, "--report").stdout == first.stdout
    other = run(*command, "--stays_seed", 1)
    assert other.returncode != 0
    assert "Give another --output" in other.stderr


def test_nothing_done_is_said(tmp_path):
    assert run("--output", tmp_path, "--report").stdout == "Nothing is done yet.\n"


def test_who_reads_all_knows_the_true_risk_and_who_reads_less_what_is_left_of_it(script, simulated):
    stays, table = simulated
    at = np.searchsorted(stays.record_ids, table.subject_ids)
    np.testing.assert_allclose(script.best_scores(stays, table, 10_000, 4.0), stays.true_risks[at])
    ranks = []
    for length in (50, 300, 10_000):
        scores = script.best_scores(stays, table, length, 4.0)
        # What is not read is averaged over, not ignored: the scores stay probabilities.
        assert abs(scores.mean() - stays.true_risks.mean()) < 0.05
        ranks.append(roc_auc_score(table.labels, scores))
    assert ranks == sorted(ranks)
    assert ranks[-1] > ranks[0] + 0.05


def test_a_bout_of_shock_counts_as_read_where_a_triplet_of_it_is(script, simulated):
    stays, table = simulated
    at, seen = script.read_shocks(stays, table, 200)
    for stay in range(len(table)):
        minutes = table.row(stay)["times"][-200:]
        start = stays.shocks[at[stay]] * 60
        inside = (minutes >= start) & (minutes < start + 240)
        if stays.shocks[at[stay]] < 0:
            assert not seen[stay]
        elif inside.any():
            assert seen[stay]
    assert 0 < seen.sum() < (stays.shocks >= 0).sum()


def test_learned_and_reported_stays_are_disjoint(script):
    learned, reported = (
        simulate_stays(2, first_record=script.FIRST_RECORDS[name]).record_ids for name in ("stays", "reported")
    )
    assert reported[0] - learned[0] > 100_000

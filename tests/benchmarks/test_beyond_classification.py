"""The tables beyond classification: a small run of simulated patients, and of simulated stays."""

import json

import pytest

from ehrseq.data.simulate.stays import simulate_stays
from tests.in_process import run_module

SCRIPT = "benchmarks.tables.beyond_classification"


@pytest.mark.slow
def test_simulated_patients(tmp_path):
    done = run_module(SCRIPT, "simulated", "--quick", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| random weights | chronic diseases coded |" in done.stdout
    assert "| futures |" in done.stdout
    told = json.loads((tmp_path / "simulated" / "result.json").read_text())
    assert {each["embeddings"] for each in told["probes"]} >= {"EhrMamba, pretrained", "codes of the record"}


def test_stays(tmp_path):
    for seed, name in enumerate("ab"):
        simulate_stays(160, seed=seed, first_record=1 + 1000 * seed).write(tmp_path / name)
    done = run_module(SCRIPT, "stays", "--quick", "--data", tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "| HyMaTE, pretrained | type of unit |" in done.stdout
    told = json.loads((tmp_path / "out" / "stays" / "result.json").read_text())
    assert "means of the variables" in {each["embeddings"] for each in told["probes"]}


def test_data_are_asked_for(tmp_path):
    done = run_module(SCRIPT, "mimic", "--output", tmp_path)
    assert done.returncode != 0
    assert "mimic needs --data" in done.stderr

"""The figure of forecasts: what it reads is what was written, and the picture is one."""

import json

import numpy as np
import pytest

from benchmarks.tables.forecast_figure import read_calibrations
from ehrseq.forecasting.incidence_calibration import calibrate_incidence
from tests.in_process import run_module

SCRIPT = "benchmarks.tables.forecast_figure"


@pytest.fixture
def results(tmp_path):
    rng = np.random.default_rng(0)
    risk, days = rng.uniform(0, 0.5, (60, 1)), rng.uniform(0, 40, 60)
    causes = (days < 30) * rng.integers(0, 3, 60)
    predicted = np.hstack([risk / 3, risk])
    found = [
        calibrate_incidence(name, predicted, days, causes, np.arange(60), [7.0, 30.0], part=part, num_resamples=20)
        for name, part in (("death", "all"), ("fall", "all"), ("fall", "repeats"))
    ]
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"incidence": [each.to_dict() for each in found]}))
    return file, found


def test_it_reads_what_was_written(results):
    file, found = results
    read = read_calibrations(file)
    assert [(each.outcome, each.part) for each in read] == [("death", "all"), ("fall", "all")]
    assert read[0] == found[0]


def test_it_draws_the_same_picture_again(results, tmp_path):
    file, _ = results
    pictures = []
    for name in ("a.png", "b.png"):
        finished = run_module(SCRIPT, file, tmp_path / name)
        assert finished.returncode == 0, finished.stderr
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0][:4] == b"\x89PNG"
    assert pictures[0] == pictures[1]


def test_bad_input_is_told(tmp_path):
    assert "run `ehrseq evaluate-forecast` first" in run_module(SCRIPT, tmp_path / "none", tmp_path / "x.png").stderr
    (tmp_path / "empty.json").write_text("{}")
    assert "no incidence" in run_module(SCRIPT, tmp_path / "empty.json", tmp_path / "x.png").stderr

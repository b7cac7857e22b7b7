"""What `ehrseq demo` leaves, seen from outside: the one demo of the run (`demo` in tests/conftest.py)."""

import json
import re

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ehrseq.tasks import list_tasks
from tests.in_process import DEMO, run_ehrseq


@pytest.fixture(scope="module")
def printed(demo):
    return (demo / "printed.txt").read_text()


def test_every_task_is_measured_beside_the_best_possible(demo, printed):
    saved = json.loads((demo / "metrics.json").read_text())
    assert saved["counts"]["patients"] == 120
    assert set(saved["metrics"]) == set(saved["best_possible"]) == set(list_tasks())
    assert "best possible" in printed
    for task, metrics in saved["metrics"].items():
        assert metrics["estimable"] or f"{task}: not estimable, {metrics['positives']} positives" in printed


def test_patients_have_risks_and_one_a_picture(demo, printed):
    assert re.search(r"^  patient .*mortality_30d", printed, flags=re.MULTILINE)
    assert (demo / "patient.png").stat().st_size > 20_000


def test_the_checkpoint_scores_as_before_it_was_saved(demo, printed):
    assert float(re.search(r"differ by at most ([0-9.e+-]+[0-9])", printed)[1]) < 1e-6
    model = AutoModelForSequenceClassification.from_pretrained(demo / "checkpoint")
    assert [task["name"] for task in model.config.tasks] == AutoTokenizer.from_pretrained(demo / "checkpoint").tasks


def test_again_nothing_is_trained_twice(demo):
    files = [demo / name for name in ("metrics.json", "checkpoint/model.safetensors")]
    metrics, weights = json.loads(files[0].read_text())["metrics"], files[1].stat().st_mtime_ns
    assert run_ehrseq(*DEMO, "--output", demo).returncode == 0
    assert json.loads(files[0].read_text())["metrics"] == metrics
    assert files[1].stat().st_mtime_ns == weights

"""The demo on tiny data: simulated, a MEDS folder, data without admissions."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ehrseq.data.dataset import write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.demo.run import TASKS, DemoSettings, limit_rows, run_demo

TINY = {"hidden_size": 16, "num_layers": 1, "context": 64, "pretrain_tokens": 4096, "finetune_rows": 64}


def test_the_demo_goes_from_simulation_to_risks_and_a_picture(demo):
    text = (demo / "printed.txt").read_text()
    saved = json.loads((demo / "metrics.json").read_text())
    assert set(saved["metrics"]) == set(saved["best_possible"]) == set(TASKS)
    assert "best possible" in text
    assert "differ by at most 0" in text
    assert re.search(r"^  patient .*mortality_30d", text, flags=re.MULTILINE)
    assert (demo / "patient.png").stat().st_size > 20_000
    for task, metrics in saved["metrics"].items():
        assert metrics["estimable"] or f"{task}: not estimable, {metrics['positives']} positives" in text
    assert saved["counts"]["patients"] == 120
    model = AutoModelForSequenceClassification.from_pretrained(demo / "checkpoint")
    assert [task["name"] for task in model.config.tasks] == AutoTokenizer.from_pretrained(demo / "checkpoint").tasks


def test_rows_that_are_scored_are_limited_by_task():
    rows = SimpleNamespace(task_ids=np.array([0] * 90 + [2] * 7), subset=lambda kept: kept)
    kept = limit_rows(rows, 60, seed=4)
    assert np.bincount(rows.task_ids[kept]).tolist() == [60, 0, 7]
    assert (np.diff(kept) > 0).all()


def test_the_demo_takes_a_folder_of_very_few_patients_and_runs_twice(tmp_path):
    write_dataset(simulate(40, seed=1, progress=False).events(), tmp_path / "meds", dataset_name="few")
    for _ in range(2):
        lines: list[str] = []
        result = run_demo(tmp_path / "out", data=tmp_path / "meds", settings=DemoSettings(**TINY), say=lines.append)
    assert result.best_possible is None
    assert "not estimable" in "\n".join(lines)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (lambda e: e.filter(~pl.col("code").str.starts_with("VISIT_")), "none of the tasks could be labelled"),
        (lambda e: e.head(0), "events"),
    ],
)
def test_unusable_data_are_a_clear_error(tmp_path, events, message):
    table = events(simulate(5, seed=1, progress=False).events())
    table.write_parquet(tmp_path / "events.parquet")
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path / "out", data=tmp_path / "events.parquet", settings=DemoSettings(**TINY))

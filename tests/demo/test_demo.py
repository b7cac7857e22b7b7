"""The demo on tiny data: simulated, a MEDS folder, data without admissions."""

from __future__ import annotations

import json

import polars as pl
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ehrseq.data.dataset import write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.demo.run import run_demo
from ehrseq.tasks import list_tasks
from ehrseq.training import read_recipe
from ehrseq.work.engine import get_engine

TINY = read_recipe(
    "demo",
    [
        *("model.hidden_size=16", "model.max_position_embeddings=64", "pretrain.rows=64", "shared.rows=64"),
        *("finetune.rows=64", "max_rows_per_task=60"),
    ],
)
OPTIONS = {"recipe": TINY, "engine": get_engine(num_workers=1)}


def test_the_demo_goes_from_simulation_to_risks_and_a_picture(tmp_path):
    lines: list[str] = []
    result = run_demo(tmp_path, num_patients=150, seed=4, say=lines.append, **OPTIONS)
    text = "\n".join(lines)
    assert set(result.metrics) == set(result.best_possible) == set(list_tasks())
    assert "best possible" in text
    assert float(text.partition("differ by at most ")[2].split()[0].rstrip(".")) < 1e-6
    assert any(line.startswith("  patient") and "mortality_30d" in line for line in lines)
    assert result.picture.stat().st_size > 20_000
    for metrics in result.metrics.values():
        assert metrics.estimable or f"{metrics.task}: not estimable, {metrics.positives} positives" in text
        assert metrics.labels <= 60
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["counts"]["patients"] == 150
    model = AutoModelForSequenceClassification.from_pretrained(result.checkpoint)
    assert [task["name"] for task in model.config.tasks] == AutoTokenizer.from_pretrained(result.checkpoint).tasks
    # Again: nothing is trained twice. With another seed it is another demo.
    at = (result.checkpoint / "model.safetensors").stat().st_mtime_ns
    again = run_demo(tmp_path, num_patients=150, seed=4, **OPTIONS)
    assert again.metrics == result.metrics
    assert (result.checkpoint / "model.safetensors").stat().st_mtime_ns == at


def test_the_demo_takes_a_folder_of_very_few_patients_and_runs_twice(tmp_path):
    write_dataset(simulate(40, seed=1, progress=False).events(), tmp_path / "meds", dataset_name="few")
    for seed in (0, 1):  # the second one replaces the first
        lines: list[str] = []
        result = run_demo(tmp_path / "out", data=tmp_path / "meds", seed=seed, say=lines.append, **OPTIONS)
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
        run_demo(tmp_path / "out", data=tmp_path / "events.parquet", **OPTIONS)

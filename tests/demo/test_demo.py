"""The demo on tiny data: a MEDS folder, data without admissions (simulated patients: test_command.py)."""

from __future__ import annotations

import polars as pl
import pytest

from ehrseq.data.dataset import write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.demo.run import run_demo
from ehrseq.training import read_recipe
from ehrseq.work.engine import get_engine

TINY = read_recipe(
    "demo",
    [
        *("model.hidden_size=16", "model.max_position_embeddings=64", "pretrain.rows=64", "shared.rows=64"),
        *("finetune.rows=64", "max_rows_per_task=5"),
    ],
)
OPTIONS = {"recipe": TINY, "engine": get_engine(num_workers=1)}


def test_the_demo_takes_a_folder_of_very_few_patients_and_runs_twice(tmp_path):
    write_dataset(simulate(40, seed=1, progress=False).events(), tmp_path / "meds", dataset_name="few")
    for seed in (0, 1):  # the second one replaces the first
        lines: list[str] = []
        result = run_demo(tmp_path / "out", data=tmp_path / "meds", seed=seed, say=lines.append, **OPTIONS)
    assert result.best_possible is None
    assert max(metrics.labels for metrics in result.metrics.values()) == 5
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

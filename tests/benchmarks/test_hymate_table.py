"""The table of HyMaTE and its baselines: cells are run once and kept, differences are paired."""

import importlib
import subprocess
import sys
from functools import partial

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from ehrseq.baselines.summary_models import LOGISTIC_GRID, LogisticSummaries
from ehrseq.data.simulate.stays import simulate_stays
from tests.in_process import run_module
from tests.processes import FROM_HERE

SCRIPT = "benchmarks.tables.hymate_table"


def run(*arguments):
    return run_module(SCRIPT, *arguments)


def write_cell(folder, labels, scores, first_subject=1):
    folder.mkdir(parents=True)
    subjects = np.arange(first_subject, first_subject + len(labels))
    pl.DataFrame({"subject_id": subjects, "label": labels, "score": scores}).write_parquet(folder / "scores.parquet")
    (folder / "result.json").write_text("{}")


@pytest.fixture(autouse=True)
def one_setting(monkeypatch):
    """The table is tested here, not the search for the baseline's best setting."""
    quick = partial(LogisticSummaries, grid=LOGISTIC_GRID[:1], num_folds=2)
    monkeypatch.setitem(importlib.import_module(SCRIPT).BASELINES, "logistic", quick)


@pytest.fixture(scope="module")
def stays(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for seed, name in enumerate("ab"):
        simulate_stays(180, seed=seed, first_record=1 + 1000 * seed).write(folder / name)
    return folder


def test_a_cell_is_run_once_and_the_table_reports_it(stays, tmp_path):
    command = ("--set_a", stays / "a", "--set_b", stays / "b", "--output", tmp_path, "--rows", "logistic")
    first = run(*command, "--directions", "b-a", "--seeds", 2)
    assert first.returncode == 0, first.stderr
    assert "b-a logistic seed 0" in first.stderr
    assert "seed 1" not in first.stderr  # nothing in it is drawn
    scores = pl.read_parquet(tmp_path / "b-a" / "logistic" / "seed0" / "scores.parquet")
    assert len(scores) == 179  # one of the 180 has no series
    auroc = roc_auc_score(scores["label"], scores["score"])
    assert f"| logistic | 1 | {auroc:.3f} [" in first.stdout

    second = run(*command, "--directions", "b-a")
    assert second.stdout == first.stdout
    assert "seed 0" not in second.stderr
    third = run_module(SCRIPT, "--output", tmp_path, "--directions", "b-a", "--report", function=None)
    assert third.stdout == first.stdout


def test_differences_are_of_means_over_seeds_and_paired(tmp_path):
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.3).astype(np.int64)
    noise = rng.normal(size=(3, 400))
    bar, one, two = (labels + 1.5 * noise[0], labels + 1.4 * noise[1], labels + 1.2 * noise[2])
    write_cell(tmp_path / "b-a" / "boosting" / "seed0", labels, bar)
    for seed, scores in enumerate((one, two)):
        write_cell(tmp_path / "b-a" / "model" / f"seed{seed}", labels, scores)
    done = run("--output", tmp_path, "--directions", "b-a", "--report")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| model | 2"))
    mean = (roc_auc_score(labels, one) + roc_auc_score(labels, two)) / 2
    assert f" {mean:.3f} [" in row
    assert f" {mean - roc_auc_score(labels, bar):.3f} [" in row
    together = next(line for line in done.stdout.splitlines() if line.startswith("| model, mean score"))
    assert f" {roc_auc_score(labels, (one + two) / 2):.3f} [" in together


def test_differences_may_be_taken_to_any_row(tmp_path):
    rng = np.random.default_rng(1)
    labels = (rng.random(300) < 0.3).astype(np.int64)
    scores = {name: labels + spread * rng.normal(size=300) for name, spread in (("full", 1.0), ("less", 1.5))}
    for name, values in scores.items():
        write_cell(tmp_path / "b-a" / name / "seed0", labels, values)
    done = run("--output", tmp_path, "--directions", "b-a", "--report", "--against", "full")
    row = next(line for line in done.stdout.splitlines() if line.startswith("| less | 1"))
    difference = roc_auc_score(labels, scores["less"]) - roc_auc_score(labels, scores["full"])
    assert f" {difference:.3f} [" in row


def test_every_fold_reports_its_own_stays(stays, tmp_path):
    command = ("--set_a", stays / "a", "--set_b", stays / "b", "--output", tmp_path, "--rows", "logistic")
    done = run(*command, "--directions", "folds", "--seeds", 9)
    assert done.returncode == 0, done.stderr
    folds = [pl.read_parquet(path) for path in sorted((tmp_path / "folds" / "logistic").glob("*/scores.parquet"))]
    assert len(folds) == 5  # however many seeds were asked for
    assert pl.concat(folds)["subject_id"].n_unique() == sum(map(len, folds)) == 359
    mean = np.mean([roc_auc_score(fold["label"], fold["score"]) for fold in folds])
    assert f"| logistic | 5 | {mean:.3f} [" in done.stdout


TINY = """
model: {hidden_size: 8, num_mamba_layers: 1, num_attention_layers: 0, state_size: 2}
pretrain: {epochs: 1}
finetune: {epochs: 1}
"""


def test_a_cell_of_a_recipe_has_a_card_of_its_results(stays, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = ("--set_a", stays / "a", "--set_b", stays / "b", "--output", tmp_path, "--rows", tmp_path / "tiny.yaml")
    done = run(*command, "--directions", "a-b", "--seeds", 1)
    assert done.returncode == 0, done.stderr
    cell = tmp_path / "a-b" / "tiny" / "seed0"
    scores = pl.read_parquet(cell / "scores.parquet")
    script, card = "benchmarks.tables.hymate_card", tmp_path / "card.md"
    options = ("--repo_id", "me/tiny", "--card", card)
    made = run_module(script, "--cell", cell, *options)
    assert made.returncode == 0, made.stderr
    text = card.read_text()
    assert f"| in_hospital_mortality | 180 | 180 | {scores['label'].sum()} |" in text
    assert f"{roc_auc_score(scores['label'], scores['score']):.3f} [" in text
    assert "Trained on set a of the challenge, scored the 180 stays of set b." in text
    assert 'model="me/tiny"' in text
    (cell / "result.json").unlink()
    command = [sys.executable, "-P", "-m", script, "--cell", cell, *options]
    refused = subprocess.run(command, env=FROM_HERE, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "has no result.json: it is no finished cell" in refused.stderr


def test_a_recipe_with_a_dot_in_its_name_is_reported(tmp_path):
    labels = np.array([0, 1, 0, 1])
    write_cell(tmp_path / "b-a" / "hymate.v2" / "seed0", labels, labels * 1.0)
    assert "| hymate.v2 | 1 | 1.000" in run("--output", tmp_path, "--report").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "logistic"], "give --set_b PATH"),
        (["--set_b", "nowhere", "--rows", "logistic"], "nowhere"),
        (["--directions", "a-c"], "invalid choice"),
    ],
)
def test_bad_input_is_told(tmp_path, arguments, message):
    done = run("--output", tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr


def test_cells_of_other_stays_are_refused(tmp_path):
    labels = np.array([0, 1, 0, 1])
    write_cell(tmp_path / "b-a" / "boosting" / "seed0", labels, labels * 1.0)
    write_cell(tmp_path / "b-a" / "model" / "seed0", labels, labels * 1.0, first_subject=9)
    done = run("--output", tmp_path, "--report")
    assert done.returncode != 0
    assert "hold other stays" in done.stderr

"""The table of zero-shot risks: a small run, its figures, and what it refuses."""

import importlib
import json

import numpy as np
import polars as pl
import pytest

from tests.in_process import run_module

SCRIPT = "benchmarks.tables.zero_shot"
TASKS = ("readmission_30d", "hypertension")


def run(*arguments):
    return run_module(SCRIPT, *arguments)


@pytest.fixture(scope="module")
def script():
    return importlib.import_module(SCRIPT)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero_shot")
    finished = run("--quick", "--output", folder, "--tasks", *TASKS, "--estimators", "monte_carlo", "reach")
    assert finished.returncode == 0, finished.stderr
    return folder, finished


@pytest.mark.slow
def test_a_small_run_scores_every_system_at_the_same_times(done):
    folder, finished = done
    told = json.loads((folder / "result.json").read_text())
    assert "benchmarks.tables.zero_shot" in told["command"]
    assert {(each["task"], each["system"]) for each in told["entries"]} == {
        (task, system) for task in TASKS for system in ("monte_carlo", "reach", "finetuned", "xgboost")
    }
    rows = pl.read_parquet(folder / "rows.parquet")
    assert rows["score"].is_between(0, 1).all()
    for task in TASKS:
        counts = rows.filter(task=task).group_by("system").len()["len"].unique()
        assert len(counts) == 1  # every system on the same labelled times
    assert [cost["estimator"] for cost in told["costs"]] == ["monte_carlo", "reach"] * 2
    assert all(cost["tokens"] > 0 for cost in told["costs"])
    for line in ("| zero-shot, REACH |", "| boosting on counts |", "| best possible |", "| prevalence |"):
        assert line in finished.stdout


@pytest.mark.slow
def test_what_is_there_is_reported_and_not_drawn_again(done):
    folder, finished = done
    assert run("--output", folder, "--report").stdout.strip() == finished.stdout.strip()
    times = {file: file.stat().st_mtime_ns for file in (folder / "draws").iterdir()}
    again = run("--quick", "--output", folder, "--tasks", *TASKS, "--estimators", "monte_carlo", "reach")
    assert again.stdout == finished.stdout
    assert {file: file.stat().st_mtime_ns for file in (folder / "draws").iterdir()} == times


def test_the_slope_of_few_trajectories_is_finite(script):
    rng = np.random.default_rng(0)
    risk = rng.uniform(0.02, 0.6, 3000)
    label = rng.random(3000) < risk
    subjects = np.arange(3000)
    true = script.slope_of(label, risk, subjects, None)
    assert true.value == pytest.approx(1, abs=0.15)
    assert script.slope_of(label, rng.binomial(400, risk) / 400, subjects, 400).value == pytest.approx(
        true.value, abs=0.06
    )
    few = script.slope_of(label, rng.binomial(4, risk) / 4, subjects, 4)  # the noise of few makes risks too extreme
    assert 0 < few.value < 0.9


def test_the_way_to_the_best_possible(script):
    class Half:
        value = 0.65

    assert script._way({"best possible": 0.8, "auroc": Half}) == "50%"
    assert script._way({"best possible": None, "auroc": None}) == ""


def test_some_patients_are_the_same_for_all_tasks(script):
    subjects = np.repeat(np.arange(200), 3)
    rows = pl.DataFrame({"subject_id": subjects, "label": subjects % 2 == 0})
    scores = {"counts": np.arange(600.0)[None]}
    tasks = [script.TaskScores(name, rows[first:], {"counts": scores["counts"][:, first:]}, {}) for name, first in
             (("a", 0), ("b", 90))]  # fmt: skip
    found = script.of_some_patients(tasks, 0.3)
    assert 120 < found[0].rows.height < 240
    assert set(found[1].rows["subject_id"]) == {k for k in found[0].rows["subject_id"] if k >= 30}
    for each in found:
        assert (each.rows["subject_id"].to_numpy() == each.scores["counts"][0] // 3).all()
    assert script.of_some_patients(tasks, 1.0) == tasks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report"], "run without --report first"),
        (["--patients", "10"], "at least 100 patients"),
        (["--n", "0"], "1 trajectory"),
        (["--share", "0"], "above 0, at most 1"),
        (["--tasks", "gout"], r"true risk of ['gout'] is not known"),
        (["--estimators", "guess"], "invalid choice"),
    ],
)
def test_bad_input_is_told(tmp_path, arguments, message):
    finished = run("--output", tmp_path, *arguments)
    assert finished.returncode != 0
    assert message in finished.stderr

"""The table of explanations: a small run of both models, and its figures against plain means of the questions."""

import importlib
import json

import numpy as np
import polars as pl
import pytest

from tests.in_process import run_module

SCRIPT = "benchmarks.tables.attributions"
ROWS = ("random_contributions", "gradient_times_input", "integrated_gradients, noise")


def run(*arguments):
    return run_module(SCRIPT, *arguments)


@pytest.fixture(scope="module")
def script():
    return importlib.import_module(SCRIPT)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attributions")
    finished = run("--quick", "--output", folder, "--methods", *ROWS)
    assert finished.returncode == 0, finished.stderr
    return folder, finished


def test_a_small_run_prints_every_method_of_both_models(done):
    folder, finished = done
    lines = finished.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if " questions about " in line] == ["ehrmamba", "hymate"]
    for row in ROWS:
        assert sum(line.startswith(f"| {row} |") for line in lines) >= 2
    written = json.loads((folder / "result.json").read_text())
    assert written["options"]["patients"] == 4
    assert "benchmarks.tables.attributions" in written["command"]
    assert [table["model"] for table in written["tables"]] == ["ehrmamba", "hymate"]
    questions = pl.read_parquet(folder / "questions.parquet")
    assert pl.read_csv(folder / "questions.csv").height == questions.height
    assert (folder / "hymate" / "model.safetensors").is_file()


def test_the_figures_are_means_over_questions(done):
    folder, finished = done
    questions = pl.read_parquet(folder / "questions.parquet").filter(model="ehrmamba", method=ROWS[1])
    told = json.loads((folder / "result.json").read_text())["tables"][0]["measures"][ROWS[1]]
    for measure in ("auroc", "spearman", "by_code", "as_it_came", "comprehensiveness", "sufficiency", "left"):
        values = questions[measure].to_numpy()
        assert told[measure][0] == pytest.approx(values[np.isfinite(values)].mean())
        assert told[measure][1] <= told[measure][0] <= told[measure][2]
    row = next(line for line in finished.stdout.splitlines() if line.startswith(f"| {ROWS[1]} |"))
    assert row.split("|")[2].strip().startswith(f"{told['auroc'][0]:.3f} [")


def test_what_is_there_is_reported_again(done):
    folder, finished = done
    again = run("--output", folder, "--report")
    assert again.stdout == finished.stdout


def test_differences_are_paired_by_question(script):
    rng = np.random.default_rng(0)
    base = rng.normal(size=40)
    keys = {"subject_id": np.repeat(np.arange(20), 2), "task": ["a", "b"] * 20}
    theirs = pl.DataFrame({**keys, **dict.fromkeys(script.COMPARED, base)})
    ours = pl.DataFrame({**keys, **dict.fromkeys(script.COMPARED, base + 0.1)}).sample(fraction=1, shuffle=True, seed=1)
    found = script.paired(ours, theirs)
    for measure in script.COMPARED:
        assert [found[measure].value, found[measure].low, found[measure].high] == pytest.approx([0.1] * 3)
    assert script.told(found["auroc"], "auroc").endswith("+")
    assert script.told(found["sufficiency"], "sufficiency").endswith("-")


def test_of_what_is_not_known_there_is_no_figure(script):
    assert script.interval_of(np.array([np.nan, np.nan]), np.array([1, 2])) is None
    known = script.interval_of(np.array([np.nan, 2.0, 4.0]), np.array([1, 2, 2]))
    assert (known.value, known.low, known.high) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report"], "run without --report first"),
        (["--patients", "1"], "at least 2 patients"),
        (["--stays", "3"], "20 stays"),
        (["--methods", "lime"], "invalid choice"),
        (["--models", "lstm"], "invalid choice"),
        (["--models", "ehrmamba", "--tasks", "gout", "--patients", "2"], "expected one of"),
        (["--checkpoint", "nowhere", "--models", "ehrmamba"], "nowhere"),
    ],
)
def test_bad_input_is_told(tmp_path, arguments, message):
    finished = run("--output", tmp_path, *arguments)
    assert finished.returncode != 0
    assert message in finished.stderr


def test_the_costs_of_integrated_gradients_are_told():
    script = "benchmarks.speed.bench_integrated_gradients"
    finished = run_module(script, "--quick", "--repeats", 1, "--families", "ehrmamba", "--nodes", 2)
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout)["ehrmamba"]
    assert told["tokens"] == 200
    assert told["forwards"] > 1
    assert told["peak_mib_double_length"] > 0

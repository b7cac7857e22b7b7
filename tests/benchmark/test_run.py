"""The command from a dataset to its report: what it writes, that numbers are those of its predictions; going on."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score
from typer.testing import CliRunner

from ehrseq.benchmark import SYSTEMS, run_benchmark
from ehrseq.benchmark.results import finished_cells
from ehrseq.cli.app import app
from ehrseq.data.dataset import EventDataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.evaluation import best_f1_threshold
from ehrseq.training.trainer import last_checkpoint
from tests.benchmark.cohorts import write_budget, write_known, write_simulated
from tests.pages import read_page

TASKS = ["long_stay_7d", "readmission_30d"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    return write_simulated(tmp_path_factory.mktemp("data") / "simulated")


@pytest.fixture(
    scope="module",
    params=[["logistic", "multibird", "ehrmamba"], pytest.param(list(SYSTEMS), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def finished(request, simulated, tmp_path_factory):
    """A run: its folder, its systems, its table."""
    folder = tmp_path_factory.mktemp("run")
    options = {"tasks": TASKS, "budget": write_budget(folder), "workers": 1, "num_resamples": 50}
    text = run_benchmark(simulated, out=folder / "out", models=request.param, **options)
    return folder / "out", request.param, text


def predictions(out, system, seed=0):
    return pl.read_parquet(out / "cells" / system / f"seed{seed}" / "predictions.parquet")


# -- what it writes ----------------------------------------------------------------------------------------------------


def test_every_system_scores_every_row_of_the_same_patients(finished, simulated):
    out, systems, text = finished
    assert list(finished_cells(out)) == systems
    held_out = EventDataset(simulated).splits.filter(pl.col("split") == "held_out")["subject_id"]
    tuning = EventDataset(simulated).splits.filter(pl.col("split") == "tuning")["subject_id"]
    first = predictions(out, "logistic")
    for name in systems:
        table = predictions(out, name)
        assert table.drop("score").equals(first.drop("score"))
        assert table["score"].is_between(0, 1).all()
        assert set(table.filter(pl.col("part") == "test")["subject_id"]) <= set(held_out)
        assert set(table.filter(pl.col("part") == "tuning")["subject_id"]) <= set(tuning)
        assert SYSTEMS[name].title in text


def test_numbers_are_those_of_the_predictions(finished):
    out, systems, _ = finished
    numbers = pl.read_csv(out / "results.csv")
    for name in systems:
        table = predictions(out, name)
        for task in TASKS:
            own = table.filter(pl.col("task") == task, pl.col("part") == "test")
            tuning = table.filter(pl.col("task") == task, pl.col("part") == "tuning")
            truth, scores = own["label"].to_numpy(), own["score"].to_numpy()
            best = best_f1_threshold(tuning["label"].to_numpy(), tuning["score"].to_numpy())
            expected = {
                "auroc": roc_auc_score(truth, scores),
                "auprc": average_precision_score(truth, scores),
                "brier": brier_score_loss(truth, scores),
                "f1": f1_score(truth, scores >= best),
            }
            found = numbers.filter(pl.col("task") == task, pl.col("system") == name)
            for metric, value in expected.items():
                row = found.row(by_predicate=pl.col("metric") == metric, named=True)
                assert row["value"] == pytest.approx(value, abs=1e-6), (name, task, metric)
                assert row["low"] <= row["high"]
                assert row["labels"] == own.height
            if name != "ehrmamba":
                other = predictions(out, "ehrmamba").filter(pl.col("task") == task, pl.col("part") == "test")
                row = found.row(by_predicate=pl.col("metric") == "auroc over the reference", named=True)
                reference = roc_auc_score(truth, other["score"])
                assert row["value"] == pytest.approx(expected["auroc"] - reference, abs=1e-6)


def test_simulated_patients_show_the_best_possible(finished, simulated):
    out, _, text = finished
    rows = predictions(out, "logistic").filter(pl.col("task") == TASKS[0], pl.col("part") == "test")
    cohort = simulate(120, 5, progress=False)
    risk = cohort.true_risk(TASKS[0], rows["subject_id"], rows["prediction_time"])
    expected = roc_auc_score(rows["label"], risk)
    found = pl.read_csv(out / "results.csv").filter(pl.col("system") == "best possible", pl.col("task") == TASKS[0])
    assert found["value"].item() == pytest.approx(expected, abs=1e-6)
    assert f"{expected:.3f}" in text


def test_predictions_are_in_the_schema_of_meds_evaluation(finished):
    out, _, _ = finished
    table = pl.read_parquet(out / "predictions" / "ehrmamba" / "seed0" / f"{TASKS[0]}.parquet")
    assert table.columns == [
        "subject_id",
        "prediction_time",
        "boolean_value",
        "predicted_boolean_value",
        "predicted_boolean_probability",
    ]
    assert table["predicted_boolean_probability"].is_between(0, 1).all()


def test_every_system_had_the_same_budget(finished):
    out, _, _ = finished
    results = {name: json.loads((paths[0] / "result.json").read_text()) for name, paths in finished_cells(out).items()}
    for name, result in results.items():
        if SYSTEMS[name].neural:
            seen = result["tokens"] + (result["pretraining"] or {"tokens": 0})["tokens"]
            assert seen == pytest.approx(12_000, rel=0.25), name  # whole steps
            assert len(result["trials"]) == 1
            assert result["models"] == (1 if SYSTEMS[name].multitask else 2)
        else:
            assert all(len(task["tried"]) == 1 for task in result["trials"].values())
    if "bigbird" in results:
        assert results["bigbird"]["pretraining"] == results["multibird"]["pretraining"]
        assert results["ehrmamba"]["pretraining"] == results["ehrmamba_single"]["pretraining"]


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_holds_every_number(finished):
    out, _, text = finished
    source = (out / "report.html").read_text()
    page = read_page(source)
    assert "@media print" in source
    assert source.count("<svg") >= len(TASKS)  # the curves of each task, and subgroups where they can be estimated
    words = " ".join(page.texts)
    for number in re.findall(r"\d\.\d{3}", text):
        assert number in words


def test_a_browser_opens_the_page(finished, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no headless browser on this machine")
    picture = tmp_path / "page.pdf"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--print-to-pdf={picture}"]
    subprocess.run([*command, str(finished[0] / "report.html")], check=True, capture_output=True, timeout=120)
    assert picture.read_bytes().startswith(b"%PDF")


# -- going on ----------------------------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again_and_more_can_be_added(simulated, tmp_path):
    budget = write_budget(tmp_path)
    options = {"out": tmp_path / "out", "tasks": TASKS[:1], "budget": budget, "workers": 1, "num_resamples": 20}
    first = run_benchmark(simulated, models=["logistic"], **options)
    result = tmp_path / "out" / "cells" / "logistic" / "seed0" / "result.json"
    at = result.stat().st_mtime_ns
    assert run_benchmark(simulated, models=["logistic"], **options) == first
    more = run_benchmark(simulated, models=["logistic", "xgboost"], seeds=2, reference="logistic", **options)
    assert result.stat().st_mtime_ns == at
    assert "XGBoost" in more
    assert "XGBoost" not in first
    assert {name: len(paths) for name, paths in finished_cells(tmp_path / "out").items()} == {
        "xgboost": 2,
        "logistic": 2,
    }
    row = next(line for line in more.splitlines() if line.startswith("| XGBoost") and "[" in line)
    assert row.split("|")[-2].strip() != ""  # the t-test over seeds
    only = run_benchmark(simulated, report_only=True, reference="logistic", **options)
    assert only == more


def test_killed_and_begun_again_it_ends_with_the_same_scores(simulated, tmp_path):
    budget = write_budget(tmp_path, finetune_tokens=20_000)
    command = [sys.executable, "-P", "-m", "ehrseq.cli.app", "benchmark", str(simulated), "--budget", str(budget)]
    command += ["--tasks", TASKS[0], "--models", "ehrmamba", "--workers", "1", "--resamples", "20", "--out"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    stage = tmp_path / "killed" / "cells" / "ehrmamba" / "seed0" / "0-all" / "shared"
    while process.poll() is None and last_checkpoint(stage / "steps") is None:  # whole, not just begun
        time.sleep(0.005)
    process.kill()  # SIGKILL: nothing is tidied up
    process.wait()
    assert not (stage / "result.json").exists(), "it was killed too late"
    for name in ("killed", "undisturbed"):
        run_benchmark(
            simulated,
            out=tmp_path / name,
            tasks=TASKS[:1],
            models=["ehrmamba"],
            budget=budget,
            workers=1,
            num_resamples=20,
        )
    assert json.loads((stage / "result.json").read_text())["resumed"]
    killed, undisturbed = (predictions(tmp_path / name, "ehrmamba") for name in ("killed", "undisturbed"))
    assert killed.drop("score").equals(undisturbed.drop("score"))
    np.testing.assert_allclose(killed["score"], undisturbed["score"], atol=1e-6)
    assert (tmp_path / "killed" / "report.html").is_file()
    assert not list((tmp_path / "killed").rglob("checkpoint-*"))


def test_a_folder_that_another_process_writes_is_let_alone(simulated, tmp_path):
    options = {"out": tmp_path / "out", "tasks": TASKS[:1], "budget": write_budget(tmp_path), "num_resamples": 20}
    options |= {"models": ["logistic"], "reference": "logistic", "workers": 1}
    first = run_benchmark(simulated, **options)
    hold = "import sys, filelock as f; x = f.FileLock(sys.argv[1]); x.acquire(); print('held', flush=True); input()"
    command = [sys.executable, "-P", "-c", hold, str(tmp_path / "out" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        unfinished = tmp_path / "out" / "cells" / "logistic" / "seed0" / ".result.json.writing-1"
        unfinished.touch()
        with pytest.raises(ValueError, match="another `ehrseq benchmark`"):
            run_benchmark(simulated, **options)
        assert unfinished.exists()
        assert run_benchmark(simulated, report_only=True, **options) == first
        other.kill()
    assert run_benchmark(simulated, **options) == first


def test_another_system_of_records_is_reported_on(simulated, tmp_path):
    other = write_simulated(tmp_path / "other", patients=60, seed=6)
    budget = write_budget(tmp_path)
    command = ["benchmark", "--train", str(simulated), "--test", str(other), "--budget", str(budget)]
    command += ["--tasks", TASKS[0], "--models", "logistic", "--reference", "logistic", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--resamples", "20", "--workers", "1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    test = predictions(tmp_path / "out", "logistic").filter(pl.col("part") == "test")
    assert test["subject_id"].max() <= 60
    assert test["subject_id"].n_unique() > 20  # all of them that have a label, not the held-out ones alone
    assert "reported on all patients of" in done.output


# -- what must come out ------------------------------------------------------------------------------------------------


def run_known(folder, models, *, planted, tokens, num_resamples):
    dataset = write_known(folder / "known", planted=planted)
    budget = write_budget(folder, finetune_tokens=tokens, batch_rows=32)
    run_benchmark(
        dataset,
        out=folder / "out",
        tasks=["planted"],
        models=models,
        budget=budget,
        workers=1,
        num_resamples=num_resamples,
    )
    table = pl.read_csv(folder / "out" / "results.csv").filter(pl.col("metric") == "auroc")
    return {row["system"]: row for row in table.to_dicts()}


FAST = ["xgboost", "logistic", "ehrmamba"]
SLOW = [name for name in SYSTEMS if name not in FAST]


@pytest.mark.parametrize("models", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["fast", "slow"])
def test_labels_drawn_by_coin_cannot_be_told(tmp_path, models):
    found = run_known(tmp_path, models, planted=False, tokens=8_000, num_resamples=400)
    assert list(found) == [name for name in SYSTEMS if name in models]
    for name, row in found.items():
        assert row["low"] <= 0.5 <= row["high"], name


@pytest.mark.parametrize("models", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["fast", "slow"])
def test_a_code_that_tells_the_label_is_found(tmp_path, models):
    tokens = 60_000 if models is FAST else 200_000  # the baselines need more of them
    for name, row in run_known(tmp_path, models, planted=True, tokens=tokens, num_resamples=20).items():
        assert row["value"] == pytest.approx(1.0, abs=0.002), name


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gru"], "models got ['gru']"),
        (["--reference", "gru"], "models got ['gru']"),
        (["--tasks", "sepsis"], "has no labels of ['sepsis']"),
        (["--tasks", "long_stay_7d,long_stay_7d"], "each once"),
        (["--budget", "large"], "budget got 'large'"),
        (["--train", "a"], "give one DATASET, or both --train and --test"),
        (["--report-only"], "has no finished cell yet"),
        (["--kinds", "few"], "kinds got 'few'"),
        (["--tasks", "hypertension_paper"], "retrospective tasks"),
    ],
)
def test_bad_arguments_are_told(simulated, tmp_path, arguments, message):
    command = ["benchmark", str(simulated), "--out", str(tmp_path / "out"), *arguments]
    found = CliRunner().invoke(app, command)
    assert found.exit_code != 0
    assert isinstance(found.exception, ValueError)
    assert message in str(found.exception)


def test_data_that_cannot_be_used_are_told(simulated, tmp_path):
    budget = write_budget(tmp_path)
    options = {"models": ["logistic"], "budget": budget, "workers": 1}
    # 1. One class only among the training patients.
    dataset = write_known(tmp_path / "known", planted=True, patients=60)
    labels = dataset / "labels" / "planted" / "labels.parquet"
    pl.read_parquet(labels).with_columns(boolean_value=pl.lit(False)).write_parquet(labels)
    with pytest.raises(ValueError, match="the train patients have 30 labels of planted, 0 of them positive"):
        run_benchmark(dataset, out=tmp_path / "one", tasks=["planted"], **options)
    # 2. No splits.
    shutil.copytree(simulated, tmp_path / "bare")
    (tmp_path / "bare" / "metadata" / "subject_splits.parquet").unlink()
    with pytest.raises(ValueError, match="has no patients in pretrain or train"):
        run_benchmark(tmp_path / "bare", out=tmp_path / "two", tasks=TASKS, **options)
    # 3. Somebody's folder, and another run's.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty; name a new one"):
        run_benchmark(simulated, out=tmp_path / "mine", tasks=TASKS, **options)
    run_benchmark(simulated, out=tmp_path / "run", tasks=TASKS[:1], reference="logistic", num_resamples=20, **options)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run_benchmark(simulated, out=tmp_path / "run", tasks=TASKS, **options)
    # 4. No positive among the test patients is no error: the table says so.
    rows = pl.read_parquet(tmp_path / "run" / "cells" / "logistic" / "seed0" / "predictions.parquet")
    rows = rows.with_columns(label=pl.col("label") & (pl.col("part") != "test"))
    rows.write_parquet(tmp_path / "run" / "cells" / "logistic" / "seed0" / "predictions.parquet")
    text = run_benchmark(
        simulated, out=tmp_path / "run", tasks=TASKS[:1], reference="logistic", report_only=True, **options
    )
    assert "not estimable: 0 positives" in text
    with pytest.raises(ValueError, match="seeds got 0"):
        run_benchmark(simulated, out=tmp_path / "run", seeds=0, **options)


def test_cells_that_scored_other_rows_are_told(finished, tmp_path):
    out, _, _ = finished
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    file = copy / "cells" / "multibird" / "seed0" / "predictions.parquet"
    pl.read_parquet(file).head(-1).write_parquet(file)
    from ehrseq.benchmark.results import read_scores

    with pytest.raises(ValueError, match="scored other rows of"):
        read_scores(copy, TASKS)

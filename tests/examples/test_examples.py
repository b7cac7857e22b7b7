"""The example scripts on tiny simulated data, end to end; a resumed run; two processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from ehrseq.data.simulate.stays import simulate_stays
from ehrseq.encode import encode_dataset
from ehrseq.work.engine import get_engine
from tests.in_process import run_ehrseq

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True"]


def run(script: str, *options: object) -> str:
    """Run an example as a user does, but in this process, which saves seconds of imports."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(EXAMPLES / script), *map(str, options)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return printed.getvalue()


ONE_AFTER_THE_OTHER = """
import json, runpy, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
import datasets, ehrseq, polars, transformers.trainer
from ehrseq.encode import EncodedDataset
from ehrseq.training import trainer

def work(runs):
    leave, trainer.leave_process_group = trainer.leave_process_group, lambda: None  # the next run needs the group too
    for sys.argv in runs:
        runpy.run_path(sys.argv[0], run_name="__main__")
    leave()

# What `torchrun --standalone --nproc_per_node 2` does, whose two processes would import everything anew.
options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "examples", "start_method": "fork"}
elastic_launch(LaunchConfig(1, 1, 2, **options), work)(json.loads(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def two_processes(prepared, encoded, pretrained, tmp_path_factory) -> Path:
    """Folder of three runs on two CPU processes of torchrun's, which begin one after the other."""
    folder = tmp_path_factory.mktemp("two_processes")
    _without_dropout(pretrained, folder / "still")
    runs = [
        pretraining(prepared, folder / "packed", "--packing"),
        pretraining(encoded, folder / "streamed", "--stream", "--packing"),
        finetuning(prepared, folder / "still", folder / "finetuned", *FIVE_STEPS, processes=2),
    ]
    runs = [[str(EXAMPLES / script), *map(str, options)] for script, *options in runs]
    (folder / "runs.py").write_text(ONE_AFTER_THE_OTHER)
    done = subprocess.run(
        [sys.executable, "-P", folder / "runs.py", json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=EXAMPLES.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    printed = run("01_prepare_data.py", "--output", folder, "--num_patients", 120, "--seed", 3)
    assert "mortality_30d" in printed
    assert "coverage" in printed
    return folder


@pytest.fixture(scope="module")
def pretrained(prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    sizes = ["--hidden_size", 16, "--num_layers", 1, "--context", 64]
    options = ["--max_steps", 4, "--per_device_train_batch_size", 8, "--learning_rate", 3e-3]
    run("02_pretrain.py", "--data", prepared, "--output_dir", folder, *sizes, *options, *QUIET)
    return folder


def pretraining(prepared, folder, *options) -> tuple:
    """The script and the arguments of a few steps of pretraining."""
    sizes = ("--hidden_size", 16, "--num_layers", 1, "--context", 64, "--max_steps", 3, "--eval_strategy", "no")
    return ("02_pretrain.py", "--data", prepared, "--output_dir", folder, *sizes, *options, *QUIET)


FIVE_STEPS = ("--max_steps", 5, "--save_steps", 5)


def finetuning(prepared, pretrained, folder, *options, processes=1) -> tuple:
    """The script and its arguments: dropout off, so that one process and two, and a resumed run, can be compared."""
    return (
        *("03_finetune.py", "--data", prepared, "--model", pretrained, "--output_dir", folder, "--learning_rate", 1e-3),
        *("--per_device_train_batch_size", 8 // processes, "--rows", 96, "--logging_steps", 1),
        *("--eval_strategy", "no", *QUIET, *options),
    )


def finetune(prepared, pretrained, folder, *options) -> dict:
    """Finetune in this process; the state of the last checkpoint."""
    run(*finetuning(prepared, pretrained, folder, *options))
    return last_state(folder)


def last_state(folder) -> dict:
    checkpoints = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((checkpoints[-1] / "trainer_state.json").read_text())


def test_the_four_scripts_make_scores_of_simulated_patients(prepared, pretrained, tmp_path):
    options = ["--max_steps", 4, "--save_steps", 2, "--positive_share", 0.4, "--patience", 1, "--save_total_limit", 1]
    options += ["--eval_strategy", "steps", "--eval_steps", 2, "--load_best_model_at_end"]
    options += ["--metric_for_best_model", "auroc_mean"]
    state = finetune(prepared, pretrained, tmp_path / "finetune", *options)
    assert {"eval_auroc_mean", "eval_loss"} <= set(state["log_history"][-1])

    config = json.loads((tmp_path / "finetune" / "config.json").read_text())
    assert all(task["log_odds_shift"] > 0 for task in config["tasks"])  # positives were drawn more often
    assert (tmp_path / "finetune" / "tokenizer_config.json").exists()

    output = tmp_path / "risks.parquet"
    printed = run("04_predict.py", "--data", prepared, "--model", tmp_path / "finetune", "--output", output)
    assert "AUROC" in printed
    assert "'score'" in printed
    risks = pl.read_parquet(output)
    assert risks["score"].is_between(0, 1).all()
    assert risks["task"].n_unique() == 6


def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_ends(prepared, pretrained, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune(prepared, pretrained, whole, "--max_steps", 6, "--save_steps", 3)
    finetune(prepared, pretrained, broken, "--max_steps", 6, "--save_steps", 3)
    # As if the machine had failed after the first checkpoint.
    for path in broken.iterdir():
        if path.name != "checkpoint-3":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finetune(prepared, pretrained, broken, "--max_steps", 6, "--save_steps", 3)
    weights = [load_file(folder / "model.safetensors") for folder in (whole, broken)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_packing_trains_as_padding_does(prepared, pretrained, tmp_path):
    """Dropout being off, the same patients in the same batches: the same losses, step by step."""
    still, losses = tmp_path / "still", []
    _without_dropout(pretrained, still)
    for number, options in enumerate([[], ["--packing"]]):
        state = finetune(prepared, still, tmp_path / str(number), "--max_steps", 4, "--save_steps", 4, *options)
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


@pytest.mark.parametrize("option", [["--packing"], ["--train_sampling_strategy", "group_by_length"]])
def test_pretraining_without_padding(prepared, tmp_path, option):
    run(*pretraining(prepared, tmp_path, *option))
    assert (tmp_path / "model.safetensors").exists()


def test_two_processes_pretrain_without_padding(two_processes):
    assert (two_processes / "packed" / "model.safetensors").exists()


def test_two_processes_train_as_one(prepared, two_processes, tmp_path):
    """torchrun with two CPU processes and half the batch each: the same losses, dropout being off."""
    alone = finetune(prepared, two_processes / "still", tmp_path / "alone", *FIVE_STEPS)
    runs = [alone, last_state(two_processes / "finetuned")]
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in runs]
    assert len(losses[0]) == len(losses[1]) == 5
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    weights = [load_file(each / "model.safetensors") for each in (tmp_path / "alone", two_processes / "finetuned")]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=2e-4), name


@pytest.fixture(scope="module")
def encoded(prepared) -> Path:
    """What `ehrseq tokenize` writes, with the tokenizer of the first example."""
    output = prepared / "dataset" / "encoded"
    encode_dataset(prepared / "dataset", output, prepared / "tokenizer", engine=get_engine(num_workers=1))
    return output


def test_encoded_files_train_as_tables_do(prepared, encoded, pretrained, tmp_path):
    sizes = ["--hidden_size", 16, "--num_layers", 1, "--context", 64, "--max_steps", 4, "--packing"]
    options = [*sizes, "--per_device_train_batch_size", 8, "--learning_rate", 3e-3, *QUIET]
    for number, data in enumerate((prepared, encoded)):
        run("02_pretrain.py", "--data", data, "--output_dir", tmp_path / f"pretrain{number}", *options)
        finetune(data, pretrained, tmp_path / f"finetune{number}", "--max_steps", 3, "--save_steps", 3)
    for stage in ("pretrain", "finetune"):
        table, files = (load_file(tmp_path / f"{stage}{number}" / "model.safetensors") for number in (0, 1))
        assert all(torch.equal(tensor, files[name]) for name, tensor in table.items()), stage


def test_two_processes_stream_files_of_their_own(two_processes):
    assert (two_processes / "streamed" / "model.safetensors").exists()


def _without_dropout(source: Path, target: Path) -> None:
    """A copy of a checkpoint whose config has no dropout (two processes draw other masks than one)."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((target / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "classifier_dropout": 0.0}
    (target / "config.json").write_text(json.dumps(config))


def test_a_case_study_draws_a_patient_who_died(prepared, pretrained, tmp_path):
    finetune(prepared, pretrained, tmp_path / "finetune", "--max_steps", 2, "--save_steps", 2)
    options = ["--data", prepared, "--model", tmp_path / "finetune", "--forecaster", pretrained, "--events", 6]
    printed = run("07_case_study.py", *options, "--output", tmp_path / "case")
    assert re.search(r"patient \d+ at .*: risk \d", printed)
    assert "of the last 6 events were among the five most probable" in printed
    assert (tmp_path / "case" / "case.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "case" / "case.html").read_text()
    assert "prefix_deltas" in page
    # Nothing after the prediction time enters the page: the death does not.
    assert "MEDS_DEATH" not in page


def test_hymate_goes_from_stays_to_a_table_of_scores(tmp_path):
    for name, seed in (("train", 1), ("test", 2)):
        simulate_stays(100, seed=seed).write(tmp_path / name)
    options = ["--train", tmp_path / "train", "--test", tmp_path / "test", "--output_dir", tmp_path / "out"]
    recipe = "hymate_quick"
    printed = run("06_hymate_train.py", *options, "--recipe", recipe, "--seeds", 2, "--boosting", "False")
    scores = pl.read_csv(tmp_path / "out" / "scores.csv")
    assert scores.columns == ["subject_id", "label", "seed 0", "seed 1", "mean of seeds"]
    assert "mean of seeds" in printed
    assert printed.count("last value") == 2
    # Again: every stage is kept, and so is every score.
    assert run("06_hymate_train.py", *options, "--recipe", recipe, "--seeds", 2, "--boosting", "False") == printed
    # Without reported stays: the same checkpoint, which one command applies to a folder of stays.
    assert "seed0/outcome is ready" in run("06_hymate_train.py", *options[:2], *options[4:], "--recipe", recipe)
    model, out = tmp_path / "out" / "seed0" / "outcome", tmp_path / "predictions.parquet"
    done = run_ehrseq("predict", "--model", model, "--data", tmp_path / "test", "--out", out)
    assert done.returncode == 0, done.stderr
    predicted = pl.read_parquet(out).join(scores, on="subject_id")
    assert len(predicted) == len(scores)
    np.testing.assert_allclose(predicted["score"], predicted["seed 0"], atol=1e-5)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("01_prepare_data.py", ["--output", "{}/out", "--source", "{}/absent"]),
        ("02_pretrain.py", ["--data", "{}", "--output_dir", "{}/out"]),
        ("03_finetune.py", ["--data", "{}", "--model", "{}/absent", "--output_dir", "{}/out"]),
        ("04_predict.py", ["--data", "{}", "--model", "{}/absent", "--output", "{}/out.parquet"]),
        ("05_push_to_hub.py", ["--model", "{}/absent", "--repo_id", "me/model"]),
        ("07_case_study.py", ["--data", "{}", "--model", "{}/absent", "--forecaster", "{}/absent"]),
        ("06_hymate_train.py", ["--train", "{}", "--output_dir", "{}/out", "--recipe", "absent"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, script, options):
    with pytest.raises(SystemExit) as ended:
        run(script, *(option.format(tmp_path) for option in options))
    assert str(ended.value).startswith("error: ")

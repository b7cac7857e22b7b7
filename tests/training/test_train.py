"""`ehrseq train`: a labelled dataset becomes a folder with a model; stopped, changed, on a full disk, on bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from ehrseq.cli.app import main
from ehrseq.data.dataset import EventDataset, write_dataset
from ehrseq.data.physionet2012.reader import load_physionet2012
from ehrseq.data.simulate.cohort import simulate, simulated_name
from ehrseq.data.simulate.stays import simulate_stays
from ehrseq.encode import tokenize_dataset
from ehrseq.evaluation import choose_thresholds
from ehrseq.forecasting.stay_values import forecast_stays
from ehrseq.hub.checkpoints import load_checkpoint
from ehrseq.modeling import modeling_ehrmamba
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
from ehrseq.prediction.risks import predict_risks
from ehrseq.tasks import label_events, load_task, read_labels, write_labels
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.training.named_recipes import read_recipe
from ehrseq.training.prompts import PromptStages, context_of, load_rows
from ehrseq.training.run import TrainedModel, train_model
from ehrseq.work.engine import get_engine

TASKS = ["mortality_30d", "readmission_30d"]
CHANGES = [
    *("model.hidden_size=16", "model.max_position_embeddings=64", "pretrain.rows=64", "pretrain.batch_size=16"),
    *("shared.rows=32", "shared_context=128", "finetune.rows=64", "finetune.batch_size=16", "max_rows_per_task=40"),
]
STAGES = ("pretrain", "shared", "finetune")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """90 simulated patients with labels of two tasks."""
    folder = tmp_path_factory.mktemp("data") / "dataset"
    cohort = simulate(90, 3, progress=False)
    write_dataset(cohort.events(), folder, dataset_name=simulated_name(3))
    events = EventDataset(folder).events()
    write_labels(label_events(events, [load_task(name) for name in TASKS], end_of_data=cohort.end_of_data), folder)
    return folder


def train(dataset: Path, out: Path, *more: str, seed: int = 0, recipe: str = "demo") -> TrainedModel:
    changes = [*(CHANGES if recipe == "demo" else ()), *more]
    return train_model(dataset, out, recipe=recipe, changes=changes, seed=seed, num_resamples=20)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> TrainedModel:
    return train(dataset, tmp_path_factory.mktemp("out") / "model")


def weights(model: TrainedModel | Path) -> dict[str, np.ndarray]:
    folder = model.folder if isinstance(model, TrainedModel) else model
    return load_file(folder / "model.safetensors")


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(value, second[name]) for name, value in first.items())


def test_one_folder_holds_the_model_and_what_it_is_worth(dataset, trained):
    names = {path.name for path in trained.folder.iterdir()}
    assert {"config.json", "tokenizer.json", "README.md", "thresholds.json", "training.json", "evaluation"} <= names
    assert "steps" not in names
    assert not list(trained.folder.parent.glob(".*")), "the stages are gone"
    model, tokenizer = load_checkpoint(trained.folder)
    assert [task["name"] for task in model.config.tasks] == tokenizer.tasks == TASKS
    assert model.config.hidden_size == 16
    # Beside it stands the model that it began with, which forecasts, with the same tokenizer.
    before = AutoModelForCausalLM.from_pretrained(trained.folder / "pretrained")
    assert not before.untrained_weights()
    assert (trained.folder / "pretrained" / "tokenizer.json").read_bytes() == (
        trained.folder / "tokenizer.json"
    ).read_bytes()
    # The scores are those of the checkpoint, of held-out patients, with their labels.
    held_out = EventDataset(dataset).events("held_out")
    scores = trained.scores()
    assert set(scores["subject_id"]) <= set(held_out["subject_id"])
    risks, _ = predict_risks(
        trained.folder, held_out, prediction_times=scores["subject_id", "prediction_time"].unique()
    )
    keys = ["task", "subject_id", "prediction_time"]
    both = scores.join(risks.rename({"score": "again"}), on=keys)
    np.testing.assert_allclose(both["score"], both["again"], atol=1e-6)
    truth = read_labels(dataset)
    for name in TASKS:
        own = scores.filter(pl.col("task") == name).drop("task", "score")
        assert own.join(truth[name], on=own.columns, how="semi").height == own.height > 0
    # Thresholds are those of the tuning patients.
    tuning = trained.scores("tuning")
    ids = tuning["task"].replace_strict(TASKS, [0, 1])
    expected = choose_thresholds(tuning["boolean_value"], tuning["score"], ids, TASKS)
    assert trained.thresholds == expected == json.loads((trained.folder / "thresholds.json").read_text())
    assert {name: metrics.threshold for name, metrics in trained.metrics.items()} == expected
    assert (trained.folder / "evaluation" / "evaluation.html").is_file()
    report = json.loads((trained.folder / "evaluation" / "evaluation.json").read_text())
    assert set(report["tasks"]) == set(TASKS)
    assert Path(report["predictions"]) == trained.folder / "evaluation" / "held_out.parquet"
    card = (trained.folder / "README.md").read_text()
    assert "Trained on simulated patients" in card
    assert "steps of shared" in card


def test_what_is_done_is_not_done_again_and_another_run_is_refused(dataset, trained):
    at = (trained.folder / "model.safetensors").stat().st_mtime_ns
    again = train(dataset, trained.folder)
    assert again == trained
    assert (trained.folder / "model.safetensors").stat().st_mtime_ns == at
    with pytest.raises(ValueError, match="trained otherwise: got another recipe, seed"):
        train(dataset, trained.folder, "finetune.rows=32", seed=1)


def test_a_finished_model_is_evaluated_anew_with_another_number_of_resamples(dataset, trained, tmp_path):
    other = shutil.copytree(trained.folder, tmp_path / "model")
    again = train_model(dataset, other, recipe="demo", changes=CHANGES, num_resamples=30)
    assert (trained.evaluation, again.evaluation) == ({"num_resamples": 20}, {"num_resamples": 30})
    assert "by 30 bootstrap resamples" in (other / "evaluation" / "evaluation.md").read_text()
    report = json.loads((other / "evaluation" / "evaluation.json").read_text())
    assert {task["num_resamples"] for task in report["tasks"].values()} == {30}
    assert Path(report["predictions"]) == other / "evaluation" / "held_out.parquet"
    # The model, its scores and what its training reached are kept.
    assert same(weights(again), weights(trained))
    for split in ("tuning", "held_out"):
        assert again.scores(split).equals(trained.scores(split))
    assert (again.stages, again.coverage, again.thresholds) == (trained.stages, trained.coverage, trained.thresholds)
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (trained.folder, other)]
    assert files[0] == files[1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    at = (other / "training.json").stat().st_mtime_ns
    assert train_model(dataset, other, recipe="demo", changes=CHANGES, num_resamples=30) == again
    assert (other / "training.json").stat().st_mtime_ns == at


def test_pretraining_learns_times_and_silences_where_it_is_asked(dataset, tmp_path, monkeypatch):
    """The stage's model has a time head, and every batch that it sees tells the silence up to the labels' end."""
    recipe = read_recipe("demo", [*CHANGES, "time_head=true", "follow_up=labels"])
    tasks = [load_task(name).to_config() for name in TASKS]
    rows = load_rows(dataset, tmp_path / "tokenizer", tasks, context_of(recipe))
    stages = PromptStages(recipe, rows, tasks, {}, seed=0)
    seen: list[float] = []
    silence = modeling_ehrmamba.silence_loss

    def remembered(config, logits, silent_days):
        seen.extend(silent_days.tolist())
        return silence(config, logits, silent_days)

    monkeypatch.setattr(modeling_ehrmamba, "silence_loss", remembered)
    result = stages.run("pretrain", tmp_path / "pretrain", None, {})
    model = EhrMambaForCausalLM.from_pretrained(tmp_path / "pretrain")
    assert model.time_head is not None
    end = simulate(90, 3, progress=False).end_of_data
    assert datetime.fromisoformat(result["settings"]["end_of_data"]) == end
    assert len(result["settings"]["model"]["time_edges"]) == model.time_head.num_bins - 1
    last = rows.dataset.events(["pretrain", "train"]).group_by("subject_id").agg(pl.col("time").max())
    possible = {round((end - time).total_seconds() / 86_400, 2) for time in last["time"].drop_nulls()}
    assert seen
    assert {round(days, 2) for days in seen} <= possible


def stop_in(stage: str, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """End the run when a stage keeps its first checkpoint: after it is written, or on a full disk within it."""
    from transformers import Trainer

    save = Trainer._save_checkpoint

    def save_and_stop(self, *args, **kwargs):
        if Path(self.args.output_dir).parent.name == stage and isinstance(error, OSError):
            raise error
        save(self, *args, **kwargs)
        if Path(self.args.output_dir).parent.name == stage:
            raise error

    patch.setattr(Trainer, "_save_checkpoint", save_and_stop)


def test_a_stopped_run_ends_as_an_undisturbed_one(dataset, trained, tmp_path, monkeypatch):
    for stage in STAGES:
        with monkeypatch.context() as patch:
            stop_in(stage, KeyboardInterrupt(), patch)
            with pytest.raises(KeyboardInterrupt):
                train(dataset, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    first = tmp_path / ".model.training" / "pretrain" / "model.safetensors"
    at = first.stat().st_mtime_ns
    # A changed stage is begun anew, those before it are kept.
    with monkeypatch.context() as patch:
        stop_in("finetune", KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            train(dataset, tmp_path / "model", "finetune.learning_rate=1e-4")
    assert first.stat().st_mtime_ns == at
    resumed = train(dataset, tmp_path / "model")
    assert [resumed.stages[stage]["resumed"] for stage in STAGES] == [True, True, False]
    assert same(weights(resumed), weights(trained))
    assert resumed.metrics == trained.metrics


def other_tasks(dataset: Path) -> None:
    shutil.rmtree(dataset / "labels" / TASKS[0])


def other_splits(dataset: Path) -> None:
    file = dataset / "metadata" / "subject_splits.parquet"
    swapped = pl.col("split").replace(["train", "held_out"], ["held_out", "train"])
    pl.read_parquet(file).with_columns(swapped).write_parquet(file)


@pytest.mark.parametrize(("change", "tasks"), [(other_tasks, TASKS[1:]), (other_splits, TASKS)])
def test_a_run_that_goes_on_with_other_tasks_or_splits_fits_its_tokenizer_anew(
    dataset, tmp_path, monkeypatch, change, tasks
):
    """What a stopped run has left was fitted on other patients, or has the tokens of other tasks."""
    other = shutil.copytree(dataset, tmp_path / "dataset")
    with monkeypatch.context() as patch:
        stop_in("pretrain", KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            train(other, tmp_path / "model")
    (left,) = (tmp_path / ".model.training").glob("tokenizer-*")
    before = EhrTokenizer.from_pretrained(left)
    assert before.tasks == TASKS
    change(other)
    tokenizer = load_checkpoint(train(other, tmp_path / "model", "shared=null").folder).encoder
    expected = EhrTokenizer.train(EventDataset(other).events(["pretrain", "train"]))
    assert tokenizer.tasks == tasks
    assert tokenizer.fitted_subjects_digest == expected.fitted_subjects_digest
    same_patients = before.fitted_subjects_digest == expected.fitted_subjects_digest
    assert same_patients == (change is other_tasks)


def test_a_full_disk_is_one_line_and_what_is_finished_stays(dataset, trained, tmp_path, monkeypatch, capsys):
    command = ["ehrseq", "train", str(dataset), "--out", str(tmp_path / "model"), "--recipe", "demo"]
    command += [word for change in CHANGES for word in ("--set", change)]
    monkeypatch.setattr(sys, "argv", command)
    with monkeypatch.context() as patch:
        stop_in("shared", OSError(errno.ENOSPC, "No space left on device"), patch)
        with pytest.raises(SystemExit):
            main()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1
    assert "disk is full" in told[0]
    assert (tmp_path / ".model.training" / "pretrain" / "result.json").is_file()
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code in (0, None)
    assert "AUROC" in capsys.readouterr().out
    assert same(weights(tmp_path / "model"), weights(trained))


def test_encoded_files_train_as_tables_do(dataset, tmp_path):
    """But for the order of the tasks within a shared prompt."""
    other = shutil.copytree(dataset, tmp_path / "dataset")
    plain = train(other, tmp_path / "plain", "shared=null")
    tokenize_dataset(other, model_max_length=64, engine=get_engine(num_workers=1))
    files = train(other, tmp_path / "files", "shared=null")
    assert same(weights(plain), weights(files))
    np.testing.assert_allclose(plain.scores()["score"], files.scores()["score"], atol=1e-6)
    assert train(other, tmp_path / "shared", "pretrain=null").stages["shared"]["steps"] == 4


@pytest.mark.parametrize(("encoded", "keep"), [(False, "best"), (True, "last")])
def test_a_task_of_one_class_is_left_out_and_named(dataset, tmp_path, encoded, keep):
    other = shutil.copytree(dataset, tmp_path / "dataset")
    file = other / "labels" / TASKS[0] / "labels.parquet"
    pl.read_parquet(file).with_columns(boolean_value=pl.lit(False)).write_parquet(file)
    if encoded:
        tokenize_dataset(other, engine=get_engine(num_workers=1))
    said: list[str] = []
    changes = [*CHANGES, "shared=null", "pretrain=null", f"finetune.keep={keep}"]
    trained = train_model(other, tmp_path / "model", recipe="demo", changes=changes, num_resamples=20, say=said.append)
    assert list(trained.metrics) == TASKS[1:]
    assert list(trained.left_out) == TASKS[:1]
    assert any(line.startswith(f"{TASKS[0]} is left out: the training patients have") for line in said)
    model, tokenizer = load_checkpoint(trained.folder)
    assert [task["name"] for task in model.config.tasks] == tokenizer.tasks == TASKS[1:]
    assert (trained.stages["finetune"].get("epochs", 0) > 1) == (keep == "best")


def test_hymate_learns_from_stays(tmp_path):
    simulate_stays(150, seed=3).write(tmp_path / "challenge")
    load_physionet2012(tmp_path / "challenge").write(tmp_path / "dataset")
    changes = ["model.hidden_size=8", "pretrain.epochs=1", "finetune.epochs=1", "finetune.max_grad_norm=0.5"]
    trained = train(tmp_path / "dataset", tmp_path / "model", *changes, recipe="hymate_quick")
    assert list(trained.metrics) == ["in_hospital_mortality"]
    assert trained.best_possible is None
    held_out = EventDataset(tmp_path / "dataset").events("held_out")
    forecasts = forecast_stays(trained.folder / "pretrained", held_out)
    assert forecasts["value"].count() > 100
    assert forecasts.filter(variable="HR")["unit"].unique().to_list() == ["bpm"]
    assert not (trained.folder / "pretrained" / "training.json").exists()
    risks, _ = predict_risks(trained.folder, held_out)
    both = trained.scores().join(risks.rename({"score": "again"}), on=["subject_id", "prediction_time"])
    assert both.height == trained.scores().height > 10
    np.testing.assert_allclose(both["score"], both["again"], atol=1e-6)
    at = (trained.folder / "training.json").stat().st_mtime_ns
    train(tmp_path / "dataset", tmp_path / "model", *changes, recipe="hymate_quick")
    assert (trained.folder / "training.json").stat().st_mtime_ns == at


BAD = {
    "no labels": ([], "has no labels (labels/<task>/); run `ehrseq label"),
    "empty labels": ([], "none of the tasks could be labelled"),
    "no splits": ([], "no patients in pretrain or train; its splits are none"),
    "no held-out patients": ([], "has no patients in held_out"),
    "one class": ([], "has no task with both classes"),
    "no dataset": ([], "holds no data/<split>/<n>.parquet"),
    "no token": ([], "has no token for ['readmission_30d']"),
    "another run": ([], "is no folder of `ehrseq train` and is not empty"),
    "no out": ([], "give a DATASET and --out MODEL"),
    "unknown recipe": (
        ["--recipe", "demmo"],
        "no recipe 'demmo'; give a YAML file, or a name of `ehrseq train --list`",
    ),
    "recipe in a circle": (["--recipe", "circle.yaml"], "has itself as its base"),
    "unknown key": (["--recipe", "key.yaml"], "has ['finetunee']; expected keys out of"),
    "unknown family": (["--recipe", "family.yaml"], "has the family 'gpt'; expected `family:` to be one of"),
    "unknown stage": (["--set", "finetuning.learning_rate=1e-3"], "nearest: finetune"),
    "unknown argument": (["--set", "finetune.lerning_rate=1"], "nearest: learning_rate"),
    "unknown field of the model": (["--set", "model.hiden_size=8"], "nearest: hidden_size"),
    "a word for a number": (["--set", "finetune.learning_rate=fast"], "learning_rate got 'fast'; expected a number"),
    "a word for a size": (["--set", "model.hidden_size=wide"], "hidden_size"),
    "an argument of Trainer's kind": (["--set", "finetune.optim=none"], "finetune: none is not a valid OptimizerNames"),
    "no value": (["--set", "finetune.learning_rate"], "expected KEY=VALUE"),
    "the seed": (["--set", "finetune.seed=3"], "give --seed"),
    "a stage's key without its own": (["--set", "bf16=perhaps"], "bf16"),
    "an unknown task": (["--set", "tasks=[sepsis]"], "tasks got ['sepsis']"),
    "two tasks for HyMaTE": (["--recipe", "hymate_quick"], "HyMaTE answers one question"),
    "no stays": (["--recipe", "hymate_quick", "--set", "tasks=[mortality_30d]"], "no stay begins in these events"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(dataset, tmp_path, monkeypatch, capsys, case):
    options, message = BAD[case]
    other, out = shutil.copytree(dataset, tmp_path / "dataset"), tmp_path / "model"
    labels, splits = other / "labels", other / "metadata" / "subject_splits.parquet"
    if case == "no labels":
        shutil.rmtree(labels)
    elif case in ("empty labels", "one class"):
        for file in labels.rglob("*.parquet"):
            table = pl.read_parquet(file)
            table = table.head(0) if case == "empty labels" else table.with_columns(boolean_value=pl.lit(True))
            table.write_parquet(file)
    elif case == "no splits":
        splits.unlink()
    elif case == "no held-out patients":
        pl.read_parquet(splits).with_columns(pl.col("split").replace("held_out", "train")).write_parquet(splits)
    elif case == "no dataset":
        shutil.rmtree(other / "data")
    elif case == "no token":
        tasks = [load_task(TASKS[0]).to_config()]
        tokenize_dataset(other, tasks=tasks, engine=get_engine(num_workers=1))
    elif case == "another run":
        out.mkdir()
        (out / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    Path("circle.yaml").write_text("base: circle.yaml\n")
    Path("key.yaml").write_text("base: demo\nfinetunee: {rows: 3}\n")
    Path("family.yaml").write_text("family: gpt\n")
    where = [str(other)] if case == "no out" else [str(other), "--out", str(out)]
    recipe = [] if "--recipe" in options else ["--recipe", "demo"]
    monkeypatch.setattr(sys, "argv", ["ehrseq", "train", *where, *recipe, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in told if line.startswith("error: ")]) == 1
    assert told[-1].startswith("error: ")
    assert message in told[-1]
    assert not (out / "training.json").exists()


def test_the_named_recipes_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ehrseq", "train", "--list"])
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[0]: line.split()[1] for line in lines}
    assert names["demo"] == names["ehrmamba_paper"] == "ehrmamba"
    assert names["hymate_paper"] == names["ablations/no_attention"] == "hymate"
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.slow
def test_two_processes_train_together(dataset, tmp_path):
    """As the guide says it; in a folder whose files are no modules (tests/work/test_safe_path.py)."""
    command = [Path(sys.executable).with_name("torchrun"), "--nproc_per_node", "2", "--standalone", "--no-python"]
    command += [Path(sys.executable).with_name("ehrseq"), "train"]
    command += [str(dataset), "--out", str(tmp_path / "model"), "--recipe", "demo"]
    command += [word for change in CHANGES for word in ("--set", change)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written to") == 1
    # The rows of a step are those of one process; but for dropout the losses are too.
    together, alone = train(dataset, tmp_path / "model"), train(dataset, tmp_path / "alone")
    for name in STAGES:
        losses = [model.stages[name]["training_loss"] for model in (together, alone)]
        np.testing.assert_allclose(losses[0][:1], losses[1][:1], rtol=0.05)
        assert together.stages[name]["steps"] == alone.stages[name]["steps"]

"""The MEDS-DEV recipe: its commands as the driver formats and runs them, on MEDS 0.3 and 0.4."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from ehrseq.benchmark.meds_dev import run_meds_dev
from tests.benchmark.cohorts import write_known
from tests.in_process import run_module

RECIPE = Path(__file__).parents[2] / "examples" / "meds_dev" / "ehrmamba"


def write_meds(folder, version):
    """A dataset and labels of a task, in the types and nullabilities of one version of MEDS."""
    dataset, labels = write_known(folder / "dataset", planted=True, patients=150), folder / "labels"
    splits = dataset / "metadata" / "subject_splits.parquet"
    table = pl.read_parquet(splits).with_columns(pl.col("split").replace("pretrain", "train"))
    table.write_parquet(splits)
    (dataset / "data" / "pretrain").rename(dataset / "data" / "train" / "more")
    known = pl.read_parquet(dataset / "labels" / "planted" / "labels.parquet")
    for split in ("train", "tuning", "held_out"):
        own = known.join(table.filter(pl.col("split") == split), on="subject_id", how="semi")
        (labels / split).mkdir(parents=True)
        if version == "0.3":
            # Its label schema: all values nullable, and the columns of the other kinds of label beside.
            own = own.with_columns(
                integer_value=pl.lit(None, pl.Int64),
                float_value=pl.lit(None, pl.Float64),
                categorical_value=pl.lit(None, pl.String),
            )
        fields = [
            pa.field("subject_id", pa.int64(), nullable=version == "0.3"),
            pa.field("prediction_time", pa.timestamp("us"), nullable=version == "0.3"),
            pa.field("boolean_value", pa.bool_()),
        ]
        if version == "0.3":
            fields += [pa.field("integer_value", pa.int64()), pa.field("float_value", pa.float64())]
            fields += [pa.field("categorical_value", pa.string())]
        pq.write_table(own.to_arrow().cast(pa.schema(fields)), labels / split / "0.parquet")
    if version == "0.3":
        for file in (dataset / "data").rglob("*.parquet"):
            rows = pl.read_parquet(file).drop("text_value", "visit_id", "unit", strict=False)
            rows.write_parquet(file)
    return dataset, labels, known.join(table.filter(pl.col("split") == "held_out"), on="subject_id", how="semi")


@pytest.fixture(scope="module", params=["0.3", pytest.param("0.4", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """The recipe's three commands, run as the driver runs them."""
    folder = tmp_path_factory.mktemp("meds_dev")
    dataset, labels, held_out = write_meds(folder, request.param)
    commands = yaml.safe_load((RECIPE / "model.yaml").read_text())["commands"]
    # In the order of the driver; what is trained is where the next command starts from.
    order = [("unsupervised", "train"), ("supervised", "train"), ("supervised", "predict")]
    values = {"dataset_dir": dataset, "labels_dir": labels, "demo": True, "model_dir": RECIPE, "split": "held_out"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for kind, mode in order:
        values["output_dir"] = folder / "out" / kind / mode
        command = commands[kind][mode].format(**values)
        if mode == "predict":  # one of them in a shell, as the driver does
            done = subprocess.run(command, shell=True, capture_output=True, text=True, env={**os.environ, "PATH": path})
        else:
            done = run_module(*shlex.split(command)[3:], function="run_meds_dev")
        assert done.returncode == 0, done.stderr[-2000:]
        values["model_initialization_dir"] = values["output_dir"]
    return SimpleNamespace(dataset=dataset, labels=labels, held_out=held_out, out=folder / "out", last=command)


def test_every_label_of_the_split_has_one_prediction(run):
    file = run.out / "supervised" / "predict" / "predictions.parquet"
    predictions = pl.read_parquet(file)
    assert predictions.schema == {
        "subject_id": pl.Int64,
        "prediction_time": pl.Datetime("us"),
        "boolean_value": pl.Boolean,
        "predicted_boolean_value": pl.Boolean,
        "predicted_boolean_probability": pl.Float32,
    }
    keys = ["subject_id", "prediction_time", "boolean_value"]
    assert predictions.select(keys).equals(run.held_out.sort(keys).select(keys))
    assert predictions["predicted_boolean_probability"].is_between(0, 1).all()
    # The label hangs on one code just before the prediction: whoever reads the record knows it.
    score = pl.col("predicted_boolean_probability").mean()
    by_label = predictions.group_by("boolean_value").agg(score).sort("boolean_value")
    assert by_label["predicted_boolean_probability"].diff()[1] > 0.2


def test_a_finished_command_does_nothing(run):
    file = run.out / "supervised" / "predict" / "predictions.parquet"
    at = file.stat().st_mtime_ns
    run_meds_dev(shlex.split(run.last)[4:])
    assert file.stat().st_mtime_ns == at


def test_meds_evaluation_takes_the_predictions(run):
    evaluation = pytest.importorskip("meds_evaluation.evaluate", reason="meds-evaluation is not installed")
    predictions = pl.read_parquet(run.out / "supervised" / "predict" / "predictions.parquet")
    found = evaluation.evaluate_binary_classification(predictions)
    truth = predictions["boolean_value"].to_numpy()
    expected = roc_auc_score(truth, predictions["predicted_boolean_probability"])
    assert found["samples_equally_weighted"]["roc_auc_score"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no labels", "holds no label table"),
        ("no folder of labels", "is no folder; expected the label tables"),
        ("one class", "both classes are needed"),
        ("strangers", "has no label of the patients of the split 'train'"),
        ("no checkpoint", "holds no finished checkpoint"),
        ("no train split", r"has no patient in the split\(s\) \['train'\]"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, change, message):
    dataset, labels = shutil.copytree(run.dataset, tmp_path / "d"), shutil.copytree(run.labels, tmp_path / "l")
    pretrained = run.out / "unsupervised" / "train"
    tables = list(labels.rglob("*.parquet"))
    if change == "no labels":
        for file in tables:
            file.unlink()
    elif change == "no folder of labels":
        labels = tmp_path / "absent"
    elif change == "one class":
        for file in tables:
            pl.read_parquet(file).with_columns(boolean_value=pl.lit(True)).write_parquet(file)
    elif change == "strangers":
        for file in tables:
            pl.read_parquet(file).with_columns(pl.col("subject_id") + 1_000_000).write_parquet(file)
    elif change == "no checkpoint":
        pretrained = tmp_path / "absent"
    command = ["finetune", "--labels_dir", str(labels), "--model_initialization_dir", str(pretrained)]
    if change == "no train split":
        splits = dataset / "metadata" / "subject_splits.parquet"
        pl.read_parquet(splits).with_columns(split=pl.lit("held_out")).write_parquet(splits)
        command = ["pretrain"]
    with pytest.raises(SystemExit, match=message):
        run_meds_dev([*command, "--dataset_dir", str(dataset), "--demo", "True", "--output_dir", str(tmp_path / "out")])


def test_a_missing_argument_is_told(capsys):
    with pytest.raises(SystemExit):
        run_meds_dev(["finetune", "--dataset_dir", "d", "--output_dir", "o"])
    assert "finetune needs --labels_dir and --model_initialization_dir" in capsys.readouterr().err

"""The command line: simulate, predict, and errors in one line."""

from __future__ import annotations

import shutil
import sys
from datetime import datetime, timedelta

import polars as pl
import pytest
from transformers import pipeline
from typer.testing import CliRunner

from ehrseq import __version__
from ehrseq.cli.app import app, main
from ehrseq.data.dataset import EventDataset
from ehrseq.data.schema import EVENT_SCHEMA
from ehrseq.data.simulate.cohort import simulate
from ehrseq.data.sources import load_events
from ehrseq.hub.checkpoints import save_checkpoint
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM, EhrMambaForSequenceClassification
from ehrseq.prediction.risks import predict_risks
from ehrseq.tasks import load_task
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.training.trainer import model_config

TASKS = ["readmission_30d", "mortality_30d"]  # not in alphabetical order


@pytest.fixture(scope="module")
def events():
    return simulate(12, seed=5, progress=False).events()


@pytest.fixture(scope="module")
def checkpoint(events, tmp_path_factory):
    """An untrained classifier with a shift of the log-odds that differs by task."""
    tasks = [load_task(name).to_config() for name in TASKS]
    tokenizer = EhrTokenizer.train(events, tasks=tasks, model_max_length=64)
    for number, task in enumerate(tasks):
        task["log_odds_shift"] = 1.5 * number
    config = model_config(tokenizer, tasks=tasks, hidden_size=16, num_hidden_layers=1, max_position_embeddings=64)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, EhrMambaForSequenceClassification(config), tokenizer)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def predict(model, data, out):
    return run("predict", "--model", model, "--data", data, "--out", out)


def test_version():
    assert run("--version").output.strip() == f"ehrseq {__version__}"


def test_simulate_writes_fhir_and_meds_of_the_same_patients(tmp_path):
    assert "9 simulated patients" in run("simulate", tmp_path / "fhir", "-n", 9, "--seed", 2).output
    run("simulate", tmp_path / "meds", "-n", 9, "--seed", 2, "--format", "meds")
    fhir, _ = load_events(tmp_path / "fhir", progress=False)
    meds = EventDataset(tmp_path / "meds").events()
    assert fhir.height == meds.height
    with pytest.raises(ValueError, match="not empty"):
        run("simulate", tmp_path / "fhir", "-n", 9)


def test_predict_gives_the_risks_of_the_pipeline(events, checkpoint, tmp_path):
    events.write_parquet(tmp_path / "events.parquet")
    output = tmp_path / "new" / "risks.parquet"
    printed = predict(checkpoint, tmp_path / "events.parquet", output).output
    risks = pl.read_parquet(output)
    scored, reasons = risks["score"].count(), risks["reason"].count()
    assert "12 patients, 24 rows in " in printed
    assert f": {scored} with a risk, {reasons} with a reason" in printed
    assert list(risks.columns) == ["subject_id", "prediction_time", "task", "label", "score", "reason"]
    assert not list(output.parent.glob("*.part"))
    risk = pipeline("ehr-risk", model=str(checkpoint))
    for subject in risks["subject_id"].unique().head(4):
        rows = events.filter(pl.col("subject_id") == subject).to_dicts()
        for answer in risk({"subject_id": subject, "events": rows}):
            own = risks.filter((pl.col("subject_id") == subject) & (pl.col("task") == answer["task"]))
            assert own["score"].item() == pytest.approx(answer["score"], abs=1e-6)
            assert own["reason"].item() == answer.get("reason")
            assert own["label"].item() == answer["label"]


def test_where_a_task_does_not_apply_the_table_says_why(tmp_path):
    day = datetime(2020, 1, 1)
    rows = [
        (1, day, "VISIT_START//IMP", "a"), (1, day + timedelta(hours=30), "LAB//LOINC//1", "a"),
        (2, day, "VISIT_START//IMP", "a"), (2, day + timedelta(hours=50), "VISIT_END//home", "a"),
        (3, day, "DIAGNOSIS//ICD10CM//I10", None), (3, day + timedelta(days=40), "MEDS_DEATH", None),
        (4, day - timedelta(days=9), "DIAGNOSIS//ICD10CM//I10", None),
        (4, day, "VISIT_START//IMP", "a"), (4, day + timedelta(hours=50), "VISIT_END//home", "a"),
    ]  # fmt: skip
    events = pl.DataFrame(rows, schema=["subject_id", "time", "code", "visit_id"], orient="row")
    names = ["mortality_30d", "long_stay_7d", "hypertension"]
    tasks = [load_task(name).to_config() for name in names]
    tokenizer = EhrTokenizer.train(events, tasks=tasks, model_max_length=64)
    config = model_config(tokenizer, tasks=tasks, hidden_size=16, num_hidden_layers=1, max_position_embeddings=64)
    save_checkpoint(tmp_path, EhrMambaForSequenceClassification(config), tokenizer)
    risks, report = predict_risks(tmp_path, events, progress=False)
    why = {(row["subject_id"], row["task"]): (row["reason"], row["score"] is None) for row in risks.to_dicts()}
    assert why == {
        (1, "mortality_30d"): ("no_discharge", False),
        (1, "long_stay_7d"): (None, False),
        (1, "hypertension"): ("no_discharge", False),
        (2, "mortality_30d"): (None, False),
        (2, "long_stay_7d"): ("stay_ended", True),
        (2, "hypertension"): (None, False),
        (3, "mortality_30d"): ("died_before_prediction", True),
        (3, "long_stay_7d"): ("died_before_prediction", True),
        (3, "hypertension"): ("died_before_prediction", True),
        (4, "mortality_30d"): (None, False),
        (4, "long_stay_7d"): ("stay_ended", True),
        (4, "hypertension"): ("earlier_code", True),
    }
    counts = {name: count for name, count in report.notes.items() if name.startswith("risks ") and count}
    assert counts == {
        "risks not given: the patient died at or before the prediction time": 3,
        "risks not given: the patient is in no hospital stay at the prediction time": 2,
        "risks not given: the diagnosis was recorded before the prediction time": 1,
        "risks outside their task: the patient has not been discharged from a hospital stay at the prediction time": 2,
    }
    risk = pipeline("ehr-risk", model=str(tmp_path))
    for subject in range(1, 5):
        for answer in risk({"events": events.filter(pl.col("subject_id") == subject).drop("subject_id").to_dicts()}):
            assert (answer.get("reason"), answer["score"] is None) == why[subject, answer["task"]]


def test_predict_at_asked_times_reads_nothing_later(events, checkpoint, tmp_path):
    middle = events.filter(pl.col("time").is_not_null())["time"].sort()[events.height // 2]
    first = events.filter(pl.col("time") <= middle - timedelta(days=400))["subject_id"].unique()
    times = pl.DataFrame({"subject_id": first, "prediction_time": [middle] * len(first)})
    times.write_csv(tmp_path / "times.csv")
    whole, _ = predict_risks(checkpoint, events, prediction_times=tmp_path / "times.csv", tasks=["mortality_30d"])
    known = events.filter((pl.col("time") <= middle) | pl.col("time").is_null())
    cut, _ = predict_risks(checkpoint, known, prediction_times=times, tasks=["mortality_30d"])
    assert whole.equals(cut)
    assert whole.height == len(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "nowhere"}, "no checkpoint folder nowhere"),
        ({"tasks": ["sepsis"]}, "unknown tasks \\['sepsis'\\]"),
        ({"tasks": "sepsis"}, "unknown tasks \\['sepsis'\\]"),
        ({"tasks": []}, "name at least one"),
        ({"tasks": 5}, r"tasks got 5 \(int\); expected the name of a task"),
        ({"batch_size": 0}, "batch_size got 0; expected a whole number"),
        ({"batch_size": -3}, "batch_size got -3"),
        ({"batch_size": 2.5}, "batch_size got 2.5"),
        ({"data": pl.LazyFrame()}, "data got LazyFrame; expected a path or a polars DataFrame"),
        ({"data": None}, "data got NoneType"),
        ({"data": pl.DataFrame(schema=EVENT_SCHEMA)}, "hold no event, so there is nobody to score"),
        (
            {"prediction_times": pl.DataFrame(schema={"subject_id": pl.Int64, "prediction_time": pl.Datetime("us")})},
            "has no row; leave it out",
        ),
        ({"checkpoint": ""}, "empty name"),
        ({"prediction_times": {"subject_id": [1]}}, "prediction_times got dict"),
        (
            {"prediction_times": pl.DataFrame({"subject_id": [1.5], "prediction_time": [datetime(2020, 1, 1)]})},
            "name patients by fractions",
        ),
        ({"data": "nowhere"}, "does not exist"),
        ({"prediction_times": pl.DataFrame({"subject_id": [1]})}, "lack \\['prediction_time'\\]"),
        (
            {"prediction_times": pl.DataFrame({"subject_id": [999], "prediction_time": [datetime(2020, 1, 1)]})},
            "1 patients without events, e.g. 999",
        ),
        ({"checkpoint": "/nowhere/at/all"}, "no checkpoint folder /nowhere/at/all"),
        ({"prediction_times": "nowhere.csv"}, "no file nowhere.csv"),
        ({"prediction_times": __file__}, "cannot be read as .py"),
        ({"prediction_times": pl.DataFrame({"subject_id": ["x"], "prediction_time": ["soon"]})}, "have the types"),
        (
            {"prediction_times": pl.DataFrame({"subject_id": [1], "prediction_time": [None]})},
            "1 prediction times lack the patient or the time",
        ),
    ],
)
def test_bad_requests_are_clear_errors(events, checkpoint, change, message):
    arguments = {"checkpoint": checkpoint, "data": events} | change
    with pytest.raises(ValueError, match=message):
        predict_risks(**arguments)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", lambda _: b"\0" * 50, "cannot be loaded, a file of it is damaged"),
        ("tokenizer.json", lambda _: b"{", "cannot be loaded, a file of it is damaged"),
        ("config.json", lambda text: text.replace(b'"hidden_size": 16', b'"hidden_size": 32'), "of another model"),
        (
            "config.json",
            lambda text: text.replace(b'"asked": {', b'"asked": 3, "was": {'),
            "'asked' of .* is 3; expected",
        ),
        ("tokenizer_config.json", lambda text: text.replace(b'"value_bins"', b'"bins"'), "no whole event vocabulary"),
    ],
)
def test_a_damaged_checkpoint_is_a_clear_error(events, checkpoint, file, change, message, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "damaged")
    text = (tmp_path / "damaged" / file).read_bytes()
    assert change(text) != text
    (tmp_path / "damaged" / file).write_bytes(change(text))
    with pytest.raises(ValueError, match=message):
        predict_risks(tmp_path / "damaged", events, progress=False)


def test_a_pretrained_model_gives_no_random_risks(events, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "pretrained")
    model = EhrMambaForSequenceClassification.from_pretrained(checkpoint)
    EhrMambaForCausalLM(model.config).save_pretrained(tmp_path / "pretrained")
    with pytest.raises(ValueError, match=r"lacks \[.*classifier.*it is a pretrained model"):
        predict_risks(tmp_path / "pretrained", events, progress=False)


def test_damaged_weights_give_no_risks(events, checkpoint, tmp_path):
    model = EhrMambaForSequenceClassification.from_pretrained(checkpoint)
    for parameter in model.classifier.parameters():
        parameter.data.fill_(float("nan"))
    save_checkpoint(tmp_path, model, EhrTokenizer.from_pretrained(checkpoint))
    with pytest.raises(ValueError, match="gives nan as a risk: its weights are damaged"):
        predict_risks(tmp_path, events, progress=False)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(checkpoint, tmp_path):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path, tmp_path / "file" / "risks.parquet", tmp_path / "risks.csv", tmp_path / "risks"):
        with pytest.raises(ValueError, match=r"cannot be written; give the name of a \.parquet file"):
            predict(checkpoint, tmp_path / "nowhere", output)
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        for command in (("simulate", folder), ("demo", "--output", folder)):
            with pytest.raises(ValueError, match=r"cannot be written; give the name of a new folder"):
                run(*command)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_an_incomplete_checkpoint_names_the_missing_file(events, checkpoint, file, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "part")
    (tmp_path / "part" / file).unlink()
    with pytest.raises(ValueError, match=f"it has no {file}"):
        predict_risks(tmp_path / "part", events)


def test_what_a_risk_cannot_stand_on_is_counted(checkpoint):
    events = pl.DataFrame(
        {
            "subject_id": [1, 2],
            "time": [datetime(2020, 1, 1), None],
            "code": ["NOBODY//KNOWS//THIS", "GENDER//F"],
        }
    )
    risks, report = predict_risks(checkpoint, events, tasks=TASKS[:1], progress=False)
    assert risks["subject_id"].to_list() == [1]
    assert report.notes["patients without a timed event, not scored"] == 1
    assert report.notes["events of unknown codes, read as [UNK]"] == 1
    early = pl.DataFrame({"subject_id": [1], "prediction_time": [datetime(2019, 1, 1)]})
    _, report = predict_risks(checkpoint, events, tasks=TASKS[:1], prediction_times=early, progress=False)
    assert report.notes["risks without a timed event up to the prediction time"] == 1


def test_a_pretrained_checkpoint_has_no_risks(events, tmp_path):
    tokenizer = EhrTokenizer.train(events, model_max_length=64)
    config = model_config(tokenizer, hidden_size=16, num_hidden_layers=1, max_position_embeddings=64)
    save_checkpoint(tmp_path, EhrMambaForSequenceClassification(config), tokenizer)
    with pytest.raises(ValueError, match="has no tasks"):
        predict_risks(tmp_path, events)


def test_an_error_is_one_line_and_no_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["ehrseq", "predict", "--model", str(tmp_path / "nowhere"), "--data", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error

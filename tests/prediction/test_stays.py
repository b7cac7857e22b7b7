"""`ehrseq predict` with a checkpoint that reads stays: scores, times, what cannot be read."""

from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from transformers import pipeline
from typer.testing import CliRunner

from ehrseq.batches.scoring import score_stays
from ehrseq.cli.app import app
from ehrseq.data.dataset import write_dataset
from ehrseq.data.physionet2012.codes import ADMISSION_CODE, TASK_CONFIG
from ehrseq.data.physionet2012.reader import load_physionet2012
from ehrseq.encode.triplets import PHYSIONET2012, build_triplets
from ehrseq.modeling.configuration_hymate import HyMaTEConfig
from ehrseq.modeling.modeling_hymate import HyMaTEForSequenceClassification
from ehrseq.prediction.risks import RISK_SCHEMA, predict_risks
from ehrseq.tasks import load_task
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

NAME = TASK_CONFIG["name"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Simulated stays in files, written by the command line; one of them has no series."""
    path = tmp_path_factory.mktemp("stays") / "stays"
    run("simulate-stays", path, "-n", 60, "--seed", 4)
    last = sorted(path.rglob("1*.txt"))[-1]
    lines = last.read_text().splitlines()
    last.write_text("\n".join(lines[:6]) + "\n")  # the header, RecordID, Age, Gender, Height, ICUType
    return path


@pytest.fixture(scope="module")
def stays(folder):
    return load_physionet2012(folder)


@pytest.fixture(scope="module")
def model(stays):
    table = build_triplets(stays.events, PHYSIONET2012, stays.labels)
    extractor = HyMaTEFeatureExtractor.fit(table)
    config = HyMaTEConfig(hidden_size=8, num_mamba_layers=1, num_attention_heads=2, num_labels=2, tasks=[TASK_CONFIG])
    return HyMaTEForSequenceClassification(config).eval(), extractor


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    for part in model:
        part.save_pretrained(path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_command_scores_a_folder_of_stays(folder, stays, model, checkpoint, tmp_path):
    out = tmp_path / "predictions.parquet"
    said = run("predict", "--model", checkpoint, "--data", folder, "--out", out).output
    risks = pl.read_parquet(out)
    assert dict(risks.schema) == RISK_SCHEMA
    assert risks["subject_id"].to_list() == sorted(stays.outcomes["subject_id"].to_list())
    assert set(risks["task"]) == {NAME}
    assert set(risks["label"]) == {TASK_CONFIG["positive_label"]}
    table = build_triplets(stays.events, PHYSIONET2012)
    scored = risks.filter(pl.col("score").is_not_null())
    assert scored["subject_id"].to_list() == table.subject_ids.tolist()
    np.testing.assert_allclose(scored["score"], score_stays(*model, table), atol=1e-7)
    # The stay without series stays in the table and is counted.
    empty = risks.filter(pl.col("score").is_null())
    assert empty["subject_id"].to_list() == [risks["subject_id"].max()]
    assert empty["reason"].to_list() == ["no_triplet"]
    assert "no value of a variable that the model knows" in said


def test_scores_are_those_of_the_pipeline(stays, checkpoint):
    risks, _ = predict_risks(checkpoint, stays.events, progress=False)
    subject = int(risks.filter(pl.col("score").is_not_null())["subject_id"][0])
    events = stays.events.filter(pl.col("subject_id") == subject)
    (answer,) = pipeline("ehr-risk", model=str(checkpoint))(events)
    assert answer["score"] == pytest.approx(risks.filter(pl.col("subject_id") == subject)["score"][0], abs=1e-6)


def test_at_asked_times_nothing_later_is_read(stays, checkpoint):
    whole, _ = predict_risks(checkpoint, stays.events, progress=False)
    times = whole.filter(pl.col("score").is_not_null()).select(
        "subject_id", prediction_time=pl.col("prediction_time") - timedelta(hours=24)
    )
    early, _ = predict_risks(checkpoint, stays.events, prediction_times=times, progress=False)
    half = times["prediction_time"][0]
    known = stays.events.filter(pl.col("time").is_null() | (pl.col("time") <= half))
    cut, _ = predict_risks(checkpoint, known, prediction_times=times, progress=False)
    assert early["score"].to_list() == pytest.approx(cut["score"].to_list(), abs=1e-7)
    both = early.join(whole, on="subject_id")
    assert (both["score"] - both["score_right"]).abs().max() > 1e-4


def test_a_time_before_the_stay_has_no_score_and_says_why(stays, checkpoint):
    start = stays.events.filter(pl.col("code") == ADMISSION_CODE)["time"].min()
    subject = int(stays.labels["subject_id"][0])
    times = pl.DataFrame({"subject_id": [subject] * 2, "prediction_time": [start - timedelta(1), start + timedelta(1)]})
    risks, report = predict_risks(checkpoint, stays.events, prediction_times=times, progress=False)
    assert risks["reason"].to_list() == ["no_stay", None]
    assert risks["score"][0] is None
    assert risks["score"][1] is not None
    notes = {name: count for name, count in report.notes.items() if count and "risks not given" in name}
    assert list(notes.values()) == [1]


def test_the_dead_have_no_score_by_any_path_and_are_counted(stays, checkpoint, tmp_path):
    alive, _ = predict_risks(checkpoint, stays.events, progress=False)
    scored = alive.filter(pl.col("score").is_not_null()).head(5)
    subjects, ends = scored["subject_id"].to_list(), scored["prediction_time"].to_list()
    empty = alive.filter(pl.col("score").is_null())["subject_id"][0]
    day, last = timedelta(1), timedelta(microseconds=1)
    deaths = [
        (subjects[0], None, None, "death_time_unknown"),
        (subjects[1], ends[1], None, "died_before_prediction"),
        (subjects[2], ends[2] + last, None, None),  # nothing later than the window's end is read
        (subjects[3], None, f"{ends[3] - 400 * day:%Y-%m}", "died_before_prediction"),
        (empty, None, None, "death_time_unknown"),  # says more than that nothing was measured
    ]
    rows = pl.DataFrame(
        [{"subject_id": who, "time": when, "code": "MEDS_DEATH", "text_value": text} for who, when, text, _ in deaths],
        schema_overrides={"time": pl.Datetime("us"), "text_value": pl.String},
    )
    events = pl.concat([stays.events, rows], how="diagonal")
    expected = {who: reason for who, _, _, reason in deaths}
    write_dataset(events, tmp_path / "dataset", dataset_name="stays")
    run("predict", "--model", checkpoint, "--data", tmp_path / "dataset", "--out", tmp_path / "a.parquet")
    at_times = alive.select("subject_id", "prediction_time")
    for risks in (
        predict_risks(checkpoint, events, progress=False)[0],
        predict_risks(checkpoint, events, prediction_times=at_times, progress=False)[0],
        pl.read_parquet(tmp_path / "a.parquet"),
    ):
        said = dict(risks.select("subject_id", "reason").iter_rows())
        assert {who: said[who] for who in expected} == expected
        without = risks.filter(pl.col("score").is_null())["subject_id"].to_list()
        assert sorted(without) == sorted(who for who, reason in expected.items() if reason)
        rest = risks.join(alive, on="subject_id").filter(pl.col("score").is_not_null())
        assert rest["score"].to_list() == pytest.approx(rest["score_right"].to_list(), abs=1e-6)
    _, report = predict_risks(checkpoint, events, progress=False)
    notes = {name: count for name, count in report.notes.items() if count and name.startswith("risks not given")}
    assert sorted(notes.values()) == [2, 2]
    pipe = pipeline("ehr-risk", model=str(checkpoint))
    for who in subjects[:4]:
        patient = events.filter(pl.col("subject_id") == who)
        (answer,) = pipe(patient, prediction_time=ends[subjects.index(who)])
        assert answer.get("reason") == expected[who]


def test_a_moment_that_was_not_learnt_is_scored_and_named_and_one_without_values_is_not(model, stays, tmp_path):
    mortal, extractor = model
    asking = HyMaTEForSequenceClassification(mortal.config.__class__(**mortal.config.to_dict()))
    asking.load_state_dict(mortal.state_dict())
    asking.config.tasks = [load_task("hospital_mortality_48h").to_config(), load_task("mortality_30d").to_config()]
    for part in (asking, extractor):
        part.save_pretrained(tmp_path / "checkpoint")
    events = stays.events.with_columns(pl.col("code").replace({ADMISSION_CODE: "VISIT_START//IMP"}))
    events = pl.concat([stays.events, events.filter(pl.col("code") == "VISIT_START//IMP")])
    risks, report = predict_risks(tmp_path / "checkpoint", events, progress=False)
    empty = risks["subject_id"].max()
    found = {task: set(rows["reason"]) for (task,), rows in risks.partition_by("task", as_dict=True).items()}
    assert found == {"hospital_mortality_48h": {None, "no_triplet"}, "mortality_30d": {"no_discharge", "no_triplet"}}
    assert risks.filter(pl.col("score").is_null())["subject_id"].to_list() == [empty, empty]
    note = "risks outside their task: the patient has not been discharged from a hospital stay at the prediction time"
    assert report.notes[note] == risks["subject_id"].n_unique() - 1


def test_a_checkpoint_of_stays_without_its_extractor_is_refused(model, folder, tmp_path):
    model[0].save_pretrained(tmp_path / "part")
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        predict_risks(tmp_path / "part", folder, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": pl.DataFrame({"subject_id": [1]})}, "are absent"),
        ({"tasks": ["mortality_30d"]}, "unknown tasks"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_is_a_clear_error(stays, checkpoint, change, message):
    arguments = {"checkpoint": checkpoint, "data": stays.events, "progress": False} | change
    with pytest.raises(ValueError, match=message):
        predict_risks(**arguments)


def test_patients_without_a_stay_are_counted(stays, checkpoint):
    subject = int(stays.labels["subject_id"][0])
    events = stays.events.filter((pl.col("code") != ADMISSION_CODE) | (pl.col("subject_id") != subject))
    risks, report = predict_risks(checkpoint, events, progress=False)
    assert subject not in risks["subject_id"]
    assert report.notes["patients without a stay, not scored"] == 1


def test_records_without_stays_are_a_clear_error(stays, checkpoint):
    others = stays.events.filter(pl.col("code") != ADMISSION_CODE)
    with pytest.raises(ValueError, match="no stay begins in these events"):
        predict_risks(checkpoint, others, progress=False)

"""Contributions of many patients are those of each alone; stopped runs go on; nothing later is read."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ehrseq.data.dataset import write_dataset
from ehrseq.data.schema import EVENT_SCHEMA
from ehrseq.hub.checkpoints import load_checkpoint
from ehrseq.interpretability import datasets
from ehrseq.interpretability.datasets import EXPLAINED_SCHEMA, explain_dataset
from ehrseq.interpretability.methods import explain
from ehrseq.interpretability.subjects import explain_subjects, write_pages
from ehrseq.prediction.risks import predict_risks
from ehrseq.work.engine import get_engine
from tests.checkpoints.patients import make_patient, make_table
from tests.checkpoints.stays import make_stay

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
MAMBA, HYMATE = CHECKPOINTS / "ehrmamba", CHECKPOINTS / "hymate"
TASK, STAY_TASK = "mortality_30d", "in_hospital_mortality"
ONE = get_engine(num_workers=1)
PATIENTS = 9


@pytest.fixture(scope="module")
def events():
    return make_table([make_patient(subject_id) for subject_id in range(PATIENTS)])


@pytest.fixture(scope="module")
def dataset(events, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dataset"
    codes = {"DIAGNOSIS//ICD10CM//I50": "Heart failure"}
    write_dataset(events, path, dataset_name="test", shard_size=60)
    pl.DataFrame({"code": list(codes), "description": list(codes.values()), "parent_codes": [None]}).write_parquet(
        path / "metadata" / "codes.parquet"
    )
    return path


@pytest.fixture(autouse=True)
def few_subjects_a_part(monkeypatch):
    monkeypatch.setattr(datasets, "SUBJECTS_OF_A_PART", 2)


def rows_of(table, subject):
    return table.filter(pl.col("subject_id") == subject)


def assert_alone(table, events, subject, at, task, checkpoint, method=None):
    """The rows of a patient are the explanation of the patient in hand."""
    record = events.filter(pl.col("subject_id") == subject)
    alone = explain(load_checkpoint(checkpoint), record, task, method, prediction_time=at)
    rows = table.filter(
        pl.col("subject_id") == subject, pl.col("prediction_time") == at, pl.col("task") == task,
        pl.col("method") == alone.method,
    )  # fmt: skip
    assert rows["score"].unique().to_list() == [alone.score]
    assert rows["code"].equals(alone.contributions["code"])
    np.testing.assert_allclose(rows["contribution"], alone.contributions["contribution"], atol=1e-12)
    first = rows.row(0, named=True)
    total = first["baseline"] + rows["contribution"].sum() + first["remainder"]
    assert total == pytest.approx(first["log_odds"], abs=1e-9)


def test_contributions_are_those_of_each_patient_alone(events, tmp_path):
    report = explain_dataset(MAMBA, events, tmp_path / "out.parquet", tasks=TASK, engine=ONE)
    table = pl.read_parquet(tmp_path / "out.parquet")
    assert table.schema == pl.Schema(EXPLAINED_SCHEMA)
    ends = events.group_by("subject_id").agg(pl.col("time").max())
    assert table["subject_id"].is_sorted()
    for subject, at in ends.iter_rows():
        assert_alone(table, events, subject, at, TASK, MAMBA)
    assert report.subjects == PATIENTS
    assert report.notes["events that take no part"] == PATIENTS  # the births


def test_times_of_patients_of_other_splits_are_left_out(events, tmp_path):
    """The ids of a split's file lie between those of others."""
    names = [("train", "held_out")[subject % 2] for subject in range(PATIENTS)]
    splits = pl.DataFrame({"subject_id": list(range(PATIENTS)), "split": names})
    write_dataset(events, tmp_path / "dataset", dataset_name="test", splits=splits, shard_size=60)
    times = events.group_by("subject_id").agg(prediction_time=pl.col("time").max())
    times.write_parquet(tmp_path / "times.parquet")
    asked = {"tasks": TASK, "prediction_times": tmp_path / "times.parquet", "engine": ONE}
    explain_dataset(MAMBA, tmp_path / "dataset", tmp_path / "all.parquet", **asked)
    explain_dataset(MAMBA, events, tmp_path / "memory.parquet", **asked)
    made, expected = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("all", "memory"))
    assert made.sort("subject_id", maintain_order=True).equals(expected.sort("subject_id", maintain_order=True))


def test_scores_and_reasons_are_those_of_predict(events, tmp_path):
    died = pl.DataFrame(
        {"subject_id": [0], "time": [events.filter(subject_id=0)["time"].min() + timedelta(days=36500)]}
    ).with_columns(code=pl.lit("MEDS_DEATH"))
    with_death = pl.concat([events, died.match_to_schema(events.schema, missing_columns="insert")])
    report = explain_dataset(MAMBA, with_death, tmp_path / "out.parquet", engine=ONE)
    table = pl.read_parquet(tmp_path / "out.parquet")
    risks, known_report = predict_risks(MAMBA, with_death, progress=False)
    keys = ["subject_id", "prediction_time", "task"]
    ours = table.select(*keys, "score", "reason").unique().sort(keys)
    known = risks.select(*keys, "score", "reason").sort(keys)
    assert ours.drop("score").equals(known.drop("score"))
    assert ours["score"].is_null().equals(known["score"].is_null())
    assert ours["score"].null_count() > 0
    np.testing.assert_allclose(ours["score"].drop_nulls(), known["score"].drop_nulls(), atol=1e-6)
    words = {word: count for word, count in known_report.notes.items() if word.startswith("risks not given") and count}
    assert words
    assert {word: report.notes[word] for word in words} == words
    unanswered = table.filter(pl.col("score").is_null())
    assert unanswered["contribution"].null_count() == unanswered.height == ours["score"].null_count()


def test_files_give_what_the_table_gives_and_name_codes(events, dataset, tmp_path):
    explain_dataset(MAMBA, events, tmp_path / "whole.parquet", tasks=TASK, engine=ONE)
    explain_dataset(MAMBA, dataset, tmp_path / "files.parquet", tasks=TASK, engine=ONE)
    whole, files = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("whole", "files"))
    keys = ["subject_id", "event"]
    assert files.sort(keys).drop("display").equals(whole.sort(keys).drop("display"))
    named = files.filter(pl.col("display").is_not_null())
    assert set(named["display"]) == {"Heart failure"}
    assert set(named["code"]) == {"DIAGNOSIS//ICD10CM//I50"}


def test_only_the_asked_split(events, dataset, tmp_path):
    split = sorted(path.name for path in (dataset / "data").iterdir())[0]
    explain_dataset(MAMBA, dataset, tmp_path / "out.parquet", tasks=TASK, splits=[split], engine=ONE)
    inside = pl.read_parquet(sorted((dataset / "data" / split).glob("*.parquet")))["subject_id"].unique()
    assert set(pl.read_parquet(tmp_path / "out.parquet")["subject_id"]) == set(inside)


def middle_times(events):
    return events.group_by("subject_id", maintain_order=True).agg(
        pl.col("time").sort().get(pl.len() // 2).alias("prediction_time")
    )


@pytest.mark.parametrize("method", ["prefix_deltas", "occlusion", "relevance"])
def test_nothing_after_the_prediction_time_is_read(events, tmp_path, method):
    times = middle_times(events).filter(pl.col("subject_id") < 3)
    known = events.join(times, on="subject_id").filter(pl.col("time") <= pl.col("prediction_time"))
    asked = {"tasks": TASK, "methods": method, "prediction_times": times, "engine": ONE}
    explain_dataset(MAMBA, events, tmp_path / "whole.parquet", **asked)
    explain_dataset(MAMBA, known.select(events.columns), tmp_path / "cut.parquet", **asked)
    whole, cut = (pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("whole", "cut"))
    assert whole.drop("event").equals(cut.drop("event"))
    assert set(whole["subject_id"]) == {0, 1, 2}


def test_several_tasks_methods_and_settings(events, tmp_path):
    explain_dataset(
        MAMBA,
        events.filter(pl.col("subject_id") < 2),
        tmp_path / "out.parquet",
        tasks=[TASK, "readmission_30d"],
        methods=["prefix_deltas", "occlusion"],
        settings={"occlusion": {"groups": "code"}},
        engine=ONE,
    )
    table = pl.read_parquet(tmp_path / "out.parquet")
    assert table.select("task", "method").unique().height == 4
    grouped = table.filter(pl.col("method") == "occlusion")["group"]
    assert "LAB//LOINC//2345-7" in grouped.to_list()


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(dataset, tmp_path, monkeypatch):
    asked = {"tasks": TASK, "engine": ONE, "parts": tmp_path / "parts"}
    explain_dataset(MAMBA, dataset, tmp_path / "whole.parquet", **asked)
    assert not (tmp_path / "parts").exists()
    explained, own = [], datasets.explain_events

    def interrupted(*arguments):
        explained.append(arguments)
        if len(explained) == 3:
            raise KeyboardInterrupt
        return own(*arguments)

    monkeypatch.setattr(datasets, "explain_events", interrupted)
    with pytest.raises(KeyboardInterrupt):
        explain_dataset(MAMBA, dataset, tmp_path / "out.parquet", **asked)
    assert not (tmp_path / "out.parquet").exists()
    report = explain_dataset(MAMBA, dataset, tmp_path / "out.parquet", **asked)
    parts = sum(
        -(-pl.read_parquet(file)["subject_id"].n_unique() // 2) for file in (dataset / "data").rglob("*.parquet")
    )
    assert len(explained) == parts + 1
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert report.subjects == PATIENTS
    assert not (tmp_path / "parts").exists()


def test_other_settings_begin_anew(dataset, tmp_path, monkeypatch):
    """What another method left of a stopped run is not taken for this one's."""
    monkeypatch.setattr(datasets, "remove", lambda folder: None)  # as if killed at the end
    for name in ("prefix_deltas", "occlusion"):
        asked = {"tasks": TASK, "methods": name, "parts": tmp_path / "parts", "engine": ONE}
        explain_dataset(MAMBA, dataset, tmp_path / "out.parquet", **asked)
        assert pl.read_parquet(tmp_path / "out.parquet")["method"].unique().to_list() == [name]


@pytest.mark.slow
def test_workers_give_the_same_bytes(dataset, tmp_path):
    explain_dataset(MAMBA, dataset, tmp_path / "one.parquet", tasks=TASK, engine=ONE)
    explain_dataset(MAMBA, dataset, tmp_path / "two.parquet", tasks=TASK, engine=get_engine(num_workers=2))
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


# -- stays -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stays():
    """Stays, a patient without one, and one whose stay holds nothing that the model knows."""
    made = [make_stay(subject_id) for subject_id in range(5)]
    start = made[0]["events"][1]["time"]
    made.append({"subject_id": 5, "events": [{"time": None, "code": "GENDER//F"}]})
    made.append({"subject_id": 6, "events": [{"time": start, "code": "LAB//A//unheard of", "numeric_value": 1.0}]})
    rows = [{"subject_id": one["subject_id"], **event} for one in made for event in one["events"]]
    return pl.DataFrame(rows, schema_overrides=EVENT_SCHEMA)


def test_stays_are_asked_about_when_predict_asks(stays, tmp_path):
    report = explain_dataset(HYMATE, stays, tmp_path / "out.parquet", methods="prefix_deltas", engine=ONE)
    table = pl.read_parquet(tmp_path / "out.parquet")
    risks, known = predict_risks(HYMATE, stays, progress=False)
    keys = ["subject_id", "prediction_time", "task"]
    ours = table.select(*keys, "score", "reason").unique().sort(keys)
    assert ours.drop("score").equals(risks.select(*keys, "reason").sort(keys))
    np.testing.assert_allclose(ours["score"].drop_nulls(), risks.sort(keys)["score"].drop_nulls(), atol=1e-6)
    for subject, at in ours.drop_nulls("score").select("subject_id", "prediction_time").head(2).iter_rows():
        assert_alone(table, stays, subject, at, STAY_TASK, HYMATE, "prefix_deltas")
    words = [key for key in known.notes if key.startswith(("risks not given", "patients without a stay"))]
    assert {key: report.notes[key] for key in words} == {key: known.notes[key] for key in words}


# -- pages of patients -------------------------------------------------------------------------------------------------


def test_a_page_of_a_patient_holds_every_task_and_method(events, dataset, tmp_path):
    answers, report = explain_subjects(MAMBA, dataset, [3], methods=["prefix_deltas", "relevance", "hidden_attention"])
    tasks = len(load_checkpoint(MAMBA).model.config.tasks)
    assert len(answers) == tasks
    assert report.subjects == 1
    files = write_pages(MAMBA, answers, tmp_path, png=True)
    assert [file.name for file in files] == ["patient_3.html", "patient_3.png"]
    text = files[0].read_text()
    for word in ("prefix_deltas", "relevance", TASK, "Heart failure" if "I50" in text else "3"):
        assert word in text


def test_each_time_has_its_page(events, tmp_path):
    times = sorted(events.filter(pl.col("subject_id") == 3)["time"])
    asked = pl.DataFrame({"subject_id": [3, 3, 4], "prediction_time": [times[5], times[-1], times[-1]]})
    answers, _ = explain_subjects(MAMBA, events, [3], tasks=TASK, prediction_times=asked)
    files = write_pages(load_checkpoint(MAMBA), answers, tmp_path)
    assert [file.name for file in files] == [f"patient_3_{at:%Y-%m-%dT%H%M%S}.html" for at in (times[5], times[-1])]


def test_pages_of_stays(stays, tmp_path):
    answers, _ = explain_subjects(HYMATE, stays, [1, 6], methods=["prefix_deltas", "fusion_weights", "attentions"])
    assert [file.name for file in write_pages(HYMATE, answers, tmp_path)] == ["patient_1.html"]
    assert [answer.reason for answer in answers if answer.moment[0] == 6] == ["no_triplet"] * (len(answers) > 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": "sepsis"}, "unknown tasks \\['sepsis'\\]"),
        ({"tasks": 5}, "tasks got 5"),
        ({"methods": "magic"}, "method got 'magic'; a model of the family 'ehrmamba' has"),
        ({"methods": "attentions"}, "has \\["),
        ({"methods": "hidden_attention"}, "shows weights"),
        ({"methods": ["occlusion", "occlusion"]}, "name each once"),
        ({"methods": "occlusion", "settings": {"occlusion": {"grouping": "code"}}}, "no setting \\['grouping'\\]"),
        ({"settings": {"occlusion": {}}}, "settings got those of \\['occlusion'\\]"),
        ({"methods": "occlusion", "settings": {"occlusion": {"groups": "day"}}}, "groups got 'day'"),
        ({"data": "nowhere"}, "does not exist"),
        ({"data": 3}, "data got int"),
        ({"data": pl.DataFrame(schema=EVENT_SCHEMA)}, "nobody to explain"),
        ({"checkpoint": "nowhere"}, "no checkpoint folder nowhere"),
        ({"prediction_times": "nowhere.csv"}, "no file nowhere.csv"),
        (
            {
                "prediction_times": pl.DataFrame({"subject_id": [99]}).with_columns(
                    prediction_time=pl.datetime(2150, 1, 1)
                )
            },
            "1 patients without events",
        ),
        ({"labels": "a", "prediction_times": "b"}, "give one of them"),
        ({"splits": ["train"]}, "splits need a dataset in files"),
    ],
)
def test_bad_requests_are_clear_errors(events, tmp_path, change, message):
    asked = {"checkpoint": MAMBA, "data": events, "out": tmp_path / "out.parquet", "engine": ONE} | change
    with pytest.raises(ValueError, match=message):
        explain_dataset(**asked)
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("subjects", "change", "message"),
    [
        ([77], {}, "there is no patient 77"),
        ([], {}, "name at least one patient"),
        ("3", {}, "expected a list of subject_ids"),
        ([True], {}, "expected a list of subject_ids"),
        (
            [3],
            {
                "prediction_times": pl.DataFrame({"subject_id": [4]}).with_columns(
                    prediction_time=pl.datetime(2150, 1, 1)
                )
            },
            "patient 3 has no prediction time",
        ),
    ],
)
def test_bad_subjects_are_clear_errors(events, subjects, change, message):
    with pytest.raises(ValueError, match=message):
        explain_subjects(MAMBA, events, subjects, **change)

"""Risks of a prepared dataset, file by file, are those of the whole table."""

import importlib.util
import shutil
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.data.dataset import write_dataset
from ehrseq.data.physionet2012.codes import TASK_CONFIG
from ehrseq.data.physionet2012.reader import load_physionet2012
from ehrseq.data.schema import validate_events
from ehrseq.data.shards import dataset_shards
from ehrseq.data.simulate.cohort import simulate
from ehrseq.data.simulate.stays import simulate_stays
from ehrseq.encode.triplets import PHYSIONET2012, build_triplets
from ehrseq.modeling.configuration_hymate import HyMaTEConfig
from ehrseq.modeling.modeling_hymate import HyMaTEForSequenceClassification
from ehrseq.prediction import datasets
from ehrseq.prediction.datasets import predict_dataset
from ehrseq.prediction.risks import predict_risks
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
from ehrseq.work.engine import get_engine

TASKS = ["readmission_30d", "mortality_30d"]
ONE = get_engine(num_workers=1)


@pytest.fixture(scope="module")
def events():
    return simulate(40, seed=5, progress=False).events()


@pytest.fixture(scope="module")
def dataset(events, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dataset"
    write_dataset(events, path, dataset_name="test", shard_size=2000)
    assert len(dataset_shards(path)) > 6
    return path


def assert_same(ours, whole):
    (risks, report), (known, known_report) = ours, whole
    assert risks.drop("score").equals(known.drop("score"))
    assert risks["score"].is_null().equals(known["score"].is_null())
    np.testing.assert_allclose(risks["score"].drop_nulls(), known["score"].drop_nulls(), atol=1e-6)
    assert +report.notes == +known_report.notes
    assert report.subjects == known["subject_id"].n_unique()


@pytest.mark.parametrize("workers", [1, 2])
def test_files_give_the_risks_of_the_whole_table(events, dataset, checkpoint, tmp_path, workers):
    whole = predict_risks(checkpoint, events, progress=False)
    ours = predict_dataset(checkpoint, dataset, tmp_path / "parts", engine=get_engine(num_workers=workers))
    assert_same(ours, whole)
    assert not (tmp_path / "parts").exists()


def test_asked_times_and_tasks(events, dataset, checkpoint, tmp_path):
    timed = events.filter(pl.col("time").is_not_null())
    times = (
        timed.group_by("subject_id", maintain_order=True)
        .agg(pl.col("time").sort().get(pl.len() // 2).alias("prediction_time"))
        .filter(pl.col("subject_id") % 3 == 0)
    )
    times = pl.concat([times, times.with_columns(pl.col("prediction_time") + timedelta(days=3)), times[:2]])
    asked = {"prediction_times": times, "tasks": "mortality_30d"}
    risks, _ = predict_dataset(checkpoint, dataset, tmp_path / "parts", engine=ONE, **asked)
    known, _ = predict_risks(checkpoint, events, progress=False, **asked)
    assert risks.drop("score").equals(known.drop("score"))
    np.testing.assert_allclose(risks["score"].drop_nulls(), known["score"].drop_nulls(), atol=1e-6)


def test_a_stopped_run_goes_on(dataset, checkpoint, tmp_path, monkeypatch):
    scored, reading = [], datasets.read_blocks

    def interrupted(shard):
        scored.append(shard.name)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return reading(shard)

    monkeypatch.setattr(datasets, "read_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_dataset(checkpoint, dataset, tmp_path / "parts", engine=ONE)
    risks, _ = predict_dataset(checkpoint, dataset, tmp_path / "parts", engine=ONE)
    assert len(scored) == len(dataset_shards(dataset)) + 1
    again, _ = predict_dataset(checkpoint, dataset, tmp_path / "parts", engine=ONE)
    assert risks.equals(again)


@pytest.fixture(scope="module")
def stays(tmp_path_factory):
    found = load_physionet2012(simulate_stays(40, seed=4).write(tmp_path_factory.mktemp("challenge"))).events
    # Patients without a stay, enough to fill a file of their own.
    others = simulate(3, seed=9, progress=False).events().with_columns(pl.col("subject_id") + 10**9)
    return validate_events(pl.concat([found, others], how="diagonal"))


@pytest.fixture(scope="module")
def stay_checkpoint(stays, tmp_path_factory):
    table = build_triplets(stays, PHYSIONET2012)
    extractor = HyMaTEFeatureExtractor.fit(table)
    config = HyMaTEConfig(hidden_size=8, num_mamba_layers=1, num_attention_heads=2, num_labels=2, tasks=[TASK_CONFIG])
    folder = tmp_path_factory.mktemp("stays")
    for part in (HyMaTEForSequenceClassification(config).eval(), extractor):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("asked", [False, True])
def test_a_model_of_stays_takes_files_without_stays(stays, stay_checkpoint, tmp_path, asked):
    subjects = stays["subject_id"].unique()
    splits = pl.DataFrame({"subject_id": subjects}).with_columns(
        split=pl.when(pl.col("subject_id") > 10**9).then(pl.lit("held_out")).otherwise(pl.lit("train"))
    )
    write_dataset(stays, tmp_path / "data", dataset_name="test", splits=splits, shard_size=5000)
    ends = stays.group_by("subject_id").agg(pl.col("time").max().alias("prediction_time"))
    options = {"prediction_times": ends} if asked else {}
    whole = predict_risks(stay_checkpoint, stays, progress=False, **options)
    ours = predict_dataset(stay_checkpoint, tmp_path / "data", tmp_path / "parts", engine=ONE, **options)
    assert ours[0].drop("score").equals(whole[0].drop("score"))
    np.testing.assert_allclose(ours[0]["score"].drop_nulls(), whole[0]["score"].drop_nulls(), atol=1e-6)
    keys = [key for key in whole[1].notes if key.startswith(("risks", "patients"))]
    assert {key: ours[1].notes[key] for key in keys} == {key: whole[1].notes[key] for key in keys}
    assert ("no_stay" in ours[0]["reason"].to_list()) == asked


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ehrseq[ray])")
def test_ray_gives_the_same_risks_to_the_last_bit(dataset, checkpoint, tmp_path):
    local, _ = predict_dataset(checkpoint, dataset, tmp_path / "parts", engine=get_engine(num_workers=2))
    ray, _ = predict_dataset(checkpoint, dataset, tmp_path / "parts", engine=get_engine("ray", num_workers=2))
    assert ray.equals(local)


def test_the_command_scores_a_prepared_dataset_by_file(events, dataset, checkpoint, tmp_path):
    out = tmp_path / "risks.parquet"
    options = ["--model", checkpoint, "--data", dataset, "--out", out, "--workers", 1]
    done = CliRunner().invoke(app, ["predict", *map(str, options)], catch_exceptions=False)
    assert f"{events['subject_id'].n_unique():,} patients" in done.output
    known, _ = predict_risks(checkpoint, events, progress=False)
    assert pl.read_parquet(out).drop("score").equals(known.drop("score"))
    assert [path.name for path in tmp_path.iterdir()] == ["risks.parquet"]


def _unreadable(dataset, checkpoint, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    with open(dataset_shards(copy)[1].path, "r+b") as stream:
        stream.truncate(1000)
    return {"dataset": copy}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda *_: {"dataset": "nowhere"}, "holds no data/<split>"),
        (lambda *_: {"tasks": ["sepsis"]}, r"unknown tasks \['sepsis'\]"),
        (lambda *_: {"batch_size": 0}, "batch_size got 0"),
        (lambda *_: {"checkpoint": "nowhere"}, "no checkpoint folder"),
        (
            lambda *_: {
                "prediction_times": pl.DataFrame({"subject_id": [999_999], "prediction_time": [datetime(2020, 1, 1)]})
            },
            "1 patients without events",
        ),
        (_unreadable, r"0\.parquet cannot be read as Parquet"),
    ],
)
def test_bad_requests(dataset, checkpoint, tmp_path, change, message):
    given = {"checkpoint": checkpoint, "dataset": dataset, "parts": tmp_path / "parts", "engine": ONE}
    with pytest.raises(ValueError, match=message):
        predict_dataset(**(given | change(dataset, checkpoint, tmp_path)))


def test_engines_are_for_files(checkpoint, tmp_path):
    (tmp_path / "records").mkdir()
    options = ["--model", checkpoint, "--data", tmp_path / "records", "--workers", 2]
    with pytest.raises(ValueError, match="run `ehrseq prepare"):
        CliRunner().invoke(app, ["predict", *map(str, options)], catch_exceptions=False)

"""Vectors are the model's hidden states of the record up to their time, whoever works and in whatever batches."""

import importlib.util
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.data.dataset import write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.hub.checkpoints import load_backbone
from ehrseq.representations import embeddings
from ehrseq.representations.embedding_files import read_embeddings
from ehrseq.representations.embeddings import embed_dataset
from ehrseq.representations.vectors import vector_rows, vector_way
from ehrseq.work.engine import get_engine
from tests.checkpoints.patients import make_patient, make_table
from tests.checkpoints.stays import make_stay

ONE = get_engine(num_workers=1)
COMMITTED = Path(__file__).parents[1] / "checkpoints"
FAMILIES = ["ehrmamba", "ehr_lstm", "cehrbert", "ehr_bigbird"]
PATIENTS = [make_patient(subject_id, seed=7) for subject_id in range(9)]
EVENTS = make_table(PATIENTS)
STAYS = make_table([make_stay(subject_id) for subject_id in range(200, 206)])


def embed(family, tmp_path, events=EVENTS, **options):
    file = tmp_path / f"{family}.parquet"
    report = embed_dataset(COMMITTED / family, events, file, engine=ONE, **options)
    return read_embeddings(file), report


def states_of(family, patient, until=None):
    """Hidden states [l, d] of one patient's record, read by the plain path."""
    backbone = load_backbone(COMMITTED / family)
    inputs = backbone.encoder(patient, prediction_time=until, return_tensors="pt", max_length=512, truncation=True)
    with torch.no_grad():
        return backbone.model(**inputs).last_hidden_state[0].numpy()


def vector_of(family, states):
    if family == "ehr_lstm":
        half = states.shape[-1] // 2
        return np.concatenate([states[-1, :half], states[0, half:]])
    return states[-1] if family == "ehrmamba" else states[0]


def middle_of(patient):
    times = [event["time"] for event in patient["events"][1:]]
    return times[len(times) // 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_the_states_of_the_record_up_to_the_time(family, tmp_path):
    times = pl.DataFrame(
        {"subject_id": [p["subject_id"] for p in PATIENTS], "prediction_time": [middle_of(p) for p in PATIENTS]}
    )
    found, report = embed(family, tmp_path, prediction_times=times, batch_size=4)
    assert found.table["prediction_time"].to_list() == times["prediction_time"].to_list()
    for vector, patient in zip(found.vectors, PATIENTS, strict=True):
        until = middle_of(patient)
        earlier = {**patient, "events": [event for event in patient["events"] if event["time"] <= until]}
        np.testing.assert_allclose(vector, vector_of(family, states_of(family, earlier)), atol=1e-5)
    assert report.notes["vectors written"] == len(PATIENTS)


@pytest.mark.parametrize("family", ["ehrmamba", "cehrbert"])
def test_a_visit_has_the_vector_of_the_record_at_its_end(family, tmp_path):
    found, _ = embed(family, tmp_path, level="visit")
    row = 0
    for patient in PATIENTS:
        ends = [event["time"] for event in patient["events"] if event["code"].startswith("VISIT_END")]
        starts = [event["time"] for event in patient["events"] if event["code"].startswith("VISIT_START")]
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            assert found.table.row(row) == (
                patient["subject_id"],
                patient["events"][-1]["time"],
                number + 1,
                start,
                end,
            )
            earlier = {**patient, "events": [event for event in patient["events"] if event["time"] <= end]}
            np.testing.assert_allclose(found.vectors[row], vector_of(family, states_of(family, earlier)), atol=1e-5)
            row += 1
    assert row == len(found)


def test_a_visit_that_is_open_at_the_time_has_no_end_yet(tmp_path):
    patient = PATIENTS[0]
    until = patient["events"][3]["time"]
    times = pl.DataFrame({"subject_id": [patient["subject_id"]], "prediction_time": [until]})
    found, _ = embed("ehrmamba", tmp_path, level="visit", prediction_times=times)
    assert found.table["end"].to_list() == [None]
    earlier = {**patient, "events": patient["events"][:4]}
    np.testing.assert_allclose(found.vectors[0], states_of("ehrmamba", earlier)[-1], atol=1e-5)


def test_means_and_questions(tmp_path):
    means, _ = embed("ehrmamba", tmp_path, pooling="mean")
    np.testing.assert_allclose(means.vectors[2], states_of("ehrmamba", PATIENTS[2]).mean(0), atol=1e-5)
    asked, _ = embed("ehrmamba", tmp_path, task="mortality_30d")
    backbone = load_backbone(COMMITTED / "ehrmamba")
    inputs = backbone.encoder(PATIENTS[2], task="mortality_30d", return_tensors="pt")
    with torch.no_grad():
        state = backbone.model(**inputs).last_hidden_state[0, -1].numpy()
    np.testing.assert_allclose(asked.vectors[2], state, atol=1e-5)
    assert asked.about["task"] == "mortality_30d"


@pytest.mark.parametrize(("pooling", "size"), [(None, None), ("mean", 1), ("last", 1)])
def test_stays_of_hymate(tmp_path, pooling, size):
    backbone = load_backbone(COMMITTED / "hymate")
    found, _ = embed("hymate", tmp_path, STAYS, pooling=pooling, batch_size=4)
    assert found.vectors.shape == (6, backbone.model.config.hidden_size if size else backbone.model.config.pooled_size)
    inputs = backbone.encoder([make_stay(203)], return_tensors="pt", max_length=10_000, truncation=True)
    with torch.no_grad():
        output = backbone.model(**inputs)
    states = output.last_hidden_state[0]
    known = {None: output.pooler_output[0], "mean": states.mean(0), "last": states[-1]}[pooling]
    np.testing.assert_allclose(found.vectors[3], known.numpy(), atol=1e-5)


def test_the_visits_of_a_patient_share_a_row(tmp_path):
    backbone = load_backbone(COMMITTED / "ehrmamba")
    asked = vector_rows(backbone, EVENTS, None, vector_way(backbone, "visit", None, None))
    assert len(asked.rows) == len(PATIENTS) < len(asked.table)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dataset"
    write_dataset(simulate(30, seed=5, progress=False).events(), path, dataset_name="test", shard_size=2000)
    return path


def in_order(found):
    order = found.table.with_row_index().sort(found.keys)["index"].to_numpy()
    return found.table[order], found.vectors[order]


@pytest.mark.parametrize(
    ("level", "workers"), [("patient", 1), ("visit", 1), pytest.param("patient", 2, marks=pytest.mark.slow)]
)
def test_files_and_batches_change_nothing(dataset, tmp_path, level, workers):
    events = simulate(30, seed=5, progress=False).events()
    whole, report = embed("ehrmamba", tmp_path, events, level=level)
    file = tmp_path / "files.parquet"
    engine = get_engine(num_workers=workers)
    ours = embed_dataset(COMMITTED / "ehrmamba", dataset, file, level=level, batch_size=3, engine=engine)
    (table, vectors), (known_table, known_vectors) = in_order(read_embeddings(file)), in_order(whole)
    assert table.equals(known_table)
    np.testing.assert_allclose(vectors, known_vectors, atol=1e-6)
    assert +ours.notes == +report.notes


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(dataset, tmp_path, monkeypatch):
    embed_dataset(COMMITTED / "ehrmamba", dataset, tmp_path / "whole.parquet", engine=ONE)
    made, embedding = [], embeddings.embed_rows

    def stop(*args, **options):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return embedding(*args, **options)

    monkeypatch.setattr(embeddings, "embed_rows", stop)
    ours = {"parts": tmp_path / "parts", "engine": ONE}
    with pytest.raises(KeyboardInterrupt):
        embed_dataset(COMMITTED / "ehrmamba", dataset, tmp_path / "ours.parquet", **ours)
    assert not (tmp_path / "ours.parquet").exists()
    monkeypatch.setattr(embeddings, "embed_rows", embedding)
    embed_dataset(COMMITTED / "ehrmamba", dataset, tmp_path / "ours.parquet", **ours)
    assert (tmp_path / "ours.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / "parts").exists()


def test_what_is_left_out_is_counted(tmp_path):
    nobody = pl.DataFrame({"subject_id": [99], "code": ["GENDER//F"]})
    events = pl.concat([EVENTS, nobody.with_columns(time=None)], how="diagonal_relaxed")
    found, report = embed("ehrmamba", tmp_path, events)
    assert len(found) == len(PATIENTS)
    assert report.notes["patients without a timed event, without a vector"] == 1
    early = EVENTS.group_by("subject_id").agg(pl.col("time").min() - timedelta(days=1)).sort("subject_id")
    _, report = embed("ehrmamba", tmp_path, prediction_times=early.rename({"time": "prediction_time"}))
    assert report.notes["vectors without a timed event up to their time"] == len(PATIENTS)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is absent")
@pytest.mark.slow
def test_ray_gives_the_same_bytes(dataset, tmp_path):
    for name in ("local", "ray"):
        engine = get_engine(name, num_workers=2)
        embed_dataset(COMMITTED / "ehrmamba", dataset, tmp_path / f"{name}.parquet", engine=engine)
    assert (tmp_path / "ray.parquet").read_bytes() == (tmp_path / "local.parquet").read_bytes()


BAD = [
    ("ehrmamba", {"level": "day"}, "level got 'day'"),
    ("ehrmamba", {"pooling": "sum"}, "pooling got 'sum'"),
    ("ehrmamba", {"pooling": "fused"}, "is none for ehrmamba"),
    ("ehrmamba", {"pooling": "first"}, "is none for ehrmamba"),
    ("hymate", {"level": "visit"}, "reads stays"),
    ("hymate", {"task": "mortality_30d"}, "no task tokens"),
    ("ehrmamba", {"task": "flu"}, "unknown task 'flu'"),
    ("ehrmamba", {"batch_size": 0}, "batch_size got 0"),
    ("ehrmamba", {"splits": ["train"]}, "splits need a dataset"),
    ("ehrmamba", {"prediction_times": pl.DataFrame({"subject_id": [1]})}, "prediction times lack"),
    ("nothing", {}, "no checkpoint folder"),
]


@pytest.mark.parametrize(("family", "options", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_requests_are_refused(tmp_path, family, options, message):
    with pytest.raises(ValueError, match=message):
        embed(family, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_times_of_nobody_are_refused(tmp_path):
    times = pl.DataFrame({"subject_id": [77], "prediction_time": [middle_of(PATIENTS[0])]})
    with pytest.raises(ValueError, match="1 patients without events"):
        embed("ehrmamba", tmp_path, prediction_times=times)


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from tests.checkpoints.complete import complete_checkpoint

    folder = complete_checkpoint("ehrmamba", tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm_f.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights"):
        embed_dataset(folder, EVENTS, tmp_path / "out.parquet", engine=ONE)


BAD_FILES = [
    (lambda file: None, "no file"),
    (lambda file: file.write_text("no parquet"), "Parquet"),
    (lambda file: EVENTS.write_parquet(file), "is no file of vectors"),
    (lambda file: vectors_file(file, [[1.0, float("nan")]]), "not finite"),
    (lambda file: vectors_file(file, []), "holds no vector"),
    (lambda file: vectors_file(file, [[1.0, 2.0], [1.0, 2.0]]), "two vectors of one"),
]


def vectors_file(file, rows):
    times = [middle_of(PATIENTS[0])] * len(rows)
    pl.DataFrame(
        {"subject_id": [1] * len(rows), "prediction_time": times, "vector": rows},
        schema={"subject_id": pl.Int64, "prediction_time": pl.Datetime("us"), "vector": pl.Array(pl.Float32, 2)},
    ).write_parquet(file)


@pytest.mark.parametrize(("write", "message"), BAD_FILES, ids=[message for _, message in BAD_FILES])
def test_files_that_are_no_vectors_are_refused(tmp_path, write, message):
    write(tmp_path / "vectors.parquet")
    with pytest.raises(ValueError, match=message):
        read_embeddings(tmp_path / "vectors.parquet")


def test_the_command(dataset, tmp_path):
    out = tmp_path / "vectors.parquet"
    ehrmamba = str(COMMITTED / "ehrmamba")
    done = CliRunner().invoke(
        app, ["embed", "--model", ehrmamba, "--data", str(dataset), "--out", str(out), "--workers", "1"]
    )
    assert done.exit_code == 0, done.output
    assert "30 vectors" in done.output
    assert read_embeddings(out).about["level"] == "patient"
    both = ["--times", str(out), "--labels", str(out)]
    done = CliRunner().invoke(app, ["embed", "--model", ehrmamba, "--data", str(dataset), *both])
    assert "give one of them" in str(done.exception)
    done = CliRunner().invoke(app, ["embed", "--model", ehrmamba, "--data", str(dataset), "--out", "a.csv"])
    assert "name of a .parquet file" in str(done.exception)

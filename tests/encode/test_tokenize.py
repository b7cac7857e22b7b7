"""`ehrseq tokenize`: a tokenizer of the training patients, encoded files, the same bytes whatever happens meanwhile."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.data.dataset import EventDataset, write_dataset
from ehrseq.data.shards import dataset_shards
from ehrseq.data.simulate.cohort import simulate
from ehrseq.encode import EncodedDataset, encode_dataset, fitting, shards, tokenize_dataset
from ehrseq.encode.shards import read_vocabulary
from ehrseq.tasks.shards import label_dataset
from ehrseq.tokenization.ehr_sequence import subjects_digest
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.work.engine import get_engine

ONE = get_engine(num_workers=1)
TRAINING = ["pretrain", "train"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenize") / "dataset"
    write_dataset(simulate(90, seed=6, progress=False).events(), path, dataset_name="test", shard_size=3000)
    assert len(dataset_shards(path)) > 8
    return path


@pytest.fixture
def dataset(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "dataset")


def stored(tokenizer: EhrTokenizer) -> tuple[dict, dict]:
    return tokenizer.get_vocab(), tokenizer.init_kwargs["event_vocabulary"]


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file, the hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("undisturbed") / "encoded"
    tokenize_dataset(prepared, output, engine=ONE)
    return tree(output)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_tokenizer_is_that_of_the_training_patients_table(dataset, workers):
    settings = {"num_value_bins": 4, "min_count": 3, "max_vocab_size": 900, "model_max_length": 256}
    tokenize_dataset(dataset, tasks=["mortality_30d"], engine=get_engine(num_workers=workers), **settings)
    events = EventDataset(dataset).events(TRAINING)
    known = EhrTokenizer.train(events, tasks=["mortality_30d"], **settings)
    ours = EncodedDataset(dataset / "encoded").tokenizer
    assert stored(ours) == stored(known)
    assert ours.model_max_length == 256
    assert ours.fitted_subjects_digest == subjects_digest(events["subject_id"].unique().to_list())
    assert ours.fitted["bin_rank_error"] == 0


def test_what_held_out_patients_have_does_not_reach_the_tokenizer(dataset):
    tokenize_dataset(dataset, engine=ONE)
    before = tree(dataset / "encoded" / "tokenizer")
    for shard in dataset_shards(dataset):
        if shard.split not in TRAINING:
            rows = pl.read_parquet(shard.path)
            rows.with_columns(pl.lit("LAB//LOCAL//new").alias("code")).write_parquet(shard.path)
    summary = tokenize_dataset(dataset, engine=ONE)
    assert tree(dataset / "encoded" / "tokenizer") == before
    assert summary["unknown_rows"] > 0


def test_tasks_are_those_with_labels(dataset):
    label_dataset(dataset, ["hypertension", "mortality_30d"], end_of_data="2025-01-01", engine=ONE)
    theirs = dataset / "labels" / "a_sepsis"
    theirs.mkdir()
    shutil.copy(dataset / "labels" / "hypertension" / "labels.parquet", theirs)
    tokenize_dataset(dataset, engine=ONE)
    tokenizer = EncodedDataset(dataset / "encoded").tokenizer
    assert tokenizer.task_tokens == {"mortality_30d": "[MOR_1M]", "hypertension": "[C0]", "a_sepsis": "[A_SEPSIS]"}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_writes_the_same_bytes(prepared, undisturbed, tmp_path, workers):
    tokenize_dataset(prepared, tmp_path / "encoded", engine=get_engine(num_workers=workers))
    assert tree(tmp_path / "encoded") == undisturbed
    assert not [name for name in undisturbed if "/." in f"/{name}"]


def test_a_worker_reads_the_vocabulary_that_the_tokenizer_has(prepared, tmp_path):
    tokenize_dataset(prepared, tmp_path, tasks=["readmission_30d", "mortality_30d"], engine=ONE)
    ours, known = read_vocabulary(tmp_path / "tokenizer"), EncodedDataset(tmp_path).tokenizer.vocabulary
    for name in ("token_ids", "value_bins", "kinds", "code_map", "reserved"):
        assert getattr(ours, name) == getattr(known, name)


def test_a_task_added_later_has_its_token_in_the_workers(prepared, tmp_path):
    tokenizer = EhrTokenizer.train(EventDataset(prepared).events(TRAINING))
    tokenizer.add_task("sepsis")
    encode_dataset(prepared, tmp_path, tokenizer, engine=ONE)
    assert read_vocabulary(tmp_path / "tokenizer").token_ids == tokenizer.get_vocab()


def test_a_given_tokenizer_is_kept_with_the_rows(prepared, tmp_path):
    tokenizer = EhrTokenizer.train(EventDataset(prepared).events("pretrain"))
    tokenizer.save_pretrained(tmp_path / "mine")
    summary = tokenize_dataset(prepared, tmp_path / "out", tokenizer=tmp_path / "mine", engine=ONE)
    assert stored(EncodedDataset(tmp_path / "out").tokenizer) == stored(tokenizer)
    assert summary["fitted"]["subjects_digest"] == tokenizer.fitted_subjects_digest


# -- restart ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_does_nothing_again(dataset, monkeypatch):
    tokenize_dataset(dataset, engine=ONE)
    before = tree(dataset / "encoded")
    written = {path: path.stat().st_mtime_ns for path in (dataset / "encoded" / "data").rglob("*.arrow")}

    def never(*_, **__):
        raise AssertionError("nothing is to be read again")

    for module in (fitting, shards):
        monkeypatch.setattr(module, "read_blocks", never)
    tokenize_dataset(dataset, engine=ONE)
    assert tree(dataset / "encoded") == before
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.parametrize("stop", [1, 4, 9, 12, 15])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(dataset, undisturbed, monkeypatch, stop):
    files, reading = [], fitting.read_blocks

    def interrupted(shard, **options):
        files.append(shard.name)
        if len(files) == stop:
            raise KeyboardInterrupt
        return reading(shard, **options)

    for module in (fitting, shards):
        monkeypatch.setattr(module, "read_blocks", interrupted)
    output = dataset / "encoded"
    with pytest.raises(KeyboardInterrupt):
        tokenize_dataset(dataset, engine=ONE)
    with pytest.raises(ValueError, match="no finished encoding"):
        EncodedDataset(output)
    # What a killed process leaves half-written is not taken for a file.
    (output / "data" / "train").mkdir(parents=True, exist_ok=True)
    (output / "data" / "train" / ".0.arrow.writing-1").write_bytes(b"half")
    tokenize_dataset(dataset, engine=ONE)
    assert tree(output) == undisturbed
    # Every file was counted once and encoded once, but for the one that was stopped.
    training = sum(shard.split in TRAINING for shard in dataset_shards(dataset))
    assert len(files) == training + len(dataset_shards(dataset)) + 1


def test_a_file_that_changed_is_encoded_again_and_no_other(dataset):
    tokenize_dataset(dataset, engine=ONE)
    output = dataset / "encoded"
    before = tree(output)
    shard = next(shard for shard in dataset_shards(dataset) if shard.split == "tuning")
    pl.read_parquet(shard.path).filter(pl.col("code") != "MEDS_DEATH")[:-5].write_parquet(shard.path)
    tokenize_dataset(dataset, engine=ONE)
    changed = {name for name, digest in tree(output).items() if before[name] != digest}
    assert changed == {f"data/{shard.name}.arrow", "encoded.json"}


def test_other_training_files_make_another_tokenizer_and_all_rows_anew(dataset):
    tokenize_dataset(dataset, engine=ONE)
    output = dataset / "encoded"
    before = tree(output)
    shard = next(shard for shard in dataset_shards(dataset) if shard.split == "train")
    pl.read_parquet(shard.path).with_columns(pl.lit("LAB//LOCAL//new").alias("code")).write_parquet(shard.path)
    tokenize_dataset(dataset, engine=ONE)
    events = EventDataset(dataset).events(TRAINING)
    assert stored(EncodedDataset(output).tokenizer) == stored(EhrTokenizer.train(events))
    after = tree(output)
    assert all(after[name] != before[name] for name in before if name.endswith(".arrow"))


def test_files_of_another_form_or_of_no_shard_go(dataset):
    tokenize_dataset(dataset, engine=ONE)
    output = dataset / "encoded"
    (output / "data" / "notes.txt").write_text("mine")
    shard = dataset_shards(dataset)[-1]
    os.remove(shard.path)
    tokenize_dataset(dataset, format="parquet", engine=ONE)
    assert not list(output.rglob("*.arrow"))
    assert len(list(output.rglob("*.parquet"))) == len(dataset_shards(dataset))
    assert (output / "data" / "notes.txt").read_text() == "mine"


SCRIPT = """
import sys
from ehrseq.encode import tokenize_dataset
from ehrseq.work.engine import get_engine
tokenize_dataset(sys.argv[1], sys.argv[2], engine=get_engine(num_workers=2))
"""


@pytest.mark.slow
def test_killed_at_any_point_it_ends_with_the_same_bytes(prepared, undisturbed, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}

    def run(output: Path, kill_when=None) -> bool:
        process = subprocess.Popen([sys.executable, "-P", "-c", SCRIPT, prepared, output], env=environment)
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if kill_when is not None and kill_when():
                process.send_signal(signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.002)
        assert process.wait() == 0
        return False

    def files(output: Path, pattern: str) -> int:
        try:
            return len(list(output.rglob(pattern))) if output.exists() else 0
        except FileNotFoundError:  # a folder that was removed while it was looked at
            return 0

    killed = 0
    for number, (pattern, count) in enumerate([("*.npz*", 1), ("*.npz", 3), ("*.arrow*", 1), ("*.arrow", 7)]):
        output = tmp_path / str(number)
        killed += run(output, lambda o=output, p=pattern, c=count: files(o, p) >= c)
        if output.exists() and not (output / "encoded.json").exists():
            run(output, lambda o=output: files(o, "*.arrow") >= 5)  # and once more
        run(output)
        assert tree(output) == undisturbed, pattern
    assert killed >= 3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ehrseq[ray])")
def test_ray_writes_the_same_bytes(prepared, undisturbed, tmp_path):
    tokenize_dataset(prepared, tmp_path / "encoded", engine=get_engine("ray", num_workers=2))
    assert tree(tmp_path / "encoded") == undisturbed


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_file_is_named(dataset, split, workers):
    file = next(shard.path for shard in dataset_shards(dataset) if shard.split == split)
    with open(file, "r+b") as stream:
        stream.truncate(3000)
    with pytest.raises(ValueError, match="cannot be read as Parquet") as caught:
        tokenize_dataset(dataset, engine=get_engine(num_workers=workers))
    assert file in str(caught.value)
    assert not (dataset / "encoded" / "encoded.json").exists()


def test_subjects_out_of_order_are_refused_by_file(dataset):
    file = dataset_shards(dataset)[0].path
    pl.read_parquet(file)[::-1].write_parquet(file)
    with pytest.raises(ValueError, match="subjects out of order") as caught:
        tokenize_dataset(dataset, engine=ONE)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "nowhere"}, "nowhere is no folder; expected a dataset"),
        ({"dataset": "nowhere", "tasks": []}, r"holds no data/<split>/<n>\.parquet"),
        ({"fit_splits": ["training"]}, r"no patients in the splits \['training'\].* it has \['held_out', 'pretrain'"),
        ({"format": "csv"}, "format got 'csv'"),
        ({"num_value_bins": 0}, "num_value_bins got 0"),
        ({"max_vocab_size": 3}, "smaller than the 25 special"),
        ({"input_kinds": "labs"}, "is no preset"),
        ({"code_map": [["(", "lab"]]}, "no regular expression"),
        ({"tasks": ["mortality_30d", "mortality_30d"]}, "stands twice"),
        ({"tokenizer": "folder", "min_count": 2}, r"\['min_count'\] are settings of a new tokenizer"),
        ({"output": "dataset"}, "is a dataset; give another folder"),
    ],
)
def test_bad_input(dataset, options, message, monkeypatch):
    monkeypatch.chdir(dataset.parent)
    before = tree(dataset)
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(**{"dataset": dataset, "engine": ONE, **options})
    assert tree(dataset) == before


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_commands_label_and_tokenize(dataset):
    def run(*arguments: object) -> str:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False).output

    out = run("label", dataset, "--task", "mortality_30d", "--end-of-data", "2025-01-01", "--workers", 1)
    assert "mortality_30d:" in out
    out = run("tokenize", dataset, "--vocab-size", 500, "--kinds", "lab,medication", "--context", 64, "--workers", 1)
    assert "500 tokens, fitted on" in out
    assert "edges of value bins exact" in out
    assert "90 patients" in out
    encoded = EncodedDataset(dataset / "encoded")
    assert encoded.tokenizer.tasks == ["mortality_30d"]
    assert encoded.tokenizer.model_max_length == 64
    assert encoded.tokenizer.vocabulary.kinds == ["medication", "lab"]
    summary = json.loads((dataset / "encoded" / "encoded.json").read_text())
    assert summary["patients"] == 90 == sum(file["patients"] for file in summary["files"].values())
    assert summary["tokens"] == encoded.tokenizer.encode_histories(EventDataset(dataset).events()).num_tokens


def test_rows_take_no_more_room_than_they_may(tmp_path):
    """As Parquet at most the dataset's bytes, mapped at most three times as many."""
    write_dataset(simulate(300, seed=7, progress=False).events(), tmp_path / "dataset", dataset_name="test")
    for format, most in (("parquet", 0.7), ("arrow", 1.6)):
        summary = tokenize_dataset(tmp_path / "dataset", tmp_path / format, format=format, engine=ONE)
        assert summary["bytes"] <= most * summary["source_bytes"]

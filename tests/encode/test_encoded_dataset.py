"""Training rows of encoded files are those of the tables in memory: windows, prompts, packs, streams, two processes."""

import json
import os
import pickle
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ehrseq.batches.packing import DataCollatorForPackedNextToken, DataCollatorForPackedPrompts, PackableRows
from ehrseq.data.dataset import EventDataset, write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.encode import EncodedDataset, encode_dataset, fit_tokenizer
from ehrseq.encode.files import open_batches
from ehrseq.encode.rows import PromptedDataset
from ehrseq.tasks import label_events
from ehrseq.work.engine import get_engine

TASKS = ["mortality_30d", "readmission_30d", "hypertension"]
ONE = get_engine(num_workers=1)


def odd_patients() -> pl.DataFrame:
    """Times that are no whole seconds, spans of centuries, a birth unknown, static rows alone."""
    start = datetime(2020, 1, 1)
    rows = [
        *[(900001, start + timedelta(hours=9 * k, microseconds=k), "LAB//LOINC//2345-7", float(k)) for k in range(40)],
        (900002, datetime(1200, 1, 1), "DIAGNOSIS//ICD10CM//I10", None),
        *[(900002, start + timedelta(days=3 * k), "LAB//LOINC//2345-7", float(k)) for k in range(20)],
        (900003, None, "GENDER//F", None),
        (900004, datetime(1980, 5, 5), "MEDS_BIRTH", None),
    ]
    return pl.DataFrame(rows, schema=["subject_id", "time", "code", "numeric_value"], orient="row")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> EventDataset:
    events = simulate(120, seed=5, progress=False).events()
    odd = odd_patients().with_columns(pl.col("time").cast(pl.Datetime("us")), pl.col("numeric_value").cast(pl.Float32))
    both = pl.concat([events, odd], how="diagonal")
    subjects = both["subject_id"].unique().sort()
    splits = pl.DataFrame(
        {
            "subject_id": subjects,
            "split": [("train", "pretrain", "train", "tuning")[k % 4] for k in range(len(subjects))],
        }
    )
    path = tmp_path_factory.mktemp("encoded") / "dataset"
    return write_dataset(both, path, dataset_name="test", shard_size=4000, splits=splits)


@pytest.fixture(scope="module", params=["arrow", "parquet"])
def encoded(request, dataset, tmp_path_factory) -> EncodedDataset:
    output = tmp_path_factory.mktemp(request.param) / "encoded"
    tokenizer = fit_tokenizer(dataset.path, output / "parts", tasks=TASKS, engine=ONE)
    with pytest.MonkeyPatch.context() as patch:
        # Several batches a file.
        patch.setattr("ehrseq.encode.shards.BLOCK_ROWS", 1500)
        encode_dataset(dataset.path, output, tokenizer, format=request.param, engine=ONE)
    return EncodedDataset(output)


@pytest.fixture(scope="module")
def labels(dataset):
    found = label_events(dataset.events(), TASKS, end_of_data="2026-01-01").labels
    stranger = pl.DataFrame(
        {"subject_id": [5_000_000], "prediction_time": [datetime(2020, 1, 1)], "boolean_value": [True]}
    )
    early = pl.DataFrame(
        {"subject_id": [900001, 900002], "prediction_time": [datetime(1999, 1, 1)] * 2, "boolean_value": [True, False]}
    )
    cast = {"prediction_time": pl.Datetime("us")}
    found["hypertension"] = pl.concat([found["hypertension"], early.cast(cast), stranger.cast(cast)])
    return found


def assert_same_rows(ours, theirs, rows=None):
    assert len(ours) == len(theirs)
    for row in range(len(ours)) if rows is None else rows:
        mine, known = ours[row], theirs[row]
        assert mine.keys() == known.keys()
        for name, values in known.items():
            np.testing.assert_array_equal(mine[name], values, err_msg=f"row {row}, {name}")
            assert np.asarray(mine[name]).dtype == np.asarray(values).dtype


@pytest.mark.parametrize("splits", ["train", ["pretrain", "train"], None])
@pytest.mark.parametrize("max_length", [16, 64, 512])
def test_windows_are_those_of_the_table(encoded, dataset, splits, max_length):
    windows = encoded.windows(max_length, splits)
    known = encoded.tokenizer.encode_histories(dataset.events(splits)).windows(max_length)
    assert np.array_equal(windows.subject_ids, known.subject_ids)
    assert np.array_equal(windows.lengths, known.lengths)
    assert_same_rows(windows, known, rows=range(0, len(known), 1 + len(known) // 300))
    assert len(set(windows.subject_ids.tolist())) < len(windows) or max_length == 512


@pytest.mark.parametrize("max_length", [16, 64, 512])
def test_prompts_are_those_of_the_table(encoded, dataset, labels, max_length):
    prompts = encoded.prompts(labels, max_length, "train")
    histories = encoded.tokenizer.encode_histories(dataset.events("train"))
    known = PromptedDataset(histories, histories.index_labels(labels), max_length)
    for name in ("subject_ids", "labels", "task_ids", "prediction_times", "lengths"):
        assert np.array_equal(getattr(prompts, name), getattr(known, name)), name
    assert_same_rows(prompts, known, rows=range(0, len(known), 1 + len(known) // 300))
    chosen = np.asarray([len(known) - 1, 0, 0, 7])
    assert_same_rows(prompts.subset(chosen), known.subset(chosen))
    assert np.array_equal(prompts.subset(chosen).lengths, known.lengths[chosen])
    assert sum(v.itemsize for v in vars(prompts.index).values() if isinstance(v, np.ndarray)) == 19


def test_rows_of_files_are_not_in_memory(encoded, labels):
    with pytest.raises(ValueError, match="cut from encoded files; histories in memory are needed: prompted_dataset"):
        encoded.prompts(labels, 64, "train").in_memory()


def test_prompts_as_tables_are_those_of_encode_table(encoded, dataset, labels):
    keys = ["task", "subject_id", "prediction_time"]
    ours = pl.concat([pl.from_arrow(table) for table in encoded.prompts(labels, 64, "train").tables()])
    known = pl.from_arrow(encoded.tokenizer.encode_table(dataset.events("train"), labels, 64))
    assert ours.schema == known.schema
    assert ours.sort(keys).equals(known.sort(keys))


def test_packs_are_those_of_the_table(encoded, dataset, labels):
    histories = encoded.tokenizer.encode_histories(dataset.events("train"))
    pairs = [
        (encoded.windows(128, "train"), histories.windows(128), DataCollatorForPackedNextToken),
        (
            encoded.prompts(labels, 128, "train"),
            PromptedDataset(histories, histories.index_labels(labels), 128),
            DataCollatorForPackedPrompts,
        ),
    ]
    for ours, known, collator in pairs:
        collate = collator(encoded.tokenizer, 128)
        rows = np.random.default_rng(0).permutation(len(known))[:24].tolist()
        mine, theirs = ([PackableRows(rows_of)[row] for row in rows] for rows_of in (ours, known))
        mine, theirs = collate(mine), collate(theirs)
        assert mine.keys() == theirs.keys()
        assert all(mine[name].equal(theirs[name]) for name in theirs)


def test_a_loader_worker_maps_the_files_itself(encoded):
    windows = encoded.windows(64, "train")
    text = pickle.dumps(windows)
    assert len(text) < 100 * len(windows) + 40_000
    assert_same_rows(pickle.loads(text), windows, rows=range(0, len(windows), 97))


def test_all_patients_come_back_as_they_were(encoded, dataset):
    events = dataset.events()
    of_patient = {subject: rows for (subject,), rows in events.partition_by("subject_id", as_dict=True).items()}
    known = encoded.tokenizer.encode_histories(events)
    patients = encoded.patients()
    assert np.array_equal(patients.subject_ids, known.subject_ids)
    assert np.array_equal(patients.tokens, np.diff(known.offsets))
    for patient, subject in enumerate(patients.subject_ids.tolist()):
        history = patients.history(patient)
        alone = encoded.tokenizer.encode_histories(of_patient[subject])
        for name in (
            "first",
            "birth",
            "static_ids",
            "ids",
            "types",
            "times",
            "ages",
            "orders",
            "row_time",
            "row_end",
            "row_open",
            "row_order",
        ):
            np.testing.assert_array_equal(getattr(history, name), getattr(alone, name), err_msg=f"{subject} {name}")


def test_the_stream_holds_every_window_once(encoded):
    windows = encoded.windows(64, "train")
    rows = list(encoded.stream(64, "train", repeat=False))
    assert sorted(tuple(np.asarray(row["input_ids"]).tolist()) for row in rows) == sorted(
        tuple(windows[k]["input_ids"].tolist()) for k in range(len(windows))
    )


def test_the_stream_repeats_in_another_order_and_is_seeded(encoded):
    count = len(encoded.windows(64, "tuning"))

    def ids(seed, repeat):
        stream = iter(encoded.stream(64, "tuning", seed=seed, repeat=repeat))
        return [tuple(np.asarray(next(stream)["input_ids"]).tolist()) for _ in range(count * (1 + repeat))]

    twice = ids(0, True)
    assert twice[:count] == ids(0, False)
    assert twice[:count] != ids(1, False)
    assert twice[count:] != twice[:count]
    assert sorted(twice[count:]) == sorted(twice[:count])


def test_datasets_maps_and_streams_the_files(encoded):
    from datasets import load_dataset

    kind = encoded.summary["format"]
    files = encoded.files("train")
    mapped = load_dataset(kind, data_files=files, split="train", streaming=True)
    found = [row["subject_id"] for row in mapped]
    assert sorted(found) == encoded.patients("train").subject_ids.tolist()
    row = next(iter(mapped))
    assert len(row["ids"]) == len(row["flags"]) == max(len(row["seconds"]), len(row["micros"]))


def test_mapped_rows_take_seven_bytes(encoded):
    if encoded.summary["format"] != "arrow":
        pytest.skip("Parquet is not mapped")
    for file in encoded.files():
        for batch in open_batches(file):
            rows = len(batch.column("ids").flatten())
            few = sum(len(batch.column(name).flatten()) * 8 for name in ("micros", "static_ids"))
            assert batch.nbytes <= 7 * rows + few + 70 * batch.num_rows


PROCESS = """
import os, sys
import numpy as np
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
from ehrseq.encode import EncodedDataset
from ehrseq.batches.collation import DataCollatorForNextToken

data = EncodedDataset(sys.argv[1])
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
stream = data.stream(64, "train", repeat=False)
loader = accelerator.prepare(DataLoader(stream, batch_size=4, collate_fn=DataCollatorForNextToken(data.tokenizer)))
rows = []
for batch in loader:
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        rows.append(ids[mask.bool()].tolist())
import json
open(f"{sys.argv[2]}/{accelerator.process_index}.json", "w").write(json.dumps(rows))
accelerator.wait_for_everyone()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_read_files_of_their_own(encoded, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROCESS)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            script,
            encoded.path,
            tmp_path,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    windows = encoded.windows(64, "train")
    rows = [tuple(windows[k]["input_ids"].tolist()) for k in range(len(windows))]
    assert sorted(map(tuple, parts[0] + parts[1])) == sorted(rows)
    file_of_subject = {
        subject: file
        for file in encoded.files("train")
        for batch in open_batches(file)
        for subject in batch.column("subject_id").to_pylist()
    }
    # Windows without events are alike; all others are of one patient.
    file_of = {
        row: file_of_subject[subject]
        for row, subject in zip(rows, windows.subject_ids.tolist(), strict=True)
        if rows.count(row) == 1
    }
    files = [{file_of[tuple(row)] for row in part if tuple(row) in file_of} for part in parts]
    assert sorted([*files[0], *files[1]]) == sorted(encoded.files("train"))
    assert min(len(files[0]), len(files[1])) >= 3


def _without_summary(encoded, tmp_path):
    return EncodedDataset(tmp_path)


def _damaged(encoded, tmp_path):
    import shutil

    folder = shutil.copytree(encoded.path, tmp_path / "copy")
    copy = EncodedDataset(folder)
    with open(copy.files("train")[0], "r+b") as stream:
        stream.truncate(500)
    return copy.windows(64, "train")


def _too_many_processes(encoded, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "999")
        return encoded.stream(64, "train")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_without_summary, "no finished encoding"),
        (_damaged, "cannot be read as encoded rows"),
        (_too_many_processes, "for 999 processes"),
        (lambda encoded, _: encoded.windows(64, "held_out"), r"no splits \['held_out'\]; it has \['pretrain', 'train'"),
        (lambda encoded, _: encoded.windows(3, "train"), "max_length"),
        (lambda encoded, _: encoded.stream(3, "train"), "max_length"),
        (lambda encoded, _: encoded.prompts({"sepsis": pl.DataFrame()}, 64), r"labels name the tasks \['sepsis'\]"),
        (lambda encoded, _: encoded.prompts(pl.DataFrame(), 64), "labels must be"),
    ],
)
def test_bad_input(encoded, tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(encoded, tmp_path)

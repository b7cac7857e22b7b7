"""`ehrseq prepare`: the same table as the readers in memory, whatever the source, its partitions and who works."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import polars as pl
import pytest

from ehrseq.data import EventDataset, load_events, write_dataset
from ehrseq.data.fhir import blocks
from ehrseq.data.fhir.plan import fhir_files
from ehrseq.data.meds import read_splits
from ehrseq.data.shards import dataset_shards
from ehrseq.data.simulate.cohort import simulate
from ehrseq.prepare import fhir_parts, prepare_dataset
from ehrseq.work.engine import get_engine

ONE = get_engine(num_workers=1)


def check_equal(source: Path, output: Path, shard_rows: int, **more):
    """Prepare, and compare rows and report with what is read in memory."""
    report = prepare_dataset(source, output, engine=ONE, shard_rows=shard_rows, **more)
    events, expected = load_events(
        source, progress=False, on_error=more.get("on_error", "raise").replace("stop", "raise")
    )
    dataset = EventDataset(output)
    assert dataset.events().equals(events)
    assert report.conversion.to_dict() == expected.to_dict()
    assert report.conversion.subject_ids == expected.subject_ids
    stored = json.loads((output / "metadata" / "conversion_report.json").read_text())
    assert {name: stored[name] for name in expected.to_dict()} == expected.to_dict()
    assert dataset.codes["code"].to_list() == sorted(events["code"].unique().to_list())
    splits = dict(dataset.splits.iter_rows())
    assert set(splits) == set(events["subject_id"].to_list())
    for shard in dataset_shards(output):
        subjects = pl.read_parquet(shard.path)["subject_id"]
        assert subjects.is_sorted()
        assert {splits[subject] for subject in subjects.unique().to_list()} == {shard.split}
    assert sum(counts["events"] for counts in report.whole["splits"].values()) == events.height
    return report, dataset


@pytest.fixture(scope="module")
def fhir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fhir")
    return simulate(40, seed=3, progress=False).write_fhir(folder / "export")


@pytest.mark.parametrize("shard_rows", [300, 4000, 10**6])
def test_simulated_fhir_is_the_table_in_memory(fhir, tmp_path, shard_rows):
    report, dataset = check_equal(fhir, tmp_path / "out", shard_rows)
    assert dataset.events().select(pl.exclude("none")).equals(simulate(40, seed=3, progress=False).events())
    assert len(dataset_shards(tmp_path / "out")) == report.whole["shards"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["synthea-r4/ndjson", "synthea-r4/bundles", "mimic-iv-fhir-demo/2.1.0/fhir"])
def test_real_fhir_is_the_table_in_memory(ehr_data, tmp_path, name):
    check_equal(ehr_data / name, tmp_path / "out", 50_000)


def test_the_meds_demo_is_the_table_in_memory_with_its_own_splits(ehr_data, tmp_path):
    source = ehr_data / "mimic-iv-demo-meds" / "0.0.1"
    report, dataset = check_equal(source, tmp_path / "out", 200_000)
    own = dict(read_splits(source).iter_rows())
    for subject, split in dataset.splits.iter_rows():
        assert split == own[subject] or (own[subject] == "train" and split == "pretrain")
    assert report.whole["splits"]["held_out"]["patients"] == 10


def test_hl7_examples(ehr_data, tmp_path):
    with tarfile.open(ehr_data / "fhir-r4-examples" / "hl7.fhir.r4.examples-4.0.1.subset.tar.gz") as archive:
        archive.extractall(tmp_path / "source", filter="data")
    check_equal(tmp_path / "source", tmp_path / "out", 100, on_error="skip")


@pytest.mark.parametrize("compress", [True, False])
def test_large_files_are_read_in_parts(tmp_path, monkeypatch, compress):
    source = simulate(40, seed=3, progress=False).write_fhir(tmp_path / "fhir", compress=compress)
    parts, _ = fhir_parts.fhir_parts(fhir_files(source), tmp_path, shard_rows=4000, skip_errors=False)
    assert len(parts) == 1
    monkeypatch.setattr(fhir_parts, "PART_BYTES", 1 << 20)
    monkeypatch.setattr(fhir_parts, "STRIPE_BYTES", 1 << 20)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 17)
    parts, _ = fhir_parts.fhir_parts(fhir_files(source), tmp_path, shard_rows=4000, skip_errors=False)
    assert len(parts) > 6
    assert max(task.stripes for part in parts for task in part.tasks) > 1 or not compress
    check_equal(source, tmp_path / "out", 4000)


def test_splits_follow_the_fractions(fhir, tmp_path):
    report = prepare_dataset(fhir, tmp_path / "out", engine=ONE, fractions={"train": 0.5, "test": 0.5}, seed=1)
    assert set(report.whole["splits"]) == {"train", "test"}
    assert sum(counts["patients"] for counts in report.whole["splits"].values()) == 40


def test_a_dataset_of_ours_keeps_its_rows(fhir, tmp_path):
    events, report = load_events(fhir, progress=False)
    write_dataset(events, tmp_path / "first", dataset_name="first", report=report)
    check_equal(tmp_path / "first", tmp_path / "out", 5000)

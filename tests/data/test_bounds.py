"""What an input unpacks to is bounded by its size: a file made to fill the memory is one ValueError that names it."""

import gzip
import json
import tarfile
import tracemalloc
import zipfile
from datetime import datetime

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ehrseq.data import EventDataset, load_events, read_fhir
from ehrseq.data.fhir import blocks
from ehrseq.data.physionet2012 import files as challenge
from tests.data.fhir.samples import bundle, observation, patient, write_ndjson

MOST = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One megabyte is held whatever the file's size, and 250 times its own bytes."""
    monkeypatch.setattr(blocks, "_ALWAYS_HELD", MOST)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(challenge, "_MOST_BYTES", MOST)


def bomb(size: int = 64 << 20, head: bytes = b'{"resourceType": "Observation", "id": "') -> bytes:
    """64 MB of text in 64 kB."""
    return gzip.compress(head + b"x" * size)


@pytest.mark.parametrize("name", ["a.json.gz", "a.ndjson.gz"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_resource_that_unpacks_to_a_thousand_times_its_file_is_refused_by_name(name, beside, tmp_path):
    (tmp_path / name).write_bytes(bomb())
    if beside:
        write_ndjson(tmp_path / "Patient.ndjson", patient())
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"{name}: one resource, or one line, unpacks to more than"):
            read_fhir(tmp_path, progress=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 << 20  # of 64 MB that were never held together
    if beside:
        events, report = read_fhir(tmp_path, on_error="skip", progress=False)
        assert events["code"].to_list() == ["GENDER//F", "MEDS_BIRTH"]
        assert any(name in error for error in report.errors)


def test_json_that_is_no_fhir_is_looked_at_within_the_bound(tmp_path):
    write_ndjson(tmp_path / "Patient.ndjson", patient())
    (tmp_path / "log.json.gz").write_bytes(bomb(head=b'["'))
    with pytest.raises(ValueError, match=r"log\.json\.gz: one resource, or one line, unpacks to more"):
        read_fhir(tmp_path, progress=False)


def test_a_large_export_that_packs_well_is_read(tmp_path):
    """Lines are read block by block: only one of them is bounded, not their number."""
    lines = [patient(), *(observation(id=f"o{number}", encounter=None) for number in range(20_000))]
    (tmp_path / "all.ndjson.gz").write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in lines).encode()))
    assert read_fhir(tmp_path, progress=False)[1].resources_read["Observation"] == 20_000


def test_a_document_that_packs_as_well_as_fhir_does_is_read(tmp_path):
    made = bundle(patient(), *(observation(id=f"o{number}", encounter=None) for number in range(4_000)))
    text = json.dumps(made, indent=2).encode()
    assert len(text) > MOST
    (tmp_path / "all.json.gz").write_bytes(gzip.compress(text))
    assert read_fhir(tmp_path, progress=False)[1].resources_read["Observation"] == 4_000


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_member_of_an_archive_is_bounded(kind, tmp_path):
    text = tmp_path / "1.txt"
    text.write_bytes(challenge.HEADER + b"\n" + b"00:00,HR,1\n" * (MOST // 4))
    archive = tmp_path / f"set-a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
            opened.write(text, "set-a/1.txt")
    else:
        with tarfile.open(archive, "w:gz") as opened:
            opened.add(text, "set-a/1.txt")
    text.unlink()
    with pytest.raises(ValueError, match=r"set-a.*: set-a/1.txt unpacks to more than 1,048,576 bytes"):
        load_events(archive)


# -- Parquet -----------------------------------------------------------------------------------------------------------

ROW = {"subject_id": [7], "time": [datetime(2031, 5, 2)], "code": ["LAB//a"]}


def run_of_one_row(path, rows: int, step: int = 4 << 20):
    """A few kilobytes that state so many rows: one value, run after run."""
    schema = pa.schema([("subject_id", pa.int64()), ("time", pa.timestamp("us")), ("code", pa.string())])
    piece = pa.table({name: pa.array(values * step) for name, values in ROW.items()}).cast(schema)
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        for _ in range(rows // step):
            file.write_table(piece)
    return path


def test_a_parquet_file_that_states_more_rows_than_its_size_allows_is_refused_before_it_is_read(tmp_path):
    file = run_of_one_row(tmp_path / "0.parquet", 16 << 20)
    assert file.stat().st_size < 300_000
    tracemalloc.start()
    try:
        for read in (load_events, lambda path: EventDataset(path).events()):
            with pytest.raises(
                ValueError, match=r"0\.parquet: the file of [\d,]+ bytes states 16,777,216 rows of 3 col"
            ):
                read(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_a_parquet_file_whose_pages_unpack_to_a_thousand_times_its_size_is_refused(tmp_path):
    pl.DataFrame({**ROW, "text_value": ["x" * (80 << 20)]}).write_parquet(tmp_path / "0.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"0\.parquet: the file of [\d,]+ bytes states [\d,]+ bytes, unpacked"):
        load_events(tmp_path)


def test_a_parquet_file_of_a_million_equal_rows_is_read(tmp_path):
    events, report = load_events(run_of_one_row(tmp_path / "0.parquet", 1 << 20, 1 << 20))
    assert events.height == 1
    assert report.duplicates_dropped == (1 << 20) - 1


def test_columns_that_are_not_read_count_for_nothing(tmp_path):
    """A wide table of nulls beside the events: 400 columns that no row of ours has."""
    wide = pl.DataFrame({name: values * 60_000 for name, values in ROW.items()}).with_columns(
        pl.lit(None, pl.Int64).alias(f"x{number}") for number in range(400)
    )
    wide.write_parquet(tmp_path / "0.parquet")
    assert load_events(tmp_path)[0].height == 1

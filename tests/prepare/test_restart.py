"""Stopped at any point and started again: the same bytes as an undisturbed run, and only what was missing is done."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ehrseq.data.simulate.cohort import simulate
from ehrseq.prepare import fhir_parts, prepare_dataset
from ehrseq.work.engine import get_engine

ONE = get_engine(num_workers=1)
ROWS = 2000


def digests(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


class StoppedError(Exception):
    """What a test's engine raises."""


class StoppingEngine:
    """Works in this process, and is gone after some tasks."""

    num_workers = 1

    def __init__(self, after: int) -> None:
        self.left = after
        self.done: list[str] = []

    def map(self, work, tasks, *, desc):
        for task in tasks:
            if self.left == 0:
                raise StoppedError
            self.left -= 1
            result = work(task)
            self.done.append(result)
            yield result


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return simulate(60, seed=8, progress=False).write_fhir(tmp_path_factory.mktemp("fhir") / "fhir")


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(fhir_parts, "PART_BYTES", 1 << 20)


@pytest.fixture
def whole(source, tmp_path, small_parts) -> dict[str, str]:
    prepare_dataset(source, tmp_path / "whole", engine=ONE, shard_rows=ROWS)
    return digests(tmp_path / "whole")


def test_a_run_that_stops_after_any_task_goes_on(source, tmp_path, whole):
    output = tmp_path / "out"
    hidden = tmp_path / ".out.preparing"
    everything = StoppingEngine(10**9)
    prepare_dataset(source, tmp_path / "other", engine=everything, shard_rows=ROWS)
    steps = len(everything.done)
    assert steps > 12
    for after in (0, 1, 2, steps // 2, steps - 3, steps - 1):
        engine = StoppingEngine(after)
        with pytest.raises(StoppedError):
            prepare_dataset(source, output, engine=engine, shard_rows=ROWS)
        assert not output.exists()
        records = {file: file.stat().st_mtime_ns for file in hidden.rglob("[0-9]*.json")}
        (hidden / "dataset" / "data").mkdir(parents=True, exist_ok=True)
        (hidden / "dataset" / "data" / ".0.parquet.writing-77").write_bytes(b"half a file")
        assert len(records) == after
        again = StoppingEngine(after)
        with pytest.raises(StoppedError):
            prepare_dataset(source, output, engine=again, shard_rows=ROWS)
        # What was done stays as it is.
        assert {file: file.stat().st_mtime_ns for file in hidden.rglob("[0-9]*.json")} == records
    prepare_dataset(source, output, engine=ONE, shard_rows=ROWS)
    assert digests(output) == whole
    assert not hidden.exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"shard_rows": 900}, {"on_error": "skip"}, {"dataset_name": "x"}])
def test_what_other_settings_left_is_not_used(source, tmp_path, small_parts, change):
    with pytest.raises(StoppedError):
        prepare_dataset(source, tmp_path / "out", engine=StoppingEngine(5), shard_rows=ROWS)
    engine = StoppingEngine(10**9)
    settings = {"shard_rows": ROWS} | change
    prepare_dataset(source, tmp_path / "out", engine=engine, **settings)
    prepare_dataset(source, tmp_path / "fresh", engine=ONE, **settings)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_a_source_that_changed_is_read_again(tmp_path, small_parts):
    source = simulate(20, seed=8, progress=False).write_fhir(tmp_path / "fhir")
    with pytest.raises(StoppedError):
        prepare_dataset(source, tmp_path / "out", engine=StoppingEngine(2), shard_rows=ROWS)
    file = source / "Observation.ndjson"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-3]))
    report = prepare_dataset(source, tmp_path / "out", engine=ONE, shard_rows=ROWS)
    lines = sum(file.read_bytes().count(b"\n") for file in source.iterdir())
    assert sum(report.conversion.resources_read.values()) == lines


def test_a_run_that_was_stopped_after_the_dataset_was_there_is_complete(source, tmp_path, whole, monkeypatch):
    from ehrseq.prepare import run

    removed = []

    def stop(path):
        if path.name == ".out.preparing":
            removed.append(path)
            raise StoppedError
        original(path)

    original = run.remove
    monkeypatch.setattr(run, "remove", stop)
    with pytest.raises(StoppedError):
        prepare_dataset(source, tmp_path / "out", engine=ONE, shard_rows=ROWS)
    monkeypatch.setattr(run, "remove", original)
    assert removed
    report = prepare_dataset(source, tmp_path / "out", engine=ONE, shard_rows=ROWS)
    assert report.conversion.subjects == 60
    assert "shards" in str(report)
    assert digests(tmp_path / "out") == whole
    assert not (tmp_path / ".out.preparing").exists()
    with pytest.raises(ValueError, match="exists and is not empty"):
        prepare_dataset(source, tmp_path / "out", engine=ONE, shard_rows=ROWS)


_SCRIPT = f"""
import sys
from ehrseq.work.engine import get_engine
from ehrseq.prepare import fhir_parts, prepare_dataset
fhir_parts.PART_BYTES = 1 << 20
prepare_dataset(sys.argv[1], sys.argv[2], engine=get_engine(num_workers=2), shard_rows={ROWS})
"""


@pytest.mark.slow
def test_killed_at_several_points_and_started_again(source, tmp_path, whole):
    """SIGKILL: nothing of the process can tidy up."""
    output, hidden = tmp_path / "out", tmp_path / ".out.preparing"
    points = [
        "settings.json",
        "spill/0.json",
        "spill/3.json",
        "spill/index.json",
        "records/0.json",
        "records/4.json",
        "dataset/metadata",
    ]
    killed = 0
    for point in points:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SCRIPT, str(source), str(output)], start_new_session=True
        )
        while process.poll() is None and not (hidden / point).exists():
            time.sleep(0.001)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        if output.exists():
            break
    assert killed >= 4
    if not output.exists():
        prepare_dataset(source, output, engine=get_engine(num_workers=2), shard_rows=ROWS)
    assert digests(output) == whole


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(source, tmp_path, whole):
    prepare_dataset(source, tmp_path / "two", engine=get_engine(num_workers=2), shard_rows=ROWS)
    assert digests(tmp_path / "two") == whole


@pytest.mark.slow
def test_ray_gives_the_same_bytes(source, tmp_path, whole):
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra ehrseq[ray])")
    try:
        prepare_dataset(source, tmp_path / "ray", engine=get_engine("ray", num_workers=2), shard_rows=ROWS)
    finally:
        ray.shutdown()
    assert digests(tmp_path / "ray") == whole

"""`ehrseq explain`: pages of patients, contributions of all, what a killed run left, errors in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.data.dataset import write_dataset
from tests.checkpoints.patients import make_patient, make_table
from tests.checkpoints.stays import make_stay
from tests.in_process import run_ehrseq
from tests.processes import FROM_HERE

MODEL = Path(__file__).resolve().parents[1] / "checkpoints" / "ehrmamba"
TASK = "mortality_30d"


@pytest.fixture(scope="module")
def events():
    return make_table([make_patient(subject_id) for subject_id in range(12)])


@pytest.fixture(scope="module")
def dataset(events, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dataset"
    write_dataset(events, path, dataset_name="test")
    return path


@pytest.fixture(scope="module")
def file(events, tmp_path_factory):
    path = tmp_path_factory.mktemp("events") / "events.parquet"
    events.write_parquet(path)
    return path


def explain(*arguments):
    asked = ["explain", "--model", MODEL, *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in asked], catch_exceptions=False)


def test_a_page_of_a_patient(file, tmp_path):
    printed = explain(
        "--data", file, "--subject", 3, "--task", TASK, "--method", "prefix_deltas", "--method", "occlusion",
        "--setting", "occlusion.groups=code", "--png", "--out", tmp_path / "out",
    ).output  # fmt: skip
    page = tmp_path / "out" / "patient_3.html"
    assert sorted(path.name for path in page.parent.iterdir()) == ["patient_3.html", "patient_3.png"]
    assert f"Written: {page}" in printed
    assert "events that take no part" in printed
    text = page.read_text()
    assert "occlusion" in text


def test_pages_at_asked_times(events, file, tmp_path):
    times = events.filter(pl.col("subject_id") == 3)["time"].sort()
    asked = pl.DataFrame({"subject_id": [3, 3, 4], "prediction_time": [times[4], times[-1], times[-1]]})
    asked.write_csv(tmp_path / "times.csv")
    explain(
        "--data", file, "--subject", 3, "--task", TASK, "--times", tmp_path / "times.csv", "--out", tmp_path / "out"
    )
    assert len(list((tmp_path / "out").glob("patient_3_*.html"))) == 2


def test_contributions_and_the_page_of_a_cohort(dataset, tmp_path):
    printed = explain("--data", dataset, "--task", TASK, "--out", tmp_path, "--workers", 1, "--resamples", 20).output
    names = ["cohort.parquet", f"cohort_{TASK}_prefix_deltas.html", "contributions.parquet"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert "12 patients, 12 questions in " in printed
    table = pl.read_parquet(tmp_path / "contributions.parquet")
    first = table.group_by("subject_id").agg(
        pl.col("contribution").sum(), pl.col("baseline", "remainder", "log_odds").first()
    )
    total = first["baseline"] + first["contribution"] + first["remainder"]
    assert (total - first["log_odds"]).abs().max() < 1e-6
    cohort = pl.read_parquet(tmp_path / "cohort.parquet")
    assert set(cohort["outcome"]) <= {"positive prediction", "negative prediction", "all"}


def test_events_in_memory_and_a_dataset_give_the_same(dataset, file, tmp_path):
    for name, data in (("files", dataset), ("memory", file)):
        explain("--data", data, "--task", TASK, "--out", tmp_path / name, "--workers", 1, "--resamples", 5)
    files, memory = (pl.read_parquet(tmp_path / name / "contributions.parquet") for name in ("files", "memory"))
    keys = ["subject_id", "event"]
    assert files.sort(keys).drop("display").equals(memory.sort(keys).drop("display"))


def test_sums_of_a_cohort_by_kind(file, tmp_path):
    explain("--data", file, "--task", TASK, "--by", "kind", "--out", tmp_path, "--workers", 1, "--resamples", 5)
    assert "lab" in pl.read_parquet(tmp_path / "cohort.parquet")["group"].to_list()


def test_fhir_is_read_and_its_codes_are_named(tmp_path):
    assert run_ehrseq("simulate", tmp_path / "fhir", "-n", 3, "--seed", 2).returncode == 0
    labs = tmp_path / "fhir" / "Observation.ndjson"
    labs.write_text(labs.read_text().replace('"code":"2951-2"', '"code":"2951-2","display":"Sodium"'))
    explain("--data", tmp_path / "fhir", "--task", TASK, "--out", tmp_path / "out", "--workers", 1, "--resamples", 5)
    table = pl.read_parquet(tmp_path / "out" / "contributions.parquet")
    assert table["subject_id"].n_unique() == 3
    assert table.filter(pl.col("code") == "LAB//LOINC//2951-2")["display"].unique().to_list() == ["Sodium"]


_EXPLAIN = ["-m", "ehrseq.cli.app", "explain", "--model", str(MODEL), "--task", TASK, "--resamples", "5"]
_BY_EVENT = ["--method", "occlusion", "--setting", "groups=event"]


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes(tmp_path):
    """SIGKILL: nothing of the process can tidy up. Then two workers go on."""
    many = make_table([make_patient(subject_id) for subject_id in range(140)])
    write_dataset(many, tmp_path / "data", dataset_name="test")
    command = [sys.executable, "-P", *_EXPLAIN, *_BY_EVENT, "--data", str(tmp_path / "data")]
    killed, parts = tmp_path / "killed", tmp_path / "killed" / ".parts"
    process = subprocess.Popen(
        [*command, "--workers", "1", "--out", str(killed)],
        env=FROM_HERE,
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    while process.poll() is None and not any(parts.rglob("*-0.json")):
        time.sleep(0.002)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "contributions.parquet").exists()
    kept = {path: path.stat().st_mtime_ns for path in parts.rglob("*.json")}
    assert kept
    subprocess.run([*command, "--workers", "2", "--out", str(killed)], env=FROM_HERE, check=True, capture_output=True)
    whole = explain(
        "--data",
        tmp_path / "data",
        "--task",
        TASK,
        *_BY_EVENT,
        "--resamples",
        5,
        "--workers",
        1,
        "--out",
        tmp_path / "whole",
    )
    assert "140 patients" in whole.output
    for name in ("contributions.parquet", "cohort.parquet", f"cohort_{TASK}_occlusion.html"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sepsis"], "unknown tasks ['sepsis']"),
        (["--method", "magic"], "method got 'magic'; a model of the family 'ehrmamba' has"),
        (["--method", "hidden_attention"], "shows weights"),
        (["--subject", 999], "there is no patient 999"),
        (["--times", "nowhere.csv"], "no file nowhere.csv"),
        (["--times", "times.csv"], "lack ['prediction_time']"),
        (["--times", "times.csv", "--labels", "x"], "give one of them"),
        (["--png"], "--png makes pictures of patients"),
        (["--by", "visit"], "by got 'visit'"),
        (["--threshold", 3], "threshold got 3"),
        (["--setting", "groups"], "expected name=value"),
        (["--setting", "groups=code"], "is of which method?"),
        (["--method", "occlusion", "--setting", "group=code"], "has no setting ['group']"),
        (["--method", "occlusion", "--setting", "groups=code", "--by", "kind"], "of groups already"),
        (["--split", "train"], "splits need a dataset in files"),
        (["--out", "times.csv"], "times.csv cannot be written"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--model", "nowhere"], "no checkpoint folder nowhere"),
    ],
)
def test_bad_input_is_one_line(file, tmp_path, arguments, message):
    pl.DataFrame({"subject_id": [1]}).write_csv(tmp_path / "times.csv")
    asked = ["--model", MODEL, "--data", file, "--out", tmp_path / "out", "--workers", 1, *arguments]
    result = run_ehrseq("explain", *asked, folder=tmp_path)
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1] or message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_record_that_no_model_reads_is_told(tmp_path):
    stay = make_stay(1)
    rows = [{"subject_id": 1, **event} for event in stay["events"]]
    start = rows[1]["time"]
    unread = [{"subject_id": 6, "time": start, "code": "LAB//A//unheard of", "numeric_value": 1.0}]
    pl.DataFrame([*rows, *unread]).write_parquet(tmp_path / "stays.parquet")
    model = MODEL.with_name("hymate")
    asked = ["--model", model, "--data", tmp_path / "stays.parquet", "--method", "prefix_deltas", "--workers", 1]
    result = run_ehrseq("explain", *asked, "--out", tmp_path / "all", "--resamples", 5)
    assert result.returncode == 0, result.stderr
    assert "1 answered, 1 without an answer" in result.stdout
    result = run_ehrseq("explain", *asked[:-2], "--subject", 6, "--out", tmp_path / "one")
    assert result.returncode == 1
    assert "cannot be read" in result.stdout

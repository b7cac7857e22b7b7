"""`ehrseq forecast`: from records to a table of probabilities, a page and trajectories."""

import re
import shutil
from pathlib import Path

import polars as pl
import pytest

from ehrseq.cli.forecast import read_outcome_options
from ehrseq.data.dataset import write_dataset
from tests.checkpoints.forecast import forecast_checkpoint, mortal_patient
from tests.checkpoints.patients import make_table
from tests.in_process import run_ehrseq

EVENTS = make_table([mortal_patient(number) for number in range(1, 4)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forecast_checkpoint(tmp_path_factory.mktemp("forecast") / "checkpoint")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "dataset"
    splits = pl.DataFrame({"subject_id": [1, 2, 3], "split": ["train", "train", "held_out"]})
    write_dataset(EVENTS, folder, dataset_name="test", splits=splits)
    return folder


def test_a_dataset_with_a_page_and_trajectories(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    done = run_ehrseq(
        *("forecast", "--model", checkpoint, "--data", dataset, "--out", tmp_path / "f.parquet", "--num", 2),
        *("--outcome", "clinic=VISIT_START//AMB", "--outcome", 'any=["VISIT_START//*"]'),
        *("--horizon", "60d", "--page", tmp_path / "f.html", "--trajectories", tmp_path / "futures", "--workers", 1),
    )
    assert done.returncode == 0, done.stderr
    table = pl.read_parquet(tmp_path / "f.parquet")
    assert table["task"].to_list() == ["any", "clinic"] * 3
    assert "3 patients, 6 rows" in done.stdout
    assert "2 with a reason" in done.stdout
    assert "cumulative" not in (tmp_path / "f.html").read_text()[:200]
    assert sorted(file.name for file in (tmp_path / "futures").iterdir()) == ["0.parquet", "1.parquet"]
    assert not list(tmp_path.glob("*.parts"))
    shutil.copytree(dataset / "data", tmp_path / "meds" / "data")  # the same records, not prepared by us
    again = run_ehrseq(
        *("forecast", "--model", checkpoint, "--data", tmp_path / "meds", "--out", tmp_path / "g.parquet", "--num", 2),
        *("--outcome", "clinic=VISIT_START//AMB", "--outcome", 'any=["VISIT_START//*"]', "--horizon", "60d"),
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "g.parquet").read_bytes() == (tmp_path / "f.parquet").read_bytes()


def test_trajectories_do_not_replace_what_is_none(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    """An export named by mistake stays as it is."""
    (tmp_path / "Patient.ndjson").write_text("{}")
    asked = ["forecast", "--model", checkpoint, "--data", dataset, "--out", tmp_path.parent / "f.parquet"]
    for folder, why in ((tmp_path, "something other than files of trajectories"), (dataset, "other than|one another")):
        done = run_ehrseq(*asked, "--trajectories", folder)
        assert done.returncode == 1
        assert re.search(why, done.stderr)
    assert (tmp_path / "Patient.ndjson").read_text() == "{}"
    assert (dataset / "metadata").is_dir()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--out", "forecasts.csv"], "name of a .parquet file"),
        (["--page", "page.pdf"], "name of a .html file"),
        (["--times", "a.csv", "--labels", "b"], "give one of them"),
        (["--outcome", "clinic"], "expected name=CODE"),
        (["--outcome", "=x"], "expected name=CODE"),
        (["--outcome", "a=x", "--outcome", "a=y"], "stands twice"),
        (["--outcome", "a={code}"], "begins as JSON and is none"),
        (["--outcome", "a=VISIT_START//INP"], "nearest that it has"),
        (["--horizon", "soon"], "horizon got 'soon'"),
        (["--task", "readmission_30d", "--horizon", "3d"], "a task has its own horizon"),
        (["--standard-error", "2"], "standard_error got 2"),
        (["--split", "nobody"], "no split"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_what_is_refused(options: list[str], why: str, checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    given = [] if "--model" in options else ["--model", checkpoint]
    done = run_ehrseq("forecast", "--data", dataset, *given, *options, folder=tmp_path)
    assert done.returncode == 1
    assert why in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_records_without_files_have_no_engine(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset / "data", tmp_path / "meds" / "data")
    given = ("--model", checkpoint, "--data", tmp_path / "meds")
    done = run_ehrseq("forecast", *given, "--workers", 2, folder=tmp_path)
    assert "need a dataset in files" in done.stderr


def test_outcomes_of_the_command_line() -> None:
    given = read_outcome_options(["icu=ICU//*", 'k={"code": "LAB//K", "above": 5.5}', 'heart=["A//*", "B"]'])
    assert given == {"icu": "ICU//*", "k": {"code": "LAB//K", "above": 5.5}, "heart": ["A//*", "B"]}

"""Tasks of ACES on a prepared dataset: those that ACES itself gives for the whole table."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from ehrseq.data.dataset import write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.tasks import aces, read_labels
from ehrseq.tasks.aces import is_aces_file, label_dataset_aces
from ehrseq.work.engine import get_engine
from tests.modeling.fetch_tools import folder

HAS_ACES = importlib.util.find_spec("aces") is not None
needs_aces = pytest.mark.skipif(not HAS_ACES, reason="ACES is not installed: run by test_with_the_library where it is")
ROOT = Path(__file__).parents[2]

TASK = """
predicates:
  discharge: {code: {regex: "^VISIT_END//"}}
  admission: {code: {regex: "^VISIT_START//IMP"}}
  death: {code: MEDS_DEATH}
  discharge_or_death: {expr: "or(discharge, death)"}
trigger: admission
windows:
  input: {start: null, end: trigger + 24h, start_inclusive: true, end_inclusive: true, index_timestamp: end}
  gap:
    start: trigger
    end: start + 24h
    start_inclusive: false
    end_inclusive: true
    has: {discharge_or_death: "(None, 0)"}
  target: {start: gap.end, end: start -> discharge_or_death, start_inclusive: false, end_inclusive: true, label: death}
"""


@pytest.fixture
def task(tmp_path):
    file = tmp_path / "died_in_hospital.yaml"
    file.write_text(TASK)
    return file


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = tmp_path_factory.mktemp("aces") / "dataset"
    write_dataset(simulate(60, seed=4, progress=False).events(), path, dataset_name="test", shard_size=5000)
    return path


@pytest.fixture
def dataset(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "dataset")


@needs_aces
@pytest.mark.parametrize("workers", [1, 2])
def test_files_give_what_aces_gives_for_the_whole_table(dataset, task, workers, tmp_path):
    from aces import config, predicates, query
    from omegaconf import DictConfig

    name, labels = label_dataset_aces(dataset, task, engine=get_engine(num_workers=workers))
    whole = tmp_path / "whole.parquet"
    pl.concat([pl.read_parquet(file) for file in (dataset / "data").rglob("*.parquet")]).write_parquet(whole)
    cfg = config.TaskExtractorConfig.load(task)
    source = DictConfig({"path": str(whole), "standard": "meds", "ts_format": None})
    expected = query.query(cfg, predicates.get_predicates_df(cfg, source)).sort("subject_id", "index_timestamp")
    assert name == "died_in_hospital"
    assert labels["subject_id"].equals(expected["subject_id"])
    assert (labels["prediction_time"] == expected["index_timestamp"]).all()
    assert (labels["boolean_value"] == (expected["label"] > 0)).all()
    assert labels.height > 20
    assert read_labels(dataset)["died_in_hospital"].equals(labels)
    assert sorted(path.name for path in (dataset / "labels").iterdir()) == ["died_in_hospital"]


@needs_aces
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TASK.replace("trigger: admission", "trigger: nobody"), "no task that ACES takes"),
        (TASK.replace(", label: death", ""), "says no label"),
        (TASK.replace(", index_timestamp: end", ""), "says no index_timestamp"),
    ],
)
def test_bad_files_are_refused(dataset, task, text, message):
    task.write_text(text)
    with pytest.raises(ValueError, match=message):
        label_dataset_aces(dataset, task)
    assert not (dataset / "labels").exists()


@needs_aces
def test_an_unreadable_file_is_named(dataset, task):
    file = sorted((dataset / "data").rglob("*.parquet"))[1]
    with file.open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(ValueError, match="cannot be read as Parquet") as caught:
        label_dataset_aces(dataset, task, engine=get_engine(num_workers=1))
    assert str(file) in str(caught.value)


def test_files_of_aces_are_told_from_ours(task, tmp_path):
    assert is_aces_file(task)
    ours = ROOT / "ehrseq" / "tasks" / "definitions" / "hypertension.yaml"
    assert not is_aces_file(ours)
    (tmp_path / "broken.yaml").write_text("a: [")
    assert not is_aces_file(tmp_path / "broken.yaml")
    assert not is_aces_file(tmp_path / "nowhere.yaml")


@pytest.mark.skipif(HAS_ACES, reason="the tests run in this process")
def test_with_the_library():
    """ACES stands apart from the environment of the tests (tests/modeling/fetch_tools.py)."""
    if not folder("aces").is_dir():
        pytest.skip("ACES is not there: python tests/modeling/fetch_tools.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder('aces')}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [__file__, str(Path(__file__).with_name("test_aces_windows.py"))]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(HAS_ACES, reason="ACES is installed")
def test_without_aces_the_extra_is_named(dataset, task):
    with pytest.raises(ImportError, match=r"ehrseq\[aces\]"):
        label_dataset_aces(dataset, task)


def test_who_is_dead_at_an_unknown_time_has_no_label_of_aces(tmp_path, monkeypatch):
    """ACES reads rows with a time: to it the dead of patients 2 and 4 would be alive. It need not be installed here."""
    at = datetime(2031, 5, 8)
    rows = [(subject, at, "VISIT_START//IMP") for subject in range(1, 6)]
    rows += [(2, None, "MEDS_DEATH"), (3, None, "MEDS_DEATH"), (3, at, "MEDS_DEATH"), (4, None, "VISIT_END//exp")]
    rows += [(5, None, "VISIT_END//IMP")]
    events = pl.DataFrame(rows, {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String}, orient="row")
    splits = pl.DataFrame({"subject_id": range(1, 6), "split": "train"})
    write_dataset(events, tmp_path / "d", dataset_name="test", splits=splits)
    task = tmp_path / "any.yaml"
    task.write_text(TASK)
    everybody = pl.DataFrame({"subject_id": range(1, 6), "prediction_time": at, "boolean_value": False})
    monkeypatch.setattr(aces, "_load", lambda config: None)
    monkeypatch.setattr(aces, "_query", lambda config, path: everybody)
    name, labels = label_dataset_aces(tmp_path / "d", task, engine=get_engine(num_workers=1))
    assert labels["subject_id"].to_list() == [1, 3, 5]
    assert read_labels(tmp_path / "d")[name].equals(labels)
    report = json.loads((tmp_path / "d" / "labels" / name / "report.json").read_text())
    assert report["dropped"] == {"death_time_unknown": 2}

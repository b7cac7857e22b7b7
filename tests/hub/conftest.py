"""Checkpoints, and one round trip over a Hub on the loopback interface, for all Hub tests.

Three processes make it, which take seconds of imports each: one pushes checkpoints in every way there is, one with the
package and one without it load what was pushed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.checkpoints.complete import complete_checkpoint
from tests.checkpoints.patients import make_patient
from tests.checkpoints.stays import make_stay
from tests.hub.bare_interpreter import link_packages, run_scripts
from tests.hub.minihub import MiniHub
from tests.hub.round_trip import BASELINES_LOAD, HYMATE_LOAD, HYMATE_PUSH, LOAD, PUSH

BASELINES = ("ehr_lstm", "cehrbert", "ehr_bigbird")
REPOSITORIES = ["user/whole", "user/parts", "user/pipe", "user/saved", "user/trainer"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small trained classifier with its tokenizer."""
    return complete_checkpoint("ehrmamba", tmp_path_factory.mktemp("hub") / "checkpoint")


@pytest.fixture(scope="session")
def hymate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small trained HyMaTE with its feature extractor."""
    return complete_checkpoint("hymate", tmp_path_factory.mktemp("hymate") / "checkpoint")


@pytest.fixture(scope="session")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small trained baselines, by model type."""
    return {family: complete_checkpoint(family, tmp_path_factory.mktemp(family) / family) for family in BASELINES}


@pytest.fixture(scope="session")
def patients() -> dict[str, list[dict[str, Any]]]:
    """Who is scored, by the checkpoint that does it."""
    return {
        "ehrmamba": [make_patient(subject_id, seed=3) for subject_id in range(3)],
        "hymate": [make_stay(subject_id) for subject_id in range(200, 203)],
        "baselines": [make_patient(subject_id) for subject_id in range(500, 506)],
    }


@pytest.fixture(scope="session")
def hub() -> Iterator[MiniHub]:
    """The server."""
    with MiniHub() as server:
        yield server


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of risks and labels, for the card of the example."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 200)
    rows = {
        "subject_id": np.arange(200) // 2,
        "task": ["mortality_30d"] * 200,
        "label": labels,
        "score": (labels + random.random(200)) / 2,
    }
    file = tmp_path_factory.mktemp("scored") / "risks.parquet"
    pl.DataFrame(rows).write_parquet(file)
    return file


@pytest.fixture(scope="session")
def all_pushed(
    hub: MiniHub, checkpoint: Path, hymate: Path, scored: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the pushing process says, by checkpoint."""
    folder = tmp_path_factory.mktemp("push")
    given = {"model": str(checkpoint), "saved": str(folder / "saved"), "run": str(folder / "run")}
    given["example"] = ["examples/05_push_to_hub.py", "--model", str(checkpoint), "--repo_id", "user/example"]
    given["example"] += ["--scores", str(scored)]
    scripts = {"ehrmamba": (PUSH, given), "hymate": (HYMATE_PUSH, {"model": str(hymate)})}
    return run_scripts(scripts, hub.environment(folder / "home"))


def _loading(all_pushed: dict[str, Any], patients: dict[str, Any], *, package: bool) -> dict[str, tuple[str, Any]]:
    given = {"package": package, "first": all_pushed["ehrmamba"]["first"], "repositories": REPOSITORIES}
    return {
        "ehrmamba": (LOAD, {**given, "patients": _as_json(patients["ehrmamba"])}),
        "hymate": (HYMATE_LOAD, {"package": package, "patients": _as_json(patients["hymate"])}),
    }


def _as_json(patients: list[dict[str, Any]]) -> Any:
    return json.loads(json.dumps(patients, default=lambda time: time.isoformat()))


@pytest.fixture(scope="session")
def with_package(
    hub: MiniHub, all_pushed: dict[str, Any], patients: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What a process with the package makes of all that was pushed, by checkpoint."""
    home = tmp_path_factory.mktemp("load") / "home"
    return run_scripts(_loading(all_pushed, patients, package=True), hub.environment(home))


@pytest.fixture(scope="session")
def without_package(
    hub: MiniHub,
    all_pushed: dict[str, Any],
    baselines: dict[str, Path],
    patients: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """What a process without ehrseq makes of all that was pushed, and of the baselines' folders, by checkpoint."""
    folder = tmp_path_factory.mktemp("bare")
    scripts = _loading(all_pushed, patients, package=False)
    models = {family: str(path) for family, path in baselines.items()}
    scripts["baselines"] = (BASELINES_LOAD, {"models": models, "patients": _as_json(patients["baselines"])})
    return run_scripts(scripts, hub.environment(folder / "home"), link_packages(folder / "packages"))


@pytest.fixture(scope="session", params=["with_package", "without_package"])
def all_loaded(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Both of them, one after the other."""
    return request.getfixturevalue(request.param)

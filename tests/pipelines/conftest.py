"""Checkpoints for all pipeline tests, and what an interpreter without the package makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.complete import complete_checkpoint
from tests.checkpoints.forecast import forecast_checkpoint
from tests.checkpoints.forecaster import make_forecaster
from tests.checkpoints.patients import make_patient
from tests.checkpoints.stays import make_stay
from tests.hub.bare_interpreter import link_packages, run_scripts
from tests.pipelines.bare_scripts import EHRMAMBA_FORECASTS, EHRMAMBA_SCORES, HYMATE_FORECASTS, HYMATE_SCORES

PATIENTS = [make_patient(subject_id, seed=2) for subject_id in range(3)]
STAYS = [make_stay(subject_id) for subject_id in range(100, 105)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small trained classifier with its tokenizer."""
    return complete_checkpoint("ehrmamba", tmp_path_factory.mktemp("pipeline") / "checkpoint")


@pytest.fixture(scope="session")
def hymate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small trained HyMaTE with its feature extractor."""
    return complete_checkpoint("hymate", tmp_path_factory.mktemp("hymate") / "checkpoint")


@pytest.fixture(scope="session")
def forecaster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small event model of next tokens with its tokenizer."""
    return forecast_checkpoint(tmp_path_factory.mktemp("forecast") / "checkpoint")


@pytest.fixture(scope="session")
def stay_forecaster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small HyMaTE that forecasts, with its feature extractor."""
    folder = tmp_path_factory.mktemp("stay-forecast") / "checkpoint"
    made = make_forecaster(stays=60)
    made.model.save_pretrained(folder)
    made.extractor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scored_without_package(
    checkpoint: Path, hymate: Path, forecaster: Path, stay_forecaster: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What one interpreter without ehrseq, polars and pyarrow makes of them, and where it saved them."""
    folder = tmp_path_factory.mktemp("bare")
    given = {
        name: {"model": str(model), "patients": _as_json(patients), "saved": str(folder / name)}
        for name, model, patients in (
            ("ehrmamba", checkpoint, PATIENTS),
            ("hymate", hymate, STAYS),
            ("forecast", forecaster, PATIENTS),
            ("stay_forecast", stay_forecaster, STAYS),
        )
    }
    scripts = {
        "ehrmamba": (EHRMAMBA_SCORES, given["ehrmamba"]),
        "hymate": (HYMATE_SCORES, given["hymate"]),
        "forecast": (EHRMAMBA_FORECASTS, given["forecast"]),
        "stay_forecast": (HYMATE_FORECASTS, given["stay_forecast"]),
    }
    done = run_scripts(scripts, {"HF_HOME": str(folder / "home")}, link_packages(folder / "packages"))
    return {name: {**answer, "saved": given[name]["saved"]} for name, answer in done.items()}


def _as_json(patients: list[dict[str, Any]]) -> Any:
    return json.loads(json.dumps(patients, default=lambda time: time.isoformat()))

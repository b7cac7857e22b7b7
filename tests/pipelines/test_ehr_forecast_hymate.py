"""`pipeline("ehr-forecast")` of a model of stays: the values of `StayForecaster`, one answer a stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModelForPreTraining, pipeline

import ehrseq
from ehrseq.pipelines.stay_forecasts import StayForecaster
from tests.checkpoints.stays import make_stay

STAYS = [make_stay(subject_id) for subject_id in range(100, 103)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model of stays, with random weights, beside the feature extractor that it fits."""
    committed = Path(__file__).parents[1] / "checkpoints" / "hymate"
    path = tmp_path_factory.mktemp("stays") / "checkpoint"
    extractor = AutoFeatureExtractor.from_pretrained(committed)
    config = ehrseq.HyMaTEConfig.from_pretrained(committed)
    torch.manual_seed(0)
    ehrseq.HyMaTEForPreTraining(config).save_pretrained(path)
    extractor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def forecast(folder: Path) -> Any:
    return pipeline("ehr-forecast", model=str(folder), device="cpu")


def test_values_of_stays_are_the_forecasters(forecast: Any, folder: Path) -> None:
    own = StayForecaster(AutoModelForPreTraining.from_pretrained(folder), AutoFeatureExtractor.from_pretrained(folder))
    answers = forecast(STAYS)
    for stay, answer in zip(STAYS, answers, strict=True):
        row = own.rows(stay)
        about = row.pop("stay")
        with torch.inference_mode():
            expected = own.answer(own.model(**row).predictions, about)
        assert answer == expected
        assert answer["outcomes"] == []
        assert forecast(stay) == answer
    assert list(forecast(iter(STAYS))) == answers


def test_the_dead_have_no_values(forecast: Any) -> None:
    events = [*STAYS[0]["events"], {"time": STAYS[0]["events"][-1]["time"], "code": "MEDS_DEATH"}]
    answer = forecast({**STAYS[0], "events": events})
    assert answer == {"outcomes": [], "values": [], "reason": "died_before_prediction"}


def test_what_is_asked_of_event_models_alone_is_refused(forecast: Any) -> None:
    for name in ("horizon", "outcomes", "n", "grid"):
        with pytest.raises(ValueError, match=f"{name}.*of a model of stays: it takes alpha"):
            forecast(STAYS[0], **{name: 3})


def test_a_finetuned_model_of_stays_has_no_forecasting_head(tmp_path: Path) -> None:
    from tests.checkpoints.complete import complete_checkpoint

    with pytest.raises(ValueError, match="forecast"):
        pipeline("ehr-forecast", model=str(complete_checkpoint("hymate", tmp_path / "hymate")), device="cpu")


def test_a_stay_without_a_measured_variable(forecast: Any) -> None:
    with pytest.raises(ValueError, match=r"variable|value"):
        forecast({"subject_id": 1, "events": [{"time": "2150-01-01", "code": "ICU_ADMISSION//x"}]})

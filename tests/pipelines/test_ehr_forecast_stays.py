"""`pipeline("ehr-forecast")` on a HyMaTE that forecasts: values of stays, with and without the package."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModelForPreTraining, pipeline

import ehrseq
from ehrseq.pipelines.stay_forecasts import StayForecaster
from tests.checkpoints.complete import complete_checkpoint
from tests.checkpoints.forecaster import events_of
from tests.checkpoints.stays import make_stay
from tests.pipelines.conftest import STAYS

PATIENTS = [make_stay(number) for number in range(900, 906)]


@pytest.fixture
def folder(stay_forecaster: Path) -> Path:
    return stay_forecaster


@pytest.fixture(scope="session")
def forecast(stay_forecaster: Path) -> Any:
    return pipeline("ehr-forecast", model=str(stay_forecaster), device="cpu")


def test_the_answers_are_those_of_the_model(forecast: Any, folder: Path) -> None:
    assert type(forecast) is ehrseq.EhrForecastPipeline
    assert type(forecast.model) is ehrseq.HyMaTEForPreTraining
    model = AutoModelForPreTraining.from_pretrained(folder).eval()
    stays = StayForecaster(model, AutoFeatureExtractor.from_pretrained(folder))
    for patient in PATIENTS:
        row = stays.rows(patient)
        about = row.pop("stay")
        with torch.no_grad():
            expected = stays.answer(model(**row).predictions, about)
        assert forecast(patient) == expected
        json.dumps(expected)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_company_changes_no_answer(forecast: Any, batch_size: int) -> None:
    alone = [forecast(patient) for patient in PATIENTS]
    together = forecast(PATIENTS, batch_size=batch_size)
    from_generator = list(forecast((patient for patient in PATIENTS), batch_size=batch_size))
    for answers in (together, from_generator):
        for answer, expected in zip(answers, alone, strict=True):
            for entry, other in zip(answer["values"], expected["values"], strict=True):
                numbers = ("value", "low", "high")
                assert {**entry, **dict.fromkeys(numbers)} == {**other, **dict.fromkeys(numbers)}
                for name in numbers:
                    assert (entry[name] is None) == (other[name] is None)
                    assert entry[name] is None or entry[name] == pytest.approx(other[name], rel=1e-5)


def test_alpha_is_an_argument_of_the_pipeline_and_of_a_call(forecast: Any, folder: Path) -> None:
    half = pipeline("ehr-forecast", model=str(folder), device="cpu", alpha=0.5)
    assert half(PATIENTS) == forecast(PATIENTS, alpha=0.5)
    assert half(PATIENTS) != forecast(PATIENTS)
    assert forecast(PATIENTS) == half(PATIENTS, alpha=0.1)  # a call's own does not stay
    with pytest.raises(ValueError, match=r"alpha got 0\.3"):
        forecast((1 / 0 for _ in range(3)), alpha=0.3)  # nobody has been read


def test_the_dead_are_told_in_one_line(forecast: Any, caplog: pytest.LogCaptureFixture) -> None:
    dead = {**PATIENTS[1], "events": [*PATIENTS[1]["events"], {"time": None, "code": "MEDS_DEATH"}]}
    caplog.clear()
    answers = forecast([PATIENTS[0], dead])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "it is not known whether before the prediction time (1)" in line
    assert answers[1] == {"outcomes": [], "values": [], "reason": "death_time_unknown"}
    assert answers[0]["values"]


def test_a_fhir_bundle_is_a_patient() -> None:
    """Its own codes: vital signs of an encounter in hospital."""
    from ehrseq.data import patient_from_bundle
    from ehrseq.encode.triplets import TripletSpec, build_triplets

    def resource(kind: str, **content: Any) -> dict[str, Any]:
        return {"resource": {"resourceType": kind, **content}}

    subject, code = {"reference": "Patient/1"}, {"coding": [{"system": "http://loinc.org", "code": "8867-4"}]}
    vital = [{"coding": [{"code": "vital-signs"}]}]
    values = [
        resource(
            "Observation",
            id=f"o{hour}",
            status="final",
            subject=subject,
            category=vital,
            code=code,
            effectiveDateTime=f"2150-03-01T{hour:02d}:00:00Z",
            valueQuantity={"value": 70.0 + hour, "unit": "/min", "code": "/min"},
        )
        for hour in range(1, 23)
    ]
    bundle = {"resourceType": "Bundle", "type": "collection", "entry": [resource("Patient", id="1"), *values]}
    patient = patient_from_bundle(bundle)
    (measured,) = {event["code"] for event in patient["events"] if event.get("numeric_value") is not None}
    spec = TripletSpec((("heart rate", (measured,)),), window_start="first_event")
    extractor = ehrseq.HyMaTEFeatureExtractor.fit(build_triplets(events_of([patient]), spec))
    model = ehrseq.HyMaTEForPreTraining(
        ehrseq.HyMaTEConfig(num_variables=1, num_static=0, hidden_size=8, num_mamba_layers=0, num_attention_heads=2)
    )
    forecast = pipeline("ehr-forecast", model=model, feature_extractor=extractor, device="cpu")
    (entry,) = forecast(bundle)["values"]
    assert entry["last_value"] == 92.0
    assert entry["reason"] == "no_calibration"
    assert forecast(patient) == forecast(bundle)


BAD_CALLS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a horizon of one's own": (PATIENTS[0], {"horizon": "30d"}, r"Unknown argument\(s\) \['horizon'\].*model of stays"),
    "outcomes": (PATIENTS[0], {"outcomes": "death"}, "Unknown argument"),
    "no batch size": (PATIENTS[0], {"batch_size": 0}, "batch_size got 0"),
    "no time": (PATIENTS[0], {"prediction_time": "soon"}, "prediction_time got 'soon'"),
    "a time before the stay": (PATIENTS[0], {"prediction_time": "2100-01-01"}, "no window begins"),
    "nothing measured": ({"subject_id": 1, "events": []}, {}, "no stay"),
    "no patient": (5, {}, "a patient must be"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_what_is_refused(forecast: Any, case: str) -> None:
    patient, options, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        forecast(patient, **options)


def test_a_finetuned_checkpoint_is_not_mistaken_for_a_forecaster(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks .*forecast_head.*drawn at random"):
        pipeline("ehr-forecast", model=str(complete_checkpoint("hymate", tmp_path)), device="cpu")


def test_a_checkpoint_without_its_extractor_is_refused(folder: Path, tmp_path: Path) -> None:
    AutoModelForPreTraining.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="feature extractor"):
        pipeline("ehr-forecast", model=str(tmp_path), device="cpu")


def test_without_the_package_the_folder_forecasts_the_same(
    scored_without_package: dict[str, dict[str, Any]], forecast: Any
) -> None:
    bare = scored_without_package["stay_forecast"]
    assert bare["forbidden"] == []
    assert all(module.startswith("transformers_modules.") for module in bare["modules"])
    expected = json.loads(json.dumps(forecast(STAYS)))
    for answers in (bare["answers"], bare["again"]):
        for answer, own in zip(answers, expected, strict=True):
            for entry, other in zip(answer["values"], own["values"], strict=True):
                assert entry == {name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                                 for name, value in other.items()}  # fmt: skip

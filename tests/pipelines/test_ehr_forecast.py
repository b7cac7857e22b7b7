"""`pipeline("ehr-forecast")`: what it answers, that company changes nothing, and what it refuses."""

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForPreTraining, AutoTokenizer, pipeline

import ehrseq
from tests.checkpoints.complete import complete_checkpoint
from tests.checkpoints.forecast import mortal_patient
from tests.checkpoints.patients import LAB, make_table
from tests.pipelines import conftest

PATIENTS = [patient for patient in map(mortal_patient, range(1, 6)) if patient["subject_id"] % 3]
DEAD = mortal_patient(3)


@pytest.fixture
def folder(forecaster: Path) -> Path:
    return forecaster


@pytest.fixture(scope="session")
def forecast(forecaster: Path) -> Any:
    return pipeline("ehr-forecast", model=str(forecaster), device="cpu", n=6)


def test_the_answer_of_one_patient(forecast: Any) -> None:
    answer = forecast(PATIENTS[0], horizon="60d")
    assert list(answer) == ["outcomes", "next"]
    assert [entry["outcome"] for entry in answer["outcomes"]] == ["death", "any_admission"]
    for entry in answer["outcomes"]:
        assert list(entry) == ["outcome", "probability", "standard_error", "horizon"]
        assert 0 <= entry["probability"] <= 1
        assert entry["standard_error"] > 0
        assert entry["horizon"] == "60d"
    end = PATIENTS[0]["events"][-1]["time"]
    shares = [entry["probability"] for entry in answer["next"]]
    assert shares == sorted(shares, reverse=True)
    assert 1 <= len(shares) <= 10
    for entry in answer["next"]:
        assert list(entry) == ["code", "probability", "time"]
        assert end <= datetime.fromisoformat(entry["time"]) <= end + timedelta(days=60)
        assert (entry["probability"] * 6) == pytest.approx(round(entry["probability"] * 6))


def test_next_is_read_off_the_trajectories(forecast: Any) -> None:
    """Share and median time by hand."""
    answer = forecast(PATIENTS[1], horizon="90d", trajectories=True)
    firsts: dict[str, list[datetime]] = {}
    assert len(answer["trajectories"]) == 6
    for events in answer["trajectories"]:
        assert [event["time"] for event in events] == sorted(event["time"] for event in events)
        seen = {}
        for event in events:
            seen.setdefault(event["code"], datetime.fromisoformat(event["time"]))
        for code, time in seen.items():
            firsts.setdefault(code, []).append(time)
    for entry in answer["next"]:
        times = np.array(firsts[entry["code"]], "datetime64[us]").astype(np.int64)
        assert entry["probability"] == len(times) / 6
        middle = datetime(1970, 1, 1) + timedelta(microseconds=float(np.median(times)))
        assert abs(datetime.fromisoformat(entry["time"]) - middle) <= timedelta(seconds=1)


def test_a_value_is_told_by_its_bin(forecast: Any, folder: Path) -> None:
    edges = next(iter(AutoTokenizer.from_pretrained(folder).vocabulary.value_bins[LAB].values()))
    answers = forecast(PATIENTS, horizon="365d", trajectories=True)
    labs = [event for each in answers for path in each["trajectories"] for event in path if event["code"] == LAB]
    assert labs
    bounds = [None, *edges, None]
    assert {(event["low"], event["high"]) for event in labs} <= set(pairwise(bounds))
    assert {event["unit"] for event in labs} == {"mg/dL"}


@pytest.mark.parametrize("estimator", ["reach", "scope", "monte_carlo"])
def test_many_patients_are_single_ones(forecast: Any, estimator: str) -> None:
    settings = {"horizon": "30d", "estimator": estimator, "trajectories": True, "grid": ["7d", "14d"]}
    alone = [forecast(patient, **settings) for patient in PATIENTS]
    assert json.dumps(forecast(PATIENTS, **settings)) == json.dumps(alone)
    assert json.dumps(forecast(PATIENTS, batch_size=2, **settings)) == json.dumps(alone)
    assert json.dumps(list(forecast((each for each in PATIENTS), batch_size=3, **settings))) == json.dumps(alone)


def test_a_generator_is_read_as_it_is_asked_for(forecast: Any) -> None:
    read: list[int] = []

    def patients() -> Iterator[dict[str, Any]]:
        for patient in PATIENTS:
            read.append(patient["subject_id"])
            yield patient

    answers = forecast(patients(), batch_size=1)
    assert read == []
    next(answers)
    assert read == [PATIENTS[0]["subject_id"]]


def test_a_seed_makes_another_future(forecast: Any) -> None:
    first, again, other = (forecast(PATIENTS[0], seed=seed, trajectories=True) for seed in (0, 0, 1))
    assert first == again
    assert first["trajectories"] != other["trajectories"]


def test_a_table_is_a_patient(forecast: Any) -> None:
    table = make_table([PATIENTS[0]])
    assert forecast(table) == forecast(PATIENTS[0])
    assert forecast(table.to_arrow()) == forecast(PATIENTS[0])
    assert forecast([table, table]) == [forecast(PATIENTS[0])] * 2


def test_the_end_of_the_record_is_the_prediction_time(forecast: Any) -> None:
    end = PATIENTS[0]["events"][-1]["time"]
    assert forecast(PATIENTS[0], prediction_time=end) == forecast(PATIENTS[0])
    later = end + timedelta(days=3)
    assert forecast(PATIENTS[0], prediction_time=later) == forecast({**PATIENTS[0], "prediction_time": later})
    assert forecast(PATIENTS[0], prediction_time=later) != forecast(PATIENTS[0])


def test_the_grid_rises_to_the_probability(forecast: Any) -> None:
    entries = forecast(PATIENTS[0], horizon="30d", grid=3)["outcomes"]
    for entry in entries:
        assert [point["days"] for point in entry["incidence"]] == [10.0, 20.0, 30.0]
        values = [point["probability"] for point in entry["incidence"]]
        assert values == sorted(values)
        assert values[-1] == entry["probability"]


def test_a_wanted_error_is_kept(forecast: Any) -> None:
    asked = {"any_admission": "any_admission"}
    few = forecast(PATIENTS[0], outcomes=asked, n=4, estimator="monte_carlo", horizon="200d")
    many = forecast(PATIENTS[0], outcomes=asked, n=4, estimator="monte_carlo", horizon="200d", standard_error=0.06)
    assert few["outcomes"][0]["standard_error"] > 0.06 >= many["outcomes"][0]["standard_error"]
    assert many["next"] == few["next"]


def test_until_ends_the_future(forecast: Any) -> None:
    settings = {"horizon": "365d", "trajectories": True, "outcomes": "any_admission"}
    whole = forecast(PATIENTS[1], **settings)["trajectories"]
    ended = forecast(PATIENTS[1], until="VISIT_START//*", **settings)["trajectories"]
    for events, cut in zip(whole, ended, strict=True):
        starts = [place for place, event in enumerate(events) if event["code"].startswith("VISIT_START")]
        assert cut == (events[: starts[0] + 1] if starts else events)


def test_the_dead_have_no_future(forecast: Any, caplog: pytest.LogCaptureFixture) -> None:
    answers = forecast([PATIENTS[0], DEAD], trajectories=True)
    assert answers[1] == {
        "outcomes": [
            {"outcome": name, "probability": None, "standard_error": None, "horizon": "30d"}
            for name in ("death", "any_admission")
        ],
        "next": [],
        "trajectories": [],
        "reason": "died_before_prediction",
    }
    assert answers[0] == forecast(PATIENTS[0], trajectories=True)
    before = DEAD["events"][-1]["time"] - timedelta(hours=1)
    assert "reason" not in forecast(DEAD, prediction_time=before)


def test_before_the_first_event_nothing_is_known(forecast: Any) -> None:
    assert forecast(PATIENTS[0], prediction_time="2149-01-01")["reason"] == "nothing_known"


def test_no_patients_no_answers(forecast: Any) -> None:
    assert forecast([]) == []
    assert list(forecast(iter([]))) == []


def test_the_pipeline_s_own_arguments_hold_for_its_calls(folder: Path, forecast: Any) -> None:
    outcomes = {"clinic": "VISIT_START//AMB"}
    fixed = pipeline("ehr-forecast", model=str(folder), device="cpu", n=6, outcomes=outcomes, horizon="2w")
    assert fixed(PATIENTS[0]) == forecast(PATIENTS[0], outcomes=outcomes, horizon="2w")
    assert fixed(PATIENTS[0])["outcomes"][0]["horizon"] == "2w"


def test_a_fhir_bundle(forecast: Any) -> None:
    bundle = {
        "resourceType": "Bundle",
        "type": "collection",
        "entry": [
            {"resource": {"resourceType": "Patient", "id": "p", "birthDate": "1950-05-01"}},
            {
                "resource": {
                    "resourceType": "Encounter",
                    "id": "e",
                    "status": "finished",
                    "class": {"code": "IMP"},
                    "subject": {"reference": "Patient/p"},
                    "period": {"start": "2150-01-01T08:00:00Z", "end": "2150-01-04T08:00:00Z"},
                }
            },
        ],
    }
    assert len(forecast(bundle)["outcomes"]) == 2
    with pytest.raises(ValueError, match="expected a Bundle"):
        forecast({"resourceType": "Patient"})


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"horizon": "0d"}, "horizon got '0d'; expected a whole number and a unit"),
        ({"horizon": "-3d"}, "horizon got '-3d'"),
        ({"horizon": "soon"}, "horizon got 'soon'"),
        ({"horizon": 30}, "horizon got 30"),
        ({"horizon": "4000d"}, "more than ten years"),
        ({"horizon": "99999999999999d"}, "more than ten years|above 0"),
        ({"n": 0}, "^n got 0"),
        ({"n": 2.5}, r"^n got 2\.5"),
        ({"estimator": "guess"}, "estimator got 'guess'"),
        ({"outcomes": {}}, "no outcome is asked for"),
        ({"outcomes": 3}, "outcomes got 3"),
        ({"outcomes": {"mi": "DIAGNOSIS//ICD10CM//I51"}}, "more general 'DIAGNOSIS//ICD10CM//I00-I99'"),
        ({"outcomes": {"x": "VISIT_START//INP"}}, "nearest that it has: .*VISIT_START//IMP"),
        ({"outcomes": {"free": {"not": "any_admission"}}, "grid": ["1d"]}, "no incidence before it"),
        ({"until": "nothing//*"}, "no token for 'nothing"),
        ({"until": {"not": "death"}}, "expected what ends the forecast"),
        ({"grid": ["60d"]}, "beyond the horizon"),
        ({"grid": 0}, "grid got 0"),
        ({"grid": "7d"}, "grid got '7d'"),
        ({"standard_error": 0.7}, "standard_error got 0.7"),
        ({"batch_size": 0}, "batch_size got 0"),
        ({"max_length": 2}, "max_length got 2"),
        ({"num": 3}, r"Unknown argument\(s\) \['num'\]"),
        ({"alpha": 0.1}, r"Unknown argument\(s\) \['alpha'\]"),
        ({"prediction_time": "later"}, "prediction_time got 'later'"),
    ],
)
def test_what_is_refused(forecast: Any, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        forecast(PATIENTS[0], **settings)


@pytest.mark.parametrize(
    ("patient", "why"),
    [
        ("somebody", "reads patients, not text"),
        (None, "a patient must be"),
        ({"subject_id": 1, "events": []}, "without events"),
        ({"events": [{"code": "x"}]}, "has no 'time'"),
    ],
)
def test_what_is_no_patient(forecast: Any, patient: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        forecast(patient)


def test_a_refusal_comes_before_a_generator_is_read(forecast: Any) -> None:
    with pytest.raises(ValueError, match=r"^n got 0"):
        forecast((each for each in PATIENTS), n=0)


def test_a_short_horizon_without_a_time_head_is_told(forecast: Any, caplog: pytest.LogCaptureFixture) -> None:
    ehr_logger = "ehrseq.pipelines.ehr_forecast"
    with caplog.at_level("WARNING", logger=ehr_logger):
        _propagating(ehr_logger, lambda: forecast(PATIENTS[0], horizon="12h"))
    assert "no time within visits" in caplog.text


def test_a_classifier_has_no_forecasting_head(tmp_path: Path) -> None:
    classifier = complete_checkpoint("ehrmamba", tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"lacks \['lm_head.weight'\].*finetuned on outcomes"):
        pipeline("ehr-forecast", model=str(classifier), device="cpu")


def test_another_family_has_none(tmp_path: Path) -> None:
    classifier = complete_checkpoint("cehrbert", tmp_path / "cehrbert")
    with pytest.raises(ValueError, match="has no forecasting head"):
        pipeline("ehr-forecast", model=str(classifier), device="cpu")


def test_a_tokenizer_of_another_model(folder: Path, tmp_path: Path) -> None:
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

    model = AutoModelForPreTraining.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="it is another model's"):
        pipeline("ehr-forecast", model=model, tokenizer=EhrTokenizer.train(make_table(PATIENTS[:1])), device="cpu")
    model.config.token_type_runs = [[0, 0], [1, 5]]
    with pytest.raises(ValueError, match="of other kinds"):
        pipeline("ehr-forecast", model=model, tokenizer=tokenizer, device="cpu")
    with pytest.raises(ValueError, match="no tokenizer"):
        ehrseq.EhrForecastPipeline(model=model, tokenizer=None)


def test_packed_and_padded_records_are_refused(folder: Path) -> None:
    model = AutoModelForPreTraining.from_pretrained(folder)
    record = AutoTokenizer.from_pretrained(folder).forecast_prompt(PATIENTS[0])
    asked = AutoTokenizer.from_pretrained(folder).forecast_question("30d")
    settings = {"horizon_days": 30.0, "outcomes": asked.outcomes, "num": 1}

    def drawn(**channels: Any) -> Any:
        return next(model.forecast([record._replace(inputs={**record.inputs, **channels})], **settings))

    assert drawn().estimates
    ones = np.ones_like(record.inputs["input_ids"])
    for channels, why in (
        ({"segment_ids": ones}, "packed row"),
        ({"attention_mask": 0 * ones}, "is padded"),
        ({"times": np.zeros(3)}, "expected one record"),
        ({"input_ids": np.stack([ones, ones])}, "expected one record"),
    ):
        with pytest.raises(ValueError, match=why):
            drawn(**channels)
    with pytest.raises(ValueError, match="elapsed_days got -1"):
        next(model.forecast([record._replace(elapsed_days=-1)], **settings))
    with pytest.raises(ValueError, match="training mode"):
        model.train().forecast([record], **settings)


def test_the_model_itself_gives_the_same_answer(folder: Path, forecast: Any) -> None:
    """`model.forecast` is what the pipeline asks."""
    model, tokenizer = AutoModelForPreTraining.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.forecast_question("30d")
    with torch.inference_mode():
        (given,) = model.forecast(
            [tokenizer.forecast_prompt(PATIENTS[0], None, 64)],
            horizon_days=30.0,
            outcomes=asked.outcomes,
            death_ids=asked.death_ids,
            num=6,
        )
    expected = forecast(PATIENTS[0])["outcomes"]
    assert [estimate.probability for estimate in given.estimates] == [entry["probability"] for entry in expected]


def _propagating(name: str, call: Any) -> Any:
    """Call with the library's log handed on to where caplog listens."""
    import logging

    loggers = [logging.getLogger(part) for part in ("ehrseq", name, "transformers")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.propagate = True
    try:
        return call()
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.propagate = propagate


def test_polars_frames_are_no_lists(forecast: Any) -> None:
    """A table of several patients is refused, not read as one."""
    with pytest.raises(ValueError, match="one subject"):
        forecast(pl.concat([make_table([PATIENTS[0]]), make_table([PATIENTS[1]])]))


def test_without_the_package_the_folder_forecasts_the_same(
    scored_without_package: dict[str, dict[str, Any]], forecast: Any
) -> None:
    bare = scored_without_package["forecast"]
    patients = json.loads(json.dumps(conftest.PATIENTS, default=lambda time: time.isoformat()))
    for bare_answer, answer in zip(
        bare["answers"], json.loads(json.dumps(forecast(patients, n=3, horizon="60d", trajectories=True))), strict=True
    ):
        # Without the package torch alone adds up what the kernels add up: the same draws, other last digits.
        assert bare_answer["trajectories"] == answer["trajectories"]
        for bare_outcome, outcome in zip(bare_answer["outcomes"], answer["outcomes"], strict=True):
            assert bare_outcome.keys() == outcome.keys()
            for name in ("probability", "standard_error"):
                assert bare_outcome.pop(name) == pytest.approx(outcome.pop(name), rel=1e-5)
            assert bare_outcome == outcome
    assert bare["dead"]["reason"] == "died_before_prediction"
    assert bare["forbidden"] == []
    assert all(module.startswith("transformers_modules.") for module in bare["modules"])
    assert "pip install ehrseq" in bare["refusals"]["bundle"]
    assert "VISIT_START//IMP" in bare["refusals"]["outcome"]
    saved = {file.name for file in Path(bare["saved"]).glob("*.py")}
    assert {"ehr_forecast.py", "ehr_risk.py", "stay_forecasts.py"} <= saved

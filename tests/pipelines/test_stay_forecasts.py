"""What a stay's next values are, against a computation by hand; what cannot be told says why."""

import copy
import json
from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import ehrseq
from ehrseq.pipelines.stay_forecasts import VALUE_REASONS, StayForecaster
from tests.checkpoints.forecaster import Forecaster, make_forecaster
from tests.checkpoints.stays import CODES, make_stay

LACTATE, RATE, URINE, NEVER = range(4)


@pytest.fixture(scope="module")
def made() -> Forecaster:
    return make_forecaster()


@pytest.fixture(scope="module")
def forecaster(made: Forecaster) -> StayForecaster:
    return StayForecaster(made.model, made.extractor)


def ask(forecaster: StayForecaster, patient: Any, **options: Any) -> dict[str, Any]:
    row = forecaster.rows(patient, **options)
    stay = row.pop("stay")
    with torch.no_grad():
        answer = forecaster.answer(forecaster.model(**row).predictions, stay)
    json.dumps(answer)
    return answer


def long_stay() -> dict[str, Any]:
    """A stay of more than twelve hours that holds all three variables."""
    for number in range(1000, 1100):
        stay = make_stay(number)
        times = [event["time"] for event in stay["events"] if event["time"] is not None]
        if times[-1] - times[0] > timedelta(hours=13) and len({event["code"] for event in stay["events"]}) == 4:
            return stay
    raise AssertionError


STAY = long_stay()


def without(code: str) -> dict[str, Any]:
    return {**STAY, "events": [event for event in STAY["events"] if event["code"] != code]}


def test_values_and_intervals_by_hand(forecaster: StayForecaster, made: Forecaster) -> None:
    answer = ask(forecaster, STAY)
    assert answer["outcomes"] == []
    with torch.no_grad():
        scores = made.model(**made.extractor([STAY], return_tensors="pt")).predictions[0].tolist()
    widths = made.model.config.forecast_calibration["half_widths"]["0.1"]["measured"][0]
    extractor = made.extractor
    for variable, code in enumerate(CODES):
        entry = answer["values"][variable]
        low, high = extractor.value_lower[variable], extractor.value_upper[variable]
        value = scores[variable] * extractor.value_deviations[variable] + extractor.value_means[variable]
        value = min(max(value, low), high)
        assert entry["value"] == pytest.approx(value, rel=1e-5)
        assert entry["low"] == pytest.approx(max(low, value - widths[variable]), rel=1e-4)
        assert entry["high"] == pytest.approx(min(high, value + widths[variable]), rel=1e-4)
        assert entry["low"] <= entry["value"] <= entry["high"]
        last = [event for event in STAY["events"] if event["code"] == code][-1]
        assert entry["last_value"] == pytest.approx(last["numeric_value"])
        assert entry["last_time"] == last["time"].isoformat()
        assert entry["horizon"] == "2h"
        assert "reason" not in entry
    assert [entry["variable"] for entry in answer["values"]] == ["lactate", "heart rate", "urine", "never"]
    assert [entry["unit"] for entry in answer["values"]] == ["mmol/L", "bpm", None, None]


def test_a_variable_that_was_never_learnt_is_named_and_not_guessed(forecaster: StayForecaster) -> None:
    entry = ask(forecaster, STAY)["values"][NEVER]
    assert (entry["value"], entry["low"], entry["high"], entry["reason"]) == (None, None, None, "never_learnt")


def test_a_variable_that_is_new_to_the_stay_has_the_interval_of_new_ones(
    forecaster: StayForecaster, made: Forecaster
) -> None:
    entry = ask(forecaster, without(CODES[URINE]))["values"][URINE]
    assert (entry["last_value"], entry["last_time"]) == (None, None)
    assert entry["value"] is not None
    widths = made.model.config.forecast_calibration["half_widths"]["0.1"]["new"][0]
    if widths[URINE] is None:
        assert (entry["low"], entry["high"], entry["reason"]) == (None, None, "too_few")
    else:
        assert entry["high"] - entry["value"] == pytest.approx(widths[URINE], rel=1e-4)


def test_too_few_tuning_stays_leave_a_value_without_interval(made: Forecaster) -> None:
    model = copy.deepcopy(made.model)
    model.config.forecast_calibration["half_widths"]["0.1"]["measured"][0][RATE] = None
    entry = ask(StayForecaster(model, made.extractor), STAY)["values"][RATE]
    assert entry["value"] is not None
    assert (entry["low"], entry["high"], entry["reason"]) == (None, None, "too_few")


def test_smaller_alphas_have_wider_intervals(made: Forecaster) -> None:
    widths = []
    for alpha in (0.5, 0.2, 0.1):
        entry = ask(StayForecaster(made.model, made.extractor, alpha=alpha), STAY)["values"][RATE]
        widths.append(entry["high"] - entry["low"])
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_a_checkpoint_without_calibration_says_so(made: Forecaster, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("ehrseq.pipelines.stay_forecasts.logger.warning", said.append)
    model = copy.deepcopy(made.model)
    model.config.forecast_calibration = None
    forecaster = StayForecaster(model, made.extractor)
    assert len(said) == 1
    assert "have no interval" in said[0]
    answer = ask(forecaster, STAY)["values"]
    assert answer[RATE]["value"] == ask(StayForecaster(made.model, made.extractor), STAY)["values"][RATE]["value"]
    assert [entry["reason"] for entry in answer] == ["no_calibration"] * 3 + ["never_learnt"]
    assert {entry["horizon"] for entry in answer} == {None}


def test_two_windows_have_names_and_values_of_their_own() -> None:
    made = make_forecaster(horizons=(90.0, 360.0), stays=40)
    forecaster = StayForecaster(made.model, made.extractor)
    answer = ask(forecaster, STAY)["values"]
    assert [entry["horizon"] for entry in answer] == ["90min"] * 4 + ["90min-6h"] * 4
    assert answer[0]["value"] != answer[4]["value"]
    made.model.config.forecast_calibration = None
    assert StayForecaster(made.model, made.extractor).windows == ["window 1", "window 2"]


def test_nothing_after_the_prediction_time_is_read(forecaster: StayForecaster) -> None:
    cut = STAY["events"][-2]["time"]
    known = {**STAY, "events": STAY["events"][:-1]}
    expected = ask(forecaster, known)
    assert ask(forecaster, STAY, prediction_time=cut) == expected
    assert ask(forecaster, {**STAY, "prediction_time": cut}) == expected
    assert ask(forecaster, STAY) != expected


def test_a_window_that_has_passed_has_no_value() -> None:
    made = make_forecaster(horizons=(120.0, 480.0), stays=40)
    forecaster = StayForecaster(made.model, made.extractor)
    end = STAY["events"][-1]["time"]
    in_time = ask(forecaster, STAY, prediction_time=end + timedelta(minutes=120))["values"]
    assert all(entry["value"] is not None for entry in in_time if entry["variable"] != "never")
    later = ask(forecaster, STAY, prediction_time=end + timedelta(minutes=121))["values"]
    assert [entry.get("reason") for entry in later[:4]] == ["window_over"] * 4
    assert all(entry["value"] is None and entry["low"] is None for entry in later[:4])
    assert [entry["value"] for entry in later[4:]] == [entry["value"] for entry in in_time[4:]]
    assert later[RATE]["last_value"] == in_time[RATE]["last_value"]


def test_a_stay_that_is_younger_than_those_of_training_has_no_interval(forecaster: StayForecaster) -> None:
    young = {**STAY, "events": STAY["events"][:4]}
    answer = ask(forecaster, young)["values"]
    assert [entry["reason"] for entry in answer[:3]] == ["too_early"] * 3
    assert all(entry["value"] is not None and entry["low"] is None for entry in answer[:3])


def test_what_a_short_row_no_longer_holds_is_new_to_the_model_and_still_the_last_value(
    forecaster: StayForecaster, made: Forecaster
) -> None:
    """The half width is that of what the model reads; the last value is the stay's."""
    last = STAY["events"][-1]["code"]
    other = next(k for k, code in enumerate(CODES) if code != last)
    entry = ask(forecaster, STAY, max_length=1)["values"][other]
    assert entry["last_value"] is not None
    width = made.model.config.forecast_calibration["half_widths"]["0.1"]["new"][0][other]
    assert (entry["low"] is None) == (width is None)


def test_forms_of_a_stay_give_the_same(forecaster: StayForecaster) -> None:
    expected = ask(forecaster, STAY)
    rows = [{"subject_id": STAY["subject_id"], **event} for event in STAY["events"]]
    assert ask(forecaster, pl.DataFrame(rows, schema_overrides={"numeric_value": pl.Float64})) == expected
    assert ask(forecaster, {**STAY, "events": STAY["events"][::-1]}) == expected
    measured = [event for event in STAY["events"] if event["time"] is not None]
    start = measured[0]["time"]
    triplets = {
        "times": [(event["time"] - start) / timedelta(minutes=1) for event in measured],
        "variables": [event["code"] for event in measured],
        "values": [float(np.float32(event["numeric_value"])) for event in measured],
        "static": {"sex=GENDER//F": float(STAY["events"][0]["code"] == "GENDER//F"),
                   "sex=GENDER//M": float(STAY["events"][0]["code"] == "GENDER//M")},
    }  # fmt: skip
    answer = ask(forecaster, triplets)
    for entry, dated in zip(answer["values"], expected["values"], strict=True):
        minute = None if dated["last_time"] is None else entry["last_time"]
        assert {**entry, "last_time": dated["last_time"]} == dated
        assert minute is None or 0 <= minute <= triplets["times"][-1]


@pytest.mark.parametrize(
    ("death", "reason"),
    [({"time": None, "code": "MEDS_DEATH"}, "death_time_unknown"), ("at the end", "died_before_prediction")],
)
def test_the_dead_have_no_values(forecaster: StayForecaster, death: Any, reason: str) -> None:
    event = {"time": STAY["events"][-1]["time"], "code": "MEDS_DEATH"} if isinstance(death, str) else death
    answer = ask(forecaster, {**STAY, "events": [*STAY["events"], event]})
    assert answer == {"outcomes": [], "values": [], "reason": reason}


def test_a_unit_of_the_patient_s_own(forecaster: StayForecaster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known is that of training; another one is said once, and where training had none, the patient's is told."""
    said: list[str] = []
    monkeypatch.setattr("ehrseq.pipelines.stay_forecasts.logger.warning", said.append)
    units = {CODES[LACTATE]: "mg/dL", CODES[RATE]: "bpm", CODES[URINE]: "mL"}
    events = [{**event, "unit": units.get(event["code"])} for event in STAY["events"]]
    for _ in range(2):
        answer = ask(forecaster, {**STAY, "events": events})["values"]
        assert [entry["unit"] for entry in answer] == ["mmol/L", "bpm", "mL", None]
    assert len(said) == 1
    assert "lactate is measured in 'mg/dL', and the model was trained in 'mmol/L'" in said[0]


def test_what_is_left_out_is_told(forecaster: StayForecaster, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("ehrseq.tokenization.feature_extraction_hymate.logger.warning", said.append)
    strange = {"time": STAY["events"][-1]["time"], "code": "LAB//B//strange", "numeric_value": 1.0}
    ask(forecaster, {**STAY, "events": [*STAY["events"], strange]})
    assert len(said) == 1
    assert "LAB//B//strange (1)" in said[0]


BAD_STAYS: dict[str, tuple[Any, str]] = {
    "nothing measured": ({"subject_id": 7, "events": STAY["events"][:1]}, "without timed events has no stay"),
    "no known variable": (
        {"subject_id": 7, "events": [{**STAY["events"][1], "code": "LAB//B//x"}]},
        "stay of subject 7 holds no triplet of a known variable",
    ),
    "no events": ({"subject_id": 7, "events": []}, "without timed events has no stay"),
    "no patient": ({"id": 7}, "a patient must be"),
    "a stay without values": ({"times": [0.0], "variables": [0]}, "expected times, variables, values"),
    "a name": ("stay", "a patient must be"),
}


@pytest.mark.parametrize("case", BAD_STAYS)
def test_a_stay_without_anything_to_read_is_refused(forecaster: StayForecaster, case: str) -> None:
    patient, message = BAD_STAYS[case]
    with pytest.raises(ValueError, match=message):
        forecaster.rows(patient)


@pytest.mark.parametrize("max_length", [0, -1, 1.5, True])
def test_what_is_no_length_is_refused(forecaster: StayForecaster, max_length: Any) -> None:
    with pytest.raises(ValueError, match="max_length got"):
        forecaster.rows(STAY, max_length=max_length)


def test_models_that_do_not_forecast_are_refused(made: Forecaster, hymate: Any, tmp_path: Any) -> None:
    risk = ehrseq.HyMaTEForSequenceClassification(made.model.config)
    with pytest.raises(ValueError, match="HyMaTEForSequenceClassification, which has no forecasting head"):
        StayForecaster(risk, made.extractor)
    finetuned = ehrseq.HyMaTEForPreTraining.from_pretrained(hymate)
    extractor = ehrseq.HyMaTEFeatureExtractor.from_pretrained(hymate)
    with pytest.raises(ValueError, match=r"lacks .*forecast_head.*drawn at random"):
        StayForecaster(finetuned, extractor)
    with pytest.raises(ValueError, match=r"forecasts 4 variables .* reads 3"):
        StayForecaster(made.model, extractor)
    content = made.extractor.to_dict()
    content["triplets"] = copy.deepcopy(content["triplets"])
    content["triplets"]["variables"][0][0] = "renamed"
    with pytest.raises(ValueError, match="belong apart"):
        StayForecaster(made.model, ehrseq.HyMaTEFeatureExtractor(**content))
    with pytest.raises(ValueError, match="reads no stays"):
        StayForecaster(made.model, object())
    with pytest.raises(ValueError, match=r"alpha got 0\.05"):
        StayForecaster(made.model, made.extractor, alpha=0.05)


def test_damaged_weights_are_no_forecast(forecaster: StayForecaster) -> None:
    stay = forecaster.rows(STAY)["stay"]
    with pytest.raises(ValueError, match="not finite"):
        forecaster.answer(torch.full((4,), float("nan")), stay)


def test_every_reason_is_explained() -> None:
    assert set(VALUE_REASONS) == {"window_over", "never_learnt", "no_calibration", "too_early", "too_few"}

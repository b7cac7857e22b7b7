"""The checkpoint that comes with the package."""

import json

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import ehrseq
from ehrseq.hub.families import STARTER, STARTER_FORECAST
from ehrseq.hub.starter import FILES, FORECAST_FILES, FORECAST_NOTICE, NOTICE, pack_forecaster, pack_starter
from ehrseq.tasks import list_tasks
from ehrseq.tokenization.ehr_codes import INPATIENT_CLASSES
from ehrseq.tokenization.ehr_outcomes import death_ids, visit_start_ids

PATIENT = {
    "subject_id": 1,
    "events": [
        {"time": None, "code": "GENDER//F"},
        {"time": "1950-03-01", "code": "MEDS_BIRTH"},
        {"time": "2020-03-01T08:00", "code": "VISIT_START//IMP", "visit_id": "a"},
        {"time": "2020-03-02T08:00", "code": "DIAGNOSIS//ICD10CM//I50.9", "visit_id": "a"},
        {"time": "2020-03-05T08:00", "code": "VISIT_END//home", "visit_id": "a"},
    ],
}


def test_it_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in STARTER.iterdir()}
    assert set(files) == set(FILES)
    assert sum(files.values()) < 1.5e6


def test_without_a_model_the_pipeline_answers_and_says_each_time_that_it_means_nothing(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("ehrseq.pipelines.ehr_risk.logger.warning", said.append)
    risk = pipeline("ehr-risk")
    for calls in (1, 2):
        answers = risk(PATIENT)
        assert said.count(NOTICE) == calls
    assert {answer["task"] for answer in answers} == set(list_tasks(paper=True))
    assert all(answer["score"] is None or 0 < answer["score"] < 1 for answer in answers)
    assert any(answer["score"] is not None for answer in answers)


def test_the_notice_stays_with_what_is_saved(tmp_path) -> None:
    AutoModelForSequenceClassification.from_pretrained(STARTER).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).notice == NOTICE


def test_trust_makes_no_difference() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(STARTER, trust_remote_code=True)
    assert type(model) is ehrseq.EhrMambaForSequenceClassification
    assert type(AutoTokenizer.from_pretrained(STARTER, trust_remote_code=True)) is ehrseq.EhrTokenizer


def test_packing_takes_a_trained_checkpoint(tmp_path) -> None:
    folder = pack_starter(STARTER, tmp_path / "packed")
    for name in FILES:
        assert (folder / name).read_bytes() == (STARTER / name).read_bytes()
    (folder / "thresholds.json").unlink()
    with pytest.raises(ValueError, match=r"lacks \['thresholds.json'\]"):
        pack_starter(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_its_card_names_the_patients() -> None:
    card = (STARTER / "README.md").read_text(encoding="utf-8")
    assert "simulated" in card
    assert 'model="' not in card  # it needs no name, and no path of who made it
    assert json.loads((STARTER / "config.json").read_text(encoding="utf-8"))["notice"] == NOTICE


# -- the one that forecasts --------------------------------------------------------------------------------------------


def test_the_forecaster_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in STARTER_FORECAST.iterdir()}
    assert set(files) == set(FORECAST_FILES)
    assert sum(files.values()) < 1.6e6
    card = (STARTER_FORECAST / "README.md").read_text(encoding="utf-8")
    assert FORECAST_NOTICE in card
    assert "/work" not in card


def test_the_forecaster_has_a_time_head_and_words_for_what_is_asked_most(tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(STARTER_FORECAST)
    assert type(model) is ehrseq.EhrMambaForCausalLM
    assert model.time_head is not None
    assert model.config.notice == FORECAST_NOTICE
    vocabulary = AutoTokenizer.from_pretrained(STARTER_FORECAST).vocabulary
    assert vocabulary.token_ids["MEDS_DEATH"] in death_ids(vocabulary)
    assert visit_start_ids(vocabulary, INPATIENT_CLASSES)


def test_packing_takes_a_pretrained_model_with_a_time_head(tmp_path) -> None:
    folder = pack_forecaster(STARTER_FORECAST, tmp_path / "packed")
    for name in FORECAST_FILES:
        assert (folder / name).read_bytes() == (STARTER_FORECAST / name).read_bytes()
    with pytest.raises(ValueError, match=r"holds \['EhrMambaForSequenceClassification'\] with time_edges=None"):
        pack_forecaster(STARTER, tmp_path / "again")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"lacks \['tokenizer.json'\]"):
        pack_forecaster(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()

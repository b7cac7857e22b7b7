"""Which tasks can be forecast, what of, how far, and why not."""

from datetime import timedelta
from pathlib import Path

import pytest

from ehrseq.forecasting.task_forecast import TaskForecast
from ehrseq.forecasting.task_outcomes import task_outcome
from ehrseq.tasks.registry import list_tasks, load_task
from ehrseq.tasks.schema import Task
from ehrseq.tokenization.ehr_codes import DEFAULT_CODE_MAP, EVENT_KINDS
from ehrseq.tokenization.ehr_vocabulary import LONG_TERM, MONTHS, SPECIAL_TOKENS, WEEKS, EventVocabulary

POTASSIUM, CREATININE, WEIGHT = "LAB//LOINC//2823-3", "LAB//LOINC//2160-0", "VITAL//LOINC//29463-7"
BINS = {
    POTASSIUM: {"mmol/L": [4.0, 6.0], "mEq/L": [5.0]},
    CREATININE: {"mg/dL": [1.0]},
    WEIGHT: {"kg": [70.0]},
    "LAB//RESULT//50971//mEq/L": {"": [4.0, 6.5]},
}
EVENTS = [
    "MEDS_DEATH",
    "VISIT_END//exp",
    "VISIT_END//home",
    "VISIT_START//IMP",
    "VISIT_START//AMB",
    "ICU_ADMISSION//MICU",
    "ICU_DISCHARGE//MICU",
    "DIAGNOSIS//ICD10CM//I50.9",
    "DIAGNOSIS//ICD9CM//428",
    "DIAGNOSIS//ICD10CM//I10",
    "DIAGNOSIS//ICD10CM//E87.1",
    "DIAGNOSIS//ICD10CM//E78.5",
    "DIAGNOSIS//ICD10CM//J45",
    *(f"{POTASSIUM}//mmol/L_{k}" for k in range(3)),
    *(f"{POTASSIUM}//mEq/L_{k}" for k in range(2)),
    *(f"{CREATININE}//mg/dL_{k}" for k in range(2)),
    *(f"{WEIGHT}//kg_{k}" for k in range(2)),
    *(f"LAB//RESULT//50971//mEq/L_{k}" for k in range(3)),
]


def make_vocabulary(tokens: list[str] = EVENTS) -> EventVocabulary:
    ids = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *tokens])}
    return EventVocabulary(ids, BINS, list(EVENT_KINDS), DEFAULT_CODE_MAP)


VOCABULARY = make_vocabulary()
NAMES = list(VOCABULARY.token_ids)
DEATHS = ["MEDS_DEATH", "VISIT_END//exp"]


def tokens_of(forecast: TaskForecast) -> list[str]:
    return [NAMES[number] for number in forecast.outcome.ids]


RETROSPECTIVE = "it is retrospective"
CHANGE = "a change of a value"
LENGTH = "the length of a stay is a time within a visit"

# Task -> days from the prediction time, tokens, until, words of a note; or why it cannot be forecast. With a time head.
DEFINITIONS: dict[str, tuple[float, list[str], list[str], str] | str] = {
    "mortality_30d": (30, DEATHS, [], ""),
    "long_stay_7d": (6, ["[VE]", *DEATHS], [], "last event of its visit"),  # 7 days of the admission, asked a day in
    "readmission_30d": (30, ["VISIT_START//IMP"], [], "is a transfer"),
    "hypertension": (365, ["DIAGNOSIS//ICD10CM//I10"], [], "wherever they are recorded"),
    "fluid_disorder": (365, ["DIAGNOSIS//ICD10CM//E87.1"], [], "wherever they are recorded"),
    "lipid_disorder": (365, ["DIAGNOSIS//ICD10CM//E78.5"], [], "wherever they are recorded"),
    "acute_kidney_injury_48h": CHANGE,
    "bmi_loss_365d_children": CHANGE,
    "weight_loss_180d": CHANGE,
    "heart_failure_365d": (365, ["DIAGNOSIS//ICD10CM//I50.9", "DIAGNOSIS//ICD9CM//428"], [], ""),
    "hospital_mortality_24h": (365, DEATHS, ["[VE]"], "the end of the stay is looked for up to 365 days"),
    "hospital_mortality_48h": (365, DEATHS, ["[VE]"], "the end of the stay is looked for up to 365 days"),
    # At 6.0 or more: the bin above 6 (of those in mEq/L no edge is as high), and of MIMIC's the one above 6.5.
    "hyperkalemia_48h": (
        2,
        [f"{POTASSIUM}//mmol/L_2", "LAB//RESULT//50971//mEq/L_2"],
        [],
        "at least 6 splits the bin from 4 to 6.5; only values above 6.5 count",
    ),
    "icu_readmission_30d": (30, ["ICU_ADMISSION//MICU"], [], "within an hour"),
    "icu_readmission_48h": (2, ["ICU_ADMISSION//MICU"], [], "within an hour"),
    "long_stay_3d_24h": (2, ["[VE]", *DEATHS], [], ""),
    "long_stay_7d_48h": (5, ["[VE]", *DEATHS], [], ""),
    "mortality_30d_paper": RETROSPECTIVE,
    "long_stay_7d_paper": RETROSPECTIVE,
    "readmission_30d_paper": RETROSPECTIVE,
    "hypertension_paper": RETROSPECTIVE,
    "fluid_disorder_paper": RETROSPECTIVE,
    "lipid_disorder_paper": RETROSPECTIVE,
}
OF_STAYS = {"long_stay_7d", "long_stay_3d_24h", "long_stay_7d_48h"}
IN_STAY = {*OF_STAYS, "hyperkalemia_48h"}


def test_every_packaged_task_is_here() -> None:
    assert set(DEFINITIONS) == set(list_tasks(retrospective=None, paper=None))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_what_a_packaged_task_asks(name: str) -> None:
    expected = DEFINITIONS[name]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"The task {name!r} cannot be forecast: .*{expected}"):
            task_outcome(name, VOCABULARY, time_head=True)
        return
    days, tokens, until, words = expected
    forecast = task_outcome(load_task(name), VOCABULARY, time_head=True)
    assert forecast.name == forecast.outcome.name == name
    assert forecast.horizon_days == days
    assert sorted(tokens_of(forecast)) == sorted(tokens)
    assert [NAMES[number] for number in forecast.until_ids] == until
    assert sorted(NAMES[number] for number in forecast.death_ids) == DEATHS
    assert forecast.outcome.complement == (name in OF_STAYS)
    assert forecast.needs_time_head == (name in IN_STAY)
    assert words in "; ".join(forecast.notes)
    assert "labels" in forecast.moments


@pytest.mark.parametrize("name", [name for name, expected in DEFINITIONS.items() if not isinstance(expected, str)])
def test_without_a_time_head(name: str) -> None:
    if name in OF_STAYS:
        with pytest.raises(ValueError, match=f"{name!r} cannot be forecast: {LENGTH}"):
            task_outcome(name, VOCABULARY, time_head=False)
        return
    forecast = task_outcome(name, VOCABULARY, time_head=False)
    assert any("no time within visits" in note for note in forecast.notes) == (name in IN_STAY)


def test_what_is_left_of_a_horizon_is_counted_from_the_question() -> None:
    task = load_task("long_stay_7d_48h")
    assert (task.horizon, task.offset) == (timedelta(days=7), timedelta(days=2))
    assert task_outcome(task, VOCABULARY, time_head=True).horizon_days == 5
    plain = load_task("hyperkalemia_48h")  # 24 hours after the admission, the next 48 hours
    assert plain.offset == timedelta(days=1)
    assert task_outcome(plain, VOCABULARY, time_head=True).horizon_days == 2


def make_task(**changes: object) -> Task:
    data: dict[str, object] = {
        "name": "mine",
        "token": "[MINE]",
        "definition": "one of mine",
        "positive_label": "it happens",
        "prediction": {"anchor": "admission", "offset": "24h"},
        "horizon": "3d",
        "exclude": ["dead", "stay_ended"],
        "outcome": {"event": "death"},
        **changes,
    }
    return Task.from_dict(data)


def test_a_horizon_from_the_admission() -> None:
    assert task_outcome(make_task(horizon_from="anchor"), VOCABULARY, time_head=True).horizon_days == 2
    assert task_outcome(make_task(), VOCABULARY, time_head=True).horizon_days == 3
    late = make_task(horizon_from="anchor", prediction={"anchor": "admission", "offset": "3d"})
    with pytest.raises(ValueError, match="its horizon of 3d from the admission ends before the question"):
        task_outcome(late, VOCABULARY, time_head=True)


def test_a_death_in_intensive_care_comes_before_its_end() -> None:
    task = make_task(prediction={"anchor": "icu_admission", "offset": "24h"}, outcome={"event": "death_in_stay"})
    forecast = task_outcome(task, VOCABULARY, time_head=True)
    ends = ["[VE]", "VISIT_END//exp", "VISIT_END//home", "ICU_DISCHARGE//MICU"]  # whoever goes home has left it, too
    assert [NAMES[number] for number in forecast.until_ids] == ends
    without = make_vocabulary([token for token in EVENTS if "ICU_DISCHARGE" not in token])
    with pytest.raises(ValueError, match="no token of the end of a stay in intensive care"):
        task_outcome(task, without, time_head=True)


def test_deaths_that_no_discharge_tells_come_behind_the_visit() -> None:
    """MEDS_DEATH at a discharge makes a visit of its own: [VE] [REG] [W_0] [VS] MEDS_DEATH."""
    without = make_vocabulary([token for token in EVENTS if token != "VISIT_END//exp"])
    forecast = task_outcome("hospital_mortality_24h", without, time_head=False)
    until = {list(without.token_ids)[number] for number in forecast.until_ids}
    assert until == {*WEEKS[1:], *MONTHS, LONG_TERM, "VISIT_START//IMP", "VISIT_START//AMB"}
    assert any("within a week" in note for note in forecast.notes)


def test_a_first_code_to_the_end_of_the_stay() -> None:
    task = make_task(
        horizon="stay",
        exclude=["dead", "stay_ended", "earlier_code"],
        outcome={"event": "first_code", "codes": ["^DIAGNOSIS//ICD10CM//J45"]},
    )
    forecast = task_outcome(task, VOCABULARY, time_head=False)
    assert [NAMES[number] for number in forecast.until_ids] == ["[VE]"]
    assert tokens_of(forecast) == ["DIAGNOSIS//ICD10CM//J45"]


def value_task(**outcome: object) -> Task:
    return make_task(outcome={"event": "value", **outcome})


def test_a_limit_is_brought_to_the_unit_of_the_bins() -> None:
    # 70 kg are 154.3 pounds: a measure that is doubled asks for half.
    doubled = value_task(values=[{"codes": ["29463-7"], "unit": "kg", "times": 2.0}], any_of=[{"above": 140.0}])
    assert tokens_of(task_outcome(doubled, VOCABULARY, time_head=True)) == [f"{WEIGHT}//kg_1"]


def test_measures_read_each_unit_by_the_first_that_fits() -> None:
    both = value_task(
        values=[{"codes": ["2823-3"], "unit": "mEq/L"}, {"codes": ["2823-3"]}],
        any_of=[{"at_most": 5.0}],
        unmeasured="negative",
    )
    forecast = task_outcome(both, VOCABULARY, time_head=True)
    assert tokens_of(forecast) == [f"{POTASSIUM}//mmol/L_0", f"{POTASSIUM}//mEq/L_0"]
    assert not any("not measured" in note for note in forecast.notes)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (make_task(outcome={"event": "icu_admission"}), "no start of an encounter of the classes"),
        (make_task(outcome={"event": "death"}), "no token of a death"),
        (
            make_task(
                exclude=["dead", "stay_ended", "earlier_code"], outcome={"event": "first_code", "icd10": ["Z99"]}
            ),
            "no token of the vocabulary matches its codes",
        ),
        (value_task(values=[{"codes": ["9999-9"], "unit": "mg/dL"}], any_of=[{"above": 1}]), "no code with value bins"),
        (value_task(values=[{"codes": ["2823-3"], "unit": "mg/dL"}], any_of=[{"above": 1}]), "no code with value bins"),
        (
            value_task(values=[{"codes": ["2160-0"]}], any_of=[{"above": 4}]),
            r"lies wholly above 4: its edges are \[1.0\]",
        ),
    ],
)
def test_what_a_vocabulary_cannot_say(task: Task, message: str) -> None:
    without = make_vocabulary([token for token in EVENTS if "ICU" not in token and token not in DEATHS])
    with pytest.raises(ValueError, match=f"'mine' cannot be forecast: .*{message}"):
        task_outcome(task, without, time_head=True)


def test_what_is_no_task() -> None:
    with pytest.raises(ValueError, match="Unknown task 'mortality'"):
        task_outcome("mortality", VOCABULARY, time_head=True)
    with pytest.raises(ValueError, match="No task file"):
        task_outcome(Path("nowhere.yaml"), VOCABULARY, time_head=True)


# -- ACES --------------------------------------------------------------------------------------------------------------

ACES = """
predicates:
  discharge: {code: {regex: "^VISIT_END//"}}
  admission: {code: {regex: "^VISIT_START//IMP"}}
  death: {code: MEDS_DEATH}
  heart: {code: {any: ["DIAGNOSIS//ICD10CM//I50.9", "DIAGNOSIS//ICD9CM//428"]}}
  potassium: {code: LAB//LOINC//2823-3, value_min: 4.0, value_max: 6.0, value_max_inclusive: true}
  high: {code: LAB//LOINC//2160-0, value_min: 40.0}
  static: {code: MEDS_DEATH, static: true}
  discharge_or_death: {expr: "or(discharge, death)"}
  both: {expr: "and(discharge, death)"}
  nothing: {code: ICU_ADMISION//MICU}
  circle: {expr: "or(circle, death)"}
trigger: admission
windows:
  input: {start: null, end: trigger + 24h, start_inclusive: true, end_inclusive: true, index_timestamp: end}
  gap: {start: trigger, end: start + @gap, start_inclusive: false, end_inclusive: true}
  target: {start: @start, end: @end, start_inclusive: false, end_inclusive: true, label: @label}
"""


def aces(folder: Path, **changes: str) -> Path:
    """The file with other words."""
    text = ACES
    words = {"gap": "24h", "start": "gap.end", "end": "start + 30 days", "label": "death", **changes}
    for key, word in words.items():
        text = text.replace(f"@{key}", word)
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("changes", "days", "tokens", "until", "words"),
    [
        ({}, 30, ["MEDS_DEATH"], [], ""),
        ({"end": "trigger + 3d"}, 2, ["MEDS_DEATH"], [], ""),
        ({"end": "start + 1 day 12 hours"}, 1.5, ["MEDS_DEATH"], [], ""),
        ({"start": "input.end", "label": "heart"}, 30, ["DIAGNOSIS//ICD10CM//I50.9", "DIAGNOSIS//ICD9CM//428"], [], ""),
        ({"gap": "48h"}, 31, ["MEDS_DEATH"], [], "starts 1 day, 0:00:00 after the index time"),
        (
            {"end": "start -> discharge_or_death"},
            365,
            ["MEDS_DEATH"],
            ["[VE]", "VISIT_END//exp", "VISIT_END//home"],
            "discharge_or_death is looked for up to 365 days",
        ),
        ({"label": "admission"}, 30, ["VISIT_START//IMP"], [], ""),
        # Above 4 and at most 6; in mEq/L neither side of 5 is within.
        ({"label": "potassium"}, 30, [f"{POTASSIUM}//mmol/L_1"], [], "splits the bin"),
    ],
)
def test_a_task_of_aces(
    tmp_path: Path, changes: dict[str, str], days: float, tokens: list[str], until: list[str], words: str
) -> None:
    forecast = task_outcome(aces(tmp_path, **changes), VOCABULARY, time_head=True)
    assert forecast.name == forecast.outcome.name == "mine"
    assert forecast.horizon_days == days
    assert sorted(tokens_of(forecast)) == sorted(tokens)
    assert sorted(NAMES[number] for number in forecast.until_ids) == sorted(until)
    assert sorted(NAMES[number] for number in forecast.death_ids) == DEATHS
    assert words in "; ".join(forecast.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end": "null"}, "'target.end' is None; a forecast needs a fixed time"),
        ({"end": "start - 3d"}, "does not end a fixed time after the index time"),
        ({"end": "start + 3 moons"}, "duration '3 moons'"),
        ({"start": "trigger"}, "'target' does not start at the index time"),
        ({"start": "target.start"}, "or in a circle"),
        ({"start": "nowhere.end"}, "'nowhere.end' names no start or end of a window"),
        ({"label": "both"}, "no two things at one time"),
        ({"label": "nothing"}, r"no token of the vocabulary is the predicate 'nothing'.*'ICU_ADMISSION//MICU'"),
        ({"label": "elsewhere"}, "'elsewhere' is not in the file"),
        ({"label": "circle"}, "stands for itself"),
        ({"label": "static"}, "a forecast knows codes and values of them"),
        ({"label": "high"}, "lies wholly above 40"),
        ({"end": "start -> elsewhere"}, "'elsewhere' is not in the file"),
    ],
)
def test_what_of_aces_cannot_be_forecast(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be forecast: .*{message}"):
        task_outcome(aces(tmp_path, **changes), VOCABULARY, time_head=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("index_timestamp: end", "", "0 windows have the key 'index_timestamp'"),
        (", label: @label", "", "0 windows have the key 'label'"),
    ],
)
def test_files_of_aces_without_a_question(
    tmp_path: Path, old: str, new: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.forecasting.test_task_outcomes.ACES", ACES.replace(old, new))
    with pytest.raises(ValueError, match=message):
        task_outcome(aces(tmp_path), VOCABULARY, time_head=True)

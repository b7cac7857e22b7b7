"""Task files: the packaged ones as the design fixes them, and every way in which a file can be wrong."""

import json
import re
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

import ehrseq.tasks
from ehrseq.tasks import Task, list_tasks, load_task

TOKENS = {
    "mortality_30d": "[MOR_1M]",
    "long_stay_7d": "[LOS_1W]",
    "readmission_30d": "[REA_1M]",
    "hypertension": "[C0]",
    "fluid_disorder": "[C1]",
    "lipid_disorder": "[C2]",
}


def test_the_six_tasks_of_the_paper_and_their_tokens():
    assert {name: load_task(name).token for name in list_tasks()} == TOKENS
    assert list_tasks() == list(TOKENS)  # the paper's order


def test_paper_variants_are_marked_and_never_confused_with_the_tasks():
    assert list_tasks(retrospective=True) == [f"{name}_paper" for name in TOKENS]
    assert list_tasks(retrospective=None) == list_tasks() + list_tasks(retrospective=True)
    tasks = [load_task(name) for name in list_tasks(retrospective=None)]
    assert len({task.token for task in tasks}) == 12
    for name in TOKENS:
        assert not load_task(name).retrospective
        assert load_task(f"{name}_paper").retrospective
    for name in ("hypertension_paper", "fluid_disorder_paper", "lipid_disorder_paper"):
        assert "diagnosis" in load_task(name).excluded_input_kinds


@pytest.mark.parametrize(
    ("name", "anchor", "offset", "horizon", "exclude", "competing"),
    [
        ("mortality_30d", "discharge", timedelta(0), timedelta(days=30), {"dead"}, set()),
        ("long_stay_7d", "admission", timedelta(hours=24), timedelta(hours=168), {"dead", "stay_ended"}, {"death"}),
        ("readmission_30d", "discharge", timedelta(0), timedelta(days=30), {"dead"}, {"death"}),
        (
            "hypertension",
            "discharge",
            timedelta(0),
            timedelta(days=365),
            {"dead", "earlier_code"},
            {"death", "code_elsewhere"},
        ),
        (
            "fluid_disorder",
            "discharge",
            timedelta(0),
            timedelta(days=365),
            {"dead", "earlier_code"},
            {"death", "code_elsewhere"},
        ),
        (
            "lipid_disorder",
            "discharge",
            timedelta(0),
            timedelta(days=365),
            {"dead", "earlier_code"},
            {"death", "code_elsewhere"},
        ),
    ],
)
def test_when_and_how_far_each_task_looks(name, anchor, offset, horizon, exclude, competing):
    task = load_task(name)
    assert (task.anchor, task.offset, task.horizon) == (anchor, offset, horizon)
    assert (set(task.exclude), set(task.competing)) == (exclude, competing)


def test_to_config_is_what_a_model_config_keeps():
    config = load_task("mortality_30d").to_config()
    assert list(config) == ["name", "token", "horizon", "definition", "positive_label", "asked"]
    assert config.pop("asked") == {"anchor": "discharge", "offset_hours": 0.0, "exclude": ["dead"], "codes": []}
    assert (config["name"], config["token"], config["horizon"]) == ("mortality_30d", "[MOR_1M]", "30d")
    assert config["positive_label"] == "death within 30 days of discharge"
    assert all(isinstance(value, str) and value for value in config.values())
    for name in list_tasks(retrospective=None):
        asked = load_task(name).to_config()["asked"]
        assert json.loads(json.dumps(asked)) == asked
        assert bool(asked["codes"]) == ("earlier_code" in asked["exclude"])
        for pattern in asked["codes"]:  # Rust's syntax in the files, Python's where a checkpoint asks
            re.compile(pattern)
    assert load_task("long_stay_7d").to_config()["asked"]["offset_hours"] == 24


def test_one_file_a_task_named_after_it():
    folder = Path(ehrseq.tasks.__file__).parent / "definitions"
    assert {path.stem for path in folder.glob("*.yaml")} == set(list_tasks(retrospective=None, paper=None))
    for path in folder.glob("*.yaml"):
        assert Task.from_yaml(path).name == path.stem
        assert load_task(path) == load_task(path.stem)
        assert load_task(str(path)) == load_task(path.stem)


def good() -> dict:
    """A task that every field of which is right, conditions being the kind with most fields."""
    return {
        "name": "gout",
        "token": "[GOUT]",
        "definition": "First diagnosis of gout.",
        "positive_label": "gout",
        "prediction": {"anchor": "discharge", "offset": "0h"},
        "horizon": "1w",
        "exclude": ["dead", "earlier_code"],
        "outcome": {"event": "code_at_admission", "codes": ["^DIAGNOSIS//ICD10CM//M10"]},
        "competing": ["death"],
    }


def test_a_task_of_ones_own(tmp_path):
    (tmp_path / "gout.yaml").write_text(yaml.safe_dump(good()))
    task = load_task(tmp_path / "gout.yaml")
    assert (task.name, task.horizon, task.codes) == ("gout", timedelta(days=7), ("^DIAGNOSIS//ICD10CM//M10",))
    assert task.censoring
    assert not task.retrospective


def _with(**changes) -> dict:
    data = good()
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    return data


DEATH = {"event": "death"}
STAY = {"event": "length_of_stay"}
BAD = [
    ([], "task: the file is \\[\\]; expected a mapping"),
    (None, "the file is None"),
    (_with(horizons="30d"), "unknown key\\(s\\) 'horizons'"),
    (_with(prediction={"anchor": "discharge", "ofset": "1h"}), "unknown key\\(s\\) 'prediction.ofset'"),
    (_with(outcome={**good()["outcome"], "code": []}), "unknown key\\(s\\) 'outcome.code'"),
    (_with(name=None), "key 'name' is missing"),
    (_with(outcome=None), "key 'outcome' is missing"),
    (_with(outcome={"codes": ["x"]}), "key 'outcome.event' is missing"),
    (_with(name="Gout"), "key 'name' is 'Gout'; expected lower-case"),
    (_with(name="../gout"), "key 'name' is '../gout'"),
    (_with(name=3), "key 'name' is 3"),
    (_with(token="GOUT"), "key 'token' is 'GOUT'; expected capitals"),
    (_with(definition="  "), "key 'definition' is '  '; expected a text"),
    (_with(positive_label=True), "key 'positive_label' is True"),
    (_with(prediction="discharge"), "key 'prediction' is 'discharge'; expected a mapping"),
    (_with(prediction={"anchor": "birth"}), "key 'prediction.anchor' is 'birth'; expected one of"),
    (_with(horizon=30), "key 'horizon' is 30; expected a whole number and a unit"),
    (_with(horizon="1.5d"), "key 'horizon' is '1.5d'"),
    (_with(horizon="-1d"), "key 'horizon' is '-1d'"),
    (_with(horizon="0d"), "key 'horizon' is '0d'; expected a duration above 0"),
    (_with(horizon="99999999999d"), "expected a duration of a human life"),
    (_with(exclude="dead"), "key 'exclude' is 'dead'; expected a list"),
    (_with(exclude=["died"]), "key 'exclude' is 'died'; expected words out of"),
    (_with(competing=["relapse"]), "key 'competing' is 'relapse'"),
    (_with(outcome={"event": "cure"}), "key 'outcome.event' is 'cure'; expected one of"),
    (_with(outcome={"event": "code_at_admission"}), "key 'outcome.codes' is \\[\\]; expected at least one"),
    (
        _with(outcome={"event": "code_at_admission", "codes": ["("]}),
        "key 'outcome.codes' is '\\('; expected a regular expression",
    ),
    (_with(outcome={"event": "code_at_admission", "codes": ["(?=a)"]}), "expected a regular expression in Rust syntax"),
    (_with(outcome={"event": "code_at_admission", "codes": [10]}), "expected a list of words"),
    (_with(outcome={"event": "death", "codes": ["x"]}), "expected no codes"),
    (_with(outcome=DEATH), "key 'exclude' is 'earlier_code'; expected this word only with outcome code_at_admission"),
    (_with(outcome=DEATH, exclude=["dead"], competing=["code_elsewhere"]), "key 'competing' is 'code_elsewhere'"),
    (_with(exclude=["dead"]), "expected earlier_code"),
    (_with(outcome=STAY, exclude=["dead"]), "expected prediction.anchor admission and horizon_from anchor"),
    (
        _with(outcome=STAY, exclude=[], prediction={"anchor": "admission", "offset": "7d"}, horizon_from="anchor"),
        "key 'prediction.offset' is '7 days, 0:00:00'; expected less than the horizon 1w",
    ),
    (_with(exclude=["earlier_code", "stay_ended"]), "only with anchor admission"),
    (_with(admissions="last"), "key 'retrospective' is False; expected true"),
    (_with(admissions="first"), "key 'admissions' is 'first'"),
    (_with(censoring=False), "key 'retrospective' is False; expected true"),
    (_with(outcome={"event": "code_ever", "codes": ["x"]}, exclude=[]), "key 'retrospective' is False; expected true"),
    (_with(retrospective="yes"), "key 'retrospective' is 'yes'; expected true or false"),
    (_with(excluded_input_kinds="diagnosis"), "expected a list of words"),
]


@pytest.mark.parametrize(("data", "message"), BAD)
def test_a_wrong_task_is_refused_with_its_key(data, message):
    with pytest.raises(ValueError, match=message):
        Task.from_dict(data)


FILES = [
    (b"name: [", "cannot be read as YAML"),
    (b"name: a\nname: b\n", "repeated key\\(s\\) \\['name'\\]"),
    (b"prediction: {anchor: discharge, anchor: admission}\n", "repeated key\\(s\\) \\['anchor'\\]"),
    (b"\xff\xfe", "is not UTF-8"),
    (b"", "the file is None"),
    (b"name: !!python/object:os.system {}\n", "cannot be read as YAML"),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_a_wrong_file_is_refused_with_its_name(tmp_path, content, message):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_task(path)
    assert "wrong.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mortality", "Unknown task 'mortality'; expected one of \\['mortality_30d'"),
        (None, "Unknown task None"),
        ("nowhere.yaml", "No task file at nowhere.yaml"),
    ],
)
def test_an_unknown_task_names_those_that_exist(name, message):
    with pytest.raises(ValueError, match=message):
        load_task(name)

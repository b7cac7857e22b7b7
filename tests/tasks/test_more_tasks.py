"""Tasks beyond the paper's: stays in intensive care, visits, values, ages; the columnar engine equals its slow twin."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from ehrseq.data import read_meds
from ehrseq.data.dataset import write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.tasks import Task, label_events, list_tasks, load_task, read_labels
from ehrseq.tasks.shards import label_dataset
from ehrseq.work.engine import get_engine
from tests.properties import examples
from tests.tasks.naive import naive_labels
from tests.tasks.test_labelling_naive import BASE, SCHEMA, _history, moments, patient
from tests.tasks.timelines import ED_STAY, ICU_STAY, at, stay

MORE = list_tasks(paper=False)


def short(name: str, **changes) -> Task:
    """A task in days, so that short random histories reach its horizon."""
    fields = {
        "name": name,
        "token": "[T]",
        "definition": "short",
        "positive_label": "yes",
        "prediction": {"anchor": "admission", "offset": "12h"},
        "horizon": "3d",
        "exclude": ["dead", "stay_ended"],
        "competing": ["death"],
    }
    return Task.from_dict({**fields, **changes})


VALUES = [
    {"codes": ["^LAB//X$"], "unit": "mg / dL"},
    {"codes": ["^LAB//X$"], "unit": "umol/L", "times": 0.01},
    {"codes": ["^LAB//Y//mg"]},
]


def value(*rules: dict, **more) -> dict:
    return {"event": "value", "values": VALUES, "any_of": list(rules), **more}


KDIGO = value({"rise": 0.3, "within": "2d"}, {"rise_to": 1.5, "within": "7d"})
AT_END = {"anchor": "icu_discharge"}
AT_VISIT = {"anchor": "visit_end"}
SHORT = [
    short("dies_in_stay", horizon="stay", competing=[], outcome={"event": "death_in_stay"}),
    short("dies_in_stay_3d", competing=[], outcome={"event": "death_in_stay"}),
    short(
        "dies_in_icu",
        prediction={"anchor": "icu_admission", "offset": "12h"},
        horizon="stay",
        competing=[],
        outcome={"event": "death_in_stay"},
    ),
    short(
        "icu_stay_2d",
        prediction={"anchor": "icu_admission"},
        horizon="2d",
        horizon_from="anchor",
        outcome={"event": "length_of_stay"},
    ),
    short("icu_again", prediction=AT_END, exclude=["dead"], outcome={"event": "icu_admission"}),
    short("icu_after_admission", outcome={"event": "icu_admission"}),
    short("admitted_after_icu", prediction=AT_END, exclude=["dead"], outcome={"event": "admission"}),
    short("admitted_after_visit", prediction=AT_VISIT, exclude=["dead"], outcome={"event": "admission"}),
    short("new_code", exclude=["dead", "earlier_code"], outcome={"event": "first_code", "codes": ["I10$"]}),
    short(
        "new_code_after_visit",
        prediction=AT_VISIT,
        exclude=["dead", "earlier_code"],
        outcome={"event": "first_code", "codes": ["I10$"]},
    ),
    short("injury", exclude=["dead", "stay_ended", "earlier_value"], outcome=KDIGO),
    short("injury_in_stay", horizon="stay", outcome=KDIGO),
    short(
        "above",
        prediction={"anchor": "discharge"},
        exclude=["dead"],
        outcome=value({"above": 1.3}, unmeasured="negative"),
    ),
    short("limits", outcome=value({"below": 1.0}, {"at_most": 0.5}, {"at_least": 4.1}), competing=[]),
    short("falls", outcome=value({"fall": 0.3, "within": "3d"}, {"fall_to": 0.5, "within": "1d"})),
    short(
        "loses",
        prediction=AT_VISIT,
        horizon="8d",
        age={"at_least": 2, "below": 18},
        exclude=["dead"],
        outcome=value({"fall_to": 0.8, "within": "4d", "since": "prediction"}),
    ),
    short(
        "gains",
        prediction=AT_VISIT,
        exclude=["dead"],
        age={"at_least": 18},
        outcome=value(
            {"rise": 0.3, "within": "9d", "since": "prediction"},
            {"rise_to": 1.5, "within": "2d", "since": "prediction"},
            {"fall": 0.3, "within": "9d", "since": "prediction"},
        ),
    ),
]  # fmt: skip

measurement = st.tuples(
    moments,
    st.sampled_from([0.5, 0.8, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0, 4.1]),
    st.sampled_from(["mg/dl", "umol/L", "g/L", "in the code"]),
)
with_values = st.tuples(
    patient,
    st.lists(measurement, max_size=8),
    st.sampled_from([None, BASE - timedelta(days=365.25 * 17.99), BASE - timedelta(days=365.25 * 40)]),
)
VALUE_SCHEMA = {**SCHEMA, "numeric_value": pl.Float32, "unit": pl.String}


def value_row(time: datetime, value: float, unit: str) -> dict:
    if unit == "in the code":
        return {"time": time, "code": "LAB//Y//mg/dL", "numeric_value": value, "unit": None}
    return {
        "time": time,
        "code": "LAB//X",
        "numeric_value": value * 100 if unit == "umol/L" else value,
        "unit": unit,
    }


@examples(60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(patients=st.lists(with_values, min_size=1, max_size=10), end=st.sampled_from([12, 30, 60, 1000]))
def test_the_engine_equals_its_naive_twin(patients, end):
    end_of_data = BASE + timedelta(hours=12 * end)
    rows, twins = [], []
    for subject, (drawn, measured, birth) in enumerate(patients):
        own, twin = _history(drawn, subject, end_of_data)
        measured = [one for one in measured if one[0] <= end_of_data]
        own += [{"subject_id": subject, **value_row(*one)} for one in measured]
        # Grams per litre are no unit that the task knows.
        twin["values"] = [(time, number) for time, number, unit in measured if unit != "g/L"]
        twin["birth"] = birth
        if birth is not None:
            own.append({"subject_id": subject, "time": birth, "code": "MEDS_BIRTH"})
        rows += own
        twins.append(twin)
    if not rows:
        return
    table = pl.DataFrame(rows, schema=VALUE_SCHEMA)
    result = label_events(table, SHORT, end_of_data=end_of_data, progress=False)
    for task in SHORT:
        expected, dropped, competing = [], Counter(), Counter()
        for subject, twin in enumerate(twins):
            twin = {**twin, "encounters": [dict(e) for e in twin["encounters"]]}
            labels, why, competes = naive_labels(**twin, task=task, end_of_data=end_of_data)
            expected += [(subject, time, label) for time, label in labels]
            dropped += why
            competing += competes
        assert result.labels[task.name].rows() == expected, task.name
        assert {k: n for k, n in result.report[task.name].items() if n} == dict(dropped), task.name
        assert {k: n for k, n in result.competing[task.name].items() if n} == dict(competing), task.name
        assert result.candidates[task.name] == len(expected) + sum(dropped.values())


# -- by hand ---------------------------------------------------------------------------------------------------------


def label(task: str | Task, rows: list[tuple], values: list[tuple] = ()) -> dict[datetime, bool]:
    """Labels of one patient; rows of (time, code, visit_id), values of (time, code, number, unit)."""
    table = pl.DataFrame(
        [
            *(
                {"subject_id": 1, "time": at(r[0]), "code": r[1], "visit_id": r[2] if len(r) > 2 else None}
                for r in rows
            ),
            *({"subject_id": 1, "time": at(v[0]), "code": v[1], "numeric_value": v[2], "unit": v[3]} for v in values),
        ],
        schema=VALUE_SCHEMA,
    )
    result = label_events(table, task, end_of_data="2030-01-01", progress=False)
    (labels,) = result.labels.values()
    return dict(labels.select("prediction_time", "boolean_value").iter_rows())


CREATININE = "LAB//LOINC//2160-0"
STAY = stay("2020-01-01 08:00", "2020-01-09 08:00", "a")
ASKED = at("2020-01-02 08:00")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([("2020-01-01 09:00", 1.0), ("2020-01-03 08:59", 1.3)], {ASKED: True}),  # +0.3 within 48 h, in floats too
        ([("2020-01-01 09:00", 1.1), ("2020-01-03 08:59", 1.4)], {ASKED: True}),
        ([("2020-01-01 09:00", 1.0), ("2020-01-03 09:01", 1.3)], {ASKED: False}),  # 48 hours and a minute
        ([("2019-12-27 09:00", 1.0), ("2020-01-03 08:00", 1.5)], {ASKED: True}),  # 1.5 times, within 7 days
        ([("2019-12-26 07:00", 1.0), ("2020-01-03 08:00", 1.5)], {ASKED: False}),
        ([("2020-01-01 09:00", 1.0), ("2020-01-01 20:00", 1.6)], {}),  # already there
        ([("2020-01-01 09:00", 1.0)], {}),  # not measured again
        ([("2020-01-01 09:00", 1.0), ("2020-01-04 08:01", 1.3)], {}),  # after the horizon: not measured within it
        ([("2020-01-03 09:00", 1.9)], {ASKED: False}),
    ],
)
def test_acute_kidney_injury_by_kdigo(values, expected):
    assert label("acute_kidney_injury_48h", STAY, [(t, CREATININE, v, "mg/dL") for t, v in values]) == expected
    molar = [(t, CREATININE, round(v * 88.402, 2), "umol/L") for t, v in values]
    assert label("acute_kidney_injury_48h", STAY, molar) == expected


def test_death_in_hospital_after_the_first_day():
    died = [
        *stay("2020-01-01 08:00", "2020-01-09 08:00", "a", end_code="VISIT_END//exp"),
        ("2020-01-09 23:59", "MEDS_DEATH"),
    ]
    assert label("hospital_mortality_24h", died) == {ASKED: True}
    assert label("hospital_mortality_48h", died) == {at("2020-01-03 08:00"): True}
    later = [*STAY, ("2020-01-20", "MEDS_DEATH")]
    assert label("hospital_mortality_24h", later) == {ASKED: False}
    assert label("hospital_mortality_24h", [*stay("2020-01-01 08:00", None, "a")]) == {}  # nobody knows yet
    assert label("hospital_mortality_24h", [*stay("2020-01-01 08:00", "2020-01-01 20:00", "a")]) == {}


def test_back_to_intensive_care():
    first = stay("2020-01-01 09:00", "2020-01-03 09:00", "a", **ICU_STAY)
    transfer = stay("2020-01-03 09:40", "2020-01-04 10:00", "a", **ICU_STAY)
    back = stay("2020-01-05 09:00", "2020-01-06 09:00", "a", **ICU_STAY)
    out = {at("2020-01-04 10:00"): True, at("2020-01-06 09:00"): False}
    assert label("icu_readmission_48h", [*STAY, *first, *transfer, *back]) == out
    assert label("icu_readmission_48h", [*STAY, *first, *stay("2020-01-05 12:00", "2020-01-06", "b", **ED_STAY)]) == {
        at("2020-01-03 09:00"): False
    }
    # Without an end, in a stay that is over: the end is unknown, and makes no row; the start is a return all the same.
    assert label("icu_readmission_48h", [*STAY, *first, *stay("2020-01-05 09:00", None, "b", **ICU_STAY)]) == {
        at("2020-01-03 09:00"): True
    }


def test_a_child_loses_weight():
    birth = ("2012-01-01", "MEDS_BIRTH")
    visit = stay("2020-01-01 09:00", "2020-01-01 10:00", "v", start_code="VISIT_START//AMB", end_code="VISIT_END//AMB")
    asked = at("2020-01-01 10:00")

    def bmi(*values):
        return [(t, "VITAL//LOINC//39156-5", v, "kg/m2") for t, v in values]

    task = "bmi_loss_365d_children"
    assert label(task, [birth, *visit], bmi(("2020-01-01 09:30", 20.0), ("2020-09-01", 19.0))) == {asked: True}
    assert label(task, [birth, *visit], bmi(("2020-01-01 09:30", 20.0), ("2020-09-01", 19.1))) == {asked: False}
    assert label(task, [birth, *visit], bmi(("2019-06-01", 20.0), ("2020-09-01", 15.0))) == {}  # too old to count from
    assert (
        label(task, [("2000-01-01", "MEDS_BIRTH"), *visit], bmi(("2020-01-01 09:30", 20.0), ("2020-09-01", 15.0))) == {}
    )


def test_a_code_list_in_a_file(tmp_path):
    (tmp_path / "gout.txt").write_text("# gout\nDIAGNOSIS//ICD10CM//M10.9\n\nDIAGNOSIS//ICD(9) + CM//274*\n")
    content = yaml.safe_load(Path(load_task("heart_failure_365d").source).read_text())
    content |= {"name": "gout", "token": "[GOUT]", "outcome": {"event": "first_code", "code_file": "gout.txt"}}
    (tmp_path / "gout.yaml").write_text(yaml.safe_dump(content))
    task = load_task(tmp_path / "gout.yaml")
    out = at("2020-01-09 08:00")
    assert label(task, [*STAY, ("2020-03-01", "DIAGNOSIS//ICD10CM//M10.9")]) == {out: True}
    assert label(task, [*STAY, ("2020-03-01", "DIAGNOSIS//ICD10CM//M10.90")]) == {out: False}
    assert label(task, [*STAY, ("2020-03-01", "DIAGNOSIS//ICD(9) + CM//274.9")]) == {out: True}
    assert label(task, [*STAY, ("2020-03-01", "DIAGNOSIS//ICD10CM//M10x9")]) == {out: False}


@pytest.mark.parametrize(
    "code", ["DIAGNOSIS//ICD10CM//I50.9", "DIAGNOSIS//ICD//10//I509", "ICD9CM/428.0", "DIAGNOSIS//ICD//9//4280"]
)
def test_icd_categories_in_every_spelling(code):
    assert label("heart_failure_365d", [*STAY, ("2020-03-01", code)]) == {at("2020-01-09 08:00"): True}


def test_the_files_are_tasks_of_every_use():
    assert len(MORE) == 11
    tasks = [load_task(name) for name in list_tasks(retrospective=None, paper=None)]
    assert len({task.token for task in tasks}) == len(tasks) == 23
    for name in MORE:
        assert load_task(name).token == f"[{name.upper()}]"  # what EhrTokenizer.train makes of a bare name
        assert not load_task(name).retrospective


def test_shards_of_values_equal_the_whole_table(tmp_path):
    events = simulate(60, seed=4, progress=False).events()
    write_dataset(events, tmp_path, dataset_name="simulated", shard_size=4_000)
    whole = label_events(events, MORE, end_of_data="2022-01-01", progress=False)
    label_dataset(tmp_path, MORE, end_of_data="2022-01-01", engine=get_engine("local", num_workers=1))
    labels = read_labels(tmp_path)
    assert all(labels[name].equals(whole.labels[name]) for name in MORE)
    assert whole.labels["acute_kidney_injury_48h"]["boolean_value"].sum() > 10


def test_mimic_iv_demo_equals_plain_counts(ehr_data):
    """Deaths in hospital and returns to intensive care, counted from the raw files."""
    folder = ehr_data / "mimic-iv-demo-meds" / "0.0.1"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the MIMIC-IV demo as MEDS is needed")
    events = read_meds(folder)
    result = label_events(events, MORE, end_of_data="2202-12-31", progress=False)
    died = events.filter(pl.col("code") == "HOSPITAL_DISCHARGE//DIED").height
    mortality = result.labels["hospital_mortality_24h"]
    assert (
        int(mortality["boolean_value"].sum()) + result.report["hospital_mortality_24h"]["died_before_prediction"]
        == died
    )
    units = events.filter(pl.col("code").str.starts_with("ICU_")).sort("subject_id", "time")
    back = 0
    for _, own in units.group_by("subject_id"):
        starts = own.filter(pl.col("code").str.starts_with("ICU_ADM"))["time"].to_list()
        ends = own.filter(pl.col("code").str.starts_with("ICU_DIS"))["time"].to_list()
        back += sum(any(timedelta(hours=1) < s - e <= timedelta(days=30) for s in starts) for e in ends)
    assert int(result.labels["icu_readmission_30d"]["boolean_value"].sum()) == back


# -- files that are wrong --------------------------------------------------------------------------------------------

GOOD = {
    "name": "injury",
    "token": "[INJURY]",
    "definition": "x",
    "positive_label": "y",
    "prediction": {"anchor": "admission", "offset": "24h"},
    "horizon": "48h",
    "exclude": ["dead", "stay_ended", "earlier_value"],
    "outcome": KDIGO,
}
IN_STAY = {"event": "death_in_stay"}
BAD = [
    ({"horizon": "stay", "outcome": IN_STAY, "exclude": ["dead"]}, "expected dead and stay_ended"),
    ({"outcome": IN_STAY, "exclude": ["dead"], "prediction": {"anchor": "discharge"}}, "expected dead and stay_ended"),
    ({"horizon": "stay", "outcome": {"event": "death"}, "exclude": ["dead", "stay_ended"]}, "expected a duration"),
    ({"horizon": "stays"}, "key 'horizon' is 'stays'"),
    ({"outcome": {"event": "value"}}, "key 'outcome.values' is \\[\\]; expected at least one"),
    ({"outcome": {"event": "value", "values": VALUES}, "exclude": []}, "key 'outcome.any_of' is \\[\\]"),
    ({"outcome": {**KDIGO, "event": "death"}, "exclude": []}, "looks at no values"),
    ({"outcome": {"event": "death"}}, "key 'exclude' is 'earlier_value'; expected this word only with outcome value"),
    ({"outcome": value({"rise": 0.3})}, "key 'outcome.any_of\\[0\\].within' is missing"),
    ({"outcome": value({"rise": 0.3, "within": "0d"})}, "expected a duration above 0"),
    ({"outcome": value({"rise": -1, "within": "2d"})}, "expected a number above 0"),
    ({"outcome": value({"rise": 0.3, "above": 2, "within": "2d"})}, "in each entry"),
    ({"outcome": value({"above": "2"})}, "key 'outcome.any_of\\[0\\].above' is '2'; expected a number"),
    ({"outcome": value({"above": 2, "within": "2d"})}, "unknown key\\(s\\) 'outcome.any_of\\[0\\].within'"),
    ({"outcome": value({"rise": 1, "within": "2d", "since": "birth"})}, "expected one of \\['window', 'prediction'\\]"),
    (
        {"outcome": value({"rise": 1, "within": "2d", "since": "prediction"})},
        "key 'exclude' is 'earlier_value'; expected a rule",
    ),
    ({"outcome": value({"above": 2}, unmeasured="guess")}, "key 'outcome.unmeasured' is 'guess'"),
    ({"outcome": {**KDIGO, "values": [{"unit": "kg"}]}}, "key 'outcome.values\\[0\\].codes' is \\[\\]"),
    ({"outcome": {**KDIGO, "values": [{"codes": ["x"], "times": 0}]}}, "times' is 0; expected a number above 0"),
    ({"outcome": {**KDIGO, "values": {"codes": ["x"]}}}, "expected a list of mappings"),
    ({"outcome": {**KDIGO, "values": ["x"]}}, "key 'outcome.values\\[0\\]' is 'x'; expected a mapping"),
    ({"age": {"at_least": 18, "below": 2}}, "at_least below below"),
    ({"age": {}}, "expected at_least, below or both"),
    ({"age": {"above": 3}}, "unknown key\\(s\\) 'age.above'"),
    ({"age": {"at_least": "3"}}, "key 'age.at_least' is '3'"),
    ({"outcome": {"event": "first_code", "icd10": [10]}}, "expected a list of words"),
    ({"outcome": {"event": "first_code", "icd10": ["I.*"]}}, "expected codes of ICD"),
    ({"outcome": {"event": "first_code", "code_file": "none.txt"}}, "expected a text file beside the task's"),
    ({"outcome": {"event": "first_code", "icd10": ["I50"]}, "exclude": ["dead"]}, "expected earlier_code"),
    (
        {
            "outcome": {"event": "code_at_admission", "codes": ["x"]},
            "exclude": ["earlier_code"],
            "prediction": {"anchor": "visit_end"},
        },
        "expected first_code, with this anchor",
    ),
    ({"outcome": {"event": "admission"}, "exclude": []}, "expected another, or the anchor at the end"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_wrong_task_is_refused_with_its_key(changes, message):
    with pytest.raises(ValueError, match=message):
        Task.from_dict({**GOOD, **changes})


def test_a_table_without_numbers_is_refused():
    table = pl.DataFrame({"subject_id": [1], "time": [BASE], "code": ["VISIT_START//IMP"]})
    with pytest.raises(ValueError, match="numeric_value is absent; expected numbers"):
        label_events(table, "hyperkalemia_48h", end_of_data="2030-01-01")

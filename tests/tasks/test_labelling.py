"""The labelling engine: end of follow-up, spellings of codes, the result's tables, bad input."""

import polars as pl
import pytest

from ehrseq.data.schema import LABEL_SCHEMA
from ehrseq.tasks import REASONS, Task, label_events, list_tasks, load_task
from tests.tasks.timelines import DEATH, END_OF_DATA, I10, IMP_OUT, INDEX, OUT, at, events, stay

# -- end of follow-up --------------------------------------------------------------------------------------------------

# task, rows, end of data, labels, dropped
CENSORING = [
    ("mortality_30d", INDEX, "2020-02-10T12:00:00", {OUT: 0}, {}),  # the horizon's last instant is covered
    ("mortality_30d", INDEX, "2020-02-10T11:59:59", {}, {"follow_up_ends": 1}),
    ("mortality_30d", INDEX, "2020-02-10", {OUT: 0}, {}),  # a date is its last instant
    ("mortality_30d", INDEX, "2020-02-09", {}, {"follow_up_ends": 1}),
    ("mortality_30d", INDEX, "2020-02-10T13:00:00+01:00", {OUT: 0}, {}),
    ("mortality_30d", [*INDEX, ("2020-01-15", DEATH)], "2020-01-20", {OUT: 1}, {}),  # a death within the horizon
    (
        "mortality_30d",
        [*INDEX, ("2020-01-25", DEATH)],
        "2020-01-20",
        {},
        {"follow_up_ends": 1},
    ),  # seen after the end: not seen
    ("mortality_30d", INDEX, "2020-01-05", {}, {"no_discharge": 1}),
    (
        "readmission_30d",
        [*INDEX, *stay("2020-01-20", "2020-01-22", "b")],
        "2020-01-21",
        {},
        {"follow_up_ends": 1, "no_discharge": 1},
    ),  # positive so far: not kept
    ("readmission_30d", [*INDEX, ("2020-01-15", DEATH)], "2020-01-20", {OUT: 0}, {}),  # nothing can follow a death
    (
        "readmission_30d",
        [*INDEX, *stay("2020-01-13", "2020-01-14", "b"), ("2020-01-15", DEATH)],
        "2020-01-20",
        {OUT: 1, "2020-01-14": 0},
        {},
    ),
    ("long_stay_7d", INDEX, "2020-01-08T12:00:00", {"2020-01-02 12:00": 1}, {}),  # not discharged within 168 hours
    ("long_stay_7d", INDEX, "2020-01-08T11:59:59", {}, {"follow_up_ends": 1}),
    ("long_stay_7d", INDEX, "2020-01-02T11:00:00", {}, {"follow_up_ends": 1}),
    ("long_stay_7d", stay("2020-01-01 12:00", "2020-01-04", "a"), "2020-01-05", {}, {"follow_up_ends": 1}),
    ("long_stay_7d", stay("2020-01-01 12:00", "2020-01-02", "a"), "2020-01-05", {}, {"stay_ended": 1}),
    ("long_stay_7d_paper", INDEX, "2020-01-05", {}, {"follow_up_ends": 1}),  # no censoring, and still no length
    (
        "hypertension",
        [*INDEX, *stay("2020-06-01", "2020-06-04", "b"), ("2020-06-04", I10, "b")],
        "2020-07-01",
        {},
        {"earlier_code": 1, "follow_up_ends": 1},
    ),  # positive so far, and the negatives of this day are dropped, too
    (
        "hypertension",
        [*INDEX, *stay("2020-06-01", "2020-06-04", "b"), ("2020-06-04", I10, "b"), ("2020-06-20", DEATH)],
        "2020-07-01",
        {OUT: 1},
        {"earlier_code": 1},
    ),
    ("hypertension", INDEX, "2020-07-01", {}, {"follow_up_ends": 1}),
    ("mortality_30d_paper", INDEX, "2020-01-12", {OUT: 0}, {}),
]


@pytest.mark.parametrize(("task", "rows", "end_of_data", "expected", "dropped"), CENSORING)
def test_follow_up_ends_with_the_data(task, rows, end_of_data, expected, dropped):
    result = label_events(events(*rows), task, end_of_data=end_of_data)
    got = dict(result.labels[task].select("prediction_time", "boolean_value").iter_rows())
    assert got == {at(time): bool(label) for time, label in expected.items()}
    assert {reason: count for reason, count in result.report[task].items() if count} == dropped


def test_without_an_extraction_date_the_last_event_of_the_dataset_ends_follow_up(caplog):
    other = events(("2020-02-10 12:00", "LAB//GLUCOSE"), subject=2)
    alone = label_events(events(*INDEX), "mortality_30d")
    assert alone.report["mortality_30d"]["follow_up_ends"] == 1
    # The patient's own last event (the discharge) ends nothing: another patient's event shows that data go on.
    both = label_events(pl.concat([events(*INDEX), other]), "mortality_30d")
    assert both.labels["mortality_30d"]["boolean_value"].to_list() == [False]
    assert both.end_of_data == at("2020-02-10 12:00")


# -- codes ----

MATCHING = {
    "hypertension": [
        "DIAGNOSIS//ICD10CM//I10",
        "DIAGNOSIS//ICD10CM//I10.9",
        "DIAGNOSIS//ICD10//I10",
        "DIAGNOSIS//ICD9CM//401.9",
        "DIAGNOSIS//ICD9CM//4019",
        "DIAGNOSIS//ICD//9//4019",
        "DIAGNOSIS//ICD//10//I10",
        "DIAGNOSIS//mimic-diagnosis-icd9//4019",
        "DIAGNOSIS//mimic-diagnosis-icd10//I10",
        "DIAGNOSIS//icd-10-cm//I10",
        "DIAGNOSIS//ICD-9-CM//401",
        "ICD10CM/I10",
        "ICD9CM/401.1",
        "DIAGNOSIS//SNOMED//38341003",
    ],
    "fluid_disorder": [
        "DIAGNOSIS//ICD//9//2767",
        "DIAGNOSIS//ICD9CM//276.51",
        "DIAGNOSIS//ICD//10//E871",
        "DIAGNOSIS//ICD10CM//E87.1",
    ],
    "lipid_disorder": [
        "DIAGNOSIS//ICD//9//2724",
        "DIAGNOSIS//ICD10CM//E78.5",
        "DIAGNOSIS//ICD//10//E785",
        "DIAGNOSIS//SNOMED//55822004",
    ],
}
NOT_MATCHING = {
    "hypertension": [
        "DIAGNOSIS//ICD10CM//I11.0",
        "DIAGNOSIS//ICD//9//4029",
        "DIAGNOSIS//ICD//10//401",
        "DIAGNOSIS//ICD//9//I10",
        "DIAGNOSIS//ICD10CM//R40.1",
        "PROCEDURE//ICD//9//4011",
        "LAB//I10",
        "DIAGNOSIS//SNOMED//383410031",
    ],
    "fluid_disorder": [
        "DIAGNOSIS//ICD//9//E8781",
        "DIAGNOSIS//ICD9CM//E87.8",
        "DIAGNOSIS//ICD//10//E86",
        "DIAGNOSIS//ICD//9//V276",
    ],
    "lipid_disorder": [
        "DIAGNOSIS//ICD//9//E7800",
        "DIAGNOSIS//ICD10CM//E77",
        "DIAGNOSIS//ICD//9//7272",
        "PROCEDURE//ICD//9//272",
    ],
}


@pytest.mark.parametrize(
    ("task", "code", "found"),
    [(task, code, True) for task, codes in MATCHING.items() for code in codes]
    + [(task, code, False) for task, codes in NOT_MATCHING.items() for code in codes],
)
def test_codes_of_a_condition_in_every_spelling(task, code, found):
    result = label_events(events(("2019-01-01", code), *INDEX), [task], end_of_data=END_OF_DATA)
    assert result.report[task]["earlier_code"] == int(found)


def test_mimic_iv_meds_codes_are_understood():
    rows = [
        ("2020-01-01 08:00", "ED_REGISTRATION", "1"),
        ("2020-01-01 12:00", "HOSPITAL_ADMISSION//EW EMER.//EMERGENCY ROOM", "1"),
        ("2020-01-01 13:00", "ED_OUT", "1"),
        ("2020-01-02 00:00", "ICU_ADMISSION//Medical Intensive Care Unit (MICU)", "1"),
        ("2020-01-03 00:00", "ICU_DISCHARGE//Medical Intensive Care Unit (MICU)", "1"),
        ("2020-01-11 12:00", "HOSPITAL_DISCHARGE//HOME", "1"),
        ("2020-01-11 12:00", "DIAGNOSIS//ICD//9//4019", "1"),
    ]
    result = label_events(events(*rows), list_tasks(), end_of_data=END_OF_DATA)
    assert {name: frame["boolean_value"].to_list() for name, frame in result.labels.items()} == {
        "mortality_30d": [False],
        "long_stay_7d": [True],
        "readmission_30d": [False],
        "hypertension": [],
        "fluid_disorder": [False],
        "lipid_disorder": [False],
    }


# -- the frame around the labels ----


def _two_patients() -> pl.DataFrame:
    second = events(*stay("2020-05-01", "2020-05-09", "x"), ("2020-05-20", DEATH), subject=2)
    return pl.concat([second, events(*INDEX, *stay("2020-01-20", "2020-01-22", "b"))])


def test_label_tables_have_the_meds_columns_and_are_sorted():
    for frame in label_events(_two_patients(), list_tasks(), end_of_data=END_OF_DATA).labels.values():
        assert dict(frame.schema) == dict(LABEL_SCHEMA)
        assert frame.equals(frame.sort("subject_id", "prediction_time"))
        assert frame.null_count().sum_horizontal().item() == 0


def test_the_order_of_rows_and_the_kind_of_table_do_not_matter():
    table = _two_patients()
    expected = label_events(table, list_tasks(), end_of_data=END_OF_DATA)
    shuffled = table.sample(fraction=1.0, shuffle=True, seed=1)
    categorical = table.with_columns(pl.col("code").cast(pl.Categorical), pl.col("time").cast(pl.Datetime("ns", "UTC")))
    for other in (shuffled, shuffled.lazy(), categorical):
        result = label_events(other, list_tasks(), end_of_data=END_OF_DATA)
        assert all(result.labels[name].equals(expected.labels[name]) for name in expected.labels)
        assert result.report == expected.report


def test_a_table_without_visit_id():
    table = events(*INDEX).drop("visit_id")
    assert label_events(table, "mortality_30d", end_of_data=END_OF_DATA).labels["mortality_30d"].height == 1


def test_a_code_map_of_ones_own():
    table = events(("2020-01-01", "ADMIT"), ("2020-01-05", "LEAVE"), ("2020-01-06", "GONE"))
    own = [["ADMIT", "visit_start:IMP"], ["LEAVE", "visit_end:IMP"], ["GONE", "death"]]
    result = label_events(table, "mortality_30d", end_of_data=END_OF_DATA, code_map=own)
    assert result.labels["mortality_30d"]["boolean_value"].to_list() == [True]


def test_nobody_was_ever_admitted():
    result = label_events(events(("2020-01-01", I10)), list_tasks(retrospective=None), end_of_data=END_OF_DATA)
    assert all(frame.is_empty() and dict(frame.schema) == dict(LABEL_SCHEMA) for frame in result.labels.values())
    assert result.summary()["prevalence"].to_list() == [None] * 12


def test_summary_is_a_table_of_counts():
    result = label_events(_two_patients(), ["mortality_30d", "long_stay_7d"], end_of_data=END_OF_DATA)
    mortality, stay_row = result.summary().to_dicts()
    assert mortality["task"] == "mortality_30d"
    assert (mortality["patients"], mortality["candidates"], mortality["labels"], mortality["positives"]) == (2, 3, 3, 1)
    assert mortality["prevalence"] == pytest.approx(1 / 3)
    assert mortality["dropped:stay_ended"] is None  # this task does not know the reason
    assert stay_row["dropped:stay_ended"] == 0
    assert stay_row["competing:death"] == 0
    assert "mortality_30d: 3 labels of 2 patients, 1 positive (33.3%), out of 3 admissions" in str(result)


def test_every_reason_is_explained_and_reported_in_order():
    for name in list_tasks(retrospective=None):
        report = label_events(events(*INDEX), name, end_of_data=END_OF_DATA).report[name]
        assert list(report) == [reason for reason in REASONS if reason in report]


def test_notes_count_what_was_met():
    table = events(
        *stay("2019-01-01", None, "old"), *INDEX, *stay("2021-01-01", None, "new"), ("2020-05-01", IMP_OUT, "nobody")
    )
    notes = label_events(table, "mortality_30d", end_of_data="2021-01-20").notes
    assert notes["encounters"] == 3
    assert notes["open_encounters"] == 2
    assert notes["unpaired_visit_ends"] == 1
    assert (notes["admissions"], notes["admissions_in_progress"], notes["admissions_end_unknown"]) == (3, 1, 1)


def test_a_task_object_is_taken_as_it_is():
    task = Task.from_dict(
        {
            "name": "mortality_2d",
            "token": "[MOR_2D]",
            "definition": "Death within two days.",
            "positive_label": "death",
            "prediction": {"anchor": "admission", "offset": "12h"},
            "horizon": "2d",
            "exclude": ["dead", "stay_ended"],
            "outcome": {"event": "death"},
        }
    )
    result = label_events(
        events(*INDEX, ("2020-01-04", DEATH)), [task, load_task("mortality_30d")], end_of_data=END_OF_DATA
    )
    assert result.labels["mortality_2d"].rows() == [(1, at("2020-01-02"), True)]


# -- bad input ----

BAD = [
    (lambda: label_events([1], "mortality_30d"), "events is a list; expected a polars DataFrame"),
    (lambda: label_events(events(*INDEX).drop("time"), "mortality_30d"), r"no column \['time'\]"),
    (lambda: label_events(events(*INDEX).cast({"subject_id": pl.String}), "mortality_30d"), "subject_id is String"),
    (
        lambda: label_events(events(*INDEX).cast({"time": pl.String}), "mortality_30d"),
        "time is String; expected Datetime",
    ),
    (
        lambda: label_events(events(*INDEX).with_columns(code=pl.lit(1)), "mortality_30d"),
        "code is Int32; expected strings",
    ),
    (
        lambda: label_events(events(*INDEX).with_columns(subject_id=pl.lit(None, pl.Int64)), "mortality_30d"),
        "2 rows without subject_id",
    ),
    (lambda: label_events(events(), "mortality_30d"), "no row with a time"),
    (lambda: label_events(events((None, I10)), "mortality_30d"), "no row with a time"),
    (lambda: label_events(events(*INDEX), "mortality"), "Unknown task 'mortality'; expected one of"),
    (lambda: label_events(events(*INDEX), []), "tasks is empty"),
    (lambda: label_events(events(*INDEX), {"mortality_30d": 1}), "tasks is a dict"),
    (lambda: label_events(events(*INDEX), [3]), "Unknown task 3"),
    (lambda: label_events(events(*INDEX), ["mortality_30d", "mortality_30d"]), "given twice"),
    (lambda: label_events(events(*INDEX), "mortality_30d", end_of_data="soon"), "'soon' is no ISO 8601"),
    (lambda: label_events(events(*INDEX), "mortality_30d", end_of_data=3), "end_of_data is a int"),
    (lambda: label_events(events(*INDEX), "mortality_30d", code_map=[["(", "death"]]), "no regular expression"),
    (lambda: label_events(events(*INDEX), "mortality_30d", code_map=[["x", "dead"]]), "sends 'x' to 'dead'"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()

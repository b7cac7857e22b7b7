"""MEDS files as other converters write them: read alike by every reader, and what each spelling means."""

from datetime import date, datetime

import polars as pl
import pytest

from ehrseq.data import EventDataset, load_events, read_meds
from ehrseq.data.meds_mending import OLD_CODES
from ehrseq.data.schema import validate_events, validate_labels
from ehrseq.data.unread_codes import without_admissions
from ehrseq.prepare import prepare_dataset
from ehrseq.tasks import label_events
from ehrseq.work.engine import get_engine

T = datetime
END_OF_DAY = {"hour": 23, "minute": 59, "second": 59, "microsecond": 999999}


def folder_of(path, *files: dict):
    """A dataset of these files."""
    (path / "data").mkdir(parents=True)
    for number, columns in enumerate(files):
        pl.DataFrame(columns).write_parquet(path / "data" / f"{number}.parquet")
    return path


def rows_of(events: pl.DataFrame) -> list[tuple]:
    return events.select("subject_id", "time", "code", "visit_id").rows()


def all_readers(path, tmp_path) -> list[tuple]:
    """Rows of a dataset, which every reader gives alike."""
    events, _ = load_events(path)
    assert EventDataset(path).events().equals(events)
    prepare_dataset(path, tmp_path / "prepared", shard_rows=2, engine=get_engine(num_workers=1))
    assert EventDataset(tmp_path / "prepared").events().equals(events)
    return rows_of(events)


# -- death and birth ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", sorted(OLD_CODES))
@pytest.mark.parametrize("name", ["patient_id", "subject_id"])
def test_the_codes_of_birth_and_death_before_meds_0_3_are_those_of_today(old, name, tmp_path):
    path = folder_of(tmp_path / "d", {name: [7], "time": [T(2031, 5, 18, 6)], "code": [old]})
    assert all_readers(path, tmp_path) == [(7, T(2031, 5, 18, 6), OLD_CODES[old], None)]


def test_a_death_at_midnight_stands_behind_everything_of_its_day_for_every_reader(tmp_path):
    columns = {
        "subject_id": [7, 7, 7],
        "time": [T(2031, 5, 6), T(2031, 5, 6, 7), T(2031, 5, 6, 0, 0, 1)],
        "code": ["MEDS_DEATH", "LAB//a", "LAB//b"],
    }
    rows = all_readers(folder_of(tmp_path / "d", columns), tmp_path)
    assert [code for _, _, code, _ in rows] == ["LAB//b", "LAB//a", "MEDS_DEATH"]
    assert rows[-1][1] == T(2031, 5, 6, **END_OF_DAY)


@pytest.mark.parametrize("placeholder", [T(1, 1, 1), T(1900, 1, 1), T(9999, 12, 31), T(9999, 12, 31, 23, 59, 59)])
def test_a_death_at_a_placeholder_is_one_at_an_unknown_time(placeholder, tmp_path):
    columns = {
        "subject_id": [7] * 4,
        "time": [T(2031, 5, 2, 9), T(2031, 5, 8, 13), placeholder, T(2031, 6, 1)],
        "code": ["HOSPITAL_ADMISSION//X", "HOSPITAL_DISCHARGE//HOME", "MEDS_DEATH", "LAB//a"],
    }
    path = folder_of(tmp_path / "d", columns)
    rows = all_readers(path, tmp_path)
    assert rows[0] == (7, None, "MEDS_DEATH", None)
    report = label_events(read_meds(path), "mortality_30d", end_of_data="2034-01-01").report["mortality_30d"]
    assert report["death_time_unknown"] == 1


@pytest.mark.parametrize("placeholder", [T(1, 1, 1), T(9999, 12, 31)])
def test_a_fact_at_a_placeholder_is_left_out_and_counted(placeholder, tmp_path):
    columns = {"subject_id": [7, 7], "time": [placeholder, T(2031, 5, 2)], "code": ["LAB//a", "LAB//b"]}
    events, report = load_events(folder_of(tmp_path / "d", columns))
    assert rows_of(events) == [(7, T(2031, 5, 2), "LAB//b", None)]
    assert report.notes["rows at a placeholder (0001, 9999), left out"] == 1


# -- visits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["Visit/IP", "Visit//IP", "Visit/ERIP", "HOSPITAL_ADMISSION//ER", "VISIT_START//IMP"])
@pytest.mark.parametrize(
    ("end", "time"),
    [
        (T(2031, 5, 4, 10), T(2031, 5, 4, 10)),
        (T(2031, 5, 1, 10), None),  # before the start: it has ended, nobody knows when
        (T(9999, 12, 31), None),
    ],
)
def test_the_column_end_of_a_visit_is_its_discharge(code, end, time, tmp_path):
    columns = {
        "subject_id": [7, 7],
        "time": [T(2031, 5, 2, 9), T(2031, 8, 1)],
        "code": [code, "LOINC/2160-0"],
        "visit_id": [5, None],
        "end": [end, T(2031, 8, 2)],  # that of a fact is no end of a visit
    }
    path = folder_of(tmp_path / "d", columns)
    ends = [row for row in all_readers(path, tmp_path) if row[2].startswith("VISIT_END")]
    assert ends == [(7, time, "VISIT_END//IMP", "5")]
    labels = label_events(read_meds(path), "long_stay_7d", end_of_data="2034-01-01")
    assert labels.labels["long_stay_7d"]["boolean_value"].to_list() == ([] if time is None else [False])
    assert labels.report["long_stay_7d"]["no_discharge"] == (time is None)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("Visit//IP//start", "Visit//IP//end"),
        ("Visit/IP/start", "Visit/IP/end"),
        ("Visit/ERIP//start", "Visit/ERIP//end"),
        ("CMS Place of Service//21//start", "CMS Place of Service//21//end"),
        ("CMS Place of Service/51", "CMS Place of Service/51/end"),
    ],
)
def test_visits_of_omop_as_meds_are_admissions_however_they_are_spelled(start, end, tmp_path):
    columns = {
        "subject_id": [7, 7],
        "time": [T(2031, 5, 2, 9), T(2031, 5, 8, 10)],
        "code": [start, end],
        "visit_occurrence_id": [5, 5],
    }
    events = read_meds(folder_of(tmp_path / "d", columns))
    labels = label_events(events, "mortality_30d", end_of_data="2034-01-01").labels["mortality_30d"]
    assert labels.rows() == [(7, T(2031, 5, 8, 10), False)]


def test_codes_that_look_like_visits_and_are_none_are_told_with_a_way_to_map_them(tmp_path, caplog):
    columns = {
        "subject_id": [7, 7, 7],
        "time": [T(2031, 5, 2, 9), T(2031, 5, 8, 10), T(2031, 5, 3)],
        "code": ["ADMISSION//WARD 3", "DISCHARGE//WARD 3", "LAB//a"],
    }
    path = folder_of(tmp_path / "d", columns)
    events = read_meds(path)
    label_events(events, "mortality_30d", end_of_data="2034-01-01")
    assert "No code is an admission to hospital" in caplog.text
    assert "ADMISSION//WARD 3 (1 rows), DISCHARGE//WARD 3 (1 rows)" in caplog.text
    assert "'ADMISSION//WARD 3$=visit_start:IMP'" in caplog.text
    caplog.clear()
    prepare_dataset(path, tmp_path / "prepared", engine=get_engine(num_workers=1))
    assert "No code is an admission to hospital" in caplog.text


def test_the_example_of_a_mapping_is_the_start_of_a_visit_and_not_its_end():
    codes = pl.DataFrame({"code": ["VISIT//END//Inpatient", "VISIT//START//Inpatient"], "rows": [9, 9]})
    assert "'VISIT//START//Inpatient$=visit_start:IMP'" in without_admissions(codes)


# -- columns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["visit_id", "hadm_id", "encounter_id", "visit_occurrence_id"])
@pytest.mark.parametrize(("text", "read"), [("0071", "0071"), ("71", "71"), ("71.0", "71"), ("V-1", "V-1")])
def test_a_csv_file_keeps_the_zeros_of_visit_ids(name, text, read, tmp_path):
    (tmp_path / "a.csv").write_text(f"subject_id,time,code,{name}\n31,2031-05-02T09:00,LAB//a,{text}\n")
    assert read_meds(tmp_path / "a.csv")["visit_id"].to_list() == [read]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("LAB//a", T(2031, 5, 2, **END_OF_DAY)),  # known from the end of its day on
        ("VISIT_END//IMP", T(2031, 5, 2, **END_OF_DAY)),
        ("VISIT_START//IMP", T(2031, 5, 2)),  # what begins, does so with its day
        ("HOSPITAL_ADMISSION//X", T(2031, 5, 2)),
        ("MEDS_BIRTH", T(2031, 5, 2)),
        ("MEDS_DEATH", T(2031, 5, 2, **END_OF_DAY)),
    ],
)
def test_a_date_has_one_instant_in_words_in_a_column_of_dates_and_in_csv(code, expected, tmp_path):
    (tmp_path / "a.csv").write_text(f"subject_id,time,code\n31,2031-05-02,{code}\n")
    pl.DataFrame({"subject_id": [31], "time": [date(2031, 5, 2)], "code": [code]}).write_parquet(tmp_path / "b.parquet")
    words = validate_events({"subject_id": [31], "time": ["2031-05-02"], "code": [code]})
    for events in (read_meds(tmp_path / "a.csv"), read_meds(tmp_path / "b.parquet"), words):
        assert events["time"].to_list() == [expected]


def test_a_patient_in_two_files_has_one_history_each_row_once(tmp_path):
    first = {"subject_id": [31, 31], "time": [T(2031, 5, 3), T(2031, 5, 5)], "code": ["LAB//2", "LAB//4"]}
    second = {"subject_id": [31] * 3, "time": [T(2031, 5, 2), T(2031, 5, 4), T(2031, 5, 3)],
              "code": ["LAB//1", "LAB//3", "LAB//2"]}  # fmt: skip
    rows = all_readers(folder_of(tmp_path / "d", first, second), tmp_path)
    assert [code for _, _, code, _ in rows] == ["LAB//1", "LAB//2", "LAB//3", "LAB//4"]


def test_files_that_are_not_read_are_named_and_stop_nothing(tmp_path):
    path = folder_of(tmp_path / "d", {"subject_id": [7], "time": [T(2031, 5, 2)], "code": ["LAB//a"]})
    (path / "data" / "._0.parquet").write_bytes(b"\0\5\26\7")
    (path / "data" / "1.parquet.gz").write_bytes(b"x")
    (path / "_SUCCESS").write_text("")
    (path / "notes.txt").write_text("by hand")
    events, report = load_events(path)
    assert events.height == 1
    assert sorted(report.files_not_read) == ["_SUCCESS", "data/._0.parquet", "data/1.parquet.gz", "notes.txt"]
    assert (
        prepare_dataset(path, tmp_path / "p", engine=get_engine(num_workers=1)).conversion.files_not_read.total() == 4
    )


# -- no foreign panics -------------------------------------------------------------------------------------------------

FAULTY_EVENTS = [
    ({"time": pl.Series([10**18], dtype=pl.Int64).cast(pl.Datetime("us"))}, "row 0.*outside the years 1 to 9999"),
    ({"time": pl.Series([-(10**17)], dtype=pl.Int64).cast(pl.Datetime("us"))}, "row 0.*outside the years 1 to 9999"),
    ({"time": ["0000-05-02"]}, "row 0.*no such year"),
    ({"time": ["0000-05-02T09:00:00Z"]}, "row 0"),
    ({"time": ["2031-05-02T09:00:00+99:99"]}, "row 0"),
    ({"time": [b"2031"]}, "time.*Binary"),
    ({"time": [True]}, "time.*Boolean"),
]


@pytest.mark.parametrize(("columns", "message"), FAULTY_EVENTS)
def test_times_that_no_calendar_has_are_one_error_by_row(columns, message):
    with pytest.raises(ValueError, match=message):
        validate_events(pl.DataFrame({"subject_id": [1], "code": ["LAB//a"], **columns}), source="a table")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["true", "False", " TRUE "], [True, False, True]),
        (["1", "0", "1"], [True, False, True]),
        ([1, 0, 1], [True, False, True]),
        ([1.0, 0.0, 1.0], [True, False, True]),
        ([True, False, True], [True, False, True]),
    ],
)
def test_labels_in_words_or_numbers_are_read(values, expected):
    labels = {"subject_id": [1, 2, 3], "prediction_time": ["2031-05-02T09:00"] * 3, "boolean_value": values}
    assert validate_labels(labels)["boolean_value"].to_list() == expected


@pytest.mark.parametrize("values", [["maybe", "true"], [2, 1], [0.5, 1.0], [date(2031, 5, 2)] * 2, [[True], [False]]])
def test_labels_that_say_neither_are_refused_by_column_and_row(values):
    labels = {"subject_id": [1, 2], "prediction_time": ["2031-05-02T09:00"] * 2, "boolean_value": values}
    with pytest.raises(ValueError, match="boolean_value"):
        validate_labels(labels)

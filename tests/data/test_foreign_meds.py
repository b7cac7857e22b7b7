"""MEDS files as other converters write them: read alike by every reader, and what each spelling means."""

from datetime import UTC, date, datetime

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


# -- what OMOP's exports call things -----------------------------------------------------------------------------------

IN, OUT, AGAIN, LATER, LEFT = T(2031, 5, 2, 9), T(2031, 5, 8, 11), T(2031, 7, 2, 9), T(2031, 7, 3, 9), T(2031, 7, 8, 11)


@pytest.mark.parametrize("prefix", ["Visit/", "Visit//", "VISIT//", "visit_occurrence/"])
@pytest.mark.parametrize(
    ("name", "of_class"),
    [
        ("9201", "IMP"),  # Inpatient Visit
        ("262", "IMP"),  # Emergency Room and Inpatient Visit
        ("8717", "IMP"),  # Inpatient Hospital
        ("IP", "IMP"),
        ("Inpatient Visit", "IMP"),
        ("9203", "EMER"),  # Emergency Room Visit
        ("9202", "AMB"),  # Outpatient Visit
        ("32037", "ICU"),  # Intensive Care
        ("581476", "HH"),  # Home Visit
        ("5083", "VR"),  # Telehealth
    ],
)
def test_a_visit_of_omop_is_known_by_its_code_its_concept_id_and_its_name(prefix, name, of_class, tmp_path):
    columns = {"subject_id": [7], "time": [IN], "code": [prefix + name], "visit_id": [5], "end": [OUT]}
    rows = all_readers(folder_of(tmp_path / "d", columns), tmp_path)
    assert [row[2] for row in rows] == [prefix + name, f"VISIT_END//{of_class}"]


def test_a_visit_of_omop_that_is_not_known_is_named_and_counted(tmp_path):
    columns = {"subject_id": [7] * 3, "time": [IN, AGAIN, LATER], "code": ["Visit/IP", *["Visit/OMOP4822036"] * 2]}
    _, report = load_events(folder_of(tmp_path / "d", columns))
    unknown = {note: count for note, count in report.notes.items() if "not known" in note}
    assert unknown == {"visits of kinds not known, read as AMB: Visit/OMOP4822036": 2}


@pytest.mark.parametrize(
    "code",
    ["SNOMED/419099009", "SNOMED//397709008", "DEATH", "Death/Deceased", "DEATH//hospital", "Death Type/EHR record"],
)
def test_a_death_under_a_plain_word_or_an_omop_code_is_a_death(code, tmp_path):
    columns = {
        "subject_id": [7] * 3,
        "time": [IN, OUT, T(2031, 5, 20)],
        "code": ["HOSPITAL_ADMISSION//X", "HOSPITAL_DISCHARGE//HOME", code],
    }
    rows = all_readers(folder_of(tmp_path / "d", columns), tmp_path)
    assert rows[-1][1:3] == (T(2031, 5, 20, **END_OF_DAY), "MEDS_DEATH")


@pytest.mark.parametrize(
    "code", ["DEATH_CERTIFICATE//1", "LAB//death", "Deathly Hallows", "DIAGNOSIS//SNOMED//419620001"]
)
def test_a_code_with_the_word_in_it_is_no_death(code, tmp_path):
    columns = {"subject_id": [7], "time": [IN], "code": [code]}
    assert load_events(folder_of(tmp_path / "d", columns))[0]["code"].to_list() == [code]


@pytest.mark.parametrize(
    "code",
    [
        "ICD10CM/I10", "ICD10CM//I10", "ICD10//I10", "ICD10GM/I10.00", "ICD10CN/I10.x00", "CIM10/I10", "KCD7/I10",
        "ICD9CM//401.9", "SNOMED/59621000", "SNOMED//38341003", "DIAGNOSIS//ICD10GM//I10.00",
    ],
)  # fmt: skip
def test_hypertension_is_found_in_every_spelling_of_its_vocabulary(code, tmp_path):
    columns = {
        "subject_id": [7] * 5,
        "time": [IN, OUT, AGAIN, LATER, LEFT],
        "code": ["HOSPITAL_ADMISSION//X", "HOSPITAL_DISCHARGE//HOME"] * 2 + [code],
        "hadm_id": [1, 1, 2, 2, 2],
    }
    columns["time"] = [IN, OUT, AGAIN, LEFT, LATER]
    events = read_meds(folder_of(tmp_path / "d", columns))
    labels = label_events(events, "hypertension", end_of_data="2034-01-01", progress=False).labels["hypertension"]
    assert labels["boolean_value"].to_list() == [True]


@pytest.mark.parametrize(("code", "unit", "low", "high"), [
    ("LOINC//2160-0", "mg/dL", 0.9, 2.4),
    ("LOINC//14682-9", "umol/L", 80.0, 210.0),
    ("LAB//LOINC//14682-9", "\u00b5mol\u00b7L\u207b\u00b9", 80.0, 210.0),
])  # fmt: skip
def test_a_kidney_injury_is_found_in_every_spelling_of_code_and_unit(code, unit, low, high, tmp_path):
    columns = {
        "subject_id": [7] * 4,
        "time": [IN, T(2031, 5, 3, 6), T(2031, 5, 4, 9), OUT],
        "code": ["HOSPITAL_ADMISSION//X", code, code, "HOSPITAL_DISCHARGE//HOME"],
        "numeric_value": [None, low, high, None],
        "unit": [None, unit, unit, None],
    }
    events = read_meds(folder_of(tmp_path / "d", columns))
    task = "acute_kidney_injury_48h"
    labels = label_events(events, task, end_of_data="2034-01-01", progress=False).labels[task]
    assert labels["boolean_value"].to_list() == [True]


def test_an_end_that_says_died_without_a_time_is_at_the_death(tmp_path):
    columns = {
        "subject_id": [7] * 3,
        "time": [IN, None, T(2031, 5, 10, 4)],
        "code": ["VISIT_START//IMP", "VISIT_END//DIED", "MEDS_DEATH"],
        "visit_id": ["3", "3", None],
    }
    events = read_meds(folder_of(tmp_path / "d", columns))
    for task in ("hospital_mortality_24h", "long_stay_7d"):
        labels = label_events(events, task, end_of_data="2034-01-01", progress=False).labels[task]
        assert labels["boolean_value"].to_list() == [True]


# -- what a library would raise in its own way -------------------------------------------------------------------------


def test_times_as_text_without_a_zone_are_read_as_utc_and_counted(tmp_path):
    times = ["2031-05-02T09:00:00", "2031-05-02T09:00:00+02:00", "2031-05-02", "2031-05-02 09:00:00Z", None]
    columns = {"subject_id": [7] * 5, "time": times, "code": list("abcde")}
    events, report = load_events(folder_of(tmp_path / "d", columns))
    assert dict(events.select("code", "time").rows())["a"] == T(2031, 5, 2, 9)
    assert report.notes["times as text that state no zone, read as UTC"] == 1


@pytest.mark.parametrize("zone", ["+05:30", "-07:00", "Mars/Base", "UTC", "Europe/Berlin"])
def test_a_time_is_read_whatever_its_column_calls_the_zone(zone, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    time = pa.array([int(IN.replace(tzinfo=UTC).timestamp()) * 1_000_000], pa.timestamp("us", zone))
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"subject_id": [7], "time": time, "code": ["a"]}), tmp_path / "data" / "0.parquet")
    assert load_events(tmp_path)[0]["time"].to_list() == [IN]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"hadm_id": [1e300]}, "'visit_id' holds 1e\\+300 in row 0; expected whole"),
        ({"hadm_id": [float("inf")]}, "'visit_id' holds inf in row 0"),
        ({"hadm_id": [1.5]}, "'visit_id' holds 1.5 in row 0"),
        ({"text_value": [b"\xff\xfe"]}, "'text_value' holds Binary, which cannot be read as String"),
        (
            {"time": pl.Series([2**62], dtype=pl.Int64).cast(pl.Datetime("ms"))},
            "row 0: the time lies 4611686018427387904",
        ),
    ],
)
def test_what_cannot_be_read_is_one_error_with_file_column_and_row(columns, message, tmp_path):
    path = folder_of(tmp_path / "d", {"subject_id": [7], "time": [IN], "code": ["a"], **columns})
    with pytest.raises(ValueError, match=rf"0\.parquet: column .*{message}|0\.parquet.*{message}"):
        load_events(path)


def test_a_visit_id_that_is_no_number_is_none(tmp_path):
    columns = {"subject_id": [7, 7], "time": [IN, OUT], "code": ["a", "b"], "hadm_id": [float("nan"), 71.0]}
    assert load_events(folder_of(tmp_path / "d", columns))[0]["visit_id"].to_list() == [None, "71"]


def test_a_file_whose_name_has_brackets_is_that_file(tmp_path):
    pl.DataFrame({"subject_id": [7], "time": [IN], "code": ["a"]}).write_parquet(tmp_path / "a[1].parquet")
    assert load_events(tmp_path / "a[1].parquet")[0].height == 1

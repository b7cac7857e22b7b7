"""Reading MEDS datasets of any origin."""

from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from ehrseq.data import load_events, read_meds
from ehrseq.data.meds import read_meds_with_report

NOON = datetime(2020, 1, 1, 12)


def frame(**columns):
    return pl.DataFrame({"subject_id": [1, 1], "time": [None, NOON], "code": ["GENDER//F", "A"], **columns})


def test_the_mimic_demo(ehr_data):
    path = ehr_data / "mimic-iv-demo-meds" / "0.0.1"
    events, report = read_meds_with_report(path)
    # From the data's own description: 916,166 events, 100 subjects (80, 10, 10), 31 deaths, 275 admissions.
    assert events.height + report.duplicates_dropped == 916_166
    assert report.subjects == 100
    assert report.source_splits["split"].value_counts().sort("split").rows() == [
        ("held_out", 10),
        ("train", 80),
        ("tuning", 10),
    ]
    assert (events["code"] == "MEDS_DEATH").sum() == 31
    admissions = events.filter(pl.col("code").str.starts_with("HOSPITAL_ADMISSION"))
    assert admissions.height == 275
    assert admissions["visit_id"].n_unique() == 275  # hadm_id
    raw = pl.read_parquet(path / "data" / "train" / "0.parquet", columns=["numeric_value", "hadm_id"])
    train = events.join(report.source_splits.filter(pl.col("split") == "train"), on="subject_id", how="semi")
    assert set(train["visit_id"].drop_nulls().unique()) == set(raw["hadm_id"].drop_nulls().cast(pl.String).unique())
    assert report.code_descriptions["DIAGNOSIS//ICD//10//I951"] == "Orthostatic hypotension"


@pytest.mark.parametrize(
    ("columns", "visit", "unit"),
    [
        ({}, None, None),
        ({"hadm_id": [None, 7]}, "7", None),
        ({"hadm_id": [None, 7.0]}, "7", None),
        ({"visit_id": [None, "v"], "hadm_id": [None, 7]}, "v", None),
        ({"visit_occurrence_id": [None, 8], "units": [None, "mg"]}, None, "mg"),
        ({"encounter_id": [None, "e"], "valueuom": [None, "mg"]}, "e", "mg"),
    ],
)
def test_columns_of_other_names(tmp_path, columns, visit, unit):
    frame(**columns).write_parquet(tmp_path / "x.parquet")
    row = read_meds(tmp_path / "x.parquet").row(1, named=True)
    assert row["visit_id"] == ("8" if "visit_occurrence_id" in columns else visit)
    assert row["unit"] == unit


def test_a_folder_of_files_with_different_columns(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "metadata").mkdir()
    frame().write_parquet(tmp_path / "data" / "train" / "1.parquet")
    other = frame(numeric_value=[None, 2.0], text_value=[None, "x"]).with_columns(subject_id=pl.lit(0))
    other.with_columns(pl.col("code").cast(pl.Categorical)).write_parquet(tmp_path / "data" / "2.parquet")
    frame().write_parquet(tmp_path / "metadata" / "codes.parquet")
    events = read_meds(tmp_path)
    assert events["subject_id"].to_list() == [0, 0, 1, 1]
    assert events["numeric_value"].to_list() == [None, 2.0, None, None]


def test_a_csv_file(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "subject_id,time,code,numeric_value\n2,2020-01-01T12:00:00,A,1.5\n1,,GENDER//F,\n1,2020-01-01 12:00:00,007,\n"
    )
    events = read_meds(path)
    assert events.select("subject_id", "time", "code", "numeric_value").rows() == [
        (1, None, "GENDER//F", None),
        (1, NOON, "007", None),
        (2, NOON, "A", 1.5),
    ]


def test_old_names_and_duplicates(tmp_path):
    pl.DataFrame({"patient_id": [1, 1], "timestamp": [NOON, NOON], "code": ["A", "A"]}).write_parquet(
        tmp_path / "x.parquet"
    )
    events, report = read_meds_with_report(tmp_path / "x.parquet")
    assert events.height == 1
    assert report.duplicates_dropped == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"a", "is not a MEDS file"),
        ("x.parquet", b"not parquet", "cannot be read as a MEDS table"),
        ("x.csv", b"a,b\n1,2\n", r"column\(s\) \['subject_id', 'time', 'code'\] are absent"),
        ("x.csv", b"subject_id,time,code\np1,2020-01-01,A\n", "column 'subject_id' must be Int64"),
        ("x.csv", b"subject_id,time,code\n1,soon,A\n", "'soon' is not a FHIR date"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_meds(tmp_path / name)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_meds(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no MEDS data"):
        read_meds(tmp_path)
    (tmp_path / "admissions.csv.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds neither FHIR .* nor MEDS .*\.csv\.gz.*MIMIC_IV_MEDS"):
        load_events(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_events(tmp_path / "none")


def test_a_foreign_death_at_midnight_is_known_to_the_day_and_moves_to_its_end(tmp_path: Path) -> None:
    midnight, exact = datetime(2020, 5, 1), datetime(2020, 5, 1, 14, 30)
    rows = pl.DataFrame(
        {
            "subject_id": [1, 1, 2],
            "time": [midnight, exact, exact],
            "code": ["MEDS_DEATH", "HOSPITAL_DISCHARGE//DIED", "MEDS_DEATH"],
        }
    )
    rows.write_parquet(tmp_path / "rows.parquet")
    events, report = read_meds_with_report(tmp_path / "rows.parquet")
    assert events["code"].to_list() == ["HOSPITAL_DISCHARGE//DIED", "MEDS_DEATH", "MEDS_DEATH"]
    assert events["time"].to_list() == [exact, datetime(2020, 5, 1, 23, 59, 59, 999_999), exact]
    assert report.notes["deaths known to the day"] == 1


def test_the_report_has_no_line_about_what_was_not_there(tmp_path: Path) -> None:
    rows = pl.DataFrame({"subject_id": [1], "time": [datetime(2020, 5, 1)], "code": ["LAB//1"]})
    rows.write_parquet(tmp_path / "rows.parquet")
    text = str(read_meds_with_report(tmp_path / "rows.parquet")[1])
    assert "events " in text
    assert not [line for line in text.splitlines() if line.endswith((" 0", " 0.0")) and "duplicates" not in line]
    assert "megabytes of text" not in text

"""The challenge's files as MEDS: every quirk of the real data, counted; every kind of bad input, named."""

import io
import tarfile
import zipfile
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from ehrseq.data import EventDataset, load_events, load_physionet2012
from ehrseq.data.physionet2012.codes import ADMISSION_TIME, TASK, VARIABLES
from ehrseq.data.schema import EVENT_SCHEMA, validate_events
from ehrseq.tasks.storage import read_labels

HEADER = "Time,Parameter,Value\n"
STATIC = "00:00,RecordID,{id}\n00:00,Age,54\n00:00,Gender,0\n00:00,Height,-1\n00:00,ICUType,4\n00:00,Weight,-1\n"
OUTCOMES = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n1,6,1,5,-1,0\n2,-1,8,-1,3,1\n"


def stay(number: int, *lines: str) -> str:
    return HEADER + STATIC.format(id=number) + "".join(line + "\n" for line in lines)


def write_set(folder: Path, *stays: str, outcomes: str | None = OUTCOMES) -> Path:
    target = folder / "set-x"
    target.mkdir()
    for number, text in enumerate(stays, 1):
        (target / f"{number}.txt").write_text(text, "utf-8")
    if outcomes is not None:
        (folder / "Outcomes-x.txt").write_text(outcomes, "utf-8")
    return target


def minutes(events: pl.DataFrame, code: str) -> list[tuple[int, float]]:
    rows = events.filter(pl.col("code") == code)
    return [
        ((time - ADMISSION_TIME) // timedelta(minutes=1), value)
        for time, value in rows[["time", "numeric_value"]].rows()
    ]


def test_a_stay_becomes_events_labels_and_outcomes(tmp_path):
    loaded = load_physionet2012(write_set(tmp_path, stay(1, "00:07,HR,73", "47:59,pH,7.5"), stay(2, "01:30,HR,80")))
    events = loaded.events
    assert dict(events.schema) == dict(EVENT_SCHEMA)
    assert events.equals(validate_events(events))
    first = events.filter(pl.col("subject_id") == 1)
    assert first["code"].to_list() == [
        "DEMOGRAPHIC//PHYSIONET2012//Age",
        "DEMOGRAPHIC//PHYSIONET2012//ICUType//4",
        "GENDER//F",
        "VISIT_START//ICU",
        "VITAL//PHYSIONET2012//HR",
        "LAB//PHYSIONET2012//pH",
    ]
    assert first["numeric_value"].to_list()[0] == 54
    assert first["time"].null_count() == 3
    assert minutes(first, VARIABLES["pH"]) == [(47 * 60 + 59, pytest.approx(7.5))]
    assert first["unit"].to_list() == ["a", None, None, None, "bpm", "[pH]"]
    assert loaded.labels.rows() == [
        (1, ADMISSION_TIME + timedelta(hours=48), False),
        (2, ADMISSION_TIME + timedelta(hours=48), True),
    ]
    assert loaded.outcomes.rows() == [(1, "set-x", 6, 1, 5, None, 0), (2, "set-x", None, 8, None, 3, 1)]


def test_every_quirk_is_counted(tmp_path):
    text = stay(
        1,
        "00:07,HR,73",
        "00:07,HR,73.0",  # the same value again
        "00:07,HR,75",  # another value at the same minute
        "00:05,HR,70",  # earlier than the line before
        "01:00,,5",  # empty parameter
        "01:00,Foo,5",  # unknown parameter
        "01:00,Temp,-17.8",  # negative
        "01:00,Weight,-1",
        "01:00,pH,735",  # an outlier
        "01:00,K,",  # no value
        "01:00,K,nan",
        "01:00,Age,55",  # a second age
        "49:00,Na,140",  # beyond 48 hours
        "",
    )
    loaded = load_physionet2012(write_set(tmp_path, text, stay(2).replace("Gender,0", "Gender,7")))
    report = loaded.report
    assert dict(report.skipped) == {
        "Height missing (-1)": 2,
        "Weight missing (-1)": 3,
        "negative Temp": 1,
        "unknown parameter Foo": 1,
        "rows with an empty Parameter": 1,
        "rows without a value": 1,
        "values that are NaN or infinite": 1,
        "further values of a static parameter": 1,
        "Gender of unknown meaning": 1,
    }
    assert report.duplicates_dropped == 1
    assert {key: count for key, count in report.notes.items() if count} == {
        "RecordID rows": 2,
        "blank lines": 1,
        "further values of a parameter at one minute, kept": 1,
        "rows earlier than the one before them, sorted": 1,
        "rows later than 48 hours after admission, kept": 1,
        "stays without time series": 1,
        "values beyond physiology, kept: pH": 1,
    }
    assert minutes(loaded.events, VARIABLES["HR"]) == [(5, 70.0), (7, 73.0), (7, 75.0)]
    assert loaded.events["subject_id"].n_unique() == report.subjects == 2
    assert report.events_written == loaded.events.height


def test_without_outcomes_there_are_events_and_a_warning(tmp_path, caplog):
    import logging

    with caplog.at_level(logging.WARNING):
        loaded = load_physionet2012(write_set(tmp_path, stay(1, "00:07,HR,73"), outcomes=None))
    assert loaded.labels.is_empty()
    assert loaded.events.height > 0
    assert loaded.outcomes["in_hospital_death"].to_list() == [None]
    assert loaded.report.notes["stays without outcomes"] == 1


@pytest.mark.parametrize("ending", [".tar.gz", ".tar", ".zip"])
def test_archives_give_what_the_folder_gives(tmp_path, ending):
    folder = write_set(tmp_path, stay(1, "00:07,HR,73"), stay(2, "01:30,HR,80"))
    archive = tmp_path / f"set-x{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(archive, "w") as opened:
            for file in folder.iterdir():
                opened.write(file, f"set-x/{file.name}")
    else:
        with tarfile.open(archive, "w:gz" if ending == ".tar.gz" else "w") as opened:
            opened.add(folder, "set-x")
    for given in (archive, folder):
        events, report = load_events(given)
        assert report.format == "physionet2012"
        assert events.equals(load_physionet2012(folder).events)
    assert load_physionet2012(archive).outcomes.equals(load_physionet2012(folder).outcomes)


def test_line_ends_marks_and_names_do_not_matter(tmp_path):
    (tmp_path / "stay.txt").write_bytes(b"\xef\xbb\xbf" + stay(7, "00:07,HR,73").strip().replace("\n", "\r\n").encode())
    (tmp_path / "readme.txt").write_text("not a stay", "utf-8")
    loaded = load_physionet2012(tmp_path)
    assert loaded.events["subject_id"].unique().to_list() == [7]
    assert minutes(loaded.events, VARIABLES["HR"]) == [(7, 73.0)]
    assert loaded.report.notes["other text files, not read"] == 1


def test_the_dataset_is_written_whole(tmp_path):
    folder = write_set(tmp_path, stay(1, "00:07,HR,73"), stay(2, "01:30,HR,80"))
    loaded = load_physionet2012(folder)
    dataset = loaded.write(tmp_path / "out", splits=loaded.splits_by_set())
    assert dataset.events("set-x").equals(loaded.events)
    assert read_labels(dataset.path)[TASK].equals(loaded.labels)
    assert pl.read_parquet(dataset.path / "metadata" / "outcomes.parquet").equals(loaded.outcomes)
    assert dataset.metadata["conversion_report"]["skipped"]["Height missing (-1)"] == 2
    assert "Heart rate" in dataset.codes["description"].to_list()
    with pytest.raises(ValueError, match="overwrite=True"):
        loaded.write(tmp_path / "out")
    loaded.write(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert isinstance(dataset, EventDataset)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (stay(1, "00:07,HR"), r"1\.txt, line 8: got '00:07,HR'; expected Time,Parameter,Value"),
        (stay(1, "00:07,HR,7,3", "00:07,HR"), r"line 8: got '00:07,HR,7,3'"),
        (stay(1, "00:07,HR,73", "7am,HR,73"), r"line 9: got '7am'; expected HH:MM"),
        (stay(1, "00:61,HR,73"), r"line 8: got '00:61'"),
        (stay(1, "-1:00,HR,73"), r"line 8: got '-1:00'"),
        (stay(1, "00:07,HR,high"), r"line 8: got 'high'; expected a number"),
        ("", r"line 1: got ''; expected the header"),
        (HEADER.replace("Time", "Hour"), r"line 1: got 'Hour,Parameter,Value'; expected the header"),
        (stay(2), r"its RecordID row says 2; expected 1"),
        (stay(1, "00:00,RecordID,2"), r"line 8: got RecordID 2; expected one whole number"),
        (stay(1, "00:00,RecordID,1.5"), r"line 8: got RecordID 1\.5"),
    ],
)
def test_malformed_stays_name_file_and_line(tmp_path, text, error):
    with pytest.raises(ValueError, match=error):
        load_physionet2012(write_set(tmp_path, text))


def test_no_text_is_named_too(tmp_path):
    folder = write_set(tmp_path, stay(1))
    (folder / "1.txt").write_bytes(stay(1).encode() + b"00:07,H\xff,73\n")
    with pytest.raises(ValueError, match=r"line 8: .*expected UTF-8"):
        load_physionet2012(folder)


def test_malformed_lines_can_be_skipped_and_are_counted(tmp_path):
    text = stay(1, "00:07,HR", "7am,HR,73", "00:08,HR,high", "00:09,HR,74")
    loaded = load_physionet2012(write_set(tmp_path, text), on_error="skip")
    assert loaded.report.skipped["malformed lines"] == 3
    assert len(loaded.report.errors) == 3
    assert minutes(loaded.events, VARIABLES["HR"]) == [(9, 74.0)]


@pytest.mark.parametrize(
    ("outcomes", "error"),
    [
        ("RecordID,SOFA\n1,2\n", r"lacks the column\(s\) \['In-hospital_death'\]"),
        (OUTCOMES + "3,1,1,1,1,2\n", r"line 4: In-hospital_death got '2'; expected 0 or 1"),
        (OUTCOMES + "3,1,x,1,1,1\n", r"line 4: SOFA got 'x'; expected a whole number"),
        (OUTCOMES + "1,1,1,1,1,1\n", r"RecordID 1 has several rows"),
    ],
)
def test_bad_outcomes(tmp_path, outcomes, error):
    with pytest.raises(ValueError, match=error):
        load_physionet2012(write_set(tmp_path, stay(1), outcomes=outcomes))


def test_other_bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="does not exist"):
        load_physionet2012(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no stays"):
        load_physionet2012(tmp_path / "empty")
    with pytest.raises(ValueError, match="on_error"):
        load_physionet2012(tmp_path, on_error="ignore")
    with pytest.raises(ValueError, match="no outcomes file"):
        load_physionet2012(write_set(tmp_path, stay(1)), outcomes=tmp_path / "absent.txt")
    (tmp_path / "empty" / "1.txt").write_text(stay(1), "utf-8")
    (tmp_path / "empty" / "again").mkdir()
    (tmp_path / "empty" / "again" / "1.txt").write_text(stay(1), "utf-8")
    with pytest.raises(ValueError, match=r"RecordID 1 stands in .*give every stay once"):
        load_physionet2012(tmp_path / "empty")


def test_damaged_archives(tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as opened:
        for number in range(200):
            content = stay(number, *(f"00:{minute:02d},HR,{number * minute % 97}" for minute in range(60))).encode()
            info = tarfile.TarInfo(f"set-x/{number}.txt")
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    whole = packed.getvalue()
    for name, content in {
        "cut.tar.gz": whole[: len(whole) // 2],
        "noise.tar.gz": b"noise" * 100,
        "flipped.tar.gz": whole[:5000] + b"\xff" * 50 + whole[5050:],
        "noise.zip": b"PK noise",
        "empty.tar.gz": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as an archive"):
            load_physionet2012(tmp_path / name)


def test_the_real_sets(ehr_data):
    loaded = load_physionet2012(ehr_data / "physionet2012")
    report = loaded.report
    # From the data's own description.
    assert report.subjects == 8000
    deaths = loaded.outcomes.group_by("set").agg(pl.col("in_hospital_death").sum()).sort("set").rows()
    assert deaths == [("set-a", 554), ("set-b", 568)]
    assert report.notes["RecordID rows"] == 8000
    measured = loaded.events.filter(pl.col("code").is_in(list(VARIABLES.values())))
    with_series = set(measured["subject_id"].unique())
    assert not {140501, 140936, 141264, 142731, 142998, 145611, 147514, 150309, 150649} & with_series
    assert report.notes["stays without time series"] == 9
    # Every row of the files is an event, or counted (rows in the description: 1,757,980 and 1,762,535).
    rows = loaded.events.height - 8000 + sum(report.skipped.values()) + report.duplicates_dropped + 8000
    assert rows == 1_757_980 + 1_762_535
    assert measured.height == 3_515_969 - loaded.events.filter(~pl.col("code").is_in(list(VARIABLES.values()))).height
    per_stay = measured.group_by("subject_id").len()["len"]
    assert per_stay.median() == 424
    assert per_stay.max() == 1497

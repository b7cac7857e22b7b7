"""Codes that mean an admission or a death and are not read so: which ones, and that everybody who labels says it."""

import json
import logging
from datetime import datetime

import polars as pl
import pytest

from ehrseq.data import EventDataset, load_events, read_fhir, write_dataset
from ehrseq.data.fhir.death_words import DEAD, DEATH_WORDS, says_death
from ehrseq.data.fhir.dispositions import DEATH_CODES
from ehrseq.data.unread_codes import (
    SNOMED_DEATHS,
    UNREAD_DEATHS,
    deathlike_codes,
    looks_like_death,
    unread_deaths,
    without_admissions,
)
from ehrseq.prepare import prepare_dataset
from ehrseq.stats.counting import count_dataset
from ehrseq.tasks import label_events
from ehrseq.tasks.shards import label_dataset
from ehrseq.tokenization.ehr_codes import DEFAULT_CODE_MAP
from ehrseq.work.engine import get_engine
from tests.data.fhir.samples import concept, encounter, observation, patient, write_ndjson

T = datetime
ONE = get_engine(num_workers=1)
END = "2034-01-01"
LIKE_A_DEATH = "Codes look like the death of a patient"
NO_ADMISSION = "No code is an admission to hospital"

# Codes that the reader of MEDS takes to be a death, whoever wrote them.
READ = [
    *("DEATH", "Death", "death", "meds_death", "Meds_Death", "MEDS-DEATH", "meds death"),
    *("SNOMED/397709008", "SNOMED//397709008", "SNOMED/419099009", "SNOMED//16983000", "SNOMED/371828006"),
    *("Death Type/OMOP4810", "Death Type/OMOP generated"),
]
# Codes that are named, counted and warned about.
NAMED = [
    *("DEATH//HOSP", "DEATH//ICU", "Death/Hospital", "DEATH//CAUSE//I21", "CAUSE_OF_DEATH//I21", "HOSP//DEATH"),
    *("DATE_OF_DEATH", "DeathDate", "death_datetime", "DOD", "deathtime", "DIED", "PASSED_AWAY", "Deceased"),
    *("EXPIRED//HOSP", "VITAL_STATUS//DEAD", "OUTCOME//DEATH", "IN_HOSPITAL_DEATH", "PRONOUNCED_DEAD", "[DEATH]"),
    *("hospital_expire_flag", "Exitus", "verstorben", "Décès", "OVERLEDEN//ZIEKENHUIS", "óbito"),
    *("OBSERVATION//SNOMED//397709008", "SNOMED-CT|419099009", "sct/419620001"),
]  # fmt: skip
# Codes with a word of death that say nothing of the patient's.
OTHERS = [
    *("DIAGNOSIS//ICD10CM//R99", "DIAGNOSIS//SNOMED//419620001", "DIAGNOSIS//Sudden death", "ICD10CM/I46.1"),
    *("BRAIN_DEATH_EXAM", "EXAM//BRAIN//DEATH", "FAMILY_HISTORY//DEATH", "MOTHER_DIED", "DEATH//MOTHER", "FETAL_DEATH"),
    *("DEATH//CERTIFICATE", "DEATH//PENDING", "DEAD//CELL"),
    *("DEATH_CERTIFICATE", "DEATH_NOTE", "RISK_OF_DEATH", "FEAR//DEATH", "PREDICTED//DEATH"),
    *("NOT_DEAD", "VITAL_STATUS//ALIVE", "DEATH//NO", "DEATH_FLAG//0", "EXPIRED//FALSE", "Dead Sea", "DEADSPACE"),
    *("ADVANCE_DIRECTIVE//DEATH", "EXPIRED_TIDAL_VOLUME", "expired CO2"),
    *("INSURANCE//EXPIRED", "ORDER//EXPIRED", "SOFA//mortality", "LAB//dead cells"),
    *("SNOMED/399166001", "SNOMED/38341003", "HOSPITAL_DISCHARGE//HOME", "MEDS_DEATH//HOSP", "VISIT_END//exp", ""),
]  # fmt: skip


def stay_rows(subject, *more):
    """A stay of some days, and more rows."""
    return [
        (subject, T(2031, 5, 2, 9), "HOSPITAL_ADMISSION//X", "a"),
        (subject, T(2031, 5, 8, 13), "HOSPITAL_DISCHARGE//HOME", "a"),
        *((subject, time, code, None) for time, code in more),
    ]


def table_of(rows, **more):
    events = pl.DataFrame(rows, schema=["subject_id", "time", "code", "visit_id"], orient="row")
    return events.with_columns(pl.Series(name, values) for name, values in more.items())


def export_of(path, *resources):
    """A FHIR export of these resources."""
    path.mkdir()
    write_ndjson(path / "records.ndjson", *resources)
    return path


def folder_of(path, events):
    (path / "data").mkdir(parents=True)
    events.write_parquet(path / "data" / "0.parquet")
    return path


# -- which codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [*NAMED, "DEATH", "meds_death", "SNOMED/397709008"])
def test_a_code_that_names_the_patients_death_looks_like_one(code):
    assert looks_like_death(code)
    assert deathlike_codes([code]) == [code]
    assert deathlike_codes([code], [[".*", "other"], *DEFAULT_CODE_MAP]) == []  # whoever names it, has decided


@pytest.mark.parametrize("code", OTHERS)
def test_a_code_that_says_something_else_does_not(code):
    assert deathlike_codes([code]) == []


@pytest.mark.parametrize("language", DEATH_WORDS)
def test_a_word_of_death_of_every_language_is_seen_in_a_code(language):
    for word in DEATH_WORDS[language]:
        for code in (word, word.upper().replace(" ", "_"), f"{word}//x", f"EVENT//{word}"):
            if says_death(word) == DEAD:
                assert looks_like_death(code), code


def test_the_snomed_codes_of_rows_are_among_those_of_dispositions():
    assert DEATH_CODES["http://snomed.info/sct"] > SNOMED_DEATHS


# -- codes that are read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", READ)
def test_a_death_by_another_name_is_a_death_for_every_reader(code, tmp_path, caplog):
    path = folder_of(tmp_path / "d", table_of(stay_rows(7, (T(2031, 5, 18), code))))
    events, report = load_events(path)
    assert EventDataset(path).events().equals(events)
    prepare_dataset(path, tmp_path / "p", engine=ONE)
    assert EventDataset(tmp_path / "p").events().equals(events)
    death = T(2031, 5, 18, 23, 59, 59, 999999)  # at midnight: known to the day
    assert events.filter(pl.col("time") == death)["code"].to_list() == ["MEDS_DEATH"]
    assert report.notes["births and deaths under other codes than those of today"] == 1
    labels = label_events(events, "mortality_30d", end_of_data=END).labels["mortality_30d"]
    assert labels["boolean_value"].to_list() == [True]
    assert LIKE_A_DEATH not in caplog.text


@pytest.mark.parametrize(
    ("code", "read"), [("meds_birth", "MEDS_BIRTH"), ("MEDS BIRTH", "MEDS_BIRTH"), ("BIRTH", "BIRTH")]
)
def test_a_birth_by_another_name_is_one_where_it_is_clear(code, read, tmp_path):
    path = folder_of(tmp_path / "d", table_of([(7, T(1950, 3, 2, 9), code, None)]))
    assert load_events(path)[0]["code"].to_list() == [read]


@pytest.mark.parametrize(
    ("value", "text", "dead"),
    [(None, None, True), (1.0, None, True), (0.0, None, False), (None, "no", False), (None, "False ", False),
     (None, "yes", True), (None, "2031-05", True)],
)  # fmt: skip
def test_a_flag_of_death_that_says_no_is_none_and_nothing_is_said_of_it(value, text, dead, tmp_path, caplog):
    rows = stay_rows(7, (None, "DEATH"))
    columns = {"numeric_value": [None, None, value], "text_value": [None, None, text]}
    path = folder_of(
        tmp_path / "d", table_of(rows, **columns).cast({"numeric_value": pl.Float32, "text_value": pl.String})
    )
    events, report = load_events(path)
    assert ("MEDS_DEATH" in events["code"]) is dead
    assert not [note for note in report.notes if note.startswith(UNREAD_DEATHS)]
    prepare_dataset(path, tmp_path / "p", engine=ONE)
    label_dataset(tmp_path / "p", "mortality_30d", end_of_data=END, engine=ONE)
    assert LIKE_A_DEATH not in caplog.text


@pytest.mark.parametrize("kind", ["other", "ignore", "diagnosis"])
def test_a_code_that_the_user_names_is_left_as_it_is(kind, tmp_path, caplog):
    path = folder_of(tmp_path / "d", table_of(stay_rows(7, (T(2031, 5, 18), "DEATH"))))
    prepare_dataset(path, tmp_path / "p", engine=ONE, code_map=[["DEATH$", kind]])
    assert "DEATH" in EventDataset(tmp_path / "p").events()["code"]
    label_dataset(tmp_path / "p", "mortality_30d", end_of_data=END, engine=ONE)
    assert LIKE_A_DEATH not in caplog.text


@pytest.mark.parametrize(
    ("time", "moved"), [(T(2031, 5, 18), T(2031, 5, 18, 23, 59, 59, 999999)), (T(9999, 12, 31), None)]
)
def test_a_death_of_the_users_own_code_is_mended_like_one_of_meds(time, moved, tmp_path):
    path = folder_of(tmp_path / "d", table_of(stay_rows(7, (time, "ADT//A03//20"))))
    prepare_dataset(path, tmp_path / "p", engine=ONE, code_map=[["ADT//A03//20$", "death"]])
    events = EventDataset(tmp_path / "p").events()
    assert events.filter(pl.col("code") == "ADT//A03//20")["time"].to_list() == [moved]


# -- codes that are named ----------------------------------------------------------------------------------------------


def hospital():
    """Four patients: two of whom `HOSP//DEATH` alone tells the death, one with a death beside it, one who lives."""
    dead = (T(2031, 5, 18, 6), "HOSP//DEATH")
    return table_of(
        [
            *stay_rows(1, dead, dead),
            *stay_rows(2, dead, (T(2031, 5, 18, 6), "DATE_OF_DEATH")),
            *stay_rows(3, dead, (T(2031, 5, 18, 6), "MEDS_DEATH")),
            *stay_rows(4, (T(2031, 5, 18, 6), "FAMILY_HISTORY//DEATH")),
        ]
    )


EXPECTED = {f"{UNREAD_DEATHS}HOSP//DEATH": 2, f"{UNREAD_DEATHS}DATE_OF_DEATH": 1}


def test_patients_are_counted_of_whom_nothing_else_says_that_they_died():
    events = hospital()
    assert unread_deaths(events.lazy(), events["code"].unique()) == EXPECTED
    assert list(unread_deaths(events.lazy(), events["code"].unique())) == list(EXPECTED)  # the commonest first
    expired = events.with_columns(pl.col("code").replace({"HOSPITAL_DISCHARGE//HOME": "HOSPITAL_DISCHARGE//DIED"}))
    assert unread_deaths(expired.lazy(), expired["code"].unique()) == {}
    categories = events.cast({"code": pl.Categorical}).lazy()
    assert unread_deaths(categories, events["code"].unique()) == EXPECTED


def test_a_death_that_nobody_reads_is_named_counted_and_warned_about_by_everybody(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    path = folder_of(tmp_path / "d", hospital())

    def said():
        text = [record.message for record in caplog.records if LIKE_A_DEATH in record.message]
        caplog.clear()
        assert len(text) == 1
        assert "HOSP//DEATH (2 patients), DATE_OF_DEATH (1 patients)." in text[0]
        assert "--code-map 'HOSP//DEATH$=death'" in text[0]
        return True

    events, report = load_events(path)
    assert {note: n for note, n in report.notes.items() if note.startswith(UNREAD_DEATHS)} == EXPECTED
    result = label_events(events, "mortality_30d", end_of_data=END)
    assert said()
    assert f"{UNREAD_DEATHS}HOSP//DEATH: 2" in str(result)
    prepared = prepare_dataset(path, tmp_path / "p", engine=ONE).conversion
    assert said()
    assert {note: n for note, n in prepared.notes.items() if note.startswith(UNREAD_DEATHS)} == EXPECTED
    assert f"{UNREAD_DEATHS}HOSP//DEATH" in (tmp_path / "p" / "metadata" / "conversion_report.json").read_text()
    by_file = label_dataset(tmp_path / "p", "mortality_30d", end_of_data=END, engine=ONE)
    assert said()
    assert {note: n for note, n in by_file.notes.items() if note.startswith(UNREAD_DEATHS)} == EXPECTED
    count_dataset(tmp_path / "p", engine=ONE)
    assert said()


@pytest.mark.parametrize("where", ["prepare", "metadata", "label_events"])
def test_each_of_the_three_ways_to_map_it_makes_it_a_death(where, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    path = folder_of(tmp_path / "d", hospital().filter(pl.col("code") != "DATE_OF_DEATH"))
    pair = ["HOSP//DEATH$", "death"]
    if where == "prepare":
        prepare_dataset(path, tmp_path / "p", engine=ONE, code_map=[pair])
        caplog.clear()
        result = label_dataset(tmp_path / "p", "mortality_30d", end_of_data=END, engine=ONE)
    elif where == "metadata":
        prepare_dataset(path, tmp_path / "p", engine=ONE)
        caplog.clear()
        file = tmp_path / "p" / "metadata" / "dataset.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"code_map": [pair]}))
        result = label_dataset(tmp_path / "p", "mortality_30d", end_of_data=END, engine=ONE)
        count_dataset(tmp_path / "p", engine=ONE)
    else:
        events, _ = load_events(path)
        result = label_events(events, "mortality_30d", end_of_data=END, code_map=[pair, *DEFAULT_CODE_MAP])
    assert result.labels["mortality_30d"]["boolean_value"].to_list() == [True, True, True, False]
    assert LIKE_A_DEATH not in caplog.text


def test_a_dataset_that_somebody_else_wrote_into_splits_is_looked_at_too(tmp_path, caplog):
    path = tmp_path / "d"
    write_dataset(hospital(), path, dataset_name="d")
    (path / "metadata" / "dataset.json").write_text("{}")  # not ours: its list of codes may be any
    pl.DataFrame({"code": ["LAB//a"]}).write_parquet(path / "metadata" / "codes.parquet")
    label_dataset(path, "mortality_30d", end_of_data=END, engine=ONE)
    assert "HOSP//DEATH (2 patients)" in caplog.text


def test_an_observation_that_the_patient_died_is_named_where_fhir_says_no_more(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    patients = [patient("p"), patient("q", deceasedBoolean=True)]
    facts = [
        {
            **observation(),
            "id": f"o{who}",
            "category": [],
            "code": concept("397709008"),
            "subject": {"reference": f"Patient/{who}"},
        }
        for who in "pq"
    ]
    export_of(tmp_path / "f", *patients, *facts)
    _, report = read_fhir(tmp_path / "f", progress=False)
    (code,) = [note.removeprefix(UNREAD_DEATHS) for note in report.notes if note.startswith(UNREAD_DEATHS)]
    assert code.endswith("//SNOMED//397709008")
    assert report.notes[f"{UNREAD_DEATHS}{code}"] == 1
    prepare_dataset(tmp_path / "f", tmp_path / "p", engine=ONE)
    assert f"{code} (1 patients)" in caplog.text


# -- admissions: one notice a run --------------------------------------------------------------------------------------


def visits(*codes):
    return pl.DataFrame({"code": list(codes), "rows": [3] * len(codes)})


@pytest.mark.parametrize(
    ("codes", "notes", "parts"),
    [
        (["VISIT_START//IMP", "VISIT_START//7"], {}, None),
        (["VISIT_START//7"], {"encounters of classes not known: 7 (Kurzlieger)": 3},
         ["holds encounters but no admission", "7 (Kurzlieger): 3", "--encounter-class '7=IMP'"]),
        (["VISIT_START//7"], {}, ["holds encounters but no admission", "--code-map 'VISIT_START//7$=visit_start:IMP'"]),
        (["VISIT_START//AMB", "ED_REGISTRATION//X"], {}, ["nobody was admitted to a hospital here"]),
        (["VISIT_START//AMB", "ADMIT//WARD"], {}, ["visits: ADMIT//WARD (3 rows)", "'ADMIT//WARD$=visit_start:IMP'"]),
        (["LAB//a"], {}, ["No code looks like a visit at all"]),
    ],
)  # fmt: skip
def test_what_is_said_of_a_dataset_without_admissions(codes, notes, parts):
    text = without_admissions(visits(*codes), notes=notes)
    if parts is None:
        assert text == ""
    else:
        assert all(part in text for part in [NO_ADMISSION, *parts])


def test_no_admissions_of_a_fhir_export_are_one_warning_a_run(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    local = {"system": "https://hospital.example/class", "code": "7", "display": "Kurzlieger"}
    export_of(tmp_path / "f", patient(), encounter(**{"class": local}))

    def said():
        text = [record.message for record in caplog.records if NO_ADMISSION in record.message]
        caplog.clear()
        assert all("7 (Kurzlieger): 1" in line and "--encounter-class '7=IMP'" in line for line in text)
        return len(text)

    events, _ = load_events(tmp_path / "f", progress=False)
    label_events(events, "mortality_30d", end_of_data=END)
    assert said() == 1  # reading and labelling one table
    prepare_dataset(tmp_path / "f", tmp_path / "p", engine=ONE)
    assert said() == 1
    label_dataset(tmp_path / "p", "mortality_30d", end_of_data=END, engine=ONE)
    assert said() == 1
    count_dataset(tmp_path / "p", engine=ONE)
    assert said() == 1


def test_other_tables_are_warned_of_though_a_reader_has_spoken(tmp_path, caplog):
    export_of(tmp_path / "f", patient(), encounter(**{"class": {"code": "Kurzlieger-2"}}))
    read_fhir(tmp_path / "f", progress=False)
    caplog.clear()
    ward = table_of([(1, T(2031, 5, 2), "VISIT_START//ward 9", "a"), (1, T(2031, 5, 3), "VISIT_END//home", "a")])
    label_events(ward, "mortality_30d", end_of_data=END)
    label_events(ward, "mortality_30d", end_of_data=END)
    assert caplog.text.count(NO_ADMISSION) == 2


def test_a_fhir_export_without_encounters_is_read_in_silence(tmp_path, caplog):
    export_of(tmp_path / "f", patient())
    read_fhir(tmp_path / "f", progress=False)
    assert NO_ADMISSION not in caplog.text

"""Further records of the kinds that were once read wrong, from the file to the labels: other values, spellings,
systems, precisions, converters. The right answer follows from the standard or the calendar; each name says why.
"""

import json
from datetime import datetime

import polars as pl
import pytest

from ehrseq.data import load_events
from ehrseq.tasks import label_events
from tests.data.fhir.samples import bundle, encounter, observation, patient, resource

END = "2034-01-01"
UCUM = "http://unitsofmeasure.org"


def labels_of(path, task: str, **options) -> tuple[list[tuple[str, bool]], dict[str, int]]:
    """(time, label) and the reasons of what has none."""
    events, _ = load_events(path, progress=False, **options)
    result = label_events(events, task, end_of_data=END, progress=False)
    rows = [(str(time)[:16], label) for _, time, label in result.labels[task].iter_rows()]
    return rows, {reason: count for reason, count in result.report[task].items() if count}


def fhir(tmp_path, *resources) -> str:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(bundle(*resources)))
    return path


def meds(tmp_path, **columns) -> str:
    path = tmp_path / "record.parquet"
    pl.DataFrame(columns).write_parquet(path)
    return path


STAY = {"start": "2031-05-02T09:00:00Z", "end": "2031-05-08T13:00:00Z"}
T = datetime


# -- deaths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("why", "dead", "rows", "dropped"),
    [
        ("a year after the horizon: every day of it says no", {"deceasedDateTime": "2032"},
         [("2031-05-08 13:00", False)], {}),
        ("the month of the discharge", {"deceasedDateTime": "2031-05"}, [], {"death_time_unknown": 1}),
        ("the day after", {"deceasedDateTime": "2031-05-09"}, [("2031-05-08 13:00", True)], {}),
        ("in the evening of the last day, in another zone", {"deceasedDateTime": "2031-06-07T14:00:00+02:00"},
         [("2031-05-08 13:00", True)], {}),
        ("an hour beyond the horizon", {"deceasedDateTime": "2031-06-07T14:00:00Z"}, [("2031-05-08 13:00", False)], {}),
        ("alive, and said so", {"deceasedBoolean": False}, [("2031-05-08 13:00", False)], {}),
        ("masked", {"_deceasedDateTime": {"extension": [{
            "url": "http://hl7.org/fhir/StructureDefinition/data-absent-reason", "valueCode": "masked"}]}},
         [], {"death_time_unknown": 1}),
        ("a placeholder of a database", {"deceasedDateTime": "1900-01-01"}, [], {"death_time_unknown": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_death_gives_the_label_that_every_time_it_may_have_been_at_gives(why, dead, rows, dropped, tmp_path):
    path = fhir(tmp_path, patient(**dead), encounter(**STAY))
    assert labels_of(path, "mortality_30d") == (rows, dropped), why


@pytest.mark.parametrize("code", ["SNOMED//419620001", "SNOMED/419620001", "MEDS_DEATH", "MEDS_DEATH//hospital"])
def test_a_death_of_another_converter_is_one(code, tmp_path):
    path = meds(
        tmp_path,
        patient_id=[1, 1, 1],
        time=[T(2031, 5, 2, 9), T(2031, 5, 8, 13), T(2031, 5, 18)],
        code=["Visit/IP", "Visit/IP/end", code],
    )
    assert labels_of(path, "mortality_30d")[0] == [("2031-05-08 13:00", True)]


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end", ["2099-12-31", "2199-12-31T00:00:00Z", "9999-12-31T23:59:59Z", "1970-01-01", "0001-01-01"]
)
@pytest.mark.parametrize("status", ["finished", "in-progress"])
def test_an_end_that_cannot_be_meant_is_unknown_and_only_the_source_says_that_a_stay_goes_on(end, status, tmp_path):
    path = fhir(tmp_path, patient(), encounter(start=STAY["start"], end=end, status=status))
    rows, dropped = labels_of(path, "long_stay_7d")
    if status == "finished":
        assert (rows, dropped) == ([], {"no_discharge": 1})
    else:
        assert (rows, dropped) == ([("2031-05-03 09:00", True)], {})


@pytest.mark.parametrize("name", ["end", "end_time", "end_datetime", "visit_end_datetime"])
@pytest.mark.parametrize(
    ("end", "rows"),
    [
        (T(2031, 5, 4, 10), [("2031-05-03 09:00", False)]),
        (T(2031, 5, 20), [("2031-05-03 09:00", True)]),
        (T(2031, 5, 1), []),
        (T(2099, 12, 31), []),
        (T(9999, 12, 31), []),
    ],
)
def test_the_end_of_a_visit_in_a_column_is_its_discharge_unless_it_cannot_be_meant(name, end, rows, tmp_path):
    path = meds(
        tmp_path,
        subject_id=[1, 1],
        time=[T(2031, 5, 2, 9), T(2031, 8, 1)],
        code=["Visit//IP", "LAB//a"],
        visit_occurrence_id=[7, None],
        **{name: [end, None]},
    )
    assert labels_of(path, "long_stay_7d")[0] == rows


# -- dates and days ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "zone", "admissions"),
    [
        ("T23:30:00+02:00", "T23:50:00+02:00", None, 1),
        ("T08:00:00+09:00", "T20:00:00+09:00", None, 1),  # 23:00 UTC of the day before, and 11:00
        ("T01:00:00-05:00", "T23:00:00-05:00", None, 1),
        ("T22:00:00Z", "T22:30:00Z", "Asia/Tokyo", 1),  # both after midnight there
        ("T14:30:00Z", "T15:30:00Z", "Asia/Tokyo", 2),  # 23:30, and 00:30 of the next day
        ("T01:00:00", "T23:00:00", "America/Los_Angeles", 1),
        ("", "T23:00:00", None, 1),
    ],
)
def test_a_transfer_of_a_day_at_the_hospital_is_one_stay_in_every_zone(first, second, zone, admissions, tmp_path):
    offset = first[-6:] if first[-6:-5] in ("+", "-") else "Z" if first.endswith("Z") else ""
    path = fhir(
        tmp_path,
        patient(),
        encounter("a", f"2031-05-02T09:00:00{offset}", f"2031-05-10{first}"),
        encounter("b", f"2031-05-10{second}", f"2031-05-14T10:00:00{offset}"),
    )
    events, _ = load_events(path, progress=False, timezone=zone)
    notes = label_events(events, "readmission_30d", end_of_data=END, progress=False).notes
    assert notes["admissions"] == admissions


@pytest.mark.parametrize(
    ("start", "time", "dropped"),
    [
        ("2031-05-02", "2031-05-02T08:00:00Z", True),
        ("2031-05-02", "2031-05-02", True),
        ("2031-05-02", "2031-05-01T23:00:00Z", False),  # before the stay
        ("2031-05-02T09:00:00Z", "2031-05-02T08:00:00Z", False),
    ],
)
def test_a_value_of_the_day_of_admission_is_one_of_the_stay(start, time, dropped, tmp_path):
    def potassium(value, moment):
        quantity = {"value": value, "system": UCUM, "code": "mmol/L"}
        return observation("2823-3", time=moment, id=moment, valueQuantity=quantity)

    stay = encounter(start=start, end="2031-05-20T10:00:00Z")
    path = fhir(tmp_path, patient(), stay, potassium(6.4, time), potassium(4.0, "2031-05-04T06:00:00Z"))
    assert ("earlier_value" in labels_of(path, "hyperkalemia_48h")[1]) is dropped


# -- units -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "quantity", "label"),
    [
        (80, 210, {"unit": "micromol/L"}, True),
        (80, 210, {"unit": "\u00b5mol / l"}, True),
        (80, 210, {"unit": "\u03bcmol/L"}, True),
        (80, 210, {"unit": "nmol/mL"}, True),
        (80, 210, {"unit": "Mikromol", "system": UCUM, "code": "umol/L"}, True),
        (80, 100, {"unit": "umol/l"}, False),
        (0.9, 2.4, {"unit": "mg/100mL"}, True),
        (0.9, 2.4, {"unit": "mg%"}, True),
        (0.9, 2.4, {"unit": "MG/DL"}, True),
        (0.9, 1.1, {"unit": "mg/dl"}, False),
        (0.9, 1.2, {"unit": "mg/dL"}, True),
    ],
    ids=str,
)
def test_a_value_counts_in_every_spelling_of_its_unit(low, high, quantity, label, tmp_path):
    values = [
        observation("2160-0", id=f"o{n}", time=time, valueQuantity={"value": value, **quantity})
        for n, (time, value) in enumerate((("2031-05-02T12:00:00Z", low), ("2031-05-04T06:00:00Z", high)))
    ]
    path = fhir(tmp_path, patient(), encounter(**STAY), *values)
    assert [row[1] for row in labels_of(path, "acute_kidney_injury_48h")[0]] == [label]


@pytest.mark.parametrize(
    ("codes", "unit"),
    [
        ("LAB//50912//mg/dL", None),
        ("LAB//RESULT//52546//mg/dL", None),
        ("LAB//220615//mg/dL", None),
        ("LOINC/2160-0", "mg/dL"),
        ("LAB//LOINC//38483-4", "mg/100 mL"),
    ],
)
def test_creatinine_of_other_converters_is_measured(codes, unit, tmp_path):
    path = meds(
        tmp_path,
        subject_id=[1] * 4,
        time=[T(2031, 5, 2, 9), T(2031, 5, 2, 12), T(2031, 5, 4, 6), T(2031, 5, 8)],
        code=["HOSPITAL_ADMISSION//ER", codes, codes, "HOSPITAL_DISCHARGE//HOME"],
        numeric_value=[None, 0.9, 2.4, None],
        unit=pl.Series([None, unit, unit, None], dtype=pl.String),
    )
    assert [row[1] for row in labels_of(path, "acute_kidney_injury_48h")[0]] == [True]


# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "system",
    [
        "urn:oid:2.16.840.1.113883.6.90",
        "2.16.840.1.113883.6.3",
        "http://fhir.de/CodeSystem/bfarm/icd-10-gm|2031",
        "HTTPS://hl7.org/fhir/sid/icd-10-cm/",
        "I10",
        "ICD-10",
        "https://terminology.hl7.org/icd-10-AM",
        "https://hospital.example/icd10gm-2031",
    ],
)
def test_a_diagnosis_counts_in_every_spelling_of_its_system(system, tmp_path):
    code = {"coding": [{"system": "https://hospital.example/local", "code": "9"}, {"system": system, "code": "I10.90"}]}
    path = fhir(
        tmp_path,
        patient(),
        encounter("a", **STAY),
        encounter("b", "2031-09-02T09:00:00Z", "2031-09-08T13:00:00Z"),
        resource("Condition", code=code, recordedDate="2031-09-04", encounter={"reference": "Encounter/b"}),
    )
    assert ("2031-05-08 13:00", True) in labels_of(path, "hypertension")[0]


@pytest.mark.parametrize(
    "status",
    [
        {"coding": [{"system": "https://hospital.example/s", "code": "3"}, {"code": "refuted"}]},
        {"coding": [{"system": "urn:oid:2.16.840.1.113883.6.96", "code": "410516002"}]},
        {"text": "Entered in Error"},
    ],
    ids=str,
)
def test_a_refuted_diagnosis_is_none_whichever_coding_says_so(status, tmp_path):
    code = {"coding": [{"system": "http://hl7.org/fhir/sid/icd-10-cm", "code": "I10"}]}
    path = fhir(
        tmp_path,
        patient(),
        encounter("a", **STAY),
        encounter("b", "2031-09-02T09:00:00Z", "2031-09-08T13:00:00Z"),
        resource("Condition", code=code, recordedDate="2031-09-04", verificationStatus=status),
    )
    assert labels_of(path, "hypertension")[0][0] == ("2031-05-08 13:00", False)


@pytest.mark.parametrize(
    ("of_class", "rows"),
    [
        ({"code": "1", "display": "Inpatient Hospital Stay"}, [True, False]),
        ({"code": "S", "display": "vollstationär"}, [True, False]),
        ({"coding": [{"code": "x"}], "text": "Hospital Inpatient"}, [True, False]),
        ([{"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "ACUTE"}]}],
         [True, False]),
        ({"code": "2", "display": "Outpatient"}, []),
        ({"code": "2", "display": "Not inpatient"}, []),
    ],
    ids=str,
)  # fmt: skip
def test_a_class_is_an_admission_where_its_words_say_so(of_class, rows, tmp_path):
    path = fhir(
        tmp_path,
        patient(),
        encounter("a", **STAY, **{"class": of_class}),
        encounter("b", "2031-05-20T09:00:00Z", "2031-05-22T13:00:00Z", **{"class": of_class}),
    )
    assert [label for _, label in labels_of(path, "readmission_30d")[0]] == rows


@pytest.mark.parametrize(("code", "end"), [
    ("Visit//IP", "Visit//IP//end"), ("Visit/ERIP//start", "Visit/ERIP//end"),
    ("HOSPITAL_ADMISSION//EW EMER.//ER", "HOSPITAL_DISCHARGE//HOME"), ("VISIT_START//NONAC", "VISIT_END//NONAC"),
])  # fmt: skip
def test_admissions_of_other_converters_are_read(code, end, tmp_path):
    path = meds(
        tmp_path,
        subject_id=[1] * 4,
        time=[T(2031, 5, 2, 9), T(2031, 5, 8, 13), T(2031, 5, 20, 9), T(2031, 5, 22, 13)],
        code=[code, end, code, end],
    )
    assert labels_of(path, "readmission_30d")[0] == [("2031-05-08 13:00", True), ("2031-05-22 13:00", False)]


def test_local_numbers_of_a_disposition_are_deaths_in_their_own_tables_only(tmp_path):
    def left(system, code):
        stay = {"dischargeDisposition": {"coding": [{"system": system, "code": code}]}}
        return fhir(tmp_path, patient(), encounter(**STAY, hospitalization=stay))

    for code in ("20", "40", "41", "42"):
        local = labels_of(left("https://hospital.example/d", code), "hospital_mortality_24h")[0]
        standard = labels_of(left("http://terminology.hl7.org/CodeSystem/v2-0112", code), "hospital_mortality_24h")[0]
        assert ([label for _, label in local], [label for _, label in standard]) == ([False], [True])

"""What hospitals really send of deaths, stays and dates: each test is a kind of record that was once read wrong, its
name says what is right and why. Values are invented; the truth is the standard, or the calendar.
"""

from datetime import datetime

import polars as pl
import pytest

from tests.data.fhir.samples import (
    ABSENT,
    FHIR_DISPOSITION,
    GERMAN,
    LOCAL,
    NUBC,
    V2_DISPOSITION,
    coded,
    codes,
    concept,
    encounter,
    observation,
    patient,
    read,
    resource,
    rows,
)

# 1. Death is a fact with or without a time


@pytest.mark.parametrize(
    ("stated", "death"),
    [
        ({"deceasedBoolean": True}, (None, None)),
        ({"deceasedBoolean": "true"}, (None, None)),
        ({"_deceasedDateTime": {"extension": [{"url": ABSENT, "valueCode": "unknown"}]}}, (None, None)),
        ({"_deceasedDateTime": {"extension": [{"url": ABSENT, "valueCode": "masked"}]}}, (None, None)),
        ({"_deceasedDateTime": {"extension": [{"url": "http://x.example/precision"}]}}, (None, None)),
        ({"deceasedDateTime": "9999-12-31"}, (None, None)),
        ({"deceasedDateTime": "0001-01-01T00:00:00Z"}, (None, None)),
        ({"deceasedDateTime": "2031-05"}, (None, "2031-05")),
        ({"deceasedDateTime": "2031"}, (None, "2031")),
        ({"deceasedDateTime": "2031-05-04"}, (datetime(2031, 5, 4, 23, 59, 59, 999999), None)),
        ({"deceasedDateTime": "2031-05-04T10:00:00-07:00"}, (datetime(2031, 5, 4, 17), None)),
    ],
    ids=str,
)
def test_known_dead_is_a_death_whatever_is_known_of_its_time(stated, death):
    events, report = read(patient(**stated))
    assert [(row[0], row[2]) for row in rows(events, "MEDS_DEATH")] == [death]
    assert sum(n for note, n in report.notes.items() if note.startswith("patients known dead")) == (death[0] is None)


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"deceasedBoolean": False},
        {"deceasedBoolean": "false"},
        {"_deceasedBoolean": {"extension": [{"url": ABSENT, "valueCode": "unknown"}]}},
        {"_deceasedDateTime": {"extension": [{"url": ABSENT, "valueCode": "not-applicable"}]}},
        {"_deceasedDateTime": {}},
        {"_deceasedDateTime": None},
    ],
    ids=str,
)
def test_not_known_dead_is_no_death(stated):
    assert codes(read(patient(**stated))[0], "MEDS_DEATH") == []


def test_a_flag_that_is_no_flag_is_refused():
    with pytest.raises(ValueError, match="deceasedBoolean must be true or false, got 'Y'"):
        read(patient(deceasedBoolean="Y"))


EXTENSION = {
    "url": "http://fhir.de/StructureDefinition/Entlassungsgrund",
    "extension": [
        {"url": "ErsteUndZweiteStelle", "valueCoding": {"system": GERMAN, "code": "07"}},
        {"url": "DritteStelle", "valueCoding": {"system": GERMAN.replace("ErsteUndZweite", "Dritte"), "code": "9"}},
    ],
}
METHOD = "https://fhir.hl7.org.uk/CodeSystem/UKCore-DischargeMethodEngland"
METHOD_EXTENSION = {
    "url": "https://fhir.hl7.org.uk/StructureDefinition/Extension-UKCore-DischargeMethod",
    "valueCodeableConcept": coded((METHOD, "4")),
}


@pytest.mark.parametrize(
    "disposition",
    [
        coded((LOCAL, "700", "Verstorben"), (FHIR_DISPOSITION, "exp", "Expired")),
        coded((FHIR_DISPOSITION, "exp")),
        coded(("http://hl7.org/fhir/discharge-disposition", "exp")),
        coded((V2_DISPOSITION, "20")),
        coded(("urn:oid:2.16.840.1.113883.12.112", "41")),
        coded(("2.16.840.1.113883.12.112", "41")),
        coded((NUBC, "40")),
        coded(("http://www.nubc.org/patient-discharge", "42")),
        coded(("http://www.nubc.org/patient-discharge", "01", "Home"), (NUBC, "20")),
        coded(("http://snomed.info/sct", "371828006")),
        coded(("http://snomed.info/sct", "371828006 |Patient deceased during stay|")),
        coded(("http://snomed.info/sct", "123456789", "Patient died in hospital")),
        coded(("http://snomed.info/sct/731000124108/version/20250301", "419099009")),
        coded((METHOD, "4")),
        coded(("https://fhir.hl7.org.uk/CodeSystem/UKCore-DischargeDestinationEngland", "79")),
        coded((GERMAN, "07")),
        {"extension": [EXTENSION]},
        {"extension": [METHOD_EXTENSION]},
        {"text": "Patient died"},
        {"text": "verstorben"},
        {"text": "Décédé"},
        {"text": "Deceased - autopsy"},
        coded((LOCAL, "9", "Éxitus")),
        coded((LOCAL, "9", "Overleden")),
        coded((LOCAL, "DIED")),
        coded((None, "EXPIRED")),
        {"coding": [{"display": "Expired in medical facility"}]},
    ],
    ids=str,
)
def test_a_disposition_says_died_by_any_coding_in_its_system_by_display_or_text(disposition):
    from ehrseq.tokenization.ehr_codes import EXPIRED

    events, _ = read(patient(), encounter(hospitalization={"dischargeDisposition": disposition}))
    ends = events.filter(pl.col("code").str.starts_with("VISIT_END"))
    assert ends["code"].str.contains(EXPIRED).to_list() == [True]
    assert ends["time"].to_list() == [datetime(2020, 1, 15, 12)]


@pytest.mark.parametrize("where", ["hospitalization", "encounter"])
def test_a_national_extension_beside_the_disposition_says_died(where):
    stay = {"dischargeDisposition": {"coding": [{"code": "oth"}]}}
    more = {"hospitalization": stay, "extension": [METHOD_EXTENSION]}
    if where == "hospitalization":
        more = {"hospitalization": {**stay, "extension": [METHOD_EXTENSION]}}
    assert codes(read(patient(), encounter(**more))[0], "VISIT_END") == ["VISIT_END//exp"]


def test_r5_keeps_the_disposition_under_admission():
    stay = encounter(admission={"dischargeDisposition": coded((FHIR_DISPOSITION, "exp"))}, status="completed")
    assert codes(read(patient(), stay)[0], "VISIT_END") == ["VISIT_END//exp"]


@pytest.mark.parametrize(
    "disposition",
    [
        coded((LOCAL, "20", "Rehabilitation clinic")),
        coded((LOCAL, "20")),
        coded((None, "20")),
        coded((LOCAL, "41", "Transfer")),
        coded((LOCAL, "exp", "Expedited discharge")),
        coded((V2_DISPOSITION, "01")),
        coded((NUBC, "30", "Still patient")),
        coded((METHOD, "1")),
        coded((GERMAN, "01")),
        coded(("http://snomed.info/sct", "371827001", "Patient discharged alive")),
        coded((V2_DISPOSITION, "21", "Expired authorization: court")),
        {"text": "discharged alive"},
        {"text": "Insurance coverage expired"},
        {"text": "nicht verstorben"},
        {"text": "home"},
        coded((FHIR_DISPOSITION, "home")),
    ],
    ids=str,
)
def test_what_only_looks_like_a_death_is_none(disposition):
    from ehrseq.tokenization.ehr_codes import EXPIRED

    events, _ = read(patient(), encounter(hospitalization={"dischargeDisposition": disposition}))
    assert events.filter(pl.col("code").str.starts_with("VISIT_END"))["code"].str.contains(EXPIRED).to_list() == [False]


def test_a_death_in_a_stay_whose_end_is_unknown_is_a_death_at_an_unknown_time():
    died = {"dischargeDisposition": coded((FHIR_DISPOSITION, "exp"))}
    events, _ = read(patient(), encounter(end=None, hospitalization=died))
    assert rows(events, "MEDS_DEATH") == [(None, "MEDS_DEATH", None)]
    assert rows(events, "VISIT_END") == [(None, "VISIT_END//exp", None)]


def ends_in_death(disposition) -> tuple[bool, list[str]]:
    """Whether the end of a stay says that the patient died, and the notes about dispositions."""
    from ehrseq.tokenization.ehr_codes import EXPIRED

    events, report = read(patient(), encounter(hospitalization={"dischargeDisposition": disposition}))
    (died,) = events.filter(pl.col("code").str.starts_with("VISIT_END"))["code"].str.contains(EXPIRED)
    return died, [note for note in report.notes if note.startswith("dispositions that name death")]


@pytest.mark.parametrize("text", [
    "Deceased - no autopsy", "Died (no autopsy)", "Died, expected", "Expected death", "Verstorben, keine Obduktion",
    "no autopsy, deceased", "Died of sepsis", "Dead on arrival", "Expired, death certificate issued", "d\u00f6d",
    "avliden", "umar\u0142", "zgon", "\u00famrt\u00ed", "zem\u0159el", "Ableben", "overleden", "fallecido",
    "\u00f3bito", "D\u00c9C\u00c9D\u00c9", "deceduto",
    "Patient passed away", "\u0443\u043c\u0435\u0440", "\u6b7b\u4ea1",
])  # fmt: skip
def test_a_denying_word_that_belongs_to_something_else_does_not_undo_a_death(text):
    assert ends_in_death({"text": text}) == (True, [])
    assert ends_in_death(coded((LOCAL, "9", text))) == (True, [])


@pytest.mark.parametrize("text", [
    "not deceased", "no death", "nicht verstorben", "alive, not dead", "Patient has not died",
    "n'est pas d\u00e9c\u00e9d\u00e9",
    "inte avliden", "nie zmar\u0142", "no fallecido", "niet overleden", "Deceased: no",
    "DoD facility", "Mortgage office",
])  # fmt: skip
def test_a_denied_death_is_none(text):
    assert ends_in_death({"text": text}) == (False, [])


@pytest.mark.parametrize("text", [
    "Dead Sea clinic", "Dead or alive unknown", "Died?", "Mother died", "Tod des Vaters", "risk of death",
    "Insurance coverage expired", "Death certificate issued", "No autopsy deceased", "Dr. Tod", "Alive/dead",
])  # fmt: skip
def test_a_text_that_names_death_and_does_not_clearly_say_so_is_no_death_and_is_counted(text):
    died, notes = ends_in_death({"text": text})
    assert not died
    assert len(notes) == 1
    assert notes[0].endswith(text)


@pytest.mark.parametrize("coding", [
    ("urn:oid:2.16.840.1.113883.6.96", "371828006"), ("2.16.840.1.113883.6.96", "419099009"), ("SCT", "419099009"),
    (FHIR_DISPOSITION, "EXP"), (FHIR_DISPOSITION, " exp "), (V2_DISPOSITION, " 20"), ("HL70112", "20"), (None, "EXP"),
    ("https://fhir.hl7.org.uk/CodeSystem/NHSDataModelAndDictionary-DischargeMethod", "4"),
    ("https://fhir.hl7.org.uk/CodeSystem/NHSDataModelAndDictionary-DischargeDestination", "79"),
    ("https://www.medizininformatik-initiative.de/fhir/core/modul-fall/CodeSystem/Entlassungsgrund", "079"),
    ("https://interop.aphp.fr/ig/fhir/dm/CodeSystem/PMSIMCOMDS", "9"),
])  # fmt: skip
def test_a_code_of_death_counts_in_every_spelling_of_itself_and_its_system(coding):
    assert ends_in_death(coded(coding)) == (True, [])


@pytest.mark.parametrize("coding", [("http://hl7.org/fhir/v2/0023", "20"), ("http://hl7.org/fhir/v2/0007", "41")])
def test_the_number_of_a_table_is_no_version_of_another(coding):
    assert ends_in_death(coded(coding)) == (False, [])


# 2. An unknown end is not a stay in progress


@pytest.mark.parametrize(
    ("end", "note"),
    [
        (None, "encounters without an end"),
        ("2020-01-10T06:00:00Z", "encounters that end before they start: end unknown"),
        ("2020-01-09", "encounters that end before they start: end unknown"),
        ("0001-01-01T00:00:00Z", "encounters with a placeholder"),
        ("9999-12-31", "encounters with a placeholder"),
        ("2999-12-31T23:59:59+01:00", "encounters with a placeholder"),
        ("1900-01-01", "encounters with a placeholder"),
    ],
)
def test_a_finished_stay_without_a_usable_end_has_ended_nobody_knows_when(end, note):
    lab = resource("Condition", code=concept("59621000"))
    events, report = read(patient(), encounter(end=end), lab)
    assert rows(events, "VISIT_END") == [(None, "VISIT_END//IMP", None)]
    assert any(key.startswith(note) for key in report.notes)
    assert report.skipped["Condition: no time, and no end of its encounter"] == 1
    going_on, _ = read(patient(), encounter(end=end, status="in-progress"))
    assert rows(going_on, "VISIT_END") == [(None, "VISIT_END//in-progress", None)]


@pytest.mark.parametrize("status", ["FINISHED", "Finished", " finished", "COMPLETED", "discharged"])
def test_a_status_counts_in_any_case(status):
    assert rows(read(patient(), encounter(end=None, status=status))[0], "VISIT_END") == [(None, "VISIT_END//IMP", None)]


@pytest.mark.parametrize("status", ["CANCELLED", "Entered-In-Error", "Planned"])
def test_a_status_that_says_not_counts_in_any_case(status):
    assert codes(read(patient(), encounter(status=status))[0], "VISIT") == []
    if status != "Planned":
        assert codes(read(patient(), observation(status=status))[0], "LAB") == []


def test_a_placeholder_as_start_is_no_start():
    events, report = read(patient(), encounter(start="0001-01-01"))
    assert codes(events, "VISIT") == []
    assert report.skipped["Encounter: no start of its period"] == 1


def test_an_untimed_end_is_no_input_of_a_model():
    from ehrseq import EhrTokenizer

    timed, _ = read(patient(), encounter(end=None, status="unknown"), observation())
    untimed, _ = read(patient(deceasedBoolean=True), encounter(end=None), observation())
    tokenizer = EhrTokenizer.train(untimed, min_count=1)
    one, other = (tokenizer(table)["input_ids"] for table in (timed, untimed))
    assert one == other


# 3. Dates without hours


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [
        ("2031-05-02", "2031-05-09", datetime(2031, 5, 2), datetime(2031, 5, 9, 23, 59, 59, 999999)),
        ("2031-05-02", "2031-05-02", datetime(2031, 5, 2), datetime(2031, 5, 2, 23, 59, 59, 999999)),
        ("2031-05-02T10:00:00Z", "2031-05-02", datetime(2031, 5, 2, 10), datetime(2031, 5, 2, 23, 59, 59, 999999)),
        ("2031-05-02", "2031-05-02T10:00:00Z", datetime(2031, 5, 2), datetime(2031, 5, 2, 10)),
        ("2031-05", "2031-05-02T10:00:00Z", datetime(2031, 5, 1), datetime(2031, 5, 2, 10)),
        ("2031-05-02", "2031-05-02T01:00:00+02:00", datetime(2031, 5, 1, 22), datetime(2031, 5, 1, 23)),
        (
            "2031-05-02T23:00:00-07:00",
            "2031-05-02",
            datetime(2031, 5, 3, 6),
            datetime(2031, 5, 3, 6, 59, 59, 999999),
        ),
        ("2031-05-02T23:00:00", "2031-05-03T01:00:00+02:00", datetime(2031, 5, 2, 21), datetime(2031, 5, 2, 23)),
    ],
)
def test_a_period_begins_with_its_first_instant_and_is_never_empty(start, end, first, last):
    events, _ = read(patient(), encounter(start=start, end=end))
    assert [row[0] for row in rows(events, "VISIT_START")] == [first]
    assert [row[0] for row in rows(events, "VISIT_END")] == [last]


def test_times_and_dates_without_zone_are_read_by_one_rule_in_the_zone_of_the_patients_encounters():
    stay = encounter(start="2031-05-02T09:15:00-06:00", end="2031-05-08T13:40:00-06:00")
    lab = observation(time="2031-05-03T10:00:00", encounter=None)
    events, report = read(patient(), stay, lab, resource("Condition", code=concept("1"), recordedDate="2031-05-03"))
    assert [row[0] for row in rows(events, "LAB")] == [datetime(2031, 5, 3, 16)]
    assert [row[0] for row in rows(events, "DIAGNOSIS")] == [datetime(2031, 5, 4, 5, 59, 59, 999999)]
    assert [row[0] for row in rows(events, "MEDS_BIRTH")] == [datetime(1950, 3, 2, 6)]
    assert report.notes["dates moved to the zone of the patient's encounters"] == 3


@pytest.mark.parametrize("placeholder", ["9999-12-31T23:59:59Z", "0001-01-01T00:00:00+00:53"])
def test_what_stands_for_no_time_states_no_zone(placeholder):
    earlier = encounter("a", "2031-04-02T09:00:00-06:00", "2031-04-03T09:00:00-06:00")
    later = encounter("b", "2031-05-02T09:00:00", placeholder)
    events, _ = read(patient(), earlier, later)
    assert [row[0] for row in rows(events, "VISIT_START")] == [datetime(2031, 4, 2, 15), datetime(2031, 5, 2, 15)]
    assert codes(events, "TIMEZONE") == ["TIMEZONE//-06:00"]


def test_an_offset_without_a_colon_is_the_zone_of_its_encounter():
    stay = encounter(start="2031-05-02T09:15:00-0600", end="2031-05-08T13:40:00-06")
    events, _ = read(patient(), stay, observation(time="2031-05-03T10:00:00", encounter=None))
    assert [row[0] for row in rows(events, "LAB")] == [datetime(2031, 5, 3, 16)]


def test_r5_keeps_the_period_of_an_encounter_under_actual_period():
    stay = encounter(start="2031-05-02T09:15:00Z", end="2031-05-08T13:40:00Z")
    stay["actualPeriod"] = stay.pop("period")
    events, _ = read(patient(), {**stay, "status": "completed"})
    assert [row[0] for row in rows(events, "VISIT_")] == [datetime(2031, 5, 2, 9, 15), datetime(2031, 5, 8, 13, 40)]


def test_the_rows_own_encounter_tells_its_zone_before_the_latest_does():
    summer = encounter("s", "2031-07-02T09:00:00+02:00", "2031-07-03T09:00:00+02:00")
    winter = encounter("w", "2031-12-02T09:00:00+01:00", "2031-12-03T09:00:00+01:00")
    lab = observation(time="2031-07-02T10:00:00", encounter={"reference": "Encounter/s"})
    events, _ = read(patient(), summer, winter, lab)
    assert [row[0] for row in rows(events, "LAB")] == [datetime(2031, 7, 2, 8)]
    zones = events.filter(pl.col("code").str.starts_with("TIMEZONE")).select("time", "code", "visit_id").rows()
    assert zones == [(None, "TIMEZONE//+01:00", None), (None, "TIMEZONE//+02:00", "s")]


@pytest.mark.parametrize(
    ("zone", "day", "utc"),
    [
        ("Europe/Berlin", "2031-07-02", datetime(2031, 7, 2, 21, 59, 59, 999999)),
        ("Europe/Berlin", "2031-01-02", datetime(2031, 1, 2, 22, 59, 59, 999999)),
        ("America/Denver", "2031-07-02", datetime(2031, 7, 3, 5, 59, 59, 999999)),
        ("-03:30", "2031-07-02", datetime(2031, 7, 3, 3, 29, 59, 999999)),
        ("UTC", "2031-07-02", datetime(2031, 7, 2, 23, 59, 59, 999999)),
    ],
)
def test_the_hospitals_zone_is_an_option_that_wins_and_is_reported(zone, day, utc):
    stay = encounter(start="2031-01-01T00:00:00Z", end="2031-01-02T00:00:00Z")
    events, report = read(patient(), stay, observation(time=day, encounter=None), timezone=zone)
    assert [row[0] for row in rows(events, "LAB")] == [utc]
    assert report.notes[f"dates and times without a zone, read in {zone} (given)"] == 2
    assert codes(events, "TIMEZONE") == [f"TIMEZONE//{zone}"]
    assert report.to_dict()["settings"] == {"timezone": zone}


def test_an_hour_that_the_clocks_skip_is_read_as_the_hour_after():
    lab = observation(time="2031-03-30T02:30:00", encounter=None)
    events, _ = read(patient(), lab, timezone="Europe/Berlin")
    assert [row[0] for row in rows(events, "LAB")] == [datetime(2031, 3, 30, 1, 30)]


def test_without_any_zone_it_is_utc_and_said():
    events, report = read(patient(), encounter(start="2031-05-02", end="2031-05-03"))
    assert [row[0] for row in rows(events, "VISIT_START")] == [datetime(2031, 5, 2)]
    assert report.notes["dates and times without a zone, read as UTC: no encounter of the patient states one"] == 3
    assert codes(events, "TIMEZONE") == []


@pytest.mark.parametrize("zone", ["Mars/Base", "+25:00", ""])
def test_a_zone_that_there_is_not_is_refused(zone):
    with pytest.raises(ValueError, match="timezone got"):
        read(patient(), timezone=zone)


@pytest.mark.parametrize("placeholder", ["9999-12-31", "0001-01-01T00:00:00Z", "1900-01-01"])
def test_a_fact_at_a_placeholder_is_known_when_its_encounter_ends(placeholder):
    fact = resource("Condition", code=concept("1"), recordedDate=placeholder)
    events, report = read(patient(), encounter(), fact)
    assert [row[0] for row in rows(events, "DIAGNOSIS")] == [datetime(2020, 1, 15, 12)]
    assert any(note.startswith("times that stand for an unknown one") for note in report.notes)

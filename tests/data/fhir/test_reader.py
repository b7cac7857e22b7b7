"""FHIR resources as events, on hand-made resources whose rows are known."""

import doctest
import gzip
import json
from datetime import datetime, timedelta
from importlib import import_module

import pytest

from ehrseq.data import patient_from_bundle, read_fhir
from ehrseq.data.fhir.reader import events_from_bundle
from ehrseq.data.schema import EVENT_COLUMNS
from tests.data.fhir.samples import LOINC, bundle, concept, encounter, observation, patient, resource, write_ndjson

MICROSECOND = timedelta(microseconds=1)


def rows_of(*resources, code_prefix=""):
    """(time, code, numeric_value, text_value, visit_id, unit) of the rows whose code starts so, and the report."""
    events, report = events_from_bundle(bundle(*resources))
    rows = [row[1:] for row in events.select(EVENT_COLUMNS).iter_rows() if row[2].startswith(code_prefix)]
    return rows, report


def clinical(*resources, with_encounter=True):
    """Rows that the resources add to those of p1 and e1, and the report."""
    base = [patient(), encounter()] if with_encounter else [patient()]
    rows, report = rows_of(*base, *resources)
    return [row for row in rows if not row[1].startswith(("MEDS_BIRTH", "GENDER", "VISIT_"))], report


def at(*parts):
    return datetime(*parts)


# Patients


def test_patient_rows():
    us_core = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-"
    extension = [
        {
            "url": us_core + "race",
            "extension": [
                {"url": "ombCategory", "valueCoding": {"code": "2106-3", "display": "White"}},
                {"url": "ombCategory", "valueCoding": {"code": "2028-9", "display": "Asian"}},
                {"url": "text", "valueString": "Mixed"},
            ],
        },
        {"url": us_core + "ethnicity", "extension": [{"url": "text", "valueString": "Not known"}]},
    ]
    rows, report = rows_of(patient(extension=extension, deceasedDateTime="2021-05-01"))
    assert [(row[0], row[1]) for row in rows] == [
        (None, "GENDER//F"),
        (None, "RACE//WHITE"),
        (None, "RACE//ASIAN"),
        (None, "ETHNICITY//NOT KNOWN"),
        (at(1950, 3, 2), "MEDS_BIRTH"),
        (at(2021, 5, 2) - MICROSECOND, "MEDS_DEATH"),
    ]
    assert report.events_written == 6
    assert report.subjects == 1


@pytest.mark.parametrize(
    ("more", "deaths"),
    [
        ({"deceasedDateTime": "2021-05-01T10:00:00+02:00"}, [(at(2021, 5, 1, 8), None)]),
        ({"deceasedDateTime": "2021-05"}, [(None, "2021-05")]),
        ({"deceasedBoolean": False}, []),
        ({"deceasedBoolean": True}, [(None, None)]),
    ],
)
def test_death(more, deaths):
    rows, report = rows_of(patient(**more), code_prefix="MEDS_DEATH")
    assert [(row[0], row[3]) for row in rows] == deaths
    untimed = sum(time is None for time, _ in deaths)
    assert sum(n for note, n in report.notes.items() if note.startswith("patients known dead")) == untimed


def test_the_time_of_birth_is_used_where_it_is_given():
    born = {
        "extension": [
            {
                "url": "http://hl7.org/fhir/StructureDefinition/patient-birthTime",
                "valueDateTime": "1950-03-02T14:35:45-05:00",
            }
        ]
    }
    rows, _ = rows_of(patient(_birthDate=born), code_prefix="MEDS_BIRTH")
    assert rows[0][0] == at(1950, 3, 2, 19, 35, 45)


def test_a_date_of_death_ends_with_the_day_of_the_patients_own_zone():
    stay = encounter(start="2020-01-10T08:00:00-05:00", end="2020-01-15T22:30:00-05:00")
    rows, report = rows_of(patient(deceasedDateTime="2020-01-15"), stay)
    assert [(row[0], row[1]) for row in rows[-2:]] == [
        (at(2020, 1, 16, 3, 30), "VISIT_END//IMP"),
        (at(2020, 1, 16, 5) - MICROSECOND, "MEDS_DEATH"),
    ]
    # The death and the birth
    assert report.notes["dates moved to the zone of the patient's encounters"] == 2


# Encounters


def test_encounter_rows_and_discharge_disposition():
    home = {"dischargeDisposition": {"coding": [{"code": "home", "display": "Home"}]}}
    rows, _ = rows_of(patient(), encounter(hospitalization=home), code_prefix="VISIT")
    assert [(row[0], row[1], row[4]) for row in rows] == [
        (at(2020, 1, 10, 8), "VISIT_START//IMP", "e1"),
        (at(2020, 1, 15, 12), "VISIT_END//home", "e1"),
    ]


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("finished", ["VISIT_END//IMP"]),
        ("in-progress", ["VISIT_END//in-progress"]),
        ("onleave", ["VISIT_END//in-progress"]),
        ("unknown", []),
        (None, []),
    ],
)
def test_an_encounter_without_an_end_tells_what_became_of_it_without_a_time(status, told):
    rows, report = rows_of(patient(), encounter(end=None, status=status), code_prefix="VISIT")
    assert [(row[0], row[1], row[4]) for row in rows] == [
        *[(None, code, "e1") for code in told],
        (at(2020, 1, 10, 8), "VISIT_START//IMP", "e1"),
    ]
    assert report.notes["encounters without an end"] == 1


@pytest.mark.parametrize("status", ["planned", "cancelled", "entered-in-error"])
def test_an_encounter_that_did_not_happen_is_counted(status):
    rows, report = rows_of(patient(), encounter(status=status), code_prefix="VISIT")
    assert rows == []
    assert sum(report.skipped.values()) + sum(report.entered_in_error.values()) == 1


def test_rows_of_a_part_carry_the_visit_of_the_whole():
    ward = encounter("ward", "2020-01-11T00:00:00Z", "2020-01-12T00:00:00Z", partOf={"reference": "Encounter/e1"})
    bed = encounter("bed", "2020-01-11T01:00:00Z", "2020-01-11T23:00:00Z", partOf={"reference": "Encounter/ward"})
    seen = observation(encounter={"reference": "Encounter/bed"})
    rows, report = rows_of(patient(), bed, ward, encounter(), seen)
    assert {row[4] for row in rows if row[0] is not None and row[1] != "MEDS_BIRTH"} == {"e1"}
    assert not report.unresolved_references


def test_an_encounter_that_is_part_of_itself_ends_where_it_began():
    rows, report = rows_of(patient(), encounter(partOf={"reference": "Encounter/e1"}), code_prefix="VISIT")
    assert {row[4] for row in rows} == {"e1"}
    assert report.notes["encounters that are part of themselves"] == 1


def test_order_at_one_instant():
    moment = "2020-01-10T08:00:00Z"
    rows, _ = rows_of(
        patient(birthDate="2020-01-10", _birthDate=None, deceasedDateTime=moment),
        observation("a", time=moment),
        encounter(start=moment, end=moment),
        observation("b", time=moment, id="o2"),
    )
    assert [row[1] for row in rows] == [
        "GENDER//F",
        "MEDS_BIRTH",
        "VISIT_START//IMP",
        "LAB//LOINC//a",
        "LAB//LOINC//b",
        "VISIT_END//IMP",
        "MEDS_DEATH",
    ]


# When a fact was available


@pytest.mark.parametrize(
    ("item", "time"),
    [
        (
            resource("Condition", code=concept("1"), recordedDate="2020-01-12", onsetDateTime="2019-01-01"),
            at(2020, 1, 13) - MICROSECOND,
        ),
        (resource("Condition", code=concept("1"), onsetDateTime="2019-01-01"), at(2020, 1, 15, 12)),
        (observation(issued="2020-01-11T07:30:00Z"), at(2020, 1, 11, 7, 30)),
        (observation(), at(2020, 1, 11, 6)),
        (
            observation(
                effectiveDateTime=None, effectivePeriod={"start": "2020-01-11T01:00:00Z", "end": "2020-01-11T02:00:00Z"}
            ),
            at(2020, 1, 11, 2),
        ),
        (
            observation(effectiveDateTime=None, effectiveInstant="2020-01-11T01:00:00.25Z"),
            at(2020, 1, 11, 1, 0, 0, 250_000),
        ),
        (resource("Procedure", code=concept("1"), performedDateTime="2020-01-11T01:00:00Z"), at(2020, 1, 11, 1)),
        (
            resource(
                "Procedure",
                code=concept("1"),
                performedPeriod={"start": "2020-01-11T01:00:00Z", "end": "2020-01-11T03:00:00Z"},
            ),
            at(2020, 1, 11, 3),
        ),
        (
            resource("Procedure", code=concept("1"), performedPeriod={"start": "2020-01-11T01:00:00Z"}),
            at(2020, 1, 11, 1),
        ),
        (resource("Procedure", code=concept("1"), performedString="last week"), at(2020, 1, 15, 12)),
        (
            resource("MedicationRequest", medicationCodeableConcept=concept("1"), authoredOn="2020-01-11T01:00:00Z"),
            at(2020, 1, 11, 1),
        ),
        (
            resource(
                "MedicationAdministration",
                medicationCodeableConcept=concept("1"),
                effectivePeriod={"start": "2020-01-11T01:00:00Z", "end": "2020-01-11T03:00:00Z"},
            ),
            at(2020, 1, 11, 3),
        ),
        (
            resource(
                "MedicationDispense",
                medicationCodeableConcept=concept("1"),
                whenHandedOver="2020-01-11T01:00:00Z",
                whenPrepared="2020-01-10",
            ),
            at(2020, 1, 11, 1),
        ),
        (resource("MedicationDispense", medicationCodeableConcept=concept("1")), at(2020, 1, 15, 12)),
        (
            resource("Immunization", vaccineCode=concept("140"), occurrenceDateTime="2020-01-11T01:00:00Z"),
            at(2020, 1, 11, 1),
        ),
        (
            resource(
                "Immunization", vaccineCode=concept("140"), occurrenceDateTime="1999", recorded="2020-01-11T01:00:00Z"
            ),
            at(2020, 1, 11, 1),
        ),
    ],
)
def test_time_is_when_the_fact_was_available(item, time):
    rows, _ = clinical(item)
    assert [row[0] for row in rows] == [time]
    assert rows[0][4] == "e1"


@pytest.mark.parametrize("kind", ["Condition", "Procedure", "MedicationRequest", "MedicationDispense"])
def test_a_fact_without_any_time_is_counted(kind):
    item = resource(kind, code=concept("1"), medicationCodeableConcept=concept("1"), onsetDateTime="2019-01-01")
    rows, report = clinical(item, with_encounter=False)
    assert rows == []
    assert report.skipped[f"{kind}: no time, and no end of its encounter"] == 1


def test_the_end_of_an_encounter_as_time_is_reported():
    _, report = clinical(
        resource("Condition", code=concept("1")), resource("MedicationDispense", medicationCodeableConcept=concept("1"))
    )
    assert dict(report.time_from_encounter_end) == {"Condition": 1, "MedicationDispense": 1}


# What did not happen


@pytest.mark.parametrize(
    ("item", "table"),
    [
        (observation(status="entered-in-error"), "entered_in_error"),
        (
            resource(
                "Condition", code=concept("1"), verificationStatus=concept("entered-in-error"), recordedDate="2020"
            ),
            "entered_in_error",
        ),
        (
            resource("Condition", code=concept("1"), verificationStatus=concept("refuted"), recordedDate="2020"),
            "skipped",
        ),
        (resource("Procedure", code=concept("1"), status="not-done", performedDateTime="2020"), "skipped"),
        (resource("Immunization", vaccineCode=concept("1"), status="not-done", occurrenceDateTime="2020"), "skipped"),
        (
            resource("Immunization", vaccineCode=concept("1"), status="entered-in-error", occurrenceDateTime="2020"),
            "entered_in_error",
        ),
        (
            resource(
                "MedicationAdministration",
                medicationCodeableConcept=concept("1"),
                status="not-done",
                effectiveDateTime="2020",
            ),
            "skipped",
        ),
        (
            resource("MedicationRequest", medicationCodeableConcept=concept("1"), doNotPerform=True, authoredOn="2020"),
            "skipped",
        ),
        (
            resource(
                "MedicationDispense", medicationCodeableConcept=concept("1"), status="declined", whenPrepared="2020"
            ),
            "skipped",
        ),
        (observation(status="cancelled"), "skipped"),
        (observation(value=None, dataAbsentReason=concept("unknown")), "skipped"),
        (observation(code=None), "skipped"),
        (resource("MedicationRequest", authoredOn="2020"), "skipped"),
    ],
)
def test_what_did_not_happen_is_left_out_and_counted(item, table):
    rows, report = clinical(item)
    assert rows == []
    assert sum(getattr(report, table).values()) == 1


@pytest.mark.parametrize("status", ["stopped", "completed", "active", "unknown"])
def test_other_statuses_are_kept(status):
    rows, _ = clinical(
        resource("MedicationRequest", medicationCodeableConcept=concept("1"), status=status, authoredOn="2020")
    )
    assert len(rows) == 1


def test_other_resource_types_are_counted():
    _, report = clinical({"resourceType": "Claim"}, {"resourceType": "Claim"}, {"resourceType": "CarePlan"})
    assert dict(report.resources_not_used) == {"Claim": 2, "CarePlan": 1}


# Values


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"valueQuantity": {"value": 7, "unit": "mg/dL", "code": "x"}}, (7.0, None, "mg/dL")),
        ({"valueQuantity": {"value": 7.5, "code": "mg"}}, (7.5, None, "mg")),
        ({"valueQuantity": {"value": 7}}, (7.0, None, None)),
        ({"valueQuantity": {"value": 7, "comparator": "<", "unit": "u"}}, (7.0, None, "u")),
        ({"valueQuantity": {"value": "7.25", "unit": "u"}}, (7.25, None, "u")),
        ({"valueQuantity": {"value": 1e300, "unit": "u"}}, (None, None, "u")),
        ({"valueCodeableConcept": {"coding": [{"code": "R", "display": "Resistant"}]}}, (None, "Resistant", None)),
        ({"valueCodeableConcept": {"text": "Positive"}}, (None, "Positive", None)),
        ({"valueCodeableConcept": {"coding": [{"code": "R"}]}}, (None, "R", None)),
        ({"valueString": " NEG\n"}, (None, "NEG", None)),
        ({"valueInteger": 3}, (3.0, None, None)),
        ({"valueBoolean": True}, (None, "true", None)),
        ({"valueBoolean": False}, (None, "false", None)),
        ({"valueDateTime": "2020"}, (None, None, None)),
        ({}, (None, None, None)),
    ],
)
def test_values(more, expected):
    rows, _ = clinical(observation(value=None, **more))
    assert [(row[2], row[3], row[5]) for row in rows] == [expected]


def test_components_take_the_place_of_a_panel_without_a_value():
    parts = [
        {"code": concept("8480-6", LOINC), "valueQuantity": {"value": 120, "unit": "mm[Hg]"}},
        {"code": concept("8462-4", LOINC), "valueQuantity": {"value": 80, "unit": "mm[Hg]"}},
        {"code": concept("8478-0", LOINC), "dataAbsentReason": concept("unknown")},
    ]
    panel = observation("85354-9", None, category=[{"coding": [{"code": "vital-signs"}]}], component=parts)
    rows, report = clinical(panel)
    assert [(row[1], row[2]) for row in rows] == [("VITAL//LOINC//8480-6", 120.0), ("VITAL//LOINC//8462-4", 80.0)]
    assert report.skipped["Observation: component without a value"] == 1


@pytest.mark.parametrize(
    ("category", "code", "kind"),
    [
        ([{"coding": [{"code": "laboratory"}]}], "1", "LAB"),
        ([{"coding": [{"code": "vital-signs"}]}], "1", "VITAL"),
        ([{"coding": [{"code": "procedure"}, {"code": "vital-signs"}]}], "1", "VITAL"),
        ([{"text": "Laboratory"}], "1", "LAB"),
        ([{"coding": [{"code": "survey"}]}], "8867-4", "OBSERVATION"),
        (None, "8867-4", "VITAL"),
        (None, "2345-7", "OBSERVATION"),
    ],
)
def test_labs_and_vitals_are_told_apart_by_category(category, code, kind):
    rows, _ = clinical(observation(code, category=category))
    assert [row[1] for row in rows] == [f"{kind}//LOINC//{code}"]


# Medications


NDC = "http://hl7.org/fhir/sid/ndc"


@pytest.mark.parametrize(
    ("request_more", "others", "codes"),
    [
        (
            {"medicationReference": {"reference": "Medication/m"}},
            [{"id": "m", "code": concept("7", NDC)}],
            ["MEDICATION//NDC//7"],
        ),
        (
            {
                "medicationReference": {"reference": "#m"},
                "contained": [{"resourceType": "Medication", "id": "m", "code": concept("8", NDC)}],
            },
            [],
            ["MEDICATION//NDC//8"],
        ),
        (
            {"medicationReference": {"reference": "Medication/mix"}},
            [
                {
                    "id": "mix",
                    "ingredient": [
                        {"itemReference": {"reference": "Medication/m"}},
                        {"itemCodeableConcept": concept("9", NDC)},
                    ],
                },
                {"id": "m", "code": concept("7", NDC)},
            ],
            ["MEDICATION//NDC//7", "MEDICATION//NDC//9"],
        ),
        (
            {"medicationReference": {"reference": "Medication/none", "display": "Aspirin"}},
            [],
            ["MEDICATION//TEXT//Aspirin"],
        ),
        ({"medicationReference": {"reference": "Medication/none"}}, [], []),
        (
            {"medicationReference": {"reference": "Medication/a"}},
            [{"id": "a", "ingredient": [{"itemReference": {"reference": "Medication/a"}}]}],
            [],
        ),
        ({"medicationReference": {"display": "Aspirin"}}, [], ["MEDICATION//TEXT//Aspirin"]),
    ],
)
def test_medications_by_reference(request_more, others, codes):
    medications = [{"resourceType": "Medication", **other} for other in others]
    rows, report = clinical(
        resource("MedicationRequest", authoredOn="2020-01-11T01:00:00Z", **request_more), *medications
    )
    assert [row[1] for row in rows] == codes
    if not codes:
        assert report.skipped["medication without a code"] == 1
    assert (sum(report.unresolved_references.values()) == 1) == (not others and "contained" not in request_more)


# References and subjects


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ({"reference": "Patient/p1"}, True),
        ({"reference": "Patient/p1/_history/3"}, True),
        ({"reference": "urn:uuid:p1"}, True),
        ({"reference": "https://server.example/fhir/Patient/p1"}, True),
        ({"identifier": {"system": "http://ids", "value": "7"}}, True),
        ({"reference": "Patient?identifier=http://ids|7"}, True),
        ({"reference": "#me"}, True),
        ({"reference": "Patient/p2"}, False),
        ({"reference": "Group/p1"}, False),
        ({"display": "Jane Doe"}, False),
        (None, False),
    ],
)
def test_references_to_the_patient(reference, found):
    who = patient(identifier=[{"system": "http://ids", "value": "7"}])
    contained = [{"resourceType": "Patient", "id": "me", "identifier": [{"system": "http://ids", "value": "7"}]}]
    rows, report = rows_of(who, encounter(), observation(subject=reference, contained=contained), code_prefix="LAB")
    assert len(rows) == int(found)
    assert report.skipped["rows of a subject that was not given"] == int(not found)


def test_a_reference_to_an_unknown_encounter_keeps_the_row():
    rows, report = rows_of(patient(), observation(encounter={"reference": "Encounter/none"}), code_prefix="LAB")
    assert [row[4] for row in rows] == [None]
    assert report.unresolved_references["Encounter (rows kept, without a visit)"] == 1


def test_full_urls_of_a_transaction_are_followed():
    entries = [
        {"fullUrl": "urn:uuid:aaa", "resource": {**patient("temporary")}},
        {"fullUrl": "urn:uuid:bbb", "resource": encounter("e9", subject={"reference": "urn:uuid:aaa"})},
        {
            "fullUrl": "urn:uuid:ccc",
            "resource": observation(subject={"reference": "urn:uuid:aaa"}, encounter={"reference": "urn:uuid:bbb"}),
        },
        {"request": {"method": "DELETE", "url": "Patient/3"}},
    ]
    events, report = events_from_bundle({"resourceType": "Bundle", "type": "transaction", "entry": entries})
    lab = events.row(-2, named=True)
    assert (lab["code"], lab["visit_id"]) == ("LAB//LOINC//2345-7", "e9")
    assert report.notes["resources that the source deletes"] == 1


def test_whole_number_ids_stay_and_others_are_hashed_stably(tmp_path):
    write_ndjson(tmp_path / "a.ndjson", patient("12"), patient("7"))
    events, report = read_fhir(tmp_path)
    assert events["subject_id"].unique().to_list() == [7, 12]
    assert report.subject_ids == {}
    write_ndjson(tmp_path / "a.ndjson", patient("12"), patient("x"))
    hashed, report = read_fhir(tmp_path)
    assert set(report.subject_ids) == {"12", "x"}
    assert set(hashed["subject_id"]) == set(report.subject_ids.values())
    assert all(0 <= number < 2**63 for number in report.subject_ids.values())
    # Its number depends on its own id alone.
    assert report.subject_ids["12"] == 12
    # An id must have the same number in every release. Truth: `printf x | b2sum -l 64`, without its lowest bit.
    assert report.subject_ids["x"] == 0x4ADF4367F96E584F >> 1
    assert patient_from_bundle(bundle(patient("x")))["subject_id"] == report.subject_ids["x"]


@pytest.mark.parametrize("module", ["instants", "fhir.assemble"])
def test_examples_in_docstrings(module):
    assert doctest.testmod(import_module(f"ehrseq.data.{module}")).failed == 0


def test_leading_zeros_are_no_whole_number():
    events, report = events_from_bundle(bundle(patient("007")))
    assert set(report.subject_ids) == {"007"}
    assert events["subject_id"][0] != 7


def test_same_instant_duplicates_are_dropped_and_counted():
    rows, report = clinical(observation(), observation(id="o2"), observation(value=5.6))
    assert [row[2] for row in rows] == [pytest.approx(5.5), pytest.approx(5.6)]
    assert report.duplicates_dropped == 1


# Files


def test_formats_of_files_give_the_same_events(tmp_path):
    resources = [patient(), encounter(), observation(), resource("Condition", code=concept("1"))]
    text = "".join(json.dumps(item) + "\n" for item in resources)
    for name in ("plain", "gzip", "jsonl", "bundle", "single", "crlf", "bom", "no_newline", "json_lines"):
        (tmp_path / name).mkdir()
    (tmp_path / "plain" / "all.ndjson").write_text(text)
    (tmp_path / "gzip" / "all.ndjson.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "jsonl" / "all.jsonl").write_text("\n" + text + "\n\n")
    (tmp_path / "bundle" / "b.json.gz").write_bytes(gzip.compress(json.dumps(bundle(*resources)).encode()))
    for number, item in enumerate(resources):
        (tmp_path / "single" / f"{number}.json").write_text(json.dumps(item, indent=1))
    (tmp_path / "single" / "package.json").write_text("{}")
    (tmp_path / "crlf" / "all.ndjson").write_bytes(text.replace("\n", "\r\n").encode())
    (tmp_path / "bom" / "all.ndjson").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "no_newline" / "all.ndjson").write_text(text.rstrip("\n"))
    (tmp_path / "json_lines" / "all.json").write_text(text)
    tables = {folder.name: read_fhir(folder)[0] for folder in tmp_path.iterdir()}
    assert tables["plain"].height == 6
    for name, table in tables.items():
        assert table.equals(tables["plain"]), name


def test_workers_and_blocks_do_not_change_the_events(tmp_path, monkeypatch):
    labs = [
        observation(f"code-{n % 7}", n / 8, f"2020-01-{n % 28 + 1:02d}T0{n % 5}:00:00Z", id=f"o{n}")
        for n in range(3000)
    ]
    write_ndjson(tmp_path / "Patient.ndjson", patient())
    write_ndjson(tmp_path / "Encounter.ndjson", encounter())
    plain = write_ndjson(tmp_path / "Observation.ndjson", *labs[:1500])
    (tmp_path / "ObservationZ.ndjson.gz").write_bytes(
        gzip.compress("".join(json.dumps(lab) + "\n" for lab in labs[1500:]).encode())
    )
    whole, _ = read_fhir(tmp_path, num_workers=1)
    monkeypatch.setattr("ehrseq.data.fhir.blocks.BLOCK_BYTES", 10_007)
    in_blocks, report = read_fhir(tmp_path, num_workers=1)
    monkeypatch.setattr("ehrseq.data.fhir.reader._PART_BYTES", plain.stat().st_size // 5)
    in_parallel, parallel_report = read_fhir(tmp_path, num_workers=3)
    assert whole.equals(in_blocks)
    assert whole.equals(in_parallel)
    assert report.to_dict() == parallel_report.to_dict()


def test_patient_dict_holds_the_rows_of_read_fhir(tmp_path):
    record = bundle(patient(), encounter(), observation(), observation("x", None, valueString="NEG"))
    (tmp_path / "b.json").write_text(json.dumps(record))
    events, _ = read_fhir(tmp_path / "b.json")
    made = patient_from_bundle(record)
    assert made["subject_id"] == events["subject_id"][0]
    assert [tuple(event.get(name) for name in EVENT_COLUMNS[1:]) for event in made["events"]] == [
        row[1:] for row in events.iter_rows()
    ]
    assert all(value is not None for event in made["events"] for name, value in event.items() if name != "time")


def test_the_report_is_a_readable_table():
    _, report = clinical(observation(), observation(status="entered-in-error"))
    text = str(report)
    assert "entered in error" in text
    assert "Observation" in text
    assert json.loads(json.dumps(report.to_dict()))["entered_in_error"] == {"Observation": 1}

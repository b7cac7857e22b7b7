"""What a user says about a source when it is prepared: the same in files as in memory, kept, and read by everybody."""

import json
from datetime import datetime

import polars as pl
import pytest
from typer.testing import CliRunner

from ehrseq.audit import audit_dataset
from ehrseq.cli.app import app
from ehrseq.data import EventDataset, load_events, read_fhir, write_dataset
from ehrseq.data.metadata import read_settings
from ehrseq.encode.fitting import fit_tokenizer
from ehrseq.prepare import prepare_dataset
from ehrseq.stats.counting import count_dataset
from ehrseq.tasks import label_events
from ehrseq.tasks.shards import label_dataset
from ehrseq.work.engine import get_engine
from tests.data.fhir.samples import concept, encounter, observation, patient, resource, write_ndjson

ONE = get_engine(num_workers=1)


# -- FHIR: files and memory --------------------------------------------------------------------------------------------


def who(name: str) -> dict:
    return {"reference": f"Patient/{name}"}


@pytest.fixture
def export(tmp_path):
    """Links between patients of several partitions, deletions, dates and times with and without zones, odd classes."""
    folder = tmp_path / "export"
    folder.mkdir()
    names = [f"p{number}" for number in range(12)]
    patients = [patient(name, deceasedBoolean=name == "p3") for name in names]
    patients[5] = patient("p5", link=[{"other": who("p6"), "type": "replaced-by"}])
    patients[7] = patient("p7", link=[{"other": who("p8"), "type": "seealso"}], deceasedDateTime="2020-03")
    ward = {"system": "https://hospital.example/class", "code": "7", "display": "Kurzlieger"}
    stays, facts = [], []
    for number, name in enumerate(names):
        zone = "-07:00" if number % 2 else ""
        stays.append(
            encounter(
                "1" if number < 4 else f"e{number}",  # ids that repeat over patients
                f"2020-01-1{number % 5}T22:30:00{zone}",
                None if number == 2 else f"2020-01-2{number % 5}" if number % 3 else f"2020-01-20T08:00:00{zone}",
                subject=who(name),
                status="in-progress" if number == 2 else "finished",
                **({"class": ward} if number % 4 == 0 else {}),
            )
        )
        link = {"reference": "Encounter/1" if number < 4 else f"Encounter/e{number}"}
        facts.append(observation(id=f"o{number}", subject=who(name), encounter=link, effectiveDateTime="2020-01-15"))
        facts.append(
            resource(
                "Condition",
                code=concept("59621000"),
                subject=who(name),
                recordedDate="2020-01-16T01:00",
                id=f"c{number}",
            )
        )
    write_ndjson(folder / "Patient.ndjson", *patients)
    write_ndjson(folder / "Encounter.ndjson", *stays)
    write_ndjson(folder / "Observation.ndjson", *facts)
    delete = ["Observation/o4", "Encounter/e9", "Patient/p11", "Condition/c5"]
    entries = [{"request": {"method": "DELETE", "url": url}} for url in delete]
    write_ndjson(folder / "deleted.ndjson", {"resourceType": "Bundle", "type": "transaction", "entry": entries})
    return folder


@pytest.mark.parametrize("shard_rows", [1, 100_000])
@pytest.mark.parametrize(
    "said",
    [
        {},
        {"timezone": "America/Denver"},
        {"timezone": "+05:30"},
        {"encounter_classes": {"Kurzlieger": "IMP"}},
        {"timezone": "Europe/Berlin", "encounter_classes": {"7": "SS"}},
    ],
    ids=str,
)
def test_files_give_what_memory_gives_of_links_deletions_zones_and_classes(export, tmp_path, said, shard_rows):
    events, report = read_fhir(export, progress=False, **said)
    prepared = prepare_dataset(export, tmp_path / "out", engine=ONE, shard_rows=shard_rows, **said).conversion
    dataset = EventDataset(tmp_path / "out")
    assert dataset.events().equals(events)
    assert events.filter(pl.col("code").str.starts_with("TIMEZONE//")).height
    for name in ("notes", "skipped", "unresolved_references", "time_from_encounter_end", "resources_read"):
        assert +getattr(prepared, name) == +getattr(report, name), name
    assert read_settings(tmp_path / "out").to_dict() == report.settings == prepared.settings
    assert load_events(export, progress=False, **said)[0].equals(events)


# -- MEDS: said once, read by everybody --------------------------------------------------------------------------------

RULES = [[r"ADMIT/WARD$", "visit_start:IMP"], [r"DISCHARGE/WARD$", "visit_end:IMP"]]


@pytest.fixture
def foreign(tmp_path):
    """40 patients with two admissions, 22:00 to 01:30 apart, whose codes nobody knows."""
    rows = []
    for subject in range(40):
        rows += [
            (subject, datetime(2031, 5, 2, 16), "ADMIT/WARD", "a"),
            (subject, datetime(2031, 5, 3, 16), f"LAB//{subject % 3}", "a"),
            (subject, datetime(2031, 5, 10, 22), "DISCHARGE/WARD", "a"),
            (subject, datetime(2031, 5, 11, 1, 30), "ADMIT/WARD", "b"),
            (subject, datetime(2031, 5, 14, 10), "DISCHARGE/WARD", "b"),
        ]
    folder = tmp_path / "foreign"
    (folder / "data").mkdir(parents=True)
    pl.DataFrame(rows, schema=["subject_id", "time", "code", "visit_id"], orient="row").write_parquet(
        folder / "data" / "0.parquet"
    )
    return folder


@pytest.mark.parametrize("where", ["options", "metadata of the source"])
def test_codes_and_zone_of_a_meds_dataset_are_said_once_and_read_by_everybody(foreign, tmp_path, where, caplog):
    said = {"timezone": "America/Denver", "code_map": RULES}
    if where != "options":
        (foreign / "metadata").mkdir()
        (foreign / "metadata" / "dataset.json").write_text(json.dumps(said))
        said = {}
    out = tmp_path / "out"
    prepare_dataset(foreign, out, engine=ONE, **said)
    assert "No code is an admission" not in caplog.text
    assert json.loads((out / "metadata" / "dataset.json").read_text())["code_map"] == RULES

    # one admission: 15:00 and 18:30 of one day at the hospital
    labels = label_dataset(out, ["readmission_30d"], end_of_data="2034-01-01", engine=ONE)
    assert labels.labels["readmission_30d"]["prediction_time"].unique().to_list() == [datetime(2031, 5, 14, 10)]
    kinds = dict(count_dataset(out, engine=ONE).codes.select("code", "kind").iter_rows())
    assert (kinds["ADMIT/WARD"], kinds["DISCHARGE/WARD"]) == ("visit_start", "visit_end")
    tokenizer = fit_tokenizer(out, tmp_path / "parts", min_count=1, engine=ONE)
    assert tokenizer.vocabulary.kind("ADMIT/WARD") == ("visit_start", "IMP")
    report = audit_dataset(out, out, engine=ONE)
    assert not [finding for finding in report.findings if finding.kind.startswith("label")]


def test_without_a_word_of_them_the_dataset_says_how_to_say_it(foreign, tmp_path, caplog):
    prepare_dataset(foreign, tmp_path / "out", engine=ONE)
    assert "No code is an admission" in caplog.text
    assert "ehrseq prepare --code-map 'ADMIT/WARD$=visit_start:IMP'" in caplog.text
    assert read_settings(tmp_path / "out").to_dict() == {}


def test_what_is_said_now_wins_over_the_source(foreign, tmp_path):
    prepare_dataset(foreign, tmp_path / "one", engine=ONE, timezone="-07:00", code_map=RULES)
    prepare_dataset(tmp_path / "one", tmp_path / "two", engine=ONE, timezone="Europe/London")
    settings = read_settings(tmp_path / "two")
    assert settings.timezone == "Europe/London"
    assert settings.code_map == tuple((pattern, kind) for pattern, kind in RULES)
    for name, zone in (("one", "-07:00"), ("two", "Europe/London")):
        codes = EventDataset(tmp_path / name).events()["code"]
        assert codes.filter(codes.str.starts_with("TIMEZONE")).to_list() == [f"TIMEZONE//{zone}"] * 40
    # 22:00 and 01:30 UTC are one afternoon in Denver, and two days in London.
    readmitted = [
        label_dataset(tmp_path / name, "readmission_30d", end_of_data="2034-01-01", engine=ONE)
        for name in ("one", "two")
    ]
    assert [labels.labels["readmission_30d"].height for labels in readmitted] == [40, 80]


# Whose rows, and which zone wins: that of a visit, of the patient's row, of the metadata.
ZONES = [
    ([], "America/Denver", 1),
    ([], None, 2),
    ([("TIMEZONE//+00:00", None)], "America/Denver", 2),
    ([("TIMEZONE//-07:00", None)], "Europe/Berlin", 1),
    ([("TIMEZONE//-07:00", "a"), ("TIMEZONE//-07:00", "b")], "Europe/Berlin", 1),
    ([("TIMEZONE//+00:00", "a"), ("TIMEZONE//+00:00", "b")], "America/Denver", 2),
]


@pytest.mark.parametrize(("rows", "zone", "stays"), ZONES, ids=str)
@pytest.mark.parametrize("writer", ["somebody else", "ours"])
def test_a_table_that_was_loaded_has_the_zone_of_its_folder_and_the_labels_of_the_folder(
    rows, zone, stays, writer, tmp_path
):
    times = [datetime(2031, 5, 2, 9), datetime(2031, 5, 8, 22), datetime(2031, 5, 9, 1, 30), datetime(2031, 5, 14, 10)]
    visits = [("VISIT_START//IMP", "a"), ("VISIT_END//home", "a"), ("VISIT_START//IMP", "b"), ("VISIT_END//home", "b")]
    table = [(7, time, code, visit) for time, (code, visit) in zip(times, visits, strict=True)]
    table += [(7, None, code, visit) for code, visit in rows]
    events = pl.DataFrame(table, schema=["subject_id", "time", "code", "visit_id"], orient="row")
    folder = tmp_path / "dataset"
    if writer == "ours":  # a dataset of an earlier version, which kept the zone in its metadata alone
        write_dataset(events, folder, dataset_name="d", splits=pl.DataFrame({"subject_id": [7], "split": ["train"]}))
        file = folder / "metadata" / "dataset.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | ({"timezone": zone} if zone else {})))
    else:
        (folder / "data" / "train").mkdir(parents=True)
        (folder / "metadata").mkdir()
        events.write_parquet(folder / "data" / "train" / "0.parquet")
        (folder / "metadata" / "dataset.json").write_text(json.dumps({"timezone": zone} if zone else {}))
    loaded, report = load_events(folder)
    by_table = label_events(loaded, "readmission_30d", end_of_data="2034-01-01").labels["readmission_30d"]
    assert by_table.height == stays
    assert EventDataset(folder).events().equals(loaded)
    added = report.notes["patients whose zone the dataset's metadata name"]
    assert added == bool(zone and not any(visit is None for _, visit in rows))
    prepare_dataset(folder, tmp_path / "again", engine=ONE)
    assert load_events(tmp_path / "again")[0].equals(loaded)
    for dataset in (folder, tmp_path / "again"):
        by_folder = label_dataset(dataset, "readmission_30d", end_of_data="2034-01-01", engine=ONE)
        assert by_folder.labels["readmission_30d"].equals(by_table)
    if writer == "ours":
        part = EventDataset(folder).events("train", columns=["code"])["code"]
        assert part.to_list() == loaded["code"].to_list()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"timezone": "Mars/Base"}, "timezone got 'Mars/Base', which is not known"),
        ({"timezone": 7}, "timezone got 7"),
        ({"code_map": [["(", "visit_start:IMP"]]}, "no regular expression"),
        ({"code_map": [["x", "visit"]]}, "code_map sends 'x' to 'visit'"),
        ({"code_map": ["xy", "visit_start:IMP"]}, r"must be a list of \[regular expression, kind\] pairs"),
        ({"code_map": {"x": "lab"}}, r"expected a list of \[regular expression, kind\] pairs"),
        ({"code_map": "x=lab"}, r"expected a list of \[regular expression, kind\] pairs"),
        ({"encounter_classes": {"7": "IMP"}}, "encounter_classes is for FHIR; .* say it by code_map"),
    ],
)
def test_words_that_say_nothing_are_refused(foreign, tmp_path, said, message):
    with pytest.raises(ValueError, match=message):
        prepare_dataset(foreign, tmp_path / "out", engine=ONE, **said)
    assert not (tmp_path / "out").exists()


def test_a_code_map_is_none_of_fhirs(export, tmp_path):
    with pytest.raises(ValueError, match=r"code_map is for MEDS; .* by encounter_classes"):
        prepare_dataset(export, tmp_path / "out", engine=ONE, code_map=RULES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"timezone": "Mars/Base"}', "dataset.json: timezone got 'Mars/Base'"),
        ('{"timezone": 5}', "dataset.json: timezone got 5"),
        ('{"code_map": [["x"]]}', "dataset.json: code_map must be a list"),
        ('{"code_map": 5}', "dataset.json: code_map must be a list"),
        ('{"encounter_classes": [1]}', "dataset.json: encounter_classes got"),
        ("[]", "dataset.json holds a list"),
        ("{", "dataset.json is not JSON"),
    ],
)
def test_metadata_that_say_nothing_are_refused_by_name(foreign, content, message):
    (foreign / "metadata").mkdir()
    (foreign / "metadata" / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_events(foreign)


@pytest.mark.parametrize("said", [{"timezone": "UTC"}, {"encounter_classes": {"7": "IMP"}}])
def test_in_memory_a_meds_dataset_is_taken_as_it_is(foreign, said):
    with pytest.raises(ValueError, match=r"say how FHIR is read; .* holds meds"):
        load_events(foreign, **said)


def test_the_command_line_takes_both(foreign, tmp_path):
    options = [
        "--code-map",
        "ADMIT/WARD$=visit_start:IMP",
        "--code-map",
        "DISCHARGE/WARD$=visit_end:IMP",
        "--timezone",
        "-07:00",
    ]
    done = CliRunner().invoke(app, ["prepare", str(foreign), str(tmp_path / "out"), "--workers", "1", *options])
    assert done.exit_code == 0, done.output
    assert read_settings(tmp_path / "out").to_dict() == {"timezone": "-07:00", "code_map": RULES}

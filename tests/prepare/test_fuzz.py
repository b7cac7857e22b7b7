"""Resources, times, units and tables of any kind: never a crash, and the same rows in memory and by partitions."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from ehrseq.data import EventDataset, read_fhir, validate_events
from ehrseq.data.meds import read_meds_with_report
from ehrseq.data.schema import EVENT_SCHEMA
from ehrseq.prepare import prepare_dataset
from ehrseq.work.engine import get_engine
from tests.properties import examples

ONE = get_engine(num_workers=1)
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
EXAMPLES = int(os.environ.get("EHRSEQ_FUZZ", "25"))
SHORT = examples(EXAMPLES, phases=PHASES, suppress_health_check=list(HealthCheck))
LONG = examples(40 * EXAMPLES, phases=PHASES, suppress_health_check=list(HealthCheck))

people = st.sampled_from(["1", "2", "3", "a", "b"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
times = st.sampled_from(
    [
        *("2020", "2020-02", "2020-02-30", "2020-02-03", "", "9999-12-31", "0001-01-01", "x"),
        *("2020-02-03T04:05:06Z", "2020-02-03T04:05:06.789+14:00", "2020-02-03T24:00:00-12:00"),
        *("2020-12-31T23:59:60Z", "2020-02-03T04:05"),
    ]
)
units = st.sampled_from(["mg/dL", "mmol/L", "", "µmol/l", "10*3/uL", "//", "\x00", "\ud83d\ude00"])
concepts = st.fixed_dictionaries(
    {
        "coding": st.lists(
            st.fixed_dictionaries(
                {"code": st.sampled_from(["I10", "E119", "2345-7", "a//b", " "])},
                optional={
                    "system": st.sampled_from(["http://loinc.org", "http://hl7.org/fhir/sid/icd-10-cm", "urn:x", ""]),
                    "display": st.text(max_size=5),
                },
            ),
            max_size=2,
        )
    }
) | st.fixed_dictionaries({"text": st.text(max_size=6)})
references = st.builds(
    lambda form, name: {
        "literal": {"reference": f"Patient/{name}"},
        "urn": {"reference": f"urn:uuid:{name}"},
        "absolute": {"reference": f"http://s/fhir/Patient/{name}"},
        "identifier": {"identifier": {"system": "s", "value": name}},
    }[form],
    st.sampled_from(["literal", "urn", "absolute", "identifier"]),
    people,
)
periods = st.fixed_dictionaries({}, optional={"start": times, "end": times})
encounters = st.sampled_from(["e1", "e2", "e3"])
quantities = st.fixed_dictionaries(
    {}, optional={"value": st.floats() | st.integers() | st.text(max_size=3), "unit": units, "comparator": st.just("<")}
)
metas = st.fixed_dictionaries({}, optional={"lastUpdated": times, "versionId": st.text(max_size=2)})


def one(kind: str, needed: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy:
    """Resources of a type; now and then an element of them is anything."""
    sound = st.fixed_dictionaries(
        {"resourceType": st.just(kind), **needed}, optional={"meta": metas, "status": st.text(max_size=4), **optional}
    )
    spoilt = st.builds(
        lambda resource, name, value: {**resource, name: value},
        sound,
        st.sampled_from([*needed, *optional, "meta"]),
        anything,
    )
    return st.one_of(sound, sound, sound, spoilt)


who = {"subject": references}
where = {"encounter": st.builds(lambda name: {"reference": f"Encounter/{name}"}, encounters)}
resources = st.one_of(
    one(
        "Patient",
        {"id": people, "gender": st.sampled_from(["male", "female", "x"])},
        {
            "birthDate": times,
            "deceasedDateTime": times,
            "identifier": st.builds(lambda name: [{"system": "s", "value": name}], people),
        },
    ),
    one(
        "Encounter",
        {
            "id": encounters,
            "period": periods,
            "class": st.fixed_dictionaries({"code": st.sampled_from(["IMP", "AMB"])}),
        },
        {**who, "partOf": where["encounter"]},
    ),
    one(
        "Observation",
        {"id": st.text("ab", max_size=2), "code": concepts, **who},
        {
            **where,
            "effectiveDateTime": times,
            "issued": times,
            "effectivePeriod": periods,
            "valueQuantity": quantities,
            "valueString": st.text(max_size=4),
            "component": st.lists(st.fixed_dictionaries({"code": concepts, "valueQuantity": quantities}), max_size=2),
        },
    ),
    one("Condition", {"id": st.text("ab", max_size=2), "code": concepts, **who}, {**where, "recordedDate": times}),
    one(
        "MedicationRequest",
        {"id": st.text("ab", max_size=2), **who},
        {
            **where,
            "authoredOn": times,
            "medicationCodeableConcept": concepts,
            "medicationReference": st.just({"reference": "Medication/m"}),
        },
    ),
    one("Medication", {"id": st.just("m"), "code": concepts}, {}),
)


def check_fhir(lines: list[dict[str, Any]], cuts: int) -> None:
    lines = [{"resourceType": "Patient", "id": "1", "gender": "male"}, *lines]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "fhir"
        folder.mkdir()
        for number in range(cuts):
            text = "".join(json.dumps(line) + "\n" for line in lines[number::cuts])
            (folder / f"{number}.ndjson").write_text(text, encoding="utf-8")
        events, expected = read_fhir(folder, on_error="skip", progress=False)
        if events.is_empty():
            return
        report = prepare_dataset(folder, Path(scratch) / "out", engine=ONE, on_error="skip", shard_rows=2)
        assert EventDataset(Path(scratch) / "out").events().equals(events)
        assert report.conversion.to_dict() == expected.to_dict()
        assert validate_events(events).equals(events)


@SHORT
@given(st.lists(resources, max_size=12), st.integers(1, 3))
def test_fhir_of_any_kind(lines, cuts):
    check_fhir(lines, cuts)


@pytest.mark.slow
@LONG
@given(st.lists(resources, max_size=20), st.integers(1, 3))
def test_fhir_of_any_kind_for_long(lines, cuts):
    check_fhir(lines, cuts)


rows = st.lists(
    st.tuples(
        st.integers(1, 4) | st.just(2**62),
        st.none() | st.datetimes(),
        st.sampled_from(["LAB//a", "MEDS_BIRTH", "MEDS_DEATH", "HOSPITAL_ADMISSION//x", "VISIT_END//y"]),
        st.none() | st.floats(width=32),
        st.none() | st.text(max_size=4),
        st.none() | st.integers(0, 3),
    ),
    min_size=1,
    max_size=30,
)


def check_meds(table: list[tuple[Any, ...]], cut: int) -> None:
    names = ["subject_id", "time", "code", "numeric_value", "text_value", "hadm_id"]
    types = {name: EVENT_SCHEMA.get(name, pl.Int64()) for name in names}
    frame = pl.DataFrame(table, schema=types, orient="row")
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "meds" / "data"
        data.mkdir(parents=True)
        for number, part in enumerate((frame[:cut], frame[cut:])):
            part.write_parquet(data / f"{number}.parquet")
        expected, counts = read_meds_with_report(data.parent)
        if expected.is_empty():  # every row stands at a placeholder
            with pytest.raises(ValueError, match="gives no event to write"):
                prepare_dataset(data.parent, Path(scratch) / "out", engine=ONE, shard_rows=5)
            return
        report = prepare_dataset(data.parent, Path(scratch) / "out", engine=ONE, shard_rows=5).conversion
        assert EventDataset(Path(scratch) / "out").events().equals(expected)
        assert report.duplicates_dropped == counts.duplicates_dropped


@SHORT
@given(rows, st.integers(0, 30))
def test_meds_of_any_kind(table, cut):
    check_meds(table, cut)


@pytest.mark.slow
@LONG
@given(rows, st.integers(0, 30))
def test_meds_of_any_kind_for_long(table, cut):
    check_meds(table, cut)

"""The cohort as FHIR R4: valid resources, and the reader's table equals the simulator's own."""

from __future__ import annotations

import gzip
import json
from importlib import import_module
from pathlib import Path

import pytest

from ehrseq.data.fhir.reader import read_fhir
from ehrseq.data.simulate import fhir
from ehrseq.data.simulate.cohort import Simulation, simulate


@pytest.fixture(scope="module")
def cohort() -> Simulation:
    return simulate(40, seed=41, chunk_size=15, progress=False)


@pytest.fixture(scope="module")
def folder(cohort, tmp_path_factory) -> Path:
    return cohort.write_fhir(tmp_path_factory.mktemp("simulated") / "fhir")


def resources(folder: Path) -> list[dict]:
    return [json.loads(line) for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]


def test_reading_the_files_gives_the_rows_of_the_simulation(cohort, folder):
    events, report = read_fhir(folder, progress=False)
    expected = cohort.events()
    assert events.select(expected.columns).equals(expected)
    assert sum(report.to_dict()["skipped"].values()) == 0


def test_files_hold_duplicates_half_of_them_under_a_new_id(folder):
    ids = [(r["resourceType"], r["id"]) for r in resources(folder)]
    same = len(ids) - len(set(ids))
    renamed = sum(name.endswith("-again") for _, name in ids)
    assert same > 10
    assert renamed > 10


def test_resources_are_valid_fhir_r4(folder):
    """fhir.resources' R4B models (R4's successor in the same family; the elements used here are the same in both)."""
    pytest.importorskip("fhir.resources")
    found = resources(folder)
    seen: dict[str, int] = {}
    for resource in found:
        kind = resource["resourceType"]
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] % (1 if kind in ("Patient", "Encounter") else 40) == 0:
            model = getattr(import_module(f"fhir.resources.R4B.{kind.lower()}"), kind)
            model.model_validate(resource)
    assert set(seen) == set(fhir.RESOURCE_FILES)


def test_references_resolve_and_classes_are_the_contracts(folder):
    found = resources(folder)
    patients = {f"Patient/{r['id']}" for r in found if r["resourceType"] == "Patient"}
    encounters = {f"Encounter/{r['id']}": r for r in found if r["resourceType"] == "Encounter"}
    assert {r["class"]["code"] for r in encounters.values()} == {"IMP", "ACUTE", "EMER", "AMB"}
    for resource in found:
        if resource["resourceType"] == "Patient":
            continue
        assert (resource.get("subject") or resource["patient"])["reference"] in patients
        held_by = resource.get("encounter") or resource.get("context") or resource.get("partOf")
        assert held_by is None or held_by["reference"] in encounters
    children = [r for r in encounters.values() if "partOf" in r]
    assert children
    for child in children:
        parent = encounters[child["partOf"]["reference"]]
        assert child["class"]["code"] == "ACUTE"
        assert parent["class"]["code"] == "IMP"
        assert child["period"]["start"] >= parent["period"]["start"]


def test_compressed_files_hold_the_same_lines_and_the_same_bytes_each_time(cohort, folder, tmp_path):
    first = cohort.write_fhir(tmp_path / "a", compress=True)
    second = cohort.write_fhir(tmp_path / "b", compress=True)
    for file in sorted(folder.iterdir()):
        packed = (first / f"{file.name}.gz").read_bytes()
        assert gzip.decompress(packed) == file.read_bytes()
        assert packed == (second / f"{file.name}.gz").read_bytes()


def test_a_folder_that_holds_something_is_refused(cohort, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="give a new or an empty folder"):
        cohort.write_fhir(tmp_path)
    with pytest.raises(ValueError, match="give a new or an empty folder"):
        cohort.write_fhir(tmp_path / "notes.txt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt"]


def test_a_failure_leaves_nothing_behind(cohort, tmp_path, monkeypatch):
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("disk full")
        return {"Patient": ["{}"]}

    monkeypatch.setattr(fhir, "block_lines", fail)
    with pytest.raises(OSError, match="disk full"):
        cohort.write_fhir(tmp_path / "fhir")
    assert list(tmp_path.iterdir()) == []

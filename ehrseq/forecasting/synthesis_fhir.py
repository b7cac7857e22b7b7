"""Synthetic patients as FHIR R4 NDJSON, in the resources that the simulator writes; read back it gives the same events.

Codes are those of this package's namespace (`LAB//LOINC//2345-7`). Rows with other codes (`HOSPITAL_ADMISSION//...` of
MIMIC-IV) are left out of these files, and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ehrseq.data.fhir.systems import SYSTEM_NAMES, system_name
from ehrseq.data.simulate.codes import RACES
from ehrseq.data.simulate.fhir import RESOURCE_BUILDERS, RESOURCE_FILES
from ehrseq.work.files import write_whole

_TERMINOLOGY = "http://terminology.hl7.org/CodeSystem/"
_CORE = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-"
_OMB = "urn:oid:2.16.840.1.113883.6.238"
_GENDERS = {"F": "female", "M": "male"}
_OMB_CODES = {name.upper(): (code, name) for code, name, _ in RACES}


def write_events_as_fhir(events: pl.DataFrame, folder: str | Path) -> dict[str, int]:
    """Write an event table as one NDJSON file a resource type, the folder whole or not at all.

    Args:
        events: Event table, sorted; births at midnight, times to the second.
        folder: Where to.

    Returns:
        What was left out, by reason.
    """
    notes: Counter[str] = Counter()
    lines: dict[str, list[str]] = {name: [] for name in RESOURCE_FILES}
    for rows in events.partition_by("subject_id", maintain_order=True):
        _patient(rows.to_dicts(), lines, notes)

    def write(unfinished: Path) -> None:
        unfinished.mkdir()
        for name, text in lines.items():
            body = "\n".join(text) + "\n" if text else ""
            (unfinished / f"{name}.ndjson").write_text(body, encoding="utf-8", newline="\n")

    write_whole(folder, write)
    return dict(sorted(notes.items()))


def _patient(rows: list[dict[str, Any]], lines: dict[str, list[str]], notes: Counter[str]) -> None:
    subject = rows[0]["subject_id"]
    person: dict[str, Any] = {"resourceType": "Patient", "id": str(subject), "extension": []}
    encounters: dict[str, dict[str, Any]] = {}
    for place, row in enumerate(rows):
        kind, _, rest = row["code"].partition("//")
        visit = row["visit_id"]
        if kind == "MEDS_BIRTH":
            person["birthDate"] = f"{row['time']:%Y-%m-%d}"
        elif kind == "MEDS_DEATH":
            person["deceasedDateTime"] = _instant(row["time"])
        elif kind == "GENDER" and rest in _GENDERS:
            person["gender"] = _GENDERS[rest]
        elif kind in ("RACE", "ETHNICITY"):
            person["extension"].append(_category(kind.lower(), rest))
        elif kind == "VISIT_START" and visit is not None:
            encounters.setdefault(visit, _encounter(subject, visit, rest))["period"]["start"] = _instant(row["time"])
        elif kind == "VISIT_END" and row["time"] is None:
            continue  # the encounter's status says that it goes on
        elif kind == "VISIT_END" and visit in encounters:
            _end(encounters[visit], rest, _instant(row["time"]))
        elif kind in RESOURCE_BUILDERS and row["time"] is not None:
            concept = _concept(kind, rest)
            if concept is None:
                notes["rows whose code FHIR's files do not carry"] += 1
                continue
            file, prefix, build = RESOURCE_BUILDERS[kind]
            context = "{}" if visit is None else f'{{"reference":"Encounter/{visit}"}}'
            patient = f'{{"reference":"Patient/{subject}"}}'
            name = f"{prefix}{subject}-{place}"
            lines[file].append(build(name, concept, patient, context, _instant(row["time"]), place, _result(row)))
        else:
            notes["rows whose code FHIR's files do not carry"] += 1
    if not person["extension"]:
        del person["extension"]
    lines["Patient"].append(json.dumps(person, separators=(",", ":")))
    lines["Encounter"] += list(_dumped(encounters.values()))


def _encounter(subject: int, visit: str, encounter_class: str) -> dict[str, Any]:
    return {
        "resourceType": "Encounter",
        "id": visit,
        "status": "in-progress",
        "class": {"system": f"{_TERMINOLOGY}v3-ActCode", "code": encounter_class},
        "subject": {"reference": f"Patient/{subject}"},
        "period": {},
    }


def _end(encounter: dict[str, Any], disposition: str, instant: str) -> None:
    encounter["status"] = "finished"
    encounter["period"]["end"] = instant
    if disposition != encounter["class"]["code"]:
        coding = [{"system": f"{_TERMINOLOGY}discharge-disposition", "code": disposition}]
        encounter["hospitalization"] = {"dischargeDisposition": {"coding": coding}}


def _dumped(resources: Iterable[dict[str, Any]]) -> Iterator[str]:
    for resource in resources:
        yield json.dumps(resource, separators=(",", ":"))


def _category(name: str, said: str) -> dict[str, Any]:
    """A US Core race or ethnicity."""
    parts: list[dict[str, Any]] = [{"url": "text", "valueString": said}]
    if said in _OMB_CODES:
        code, display = _OMB_CODES[said]
        parts.insert(0, {"url": "ombCategory", "valueCoding": {"system": _OMB, "code": code, "display": display}})
    return {"url": _CORE + name, "extension": parts}


def _result(row: dict[str, Any]) -> str:
    if row["numeric_value"] is not None:
        value, unit = str(np.float32(row["numeric_value"])), row["unit"]
        said = (
            ""
            if unit is None
            else f',"unit":{json.dumps(unit)},"system":"http://unitsofmeasure.org","code":{json.dumps(unit)}'
        )
        return f',"valueQuantity":{{"value":{value}{said}}}'
    return "" if row["text_value"] is None else f',"valueString":{json.dumps(row["text_value"])}'


def _instant(time: datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%S}Z"


@lru_cache(maxsize=65_536)
def _concept(kind: str, rest: str) -> str | None:
    """CodeableConcept of `SYSTEM//CODE`; None where no system of that name is known to be read back as it."""
    name, _, code = rest.partition("//")
    if not code or "//" in code:
        return None
    system = _system(kind, name)
    if system is None:
        return None
    said = f'"system":{json.dumps(system)},' if system else ""
    return f'{{"coding":[{{{said}"code":{json.dumps(code)}}}]}}'


@lru_cache(maxsize=1024)
def _system(kind: str, name: str) -> str | None:
    """Address of a code system, "" for the hospital's own; None where there is none that is read as this name."""
    if name == "LOCAL":
        return ""
    known = [address for address in SYSTEM_NAMES if address.startswith("http")]
    return next((each for each in (*known, f"http://{name}") if system_name(each, kind) == name), None)


__all__ = ["write_events_as_fhir"]

"""Small FHIR resources for tests."""

import json
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.data.fhir.reader import events_from_bundle

LOINC = "http://loinc.org"
ABSENT = "http://hl7.org/fhir/StructureDefinition/data-absent-reason"
FHIR_DISPOSITION = "http://terminology.hl7.org/CodeSystem/discharge-disposition"
V2_DISPOSITION = "http://terminology.hl7.org/CodeSystem/v2-0112"
NUBC = "https://www.nubc.org/CodeSystem/PatDischargeStatus"
V3 = "http://terminology.hl7.org/CodeSystem/v3-ActCode"
GERMAN = "http://fhir.de/CodeSystem/dkgev/EntlassungsgrundErsteUndZweiteStelle"
ICD10CM = "http://hl7.org/fhir/sid/icd-10-cm"
UCUM = "http://unitsofmeasure.org"
LOCAL = "https://hospital.example/disposition"


def patient(name: str = "p1", **more: Any) -> dict[str, Any]:
    """A woman born on 1950-03-02."""
    return {"resourceType": "Patient", "id": name, "gender": "female", "birthDate": "1950-03-02", **more}


def encounter(
    name: str = "e1", start: str = "2020-01-10T08:00:00Z", end: str | None = "2020-01-15T12:00:00Z", **more: Any
) -> dict[str, Any]:
    """An inpatient encounter of p1."""
    period = {"start": start} if end is None else {"start": start, "end": end}
    return {
        "resourceType": "Encounter",
        "id": name,
        "status": "finished",
        "class": {"code": "IMP"},
        "subject": {"reference": "Patient/p1"},
        "period": period,
        **more,
    }


def observation(
    code: str = "2345-7", value: float | None = 5.5, time: str = "2020-01-11T06:00:00Z", **more: Any
) -> dict[str, Any]:
    """A laboratory result of p1 in e1."""
    out: dict[str, Any] = {
        "resourceType": "Observation",
        "id": "o1",
        "status": "final",
        "category": [{"coding": [{"code": "laboratory"}]}],
        "code": {"coding": [{"system": LOINC, "code": code}]},
        "subject": {"reference": "Patient/p1"},
        "encounter": {"reference": "Encounter/e1"},
        "effectiveDateTime": time,
    }
    if value is not None:
        out["valueQuantity"] = {"value": value, "unit": "mmol/L"}
    return {**out, **more}


def resource(kind: str, **more: Any) -> dict[str, Any]:
    """A resource of p1 in e1."""
    link = "context" if kind in ("MedicationAdministration", "MedicationDispense") else "encounter"
    who = "patient" if kind == "Immunization" else "subject"
    return {
        "resourceType": kind,
        "id": "r1",
        who: {"reference": "Patient/p1"},
        link: {"reference": "Encounter/e1"},
        **more,
    }


def concept(code: str, system: str = "http://snomed.info/sct") -> dict[str, Any]:
    """A CodeableConcept of one coding."""
    return {"coding": [{"system": system, "code": code}]}


def bundle(*resources: dict[str, Any], kind: str = "collection") -> dict[str, Any]:
    """A Bundle without fullUrls."""
    return {"resourceType": "Bundle", "type": kind, "entry": [{"resource": item} for item in resources]}


def write_ndjson(path: Path, *resources: dict[str, Any]) -> Path:
    """One resource a line."""
    path.write_text("".join(json.dumps(item) + "\n" for item in resources), encoding="utf-8")
    return path


def read(*resources: dict[str, Any], **options: Any) -> tuple[pl.DataFrame, Any]:
    """Events of resources, and the report."""
    events, report = events_from_bundle(bundle(*resources), **options)
    return events, report


def codes(events: pl.DataFrame, prefix: str = "") -> list[str]:
    """Codes that begin so."""
    return events.filter(pl.col("code").str.starts_with(prefix))["code"].to_list()


def rows(events: pl.DataFrame, prefix: str) -> list[tuple]:
    """Time, code and text of the rows whose codes begin so."""
    return events.filter(pl.col("code").str.starts_with(prefix)).select("time", "code", "text_value").rows()


def coded(*codings: tuple[str, ...]) -> dict[str, Any]:
    """A CodeableConcept of (system, code, display)."""
    return {"coding": [dict(zip(("system", "code", "display"), coding, strict=False)) for coding in codings]}

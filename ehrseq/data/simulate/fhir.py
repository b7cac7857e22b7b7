"""A simulated cohort as FHIR R4 NDJSON, as a hospital's Bulk Data export would hold it: one file per resource type.

The files hold what real exports hold beside the facts: exact duplicates (half under a new id), results issued after
the discharge, several units for one laboratory test, panels whose values are components, emergency encounters that
overlap the admission and intensive-care children of it, encounters still open at the extraction. Reading them back
gives `Simulation.events()`.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ehrseq.data.dataset import make_folder
from ehrseq.data.simulate.codes import CULTURE_CODE, DISPOSITIONS, RACES, VOCABULARY
from ehrseq.data.simulate.state import NEVER, STATIC, TEXTS, UNITS, SimulatedBlock
from ehrseq.data.simulate.tables import ordered_events
from ehrseq.work.files import write_whole

RESOURCE_FILES = (
    "Patient",
    "Encounter",
    "Condition",
    "Immunization",
    "MedicationAdministration",
    "MedicationRequest",
    "Observation",
    "Procedure",
)
"""Resource types, a file each."""

DUPLICATE_EVERY = 211
"""One event of so many within a patient stands twice in the files."""

_SYSTEMS = {
    "LOINC": "http://loinc.org",
    "SNOMED": "http://snomed.info/sct",
    "RXNORM": "http://www.nlm.nih.gov/research/umls/rxnorm",
    "ICD10CM": "http://hl7.org/fhir/sid/icd-10-cm",
    "CVX": "http://hl7.org/fhir/sid/cvx",
}
_TERMINOLOGY = "http://terminology.hl7.org/CodeSystem/"
_OMB = '"system":"urn:oid:2.16.840.1.113883.6.238"'
_RACE_URL = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-race"
_BLOOD_PRESSURE = '{"coding":[{"system":"http://loinc.org","code":"85354-9","display":"Blood pressure panel"}]}'


def write_fhir(
    blocks: Iterable[tuple[np.ndarray, SimulatedBlock]], folder: str | Path, *, compress: bool = False
) -> Path:
    """Write a cohort, block by block, into a folder that appears only when it is complete.

    Args:
        blocks: (subject_ids int64 `[n]`, what the process left of these patients) of each block.
        folder: Folder to make; it may exist only if it is empty.
        compress: Whether to write `.ndjson.gz`.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds something already, or is a file.
    """
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(
            f"write_fhir got {str(target)!r}, which holds something already; give a new or an empty folder."
        )
    make_folder(target.parent)

    def write(unfinished: Path) -> None:
        unfinished.mkdir()
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(_open(unfinished / f"{name}.ndjson", compress)) for name in RESOURCE_FILES
            }
            for subject_ids, block in blocks:
                for name, lines in block_lines(subject_ids, block).items():
                    if lines:
                        files[name].write("\n".join(lines) + "\n")

    write_whole(target, write)
    return target


def _open(path: Path, compress: bool) -> io.TextIOWrapper:
    if not compress:
        return path.open("w", encoding="utf-8", newline="\n")
    return _Gzipped(path.with_name(path.name + ".gz").open("wb"))


class _Gzipped(io.TextIOWrapper):
    """Text into a gzip file, without name and time in its header: the same cohort gives the same bytes."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        packed = gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=4, mtime=0)
        super().__init__(packed, encoding="utf-8", newline="\n")

    def close(self) -> None:
        """Close the text and the file below it (GzipFile leaves a `fileobj` open)."""
        super().close()
        self._file.close()


def block_lines(subject_ids: np.ndarray, block: SimulatedBlock) -> dict[str, list[str]]:
    """NDJSON lines of a block of patients, by resource type.

    Args:
        subject_ids: int64 `[n]`.
        block: What the process left of these patients.
    """
    lines: dict[str, list[str]] = {name: [] for name in RESOURCE_FILES}
    lines["Patient"] = list(_patients(subject_ids, block))
    lines["Encounter"] = list(_encounters(subject_ids, block))
    _clinical(subject_ids, block, lines)
    return lines


def _instants(minutes: np.ndarray) -> list[str]:
    """`2010-07-11T14:33:00Z` of minutes since 1970; a wrong but harmless text where the time is none."""
    sensible = np.where((minutes == STATIC) | (minutes == NEVER), 0, minutes)
    return [f"{text}Z" for text in np.datetime_as_string(sensible.astype("datetime64[m]"), unit="s").tolist()]


def _patients(subject_ids: np.ndarray, block: SimulatedBlock) -> Iterator[str]:
    births, deaths = _instants(block.birth), _instants(block.death)
    for k, subject in enumerate(subject_ids.tolist()):
        code, name, _ = RACES[int(block.race[k])]
        died = "" if block.death[k] == NEVER else f',"deceasedDateTime":"{deaths[k]}"'
        yield (
            f'{{"resourceType":"Patient","id":"{subject}","extension":[{{"url":"{_RACE_URL}","extension":[{{"url":"ombCategory",'
            f'"valueCoding":{{{_OMB},"code":"{code}","display":"{name}"}}}},{{"url":"text","valueString":"{name}"}}]}}],'
            f'"identifier":[{{"system":"urn:ehrseq:simulated-patient","value":"{subject}"}}],'
            f'"gender":"{"male" if block.male[k] else "female"}","birthDate":"{births[k][:10]}"{died}}}'
        )


_CLASS_NAMES = {"IMP": "inpatient encounter", "ACUTE": "inpatient acute", "EMER": "emergency", "AMB": "ambulatory"}


def _encounters(subject_ids: np.ndarray, block: SimulatedBlock) -> Iterator[str]:
    table = block.encounters
    order = np.lexsort((table["start"], table["row"]))
    subjects = subject_ids[table["row"][order]].tolist()
    starts, ends = _instants(table["start"][order]), _instants(table["end"][order])
    is_open = (table["end"][order] == NEVER).tolist()
    columns = (table[name][order].tolist() for name in ("number", "start_code", "parent", "disposition"))
    for k, (number, code, parent, disposition) in enumerate(zip(*columns, strict=True)):
        name = VOCABULARY.codes[code].split("//")[1]
        period = f'"start":"{starts[k]}"' + ("" if is_open[k] else f',"end":"{ends[k]}"')
        above = "" if parent < 0 else f',"partOf":{{"reference":"Encounter/{subjects[k]}-{parent}"}}'
        left = ""
        if disposition >= 0:
            left = (
                f',"hospitalization":{{"dischargeDisposition":{{"coding":[{{"system":"{_TERMINOLOGY}discharge-disposition",'
                f'"code":"{DISPOSITIONS[disposition]}"}}]}}}}'
            )
        yield (
            f'{{"resourceType":"Encounter","id":"{subjects[k]}-{number}",'
            f'"status":"{"in-progress" if is_open[k] else "finished"}",'
            f'"class":{{"system":"{_TERMINOLOGY}v3-ActCode","code":"{name}","display":"{_CLASS_NAMES[name]}"}},'
            f'"subject":{{"reference":"Patient/{subjects[k]}"}},"period":{{{period}}}{left}{above}}}'
        )


# A line builder: (id, coding, patient reference, encounter reference, instant, number within the patient, value) ->
# the text of one resource.
_Builder = Callable[[str, str, str, str, str, int, str], str]


def _condition(name: str, coding: str, patient: str, encounter: str, instant: str, place: int, value: str) -> str:
    return (
        f'{{"resourceType":"Condition","id":"{name}","clinicalStatus":{{"coding":[{{"system":"{_TERMINOLOGY}condition-clinical","code":"active"}}]}},'
        f'"verificationStatus":{{"coding":[{{"system":"{_TERMINOLOGY}condition-ver-status","code":"confirmed"}}]}},'
        f'"category":[{{"coding":[{{"system":"{_TERMINOLOGY}condition-category","code":"encounter-diagnosis"}}]}}],'
        f'"code":{coding},"subject":{patient},"encounter":{encounter},"recordedDate":"{instant}"}}'
    )


def _immunization(name: str, coding: str, patient: str, encounter: str, instant: str, place: int, value: str) -> str:
    return (
        f'{{"resourceType":"Immunization","id":"{name}","status":"completed","vaccineCode":{coding},"patient":{patient},'
        f'"encounter":{encounter},"occurrenceDateTime":"{instant}"}}'
    )


def _administration(name: str, coding: str, patient: str, encounter: str, instant: str, place: int, value: str) -> str:
    return (
        f'{{"resourceType":"MedicationAdministration","id":"{name}","status":"completed","medicationCodeableConcept":{coding},'
        f'"subject":{patient},"context":{encounter},"effectiveDateTime":"{instant}"}}'
    )


def _request(name: str, coding: str, patient: str, encounter: str, instant: str, place: int, value: str) -> str:
    return (
        f'{{"resourceType":"MedicationRequest","id":"{name}","status":"active","intent":"order","medicationCodeableConcept":{coding},'
        f'"subject":{patient},"encounter":{encounter},"authoredOn":"{instant}"}}'
    )


def _procedure(name: str, coding: str, patient: str, encounter: str, instant: str, place: int, value: str) -> str:
    # Every other procedure as a period of no length known but its end: the end is when the fact is available.
    performed = f'"performedPeriod":{{"end":"{instant}"}}' if place % 2 else f'"performedDateTime":"{instant}"'
    return (
        f'{{"resourceType":"Procedure","id":"{name}","status":"completed","code":{coding},"subject":{patient},'
        f'"encounter":{encounter},{performed}}}'
    )


def _lab(name: str, coding: str, patient: str, encounter: str, instant: str, place: int, value: str) -> str:
    return (
        f'{{"resourceType":"Observation","id":"{name}","status":"final","category":[{{"coding":[{{"system":"{_TERMINOLOGY}observation-category",'
        f'"code":"laboratory"}}]}}],"code":{coding},"subject":{patient},"encounter":{encounter},"effectiveDateTime":"{instant}",'
        f'"issued":"{instant}"{value}}}'
    )


def _vital(name: str, coding: str, patient: str, encounter: str, instant: str, place: int, value: str) -> str:
    measured = f'"code":{coding}{value}'
    if '"8480-6"' in coding:  # systolic pressure: a component of the blood pressure panel
        measured = f'"code":{_BLOOD_PRESSURE},"component":[{{{measured}}}]'
    return (
        f'{{"resourceType":"Observation","id":"{name}","status":"final","category":[{{"coding":[{{"system":"{_TERMINOLOGY}observation-category",'
        f'"code":"vital-signs"}}]}}],{measured},"subject":{patient},"encounter":{encounter},"effectiveDateTime":"{instant}"}}'
    )


RESOURCE_BUILDERS: dict[str, tuple[str, str, _Builder]] = {
    "DIAGNOSIS": ("Condition", "c", _condition),
    "IMMUNIZATION": ("Immunization", "i", _immunization),
    "MEDICATION": ("MedicationAdministration", "a", _administration),
    "LAB": ("Observation", "o", _lab),
    "VITAL": ("Observation", "v", _vital),
    "PROCEDURE": ("Procedure", "p", _procedure),
}
"""Kind of a code -> file of its resources, letter that their ids begin with, and what writes a line."""


def _concept(code: str) -> str:
    _, system, local = code.split("//")
    return f'{{"coding":[{{"system":"{_SYSTEMS[system]}","code":"{local}"}}]}}'


def _clinical(subject_ids: np.ndarray, block: SimulatedBlock, lines: dict[str, list[str]]) -> None:
    """Append a resource per clinical event, in the order of the table, and the duplicates."""
    events = ordered_events(block)
    builders = [RESOURCE_BUILDERS.get(code.split("//")[0]) for code in VOCABULARY.codes]
    concepts = [_concept(code) if builder else "" for code, builder in zip(VOCABULARY.codes, builders, strict=True)]
    culture = VOCABULARY.index[CULTURE_CODE]
    inpatient = _inpatient_encounters(block)
    ends = {key: end for key, (is_inpatient, end) in inpatient.items() if is_inpatient}
    instants = _instants(events["minutes"])
    previous, place = -1, 0
    columns = (events[name].tolist() for name in ("row", "code", "value", "unit", "text", "encounter"))
    for k, (row, code, value, unit, text, number) in enumerate(zip(*columns, strict=True)):
        builder = builders[code]
        if builder is None:
            continue
        place = place + 1 if row == previous else 0
        previous = row
        file, prefix, build = builder
        if file == "MedicationAdministration" and not inpatient[row, number][0]:
            file, prefix, build = "MedicationRequest", "r", _request
        subject = int(subject_ids[row])
        result = ""
        if value == value:  # not NaN
            result = f',"valueQuantity":{{"value":{value!r},"unit":"{UNITS[unit]}","system":"http://unitsofmeasure.org","code":"{UNITS[unit]}"}}'
        elif text:
            result = f',"valueString":"{TEXTS[text]}"'
        patient = f'{{"reference":"Patient/{subject}"}}'
        encounter = f'{{"reference":"Encounter/{subject}-{number}"}}'
        line = build(f"{prefix}{subject}-{place}", concepts[code], patient, encounter, instants[k], place, result)
        if code == culture:
            # The blood was drawn in the stay, the result came later.
            drawn = _instants(np.array([ends[row, number] - 120]))[0]
            line = line.replace(f'"effectiveDateTime":"{instants[k]}"', f'"effectiveDateTime":"{drawn}"')
        lines[file].append(line)
        if (place + subject) % DUPLICATE_EVERY == 0:
            again = (
                line
                if place % 2
                else line.replace(f'"id":"{prefix}{subject}-{place}"', f'"id":"{prefix}{subject}-{place}-again"')
            )
            lines[file].append(again)


def _inpatient_encounters(block: SimulatedBlock) -> dict[tuple[int, int], tuple[bool, int]]:
    """(row, number) -> (whether the encounter is inpatient, its end in minutes)."""
    table = block.encounters
    code = VOCABULARY.index["VISIT_START//IMP"]
    return {
        (row, number): (start == code, end)
        for row, number, start, end in zip(
            table["row"].tolist(),
            table["number"].tolist(),
            table["start_code"].tolist(),
            table["end"].tolist(),
            strict=True,
        )
    }

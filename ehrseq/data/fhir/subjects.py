"""Which patients are one person, and the number of each: it depends on the patient's own id alone."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ehrseq.data.fhir.references import Resolver, bare_id
from ehrseq.data.fhir.versions import PatientVersion
from ehrseq.data.report import ConversionReport

_MAX_INT64 = 2**63 - 1
_FORWARD = ("replaced-by", "refer")
"""Links to the record that counts."""


@dataclass(frozen=True)
class People:
    """The patients of a source as people.

    Attributes:
        keys: Of each person the keys of all their patients, those of the one that counts first.
        subject_ids: The number of each person.
    """

    keys: list[list[str]]
    subject_ids: list[int]


def people_of(patients: Sequence[PatientVersion], report: ConversionReport) -> People:
    """Who the patients are: those that `Patient.link` joins are one.

    Args:
        patients: One version of each.
        report: Takes what is joined, and the source's ids.

    Raises:
        ValueError: The ids of two people have the same number.
    """
    mains = _mains(patients, report)
    names = source_ids(patients)
    members: dict[int, list[int]] = defaultdict(list)
    for number, main in enumerate(mains):
        members[main].append(number)
    mapping = subject_ids_of(names[main] for main in members)
    numbers_of = {name: mapping[names[main]] for name, main in zip(names, mains, strict=True)}
    report.subject_ids = numbers_of if any(str(number) != name for name, number in numbers_of.items()) else {}
    keys = [
        list(dict.fromkeys(key for number in (main, *numbers) for key in patients[number].keys))
        for main, numbers in members.items()
    ]
    return People(keys, [mapping[names[main]] for main in members])


def _mains(patients: Sequence[PatientVersion], report: ConversionReport) -> list[int]:
    """For each patient the one that counts among those that links join it with, often itself."""
    mains = list(range(len(patients)))
    if not any(patient.links for patient in patients):
        return mains
    resolver = Resolver("Patient", [patient.keys for patient in patients])
    replaced: set[int] = set()

    def find(number: int) -> int:
        while mains[number] != number:
            mains[number] = number = mains[mains[number]]
        return number

    for number, patient in enumerate(patients):
        for link in patient.links:
            kind, _, key = link.partition(" ")
            other = resolver.find(key)
            if other < 0:
                report.notes["links to patients that were not given"] += 1
                continue
            if kind in _FORWARD:
                replaced.add(number)
            elif kind == "replaces":
                replaced.add(other)
            mains[find(other)] = find(number)
    groups: dict[int, list[int]] = defaultdict(list)
    for number in range(len(patients)):
        groups[find(number)].append(number)
    for numbers in groups.values():
        # The record that none replaces; of several, or in a circle, the one with the smallest id.
        standing = [number for number in numbers if number not in replaced] or numbers
        main = min(standing, key=lambda number: (patients[number].id, number))
        for number in numbers:
            mains[number] = main
        if len(numbers) > 1:
            report.notes[JOINED] += len(numbers) - 1
    return mains


JOINED = "patients that are another one (Patient.link), read as one"
"""Note of a report."""


def source_ids(patients: Sequence[PatientVersion]) -> list[str]:
    """Each patient's id at its source; its full URL where two servers use one id for (perhaps) two patients."""
    servers: dict[str, set[str]] = {}
    first = [patient.keys[0] for patient in patients]
    for key in first:
        servers.setdefault(bare_id(key), set()).add(key)
    return [key if len(servers[bare_id(key)]) > 1 else bare_id(key) for key in first]


def subject_id_of(name: str) -> int:
    """subject_id of a source id: the number itself where it is a whole number that fits, else a 63-bit hash of it.

    The hash (BLAKE2b, first 8 bytes, big-endian, without its lowest bit) depends on the id only: a patient keeps its
    subject_id in every conversion, also when read alone, whoever stands beside it.

    Example:
        >>> subject_id_of("12")
        12
    """
    if name.isascii() and name.isdigit() and len(name) < 20 and str(int(name)) == name and int(name) <= _MAX_INT64:
        return int(name)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def subject_ids_of(names: Iterable[str]) -> dict[str, int]:
    """subject_id of each source id (see `subject_id_of`).

    Raises:
        ValueError: Two ids have the same number (once in about 10^8 conversions of 300,000 patients).

    Example:
        >>> subject_ids_of(["12", "7"])
        {'12': 12, '7': 7}
    """
    mapping = {name: subject_id_of(name) for name in names}
    if len(set(mapping.values())) < len(mapping):
        first: dict[int, str] = {}
        for name, number in mapping.items():
            if number in first:
                raise ValueError(f"Patient ids {first[number]!r} and {name!r} have the same hash; rename one of them.")
            first[number] = name
    return mapping

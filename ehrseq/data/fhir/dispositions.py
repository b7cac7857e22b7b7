"""How a stay ended: the name of its VISIT_END, and whether the patient died.

A discharge disposition is given by any of its codings, by their display or by its text, in extensions where a country
has its own. A code counts in its own system: `20` means death in the American tables and a rehabilitation clinic
elsewhere. Words count in every system (`death_words`); a text that names death and does not clearly say so is no death,
and it is counted.

Sources: FHIR discharge-disposition; HL7 version 2 table 0112; NUBC patient discharge status (form locator 17 of UB-04);
SNOMED CT; NHS Data Dictionary (UK Core, Care Connect); dkgev Entlassungsgrund (section 301 SGB V, fhir.de), that of the
Medizininformatik-Initiative; mode de sortie of the PMSI.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain
from typing import Any

import orjson

from ehrseq.data.fhir.concepts import codings_of, extension_codings, modifier_of
from ehrseq.data.fhir.death_words import DEAD, UNCLEAR, says_death
from ehrseq.data.fhir.elements import one_line
from ehrseq.data.fhir.systems import canonical_spelling, system_name
from ehrseq.tokenization.ehr_codes import EXPIRED

DIED = "exp"
"""Name of an end by death, as FHIR's own table of discharge dispositions has it."""

_UB04 = frozenset(("20", "40", "41", "42"))
DEATH_CODES: dict[str, frozenset[str]] = {
    "http://terminology.hl7.org/CodeSystem/discharge-disposition": frozenset(("exp",)),
    "http://hl7.org/fhir/discharge-disposition": frozenset(("exp",)),
    "http://terminology.hl7.org/CodeSystem/v2-0112": _UB04,
    "http://hl7.org/fhir/v2/0112": _UB04,
    "urn:oid:2.16.840.1.113883.12.112": _UB04,
    "HL70112": _UB04,
    "https://www.nubc.org/CodeSystem/PatDischargeStatus": _UB04,
    "http://www.nubc.org/patient-discharge": _UB04,
    "http://www.nubc.org/CodeSystem/PatientDischargeStatus": _UB04,
    "http://terminology.hl7.org/CodeSystem/nubc-UB92": _UB04,
    "urn:oid:2.16.840.1.113883.6.301.5": _UB04,
    "urn:oid:2.16.840.1.113883.3.88.12.80.33": _UB04,
    "https://bluebutton.cms.gov/resources/variables/ptnt_dschrg_stus_cd": _UB04,
    "https://bluebutton.cms.gov/fhir/CodeSystem/CLM-MDCR-NCH-PTNT-STUS-IND-CD": frozenset(("B",)),
    "http://snomed.info/sct": frozenset((
        "371828006",  # Patient deceased during stay (discharge status = dead)
        "419099009",  # Dead
        "397709008",  # Patient died
        "419620001",  # Death
        "16983000",  # Death in hospital
        "75004002",  # Emergency room admission, died in emergency room
        "63238001",  # Dead on arrival at hospital
        "399166001",  # Fatal
        "305398007",  # Admission to the mortuary
    )),
    "https://fhir.hl7.org.uk/CodeSystem/UKCore-DischargeMethodEngland": frozenset(("4", "5")),
    "https://fhir.hl7.org.uk/CodeSystem/UKCore-DischargeMethodWales": frozenset(("4", "5")),
    "https://fhir.hl7.org.uk/CodeSystem/UKCore-DischargeMethod": frozenset(("4", "5")),
    "https://fhir.hl7.org.uk/CodeSystem/NHSDataModelAndDictionary-DischargeMethod": frozenset(("4", "5")),
    "https://fhir.hl7.org.uk/STU3/CodeSystem/CareConnect-DischargeMethod-1": frozenset(("4", "5")),
    "https://fhir.hl7.org.uk/STU3/ValueSet/CareConnect-DischargeMethod-1": frozenset(("4", "5")),
    "https://fhir.hl7.org.uk/CareConnect-DischargeMethod-1": frozenset(("4", "5")),
    "https://fhir.hl7.org.uk/CodeSystem/UKCore-DischargeDestinationEngland": frozenset(("79",)),
    "https://fhir.hl7.org.uk/CodeSystem/UKCore-DischargeDestinationWales": frozenset(("79",)),
    "https://fhir.hl7.org.uk/CodeSystem/UKCore-DischargeDestination": frozenset(("79",)),
    "https://fhir.hl7.org.uk/CodeSystem/NHSDataModelAndDictionary-DischargeDestination": frozenset(("79",)),
    "https://fhir.hl7.org.uk/STU3/CodeSystem/CareConnect-DischargeDestination-1": frozenset(("79",)),
    "https://fhir.hl7.org.uk/STU3/ValueSet/CareConnect-DischargeDestination-1": frozenset(("79",)),
    "http://fhir.de/CodeSystem/dkgev/EntlassungsgrundErsteUndZweiteStelle": frozenset(("07",)),
    "http://fhir.de/CodeSystem/dkgev/Entlassungsgrund": frozenset(("07", "079")),
    "http://fhir.de/CodeSystem/dgkev/EntlassungsgrundErsteUndZweiteStelle": frozenset(("07",)),
    "https://www.medizininformatik-initiative.de/fhir/core/modul-fall/CodeSystem/Entlassungsgrund":
        frozenset(("07", "079")),
    "https://interop.aphp.fr/ig/fhir/dm/CodeSystem/PMSIMCOMDS": frozenset(("9",)),
    "https://aphp.fr/ig/fhir/core/CodeSystem/PMSIMCOMDS": frozenset(("9",)),
    "https://aphp.github.io/IG-FHIR-EDSH-SOCLE-COMMUN/CodeSystem/PmsiMcoMds": frozenset(("9",)),
}  # fmt: skip
"""System -> its codes that say that the patient died."""

_SNOMED = "http://snomed.info/sct"
_STANDARD = "discharge-disposition"
_BY_SPELLING = {
    canonical_spelling(system): frozenset(code.casefold() for code in codes) for system, codes in DEATH_CODES.items()
}
_READS_AS_DEATH = re.compile(EXPIRED)


UNCLEAR_DEATHS = "dispositions that name death and do not clearly say that the patient died, read as no death: "
"""Begins the notes of a report that name their texts."""


class DispositionReader:
    """Ends of encounters, each way to state one worked out once."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[str, bool, str | None]] = {}

    def read(self, encounter: dict[str, Any], otherwise: str, counts: Counter[tuple[str, str]]) -> tuple[str, bool]:
        """What stands behind `VISIT_END//`, and whether the patient died.

        Args:
            encounter: The resource.
            otherwise: Name where it tells no disposition: its class.
            counts: Takes what is to be told.

        Raises:
            ValueError: The disposition is no CodeableConcept.
        """
        stay = encounter.get("hospitalization") or encounter.get("admission")  # R5
        extensions = encounter.get("extension")
        if not stay and not extensions:
            return otherwise, False
        if not isinstance(stay, dict) or ("modifierExtension" in stay and modifier_of(stay) is not None):
            stay = {}
        disposition, beside = stay.get("dischargeDisposition"), stay.get("extension")
        key = orjson.dumps((disposition, beside, extensions), default=str)
        known = self._known.get(key)
        if known is None:
            known = _discharge_name(disposition, {"extension": beside}, {"extension": extensions})
            if len(self._known) < _MOST_KNOWN:  # extensions may be each encounter's own
                self._known[key] = known
        name, died, unclear = known
        if unclear:
            counts["notes", UNCLEAR_DEATHS + unclear] += 1
        return name or otherwise, died


_MOST_KNOWN = 100_000


def _discharge_name(concept: Any, *holders: dict[str, Any]) -> tuple[str, bool, str | None]:
    """Name of a disposition, empty where it tells none, whether it says that the patient died, and the text of one
    that names death and does not clearly say so.

    Args:
        concept: The disposition.
        holders: Elements whose extensions may say more.
    """
    codings = codings_of(concept, "dischargeDisposition")
    text = (concept or {}).get("text")
    more = [
        coding
        for coding in chain.from_iterable(map(extension_codings, (concept, *holders)))
        if _codes_of_death(coding) is not None
    ]
    said = [*map(_says_death, [*codings, *more]), (_words_say(text), text)]
    died = any(verdict == DEAD for verdict, _ in said)
    unclear = None if died else next((one_line(words) for verdict, words in said if verdict == UNCLEAR), None)
    standard = [coding for coding in codings if coding.get("code") and _is_standard(coding)]
    coding = (standard or [coding for coding in codings if coding.get("code")] or codings or more or [{}])[0]
    name = one_line(coding.get("code") or coding.get("display") or text or "")
    reads_as_death = _READS_AS_DEATH.search(f"//{name}") is not None
    if died:
        # A word that says so stays as it is written; a number does not say so by itself.
        return (name if reads_as_death and not name.isdigit() else DIED), True, None
    if reads_as_death:
        name = f"{system_name(coding.get('system'), 'VISIT')}|{name}"
    return name, False, unclear


def _codes_of_death(coding: dict[str, Any]) -> frozenset[str] | None:
    """The codes of a coding's system that say death; None of a system that is not in the table."""
    system = coding.get("system")
    if not isinstance(system, str) or not system:
        return None
    return _BY_SPELLING.get(canonical_spelling(_SNOMED if _is_snomed(system) else system))


def _is_snomed(system: Any) -> bool:
    return isinstance(system, str) and system_name(system, "") == "SNOMED"


def _says_death(coding: dict[str, Any]) -> tuple[str | None, Any]:
    """What a coding says (as `says_death`), and the words by which it does."""
    codes = _codes_of_death(coding)
    code, display = coding.get("code"), coding.get("display")
    plain = str(code).strip().casefold() if code is not None else ""
    if codes is not None and plain in codes:
        return DEAD, display
    # Every other code of a table says something else; SNOMED CT has more codes for deaths than are listed here.
    if codes is not None and plain and not _is_snomed(coding.get("system")):
        return None, display
    if display:  # a foreign code is a word at best, and its display says better what it means
        return _words_say(display), display
    return (DEAD if codes is None and plain == DIED else _words_say(code)), code


def _words_say(text: object) -> str | None:
    return says_death(text) if isinstance(text, str) else None


def _is_standard(coding: dict[str, Any]) -> bool:
    system = coding.get("system")
    return isinstance(system, str) and canonical_spelling(system).endswith(f"/{_STANDARD}")

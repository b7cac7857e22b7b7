"""Code systems in all their spellings: one short name each.

Sources write one system as `http://loinc.org`, `https://loinc.org/`, `urn:oid:2.16.840.1.113883.6.1`, a bare object
identifier, with a version (`|2.74`, `/version/20230131`), as an edition (`http://snomed.info/sct/731000124108`) or by
its name. National editions of ICD-10 keep names of their own that begin with `ICD10` (`ICD10GM`, `ICD10AM` ...), so
that the tasks, which look for that beginning, find all of them.

Sources of the table: HL7 Terminology (terminology.hl7.org, external code systems and their object identifiers), HL7
version 2 table 0396, the German base profiles (fhir.de), the yearly object identifiers of ICD-10-GM (DIMDI, as
medicats-ontology lists them), MIMIC-IV on FHIR.
"""

from __future__ import annotations

import re
from functools import lru_cache

SYSTEM_NAMES: dict[str, str] = {
    "http://loinc.org": "LOINC",
    "http://snomed.info/sct": "SNOMED",
    "http://www.nlm.nih.gov/research/umls/rxnorm": "RXNORM",
    "http://hl7.org/fhir/sid/icd-10-cm": "ICD10CM",
    "http://hl7.org/fhir/sid/icd-10": "ICD10",
    "http://hl7.org/fhir/sid/icd-9-cm": "ICD9CM",
    "http://hl7.org/fhir/sid/icd-9": "ICD9CM",  # "ICD-9 USA" in DSTU2's list
    "http://hl7.org/fhir/sid/icd-10-pcs": "ICD10PCS",
    "http://www.cms.gov/Medicare/Coding/ICD10": "ICD10PCS",
    "http://hl7.org/fhir/sid/cvx": "CVX",
    "http://hl7.org/fhir/sid/ndc": "NDC",
    "http://www.ama-assn.org/go/cpt": "CPT",
    "https://www.cms.gov/Medicare/Coding/HCPCSReleaseCodeSets": "HCPCS",
    "https://www.cms.gov/Medicare/Coding/HCPCSReleaseCodeSets/Alpha-Numeric-HCPCS.html": "HCPCS",
    "http://www.whocc.no/atc": "ATC",
    "http://fhir.de/CodeSystem/bfarm/atc": "ATC",
    "http://fhir.de/CodeSystem/dimdi/atc": "ATC",
    "http://fhir.de/CodeSystem/bfarm/ops": "OPS",
    "http://fhir.de/CodeSystem/dimdi/ops": "OPS",
    "http://fdasis.nlm.nih.gov": "UNII",
    "http://unitsofmeasure.org": "UCUM",
    # National editions of ICD-10
    "http://fhir.de/CodeSystem/bfarm/icd-10-gm": "ICD10GM",
    "http://fhir.de/CodeSystem/dimdi/icd-10-gm": "ICD10GM",
    "http://hl7.org/fhir/sid/icd-10-gm": "ICD10GM",
    "http://hl7.org/fhir/sid/icd-10-am": "ICD10AM",
    "http://hl7.org/fhir/sid/icd-10-ca": "ICD10CA",
    "http://hl7.org/fhir/sid/icd-10-nl": "ICD10NL",
    "http://hl7.org/fhir/sid/icd-10-uk": "ICD10UK",
    "http://hl7.org/fhir/sid/icd-10-vn": "ICD10VN",
    "http://id.who.int/icd/release/10": "ICD10",
    "http://who.int/icd-10": "ICD10",
    "http://id.who.int/icd/release/11": "ICD11",
    "http://id.who.int/icd11/mms": "ICD11",
    # The same systems by object identifier
    "urn:oid:2.16.840.1.113883.6.1": "LOINC",
    "urn:oid:2.16.840.1.113883.6.96": "SNOMED",
    "urn:oid:2.16.840.1.113883.6.88": "RXNORM",
    "urn:oid:2.16.840.1.113883.6.90": "ICD10CM",
    "urn:oid:2.16.840.1.113883.6.3": "ICD10",
    "urn:oid:2.16.840.1.113883.6.3.2": "ICD10NL",
    "urn:oid:2.16.840.1.113883.6.135": "ICD10AM",
    "urn:oid:2.16.578.1.12.4.1.1.7110": "ICD10NO",  # Volven 7110
    "urn:oid:1.2.246.537.6.1": "ICD10FI",  # THL, Tautiluokitus; also with its year
    "urn:oid:1.2.246.537.6.1.1999": "ICD10FI",
    "urn:oid:1.2.752.116.1.1.1.1.3": "ICD10SE",  # Socialstyrelsen
    "urn:oid:1.2.752.116.1.1.1.1.8": "ICD10SE",
    "urn:oid:1.2.752.116.1.1.1": "ICD10SE",
    "urn:oid:1.2.276.0.76.5.302": "ICD10GM",  # 2004
    "urn:oid:1.2.276.0.76.5.304": "ICD10GM",  # 2005
    "urn:oid:1.2.276.0.76.5.311": "ICD10GM",  # 2006
    "urn:oid:1.2.276.0.76.5.318": "ICD10GM",  # 2007
    "urn:oid:1.2.276.0.76.5.330": "ICD10GM",  # 2008
    "urn:oid:1.2.276.0.76.5.356": "ICD10GM",  # 2009
    "urn:oid:1.2.276.0.76.5.384": "ICD10GM",  # 2010
    "urn:oid:1.2.276.0.76.5.388": "ICD10GM",  # 2011
    "urn:oid:1.2.276.0.76.5.409": "ICD10GM",  # 2012
    "urn:oid:1.2.276.0.76.5.413": "ICD10GM",  # 2013
    "urn:oid:1.2.276.0.76.5.417": "ICD10GM",  # 2014
    "urn:oid:1.2.276.0.76.5.424": "ICD10GM",  # 2015
    "urn:oid:1.2.276.0.76.5.430": "ICD10GM",  # 2016
    "urn:oid:1.2.276.0.76.5.463": "ICD10GM",  # 2017
    "urn:oid:1.2.276.0.76.5.471": "ICD10GM",  # 2018
    "urn:oid:1.2.276.0.76.5.477": "ICD10GM",  # 2019
    "urn:oid:2.16.840.1.113883.6.103": "ICD9CM",
    "urn:oid:2.16.840.1.113883.6.2": "ICD9CM",
    "urn:oid:2.16.840.1.113883.6.42": "ICD9CM",  # as http://hl7.org/fhir/sid/icd-9
    "urn:oid:2.16.840.1.113883.6.104": "ICD9PROC",
    "urn:oid:2.16.840.1.113883.6.4": "ICD10PCS",
    "urn:oid:2.16.840.1.113883.12.292": "CVX",
    "urn:oid:2.16.840.1.113883.6.69": "NDC",
    "urn:oid:2.16.840.1.113883.6.12": "CPT",
    "urn:oid:2.16.840.1.113883.6.285": "HCPCS",
    "urn:oid:2.16.840.1.113883.6.73": "ATC",
    "urn:oid:2.16.840.1.113883.4.9": "UNII",
    "urn:oid:2.16.840.1.113883.6.8": "UCUM",
    # By name, as HL7 version 2 (table 0396) and hospitals' own interfaces have it
    "LN": "LOINC",
    "LOINC": "LOINC",
    "SCT": "SNOMED",
    "SNOMED": "SNOMED",
    "SNOMEDCT": "SNOMED",
    "RXNORM": "RXNORM",
    "RXN": "RXNORM",
    "I10": "ICD10",
    "I10C": "ICD10CM",
    "I10P": "ICD10PCS",
    "I10G2004": "ICD10GM",
    "I10G2005": "ICD10GM",
    "I10G2006": "ICD10GM",
    "I9": "ICD9",
    "I9C": "ICD9CM",
    "I9CDX": "ICD9CM",
    "I9CP": "ICD9PROC",
    "CVX": "CVX",
    "NDC": "NDC",
    "C4": "CPT",
    "CPT": "CPT",
    "CPT4": "CPT",
    "HCPCS": "HCPCS",
    "ATC": "ATC",
    "UNII": "UNII",
    "FDAUNII": "UNII",
    "UCUM": "UCUM",
    # MIMIC-IV on FHIR: systems of its own that hold standard codes
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-diagnosis-icd9": "ICD9CM",
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-diagnosis-icd10": "ICD10CM",
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-procedure-icd9": "ICD9PROC",
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-procedure-icd10": "ICD10PCS",
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/mimic-medication-ndc": "NDC",
}
"""System, in its official spelling -> short name."""

# Whole families of systems whose last part is the name: mimic-d-labitems -> MIMIC-D-LABITEMS.
_NAMED_FAMILIES = (
    "http://mimic.mit.edu/fhir/mimic/CodeSystem/",
    "http://terminology.hl7.org/CodeSystem/",
    "http://hl7.org/fhir/sid/",
)

_OID = re.compile(r"(?:urn:oid:|oid:)?([0-2](?:\.\d+)+)", re.IGNORECASE)
_SNOMED = re.compile(r"snomed\.info/(?:sct|xsct|id)(?:/.*)?")
# A revision of ICD in the last part of an address or in a name: icd-10-gm, ICD10AM, icd9cm, icd-10-gm-2024.
# CIM, CIE and CID are its name in French, Spanish and Portuguese (terminologie-cim-10, cie10-es, BRCID10).
_ICD = re.compile(r"(?:terminologie[-_ ])?(br)?(?:icd|cim|cie|cid)[-_ ]?(9|10|11)[-_ ]?([a-z]*)(?:[-_ ]?\d{4})?")
# A release of ICD by the World Health Organization: its number is no version of one system.
_WHO = re.compile(r"id\.who\.int/icd/release/(10|11)(?:/.*)?")
# A year, a date or numbers with dots; `v2/0112` is a table.
_VERSION = re.compile(r"/(?:version/[\d.]+|(?:19|20)\d{2}(?:-\d{2})*(?:\d{4})?|\d+(?:\.\d+)+)$")
_ICD_FLAVOURS = {
    "9proc": "ICD9PROC",
    "9procedure": "ICD9PROC",
    "9cmproc": "ICD9PROC",
    "10who": "ICD10",
    "11mms": "ICD11",
}


def canonical_spelling(system: str) -> str:
    """A system's identifier without what differs from writer to writer: scheme, case, edition, version, outer slashes.

    >>> canonical_spelling("https://LOINC.org/|2.74")
    'loinc.org'
    >>> canonical_spelling("2.16.840.1.113883.6.1") == canonical_spelling("urn:oid:2.16.840.1.113883.6.1")
    True
    """
    text = system.strip().partition("|")[0].partition("?")[0]
    oid = _OID.fullmatch(text)
    if oid:
        return f"oid:{oid[1]}"
    text = text.casefold().removeprefix("http://").removeprefix("https://").removeprefix("www.").strip("/")
    if _SNOMED.fullmatch(text):
        return "snomed.info/sct"
    who = _WHO.fullmatch(text)
    if who:
        return f"id.who.int/icd/release/{who[1]}"
    if "/" not in text:
        return re.sub(r"[-_ ]", "", text)  # a name: SNOMED-CT
    return _VERSION.sub("", text) if "/" in _VERSION.sub("", text) else text


_NAMES = {canonical_spelling(system): name for system, name in SYSTEM_NAMES.items()}


@lru_cache(maxsize=65_536)
def _known(system: str) -> str | None:
    """Short name of a system that the table, or the name of an edition of ICD, tells."""
    spelling = canonical_spelling(system)
    name = _NAMES.get(spelling) or _NAMES.get(_VERSION.sub("", spelling))  # loinc.org/2.74
    if name is None:
        icd = _ICD.fullmatch(spelling.rpartition("/")[2])
        if icd:
            edition = icd[3] or icd[1] or ""
            name = _ICD_FLAVOURS.get(icd[2] + edition) or f"ICD{icd[2]}{edition.upper()}"
    return name


@lru_cache(maxsize=65_536)
def _own_name(system: str) -> str:
    """Name of a system that no table has: its last part in a family of systems, else its identifier."""
    for family in _NAMED_FAMILIES:
        if system.startswith(family) and len(system) > len(family):
            return as_code(system[len(family) :]).upper()
    for scheme in ("https://", "http://", "urn:oid:", "urn:"):
        if system.startswith(scheme):
            system = system[len(scheme) :]
            break
    return as_code(system).strip("/")


def system_name(system: str | None, kind: str) -> str:
    """Short name of a code system: `LOINC`; its own identifier without the scheme where the table has none.

    Args:
        system: The system as a coding names it, None or empty where it names none.
        kind: Kind of the event; `icd-9-cm` in a procedure means the procedure volume (`ICD9PROC`).

    Raises:
        TypeError: It is no text.
    """
    if not system:
        return "LOCAL"
    if not isinstance(system, str):
        raise TypeError(f"a code system must be text, got {system!r}")
    name = _known(system)
    if name is None:
        return _own_name(system)
    return "ICD9PROC" if name == "ICD9CM" and kind == "PROCEDURE" else name


def as_code(text: str) -> str:
    """Text on one line, without the separator of our codes."""
    if not isinstance(text, str):
        raise TypeError(f"a code or text must be a string, got {text!r}")
    if text.isprintable() and " " not in text and "/" not in text:
        return text  # as nearly all codes are
    return " ".join(text.split()).replace("//", "/")

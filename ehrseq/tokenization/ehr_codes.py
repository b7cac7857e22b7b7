"""What a code is: its kind, its encounter class and the more general codes that can stand for it.

Codes are namespaced `KIND//SYSTEM//CODE` in datasets that ehrseq writes; foreign MEDS datasets (MIMIC-IV, OMOP
exports) are read through a small ordered list of regular expressions, the *code map*, which a tokenizer stores, so
that a checkpoint reads codes as it was trained to. Everything here runs on unique codes, which are thousands where
rows are millions.

Kinds: `birth`, `death`, `static`, `diagnosis`, `procedure`, `medication`, `lab`, `vital`, `other`, `ignore`,
`visit_start:<CLASS>` and
`visit_end:<CLASS>` (`visit_end:*` where the code does not tell the class), CLASS a FHIR v3-ActCode encounter class
(IMP, EMER, AMB ...) or ICU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

SECOND_US = 1_000_000
"""Microseconds, in which all instants and spans are counted; and so on."""
MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US
WEEK_US = 7 * DAY_US
YEAR_US = 365.25 * DAY_US

# Order of a subject's rows at one instant: birth, visit starts, everything else in source order, visit ends, death.
RANK_STATIC, RANK_BIRTH, RANK_START, RANK_OTHER, RANK_END, RANK_DEATH = range(-1, 5)
KIND_RANKS = {"birth": RANK_BIRTH, "visit_start": RANK_START, "visit_end": RANK_END, "death": RANK_DEATH}

INPATIENT_CLASSES = frozenset({"IMP", "ACUTE", "NONAC"})
"""Encounter classes that make a visit an admission."""

EXPIRED = r"(?i)//(?:(?:exp|expired|died|dead|death|deceased)\b|(?:20|4[0-2])$)"
"""Discharge codes that say so: `exp` (FHIR), DIED (MIMIC-IV), DEAD/EXPIRED (MIMIC-III), 20 and 40 to 42 (UB-04)."""

GOES_ON = r"(?i)^VISIT_END//in-progress$"
"""Code of an end without a time by which the source says that the encounter goes on."""

TIMEZONE = "TIMEZONE//"
"""How codes begin that name the wall clock of a patient or visit: they tell days apart, nothing about the patient, and
are `ignore` whatever a code map says, so that a checkpoint that has never met them reads what it always did."""

EVENT_KINDS = (
    "static",
    "diagnosis",
    "procedure",
    "medication",
    "lab",
    "vital",
    "other",
    "death",
    "visit_start",
    "visit_end",
)
"""Kinds that can become tokens (see `input_kinds` of the tokenizer); `birth` only feeds ages, `ignore` is left out."""

INPUT_KIND_PRESETS: dict[str, tuple[str, ...]] = {"all": EVENT_KINDS, "paper": ("procedure", "medication", "lab")}
"""Named selections of kinds. `paper` is the input of the EhrMamba paper (section 3.1): procedures, medications,
labs."""

_CLASSES = "IMP|ACUTE|NONAC|EMER|OBSENC|AMB|SS|HH|VR|FLD|PRENC|ICU"

OMOP_VISITS: dict[str, tuple[str, ...]] = {
    # 9201 Inpatient Visit, 262 Emergency Room and Inpatient Visit; of CMS Place of Service 8717 Inpatient Hospital,
    # 8971 Inpatient Psychiatric Facility, 8920 Comprehensive Inpatient Rehabilitation Facility
    "IMP": ("IP", "ERIP", "9201", "262", "8717", "8971", "8920", "Inpatient Visit", "Inpatient Hospital",
            "Emergency Room and Inpatient Visit"),
    # 9203 Emergency Room Visit, 8870 Emergency Room - Hospital, 581381 Emergency Room Critical Care Facility
    "EMER": ("ER", "9203", "8870", "581381", "Emergency Room Visit", "Emergency Room - Hospital"),
    # 32037 Intensive Care (OMOP4822460), 581379 Inpatient Critical Care Facility, 581382 Inpatient Intensive Care
    "ICU": ("32037", "OMOP4822460", "581379", "581382", "Intensive Care", "Inpatient Critical Care Facility",
            "Inpatient Intensive Care Facility"),
    # 9202 Outpatient Visit, 8756 Outpatient Hospital, 8940 Office, 581477 Office Visit
    "AMB": ("OP", "9202", "8756", "8940", "581477", "Outpatient Visit", "Outpatient Hospital", "Office",
            "Office Visit"),
    "HH": ("581476", "Home Visit"),
    "VR": ("5083", "Telehealth"),
}  # fmt: skip
"""Class -> OMOP's standard visits that are one: their code in the vocabulary Visit, their concept_id, their name."""


def is_unknown_omop_visit(code: str) -> bool:
    """Whether a code is one of OMOP's visits of which `OMOP_VISITS` does not know what it is."""
    return re.match(ANY_OMOP_VISIT, code) is not None and code_kinds([code], _omop_visits()) == ["other"]


def _omop_visits() -> list[list[str]]:
    """Rules for `OMOP_VISITS`: `Visit/IP`, `VISIT//9201//start`, `visit_occurrence/Inpatient Visit//end`."""
    rules = []
    for of_class, names in OMOP_VISITS.items():
        visit = rf"(?i)visit(?:_occurrence|_detail)?//?(?:{'|'.join(names)})"
        rules += [[visit + r"(//?start)?$", f"visit_start:{of_class}"], [visit + r"//?end$", f"visit_end:{of_class}"]]
    return rules


ANY_OMOP_VISIT = r"Visit//?[^/]+(//?start)?$"
"""Visits of OMOP, known or not; what `OMOP_VISITS` does not know is read as AMB."""

DEFAULT_CODE_MAP: list[list[str]] = [
    # MEDS and the ehrseq namespace
    [r"MEDS_BIRTH(//|$)", "birth"],
    [r"MEDS_DEATH(//|$)", "death"],
    [rf"VISIT_START//({_CLASSES})$", r"visit_start:\1"],
    [r"VISIT_START//([^/]+)", r"visit_start:\1"],
    [r"VISIT_START$", "visit_start:AMB"],
    [rf"VISIT_END//({_CLASSES})$", r"visit_end:\1"],
    [r"VISIT_END(//|$)", "visit_end:*"],
    [r"DIAGNOSIS//", "diagnosis"],
    [r"PROCEDURE//", "procedure"],
    [r"(MEDICATION|IMMUNIZATION)//", "medication"],
    # MIMIC-IV's lab items 220000 and above are charted at the bedside, but the converter calls them LAB too
    [r"LAB//", "lab"],
    [r"VITAL//", "vital"],
    [r"(GENDER|SEX|RACE|ETHNICITY|LANGUAGE|MARITAL_STATUS|INSURANCE|BIRTH_SEX)(//|$)", "static"],
    # MIMIC-IV as MEDS
    [r"HOSPITAL_ADMISSION(//|$)", "visit_start:IMP"],
    [r"HOSPITAL_DISCHARGE(//|$)", "visit_end:IMP"],
    [r"ED_REGISTRATION(//|$)", "visit_start:EMER"],
    [r"ED_OUT(//|$)", "visit_end:EMER"],
    [r"ICU_ADMISSION(//|$)", "visit_start:ICU"],
    [r"ICU_DISCHARGE(//|$)", "visit_end:ICU"],
    [r"INFUSION_START//", "medication"],
    [r"HCPCS//", "procedure"],
    [r"SUBJECT_WEIGHT_AT_INFUSION(//|$)", "vital"],
    [r"(Blood Pressure|Weight \(Lbs\)|Height \(Inches\)|BMI \(kg/m2\))", "vital"],
    # OMOP exports as MEDS (`Visit/IP`, `VISIT//9201`, `ICD10CM/I10`)
    *_omop_visits(),
    [ANY_OMOP_VISIT, "visit_start:AMB"],
    [r"Visit//?[^/]+//?end$", "visit_end:AMB"],
    # 21 inpatient hospital, 51 and 61 inpatient psychiatric and rehabilitation facilities, 23 emergency room
    [r"CMS Place of Service//?(21|51|61)(//?start)?$", "visit_start:IMP"],
    [r"CMS Place of Service//?(21|51|61)//?end$", "visit_end:IMP"],
    [r"CMS Place of Service//?23(//?start)?$", "visit_start:EMER"],
    [r"CMS Place of Service//?23//?end$", "visit_end:EMER"],
    [r"CMS Place of Service//?[^/]+(//?start)?$", "visit_start:AMB"],
    [r"CMS Place of Service//?[^/]+//?end$", "visit_end:AMB"],
    [r"(ICD10PCS|ICD9Proc(CN)?|CPT4|HCPCS|OPS|CCAM)/", "procedure"],
    [r"(ICD(9|10)[A-Z]*|CIM10|KCD7)/", "diagnosis"],
    [r"(RxNorm|RxNorm Extension|NDC|CVX)/", "medication"],
    [r"LOINC/", "lab"],
    [r"(Gender|Race|Ethnicity)/", "static"],
]
"""Ordered [regular expression, kind] pairs; the first that matches at the start of a code decides, no match is
`other`."""


def code_kinds(codes: Iterable[str], code_map: Sequence[Sequence[str]] | None = None) -> list[str]:
    r"""Kind of each code, see the module's list of kinds.

    Args:
        codes: Codes, best unique ones.
        code_map: Ordered [regular expression, kind] pairs; a kind may use groups of the expression
            (`visit_start:\1`). Default `DEFAULT_CODE_MAP`.

    Returns:
        One kind per code.

    Raises:
        ValueError: An expression of the map does not compile, or a kind is unknown.
    """
    kind_of = _kind_finder(_as_key(DEFAULT_CODE_MAP if code_map is None else code_map))
    return [kind_of(code) or "other" for code in codes]


def unmapped_codes(codes: Iterable[str], code_map: Sequence[Sequence[str]] | None = None) -> list[str]:
    """Those of some codes that no rule of a code map names: `other` for want of a rule.

    Args:
        codes, code_map: As of `code_kinds`.
    """
    kind_of = _kind_finder(_as_key(DEFAULT_CODE_MAP if code_map is None else code_map))
    return [code for code in codes if kind_of(code) is None]


def split_kind(kind: str) -> tuple[str, str | None]:
    """('visit_start', 'IMP') of 'visit_start:IMP'; (kind, None) of other kinds."""
    name, _, encounter_class = kind.partition(":")
    return name, encounter_class or None


def kind_reader(code_map: Sequence[Sequence[str]] | None = None) -> Callable[[str], tuple[str, str | None]]:
    """What tells a code's kind and encounter class, code by code.

    Args:
        code_map: As of `code_kinds`.

    Raises:
        ValueError: As `code_kinds`.
    """
    kind_of = _kind_finder(_as_key(DEFAULT_CODE_MAP if code_map is None else code_map))
    return lambda code: split_kind(kind_of(code) or "other")


def resolve_input_kinds(input_kinds: str | Iterable[str] | None) -> list[str]:
    """The kinds that enter a sequence, in the order of `EVENT_KINDS`.

    Args:
        input_kinds: A preset's name (`all`, `paper`), kinds, or None for all.

    Raises:
        ValueError: An unknown preset or kind.
    """
    if input_kinds is None:
        return list(EVENT_KINDS)
    if isinstance(input_kinds, str):
        if input_kinds not in INPUT_KIND_PRESETS:
            raise ValueError(
                f"input_kinds={input_kinds!r} is no preset; give one of {sorted(INPUT_KIND_PRESETS)} or a list of "
                f"kinds from {list(EVENT_KINDS)}."
            )
        input_kinds = INPUT_KIND_PRESETS[input_kinds]
    chosen = set(input_kinds)
    unknown = chosen - set(EVENT_KINDS)
    if unknown or not chosen:
        raise ValueError(
            f"input_kinds got {sorted(map(str, chosen))}; expected some of {list(EVENT_KINDS)}"
            + (f", unknown: {sorted(map(str, unknown))}." if unknown else ".")
        )
    return [kind for kind in EVENT_KINDS if kind in chosen]


def _as_key(code_map: Sequence[Sequence[str]]) -> tuple[tuple[str, str], ...]:
    try:
        return tuple((str(pattern), str(kind)) for pattern, kind in code_map)
    except (TypeError, ValueError) as error:
        raise ValueError(f"code_map must be a list of [regular expression, kind] pairs, got {code_map!r}.") from error


@lru_cache(maxsize=8)
def _kind_finder(code_map: tuple[tuple[str, str], ...]) -> Callable[[str], str | None]:
    """Code -> kind, None where no rule names it. Remembers codes: tables of labels, shards and rows ask for the same
    ones again and again.
    """
    rules = _compiled(code_map)

    @lru_cache(maxsize=100_000)
    def kind_of(code: str) -> str | None:
        if code.startswith(TIMEZONE):
            return "ignore"
        for pattern, template in rules:
            match = pattern.match(code)
            if match:
                return match.expand(template) if "\\" in template else template
        return None

    return kind_of


def _compiled(code_map: tuple[tuple[str, str], ...]) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for pattern, kind in code_map:
        name = split_kind(kind)[0]
        if name not in (*EVENT_KINDS, "birth", "ignore"):
            raise ValueError(
                f"code_map sends {pattern!r} to {kind!r}; expected one of {['birth', 'ignore', *EVENT_KINDS]}, the "
                "visit kinds with a class (visit_start:IMP)."
            )
        if name in ("visit_start", "visit_end") and ":" not in kind:
            raise ValueError(
                f"code_map sends {pattern!r} to {kind!r}; a visit kind needs its class, for example {name}:IMP"
                + (" or visit_end:*." if name == "visit_end" else ".")
            )
        try:
            rules.append((re.compile(pattern), kind))
        except re.error as error:
            raise ValueError(f"code_map holds {pattern!r}, which is no regular expression: {error}.") from error
    return rules


# -- parents: more general codes -------------------------------------------------------------------------------------

# A code of an ICD revision: what stands before it (its namespace), the revision, the code. Covers
# DIAGNOSIS//ICD10CM//I10.1, DIAGNOSIS//ICD//10//I101 (MIMIC-IV), DIAGNOSIS//mimic-diagnosis-icd10//I101 (MIMIC-IV on
# FHIR) and ICD10CM/I10.1 (OMOP).
_ICD = re.compile(
    r"(?P<head>.*?icd[-_]?(?://)?(?P<revision>9|10)(?P<flavour>[-_]?[a-z]*)//?)(?P<code>[A-Za-z0-9][A-Za-z0-9.]*)$",
    re.IGNORECASE,
)

# ICD-10 chapters by the last category that each holds (WHO ICD-10, Volume 1; U00-U99 are special purposes).
_ICD10_CHAPTERS = [
    ("B99", "A00-B99"), ("D49", "C00-D49"), ("D99", "D50-D89"), ("E99", "E00-E99"), ("F99", "F00-F99"),
    ("G99", "G00-G99"), ("H59", "H00-H59"), ("H99", "H60-H99"), ("I99", "I00-I99"), ("J99", "J00-J99"),
    ("K99", "K00-K99"), ("L99", "L00-L99"), ("M99", "M00-M99"), ("N99", "N00-N99"), ("O9Z", "O00-O99"),
    ("P99", "P00-P99"), ("Q99", "Q00-Q99"), ("R99", "R00-R99"), ("T99", "S00-T99"), ("U99", "U00-U99"),
    ("Y99", "V00-Y99"), ("Z99", "Z00-Z99"),
]  # fmt: skip
# ICD-9-CM chapters by the last three-digit category.
_ICD9_CHAPTERS = [
    (139, "001-139"), (239, "140-239"), (279, "240-279"), (289, "280-289"), (319, "290-319"), (389, "320-389"),
    (459, "390-459"), (519, "460-519"), (579, "520-579"), (629, "580-629"), (679, "630-679"), (709, "680-709"),
    (739, "710-739"), (759, "740-759"), (779, "760-779"), (799, "780-799"), (999, "800-999"),
]  # fmt: skip


def code_parents(code: str) -> list[str]:
    """More general codes that may stand for `code`, the nearest first; empty for codes outside the ICD family.

    The code loses one character at a time down to its category, then its chapter follows. Both spellings of each, with
    the dot and without, are tried, its own other spelling first. Procedures (ICD-10-PCS, ICD-9 volume 3) end at their
    category, since their chapters tell little.

    >>> code_parents("DIAGNOSIS//ICD10CM//I10.1")
    ['DIAGNOSIS//ICD10CM//I101', 'DIAGNOSIS//ICD10CM//I10', 'DIAGNOSIS//ICD10CM//I00-I99']
    >>> code_parents("DIAGNOSIS//ICD//9//41071")[-2:]
    ['DIAGNOSIS//ICD//9//410', 'DIAGNOSIS//ICD//9//390-459']
    >>> code_parents("LAB//LOINC//2345-7")
    []
    """
    match = _ICD.match(code)
    if not match:
        return []
    head, body = match["head"], match["code"].upper()
    plain = body.replace(".", "")
    procedure = code.upper().startswith("PROCEDURE") or match["flavour"].lower().strip("-_") in ("pcs", "proc")
    category = _category_length(plain, match["revision"], procedure)
    dotted = "." in body
    parents: list[str] = []
    for length in range(len(plain), category - 1, -1):
        short = plain[:length]
        spellings = [short] if length == category else [f"{short[:category]}.{short[category:]}", short]
        parents.extend(head + s for s in (spellings if dotted else reversed(spellings)))
    parents = [parent for parent in parents if parent != head + match["code"]]
    if not procedure:
        chapter = _chapter(plain[:category], match["revision"])
        if chapter:
            parents.append(head + chapter)
    return parents


def category_and_chapter(code: str) -> list[str]:
    """The last one or two of `code_parents`: those that a vocabulary keeps even where no row carries them."""
    parents = code_parents(code)
    return parents[-2:] if parents and "-" in parents[-1].rpartition("/")[2] else parents[-1:]


def _category_length(plain: str, revision: str, procedure: bool) -> int:
    if procedure:
        return 3 if revision == "10" else 2
    return 4 if revision == "9" and plain[:1] == "E" else 3


def _chapter(category: str, revision: str) -> str | None:
    if revision == "10":
        if not re.match(r"[A-Z][0-9]", category):
            return None
        return next((name for last, name in _ICD10_CHAPTERS if category <= last), None)
    if category[:1] in ("E", "V"):
        return {"E": "E000-E999", "V": "V01-V91"}[category[0]]
    return next((name for last, name in _ICD9_CHAPTERS if category.isdigit() and int(category) <= last), None)

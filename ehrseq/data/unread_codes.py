"""What a dataset's codes may mean and are not read as: admissions to hospital, and deaths, under other names.

Labels stand on admissions and deaths. A dataset that spells its visits in another way gives no labels, and an empty
table of labels looks like a result; one that spells its deaths in another way gives wrong ones. So whoever prepares,
labels or counts such a dataset is told, with the codes that are meant and how to map them. Nothing is said of a code
that a code map names, whatever it is mapped to.

A code looks like a death where one of its parts (between slashes, or the whole) is a word of death, in the words of
many languages (`ehrseq.data.fhir.death_words`), alone or with words that say nothing else (`HOSP//DEATH`,
`DATE_OF_DEATH`), or where it is a code of SNOMED CT that says so. It does not where a word denies it, doubts it or
speaks of somebody or something else (`FAMILY_HISTORY//DEATH`, `BRAIN_DEATH_EXAM`), nor where a map names the code
(`DIAGNOSIS//...`).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import polars as pl

from ehrseq.data.fhir.classes import CLASSES, UNKNOWN_CLASSES
from ehrseq.data.fhir.concepts import is_letter, plain_words
from ehrseq.data.fhir.death_words import DEAD, DEATH_WORDS, UNCLEAR_AFTER, says_death
from ehrseq.tokenization.ehr_codes import EXPIRED, INPATIENT_CLASSES, code_kinds, split_kind, unmapped_codes

logger = logging.getLogger(__name__)

CodeRules = Sequence[Sequence[str]] | None
"""[regular expression, kind] pairs; None: `DEFAULT_CODE_MAP`."""

_SHOWN = 5

# -- admissions --------------------------------------------------------------------------------------------------------

_LOOKS_LIKE_A_VISIT = (
    r"(?i)(?:^|[^a-z])(?:visits?|admi(?:ssions?|t(?:ted)?)|discharged?|encounters?|inpatients?|hospitali[sz]ations?|"
    r"stays?|ward|transfers?|aufnahme|entlassung|opname|ontslag|enc|icu|ed)(?:[^a-z]|$)"
)
_LOOKS_LIKE_AN_END = r"(?i)(?:^|[^a-z])(?:end|discharged?|entlassung|ontslag)(?:[^a-z]|$)"

_told_by_readers: set[frozenset[str]] = set()
"""Codes of visits without an admission that a reader has warned of: who labels the table it gave says it not again."""


def without_admissions(
    codes: pl.DataFrame, code_map: CodeRules = None, *, notes: Mapping[str, int] | None = None, source: str = ""
) -> str:
    """What to tell of codes among which none is the start of an admission; empty where one is.

    Args:
        codes: code, rows: how often each stands in the dataset.
        code_map: As of `label_events`.
        notes: Those of the report of a conversion, which name unknown classes of FHIR's encounters.
        source: What was read or counted.
    """
    named = _with_kinds(codes, code_map)
    starts = named.filter(pl.col("kind") == "visit_start")
    if starts["class"].is_in(list(INPATIENT_CLASSES)).any():
        return ""
    text = "No code is an admission to hospital, so that no task about admissions gets a label."
    if starts.height:
        text = f"{source or 'The dataset'} holds encounters but no admission. {text} The visits are {_listed(starts)}."
    unknown = _named(notes or {}, UNKNOWN_CLASSES)
    if unknown:
        common = ", ".join(f"{name}: {n:,}" for name, n in unknown.most_common(_SHOWN))
        example = unknown.most_common(1)[0][0].partition(" (")[0]
        return (
            f"{text} Classes that are not known: {common}. Map them, for example "
            f"encounter_classes={{{example!r}: 'IMP'}} or `ehrseq prepare --encounter-class '{example}=IMP'`."
        )
    likely = named.filter(pl.col("kind").is_in(["other", "static"]) & pl.col("code").str.contains(_LOOKS_LIKE_A_VISIT))
    odd = starts.filter(~pl.col("class").is_in(list(CLASSES)))
    if likely.height:
        text += f" Codes that look like visits: {_listed(likely)}."
    elif not starts.height:
        return f"{text} No code looks like a visit at all."
    elif not odd.height:
        return f"{text} All of their classes are known: nobody was admitted to a hospital here."
    shown = likely if likely.height else odd
    is_end = pl.col("code").str.contains(_LOOKS_LIKE_AN_END)
    example = shown.sort(is_end, maintain_order=True)["code"][0]
    return f"{text} Say which are admissions, and which their ends (visit_end:IMP): {_how(example, 'visit_start:IMP')}."


def warn_without_admissions(
    codes: pl.DataFrame,
    code_map: CodeRules = None,
    *,
    notes: Mapping[str, int] | None = None,
    source: str = "",
    has_been_read: bool = False,
) -> None:
    """Log what `without_admissions` tells.

    Args:
        codes, code_map, notes, source: As of `without_admissions`.
        has_been_read: These are the codes of a table in memory: where a reader has said it of them, once is enough.
    """
    text = without_admissions(codes, code_map, notes=notes, source=source)
    if text and not (has_been_read and _visits(codes) in _told_by_readers):
        logger.warning(text)


def warn_of_encounters_without_admissions(events: pl.DataFrame, notes: Mapping[str, int], source: str) -> None:
    """What a reader says of the table that it has made: nothing where there are no encounters at all."""
    visits = _visits(events.select(pl.col("code").unique()))
    if not visits or not INPATIENT_CLASSES.isdisjoint(code.partition("//")[2] for code in visits):
        return
    warn_without_admissions(count_codes(events.lazy()), notes=notes, source=source)
    _told_by_readers.add(visits)


def count_codes(events: pl.LazyFrame) -> pl.DataFrame:
    """code, rows: how often each stands there."""
    return events.group_by(pl.col("code").cast(pl.String)).agg(pl.len().alias("rows")).collect()


def _visits(codes: pl.DataFrame) -> frozenset[str]:
    """Starts of visits as the readers of FHIR write them."""
    return frozenset(codes["code"].filter(codes["code"].str.starts_with("VISIT_START")).drop_nulls().to_list())


def _with_kinds(codes: pl.DataFrame, code_map: CodeRules) -> pl.DataFrame:
    """The codes with kind and class, the most frequent first."""
    named = codes.filter(pl.col("code").is_not_null()).sort("rows", "code", descending=[True, False])
    kinds = [split_kind(kind) for kind in code_kinds(named["code"].to_list(), code_map)]
    return named.with_columns(
        pl.Series("kind", [kind for kind, _ in kinds], dtype=pl.String),
        pl.Series("class", [of for _, of in kinds], dtype=pl.String),
    )


# -- deaths ------------------------------------------------------------------------------------------------------------

UNREAD_DEATHS = "patients without a death whose rows have a code that looks like one: "
"""Begins the notes of a report that name such codes."""

SNOMED_DEATHS = frozenset((
    "371828006",  # Patient deceased during stay
    "397709008",  # Patient died
    "419099009",  # Dead
    "419620001",  # Death
    "16983000",  # Death in hospital
    "75004002",  # Emergency room admission, died in emergency room
    "63238001",  # Dead on arrival at hospital
))  # fmt: skip
"""Codes of SNOMED CT that, as the code of a row, say that the patient died: those of `dispositions.DEATH_CODES` that
say it by themselves."""

_SNOMED = re.compile(r"(?:^|[/|:])(?:SNOMED(?:[ _-]?CT)?|SCT)[/|:]+(\d+)$", re.IGNORECASE)
_TOGETHER = {
    "dod": "death", "deathdate": "death date", "deathtime": "death time", "deathdatetime": "death datetime",
    "dateofdeath": "date of death", "deathdt": "death date", "expire": "expired",
}  # fmt: skip
_PHRASES = frozenset(plain_words(word) for words in DEATH_WORDS.values() for word in words) - {""}
_BEGINNINGS = {phrase.split()[0] for phrase in _PHRASES}
_MAY_BE = re.compile(
    "|".join(sorted(word for word in {*_BEGINNINGS, *_TOGETHER, *SNOMED_DEATHS} if word.isascii())),
)
"""What every code without letters beyond ASCII holds that looks like a death: most codes are done with it."""
_SAYS_NOTHING_ELSE = frozenset((
    "meds", "patient", "pt", "subject", "person", "date", "time", "datetime", "of", "type", "event", "record",
    "recorded", "registered", "flag", "status", "vital", "in", "at", "on", "the", "arrival", "hospital", "hosp",
    "icu", "ed", "inpatient", "stay", "discharge", "outcome", "cause", "pronounced", "declared", "is", "was", "has",
    "occurred", "during", "day", "year", "month", "episode", "visit", "encounter", "code", "ehr", "omop",
))  # fmt: skip
_SOMETHING_ELSE = frozenset((
    "brain", "family", "history", "hx", "fhx", "directive", "directives", "advance", "exam", "examination", "score",
    "risk", "predicted", "prediction", "probability", "prognosis", "plan", "planning", "education", "counselling",
    "counseling", "screen", "screening", "discussion", "cell", "maternal", "paternal", "sibling", "neonate", "question",
    "mother", "father", "wife", "husband", "spouse", "partner", "sister", "brother", "son", "daughter", "child", "baby",
    "infant", "parent", "parents", "relative", "donor", "fetal", "foetal", "fetus",
)) | frozenset(UNCLEAR_AFTER)  # fmt: skip
_SAYS_NO = frozenset(("0", "no", "n", "false", "f", "none", "alive", "living"))


def looks_like_death(code: str) -> bool:
    """Whether a code names the death of the patient in other words than those that are read.

    >>> [looks_like_death(code) for code in ("DEATH//HOSP", "DeathDate", "BRAIN_DEATH_EXAM", "FAMILY_HISTORY//DEATH")]
    [True, True, False, False]
    """
    if code.isascii() and not _MAY_BE.search(code.lower()):
        return False
    if match := _SNOMED.search(code):
        return match[1] in SNOMED_DEATHS
    parts = [_plain(part) for part in re.split(r"/+|\||:", code)]
    words = [word for part in parts for word in part]
    if not _SOMETHING_ELSE.isdisjoint(words) or not _SAYS_NO.isdisjoint(words):
        return False
    place = next((place for place, part in enumerate(parts) if _is_death_alone(part)), None)
    # What stands before may make it unclear, as in a text.
    return place is not None and says_death(" ".join(word for part in parts[: place + 1] for word in part)) == DEAD


def _plain(part: str) -> list[str]:
    """Words of a part of a code: `DeathDate`, `DEATH_DATE` and `death-date` are two."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", "".join(sign if is_letter(sign) else " " for sign in part))
    return " ".join(_TOGETHER.get(word, word) for word in apart.casefold().split()).split()


def _is_death_alone(words: Sequence[str]) -> bool:
    others = [word for word in words if word not in _SAYS_NOTHING_ELSE]
    text = " ".join(others)
    return says_death(text) == DEAD and (
        plain_words(text) in _PHRASES or all(says_death(word) == DEAD for word in others)
    )


def deathlike_codes(codes: Iterable[str], code_map: CodeRules = None) -> list[str]:
    """Those of some codes that no rule names and that look like the death of the patient, sorted."""
    return sorted(filter(looks_like_death, unmapped_codes(codes, code_map)))


def codes_of_death(codes: Iterable[str], code_map: CodeRules = None) -> list[str]:
    """Those of some codes that say that the patient died: deaths, and ends of visits by death."""
    names = list(codes)
    kinds = [split_kind(kind)[0] for kind in code_kinds(names, code_map)]
    return [
        code
        for code, kind in zip(names, kinds, strict=True)
        if kind == "death" or (kind == "visit_end" and re.search(EXPIRED, code))
    ]


def says_no(columns: Iterable[str]) -> pl.Expr:
    """Whether a row's value denies what its code says: 0 of a flag, `no`.

    Args:
        columns: Those of the table.
    """
    denied = [pl.lit(value=False)]
    if "numeric_value" in columns:
        denied.append(pl.col("numeric_value").cast(pl.Float64, strict=False) == 0)
    if "text_value" in columns:
        denied.append(pl.col("text_value").cast(pl.String).str.strip_chars().str.to_lowercase().is_in(list(_SAYS_NO)))
    return pl.any_horizontal(denied).fill_null(value=False)


def unread_deaths(events: pl.LazyFrame, codes: Iterable[str], code_map: CodeRules = None) -> dict[str, int]:
    """Codes that look like a death -> patients who have one and of whom nothing says that they died, as notes.

    Args:
        events: subject_id, code, and where there are such columns numeric_value and text_value, of whole patients.
        codes: The distinct codes of these events.
        code_map: As of `label_events`.

    Returns:
        Notes that begin with `UNREAD_DEATHS`, the commonest first; none where there is no such code.
    """
    names = [code for code in codes if code is not None]
    likely = deathlike_codes(names, code_map)
    if not likely:
        return {}
    code = pl.col("code").cast(pl.String)
    dead = events.filter(code.is_in(codes_of_death(names, code_map))).select("subject_id").unique()
    counts = (
        events.filter(code.is_in(likely) & ~says_no(events.collect_schema().names()))
        .join(dead, on="subject_id", how="anti")
        .group_by(code)
        .agg(pl.col("subject_id").n_unique().alias("patients"))
        .sort("patients", "code", descending=[True, False])
        .collect()
    )
    return {f"{UNREAD_DEATHS}{name}": int(patients) for name, patients in counts.iter_rows()}


def warn_of_unread_deaths(notes: Mapping[str, int]) -> None:
    """Log what `unread_deaths` found, if anything."""
    found = _named(notes, UNREAD_DEATHS)
    if not found:
        return
    shown = ", ".join(f"{code} ({count:,} patients)" for code, count in found.most_common(_SHOWN))
    more = f" and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
    example = found.most_common(1)[0][0]
    logger.warning(
        f"Codes look like the death of a patient, and nothing else says that these patients died, so that they count "
        f"as alive: {shown}{more}. Say that it is a death: {_how(example, 'death')}. Say `other` in the place of "
        "`death` where it is none, and nothing is said any more."
    )


def _named(notes: Mapping[str, int], beginning: str) -> Counter[str]:
    """What stands in notes that begin so, with its count."""
    return Counter({note.removeprefix(beginning): n for note, n in notes.items() if note.startswith(beginning)})


# -- what to do --------------------------------------------------------------------------------------------------------


def _how(code: str, kind: str) -> str:
    """How a code is mapped, by each of the three ways."""
    pattern = _pattern(code)
    return (
        f"`ehrseq prepare --code-map '{pattern}={kind}'`, or the same pair under `code_map` in metadata/dataset.json "
        f"of the dataset, or label_events(..., code_map=[[{pattern!r}, {kind!r}], ..., *DEFAULT_CODE_MAP])"
    )


def _listed(codes: pl.DataFrame) -> str:
    shown = ", ".join(f"{code} ({rows:,} rows)" for code, rows in codes.select("code", "rows").head(_SHOWN).iter_rows())
    return shown + (f" and {codes.height - _SHOWN:,} more" if codes.height > _SHOWN else "")


def _pattern(code: str) -> str:
    """A regular expression of exactly this code."""
    special = set(r".^$*+?{}[]\|()")
    return "".join(f"\\{sign}" if sign in special else sign for sign in code) + "$"

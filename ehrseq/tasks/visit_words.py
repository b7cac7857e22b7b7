"""Whether a dataset's codes name admissions to hospital, and which codes may be meant where they do not.

Labels stand on admissions. A dataset whose codes of visits are spelled in another way gives none, and an empty table of
labels looks like a result: so whoever prepares, labels or counts such a dataset is told, with the codes that look most
like visits and how to map them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import polars as pl

from ehrseq.tokenization.ehr_codes import INPATIENT_CLASSES, code_kinds, split_kind

logger = logging.getLogger(__name__)

_LOOKS_LIKE_A_VISIT = (
    r"(?i)(?:^|[^a-z])(?:visits?|admi(?:ssions?|t(?:ted)?)|discharged?|encounters?|inpatients?|hospitali[sz]ations?|"
    r"stays?|ward|transfers?|aufnahme|entlassung|opname|ontslag|enc|icu|ed)(?:[^a-z]|$)"
)
_LOOKS_LIKE_AN_END = r"(?i)(?:^|[^a-z])(?:end|discharged?|entlassung|ontslag)(?:[^a-z]|$)"
_SHOWN = 5


def without_admissions(codes: pl.DataFrame, code_map: Sequence[Sequence[str]] | None = None) -> str:
    """What to tell of codes among which none is the start of an admission; empty where one is.

    Args:
        codes: code, rows: how often each stands in the dataset.
        code_map: As of `label_events`.
    """
    named = codes.filter(pl.col("code").is_not_null()).sort("rows", "code", descending=[True, False])
    kinds = [split_kind(kind) for kind in code_kinds(named["code"].to_list(), code_map)]
    if any(kind == "visit_start" and of in INPATIENT_CLASSES for kind, of in kinds):
        return ""
    named = named.with_columns(
        pl.Series("kind", [kind for kind, _ in kinds], dtype=pl.String),
        pl.Series("class", [of for _, of in kinds], dtype=pl.String),
    )
    visits = named.filter(pl.col("kind") == "visit_start")
    likely = named.filter(pl.col("kind").is_in(["other", "static"]) & pl.col("code").str.contains(_LOOKS_LIKE_A_VISIT))
    text = "No code is an admission to hospital, so that no task about admissions gets a label."
    if visits.height:
        text += f" The visits are {_listed(visits)}."
    if likely.height:
        text += f" Codes that look like visits: {_listed(likely)}."
    if not visits.height and not likely.height:
        return f"{text} No code looks like a visit at all."
    shown = likely if likely.height else visits
    is_end = pl.col("code").str.contains(_LOOKS_LIKE_AN_END)
    example = shown.sort(is_end, maintain_order=True)["code"][0]
    return (
        f"{text} Say which are admissions: `ehrseq prepare --code-map '{_pattern(example)}=visit_start:IMP'`, and one "
        "for their ends (visit_end:IMP), or the same pairs under `code_map` in metadata/dataset.json of the dataset, "
        f"or label_events(..., code_map=[[{_pattern(example)!r}, 'visit_start:IMP'], ..., *DEFAULT_CODE_MAP])."
    )


def warn_without_admissions(codes: pl.DataFrame, code_map: Sequence[Sequence[str]] | None = None) -> None:
    """Log what `without_admissions` tells."""
    text = without_admissions(codes, code_map)
    if text:
        logger.warning(text)


def _listed(codes: pl.DataFrame) -> str:
    shown = ", ".join(f"{code} ({rows:,} rows)" for code, rows in codes.select("code", "rows").head(_SHOWN).iter_rows())
    return shown + (f" and {codes.height - _SHOWN:,} more" if codes.height > _SHOWN else "")


def _pattern(code: str) -> str:
    """A regular expression of exactly this code."""
    special = set(r".^$*+?{}[]\|()")
    return "".join(f"\\{sign}" if sign in special else sign for sign in code) + "$"

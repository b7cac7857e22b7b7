"""On whom a tokenizer or a feature extractor was fitted: read from the digest of its patients that it stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import orjson

from ehrseq.audit.findings import Finding
from ehrseq.encode.fitting import FITTED_SPLITS
from ehrseq.tokenization.ehr_sequence import subjects_digest

_MOST_SPLITS = 8  # beyond, combinations are too many to try


@dataclass(frozen=True)
class Fitted:
    """What a checkpoint's tokenizer, or feature extractor, stores of its fit.

    Attributes:
        kind: `tokenizer` or `feature extractor`.
        digest: Digest of the fitted subjects, None where it stores none.
        subjects: Their number, None where it stores none.
        code_map: How the tokenizer reads codes, None for the default.
        input_kinds: Kinds of codes that it reads, None for all.
    """

    kind: str
    digest: str | None
    subjects: int | None
    code_map: tuple[tuple[str, ...], ...] | None = None
    input_kinds: tuple[str, ...] | None = None


def read_fitted(model: str | Path) -> Fitted:
    """What a checkpoint (folder, or owner/name on the Hub) says of its fit.

    Raises:
        ValueError: Neither a tokenizer of events nor a feature extractor of stays there.
    """
    from transformers.utils.hub import cached_file

    for file, kind in (("tokenizer_config.json", "tokenizer"), ("preprocessor_config.json", "feature extractor")):
        try:
            place = cached_file(str(model), file, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{model} is no folder and cannot be fetched from the Hub: {error}") from error
        if place is None:
            continue
        content: dict[str, Any] = orjson.loads(Path(place).read_bytes())
        stored = content.get("event_vocabulary") if kind == "tokenizer" else content
        if isinstance(stored, dict):
            rules = stored.get("code_map")
            kinds = stored.get("kinds")
            return Fitted(
                kind,
                stored.get("fitted_subjects_digest"),
                stored.get("num_fitted_subjects"),
                tuple(tuple(pair) for pair in rules) if rules else None,
                tuple(kinds) if kinds else None,
            )
    raise ValueError(
        f"{model} holds no tokenizer of events (tokenizer_config.json) and no feature extractor "
        "(preprocessor_config.json); give the folder of a checkpoint."
    )


def fit_findings(fitted: Fitted, splits: Mapping[str, Sequence[int]], model: str) -> Iterator[Finding]:
    """Whether the fit saw other splits than those it may.

    Args:
        fitted: What the checkpoint stores.
        splits: Split -> subject ids of the dataset.
        model: Its name, for the texts.
    """
    names = sorted(splits, key=lambda name: (name not in FITTED_SPLITS, name))
    allowed = [name for name in names if name in FITTED_SPLITS]
    seen = _fitted_splits(fitted, splits, names) if fitted.digest else None
    if seen is None:
        most = sum(len(splits[name]) for name in allowed)
        where = " and ".join(allowed) or "pretrain and train"
        count = "an unknown number of" if fitted.subjects is None else f"{fitted.subjects:,}"
        yield Finding(
            "fitted_on_unknown",
            "",
            "",
            fitted.subjects or 0,
            f"The {fitted.kind} of {model} was fitted on {count} patients; {where} hold {most:,} here, and "
            + (
                "it stores no digest of them."
                if not fitted.digest
                else "the digest that it stores is that of no combination of this dataset's splits: it was fitted on "
                "other patients, on a part, or on others too."
            ),
        )
        return
    held_out = [name for name in seen if name not in FITTED_SPLITS]
    if held_out:
        yield Finding(
            "fitted_on_held_out",
            "",
            "+".join(held_out),
            sum(len(splits[name]) for name in held_out),
            f"The {fitted.kind} of {model} was fitted on the splits {', '.join(seen)}: its stored digest is theirs. "
            f"Vocabulary and value bins know the patients of {', '.join(held_out)}; fit on pretrain and train only.",
        )


def _fitted_splits(fitted: Fitted, splits: Mapping[str, Sequence[int]], names: list[str]) -> tuple[str, ...] | None:
    """The splits whose patients together have the stored digest."""
    for size in range(1, min(len(names), _MOST_SPLITS) + 1):
        for chosen in combinations(names[:_MOST_SPLITS], size):
            if fitted.subjects is not None and sum(len(splits[name]) for name in chosen) < fitted.subjects:
                continue
            subjects = sorted({subject for name in chosen for subject in splits[name]})
            if fitted.subjects in (None, len(subjects)) and subjects_digest(subjects) == fitted.digest:
                return chosen
    return None

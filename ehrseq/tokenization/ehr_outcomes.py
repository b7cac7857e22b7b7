"""Outcomes of a forecast, from words and codes to the tokens of a vocabulary.

What may stand for an outcome:

    "MEDICATION//RxNorm//860975"          a code: its rows with whichever result, so all its value bins and texts
    "ICU_ADMISSION//*"                    all codes that begin so: a `*` at the end, as in the code files of tasks
    ["DIAGNOSIS//ICD10CM//I50*", ...]     a union of what else stands here
    "death"                               a death, or a discharge that says so
    "any_admission"                       the start of an inpatient encounter (`INPATIENT_CLASSES`)
    "icu_admission"                       the start of an encounter in intensive care
    "any_visit"                           the start of any visit
    {"code": "LAB//LOINC//2823-3", "above": 5.5, "unit": "mmol/L"}
                                          a value: `above`, `at_least`, `below` or `at_most`; `unit` where there are two
    {"not": "any_visit"}                  that none of it comes up to the horizon

A model knows of a value only its bin. Bins whose values all meet the limit count. A bin that the limit splits does not,
so that what is estimated is a somewhat rarer outcome, and the notes say which. Limits beyond all edges split an outer
bin, behind which nothing is left to count: an error.

Whatever no token of the vocabulary can be is an error that names the nearest, never an outcome of probability 0.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .ehr_codes import EXPIRED, INPATIENT_CLASSES, code_parents
from .ehr_vocabulary import VE, VS, Bins, EventVocabulary, bin_token

VALUE_LIMITS = ("above", "at_least", "below", "at_most")
"""How a value may be asked for."""

OUTCOME_WORDS = ("death", "any_admission", "icu_admission", "any_visit")
"""Outcomes that are told by what a code is, not by its name."""

OutcomeSpec = str | Mapping[str, Any] | Sequence[Any]
"""What the module's text lists."""


class ReadOutcome(NamedTuple):
    """An outcome as tokens; the first three are those of the model's `OutcomeTokens`.

    Attributes:
        name: As the caller named it.
        ids: Token ids, int64, ascending, at least one.
        complement: Whether what is asked for is that none of them comes.
        notes: Where what is estimated differs from what was asked, in words.
    """

    name: str
    ids: np.ndarray
    complement: bool
    notes: tuple[str, ...]


def read_outcomes(
    outcomes: Mapping[str, OutcomeSpec], vocabulary: EventVocabulary, *, time_head: bool
) -> tuple[ReadOutcome, ...]:
    """Read what is asked for.

    Args:
        outcomes: Name -> what stands for it, see the module's text.
        vocabulary: Of the model's tokenizer.
        time_head: Whether the model has a time of its own for the events of a visit. Without one a visit is over as
            soon as it has begun, and that it goes on cannot be asked.

    Raises:
        ValueError: No outcome, an empty union, words or keys outside the list, a code, unit or limit that no token
            stands for, or the complement of a visit's end without a time head.
    """
    if not isinstance(outcomes, Mapping):
        raise ValueError(
            f"outcomes is a {type(outcomes).__name__}; expected a mapping of name -> codes, like "
            "{'icu': 'ICU_ADMISSION//*', 'death': 'death'}."
        )
    if not outcomes:
        raise ValueError("no outcome is asked for; name at least one, like {'death': 'death'}.")
    reader = _SpecReader(vocabulary)
    read = []
    for name, spec in outcomes.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"an outcome is named {name!r}; expected a text.")
        complement = False
        notes: list[str] = []
        if isinstance(spec, Mapping) and "not" in spec:
            reader.check_keys(name, spec, {"not"})
            complement, spec = True, spec["not"]
        ids = token_array(reader.ids(name, spec, notes))
        if not time_head:
            notes += _notes_without_time_head(name, ids, vocabulary, complement=complement)
        read.append(ReadOutcome(name, ids, complement, tuple(notes)))
    return tuple(read)


def death_ids(vocabulary: EventVocabulary) -> tuple[int, ...]:
    """Tokens after which a patient is dead: deaths, and discharges that say so. () where the vocabulary has none."""
    return tuple(
        token
        for code, token in event_tokens(vocabulary)
        if vocabulary.kind(code)[0] == "death"
        or (vocabulary.kind(code)[0] == "visit_end" and re.search(EXPIRED, code) is not None)
    )


def visit_start_ids(vocabulary: EventVocabulary, classes: Iterable[str]) -> tuple[int, ...]:
    """Tokens at which an encounter of these classes starts."""
    wanted = {("visit_start", encounter_class) for encounter_class in classes}
    return tuple(token for code, token in event_tokens(vocabulary) if vocabulary.kind(code) in wanted)


def visit_end_ids(vocabulary: EventVocabulary, classes: Iterable[str] | None = None) -> tuple[int, ...]:
    """Tokens by which a visit ends: [VE], and what the ends of encounters of these classes say.

    Args:
        vocabulary: Of the model's tokenizer.
        classes: Encounter classes, "*" among them for ends that do not tell theirs; None: all.
    """
    wanted = None if classes is None else set(classes)
    ends = (
        token
        for code, token in event_tokens(vocabulary)
        if vocabulary.kind(code)[0] == "visit_end" and (wanted is None or vocabulary.kind(code)[1] in wanted)
    )
    return (vocabulary.token_ids[VE], *ends)


def event_tokens(vocabulary: EventVocabulary) -> list[tuple[str, int]]:
    """(token, id) of every token that a row of a record can become."""
    return [(token, number) for token, number in vocabulary.token_ids.items() if token not in vocabulary.reserved]


def codes_of_tokens(vocabulary: EventVocabulary) -> dict[str, list[int]]:
    """Code -> ids of the tokens that its rows become: itself, its value bins, its texts.

    A text result `CODE//TEXT` cannot be told from a longer code; it stands under both names.
    """
    code_of_bin = {
        bin_token(code, unit, k): code
        for code, units in vocabulary.value_bins.items()
        for unit, edges in units.items()
        for k in range(len(edges) + 1)
    }
    known = {token for token, _ in event_tokens(vocabulary) if token not in code_of_bin} | set(vocabulary.value_bins)
    codes: dict[str, list[int]] = defaultdict(list)
    for token, number in event_tokens(vocabulary):
        code = code_of_bin.get(token, token)
        codes[code].append(number)
        if token not in code_of_bin:
            parts = token.split("//")
            for k in range(1, len(parts)):
                shorter = "//".join(parts[:k])
                if shorter in known:
                    codes[shorter].append(number)
    return dict(codes)


def limited_bins(bins: Bins, limit: str, amount: float) -> tuple[list[int], tuple[float, float] | None]:
    """Bins all of whose values meet a limit, and the bounds of the one that it splits.

    Args:
        bins: Bin k holds the values above its lower edge, up to and including its upper one.
        limit: One of `VALUE_LIMITS`.
        amount: In the unit of the bins; compared in single precision, as values are.

    Returns:
        Numbers of the bins; (lower, upper) of a bin that holds values of both kinds, None where the limit is an edge.
    """
    x = np.float32(amount)
    lower = np.concatenate([[-np.inf], bins.edges]).astype(np.float32)
    upper = np.concatenate([bins.edges, [np.inf]]).astype(np.float32)
    meets, fails = {
        "above": (lower >= x, upper <= x),
        "at_least": (lower >= x, upper < x),
        "below": (upper < x, lower >= x),
        "at_most": (upper <= x, lower >= x),
    }[limit]
    split = np.flatnonzero(~meets & ~fails)
    bounds = (float(lower[split[0]]), float(upper[split[0]])) if len(split) else None
    return np.flatnonzero(meets).tolist(), bounds


class _SpecReader:
    """Reads one outcome after another against one vocabulary."""

    def __init__(self, vocabulary: EventVocabulary) -> None:
        self.vocabulary = vocabulary
        self.codes = codes_of_tokens(vocabulary)

    def ids(self, name: str, spec: Any, notes: list[str]) -> set[int]:
        """Token ids of what stands for an outcome, a complement aside."""
        if isinstance(spec, str):
            return self._of_word(name, spec) if spec in OUTCOME_WORDS else self._of_codes(name, spec)
        if isinstance(spec, Mapping):
            if "not" in spec:
                raise ValueError(
                    f"outcome {name!r}: 'not' stands inside of {spec!r}; expected it around the whole outcome, once."
                )
            return self._of_values(name, spec, notes)
        if isinstance(spec, Sequence) and not isinstance(spec, bytes):
            if not spec:
                raise ValueError(f"outcome {name!r} is an empty list; name at least one code.")
            return set().union(*(self.ids(name, each, notes) for each in spec))
        raise ValueError(
            f"outcome {name!r} is {spec!r}; expected a code (`*` at its end: all that begin so), one of "
            f"{list(OUTCOME_WORDS)}, a list of these, or a mapping with 'code' and a limit, or with 'not'."
        )

    def check_keys(self, name: str, spec: Mapping[Any, Any], allowed: Iterable[str]) -> None:
        """Refuse keys that nobody would read."""
        unknown = sorted(str(key) for key in spec if key not in set(allowed))
        if unknown:
            raise ValueError(f"outcome {name!r} has the unknown keys {unknown}; expected some of {sorted(allowed)}.")

    def _of_word(self, name: str, word: str) -> set[int]:
        vocabulary = self.vocabulary
        if word == "any_visit":
            return {vocabulary.token_ids[VS]}
        ids: Sequence[int]
        if word == "death":
            ids, kind = death_ids(vocabulary), "death"
        else:
            classes = INPATIENT_CLASSES if word == "any_admission" else {"ICU"}
            ids, kind = visit_start_ids(vocabulary, classes), "visit_start"
        if ids:
            return set(ids)
        reason = (
            "no code that it was trained on is one (see its code map)"
            if kind in vocabulary.kinds
            else f"its input_kinds {vocabulary.kinds} leave out {kind!r}"
        )
        raise ValueError(f"outcome {name!r}: the model has no token for {word!r}: {reason}. It cannot foretell it.")

    def _of_codes(self, name: str, pattern: str) -> set[int]:
        return {number for code in self._matching(name, pattern) for number in self.codes[code]}

    def _matching(self, name: str, pattern: Any) -> list[str]:
        """The codes that a pattern names."""
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"outcome {name!r}: a code is {pattern!r}; expected a text, like 'ICU_ADMISSION//*'.")
        if pattern.endswith("*"):
            found = [code for code in self.codes if code.startswith(pattern[:-1])]
        else:
            found = [pattern] if pattern in self.codes else []
        if not found:
            raise ValueError(f"outcome {name!r}: the model has no token for {pattern!r}.{self._nearest(pattern)}")
        return found

    def _nearest(self, pattern: str) -> str:
        """What else might have been meant."""
        if pattern in self.vocabulary.reserved:
            return " It is a special token, which no event of a record is."
        plain = pattern.removesuffix("*")
        parent = next((code for code in code_parents(plain) if code in self.codes), None)
        if parent is not None:
            return f" It reads such rows as the more general {parent!r}; ask for that."
        if pattern == plain and any(code.startswith(f"{plain}//") for code in self.codes):
            return f" It has longer ones: ask for '{plain}//*'."
        return nearest_codes(plain, self.codes)

    def _of_values(self, name: str, spec: Mapping[str, Any], notes: list[str]) -> set[int]:
        self.check_keys(name, spec, {"code", "unit", *VALUE_LIMITS})
        limits = [limit for limit in VALUE_LIMITS if limit in spec]
        if "code" not in spec or len(limits) != 1:
            raise ValueError(
                f"outcome {name!r} is {dict(spec)!r}; expected 'code', one of {list(VALUE_LIMITS)} and perhaps 'unit'."
            )
        limit, amount = limits[0], spec[limits[0]]
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not np.isfinite(np.float32(amount)):
            raise ValueError(f"outcome {name!r}: {limit!r} is {amount!r}; expected a number.")
        unit = spec.get("unit")
        if unit is not None and not isinstance(unit, str):
            raise ValueError(f"outcome {name!r}: 'unit' is {unit!r}; expected a text, like 'mmol/L'.")
        patterns = spec["code"] if isinstance(spec["code"], (list, tuple)) else [spec["code"]]
        if not patterns:
            raise ValueError(f"outcome {name!r}: 'code' is an empty list; name at least one code.")
        codes = sorted({code for pattern in patterns for code in self._matching(name, pattern)})
        binned = [code for code in codes if code in self.vocabulary.value_bins]
        if not binned:
            raise ValueError(
                f"outcome {name!r}: {codes[:3]} {'have' if len(codes) > 1 else 'has'} no value bins in the vocabulary, "
                "so that the model knows no values of it. Ask for the code alone."
            )
        ids: set[int] = set()
        said: list[str] = []
        others: list[str] = []
        for code in binned:
            bins = self._bins(code, unit)
            if bins is None:
                others.append(code)
                continue
            found, words = value_ids(code, bins, limit, float(amount))
            ids |= found
            said += [words] if words else []
        if not ids and said:
            raise ValueError(f"outcome {name!r}: {'; '.join(said[:3])}.")
        if not ids:
            units = {code: [unit or "none" for unit in self.vocabulary.value_bins[code]] for code in others[:3]}
            raise ValueError(
                f"outcome {name!r}: "
                + (f"no code has values in {unit!r}" if unit is not None else "its codes have values in several units")
                + f"; give 'unit' as one that they have: {units}."
            )
        notes += said
        if others:
            notes.append(f"{len(others)} codes without values in that unit do not count, for example {others[0]}")
        return ids

    def _bins(self, code: str, unit: str | None) -> Bins | None:
        """Bins of a code's values in a unit; MIMIC-IV as MEDS writes the unit into the code instead."""
        units = self.vocabulary.value_bins[code]
        if unit is None:
            return self.vocabulary.bins(code, next(iter(units))) if len(units) == 1 else None
        if unit == "" or (list(units) == [""] and code.casefold().endswith(f"//{unit}".casefold())):
            return self.vocabulary.bins(code, "") if "" in units else None
        return self.vocabulary.bins(code, unit)


def value_ids(code: str, bins: Bins, limit: str, amount: float) -> tuple[set[int], str | None]:
    """Tokens of a code's values that meet a limit, and what is to be said where they do not say it exactly.

    Args:
        code: Whose bins they are.
        bins, limit, amount: As of `limited_bins`.

    Returns:
        Token ids, none where no bin lies wholly within the limit; words, None where the bins say it exactly.
    """
    numbers, split = limited_bins(bins, limit, amount)
    asked = f"{limit.replace('_', ' ')} {amount:g}"
    if not numbers:
        edges = [float(f"{edge:.6g}") for edge in bins.cuts]
        return set(), (
            f"no value bin of {code} lies wholly {asked}: its edges are {edges}, and the model cannot tell such values "
            "from others; ask for a limit among the edges"
        )
    held = {number for number in (bins.ids[k] for k in numbers) if number is not None}
    if not held:
        return set(), f"none of the value bins of {code} {asked} is a token of the vocabulary"
    words = []
    if len(held) < len(numbers):
        words.append(
            f"{len(numbers) - len(held)} of {len(numbers)} value bins are no tokens, their values do not count"
        )
    if split is not None:
        low, high = split
        counted = f"above {high:g}" if limit in ("above", "at_least") else f"of at most {low:g}"
        words.append(f"{asked} splits the bin from {low:g} to {high:g}; only values {counted} count")
    return held, f"{code}: {', '.join(words)}" if words else None


def nearest_codes(code: str, codes: Iterable[str]) -> str:
    """A sentence that names the codes that are spelled most like one, '' where none is."""
    by_case = {each.casefold(): each for each in codes}
    near = difflib.get_close_matches(code.casefold(), by_case, n=3, cutoff=0.5)
    return f" The nearest that it has: {', '.join(repr(by_case[each]) for each in near)}." if near else ""


def token_array(ids: Iterable[int]) -> np.ndarray:
    """Ids as an outcome holds them: int64, ascending, each once."""
    return np.asarray(sorted(set(ids)), dtype=np.int64)


def _notes_without_time_head(name: str, ids: np.ndarray, vocabulary: EventVocabulary, *, complement: bool) -> list[str]:
    ends = (set(visit_end_ids(vocabulary)) - set(death_ids(vocabulary))) & set(ids.tolist())
    if ends and complement:
        raise ValueError(
            f"outcome {name!r} is that a visit goes on, and the model has no time within visits: to it each is over at "
            "once. Train one with a time head (`time_edges`)."
        )
    return ["the model has no time within visits: an end of one counts as soon as it begins"] if ends else []


__all__ = [
    "OUTCOME_WORDS",
    "VALUE_LIMITS",
    "OutcomeSpec",
    "ReadOutcome",
    "codes_of_tokens",
    "death_ids",
    "event_tokens",
    "limited_bins",
    "nearest_codes",
    "read_outcomes",
    "token_array",
    "value_ids",
    "visit_end_ids",
    "visit_start_ids",
]

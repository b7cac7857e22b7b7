"""What a task of ACES (https://eventstreamaces.readthedocs.io) asks of a forecast, read from its YAML file.

ACES counts predicates in windows around a trigger. A forecast takes the moment (`index_timestamp`) from the labels, and
answers a label window of this form: it starts at that moment (or a fixed time later), ends a fixed time later or with
the first event of a predicate, and asks for a predicate that is a set of codes, or values of them above or below a
limit. Everything else is an error that says what stands in the way. The library es-aces is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from ehrseq.forecasting.task_forecast import LONGEST_STAY_DAYS, TaskForecast, codes_that_match
from ehrseq.modeling.ehr_trajectories import OutcomeTokens
from ehrseq.tokenization.ehr_codes import INPATIENT_CLASSES
from ehrseq.tokenization.ehr_outcomes import codes_of_tokens, death_ids, nearest_codes, token_array, value_ids
from ehrseq.tokenization.ehr_vocabulary import VE, EventVocabulary

_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)")
_UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "seconds"),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), "minutes"),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), "hours"),
    **dict.fromkeys(("d", "day", "days"), "days"),
    **dict.fromkeys(("w", "wk", "week", "weeks"), "weeks"),
}
_OFFSET = re.compile(r"(?P<base>[\w.]+)\s*(?:(?P<sign>[+-])\s*(?P<span>[\w\s.:]+))?")
_UNTIL = re.compile(r"(?P<base>[\w.]+)\s*->\s*(?P<predicate>\w+)")
_VISIT_ENDS = pl.Series([f"VISIT_END//{name}" for name in sorted(INPATIENT_CLASSES)] + ["HOSPITAL_DISCHARGE//HOME"])
"""What discharges are called; one that says no more than its class is [VE] to a tokenizer."""


def read_aces_outcome(path: str | Path, vocabulary: EventVocabulary, *, time_head: bool) -> TaskForecast:
    """What a task of ACES asks of a forecast.

    Args:
        path: Its YAML file; the name becomes the task's.
        vocabulary: Of the model's tokenizer.
        time_head: Whether the model has a time of its own for the events of a visit.

    Raises:
        ValueError: A file that is none, or a task that cannot be forecast, and why.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as a task of ACES: {' '.join(str(error).split())}") from error
    return _AcesReader(str(path), content, vocabulary, time_head=time_head).read()


@dataclass(frozen=True)
class _Moment:
    """A time of a task: so long after an event that has its own name ("trigger")."""

    base: str
    offset: timedelta


class _AcesReader:
    """Reads one file against one vocabulary."""

    def __init__(self, path: str, content: Any, vocabulary: EventVocabulary, *, time_head: bool) -> None:
        self.path, self.vocabulary, self.time_head = path, vocabulary, time_head
        self.name = Path(path).stem
        self.notes: list[str] = []
        self.predicates = self.section(content, "predicates")
        self.windows = self.section(content, "windows")
        self.codes = codes_of_tokens(vocabulary)

    def read(self) -> TaskForecast:
        """See `read_aces_outcome`."""
        index = self.moment(*self.one_with("index_timestamp"))
        window, _ = self.one_with("label")
        of = self.windows[window]
        start = self.moment(window, "start")
        if start.base != index.base or start.offset < index.offset:
            raise self.error(f"the window {window!r} does not start at the index time, or a fixed time after it")
        ids = self.tokens(str(of["label"]))
        if start.offset > index.offset:
            self.notes.append(
                f"the label window starts {start.offset - index.offset} after the index time; what comes before it "
                "counts as well, unless the labels leave such patients out"
            )
        until: set[int] = set()
        match = _UNTIL.fullmatch(str(of.get("end", "")).strip())
        if match is not None:
            until = self.tokens(match["predicate"]) - ids
            horizon = LONGEST_STAY_DAYS
            self.notes.append(f"{match['predicate']} is looked for up to {horizon:g} days")
        else:
            end = self.moment(window, "end")
            horizon = (end.offset - index.offset) / timedelta(days=1)
            if end.base != index.base or horizon <= 0:
                raise self.error(f"the window {window!r} does not end a fixed time after the index time")
        needs_time_head = match is None and horizon < 1
        if needs_time_head and not self.time_head:
            self.notes.append("the model has no time within visits: what it foretells for the rest of one counts")
        if of.get("has"):
            self.notes.append(f"what the window {window!r} must hold beside the label is not asked")
        return TaskForecast(
            name=self.name,
            horizon_days=horizon,
            outcome=OutcomeTokens(self.name, token_array(ids)),
            until_ids=tuple(sorted(until)),
            death_ids=death_ids(self.vocabulary),
            needs_time_head=needs_time_head,
            moments="at the index times that ACES finds: the task's labels name these moments",
            notes=tuple(self.notes),
        )

    def error(self, why: str) -> ValueError:
        """An error that names the file."""
        return ValueError(f"{self.path} cannot be forecast: {why}.")

    def section(self, content: Any, key: str) -> Mapping[str, Any]:
        """A mapping of mappings."""
        found = content.get(key) if isinstance(content, Mapping) else None
        if not isinstance(found, Mapping) or not found or not all(isinstance(each, Mapping) for each in found.values()):
            raise self.error(f"it has no {key}, or not as a mapping of mappings")
        return found

    def one_with(self, key: str) -> tuple[str, str]:
        """(name, value) of the one window that has a key."""
        found = [(name, str(window[key])) for name, window in self.windows.items() if window.get(key) is not None]
        if len(found) != 1:
            raise self.error(f"{len(found)} windows have the key {key!r}; expected one")
        return found[0]

    def moment(self, window: str, side: str, seen: tuple[str, ...] = ()) -> _Moment:
        """When a window starts or ends, by its event and a fixed time."""
        where = f"{window}.{side}"
        if window not in self.windows or side not in ("start", "end") or where in seen:
            raise self.error(f"{where!r} names no start or end of a window, or in a circle")
        text = self.windows[window].get(side)
        match = _OFFSET.fullmatch(str(text).strip()) if text is not None else None
        if match is None:
            raise self.error(
                f"{where!r} is {text!r}; a forecast needs a fixed time from the trigger, like 'trigger + 24h' (of the "
                "label window's end also 'start -> predicate')"
            )
        offset = self.span(match["span"], where) if match["span"] else timedelta(0)
        offset = -offset if match["sign"] == "-" else offset
        base = match["base"]
        if base == "trigger":
            return _Moment(base, offset)
        other, _, other_side = base.rpartition(".") if "." in base else (window, "", base)
        earlier = self.moment(other, other_side, (*seen, where))
        return _Moment(earlier.base, earlier.offset + offset)

    def span(self, text: str, where: str) -> timedelta:
        """A duration such as `24h`, `30 days` or `1 day 12 hours`."""
        parts = _SPAN.findall(text.lower())
        if not parts or _SPAN.sub("", text.lower()).strip() or any(unit not in _UNITS for _, unit in parts):
            raise self.error(f"{where!r} has the duration {text!r}; expected one like 24h or 30 days")
        return sum((timedelta(**{_UNITS[unit]: float(number)}) for number, unit in parts), timedelta(0))

    def tokens(self, predicate: str, seen: tuple[str, ...] = ()) -> set[int]:
        """Tokens of a predicate.

        Raises:
            ValueError: It is unknown, of a kind that is no set of tokens, or no token stands for it.
        """
        if predicate not in self.predicates or predicate in seen:
            raise self.error(
                f"the predicate {predicate!r} is not in the file (those of a file of its own are not read), or stands "
                "for itself"
            )
        of = self.predicates[predicate]
        if "expr" in of:
            match = re.fullmatch(r"or\(([\w\s,]+)\)", str(of["expr"]).strip())
            if match is None:
                raise self.error(
                    f"the predicate {predicate!r} is {of['expr']!r}; a forecast knows unions, `or(...)`, and no "
                    "two things at one time"
                )
            return set().union(*(self.tokens(each.strip(), (*seen, predicate)) for each in match[1].split(",")))
        unread = set(of) - {"code", "value_min", "value_max", "value_min_inclusive", "value_max_inclusive"}
        if unread or "code" not in of:
            raise self.error(f"the predicate {predicate!r} is {dict(of)!r}; a forecast knows codes and values of them")
        found, is_visit_end = self.matching(predicate, of["code"])
        limits = {
            ("at_least" if of.get("value_min_inclusive") else "above"): of.get("value_min"),
            ("at_most" if of.get("value_max_inclusive") else "below"): of.get("value_max"),
        }
        asked = {limit: amount for limit, amount in limits.items() if amount is not None}
        if asked:
            return self.values(predicate, found, asked)
        ids = {number for code in found for number in self.codes[code]}
        if is_visit_end:
            ids.add(self.vocabulary.token_ids[VE])
            self.notes.append(f"{predicate}: the end of a visit counts at the visit's last event")
        if not ids:
            raise self.error(
                f"no token of the vocabulary is the predicate {predicate!r} ({of['code']!r})."
                f"{nearest_codes(str(of['code']), self.codes)}".removesuffix(".")
            )
        return ids

    def matching(self, predicate: str, code: Any) -> tuple[set[str], bool]:
        """The codes of the vocabulary that a predicate names, and whether it names the ends of visits."""
        if isinstance(code, str):
            return {code} & set(self.codes), self.vocabulary.kind(code)[0] == "visit_end"
        if isinstance(code, Mapping) and isinstance(code.get("any"), list):
            named = {str(each) for each in code["any"]}
            return named & set(self.codes), any(self.vocabulary.kind(each)[0] == "visit_end" for each in named)
        if isinstance(code, Mapping) and isinstance(code.get("regex"), str):
            try:
                return codes_that_match(self.codes, [code["regex"]]), bool(
                    _VISIT_ENDS.str.contains(code["regex"]).any()
                )
            except pl.exceptions.ComputeError as error:
                raise self.error(
                    f"the predicate {predicate!r} has an expression that cannot be read ({error})"
                ) from error
        raise self.error(f"the predicate {predicate!r} has the code {code!r}; expected a text, `any` or `regex`")

    def values(self, predicate: str, codes: set[str], asked: Mapping[str, Any]) -> set[int]:
        """Value bins of some codes that meet all of the limits; ACES looks at no unit, so every unit counts."""
        pairs = [(code, unit) for code in sorted(codes) for unit in self.vocabulary.value_bins.get(code, {})]
        said: list[str] = []
        ids: set[int] = set()
        for code, unit in pairs:
            bins = self.vocabulary.bins(code, unit)
            if bins is None:
                continue
            held = []
            for limit, amount in asked.items():
                found, words = value_ids(code, bins, limit, float(amount))
                held.append(found)
                said += [words] if words else []
            ids |= set.intersection(*held)
        if not ids:
            raise self.error(f"the predicate {predicate!r}: {'; '.join(said[:3]) or 'its codes have no value bins'}")
        self.notes += said
        return ids


__all__ = ["read_aces_outcome"]

"""What a clinical task is: the fields of its YAML file, checked strictly.

A task is one row per stay: a moment (`prediction`), what must hold then for the row to exist (`exclude`, `age`), an
event looked for up to the `horizon` (`outcome`), and the events that make it impossible (`competing`: label 0,
counted). The words mean what `ehrseq.tasks.labelling` does with them; they are listed here, so that a misspelt one is
an error and never a task that silently means something else.

    name: heart_failure_365d                # lower-case; also the folder of the labels
    token: "[HEART_FAILURE_365D]"           # what a model is asked with
    definition: what is foretold, when and about whom, in words
    positive_label: what label 1 means
    prediction: {anchor: discharge, offset: 0h}     # ANCHORS
    horizon: 365d                           # m, h, d, w; `stay`: to the end of the stay
    horizon_from: prediction                # HORIZON_FROM
    age: {at_least: 18}                     # years at the prediction time, optional; `below` too
    exclude: [dead, earlier_code]           # EXCLUSIONS
    outcome:
      event: first_code                     # OUTCOMES
      codes: ['^DIAGNOSIS//ICD10CM//I50']   # regular expressions, and/or
      icd9: ['428']                         # categories of ICD-9-CM, in every spelling that datasets use
      icd10: [I50]                          # categories of ICD-10
      code_file: codes.txt                  # beside the YAML file: a code a line, `*` at its end: all that begin so
    competing: [death]                      # COMPETING

What `values` and `any_of` of the outcome `value` mean is in `ehrseq.tasks.measures`. Copy a file of `definitions/` to
make a task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from ehrseq.tasks.measures import CHANGES, LIMITS, SINCE, Measure, Rule
from ehrseq.tokenization.ehr_durations import DURATION_FORM, parse_duration

STAYS = {
    "admission": ("admission", "start"),
    "discharge": ("admission", "end"),
    "icu_admission": ("icu", "start"),
    "icu_discharge": ("icu", "end"),
    "visit_end": ("visit", "end"),
}
"""Anchor -> which stays make rows (admissions to hospital, stays in intensive care, visits as an outpatient), and which
end of theirs it is."""

ANCHORS = tuple(STAYS)
"""Moments of a stay that a prediction time is counted from."""

ADMISSIONS = ("every", "last", "last_followed")
"""Which admissions of a patient make a row; `last_followed` is the last one that another follows."""

HORIZON_FROM = ("prediction", "anchor")
"""Where the horizon starts."""

EXCLUSIONS = ("dead", "stay_ended", "earlier_code", "earlier_value")
"""Reasons for a stay to make no row, all known at the prediction time: the patient is dead (at a discharge: the stay
ended in death), the stay has ended, a code of the outcome has been recorded, a value of it was measured in the stay."""

OUTCOMES = (
    "death",
    "death_in_stay",
    "admission",
    "icu_admission",
    "length_of_stay",
    "first_code",
    "code_at_admission",
    "code_ever",
    "value",
)
"""Events that a task looks for: a death; a death before the stay ends; another admission; a (further) admission to
intensive care; a stay that outlasts the horizon; a first code, recorded anywhere within the horizon; a first code,
recorded at an admission that starts within the horizon; a code anywhere in the record, the past and all the future
included; a measured value (`ehrseq.tasks.measures`)."""

UNMEASURED = ("drop", "negative")
"""What a row is without any measurement within the horizon, for the outcome `value`: dropped and counted, or 0."""

TO_STAY_END = "stay"
"""The horizon that ends with the stay."""

COMPETING = ("death", "code_elsewhere")
"""Events that make the outcome impossible: the label is 0 and the row is counted."""

_CODES_AT_ONCE = 200  # codes of a file in one expression


@dataclass(frozen=True)
class Task:
    """One clinical prediction task.

    Attributes:
        name: Lower-case identifier, also the folder of its labels.
        token: Task token of the prompt, for example `[MOR_1M]`.
        definition: The task in words, as a model card prints it.
        positive_label: What label 1 means, in words.
        anchor: Moment of the stay that the prediction time is counted from, one of `ANCHORS`.
        offset: Time from the anchor to the prediction time.
        horizon: How far ahead the outcome counts, its last instant included; `horizon_text` as the file spells it.
        outcome: Event looked for, one of `OUTCOMES`.
        codes: Regular expressions (Rust syntax, searched anywhere in the code) of the outcome's codes.
        measures: Rows that measure the outcome `value`.
        rules: When a value is the outcome; one suffices.
        unmeasured: One of `UNMEASURED`.
        ages: Years at the prediction time from which on, and below which, a row exists; None: no bound.
        admissions: Which admissions of a patient make a row, one of `ADMISSIONS`.
        horizon_from: Start of the horizon, one of `HORIZON_FROM`.
        exclude: Which of `EXCLUSIONS` apply.
        competing: Which of `COMPETING` are counted.
        censoring: A row whose horizon passes the end of the data is dropped, whichever way it would turn out,
            unless the patient died within it.
        retrospective: The rows or the outcome use what is not known at the prediction time: for reproduction only.
        excluded_input_kinds: Kinds of codes (see the tokenizer) that would give the outcome away.
        source: File that the task was read from.
    """

    name: str
    token: str
    definition: str
    positive_label: str
    anchor: str
    horizon: timedelta
    horizon_text: str
    outcome: str
    offset: timedelta = timedelta(0)
    codes: tuple[str, ...] = ()
    measures: tuple[Measure, ...] = ()
    rules: tuple[Rule, ...] = ()
    unmeasured: str = "drop"
    ages: tuple[float | None, float | None] = (None, None)
    admissions: str = "every"
    horizon_from: str = "prediction"
    exclude: tuple[str, ...] = ()
    competing: tuple[str, ...] = ()
    censoring: bool = True
    retrospective: bool = False
    excluded_input_kinds: tuple[str, ...] = ()
    source: str = field(default="", compare=False)

    @classmethod
    def from_dict(cls, data: object, *, source: str = "task") -> Task:
        """Read the content of a task file.

        Args:
            data: Mapping as YAML gives it: name, token, definition, positive_label, prediction {anchor, offset},
                horizon, outcome {event, codes, ...}, and optionally age, admissions, horizon_from, exclude, competing,
                censoring, retrospective, excluded_input_kinds; see the module's text.
            source: Where it comes from, for error messages and for `code_file`.

        Raises:
            ValueError: An unknown, missing or badly typed key, a word outside its list, a duration or a regular
                expression that cannot be read, or keys that contradict each other; the message names file and key.
        """
        reader = _Reader(data, source, "")
        prediction = reader.section("prediction")
        outcome = reader.section("outcome")
        event = outcome.word("event", OUTCOMES)
        values: dict[str, Any] = {
            "name": reader.matching("name", r"[a-z][a-z0-9_]*", "lower-case letters, digits and _"),
            "token": reader.matching("token", r"\[[A-Z0-9_]+\]", "capitals, digits and _ in brackets, like [MOR_1M]"),
            "definition": reader.text("definition"),
            "positive_label": reader.text("positive_label"),
            "anchor": prediction.word("anchor", ANCHORS),
            "offset": prediction.duration("offset", default="0h")[0],
            "outcome": event,
            "codes": (
                *outcome.patterns("codes"),
                *(_icd(9, category) for category in outcome.categories("icd9")),
                *(_icd(10, category) for category in outcome.categories("icd10")),
                *outcome.code_file(),
            ),
            "measures": outcome.measures(),
            "rules": outcome.rules(),
            "unmeasured": outcome.word("unmeasured", UNMEASURED, default="drop"),
            "ages": reader.ages(),
            "admissions": reader.word("admissions", ADMISSIONS, default="every"),
            "horizon_from": reader.word("horizon_from", HORIZON_FROM, default="prediction"),
            "exclude": reader.words("exclude", EXCLUSIONS),
            "competing": reader.words("competing", COMPETING),
            "censoring": reader.flag("censoring", default=True),
            "retrospective": reader.flag("retrospective", default=False),
            "excluded_input_kinds": reader.words("excluded_input_kinds", None),
        }
        values["horizon"], values["horizon_text"] = reader.horizon()
        for part in (reader, prediction, outcome):
            part.finish()
        task = cls(**values, source=source)
        task._check(reader)
        return task

    @classmethod
    def from_yaml(cls, path: str | Path) -> Task:
        """Read a task file.

        Raises:
            ValueError: No such file, not UTF-8, not YAML, a repeated key, or anything `from_dict` refuses.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"No task file at {path}: {error.strerror}. Give a .yaml file or one of list_tasks()."
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
        try:
            data = yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
        return cls.from_dict(data, source=str(path))

    def to_config(self) -> dict[str, Any]:
        """What a model's config keeps of the task: name, token, horizon (like `30d`), definition, positive_label, and
        under "asked" when and about whom it can be asked (anchor, offset_hours, exclude, codes that were to exclude).
        """
        return {
            "name": self.name,
            "token": self.token,
            "horizon": self.horizon_text,
            "definition": self.definition,
            "positive_label": self.positive_label,
            "asked": {
                "anchor": self.anchor,
                "offset_hours": self.offset / timedelta(hours=1),
                "exclude": list(self.exclude),
                "codes": list(self.codes) if "earlier_code" in self.exclude else [],
            },
        }

    @property
    def stays(self) -> str:
        """Which stays make rows: `admission`, `icu` or `visit`."""
        return STAYS[self.anchor][0]

    @property
    def side(self) -> str:
        """Which end of the stay the anchor is: `start` or `end`."""
        return STAYS[self.anchor][1]

    @property
    def to_stay_end(self) -> bool:
        """Whether the horizon is the end of the stay."""
        return self.horizon_text == TO_STAY_END

    def _check(self, reader: _Reader) -> None:
        """Keys that are each in order but contradict each other."""
        if self.horizon <= timedelta(0) and not self.to_stay_end:
            raise reader.error("horizon", self.horizon_text, "a duration above 0")
        needs_codes = self.outcome in ("first_code", "code_at_admission", "code_ever")
        if needs_codes and not self.codes:
            raise reader.error(
                "outcome.codes", [], f"at least one regular expression: outcome {self.outcome} looks for codes"
            )
        if self.codes and not needs_codes:
            raise reader.error(
                "outcome.codes", list(self.codes), f"no codes: outcome {self.outcome} does not look at them"
            )
        for key, words in (("exclude", self.exclude), ("competing", self.competing)):
            for word in words:
                if word == "earlier_code" and self.outcome not in ("code_at_admission", "first_code"):
                    raise reader.error(key, word, "this word only with outcome code_at_admission or first_code")
                if word == "code_elsewhere" and self.outcome != "code_at_admission":
                    raise reader.error(key, word, "this word only with outcome code_at_admission")
                if word == "earlier_value" and self.outcome != "value":
                    raise reader.error(key, word, "this word only with outcome value")
        if self.outcome in ("code_at_admission", "first_code") and "earlier_code" not in self.exclude:
            raise reader.error(
                "exclude", list(self.exclude), "earlier_code: a first code cannot be foretold after it was recorded"
            )
        if self.outcome == "length_of_stay":
            if self.side != "start" or self.horizon_from != "anchor":
                raise reader.error("outcome.event", self.outcome, "prediction.anchor admission and horizon_from anchor")
            if self.offset >= self.horizon:
                raise reader.error("prediction.offset", str(self.offset), f"less than the horizon {self.horizon_text}")
        if self.side == "end" and "stay_ended" in self.exclude:
            raise reader.error(
                "exclude", "stay_ended", "this word only with anchor admission: at a discharge every stay has ended"
            )
        self._check_further(reader)
        hindsight = self.admissions != "every" or self.outcome == "code_ever" or not self.censoring
        if hindsight and not self.retrospective:
            raise reader.error(
                "retrospective",
                False,
                "true: admissions other than every, outcome code_ever and censoring false use the future",
            )

    def _check_further(self, reader: _Reader) -> None:
        """The same for what goes beyond the tasks of the EhrMamba paper."""
        within_stay = self.outcome == "death_in_stay" or self.to_stay_end
        if within_stay and not {"dead", "stay_ended"} <= set(self.exclude):
            raise reader.error(
                "exclude", list(self.exclude), "dead and stay_ended: the stay must go on for its end to be foretold"
            )
        if within_stay and self.side != "start":
            raise reader.error("prediction.anchor", self.anchor, "admission or icu_admission: the stay must go on")
        if self.to_stay_end and self.outcome not in ("death_in_stay", "value", "first_code"):
            raise reader.error("horizon", self.horizon_text, "a duration, like 30d, with this outcome")
        if self.outcome == "code_at_admission" and self.stays != "admission":
            raise reader.error("outcome.event", self.outcome, "first_code, with this anchor")
        if self.outcome in ("icu_admission", "admission") and self.side == "start" and self.stays != "visit":
            further = "icu" if self.outcome == "icu_admission" else "admission"
            if self.stays == further:
                raise reader.error("outcome.event", self.outcome, "another, or the anchor at the end of the stay")
        is_value = self.outcome == "value"
        for key, content in (("values", self.measures), ("any_of", self.rules)):
            if is_value and not content:
                raise reader.error(f"outcome.{key}", [], "at least one entry: outcome value looks for values")
            if content and not is_value:
                raise reader.error(f"outcome.{key}", "given", f"nothing: outcome {self.outcome} looks at no values")
        if "earlier_value" in self.exclude and not any(rule.since == "window" for rule in self.rules):
            raise reader.error("exclude", "earlier_value", "a rule that needs no prediction time, to hold earlier")
        low, high = self.ages
        if low is not None and high is not None and low >= high:
            raise reader.error("age", {"at_least": low, "below": high}, "at_least below below")


def _icd(revision: int, category: str) -> str:
    """One expression for a category of ICD-9-CM or ICD-10 in every namespace that datasets use, dots or none."""
    dotted = r"\.?".join(category.replace(".", ""))
    bare = dotted if "." in category else category
    return rf"(?i)^(?:DIAGNOSIS//(?:[^/]*ICD[^/0-9]*{revision}[^/]*|ICD//{revision})//|ICD{revision}(?:CM)?/){bare}"


class _Reader:
    """Takes keys out of a mapping one by one, and complains about what is left."""

    def __init__(self, data: object, source: str, prefix: str) -> None:
        if not isinstance(data, Mapping):
            where = f"key '{prefix.rstrip('.')}'" if prefix else "the file"
            raise ValueError(f"{source}: {where} is {data!r}; expected a mapping of keys.")
        self.data, self.source, self.prefix = dict(data), source, prefix

    def error(self, key: str, got: Any, expected: str) -> ValueError:
        return ValueError(f"{self.source}: key '{self.prefix}{key}' is {got!r}; expected {expected}.")

    def take(self, key: str, default: Any = None) -> Any:
        if key not in self.data and default is None:
            raise ValueError(f"{self.source}: key '{self.prefix}{key}' is missing.")
        return self.data.pop(key, default)

    def finish(self) -> None:
        if self.data:
            raise ValueError(
                f"{self.source}: unknown key(s) {', '.join(repr(f'{self.prefix}{key}') for key in self.data)}."
            )

    def section(self, key: str) -> _Reader:
        return _Reader(self.take(key), self.source, f"{self.prefix}{key}.")

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, value, "a text")
        return value.strip()

    def matching(self, key: str, pattern: str, words: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise self.error(key, value, words)
        return value

    def word(self, key: str, allowed: Iterable[str], default: str | None = None) -> str:
        value: str = self.take(key, default)
        if value not in allowed:
            raise self.error(key, value, f"one of {list(allowed)}")
        return value

    def words(self, key: str, allowed: Iterable[str] | None) -> tuple[str, ...]:
        value = self.take(key, [])
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self.error(key, value, "a list of words")
        for word in value:
            if allowed is not None and word not in allowed:
                raise self.error(key, word, f"words out of {list(allowed)}")
        return tuple(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def duration(self, key: str, default: str | None = None) -> tuple[timedelta, str]:
        value = self.take(key, default)
        try:
            duration = parse_duration(value)
        except OverflowError:
            raise self.error(key, value, "a duration of a human life at most") from None
        if duration is None:
            raise self.error(key, value, DURATION_FORM)
        return duration, value

    def horizon(self) -> tuple[timedelta, str]:
        if self.data.get("horizon") == TO_STAY_END:
            return timedelta(0), self.take("horizon")
        return self.duration("horizon")

    def number(self, key: str, *, least: float | None = None, default: float | None = None) -> float:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, value, "a number")
        if least is not None and value <= least:
            raise self.error(key, value, f"a number above {least:g}")
        return float(value)

    def ages(self) -> tuple[float | None, float | None]:
        if "age" not in self.data:
            return None, None
        section = self.section("age")
        low, high = (section.number(key, least=-1) if key in section.data else None for key in ("at_least", "below"))
        section.finish()
        if low is None and high is None:
            raise self.error("age", {}, "at_least, below or both, in years")
        return low, high

    def entries(self, key: str) -> list[_Reader]:
        value = self.take(key, [])
        if not isinstance(value, list):
            raise self.error(key, value, "a list of mappings")
        return [_Reader(entry, self.source, f"{self.prefix}{key}[{k}].") for k, entry in enumerate(value)]

    def measures(self) -> tuple[Measure, ...]:
        measures = []
        for entry in self.entries("values"):
            codes = entry.patterns("codes")
            if not codes:
                raise entry.error("codes", [], "at least one regular expression")
            unit = entry.text("unit") if "unit" in entry.data else None
            measures.append(Measure(codes, unit, entry.number("times", least=0, default=1.0)))
            entry.finish()
        return tuple(measures)

    def rules(self) -> tuple[Rule, ...]:
        rules = []
        for entry in self.entries("any_of"):
            kinds = [kind for kind in (*LIMITS, *CHANGES) if kind in entry.data]
            if len(kinds) != 1:
                raise self.error("any_of", dict(entry.data), f"one of {[*LIMITS, *CHANGES]} in each entry")
            kind = kinds[0]
            if kind in LIMITS:
                rules.append(Rule(kind, entry.number(kind)))
            else:
                amount = entry.number(kind, least=0)
                within, text = entry.duration("within")
                if within <= timedelta(0):
                    raise entry.error("within", text, "a duration above 0")
                rules.append(Rule(kind, amount, within, entry.word("since", SINCE, default="window")))
            entry.finish()
        return tuple(rules)

    def categories(self, key: str) -> tuple[str, ...]:
        value = self.words(key, None)
        for category in value:
            if not re.fullmatch(r"[A-Za-z0-9]+(?:\.[A-Za-z0-9]+)?", category):
                raise self.error(key, category, "codes of ICD, like '428' or I50 (quote numbers)")
        return value

    def code_file(self) -> tuple[str, ...]:
        """Expressions of the codes of a file, a few hundred codes each."""
        if "code_file" not in self.data:
            return ()
        name = self.text("code_file")
        path = Path(self.source).parent / name
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise self.error(
                "code_file", name, f"a text file beside the task's, with a code a line ({error})"
            ) from None
        codes = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not codes:
            raise self.error("code_file", name, "a file with at least one code")
        exact = [
            re.sub(r"[^\w\s]", r"\\\g<0>", code.removesuffix("*")) + ("" if code.endswith("*") else "$")
            for code in codes
        ]
        return tuple(f"^(?:{'|'.join(exact[k : k + _CODES_AT_ONCE])})" for k in range(0, len(exact), _CODES_AT_ONCE))

    def patterns(self, key: str) -> tuple[str, ...]:
        value = self.words(key, None)
        for pattern in value:
            try:
                pl.Series([""]).str.contains(pattern)
            except pl.exceptions.ComputeError as error:
                raise self.error(
                    key, pattern, f"a regular expression in Rust syntax ({' '.join(str(error).split())})"
                ) from error
        return value


class _StrictLoader(yaml.SafeLoader):
    """YAML without repeated keys: PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"repeated key(s) {sorted(repeated)}", node.start_mark)
        return super().construct_mapping(node, deep=deep)

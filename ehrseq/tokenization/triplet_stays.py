"""What of a record becomes triplets (time, variable, value), and the same for one patient, in plain Python.

A **stay** is a window of a subject's record: it begins at an admission (or the first event, or so many hours before the
prediction) and lasts `window_hours`, but never beyond the prediction time. Its numeric rows of the chosen variables are
its triplets, with times in minutes since the window's start; its static values are what is known of the subject then.

`read_stay` is the readable twin of the columnar `ehrseq.encode.triplets`; both give the same numbers. It needs nothing
but numpy, so that a checkpoint can score a patient wherever transformers runs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .ehr_codes import MINUTE_US, YEAR_US
from .ehr_sequence import Event

WINDOW_STARTS = ("code", "first_event", "before_prediction")
STATIC_KINDS = ("numeric", "category", "age")
_LARGEST = float(np.finfo(np.float32).max)
BIRTH, DEATH = "MEDS_BIRTH", "MEDS_DEATH"
ADMISSION_CODES = r"^(?:VISIT_START//(?:IMP|ACUTE|NONAC)|HOSPITAL_ADMISSION)"
"""Default of `TripletSpec.start_codes`: admissions to hospital, ours and those of MIMIC's MEDS datasets."""


@dataclass(frozen=True)
class StaticFeature:
    """One property of the subject that makes one or more static columns.

    Attributes:
        name: Name of its columns.
        kind: "numeric": the value of the first row of one of `codes` (static rows first, then the earliest), one
            column. "category": one column a code, 1 for the first row's code, else 0. "age": years from `MEDS_BIRTH` to
            the window's start, one column.
        codes: Codes of its rows; none for "age".
        drop_first: The first code of a category has no column (two codes make one column of 0 and 1).
        missing_flag: A further column, 1 where nothing is known.
    """

    name: str
    kind: str
    codes: tuple[str, ...] = ()
    drop_first: bool = False
    missing_flag: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", tuple(self.codes))
        if self.kind not in STATIC_KINDS:
            raise ValueError(f"static feature {self.name!r}: kind got {self.kind!r}; expected one of {STATIC_KINDS}.")
        if bool(self.codes) == (self.kind == "age") or len(set(self.codes)) < len(self.codes):
            raise ValueError(
                f"static feature {self.name!r}: codes got {list(self.codes)}; expected "
                f"{'none, an age comes from MEDS_BIRTH' if self.kind == 'age' else 'at least one, each once'}."
            )

    @property
    def columns(self) -> list[str]:
        """Names of its columns."""
        if self.kind == "category":
            names = [f"{self.name}={code}" for code in self.codes[self.drop_first :]]
        else:
            names = [self.name]
        return [*names, f"{self.name} missing"] if self.missing_flag else names

    @property
    def is_numeric(self) -> list[bool]:
        """Which of its columns hold measurements, not 0 and 1."""
        return [self.kind != "category"] * (len(self.columns) - self.missing_flag) + [False] * self.missing_flag


@dataclass(frozen=True)
class TripletSpec:
    """Which rows of a record become triplets.

    Attributes:
        variables: (name, codes) of each variable, in the order of the variable ids.
        static_features: Static features, in the order of their columns.
        window_hours: Length of the window.
        window_start: "code": the last row of a code that matches `start_codes`, up to the prediction time;
            "first_event": the subject's first timed event after birth; "before_prediction": `window_hours` before the
            prediction time.
        start_codes: Regular expression (Python's, searched) for "code".
    """

    variables: tuple[tuple[str, tuple[str, ...]], ...]
    static_features: tuple[StaticFeature, ...] = ()
    window_hours: float = 48.0
    window_start: str = "code"
    start_codes: str = ADMISSION_CODES

    def __post_init__(self) -> None:
        try:
            pairs = tuple((name, tuple(codes)) for name, codes in self.variables)
        except (TypeError, ValueError) as error:
            raise ValueError(f"variables got {self.variables!r:.200}; expected (name, codes) pairs.") from error
        object.__setattr__(self, "variables", pairs)
        object.__setattr__(self, "static_features", tuple(self.static_features))
        names = self.variable_names
        codes = [code for _, codes in self.variables for code in codes]
        if (
            not names
            or len(set(names)) < len(names)
            or len(set(codes)) < len(codes)
            or not all(c for _, c in self.variables)
        ):
            raise ValueError(
                "variables must be (name, codes) pairs, at least one, every name and every code once; got "
                f"{list(self.variables)[:5]}."
            )
        columns = self.static_columns
        if len(set(columns)) < len(columns):
            raise ValueError(f"static features have columns of one name: {columns}; give every feature its own name.")
        if isinstance(self.window_hours, bool) or not isinstance(self.window_hours, int | float):
            raise ValueError(f"window_hours got {self.window_hours!r}; expected a number of hours.")
        if not (math.isfinite(self.window_hours) and self.window_hours > 0):
            raise ValueError(f"window_hours got {self.window_hours}; expected more than 0 hours.")
        if self.window_start not in WINDOW_STARTS:
            raise ValueError(f"window_start got {self.window_start!r}; expected one of {WINDOW_STARTS}.")
        try:
            re.compile(self.start_codes)
        except re.error as error:
            raise ValueError(f"start_codes got {self.start_codes!r}, no regular expression: {error}.") from error

    @property
    def variable_names(self) -> list[str]:
        """Names of the variables; the position is the variable id."""
        return [name for name, _ in self.variables]

    @property
    def code_ids(self) -> dict[str, int]:
        """Code -> variable id."""
        return {code: number for number, (_, codes) in enumerate(self.variables) for code in codes}

    @property
    def static_columns(self) -> list[str]:
        """Names of the static columns."""
        return [name for feature in self.static_features for name in feature.columns]

    @property
    def window_minutes(self) -> float:
        """Length of the window in minutes."""
        return self.window_hours * 60

    def is_start(self, code: str) -> bool:
        """Whether a row of this code may begin a window."""
        return re.search(self.start_codes, code) is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for `from_dict`."""
        return {
            "variables": [[name, list(codes)] for name, codes in self.variables],
            "static_features": [
                {
                    "name": feature.name,
                    "kind": feature.kind,
                    "codes": list(feature.codes),
                    "drop_first": feature.drop_first,
                    "missing_flag": feature.missing_flag,
                }
                for feature in self.static_features
            ],
            "window_hours": self.window_hours,
            "window_start": self.window_start,
            "start_codes": self.start_codes,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TripletSpec:
        """The inverse of `to_dict`.

        Raises:
            ValueError: A field is absent or wrong.
        """
        try:
            fields = dict(content)
            fields["static_features"] = [StaticFeature(**feature) for feature in fields.get("static_features", ())]
            return cls(**fields)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"not a description of triplets: {error}; expected what TripletSpec.to_dict gives."
            ) from error


@dataclass
class Stay:
    """One stay before it becomes channels.

    Attributes:
        minutes: `[n]` float64 minutes since the window's start, ascending.
        variable_ids: `[n]` int64, ascending among equal minutes.
        values: `[n]` float64, as measured.
        static: `[D]` float64, NaN = unknown.
        skipped: Reason -> number of rows left out.
        unknown: Name or code -> number of its rows that no variable takes.
        sources: `[n]` int64 position in the patient's events of what made each triplet (in the stay's own triplets
            where it was given as such).
        start: When the window starts (microseconds); None for a stay without dates.
    """

    minutes: np.ndarray
    variable_ids: np.ndarray
    values: np.ndarray
    static: np.ndarray
    skipped: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    sources: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    start: int | None = None


def in_order(minutes: np.ndarray, variable_ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of a stay's triplets: (minute, variable id, value); and which of them repeat the one before.

    Returns:
        `[n]` positions, and `[n]` bool in that order: equal to its predecessor in all three.
    """
    order = np.lexsort((values, variable_ids, minutes))
    repeated = np.zeros(len(order), bool)
    now, before = order[1:], order[:-1]
    repeated[1:] = (
        (minutes[now] == minutes[before])
        & (variable_ids[now] == variable_ids[before])
        & (values[now] == values[before])
    )
    return order, repeated


def choose_triplets(
    variable_ids: np.ndarray,
    max_length: int | None,
    truncation: str,
    variable_dropout: float,
    rng: np.random.Generator | None,
) -> np.ndarray:
    """Positions of the triplets that stay, ascending.

    Args:
        variable_ids: `[n]` in order of time.
        max_length: Triplets that stay at most; None = all.
        truncation: "recent": the last ones; "random": a random choice.
        variable_dropout: Probability that a variable's triplets are removed. Masking attention alone would leave
            Mamba reading them. Where every variable would go, all stay.
        rng: Needed where something is random.
    """
    kept = np.arange(len(variable_ids))
    if not 0 <= variable_dropout < 1:
        raise ValueError(f"variable_dropout got {variable_dropout!r}; expected a probability from 0 to below 1.")
    if variable_dropout:
        present = np.unique(variable_ids)
        dropped = present[_needed(rng).random(len(present)) < variable_dropout]
        stays = ~np.isin(variable_ids, dropped)
        if stays.any():
            kept = kept[stays]
    if max_length is None or len(kept) <= max_length:
        return kept
    if truncation == "random":
        return np.sort(_needed(rng).choice(kept, max_length, replace=False))
    return kept[-max_length:]


def _needed(rng: np.random.Generator | None) -> np.random.Generator:
    if rng is None:
        raise ValueError("random truncation and variable dropout need a random generator.")
    return rng


def read_stay(events: Sequence[Event], spec: TripletSpec, prediction_time: int | None = None) -> Stay:
    """Triplets and static values of one patient.

    Args:
        events: The patient's rows, in any order.
        spec: What becomes triplets.
        prediction_time: Nothing later than this instant (microseconds since 1970) is read; default: the last row's.

    Raises:
        ValueError: No timed row, or no window begins up to the prediction time.
    """
    positions = sorted(
        (k for k, event in enumerate(events) if event.time is not None), key=lambda k: events[k].time or 0
    )
    timed = [events[k] for k in positions]
    if not timed:
        raise ValueError("a patient without timed events has no stay; give at least one event with a time.")
    cut = timed[-1].time if prediction_time is None else prediction_time
    start = _window_start(timed, spec, int(cut or 0))
    end = min(start + round(spec.window_minutes * MINUTE_US), int(cut or 0))

    ids = spec.code_ids
    static_codes = {code for feature in spec.static_features for code in feature.codes}
    stay_minutes: list[float] = []
    stay_ids: list[int] = []
    stay_values: list[float] = []
    stay_sources: list[int] = []
    skipped: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for position, event in zip(positions, timed, strict=True):
        if event.value is None or event.time is None or not start <= event.time <= end:
            continue
        if event.code not in ids:
            unknown[event.code] += event.code not in static_codes
        elif not _fits(event.value):
            skipped["values that are NaN, infinite or beyond float32"] += 1
        else:
            stay_minutes.append((event.time - start) / MINUTE_US)
            stay_ids.append(ids[event.code])
            stay_values.append(float(np.float32(event.value)))
            stay_sources.append(position)
    minutes = np.asarray(stay_minutes, np.float64)
    variable_ids = np.asarray(stay_ids, np.int64)
    values = np.asarray(stay_values, np.float64)
    order, repeated = in_order(minutes, variable_ids, values)
    if repeated.any():
        skipped["repeated triplets"] += int(repeated.sum())
    order = order[~repeated]
    static = _static_values(events, spec, start, int(cut or 0))
    sources = np.asarray(stay_sources, np.int64)[order]
    return Stay(minutes[order], variable_ids[order], values[order], static, skipped, +unknown, sources, start)


def _fits(value: float) -> bool:
    """Whether float32, the table's type, holds the value."""
    return abs(value) <= _LARGEST


def _window_start(timed: Sequence[Event], spec: TripletSpec, cut: int) -> int:
    if spec.window_start == "before_prediction":
        return cut - round(spec.window_minutes * MINUTE_US)
    if spec.window_start == "first_event":
        starts = [event.time for event in timed if event.code not in (BIRTH, DEATH)][:1]
    else:
        starts = [event.time for event in timed if spec.is_start(event.code)]
    before = [time for time in starts if time is not None and time <= cut]
    if not before:
        wanted = "timed event" if spec.window_start == "first_event" else f"event of a code like {spec.start_codes!r}"
        raise ValueError(
            f"no window begins up to the prediction time: the patient has no {wanted} until then. Give a later "
            "prediction_time, or the admission's event."
        )
    return before[-1]


def _static_values(events: Sequence[Event], spec: TripletSpec, start: int, cut: int) -> np.ndarray:
    known = sorted(
        (event for event in events if event.time is None or event.time <= cut),
        key=lambda event: (event.time is not None, event.time or 0),
    )
    columns: list[float] = []
    for feature in spec.static_features:
        if feature.kind == "age":
            births = [event.time for event in known if event.code == BIRTH and event.time is not None]
            value = max(0.0, (start - births[0]) / YEAR_US) if births else math.nan
            columns.append(value)
        elif feature.kind == "numeric":
            found = [e.value for e in known if e.code in feature.codes and e.value is not None]
            value = next((float(np.float32(v)) for v in found if _fits(v)), math.nan)
            columns.append(value)
        else:
            code = next((event.code for event in known if event.code in feature.codes), None)
            value = math.nan if code is None else 0.0
            columns += [value if code is None else float(code == one) for one in feature.codes[feature.drop_first :]]
        if feature.missing_flag:
            columns.append(float(math.isnan(value)))
    return np.asarray(columns, np.float64)

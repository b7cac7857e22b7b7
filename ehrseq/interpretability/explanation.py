"""What an explanation is: contributions with the events that they belong to, what they start from, and what is left.

baseline + contributions + remainder = log-odds of the score
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from ehrseq.tokenization.ehr_codes import code_kinds, code_parents, split_kind
from ehrseq.tokenization.ehr_prefixes import NO_EVENT
from ehrseq.tokenization.ehr_rows import NO_TIME
from ehrseq.tokenization.ehr_sequence import EPOCH

if TYPE_CHECKING:
    from ehrseq.interpretability.questions import Question

CONTRIBUTION_SCHEMA: dict[str, Any] = {
    "position": pl.Int64,
    "event": pl.Int64,
    "time": pl.Datetime("us"),
    "code": pl.String,
    "value": pl.Float64,
    "text": pl.String,
    "unit": pl.String,
    "visit": pl.Int64,
    "kind": pl.String,
    "display": pl.String,
    "group": pl.String,
    "contribution": pl.Float64,
    "score_after": pl.Float64,
}
"""Columns of `Explanation.contributions`."""

SUMS = ("event", "code", "parent", "visit", "kind", "day", "month")
"""What contributions of events can be summed by."""

TOLD_REMAINDER = 1e-6
"""From this size on (log-odds) the remainder is worth telling."""


@dataclass(frozen=True)
class Attribution:
    """What a method finds, before it is named.

    Attributes:
        values: [l] one for each token (triplet) of the row, or [k] one for each place that the method names.
        log_odds: Of the whole row.
        baseline: Log-odds that the values start from.
    """

    values: NDArray[np.float64]
    log_odds: float
    baseline: float

    @property
    def remainder(self) -> float:
        """What the values do not explain."""
        return self.log_odds - self.baseline - float(self.values.sum())


@dataclass(frozen=True)
class Places:
    """What values belong to. One entry a value, [k].

    Attributes:
        positions: Place in the row of its token; -1 = none.
        events: Position among the patient's events; -1 = none.
        visits: Visit in the row; 0 = none.
        times: Microseconds, `NO_TIME` where there is none; None: those of the events.
        kinds: Of places without event; None: those of their tokens.
        groups: Names of groups of events; None = these are no groups.
    """

    positions: NDArray[np.int64]
    events: NDArray[np.int64]
    visits: NDArray[np.int64]
    times: NDArray[np.int64] | None = None
    kinds: Sequence[str] | None = None
    groups: Sequence[str] | None = None

    @classmethod
    def tokens(cls, question: Question) -> Places:
        """Every token (triplet) of a row."""
        return cls(np.arange(len(question.event_of)), question.event_of, question.visit_of)

    @classmethod
    def of_groups(
        cls, names: Sequence[str], kind: str = "group", visits: ArrayLike | None = None, times: ArrayLike | None = None
    ) -> Places:
        """Groups of events, all of one kind ("visit", "day", "hour", "group")."""
        nothing = np.full(len(names), -1)
        return cls(
            positions=nothing,
            events=nothing,
            visits=np.zeros(len(names), np.int64) if visits is None else np.asarray(visits, np.int64),
            times=np.full(len(names), NO_TIME) if times is None else np.asarray(times, np.int64),
            kinds=[kind] * len(names),
            groups=list(names),
        )


@dataclass(frozen=True)
class Explanation:
    """Why a model gives a risk.

    Attributes:
        subject_id: The patient's.
        prediction_time: When the question is asked, None where the record has no times.
        task: Name of the task.
        label: Its positive outcome, in words.
        score: The risk; NaN where the task does not apply.
        log_odds: Of the score.
        baseline: Log-odds that the contributions start from.
        baseline_name: What has them, in words.
        method: How the contributions were found.
        model: Of what model.
        settings: Of the method, with the seed where one was used.
        notes: What was left out or is to be read with care, counted.
        reason: Why the task does not apply, None where it does.
        contributions: One row for each token, triplet, event or group, see `CONTRIBUTION_SCHEMA`: `position` (place in
            the row), `event` (position in the patient's events), `time`, `code` (the token's name where no event made
            it), `value`, `text`, `unit`, `visit`, `kind` ("structure" for marks of visits and intervals, "question" for
            tokens of tasks, "time" for time that passes), `display` (the code's description), `group`, `contribution`
            (log-odds) and `score_after` (prefix deltas only); null = there is none.
    """

    subject_id: str | int | None
    prediction_time: datetime | None
    task: str
    label: str
    score: float
    log_odds: float
    baseline: float
    baseline_name: str
    method: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    reason: str | None = None
    contributions: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=CONTRIBUTION_SCHEMA))

    @classmethod
    def of(
        cls,
        question: Question,
        attribution: Attribution | None,
        *,
        method: str,
        baseline_name: str,
        settings: Mapping[str, Any] | None = None,
        displays: Mapping[str, str] | None = None,
        places: Places | None = None,
        score_after: ArrayLike | None = None,
    ) -> Explanation:
        """Name what a method has found.

        Args:
            question: What was asked.
            attribution: What was found; None where there is nothing to explain (`question.has_answer`).
            method: Name of the method.
            baseline_name: What the baseline is, in words.
            settings: Of the method.
            displays: Code -> description.
            places: What the values belong to; default: the row's tokens.
            score_after: [k] risk after each of the places.

        Raises:
            ValueError: There is another number of values than of places.
        """
        task, config = question.task, question.checkpoint.model.config
        nan = math.nan
        named: dict[str, Any] = {
            "subject_id": question.subject_id,
            "prediction_time": date_of(question.prediction_time),
            "task": task["name"],
            "label": task.get("positive_label") or task["name"],
            "baseline_name": baseline_name,
            "method": method,
            "model": getattr(config, "name_or_path", "") or config.model_type,
            "settings": dict(settings or {}),
            "notes": dict(question.notes),
            "reason": question.reason,
        }
        if attribution is None:
            return cls(**named, score=nan, log_odds=nan, baseline=nan)
        places = Places.tokens(question) if places is None else places
        if attribution.values.shape != (len(places.positions),):
            raise ValueError(
                f"{method} gave values of shape {list(attribution.values.shape)}; expected [{len(places.positions)}], "
                "one for each place."
            )
        table = _table(question, places, displays or {}).with_columns(
            contribution=pl.Series(attribution.values, dtype=pl.Float64),
            score_after=pl.lit(None, pl.Float64)
            if score_after is None
            else pl.Series(np.asarray(score_after), dtype=pl.Float64),
        )
        return cls(
            **named,
            score=1 / (1 + math.exp(-attribution.log_odds)) if attribution.log_odds > -700 else 0.0,
            log_odds=attribution.log_odds,
            baseline=attribution.baseline,
            contributions=table,
        )

    def named(self, displays: Mapping[str, str]) -> Explanation:
        """The same with names of codes, such as `metadata/codes.parquet` of a dataset has, where there is none yet.

        Args:
            displays: Code -> description.
        """
        name = pl.col("code").replace_strict(dict(displays), default=None, return_dtype=pl.String)
        return replace(self, contributions=self.contributions.with_columns(pl.coalesce("display", name)))

    @property
    def total(self) -> float:
        """Sum of the contributions."""
        return float(self.contributions["contribution"].sum())

    @property
    def remainder(self) -> float:
        """Log-odds of the score less baseline and contributions: what the method leaves unexplained."""
        return self.log_odds - self.baseline - self.total

    def by(self, what: str) -> pl.DataFrame:
        """Contributions summed, the largest first.

        Args:
            what: "event", "code", "parent" (the code's next broader one, or itself), "visit", "kind", "day" or "month".

        Returns:
            The columns of `what`, `events` (how many are in it) and `contribution`.

        Raises:
            ValueError: Another `what`, or contributions that are of groups already.
        """
        if what not in SUMS:
            raise ValueError(f"by got {what!r}; expected one of {list(SUMS)}.")
        table = self.contributions
        if table["group"].is_not_null().any():
            raise ValueError(
                f"these contributions are of groups ({table['group'].drop_nulls()[0]!r} ...) and cannot be taken "
                "apart; explain by event for other sums."
            )
        keys: dict[str, list[pl.Expr]] = {
            "event": [pl.col(name) for name in ("event", "time", "code", "value", "text", "unit", "kind", "display")],
            "code": [pl.col("code"), pl.col("kind"), pl.col("display")],
            "parent": [
                pl.col("code")
                .replace_strict(parents_of(table["code"].unique().drop_nulls()), default=None)
                .alias("parent"),
                pl.col("kind"),
            ],
            "visit": [pl.col("visit")],
            "kind": [pl.col("kind")],
            "day": [pl.col("time").dt.truncate("1d").alias("day")],
            "month": [pl.col("time").dt.truncate("1mo").alias("month")],
        }
        sums = table.group_by(keys[what], maintain_order=True).agg(
            events=pl.col("event").drop_nulls().n_unique().cast(pl.Int64), contribution=pl.col("contribution").sum()
        )
        return sums.sort(pl.col("contribution").abs(), descending=True, maintain_order=True)

    def top(self, n: int = 10) -> pl.DataFrame:
        """The n contributions of the largest size."""
        return self.contributions.sort(pl.col("contribution").abs(), descending=True, maintain_order=True).head(n)

    def to_records(self) -> list[dict[str, Any]]:
        """`{"time", "code", "value", "contribution"}` of each, as the pipeline gives them: time in ISO 8601 or None; of
        groups their name under "group".
        """
        records = []
        columns = ("time", "code", "value", "contribution", "group")
        for time, code, value, contribution, group in self.contributions.select(columns).iter_rows():
            record = {"time": time and time.isoformat(), "code": code, "value": value, "contribution": contribution}
            records.append(record if group is None else {**record, "group": group})
        return records


def date_of(time: int | None) -> datetime | None:
    """An instant (microseconds) as a date; None where there is none."""
    return None if time is None or time == NO_TIME else EPOCH + timedelta(microseconds=int(time))


def parents_of(codes: Iterable[str]) -> dict[str, str]:
    """Code -> the next broader one, or itself; the same code in another spelling (E87.1, E871) is no broader one."""
    return {code: next((p for p in code_parents(code) if _plain(p) != _plain(code)), code) for code in codes}


def _plain(code: str) -> str:
    return code.replace(".", "")


def kind_finder(encoder: object) -> Callable[[str], str]:
    """What says the kind of a code: the encoder's vocabulary where it has one."""
    vocabulary = getattr(encoder, "vocabulary", None)

    @cache
    def kind_of(code: str) -> str:
        kind: str = split_kind(code_kinds([code])[0])[0] if vocabulary is None else vocabulary.kind(code)[0]
        return kind

    return kind_of


def _table(question: Question, places: Places, displays: Mapping[str, str]) -> pl.DataFrame:
    """The columns of `CONTRIBUTION_SCHEMA` up to `group`."""
    encoder, events = question.checkpoint.encoder, question.events
    token_ids = question.inputs["input_ids"][0].tolist() if "input_ids" in question.inputs else None
    names = None if token_ids is None else encoder.convert_ids_to_tokens(token_ids)  # type: ignore[union-attr]
    questions = set(encoder.task_tokens.values()) if hasattr(encoder, "task_tokens") else set()
    kind_of = kind_finder(encoder)
    columns: dict[str, list[Any]] = {name: [] for name in CONTRIBUTION_SCHEMA if name not in _NUMBERS}
    for number, (position, source) in enumerate(zip(places.positions.tolist(), places.events.tolist(), strict=True)):
        event = None if source == NO_EVENT else events[source]
        time = None if event is None else event.time
        if places.times is not None and places.times[number] != NO_TIME:
            time = int(places.times[number])
        code = None if event is None else event.code
        kind = None if event is None else kind_of(event.code)
        if event is None and position >= 0 and names is not None:
            code = names[position]
            kind = "question" if code in questions else "structure"
        if event is None and places.kinds is not None:
            kind = places.kinds[number]
        columns["position"].append(None if position < 0 else position)
        columns["event"].append(None if event is None else source)
        columns["time"].append(time)
        columns["code"].append(code)
        columns["value"].append(None if event is None else event.value)
        columns["text"].append(None if event is None else event.text)
        columns["unit"].append(None if event is None else event.unit)
        columns["visit"].append(int(places.visits[number]) or None)
        columns["kind"].append(kind)
        columns["display"].append(displays.get(code) if code is not None else None)
        columns["group"].append(None if places.groups is None else places.groups[number])
    schema = {name: CONTRIBUTION_SCHEMA[name] for name in columns}
    table = pl.DataFrame(columns, schema=schema | {"time": pl.Int64})
    return table.with_columns(pl.col("time").cast(pl.Datetime("us")))


_NUMBERS = ("contribution", "score_after")

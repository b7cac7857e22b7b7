"""Occlusion: the risk of the same record without some of its events.

    contribution of S = F(x) - F(x without S)

F(x without S) is the model's own answer for the record in which the events S were never recorded: read and tokenised
again, asked at the same prediction time (`SourcedRows.row_without` says what becomes of visits). Nothing is estimated.
Contributions of groups do not sum to the whole: what two groups do together, each of them takes away (or neither). The
remainder tells by how much.

EhrMamba goes on from the state before the first token that differs: one pass over the record, then the tokens behind
each group. The other families read each record as a whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ehrseq.interpretability.explanation import Attribution, Explanation, Places, date_of, kind_finder, parents_of
from ehrseq.modeling.ehrmamba_cache import EhrMambaCache
from ehrseq.tokenization.ehr_prefixes import NO_EVENT
from ehrseq.tokenization.ehr_rows import NO_TIME

if TYPE_CHECKING:
    from ehrseq.interpretability.questions import Question

GROUPINGS = ("visit", "code", "parent", "kind", "month", "event")
"""What events can be taken out by."""

STATIC_FACTS = "static facts"
"""Group of the events without time, where visits or months are taken out."""

Row = Mapping[str, NDArray[Any]]


def occlusion(
    question: Question,
    groups: str | Mapping[str, Sequence[int]] | None = None,
    *,
    batch_size: int = 16,
    max_tokens: int = 20_000_000,
) -> Explanation:
    """The difference that groups of events make: the risk less that of the record without them.

    Only events that the model has seen take part: where the record was cut to the context, nothing from before it comes
    into the place that is left. The baseline is the record without all of these groups; of a stay, which no model reads
    without a triplet, the one with its first triplet alone.

    Args:
        question: What is explained.
        groups: "visit", "code", "parent" (the code's next broader one), "kind", "month" or "event": each seen event is
            in one group. Or groups of one's own: name -> positions in `question.events`; they may overlap. Default:
            "visit", of a stay "code".
        batch_size: Rows in one forward pass; the memory grows with it.
        max_tokens: Refuse what would push more tokens through the model.

    Returns:
        One contribution for each group. `settings` tell the tokens that were pushed through the model.

    Raises:
        ValueError: Other groups, none at all, positions of no event, or more tokens than allowed.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size got {batch_size!r}; expected a whole number of at least 1.")
    if groups is None:
        groups = "code" if _is_stay(question) else "visit"
    notes: Counter[str] = Counter()
    chosen = _groups(question, groups, notes)
    name = "the stay with its first triplet alone" if _is_stay(question) else "the record without these events"
    settings: dict[str, Any] = {"groups": groups if isinstance(groups, str) else "own", "tokens": 0}
    if not question.has_answer:
        return Explanation.of(question, None, method="occlusion", baseline_name=name, settings=settings)
    if not chosen.removed and isinstance(groups, Mapping):
        raise ValueError("groups got no group; give name -> positions of events, or one of " + str(list(GROUPINGS)))

    records = [*chosen.removed, _everything(question, chosen.removed)]
    asker = _Continuing(question, batch_size) if _has_state(question) else _Whole(question, batch_size)
    tokens = asker.most_tokens(records)
    if tokens > max_tokens:
        raise ValueError(
            f"these {len(chosen.removed):,} groups push up to {tokens:,} tokens through the model; at most "
            f"{max_tokens:,} are allowed (max_tokens). Take broader groups ('visit', 'kind'), or allow more."
        )
    whole, without = asker.log_odds(records)
    left = np.isfinite(without[:-1])
    if not left.all():
        notes["groups without which nothing is left to read, not measured"] += int((~left).sum())
    notes.update(asker.notes)
    settings["tokens"] = asker.tokens
    return Explanation.of(
        replace(question, notes=question.notes + notes),
        Attribution(whole - without[:-1][left], whole, float(without[-1])),
        method="occlusion",
        baseline_name=name,
        settings=settings,
        places=chosen.places(left),
    )


@dataclass
class _Groups:
    """Groups of events: what is taken out by each, and where it stands."""

    kind: str
    names: list[str]
    removed: list[NDArray[np.bool_]]
    visits: list[int]
    times: list[int]
    events: list[int] | None = None
    positions: list[int] | None = None

    def places(self, which: NDArray[np.bool_]) -> Places:
        """The places of some groups."""
        kept = np.flatnonzero(which).tolist()
        visits, times = np.asarray(self.visits, np.int64)[kept], np.asarray(self.times, np.int64)[kept]
        if self.events is not None and self.positions is not None:
            return Places(np.asarray(self.positions)[kept], np.asarray(self.events)[kept], visits)
        return Places.of_groups([self.names[k] for k in kept], self.kind, visits, times)


def _groups(question: Question, groups: str | Mapping[str, Sequence[int]], notes: Counter[str]) -> _Groups:
    """Groups, in the order of their first events."""
    if not isinstance(groups, Mapping) and groups not in GROUPINGS:
        raise ValueError(f"groups got {groups!r}; expected one of {list(GROUPINGS)}, or name -> positions of events.")
    count = len(question.events)
    visit_of = _visits(question)
    if isinstance(groups, Mapping):
        members = {str(name): _positions(name, places, count) for name, places in groups.items()}
        unseen = sum(int((~question.seen[places]).sum()) for places in members.values())
        notes["events of the groups that the model has not seen"] += unseen
    else:
        if groups == "visit" and _is_stay(question):
            raise ValueError("groups='visit' needs visits, and a stay's triplets have none; take 'code' or 'kind'.")
        if groups == "month" and _is_stay(question) and all(event.time is None for event in question.events):
            raise ValueError("groups='month' needs dates, and this stay has none; take 'code' or 'event'.")
        lists: dict[str, list[int]] = {}
        keys = _keys(question, groups, visit_of)
        seen = np.flatnonzero(question.seen)
        for place in sorted(seen.tolist(), key=lambda place: _order(question, place)):
            lists.setdefault(keys[place], []).append(place)
        members = {name: np.asarray(places) for name, places in lists.items()}
    removed, visits, times = [], [], []
    for places in members.values():
        mask = np.zeros(count, bool)
        mask[places] = True
        removed.append(mask)
        inside = {int(visit_of[place]) for place in places}
        visits.append(inside.pop() if len(inside) == 1 else 0)
        instants = [question.events[place].time for place in places]
        times.append(min((time for time in instants if time is not None), default=NO_TIME))
    is_event = isinstance(groups, str) and groups == "event"
    position = {int(event): k for k, event in enumerate(question.event_of.tolist()) if event != NO_EVENT}
    events = [int(places[0]) for places in members.values()] if is_event else None
    positions = None if events is None else [position.get(event, -1) for event in events]
    kind = "visit" if groups == "visit" else "group"
    return _Groups(kind, list(members), removed, visits, times, events, positions)


def _keys(question: Question, grouping: str, visit_of: NDArray[np.int64]) -> list[str]:
    """Group of each event."""
    events = question.events
    if grouping == "event":
        return [str(place) for place in range(len(events))]
    if grouping == "visit":
        return [f"visit {visit}" if visit else STATIC_FACTS for visit in visit_of.tolist()]
    if grouping == "month":
        dates = [date_of(event.time) for event in events]
        return [STATIC_FACTS if date is None else f"{date:%Y-%m}" for date in dates]
    if grouping == "kind":
        kind_of = kind_finder(question.checkpoint.encoder)
        return [kind_of(event.code) for event in events]
    if grouping == "parent":
        parents = parents_of({event.code for event in events})
        return [parents[event.code] for event in events]
    return [event.code for event in events]


def _positions(name: object, places: Any, count: int) -> NDArray[np.int64]:
    array = np.asarray(places)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= count:
        raise ValueError(
            f"group {name!r} got {places!r:.100}; expected positions of events, 0 to {count - 1}, at least one."
        )
    return array.astype(np.int64)


def _order(question: Question, place: int) -> tuple[bool, int, int]:
    time = question.events[place].time
    return time is not None, time or 0, place


def _visits(question: Question) -> NDArray[np.int64]:
    """Visit of each event in the row, those of its starts and ends too; 0 = none."""
    visits = np.zeros(len(question.events), np.int64)
    prefixes = question.prefixes
    known = prefixes.sources != NO_EVENT
    visits[prefixes.sources[known]] = prefixes.visits[known]
    return visits


def _everything(question: Question, removed: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """What is taken out for the baseline."""
    together = np.zeros(len(question.events), bool)
    for mask in removed:
        together |= mask
    if _is_stay(question):
        together[question.event_of[0]] = False
    return together


def _is_stay(question: Question) -> bool:
    return "input_ids" not in question.inputs


def _has_state(question: Question) -> bool:
    return question.checkpoint.model.config.model_type == "ehrmamba"


class _Asker(ABC):
    """Asks the model about records without some of their events, row by row.

    Attributes:
        tokens: Tokens pushed through the model so far.
        notes: What is to be read with care, counted.
    """

    def __init__(self, question: Question, batch_size: int) -> None:
        self.question = question
        self.batch_size = batch_size
        self.tokens = 0
        self.notes: Counter[str] = Counter()
        self.row = {name: channel[0].cpu().numpy() for name, channel in question.inputs.items()}
        self.length = len(question.event_of)
        context = question.checkpoint.model.config.max_position_embeddings
        self.context = None if context is None else max(context, self.length)

    @abstractmethod
    def most_tokens(self, records: Sequence[NDArray[np.bool_]]) -> int:
        """Tokens that these take, about."""

    @abstractmethod
    def log_odds(self, records: Sequence[NDArray[np.bool_]]) -> tuple[float, NDArray[np.float64]]:
        """Log-odds of the whole record, and of the record without each of these masks of events; NaN where nothing is
        left to read.
        """

    def without(self, removed: NDArray[np.bool_]) -> Row | None:
        """The row of the record without these events."""
        rows = self.question.rows
        if rows is None:
            raise ValueError("this question does not know what its row was cut from; make it by read_question.")
        return rows.row_without(0, removed, self.context)

    def is_same(self, row: Row) -> bool:
        """Whether the model would read what it has read."""
        return all(np.array_equal(channel, self.row[name]) for name, channel in row.items())

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows side by side, padded at the right."""
        longest = max(len(row["attention_mask"]) for row in rows)
        batch = {}
        for name in rows[0]:
            width = len(rows[0][name]) if name == "static_values" else longest
            stacked = np.zeros((len(rows), width), rows[0][name].dtype)
            for number, row in enumerate(rows):
                stacked[number, : len(row[name])] = row[name]
            batch[name] = torch.from_numpy(stacked).to(self.question.checkpoint.model.device)
        return batch


class _Whole(_Asker):
    """Reads every record from its first token on."""

    def most_tokens(self, records: Sequence[NDArray[np.bool_]]) -> int:
        """See `_Asker`."""
        return (1 + len(records)) * self.length

    def log_odds(self, records: Sequence[NDArray[np.bool_]]) -> tuple[float, NDArray[np.float64]]:
        """See `_Asker`."""
        with torch.inference_mode():
            whole = float(self.question.log_odds()[0])
            self.tokens += self.length
            answers = np.full(len(records), np.nan)
            waiting: list[tuple[int, Row]] = []
            for number, removed in enumerate(records):
                row = self.without(removed)
                if row is not None and self.is_same(row):
                    answers[number] = whole
                elif row is not None:
                    waiting.append((number, row))
                if len(waiting) == self.batch_size:
                    self._ask(waiting, answers)
            self._ask(waiting, answers)
        return whole, answers

    def _ask(self, waiting: list[tuple[int, Row]], answers: NDArray[np.float64]) -> None:
        if waiting:
            rows = [row for _, row in waiting]
            answers[[number for number, _ in waiting]] = self.question.log_odds(self.batch(rows)).double().cpu().numpy()
            self.tokens += sum(len(row["attention_mask"]) for row in rows)
            waiting.clear()


class _Continuing(_Asker):
    """Reads the record once, and goes on from its state before the first token that each record changes."""

    def __init__(self, question: Question, batch_size: int) -> None:
        super().__init__(question, batch_size)
        prefixes = question.prefixes
        steps = np.flatnonzero(prefixes.sources != NO_EVENT)
        before = np.full(len(question.events), self.length)
        before[prefixes.sources[steps]] = prefixes.ends[steps - 1]
        static = np.flatnonzero((question.event_of != NO_EVENT) & (np.arange(self.length) < prefixes.ends[0]))
        before[question.event_of[static]] = static
        self.before = before
        """Tokens of the row before each event's."""

    def most_tokens(self, records: Sequence[NDArray[np.bool_]]) -> int:
        """See `_Asker`."""
        return self.length + sum(self.length - self._first(removed) for removed in records)

    def log_odds(self, records: Sequence[NDArray[np.bool_]]) -> tuple[float, NDArray[np.float64]]:
        """See `_Asker`."""
        answers = np.full(len(records), np.nan)
        with torch.inference_mode():
            _, state = self._read(self.row, 0, 1, None)
            read = 1
            waiting: list[tuple[int, Row, EhrMambaCache]] = []
            same: list[int] = []
            elsewhere: list[tuple[int, Row]] = []  # records that grew past the context begin with other tokens
            for number, row, common in self._in_order(records):
                if self.is_same(row):
                    same.append(number)
                elif common < read:
                    elsewhere.append((number, row))
                else:
                    if common > read:
                        _, state = self._read(self.row, read, common, state)
                        read = common
                    rest = {name: channel[common:] for name, channel in row.items()}
                    waiting.append((number, rest, state.clone()))
                if len(waiting) == self.batch_size:
                    self._continue(waiting, answers)
            self._continue(waiting, answers)
            whole, _ = self._read(self.row, read, self.length, state)
            answers[same] = whole
            for number, row in elsewhere:
                answers[number], _ = self._read(row, 0, len(row["attention_mask"]), None)
        return whole, answers

    def _in_order(self, records: Sequence[NDArray[np.bool_]]) -> Iterator[tuple[int, Row, int]]:
        """Which record, its row, and how many tokens it shares with the whole one, the shortest such part first."""
        for number in sorted(range(len(records)), key=lambda number: self._first(records[number])):
            row = self.without(records[number])
            if row is None:
                continue
            shared = min(self._first(records[number]), len(row["attention_mask"]) - 1)
            for name, channel in row.items():
                differs = np.flatnonzero(channel[:shared] != self.row[name][:shared])
                shared = int(differs[0]) if len(differs) else shared
            yield number, row, shared

    def _first(self, removed: NDArray[np.bool_]) -> int:
        """Tokens before the first one that taking these out can change: visits depend on what is earlier alone."""
        return int(min(self.before[removed & self.question.seen], default=self.length))

    def _read(self, row: Row, start: int, stop: int, state: EhrMambaCache | None) -> tuple[float, EhrMambaCache]:
        """Log-odds after some tokens of a row, and the state behind them."""
        model: Any = self.question.checkpoint.model
        batch = self.batch([{name: channel[start:stop] for name, channel in row.items()}])
        output = model(**batch, cache_params=state, use_cache=True)
        self.tokens += stop - start
        return float(self.question.log_odds_of(output.logits)[0]), output.cache_params

    def _continue(self, waiting: list[tuple[int, Row, EhrMambaCache]], answers: NDArray[np.float64]) -> None:
        if not waiting:
            return
        state = EhrMambaCache.batch([state for _, _, state in waiting])
        batch = self.batch([rest for _, rest, _ in waiting])
        log_odds = self.question.log_odds(batch, cache_params=state)
        answers[[number for number, _, _ in waiting]] = log_odds.double().cpu().numpy()
        self.tokens += sum(len(rest["attention_mask"]) for _, rest, _ in waiting)
        waiting.clear()

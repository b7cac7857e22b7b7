"""How well does a model foretell what comes next? Recall and NLL of the next event, error of the next time.

Every position whose next token is an event (lab, medication, procedure, diagnosis, vital, other) is a question. A
record repeats itself, and who repeats it scores well: so *first occurrences* (the code, whatever its value, stands
nowhere earlier in the patient's record) are told apart from *repeats* and come first (arXiv:2603.24562: "repeated event
tokens can inflate performance metrics").

Beside the model stand forecasts that only count: "most frequent" lists the patient's own tokens so far by frequency,
"last visit" those of the visit before; both go on with the tokens that are frequent in training. Their probabilities
are those counts with `PRIOR` tokens of the training frequencies added; "frequencies" is the training frequencies alone.

Times are asked by `forecast_times`: days until the next visit, and, of a model with a time head, hours between the
events of a visit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ehrseq.evaluation.bootstrap import patient_weights
from ehrseq.forecasting.forecast_times import GapForecast, TimeTally
from ehrseq.tokenization.ehr_vocabulary import (
    TYPE_DIAGNOSIS,
    TYPE_INTERVAL,
    TYPE_LAB,
    TYPE_MEDICATION,
    TYPE_OTHER,
    TYPE_PROCEDURE,
    TYPE_VITAL,
    EventVocabulary,
    bin_token,
)
from ehrseq.work.progress import progress_bar

KIND_OF_TYPE = {
    TYPE_LAB: "lab",
    TYPE_MEDICATION: "medication",
    TYPE_PROCEDURE: "procedure",
    TYPE_DIAGNOSIS: "diagnosis",
    TYPE_VITAL: "vital",
    TYPE_OTHER: "other",
}
TOP = (1, 10)
PRIOR = 10.0
"""Tokens of the training frequencies that are added to a patient's counts, to make probabilities of them."""
FORECASTERS = ("model", "most frequent", "last visit")
_NLLS = ("NLL", "NLL: most frequent", "NLL: last visit", "NLL: frequencies")
EVENT_MEASURES = (*_NLLS, *(f"recall at {k}: {who}" for k in TOP for who in FORECASTERS))
_KINDS = tuple(KIND_OF_TYPE.values())


@dataclass(frozen=True)
class KindForecast:
    """The next events of one kind.

    Attributes:
        events: How many were asked for.
        nll: Mean negative log-likelihood of the model, in nats.
        nll_of_frequencies: The same of the training frequencies.
        recall: Size of the list -> share of the events that are in the model's.
        recall_most_frequent: The same of "most frequent".
        recall_last_visit: The same of "last visit".
        nll_most_frequent: Negative log-likelihood of "most frequent".
        nll_last_visit: The same of "last visit".
        low: Name of `EVENT_MEASURES` -> lower end of its 95 % interval over patients.
        high: The upper ends.
    """

    events: int
    nll: float
    nll_of_frequencies: float
    recall: Mapping[int, float]
    recall_most_frequent: Mapping[int, float]
    recall_last_visit: Mapping[int, float]
    nll_most_frequent: float
    nll_last_visit: float
    low: Mapping[str, float] = field(default_factory=dict)
    high: Mapping[str, float] = field(default_factory=dict)

    def value(self, measure: str) -> float:
        """The value of one of `EVENT_MEASURES`."""
        return dict(zip(EVENT_MEASURES, self._values(), strict=True))[measure]

    def _values(self) -> Iterator[float]:
        yield from (self.nll, self.nll_most_frequent, self.nll_last_visit, self.nll_of_frequencies)
        for k in TOP:
            yield from (self.recall[k], self.recall_most_frequent[k], self.recall_last_visit[k])


@dataclass(frozen=True)
class ForecastReport:
    """What `evaluate_forecast` measured.

    Attributes:
        kinds: Kind of event, and "all", -> its forecasts; kinds that never occur are absent.
        intervals: Intervals between visits that were asked for.
        days_off: Mean absolute error in days: "model" (its expected days), "model, median", "mean so far", "last"; None
            without an interval.
        first: As `kinds`, of events whose code never stood in the patient's record before.
        repeats: As `kinds`, of the others.
        visit_gaps: More of the days between visits, None without an interval.
        event_gaps: The gaps between events of a visit; None without a time head, or without such a gap.
    """

    kinds: Mapping[str, KindForecast]
    intervals: int
    days_off: Mapping[str, float] | None
    first: Mapping[str, KindForecast] = field(default_factory=dict)
    repeats: Mapping[str, KindForecast] = field(default_factory=dict)
    visit_gaps: GapForecast | None = None
    event_gaps: GapForecast | None = None

    @property
    def parts(self) -> dict[str, Mapping[str, KindForecast]]:
        """Title -> its events by kind, first occurrences first."""
        return {"first occurrences": self.first, "repeats": self.repeats, "all events": self.kinds}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Tables of the events and of the times."""
        lines = []
        for title, kinds in self.parts.items():
            if kinds:
                lines += [
                    f"| {title} | events | {' | '.join(EVENT_MEASURES)} |",
                    "|---|" + "---:|" * (1 + len(EVENT_MEASURES)),
                    *(f"| {kind} | {' | '.join(kind_cells(forecast))} |" for kind, forecast in kinds.items()),
                    "",
                ]
        for gaps in (self.visit_gaps, self.event_gaps):
            lines += [] if gaps is None else [gaps.to_text(), ""]
        return "\n".join(lines)


def kind_cells(forecast: KindForecast) -> list[str]:
    """Events, then `EVENT_MEASURES`, as texts."""
    return [f"{forecast.events:,}", *(f"{forecast.value(measure):.3f}" for measure in EVENT_MEASURES)]


def token_frequencies(rows: Sequence[Mapping[str, Any]], vocab_size: int) -> NDArray[np.int64]:
    """How often each token stands in training rows.

    Args:
        rows: Rows with `input_ids`.
        vocab_size: Size of the vocabulary.

    Returns:
        `[vocab_size]` counts.
    """
    counts = np.zeros(vocab_size, np.int64)
    for number in range(len(rows)):
        counts += np.bincount(np.asarray(rows[number]["input_ids"]), minlength=vocab_size)
    return counts


def code_groups(vocabulary: EventVocabulary, vocab_size: int) -> NDArray[np.int64]:
    """Which tokens are one code with different values: `[vocab_size]`, equal numbers for the value bins of a code.

    A creatinine is a first occurrence when the patient never had one, not when it falls into a bin for the first time.
    """
    groups = np.arange(vocab_size)
    ids = vocabulary.token_ids
    for code, units in vocabulary.value_bins.items():
        names = [bin_token(code, unit, k) for unit, edges in units.items() for k in range(len(edges) + 1)]
        tokens = [ids[name] for name in (code, *names) if name in ids]
        if tokens:
            groups[tokens] = min(tokens)
    return groups


def evaluate_forecast(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    collator: Callable[[list[Mapping[str, Any]]], Mapping[str, Tensor]],
    frequencies: ArrayLike,
    *,
    training_interval: float = 90.0,
    batch_size: int = 16,
    progress: bool = True,
    subjects: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    num_resamples: int = 500,
    seed: int = 0,
) -> ForecastReport:
    """Ask a causal model for every next event of some histories.

    Args:
        model: `EhrMambaForCausalLM`, or one with its inputs and `logits` [b, L, vocabulary].
        rows: Histories, rows of channels, such as `tokenizer.encode_histories(events).windows(context)`.
        collator: Pads rows, such as `DataCollatorForNextToken(tokenizer)`.
        frequencies: `[vocabulary]` counts in training rows, see `token_frequencies`.
        training_interval: Days between visits in training, for the first interval of a record.
        batch_size: Rows in a forward pass.
        progress: Show a progress bar.
        subjects: `[rows]` patient of each row, such as `windows.subject_ids`: what stood in earlier rows of a patient,
            which are together and in order, is known to have occurred, to the counting forecasts too. None: every row
            is a record of its own. (A visit that two rows share counts as two.)
        groups: `[vocabulary]`, equal for tokens that are one code, see `code_groups`; None = every token is one.
        num_resamples: Resamples of patients for the intervals; 0 = no intervals.
        seed: Of the resamples.

    Raises:
        ValueError: Frequencies of another vocabulary, all zero, groups or subjects of another length, or no rows.
    """
    counts = np.asarray(frequencies, np.float64)
    size = model.config.vocab_size
    if counts.shape != (size,) or counts.sum() <= 0:
        raise ValueError(
            f"frequencies got shape {counts.shape} with the sum {counts.sum():g}; expected "
            f"({size},) counts of training tokens, see token_frequencies."
        )
    if len(rows) == 0:
        raise ValueError("there are no rows to forecast.")
    whose = np.arange(len(rows)) if subjects is None else np.asarray(subjects)
    codes = np.arange(size) if groups is None else np.asarray(groups)
    for name, given, length in (("subjects", whose, len(rows)), ("groups", codes, size)):
        if given.shape != (length,):
            raise ValueError(f"{name} got shape {given.shape}; expected ({length},).")
    if len(np.unique(whose)) != 1 + np.count_nonzero(whose[1:] != whose[:-1]):
        raise ValueError("subjects are not in order: the rows of a patient must stand together, the oldest first.")
    tally = _EventTally(counts, codes)
    times = TimeTally(model, training_interval)
    was_training = model.training
    model.eval()
    try:
        for first in progress_bar(range(0, len(rows), batch_size), desc="Next events", disable=not progress):
            numbers = range(first, min(first + batch_size, len(rows)))
            batch = dict(collator([rows[i] for i in numbers]))
            batch.pop("labels", None)
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            with torch.no_grad():
                if times.head is None:
                    output = model(**inputs)
                else:
                    output = model(**inputs, output_hidden_states=True)
            log_shares = output.logits.float().log_softmax(-1)
            best = log_shares.topk(min(TOP[-1], log_shares.shape[-1]), dim=-1).indices.cpu().numpy()
            for place, number in enumerate(numbers):
                real = torch.as_tensor(batch["attention_mask"][place]).nonzero()[:, 0]
                channels = {
                    name: batch[name][place][real].numpy()
                    for name in ("input_ids", "token_type_ids", "times", "visit_orders")
                }
                shares = log_shares[place][real.to(model.device)]
                tally.add(whose[number], channels, shares.cpu().numpy(), best[place][real.numpy()])
                hidden = None if times.head is None else output.hidden_states[-1][place][real.to(model.device)]
                times.add(whose[number], channels, shares, hidden)
    finally:
        model.train(was_training)
    kinds, new, repeats = tally.report(num_resamples, seed)
    visits, events = times.report(num_resamples, seed)
    off = None if visits is None else dict(visits.off)
    return ForecastReport(kinds, 0 if visits is None else visits.gaps, off, new, repeats, visits, events)


@dataclass
class _Past:
    """What has been seen of a patient: token -> how often."""

    so_far: dict[int, int] = field(default_factory=dict)
    this_visit: dict[int, int] = field(default_factory=dict)
    last_visit: dict[int, int] = field(default_factory=dict)
    codes: set[int] = field(default_factory=set)


class _EventTally:
    """Sums over all questions of each patient: [kind, repeated or not, events and measures]."""

    def __init__(self, counts: NDArray[np.float64], groups: NDArray[np.int64]) -> None:
        self.frequent = np.argsort(-counts, kind="stable")[: TOP[-1]].tolist()
        self.rank: list[int] = np.argsort(np.argsort(-counts, kind="stable"), kind="stable").tolist()
        smoothed = counts + 0.5  # a token that training never held is not impossible
        self.shares: list[float] = (smoothed / smoothed.sum()).tolist()
        self.groups = groups
        self.sums: list[NDArray[np.float64]] = []
        self.past = _Past()
        self.subject: Any = None

    def add(
        self, subject: Any, channels: Mapping[str, NDArray[Any]], log_shares: NDArray[Any], best: NDArray[Any]
    ) -> None:
        """The questions of a row."""
        if not self.sums or subject != self.subject:
            self.subject, self.past = subject, _Past()
            self.sums.append(np.zeros((len(_KINDS), 2, 1 + len(EVENT_MEASURES))))
        sums, past = self.sums[-1], self.past
        ids, types, orders = (channels[name].tolist() for name in ("input_ids", "token_type_ids", "visit_orders"))
        lists, nlls_of_model = best.tolist(), (-log_shares[np.arange(len(ids) - 1), ids[1:]]).tolist()
        for place in range(1, len(ids)):
            if orders[place] != orders[place - 1] and types[place] != TYPE_INTERVAL:
                past.last_visit, past.this_visit = past.this_visit or past.last_visit, {}
            token, kind = ids[place], KIND_OF_TYPE.get(types[place])
            if kind is None:
                continue
            ours = lists[place - 1].index(token) if token in lists[place - 1] else TOP[-1]
            places = (ours, self._place(past.so_far, token), self._place(past.last_visit, token))
            chances = (self._share(past.so_far, token), self._share(past.last_visit, token), self.shares[token])
            nlls = [nlls_of_model[place - 1], *(-math.log(chance) for chance in chances)]
            hits = [float(each < k) for k in TOP for each in places]
            code = int(self.groups[token])
            sums[_KINDS.index(kind), int(code in past.codes)] += (1.0, *nlls, *hits)
            past.codes.add(code)
            past.so_far[token] = past.so_far.get(token, 0) + 1
            past.this_visit[token] = past.this_visit.get(token, 0) + 1

    def _place(self, counts: Mapping[int, int], token: int) -> int:
        """Where a token stands in a list: those of a count by falling frequency, then what is frequent in training."""
        if token in counts:
            own, rank = counts[token], self.rank[token]
            return sum(each > own or (each == own and self.rank[other] < rank) for other, each in counts.items())
        if len(counts) >= TOP[-1] or token not in self.frequent:
            return TOP[-1]
        return len(counts) + sum(other not in counts for other in self.frequent[: self.frequent.index(token)])

    def _share(self, counts: Mapping[int, int], token: int) -> float:
        """Probability of a token by a count."""
        return (counts.get(token, 0) + PRIOR * self.shares[token]) / (sum(counts.values()) + PRIOR)

    def report(self, num_resamples: int, seed: int) -> tuple[dict[str, KindForecast], ...]:
        """All events, first occurrences, repeats: each by kind."""
        sums = np.stack(self.sums)  # [patients, kinds, 2, 1 + measures]
        return tuple(_by_kind(part, num_resamples, seed) for part in (sums.sum(2), sums[:, :, 0], sums[:, :, 1]))


def _by_kind(sums: NDArray[np.float64], num_resamples: int, seed: int) -> dict[str, KindForecast]:
    """Sums [patients, kinds, 1 + measures] -> forecasts of "all" and of the kinds that occur."""
    sums = np.concatenate([sums.sum(1, keepdims=True), sums], axis=1)
    flat = sums.reshape(len(sums), -1)
    drawn = [weights @ flat for weights in patient_weights(np.arange(len(sums)), num_resamples, seed=seed)]
    resamples = np.concatenate(drawn or [np.empty((0, flat.shape[1]))]).reshape(-1, *sums.shape[1:])
    kinds = {}
    for number, name in enumerate(("all", *_KINDS)):
        total = sums[:, number].sum(0)
        if not total[0]:
            continue
        here = resamples[:, number]
        here = here[here[:, 0] > 0]  # a resample without such an event has no mean
        means = here[:, 1:] / here[:, :1]
        low, high = np.quantile(means, (0.025, 0.975), axis=0) if len(means) else ((), ())
        values = (total[1:] / total[0]).tolist()
        ours, frequent, last = ({k: values[4 + 3 * place + who] for place, k in enumerate(TOP)} for who in range(3))
        kinds[name] = KindForecast(
            events=int(total[0]),
            nll=values[0],
            nll_of_frequencies=values[3],
            recall=ours,
            recall_most_frequent=frequent,
            recall_last_visit=last,
            nll_most_frequent=values[1],
            nll_last_visit=values[2],
            low=dict(zip(EVENT_MEASURES, map(float, low), strict=False)),
            high=dict(zip(EVENT_MEASURES, map(float, high), strict=False)),
        )
    return kinds

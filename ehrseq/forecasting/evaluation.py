"""How well does a model foretell what comes next? Recall and NLL of the next event, error of the next visit's time.

Every position whose next token is an event (lab, medication, procedure, diagnosis, vital, other) is a question. Beside
the model stand forecasts that only count: "most frequent" lists the patient's own tokens so far by frequency, "last
visit" those of the visit before; both go on with the tokens that are frequent in training. Their NLL is that of the
training frequencies.

The time is asked for wherever an interval token follows: the days until the next visit that the model expects (its
probabilities of the interval tokens times their middles, as `generate` moves the clock) against those that passed.
Beside it: the patient's mean interval so far, and the last one; the first interval of a row is the training mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ehrseq.modeling.configuration_ehrmamba import INTERVAL_DAYS
from ehrseq.tokenization.ehr_vocabulary import (
    TYPE_DIAGNOSIS,
    TYPE_INTERVAL,
    TYPE_LAB,
    TYPE_MEDICATION,
    TYPE_OTHER,
    TYPE_PROCEDURE,
    TYPE_VITAL,
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
_DAYS_A_WEEK = 7.0


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
    """

    events: int
    nll: float
    nll_of_frequencies: float
    recall: Mapping[int, float]
    recall_most_frequent: Mapping[int, float]
    recall_last_visit: Mapping[int, float]


@dataclass(frozen=True)
class ForecastReport:
    """What `evaluate_forecast` measured.

    Attributes:
        kinds: Kind of event, and "all", -> its forecasts; kinds that never occur are absent.
        intervals: Intervals between visits that were asked for.
        days_off: Mean absolute error in days: "model", "mean so far", "last"; None without an interval.
    """

    kinds: Mapping[str, KindForecast]
    intervals: int
    days_off: Mapping[str, float] | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Tables of the events and of the intervals."""
        heads = [f"recall at {k}: {who}" for k in TOP for who in ("model", "most frequent", "last visit")]
        lines = [
            f"| next event | events | NLL | of frequencies | {' | '.join(heads)} |",
            "|---|" + "---:|" * (3 + len(heads)),
        ]
        for kind, forecast in self.kinds.items():
            recalls = [
                f"{each[k]:.3f}"
                for k in TOP
                for each in (forecast.recall, forecast.recall_most_frequent, forecast.recall_last_visit)
            ]
            lines.append(
                f"| {kind} | {forecast.events:,} | {forecast.nll:.3f} | {forecast.nll_of_frequencies:.3f} | "
                f"{' | '.join(recalls)} |"
            )
        if self.days_off is not None:
            errors = ", ".join(f"{who} {days:.1f}" for who, days in self.days_off.items())
            lines += ["", f"Days until the next visit, {self.intervals:,} intervals, mean absolute error: {errors}."]
        return "\n".join(lines) + "\n"


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


def evaluate_forecast(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    collator: Callable[[list[Mapping[str, Any]]], Mapping[str, Tensor]],
    frequencies: ArrayLike,
    *,
    training_interval: float = 90.0,
    batch_size: int = 16,
    progress: bool = True,
) -> ForecastReport:
    """Ask a causal model for every next event of some histories.

    Args:
        model: `EhrMambaForCausalLM`, or one with its inputs and `logits` [b, L, vocabulary].
        rows: Histories, rows of channels, such as `tokenizer.encode_histories(events).windows(context)`.
        collator: Pads rows, such as `DataCollatorForNextToken(tokenizer)`.
        frequencies: `[vocabulary]` counts in training rows, see `token_frequencies`.
        training_interval: Days between visits in training, for the first interval of a row.
        batch_size: Rows in a forward pass.
        progress: Show a progress bar.

    Raises:
        ValueError: Frequencies of another vocabulary, all zero, or no rows.
    """
    counts = np.asarray(frequencies, np.float64)
    if counts.shape != (model.config.vocab_size,) or counts.sum() <= 0:
        raise ValueError(
            f"frequencies got shape {counts.shape} with the sum {counts.sum():g}; expected "
            f"({model.config.vocab_size},) counts of training tokens, see token_frequencies."
        )
    if len(rows) == 0:
        raise ValueError("there are no rows to forecast.")
    tally = _Tally(counts, model.config.special_token_ids or {}, training_interval)
    was_training = model.training
    model.eval()
    try:
        for first in progress_bar(range(0, len(rows), batch_size), desc="Forecasting", disable=not progress):
            batch = dict(collator([rows[i] for i in range(first, min(first + batch_size, len(rows)))]))
            batch.pop("labels", None)
            with torch.no_grad():
                logits = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
            tally.add({name: value.numpy() for name, value in batch.items()}, logits.float().cpu())
    finally:
        model.train(was_training)
    return tally.report()


class _Tally:
    """Sums over all questions."""

    def __init__(self, counts: NDArray[np.float64], specials: Mapping[str, int], training_interval: float) -> None:
        self.frequent = np.argsort(-counts, kind="stable")[: TOP[-1]]
        self.rank = np.argsort(np.argsort(-counts, kind="stable"), kind="stable")
        smoothed = counts + 0.5  # a token that training never held is not impossible
        self.log_shares = np.log(smoothed / smoothed.sum())
        self.interval_ids = np.array([specials[name] for name in INTERVAL_DAYS if name in specials], np.int64)
        self.interval_days = np.array([days for name, days in INTERVAL_DAYS.items() if name in specials])
        self.training_interval = training_interval
        self.questions: dict[str, list[tuple[float, ...]]] = {}
        self.off: list[tuple[float, float, float]] = []

    def add(self, batch: Mapping[str, NDArray[Any]], logits: Tensor) -> None:
        """The questions of a batch."""
        log_shares = logits.log_softmax(-1)
        best = logits.topk(min(TOP[-1], logits.shape[-1]), dim=-1).indices.numpy()
        for row in range(len(batch["input_ids"])):
            real = np.flatnonzero(batch["attention_mask"][row])
            channels = {
                name: batch[name][row][real] for name in ("input_ids", "token_type_ids", "times", "visit_orders")
            }
            self._events(channels, log_shares[row][real].numpy(), best[row][real])
            self._intervals(channels, log_shares[row][real].numpy())

    def _events(self, channels: Mapping[str, NDArray[Any]], log_shares: NDArray[Any], best: NDArray[Any]) -> None:
        ids, types, orders = channels["input_ids"], channels["token_type_ids"], channels["visit_orders"]
        so_far: dict[int, int] = {}
        this_visit: dict[int, int] = {}
        last_visit: dict[int, int] = {}
        for place in range(1, len(ids)):
            if orders[place] != orders[place - 1] and types[place] != TYPE_INTERVAL:
                last_visit, this_visit = this_visit or last_visit, {}
            token, kind = int(ids[place]), KIND_OF_TYPE.get(int(types[place]))
            if kind is None:
                continue
            lists = (best[place - 1], self._list(so_far), self._list(last_visit))
            hits = [float(token in each[:k]) for k in TOP for each in lists]
            answer = (-float(log_shares[place - 1, token]), -float(self.log_shares[token]), *hits)
            self.questions.setdefault(kind, []).append(answer)
            so_far[token] = so_far.get(token, 0) + 1
            this_visit[token] = this_visit.get(token, 0) + 1

    def _list(self, counts: Mapping[int, int]) -> list[int]:
        """The tokens of a count by falling frequency, then those that are frequent in training."""
        seen = sorted(counts, key=lambda token: (-counts[token], self.rank[token]))[: TOP[-1]]
        return (seen + [int(token) for token in self.frequent if token not in counts])[: TOP[-1]]

    def _intervals(self, channels: Mapping[str, NDArray[Any]], log_shares: NDArray[Any]) -> None:
        if len(self.interval_ids) == 0:
            return
        types, times = channels["token_type_ids"], channels["times"]
        seen: list[float] = []
        for place in np.flatnonzero(types == TYPE_INTERVAL):
            if place == 0 or place + 1 >= len(types):
                continue  # what stood before it, or follows, was cut off
            days = _DAYS_A_WEEK * float(times[place + 1] - times[place - 1])
            shares = np.exp(log_shares[place - 1, self.interval_ids])
            expected = float(shares @ self.interval_days / shares.sum())
            mean, last = (float(np.mean(seen)), seen[-1]) if seen else (self.training_interval,) * 2
            self.off.append((abs(expected - days), abs(mean - days), abs(last - days)))
            seen.append(days)

    def report(self) -> ForecastReport:
        kinds = {name: self.questions[name] for name in KIND_OF_TYPE.values() if name in self.questions}
        everything = [answer for answers in kinds.values() for answer in answers]
        by_kind = {"all": everything, **kinds} if everything else {}
        errors = np.mean(self.off, axis=0).tolist() if self.off else None
        return ForecastReport(
            {name: _summary(answers) for name, answers in by_kind.items()},
            len(self.off),
            None if errors is None else dict(zip(("model", "mean so far", "last"), errors, strict=True)),
        )


def _summary(answers: Sequence[tuple[float, ...]]) -> KindForecast:
    means = np.mean(answers, axis=0).tolist()
    recalls = [{k: means[2 + 3 * place + who] for place, k in enumerate(TOP)} for who in range(3)]
    return KindForecast(len(answers), means[0], means[1], *recalls)

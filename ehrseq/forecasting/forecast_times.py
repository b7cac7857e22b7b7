"""How well does a model foretell when? Days until the next visit, and hours between the events of a visit.

*Visits.* Wherever an interval token follows, the model's probabilities of the interval tokens are a distribution of the
days until the next visit, uniform within a token's span ([LT]: exponential beyond 366 days); a time head makes it finer
within the span. Its mean (the tokens' middles, as `generate` moves the clock) and its median are held against the days
that passed, beside the patient's mean interval so far and the last one.

*Events of a visit*, of a model with a time head: the gap to the next event, given which it is. Its median and mean
against the gap that passed, beside the record's mean so far, its last one, and "at once".

*Calibration.* The probability integral transform (PIT): the predicted probability of a gap at most as long as the
one that came. Of a calibrated model it is uniform. Where the distribution has a step (events at the same instant), the
mass of the step is spread over its height (Czado et al. 2009, "Predictive model assessment for count data").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ehrseq.evaluation.bootstrap import patient_weights
from ehrseq.modeling.configuration_ehrmamba import INTERVAL_DAYS
from ehrseq.modeling.ehr_intervals import INTERVAL_SPANS, draw_interval, share_beyond
from ehrseq.modeling.ehr_time_head import draw_gap, gap_cdf
from ehrseq.tokenization.ehr_vocabulary import (
    TYPE_CLS,
    TYPE_INTERVAL,
    TYPE_REG,
    TYPE_STATIC,
    TYPE_VE,
    TYPE_VS,
)

PIT_BINS = 20
_DAYS_A_WEEK = 7.0
_HOURS_A_DAY = 24.0
_VISIT_FORECASTERS = ("model", "model, median", "mean so far", "last")
_EVENT_FORECASTERS = ("model", "model, median", "mean so far", "last", "at once")


@dataclass(frozen=True)
class GapForecast:
    """Forecasts of gaps.

    Attributes:
        title: What is foretold.
        unit: "days" or "hours".
        gaps: How many were asked for.
        off: Who foretells -> mean absolute error.
        low: Who -> lower end of its 95 % interval over patients; empty without resamples.
        high: The upper ends.
        pit: Share of the gaps in each of `PIT_BINS` equal bins of the PIT; all equal = calibrated.
        pit_distance: Largest distance of the PIT's distribution from the uniform one, at the edges of the bins
            (Kolmogorov).
        at_once: Share of gaps of 0 that the model expects, and the share that came; None between visits.
    """

    title: str
    unit: str
    gaps: int
    off: Mapping[str, float]
    low: Mapping[str, float]
    high: Mapping[str, float]
    pit: tuple[float, ...]
    pit_distance: float
    at_once: tuple[float, float] | None = None

    def to_text(self) -> str:
        """One paragraph."""
        errors = ", ".join(f"{who} {value:.2f}" for who, value in self.off.items())
        text = f"{self.title}, {self.gaps:,} gaps, mean absolute error in {self.unit}: {errors}."
        text += f" Distance of the PIT from uniform: {self.pit_distance:.3f}."
        if self.at_once is not None:
            text += f" At the same instant: {self.at_once[1]:.1%}, expected {self.at_once[0]:.1%}."
        return text


def pit_cumulative(low: ArrayLike, high: ArrayLike) -> NDArray[np.float64]:
    """Mean distribution function of PITs at the upper edges of `PIT_BINS` bins.

    Args:
        low: `[n]` predicted probability of a gap that is shorter than the one that came.
        high: `[n]` the same of one that is at most as long; equal to `low` where the prediction has no step.

    Returns:
        `[PIT_BINS]`, the last one 1; NaN without gaps.
    """
    lows, highs = np.asarray(low, np.float64), np.asarray(high, np.float64)
    edges = np.arange(1, PIT_BINS + 1) / PIT_BINS
    if not len(lows):
        return np.full(PIT_BINS, np.nan)
    width = highs - lows
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (edges - lows[:, None]) / width[:, None]
    steps = np.where(width[:, None] > 0, part.clip(0, 1), edges >= lows[:, None] - 1e-12)
    means: NDArray[np.float64] = steps.mean(0)
    return means


class TimeTally:
    """Errors of all gaps, by patient.

    Args:
        model: With `config.special_token_ids`; its `time_head` is asked where it has one.
        training_interval: Days between visits in training, for the first interval of a record.
    """

    def __init__(self, model: Any, training_interval: float) -> None:
        specials: Mapping[str, int] = model.config.special_token_ids or {}
        names = [name for name in INTERVAL_DAYS if name in specials]
        self.names = {specials[name]: place for place, name in enumerate(names)}
        self.ids = torch.tensor([specials[name] for name in names], dtype=torch.long)
        self.middles = np.array([INTERVAL_DAYS[name] for name in names])
        self.spans = np.array([INTERVAL_SPANS[name] for name in names]).reshape(-1, 2)
        self.training_interval = training_interval
        self.head = getattr(model, "time_head", None)
        self.words = None if self.head is None else model.get_input_embeddings()
        self.edges = torch.tensor(getattr(model.config, "time_edges", None) or [0.0], dtype=torch.float64)
        # What a gap of each bin is on average: the last one is exponential with the mean edges[-1] beyond its start.
        self.bin_means = torch.cat([self.edges[:1], (self.edges[1:] + self.edges[:-1]) / 2, 2 * self.edges[-1:]])
        self.visits = _Errors("Days until the next visit", "days", _VISIT_FORECASTERS)
        self.events = _Errors("Hours between events of a visit", "hours", _EVENT_FORECASTERS)
        self.subject: Any = None
        self.seen_visits: list[float] = []
        self.seen_events: list[float] = []

    def add(
        self, subject: Any, channels: Mapping[str, NDArray[Any]], log_shares: Tensor, hidden: Tensor | None
    ) -> None:
        """The gaps of a row.

        Args:
            subject: Whose row it is.
            channels: `input_ids`, `token_type_ids`, `times`, each [l].
            log_shares: Of the next token, [l, vocabulary].
            hidden: After the final norm, [l, d]; None without a time head.
        """
        if subject != self.subject:
            self.subject, self.seen_visits, self.seen_events = subject, [], []
        if len(self.ids):
            self._visits(subject, channels, log_shares, hidden)
        if hidden is not None:
            self._events(subject, channels, hidden)

    def _visits(
        self, subject: Any, channels: Mapping[str, NDArray[Any]], log_shares: Tensor, hidden: Tensor | None
    ) -> None:
        ids, types, times = channels["input_ids"], channels["token_type_ids"], channels["times"]
        places = np.flatnonzero(types == TYPE_INTERVAL)
        places = places[(places > 0) & (places + 1 < len(types))]  # else what stood before it, or follows, was cut off
        if not len(places):
            return
        chosen = log_shares[torch.as_tensor(places - 1, device=log_shares.device)][:, self.ids.to(log_shares.device)]
        shares = chosen.double().softmax(-1).cpu().numpy()  # [n, intervals]
        days = _DAYS_A_WEEK * (times[places + 1] - times[places - 1]).astype(np.float64)
        token = np.array([self.names[int(ids[place])] for place in places])
        within = self._within(days, token, places, channels, hidden)
        before = np.cumsum(shares, axis=1) - shares
        rows = np.arange(len(places))
        pits = before[rows, token] + shares[rows, token] * within
        expected = shares @ self.middles
        medians = self._medians(shares, before)
        for row, length in enumerate(days.tolist()):
            seen = self.seen_visits
            mean, last = (float(np.mean(seen)), seen[-1]) if seen else (self.training_interval,) * 2
            guesses = (expected[row], medians[row], mean, last)
            self.visits.add(subject, [abs(guess - length) for guess in guesses], pits[row], pits[row])
            seen.append(length)

    def _within(
        self,
        days: NDArray[np.float64],
        token: NDArray[np.int64],
        places: NDArray[np.int64],
        channels: Mapping[str, NDArray[Any]],
        hidden: Tensor | None,
    ) -> NDArray[np.float64]:
        """Predicted probability of at most so many days, given the interval token: [n]."""
        low, high = (torch.as_tensor(ends) for ends in self.spans[token].T.copy())
        passed = torch.as_tensor(days)
        inside = 1 - share_beyond(low, high, passed)
        if hidden is not None and self.head is not None and self.words is not None:
            log_probs = self._gaps(hidden, places, channels["input_ids"])
            below, at = (gap_cdf(log_probs, self.edges, value) for value in (low, passed.clamp(low, high)))
            mass = gap_cdf(log_probs, self.edges, high) - below
            inside = torch.where(mass > 0, (at - below) / mass, inside)
        within: NDArray[np.float64] = inside.clamp(0, 1).numpy()
        return within

    def _gaps(self, hidden: Tensor, places: NDArray[np.int64], ids: NDArray[np.int64]) -> Tensor:
        """Log-probabilities of the bins of the gaps behind some places, given what comes: [n, bins]."""
        if self.head is None or self.words is None:
            raise ValueError("this model has no time head.")
        following = torch.as_tensor(ids[places + 1], device=hidden.device)
        with torch.no_grad():
            here = hidden[torch.as_tensor(places, device=hidden.device)]
            log_probs: Tensor = self.head.log_probabilities(here, self.words(following))
        return log_probs.double().cpu()

    def _medians(self, shares: NDArray[np.float64], before: NDArray[np.float64]) -> NDArray[np.float64]:
        """Median days, [n]."""
        token = (before + shares < 0.5).sum(1).clip(max=shares.shape[1] - 1)
        rows = np.arange(len(shares))
        part = ((0.5 - before[rows, token]) / shares[rows, token]).clip(0, 1 - 2**-53)
        low, high = (torch.as_tensor(ends) for ends in self.spans[token].T.copy())
        medians: NDArray[np.float64] = draw_interval(low, high, torch.as_tensor(part)).numpy()
        return medians

    def _events(self, subject: Any, channels: Mapping[str, NDArray[Any]], hidden: Tensor) -> None:
        if self.head is None or self.words is None:
            return
        ids, types, times = channels["input_ids"], channels["token_type_ids"], channels["times"]
        outside = np.isin(types, (TYPE_CLS, TYPE_STATIC, TYPE_VE, TYPE_REG, TYPE_INTERVAL))
        places = np.flatnonzero(~outside[:-1] & ~outside[1:] & (types[1:] != TYPE_VS))
        if not len(places):
            return
        gaps = np.maximum(_DAYS_A_WEEK * np.diff(times.astype(np.float64))[places], 0.0)
        log_probs = self._gaps(hidden, places, ids)
        days = torch.as_tensor(gaps)
        high = gap_cdf(log_probs, self.edges, days).numpy()
        at_once = log_probs[:, 0].exp().numpy()
        low = np.where(gaps > 0, high, 0.0)
        nothing = torch.zeros(len(gaps), dtype=torch.float64)
        medians = draw_gap(log_probs, self.edges, nothing + 0.5, nothing, nothing + torch.inf).numpy()
        means = (log_probs.exp() @ self.bin_means).numpy()
        for row, length in enumerate(gaps.tolist()):
            seen = self.seen_events
            if seen:
                guesses = (means[row], medians[row], sum(seen) / len(seen), seen[-1], 0.0)
                errors = [_HOURS_A_DAY * abs(guess - length) for guess in guesses]
                self.events.add(subject, errors, low[row], high[row], (at_once[row], float(length == 0)))
            seen.append(length)

    def report(self, num_resamples: int, seed: int) -> tuple[GapForecast | None, GapForecast | None]:
        """Gaps between visits, gaps between the events of a visit; None where there were none."""
        return self.visits.report(num_resamples, seed), self.events.report(num_resamples, seed)


class _Errors:
    """Sums of absolute errors by patient, and the PIT of all gaps."""

    def __init__(self, title: str, unit: str, forecasters: Sequence[str]) -> None:
        self.title, self.unit, self.forecasters = title, unit, forecasters
        self.sums: dict[Any, NDArray[np.float64]] = {}
        self.pits: list[tuple[float, float]] = []
        self.cumulative = np.zeros(PIT_BINS)

    def add(
        self, subject: Any, errors: Sequence[float], low: float, high: float, at_once: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        """One gap."""
        sums = self.sums.setdefault(subject, np.zeros(3 + len(self.forecasters)))
        sums += (1.0, *at_once, *errors)
        self.pits.append((float(low), float(high)))
        if len(self.pits) >= 4096:
            self._settle()

    def _settle(self) -> None:
        """Keep the sums of the PITs that have come, so that memory does not grow with the gaps."""
        if self.pits:
            low, high = np.array(self.pits).T
            self.cumulative += pit_cumulative(low, high) * len(self.pits)
            self.pits = []

    def report(self, num_resamples: int, seed: int) -> GapForecast | None:
        """What was measured, None without a gap."""
        if not self.sums:
            return None
        self._settle()
        sums = np.stack(list(self.sums.values()))  # [patients, 3 + forecasters]
        total = sums.sum(0)
        drawn = [weights @ sums for weights in patient_weights(np.arange(len(sums)), num_resamples, seed=seed)]
        ends: tuple[Any, Any] = ((), ())
        if drawn:
            resamples = np.concatenate(drawn)
            ends = tuple(np.quantile(resamples[:, 3:] / resamples[:, :1], (0.025, 0.975), axis=0))
        cumulative = self.cumulative / total[0]
        uniform = np.arange(1, PIT_BINS + 1) / PIT_BINS
        expected = tuple((total[1:3] / total[0]).tolist())
        return GapForecast(
            self.title,
            self.unit,
            int(total[0]),
            dict(zip(self.forecasters, (total[3:] / total[0]).tolist(), strict=True)),
            dict(zip(self.forecasters, map(float, ends[0]), strict=False)),
            dict(zip(self.forecasters, map(float, ends[1]), strict=False)),
            tuple(np.diff(cumulative, prepend=0.0).tolist()),
            float(np.abs(cumulative - uniform).max()),
            (expected[0], expected[1]) if "at once" in self.forecasters else None,
        )

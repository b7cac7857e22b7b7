"""A model of six events whose next token depends on the current one alone, and what it must answer, computed exactly.

`markov_model` is an `EhrMambaForCausalLM` with weights by hand: the mixers add nothing, the embedding layer makes the
current token a unit vector, and the head reads a row of `TRANSITIONS`. `Enumeration` knows nothing of the engine. It
solves what the process itself says: the probability F_i(r) that an outcome comes within the next r days, i being the
latest token, is

    F_i(r) = sum over next tokens j of P_ij * E[ 1 if j is the outcome, 0 if j ends the trajectory, else F_j(r - gap) ]

(0 wherever gap > r), gaps by the rules of the engine: uniform over the span of an interval token between visits,
exponential beyond a year; with a time head as its bins say, inside that span; 0 elsewhere. On a grid of days, on which
all edges lie, the expectation over a uniform piece is a difference of integrals.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.ehr_time_head import EhrTimeHead
from ehrseq.modeling.ehr_trajectories import ForecastPrompt
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM

TOKENS = ("[PAD]", "[VS]", "[VE]", "[REG]", "[W_0]", "[M_1]", "[LT]", "A", "B", "RARE", "RARER", "LAB", "DEATH")
ID = {token: number for number, token in enumerate(TOKENS)}
SPANS = {"[W_0]": (0.0, 7.0), "[M_1]": (30.0, 60.0), "[LT]": (366.0, np.inf)}
MEAN_BEYOND = 181.0

_NEXT: dict[str, dict[str, float]] = {
    "[VS]": {"A": 0.5, "B": 0.3, "RARE": 0.0008, "RARER": 0.00008, "LAB": 0.1, "DEATH": 0.01, "[VE]": 0.08912},
    "[VE]": {"[REG]": 1.0},
    "[REG]": {"[W_0]": 0.5, "[M_1]": 0.35, "[LT]": 0.15},
    "[W_0]": {"[VS]": 0.9, "A": 0.06, "DEATH": 0.04},
    "[M_1]": {"[VS]": 1.0},
    "[LT]": {"[VS]": 1.0},
    "A": {"A": 0.2, "B": 0.3, "RARE": 0.002, "RARER": 0.0002, "DEATH": 0.03, "LAB": 0.0178, "[VE]": 0.45},
    "B": {"A": 0.25, "B": 0.1, "RARE": 0.001, "RARER": 0.0001, "DEATH": 0.01, "[VE]": 0.6389},
    "RARE": {"A": 0.5, "[VE]": 0.5},
    "RARER": {"B": 0.5, "[VE]": 0.5},
    "LAB": {"A": 0.6, "LAB": 0.1, "[VE]": 0.3},
    "DEATH": {"[VE]": 1.0},
    "[PAD]": {"[VE]": 1.0},
}
TRANSITIONS = np.array([[_NEXT[i].get(j, 0.0) for j in TOKENS] for i in TOKENS])  # [V, V]

TIME_EDGES = (0.0, 0.25, 1.0, 3.0, 7.0, 30.0, 60.0, 366.0)
"""Of the time head: bins of 0, seven pieces, and what lies beyond."""


def bin_logits() -> tuple[np.ndarray, np.ndarray]:
    """By how much the current and the next token speak for each bin, [V, bins] each; their sum counts."""
    draw = np.random.default_rng(3)
    size = (len(TOKENS), len(TIME_EDGES) + 1)
    return draw.normal(0, 0.7, size), draw.normal(0, 0.7, size) + np.linspace(1.0, -1.5, size[1])


def markov_model(*, time_head: bool = False) -> EhrMambaForCausalLM:
    """The model, in evaluation mode."""
    size, vocab = 2 * len(TOKENS), len(TOKENS)
    specials = {token: number for token, number in ID.items() if token.startswith("[") and token != "[PAD]"}
    config = EhrMambaConfig(
        vocab_size=vocab,
        hidden_size=size,
        num_hidden_layers=1,
        state_size=2,
        time_embeddings_size=2,
        max_num_visits=8,
        hidden_dropout_prob=0.0,
        special_token_ids=specials,
    )
    types = {"[PAD]": 0, "[VS]": 2, "[VE]": 3, "[REG]": 8, "[W_0]": 4, "[M_1]": 4, "[LT]": 4}
    config.set_token_types([types.get(token, 11) for token in TOKENS])
    config.time_edges = list(TIME_EDGES) if time_head else None
    model = EhrMambaForCausalLM(config).eval()
    if time_head:
        model.time_head = EhrTimeHead(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        embeddings = model.model.embeddings
        embeddings.word_embeddings.weight[:, :vocab] = torch.eye(vocab)
        embeddings.projection.weight[:, :size] = torch.eye(size)
        # tanh(e_i), normalised, is a vector of two values a > b; scaled by 1 / (a - b) and shifted it is e_i.
        unit = torch.zeros(size)
        unit[0] = np.tanh(1.0)
        high, low = torch.nn.functional.layer_norm(unit, (size,), eps=config.layer_norm_eps)[:2].tolist()
        embeddings.layer_norm.weight.fill_(1 / (high - low))
        embeddings.layer_norm.bias.fill_(-low / (high - low))
        model.model.norm_f.weight.fill_((1 / size + config.layer_norm_epsilon) ** 0.5)
        model.lm_head.weight[:, :vocab] = torch.tensor(np.log(np.maximum(TRANSITIONS, 1e-30)).T)
        if time_head:
            head, (of_current, of_next) = model.time_head, bin_logits()
            one = torch.nn.functional.gelu(torch.ones(())).item()
            head.from_hidden.weight[:vocab, :vocab] = torch.eye(vocab)
            head.from_next.weight[vocab:, :vocab] = torch.eye(vocab)
            head.out.weight[:, :vocab] = torch.tensor(of_current.T / one)
            head.out.weight[:, vocab:] = torch.tensor(of_next.T / one)
    return model


def markov_prompt(tokens: Sequence[str], elapsed_days: float = 0.0, key: int = 1) -> ForecastPrompt:
    """A record of one visit that ends with these tokens."""
    ids = torch.tensor([[ID[token] for token in tokens]])
    ones = torch.ones_like(ids)
    inputs = {
        "input_ids": ids,
        "token_type_ids": ones,
        "times": torch.zeros(ids.shape),
        "ages": torch.full(ids.shape, 50.0),
        "visit_orders": ones,
        "visit_segments": ones,
    }
    return ForecastPrompt(inputs, elapsed_days, key)


class Enumeration:
    """Exact probabilities of an outcome.

    Args:
        outcome: Tokens that are it.
        ends: Tokens that end a trajectory without it (deaths, `until`).
        days: How far, a whole number.
        time_head: Whether gaps are those of the time head.
        steps_a_day: Fineness of the grid; every edge of a span or bin lies on it.
    """

    def __init__(
        self, outcome: Sequence[str], *, ends: Sequence[str] = ("DEATH",), days: int, time_head: bool, steps_a_day: int
    ) -> None:
        self.step, self.size = 1 / steps_a_day, days * steps_a_day + 1
        self.is_outcome = np.array([token in outcome for token in TOKENS])
        self.is_end = np.array([token in ends and token not in outcome for token in TOKENS])
        self.bins = None
        if time_head:
            of_current, of_next = bin_logits()
            weights = np.exp(of_current[:, None] + of_next)
            self.bins = weights / weights.sum(-1, keepdims=True)  # [V, V, bins]
        self.within = np.zeros((len(TOKENS), self.size))  # F_i(r)
        for _ in range(5000):
            self._integrate()
            new = np.stack([self._next(token, TRANSITIONS[ID[token]]) for token in TOKENS])
            change = np.abs(new - self.within).max()
            self.within = new
            if change < 1e-10:
                self._integrate()
                return
        raise RuntimeError("the enumeration did not settle")

    def at(self, values: np.ndarray, day: float) -> float:
        """A function of the grid at a day."""
        return float(np.interp(day, np.arange(self.size) * self.step, values))

    def first(self, current: str, elapsed: float = 0.0) -> np.ndarray:
        """Probability that the outcome comes within r days of now, for every r of the grid.

        Args:
            current: The record's last token. After one of an open visit, what happened at its time stands in the
                record: with a time head the next gap is above 0, that of [VE] aside.
            elapsed: Days since its time, in which nothing happened (a whole number of steps).
        """
        is_open = self.bins is not None and current not in ("[VE]", "[REG]", *SPANS)
        chances = TRANSITIONS[ID[current]].copy()
        for token, (low, high) in SPANS.items():
            chances[ID[token]] *= self._beyond(low, high, elapsed)
        if is_open:
            for j, token in enumerate(TOKENS):
                law = self.bins[ID[current], j]
                if token not in SPANS:
                    chances[j] *= 1 - self._reached(law, elapsed) + (law[0] if token == "[VE]" else 0.0)
        return self._next(current, chances / chances.sum(), elapsed, is_open=is_open)

    def _next(self, current: str, chances: np.ndarray, elapsed: float = 0.0, *, is_open: bool = False) -> np.ndarray:
        """The same where the next token is drawn by these chances."""
        total = np.zeros(self.size)
        for j in np.flatnonzero(chances):
            token = TOKENS[j]
            if token in SPANS:
                low, high = SPANS[token]
                total += chances[j] * self._after_interval(token, max(low, elapsed), high, elapsed)
                continue
            law = self._law(current, j)
            if is_open and law is not None:
                law = np.concatenate([[0.0], law[1:]])
            total += chances[j] * self._spread(j, law, elapsed, np.inf, elapsed)
        return total

    def _integrate(self) -> None:
        """Once each token has come: the probability within the r days after it, and its integral up to r."""
        self.after = np.where(self.is_end[:, None], 0.0, self.within)
        self.after[self.is_outcome] = 1.0
        steps = np.cumsum((self.after[:, 1:] + self.after[:, :-1]) / 2, axis=1) * self.step
        self.integral = np.pad(steps, ((0, 0), (1, 0)))

    def _after_interval(self, interval: str, low: float, high: float, elapsed: float) -> np.ndarray:
        total = np.zeros(self.size)
        for j in np.flatnonzero(TRANSITIONS[ID[interval]]):
            law = self._law(interval, j)
            if law is None:
                law = "even"
            total += TRANSITIONS[ID[interval], j] * self._spread(j, law, low, high, elapsed)
        return total

    def _law(self, current: str, j: int) -> np.ndarray | None:
        """Bins of the gap, None: it is 0 (between visits: even over the span); [REG] comes with [VE]."""
        if self.bins is None or (TOKENS[j] == "[REG]" and current not in SPANS):
            return None
        return self.bins[ID[current], j]

    def _beyond(self, low: float, high: float, elapsed: float) -> float:
        """Share of a span, without a time head, that lies behind the elapsed days."""
        if np.isinf(high):
            return float(np.exp(-max(elapsed - low, 0.0) / MEAN_BEYOND))
        return float(np.clip((high - elapsed) / (high - low), 0, 1))

    def _reached(self, law: np.ndarray, days: float) -> float:
        edges = np.array(TIME_EDGES)
        inside = np.clip((days - edges[:-1]) / np.diff(edges), 0, 1)
        return float(law[0] + law[1:-1] @ inside + law[-1] * (1 - np.exp(-max(days - edges[-1], 0) / edges[-1])))

    def _spread(self, j: int, law: np.ndarray | str | None, low: float, high: float, elapsed: float) -> np.ndarray:
        """E[after_j(r - (gap - elapsed))], 0 where the gap is longer, for every r; the gap within [low, high)."""
        if law is None:
            return self.after[
                j
            ]  # at once; of a record that was silent: now, not in the days that are known to be silent
        if isinstance(law, str):
            if np.isinf(high):
                return self._exponential(j, low - elapsed, MEAN_BEYOND)
            return self._even(j, low - elapsed, high - elapsed)
        total, mass = np.zeros(self.size), 0.0
        if low <= 0:
            total, mass = law[0] * self.after[j], law[0]
        for chance, (start, stop) in zip(law[1:-1], pairwise(TIME_EDGES), strict=True):
            first, last = max(start, low), min(stop, high)
            if last > first:
                share = chance * (last - first) / (stop - start)
                total = total + share * self._even(j, first - elapsed, last - elapsed)
                mass += share
        if np.isinf(high):
            first = max(TIME_EDGES[-1], low)
            share = law[-1] * np.exp(-(first - TIME_EDGES[-1]) / TIME_EDGES[-1])
            total = total + share * self._exponential(j, first - elapsed, TIME_EDGES[-1])
            mass += share
        return total / mass

    def _even(self, j: int, low: float, high: float) -> np.ndarray:
        """Mean of after_j(r - g) over g even in [low, high)."""
        integral = self.integral[j]
        places = np.arange(self.size)
        until, since = (places - round(bound / self.step) for bound in (low, high))
        part = np.where(until >= 0, integral[np.maximum(until, 0)] - integral[np.maximum(since, 0)], 0.0)
        return part / (high - low)

    def _exponential(self, j: int, low: float, mean: float) -> np.ndarray:
        """The same over low + an exponential."""
        result, after = np.zeros(self.size), self.after[j]
        first = round(low / self.step)
        decay, total = np.exp(-self.step / mean), 0.0
        for k in range(first + 1, self.size):
            x = k - first
            total = total * decay + (after[x - 1] * decay + after[x]) / 2 * self.step / mean
            result[k] = total
        return result

"""The sampler of trajectories written down a second time: the whole record is read anew for every token, in float64.

It shares with the package the random numbers, and the laws of gaps (`ehr_time_head`, which has tests of its own). No
state, no slots, no batch; one outcome at a time.
"""

import numpy as np
import torch

from ehrseq.modeling.configuration_ehrmamba import INTERVAL_DAYS
from ehrseq.modeling.ehr_intervals import INTERVAL_SPANS, draw_interval, share_beyond
from ehrseq.modeling.ehr_time_head import draw_gap, gap_cdf, waiting_weights
from ehrseq.modeling.trajectory_draws import pool_of, trajectory_keys, uniforms
from tests.modeling.naive_ehrmamba import naive_hidden_states

INFINITE = float("inf")


def number(value):
    return torch.tensor([value], dtype=torch.float64)


class NaiveSampler:
    """One trajectory at a time from a model (see `draw`)."""

    def __init__(self, model):
        self.config = model.config
        self.head = None if model.time_head is None else model.time_head.double()
        self.weights = dict(model.model.state_dict())
        self.words = self.weights["embeddings.word_embeddings.weight"].double()
        self.lm_head = model.lm_head.weight.double()
        self.text = {i: token for token, i in self.config.special_token_ids.items()}
        self.types = self.config.token_types()

    def draw(self, record, elapsed, keys, horizon, outcome=(), avoid=False, ending=(), grid=None):
        """(tokens, days, h by step and day [steps, g], why it ended) of a record: dict of flat channels."""
        tokens = {name: list(values) for name, values in record.items()}
        inside = [i for i, segment in enumerate(tokens["visit_segments"]) if segment > 0]
        last = inside[-1] if inside else None
        week, age, order, segment = (
            (tokens[name][last] if inside else 0) for name in ("times", "ages", "visit_orders", "visit_segments")
        )
        week, age_now = week + elapsed / 7, age + elapsed / 365.25 if age else 0
        clock, low, high, waiting, step = -elapsed, elapsed, INFINITE, False, 0
        drawn, days, told = [], [], []
        grid = (horizon,) if grid is None else grid
        while True:
            hidden = naive_hidden_states(self.weights, self.config, tokens)[-1]
            p = (self.lm_head @ hidden).softmax(-1)
            if step == 0:
                closed = self.text.get(tokens["input_ids"][-1]) in ("[VE]", "[REG]")
                low = elapsed if closed else max(elapsed, 1e-300)  # what happened at once stands in the record
                p = p * waiting_weights(self.config, self.head, self.words, hidden, elapsed, not closed)
                p = p / p.sum()
            window = (low, high, waiting)
            told.append([sum(p[y].item() * self.reached(hidden, y, window, t - clock) for y in outcome) for t in grid])
            if avoid:
                for y in outcome:
                    p[y] *= 1 - self.reached(hidden, y, window, horizon - clock)
            y = int((p.cumsum(-1) <= uniforms(keys, np.array([2 * step]))[0] * p.sum()).sum())
            interval = self.text.get(y) in INTERVAL_SPANS
            gap = 0.0
            if waiting or not interval:
                gap = self.gap(hidden, y, window, torch.from_numpy(uniforms(keys, np.array([2 * step + 1]))))
            clock, step = clock + gap, step + 1
            clock = clock if interval else max(clock, 0.0)
            begins = 0.0 if waiting else low
            low, high, waiting = 0.0, INFINITE, interval
            if interval:
                low, high = INTERVAL_SPANS[self.text[y]]
                low = max(low, begins)
            if clock + low > horizon or (avoid and y in outcome):
                return drawn, days, told, "horizon"
            drawn.append(y)
            days.append(float("nan") if interval else max(clock, 0.0))
            if y in ending:
                return drawn, days, told, "end"
            if self.text.get(y) == "[VS]":
                order, segment = min(order + 1, self.config.max_num_visits - 1), {0: 1, 1: 2, 2: 1}[segment]
            row = (
                (0.0, 0.0, order, 0)
                if interval
                else (week + clock / 7, age_now + clock / 365.25 if age else 0.0, order, segment)
            )
            values = (y, self.types[y], *row)
            names = ("input_ids", "token_type_ids", "times", "ages", "visit_orders", "visit_segments")
            for name, value in zip(names, values, strict=True):
                tokens[name].append(value)

    def log_probs(self, hidden, y):
        return self.head.log_probabilities(hidden[None], self.words[y][None])

    def is_instant(self, y, waiting):
        return not waiting and (self.head is None or self.text.get(y) == "[REG]")

    def gap(self, hidden, y, window, uniform):
        low, high, waiting = window
        if self.is_instant(y, waiting):
            return 0.0
        if self.head is None:
            return float(draw_interval(number(low), number(high), uniform))
        edges = torch.tensor(self.config.time_edges, dtype=torch.float64)
        return float(draw_gap(self.log_probs(hidden, y), edges, uniform, number(low), number(high)))

    def reached(self, hidden, y, window, days):
        """Probability that the gap before y is at most `days`."""
        low, high, waiting = window
        if self.is_instant(y, waiting):
            return float(days >= 0)
        if self.head is None:
            return 1 - float(share_beyond(number(low), number(high), days))
        edges = torch.tensor(self.config.time_edges, dtype=torch.float64)
        by = lambda t: float(gap_cdf(self.log_probs(hidden, y), edges, number(t)))  # noqa: E731
        below, above = (by(low) if low > 0 else 0.0), (1.0 if high == INFINITE else by(high))
        return min(max((by(min(days, high)) - below) / (above - below), 0.0), 1.0) if days >= low else 0.0


def keys_of(seed, key, number, outcome=None):
    pool = 0 if outcome is None else pool_of(np.array(outcome))
    return trajectory_keys(seed, key, np.array([number]), pool)


__all__ = ["INTERVAL_DAYS", "NaiveSampler", "keys_of"]

"""How long until the next event: a small head on the hidden state, trained beside next-token prediction.

Next-token prediction says what comes, not when: events of one visit would all happen at its start, and of the time
between visits an interval token says no more than a span. The head gives the distribution of the *gap*, the days from
one event to the next, given the hidden state after the one and which token the other is:

    logits = W2 gelu(W_hidden h + W_next e + b) + b2,    e the word embedding of the next token

Every token of a visit has a gap, [VE] too, which comes with the last row of its visit; [REG] comes with [VE], and an
interval token has no time. Between visits the gap is the days from the last row of a visit to the [VS] of the next one:
it is told at the interval token and restricted to the token's span.

Gaps are told in bins. Bin 0 is a gap of exactly 0 (recorded at the same instant); bin k covers [edges[k - 1], edges[k])
without 0, uniformly; the last one has no end and falls off exponentially, with `edges[-1]` as its mean.

Glossary: d hidden_size, k edges, bins = k + 1, r rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .ehr_intervals import interval_spans, share_beyond

if TYPE_CHECKING:
    from .configuration_ehrmamba import EhrMambaConfig

_MINUTE, _HOUR = 1.0 / 1440.0, 1.0 / 24.0

DEFAULT_TIME_EDGES: tuple[float, ...] = (
    0.0,
    *(minutes * _MINUTE for minutes in (1, 5, 15, 30)),
    *(hours * _HOUR for hours in (1, 2, 4, 6, 8, 12, 16, 20)),
    *(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 10.0, 14.0, 17.0, 21.0, 24.0, 28.0),
    *(float(days) for days in range(30, 361, 30)),
    *(366.0, 548.0, 731.0, 1096.0, 1461.0, 1827.0, 2557.0, 3653.0),
)
"""Edges of the bins in days: those of every interval token's span, finer ones below, and about ten years."""

MICROSECOND_DAYS = 1e-6 / 86_400.0
"""The least gap above 0 of a record, in days: what is still to come inside a visit is at least that far away."""


class EhrTimeHead(nn.Module):
    """Distribution of the gap before the next event.

    Args:
        config: With `time_edges`.
    """

    def __init__(self, config: EhrMambaConfig):
        super().__init__()
        d = config.hidden_size
        if config.time_edges is None:
            raise ValueError("config.time_edges is None: a time head needs edges, such as DEFAULT_TIME_EDGES.")
        self.num_bins = len(config.time_edges) + 1
        self.from_hidden = nn.Linear(d, d)
        self.from_next = nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, self.num_bins)

    def log_probabilities(self, hidden: Tensor, next_concepts: Tensor) -> Tensor:
        """Log-probability of each bin, at least float32.

        Args:
            hidden: Hidden states after an event, [..., d].
            next_concepts: Word embeddings of the token that comes next, [..., d].

        Returns:
            [..., bins].
        """
        mixed = nn.functional.gelu(self.from_hidden(hidden) + self.from_next(next_concepts))
        logits: Tensor = self.out(mixed)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def gap_cdf(log_probs: Tensor, edges: Tensor, days: Tensor) -> Tensor:
    """Probability that a gap is at most some days.

    Args:
        log_probs: Of the bins, [..., bins].
        edges: Ascending, the first 0, [k], days.
        days: [...], broadcast against the leading dimensions of `log_probs`.

    Returns:
        float64 [...]; 0 before 0.
    """
    edges, days = edges.double(), days.double()[..., None]
    reached = torch.cat([(days >= 0).double(), _share_until(edges, days)], dim=-1)
    return (_probabilities(log_probs) * reached).sum(-1).clamp(max=1.0)


def draw_gap(log_probs: Tensor, edges: Tensor, uniform: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A gap by the inverse of its distribution function, restricted to a span.

    Args:
        log_probs: Of the bins, [r, bins].
        edges: As in `gap_cdf`.
        uniform: Random numbers within [0, 1), float64 [r].
        low: The gap is at least this, float64 [r]; 0 includes a gap of exactly 0.
        high: And below this, [r]; infinite: no bound.

    Returns:
        Days, float64 [r]. Where the span has no probability: uniform over it, or `low` where it has no end.
    """
    # 1. What of each bin lies within the span: [r, bins], the bin of 0 first.
    edges = edges.double()
    mass = _probabilities(log_probs) * share_within(edges, low, high)
    through = mass.cumsum(-1)
    total = through[:, -1]
    # 2. The bin, and the place in its part of the span.
    target = uniform * total
    chosen = (through <= target[:, None]).sum(-1).clamp(max=mass.shape[-1] - 1)
    chosen = torch.where(mass.gather(1, chosen[:, None]).squeeze(1) > 0, chosen, mass.argmax(-1))
    own = mass.gather(1, chosen[:, None]).squeeze(1)
    before = through.gather(1, chosen[:, None]).squeeze(1) - own
    place = ((target - before) / own.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0.0, 1.0)
    # 3. From the place to days: linear inside a bin, the inverse of the exponential in the last one.
    number = (chosen - 1).clamp(min=0)
    end = torch.cat([edges[1:], edges.new_full((1,), float("inf"))])[number]
    start, stop = torch.maximum(edges[number], low), torch.minimum(end, high)
    endless = torch.isinf(stop)
    width = torch.where(endless, start, stop) - start
    beyond = torch.where(endless, 1.0, -torch.expm1(-width / edges[-1]))  # of what follows `start`, before `stop`
    tail = start - edges[-1] * torch.log1p(-(place * beyond).clamp(max=1.0 - 2.0**-53))
    days = torch.where(number == len(edges) - 1, tail, start + place * width)
    days = torch.where(chosen == 0, 0.0, days)
    # 4. A span that the head finds impossible; an end that rounding reached belongs to the next span.
    evenly = low + uniform * (torch.where(torch.isinf(high), low, high) - low)
    days = torch.where(total > 0, days, evenly)
    return torch.where(days >= high, torch.nextafter(high, low), days)


def gap_bins(edges: Tensor, days: Tensor) -> Tensor:
    """Number of the bin that each gap lies in, int64: edges [k], days [...] -> [...]."""
    return torch.bucketize(days.double(), edges.double(), right=True).masked_fill(days <= 0, 0)


def share_within(edges: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Share of each bin that lies within a span [low, high): edges [k], low and high [r] -> float64 [r, bins]."""
    edges, low, high = edges.double(), low.double()[:, None], high.double()[:, None]
    inside = (_share_until(edges, high) - _share_until(edges, low)).clamp(min=0.0)
    return torch.cat([((low <= 0) & (high > 0)).double(), inside], dim=-1)


def _share_until(edges: Tensor, days: Tensor) -> Tensor:
    """Share of each bin but that of 0 which lies before some days: edges [k], days [..., 1] -> [..., k]."""
    inside = ((days - edges[:-1]) / (edges[1:] - edges[:-1])).clamp(0.0, 1.0)
    beyond = -torch.expm1(-(days - edges[-1:]).clamp(min=0.0) / edges[-1:])
    return torch.cat([inside, beyond], dim=-1)


def _probabilities(log_probs: Tensor) -> Tensor:
    """Of the bins, in float64; they sum to 1, as those of single precision do not."""
    return log_probs.double().softmax(-1)


@torch.no_grad()
def waiting_weights(
    config: EhrMambaConfig,
    time_head: EhrTimeHead | None,
    word_embeddings: Tensor,
    hidden: Tensor,
    elapsed_days: float,
    inside_visit: bool,
) -> Tensor:
    """Probability of each next token's gap to be longer than what has passed already without any event.

    Multiplied with the probabilities of the next token, it gives those of a record that has been silent for a while.
    What happened at the time of the last event stands in the record, so inside a visit a gap of 0 is ruled out even
    where nothing has passed. [VE] is the exception: where the end of a visit is not recorded, it is put behind the last
    row as soon as anything else happens, however late.

    Args:
        config: With `special_token_ids`.
        time_head: The model's, or None.
        word_embeddings: Of the whole vocabulary, [V, d].
        hidden: State after the record's last token, [d].
        elapsed_days: Days since the record's last event, at least 0.
        inside_visit: Whether a visit is open, so that the next token is an event of it.

    Returns:
        float64 [V] within [0, 1]. Interval tokens: the share of their span beyond (by its edges alone, since the day is
        drawn later). Other tokens: by the time head inside a visit, else 1.

    Raises:
        ValueError: `special_token_ids` are unknown, or the days negative or not finite.
    """
    tokens = known_specials(config)
    if not 0 <= elapsed_days < float("inf"):
        raise ValueError(f"elapsed_days got {elapsed_days!r}; expected a finite number of days of at least 0.")
    low, high = interval_spans(config).to(hidden.device).unbind(-1)
    weights = torch.ones(config.vocab_size, dtype=torch.float64, device=hidden.device)
    if time_head is not None and inside_visit:
        log_probs = time_head.log_probabilities(hidden.expand(config.vocab_size, -1), word_embeddings)
        edges = torch.tensor(config.time_edges, dtype=torch.float64, device=hidden.device)
        weights = 1.0 - gap_cdf(log_probs, edges, torch.full_like(weights, elapsed_days))
        weights[tokens["[VE]"]] += _probabilities(log_probs[tokens["[VE]"]])[0]
    return torch.where(low.isnan(), weights, share_beyond(low, high, elapsed_days))


def known_specials(config: EhrMambaConfig) -> dict[str, int]:
    """Ids of [VS], [VE], and of [REG] and the interval tokens where the vocabulary has them.

    Raises:
        ValueError: The configuration does not know the first two.
    """
    tokens = config.special_token_ids or {}
    missing = sorted({"[VS]", "[VE]"} - set(tokens))
    if missing:
        raise ValueError(
            f"config.special_token_ids lacks {missing}, without which no token is known to be a visit's or an "
            "interval: call config.update_from_tokenizer(tokenizer)."
        )
    return tokens


__all__ = [
    "DEFAULT_TIME_EDGES",
    "MICROSECOND_DAYS",
    "EhrTimeHead",
    "draw_gap",
    "gap_bins",
    "gap_cdf",
    "known_specials",
    "share_within",
    "waiting_weights",
]

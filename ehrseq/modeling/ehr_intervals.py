"""Days between visits: what an interval token says of them, and how a day within it is drawn.

An interval token covers a span of days, half open, by the rule of the tokenizer (`interval_token`: whole days, rounded
down). A model without a time head knows no more than that: a day is uniform within the span, and beyond a year
exponential with the mean that [LT] stands for, which forgets how long nothing has happened already. With a time head
the day is drawn from it, within the span. Either way a horizon that ends inside a span cuts it by its share: the next
visit counts where the day drawn lies before the horizon's end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .configuration_ehr_events import INTERVAL_DAYS, EhrEventConfig

_LONG_TERM_DAYS = 366.0

INTERVAL_SPANS: dict[str, tuple[float, float]] = {
    **{f"[W_{k}]": (7.0 * k, 7.0 * k + 7.0) for k in range(4)},
    "[M_0]": (28.0, 30.0),
    **{f"[M_{k}]": (30.0 * k, 30.0 * k + 30.0) for k in range(1, 12)},
    "[M_12]": (360.0, _LONG_TERM_DAYS),
    "[LT]": (_LONG_TERM_DAYS, float("inf")),
}
"""Days that each interval token covers, [from, to)."""

_MEAN_BEYOND = INTERVAL_DAYS["[LT]"] - _LONG_TERM_DAYS
"""Mean days beyond the beginning of [LT]."""


def interval_spans(config: EhrEventConfig) -> Tensor:
    """Span of each token in days: float64 [vocab_size, 2], NaN for all but interval tokens."""
    spans = torch.full((config.vocab_size, 2), float("nan"), dtype=torch.float64)
    for token, span in INTERVAL_SPANS.items():
        if token in (config.special_token_ids or {}):
            spans[config.special_token_ids[token]] = torch.tensor(span, dtype=torch.float64)  # type: ignore[index]
    return spans


def draw_interval(low: Tensor, high: Tensor, uniform: Tensor) -> Tensor:
    """A day within a span by the inverse of its distribution function, without a time head.

    Args:
        low: Where the span begins, float64 [r], days.
        high: Where it ends, [r]; infinite where it has no end.
        uniform: Random numbers within [0, 1), float64 [r].

    Returns:
        Days, float64 [r], at least `low` and below `high`.
    """
    endless = torch.isinf(high)
    inside = low + uniform * (torch.where(endless, low, high) - low)
    # 1 - uniform lies within (0, 1]; rounding must not reach the end of a span, which is the next one's beginning.
    beyond = low - _MEAN_BEYOND * torch.log1p(-uniform)
    return torch.where(endless, beyond, torch.minimum(inside, torch.nextafter(high, low)))


def share_beyond(low: Tensor, high: Tensor, days: Tensor | float) -> Tensor:
    """Share of a span's probability that lies later than some days, without a time head: 1 before it, 0 behind."""
    return log_share_beyond(low, high, days).exp()


def log_share_beyond(low: Tensor, high: Tensor, days: Tensor | float) -> Tensor:
    """Logarithm of `share_beyond`: finite at [LT], however long the silence."""
    days = torch.as_tensor(days, dtype=torch.float64, device=low.device)
    inside = ((high - days) / (high - low)).clamp(0.0, 1.0).log()
    return torch.where(torch.isinf(high), -(days - low).clamp(min=0.0) / _MEAN_BEYOND, inside)


__all__ = ["INTERVAL_SPANS", "draw_interval", "interval_spans", "log_share_beyond", "share_beyond"]

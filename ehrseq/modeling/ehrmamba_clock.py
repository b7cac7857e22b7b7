"""The clock of a history that goes on: which channels a token gets that a model has drawn.

They follow from the end of the prompt and from the tokens since: an interval token ([W_k], [M_k], [LT]) moves the clock
by the middle of its interval, [VS] opens the next visit (order + 1, other segment), every other token happens at the
clock's time. All that a row must keep of its tokens are the days and the visits since the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .configuration_ehrmamba import INTERVAL_DAYS, EhrMambaConfig

DAYS_PER_WEEK = 7.0
DAYS_PER_YEAR = 365.25
CLOCK_CHANNELS = ("token_type_ids", "times", "ages", "visit_orders", "visit_segments")


@dataclass(frozen=True)
class TokenEffects:
    """What each token of the vocabulary does to the clock, [V] each.

    Attributes:
        types: Type of the token, int64; 0 where the config does not know.
        days: Days that it moves the clock by, float32, 0 for all but interval tokens.
        visits: Visits that it opens, int64: 1 for [VS].
        last_order: Highest visit order.
    """

    types: Tensor
    days: Tensor
    visits: Tensor
    last_order: int

    @classmethod
    def of(cls, config: EhrMambaConfig, device: torch.device | str | None = None) -> TokenEffects:
        """The effects of a vocabulary; of one without special tokens only the types."""
        types = config.token_types() or [0] * config.vocab_size
        days, visits = [0.0] * config.vocab_size, [0] * config.vocab_size
        for token, number in (config.special_token_ids or {}).items():
            days[number] = INTERVAL_DAYS.get(token, 0.0)
            visits[number] = int(token == "[VS]")
        return cls(
            torch.tensor(types, device=device),
            torch.tensor(days, dtype=torch.float32, device=device),
            torch.tensor(visits, device=device),
            config.max_num_visits - 1,
        )


@dataclass(frozen=True)
class GenerationClock:
    """Where a history stands after its last token, one value a row [b].

    Attributes:
        times: Weeks from the first timed event to the end of the prompt.
        ages: Years at the end of the prompt; 0 exactly = unknown, and stays 0.
        visit_orders: Order of the prompt's last visit.
        visit_segments: Its segment: 1 or 2, 0 before the first visit.
        days: Days since the prompt, float32.
        visits: Visits opened since the prompt.
        effects: Of the vocabulary.
    """

    times: Tensor
    ages: Tensor
    visit_orders: Tensor
    visit_segments: Tensor
    days: Tensor
    visits: Tensor
    effects: TokenEffects

    def select(self, rows: Tensor) -> GenerationClock:
        """The clock of these rows, in this order."""
        parts = (self.times, self.ages, self.visit_orders, self.visit_segments, self.days, self.visits)
        times, ages, orders, segments, days, visits = (part[rows] for part in parts)
        return GenerationClock(times, ages, orders, segments, days, visits, self.effects)

    def step(self, tokens: Tensor) -> tuple[dict[str, Tensor], GenerationClock]:
        """One further token of each row, [b, 1]: its `CLOCK_CHANNELS`, each [b, 1], and the clock after it."""
        days = self.days + self.effects.days[tokens[:, 0]]
        visits = self.visits + self.effects.visits[tokens[:, 0]]
        return self._channels(tokens, days[:, None], visits[:, None]), replace(self, days=days, visits=visits)

    def follow(self, tokens: Tensor) -> dict[str, Tensor]:
        """`CLOCK_CHANNELS`, each [b, g], of further tokens [b, g]: the same as so many steps."""
        days = self.days[:, None] + self.effects.days[tokens].cumsum(1)
        visits = self.visits[:, None] + self.effects.visits[tokens].cumsum(1)
        return self._channels(tokens, days, visits)

    def _channels(self, tokens: Tensor, days: Tensor, visits: Tensor) -> dict[str, Tensor]:
        """Channels [b, g] of tokens, from days and visits between the prompt and each of them.

        As in the tokenizer's rows, an interval token has time, age and segment 0 and the order of the visit before it.
        """
        orders = (self.visit_orders[:, None] + visits).clamp(max=self.effects.last_order)
        # Segments alternate 1, 2, 1 ...; a history without a visit (0) starts with 1, as if a 2 had come before.
        before = torch.where(self.visit_segments == 0, 2, self.visit_segments)[:, None]
        segments = torch.where(visits == 0, self.visit_segments[:, None], (before - 1 + visits) % 2 + 1)
        interval = self.effects.days[tokens] > 0
        return {
            "token_type_ids": self.effects.types[tokens],
            "times": (self.times[:, None] + days / DAYS_PER_WEEK).masked_fill(interval, 0.0),
            "ages": _older(self.ages[:, None], days).masked_fill(interval, 0.0),
            "visit_orders": orders,
            "visit_segments": segments.masked_fill(interval, 0),
        }


def read_clock(
    effects: TokenEffects, input_ids: Tensor, channels: Mapping[str, Tensor], real: Tensor
) -> GenerationClock:
    """The clock at the end of a prompt.

    Args:
        effects: Of the vocabulary.
        input_ids: [b, l].
        channels: `CLOCK_CHANNELS`, each [b, l].
        real: bool [b, l], False at padding.

    Returns:
        The channels of the last token inside a visit (segment above 0), moved on by the interval tokens after it; all
        0 where a row has had no visit yet.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    inside = real & (channels["visit_segments"] > 0)
    last = torch.where(inside, positions, -1).amax(1)  # [b]
    begun = last >= 0

    def at_last(name: str) -> Tensor:
        values = channels[name].gather(1, last.clamp(min=0)[:, None]).squeeze(1)
        return torch.where(begun, values, torch.zeros_like(values))

    days = effects.days[input_ids].masked_fill(~real | (positions <= last[:, None]), 0.0).sum(1)
    return GenerationClock(
        times=at_last("times").float() + days / DAYS_PER_WEEK,
        ages=_older(at_last("ages").float(), days),
        visit_orders=at_last("visit_orders"),
        visit_segments=at_last("visit_segments"),
        days=torch.zeros_like(days),
        visits=torch.zeros_like(last),
        effects=effects,
    )


def _older(ages: Tensor, days: Tensor) -> Tensor:
    """Ages in years some days later; an age of 0, which tokenizers give to patients without a birth date, stays 0."""
    return torch.where(ages == 0, 0.0, ages + days / DAYS_PER_YEAR)


__all__ = ["CLOCK_CHANNELS", "DAYS_PER_WEEK", "DAYS_PER_YEAR", "GenerationClock", "TokenEffects", "read_clock"]

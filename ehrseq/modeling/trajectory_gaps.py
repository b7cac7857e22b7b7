"""How long until the token that was drawn: the law of the gap before it, with a time head and without.

A gap lies within a *window* [low, high): the span of an interval token where one came before, [elapsed, inf) where the
patient has been silent since the record's last event, else [0, inf).

Glossary: r rows, k tokens, g days, d hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .ehr_intervals import draw_interval, interval_spans, share_beyond
from .ehr_time_head import EhrTimeHead, draw_gap, share_within

if TYPE_CHECKING:
    from .modeling_ehrmamba import EhrMambaForCausalLM

HEAD_ROWS = 32
"""Rows of every call of the time head, filled up: products of matrices round otherwise for other numbers of rows."""


@dataclass
class Windows:
    """Where the next gap of each row lies, days after its latest event.

    Attributes:
        low: float64 [r].
        high: float64 [r], may be infinite.
        waiting: bool [r], whether an interval token came last.
    """

    low: np.ndarray
    high: np.ndarray
    waiting: np.ndarray

    def of(self, rows: np.ndarray | slice) -> Windows:
        """Those of some rows."""
        return Windows(self.low[rows], self.high[rows], self.waiting[rows])


class GapLaw:
    """The law of a model.

    Attributes:
        spans: Span of each interval token, float64 [V, 2], NaN for others.
        is_interval: bool [V].
        is_instant: bool [V], tokens that stand at their predecessor's time: [REG], which comes with [VE].
    """

    def __init__(self, model: EhrMambaForCausalLM):
        config = model.config
        specials = config.special_token_ids or {}
        self.spans = interval_spans(config).numpy()
        self.is_interval = ~np.isnan(self.spans[:, 0])
        self.is_instant = np.zeros(config.vocab_size, dtype=bool)
        if "[REG]" in specials:
            self.is_instant[specials["[REG]"]] = True
        self._head: EhrTimeHead | None = model.time_head
        self._concepts = model.model.embeddings.word_embeddings.weight
        if self._head is not None:
            self._edges = torch.tensor(config.time_edges, dtype=torch.float64, device=self._concepts.device)

    def draw(
        self, hidden: Tensor, tokens: np.ndarray, uniforms: Callable[[np.ndarray], np.ndarray], windows: Windows
    ) -> np.ndarray:
        """Days from the latest event to each drawn token, float64 [r].

        Args:
            hidden: States that the tokens were drawn from, [r, d].
            tokens: int64 [r].
            uniforms: Numbers of some rows -> random numbers in [0, 1), float64.
            windows: Of the rows.
        """
        gaps = np.zeros(len(tokens))
        head = self._head
        if head is None:
            rows = np.flatnonzero(windows.waiting)
            if len(rows):
                span = (windows.low[rows], windows.high[rows], uniforms(rows))
                gaps[rows] = draw_interval(*map(torch.from_numpy, span)).numpy()
            return gaps
        rows = np.flatnonzero(windows.waiting | ~(self.is_instant | self.is_interval)[tokens])
        if len(rows):
            index = torch.from_numpy(rows).to(hidden.device)
            next_ids = torch.from_numpy(tokens[rows]).to(hidden.device)
            log_probs = _in_blocks(head.log_probabilities, hidden[index], self._concepts[next_ids])
            parts = map(torch.from_numpy, (uniforms(rows), windows.low[rows], windows.high[rows]))
            gaps[rows] = draw_gap(log_probs.cpu(), self._edges.cpu(), *parts).numpy()
        return gaps

    def reached(self, hidden: Tensor, tokens: np.ndarray, windows: Windows, days: np.ndarray) -> np.ndarray:
        """Probability that a token's gap is at most some days, given that the token comes.

        Args:
            hidden: [r, d].
            tokens: int64 [k], no interval tokens.
            windows: Of the rows.
            days: After the row's latest event, float64 [r, g].

        Returns:
            float64 [r, k, g]; without a time head [r, 1, g], the same for all tokens.
        """
        reached = (days >= 0).astype(np.float64)[:, None]
        waiting, head = windows.waiting, self._head
        if head is None:
            if waiting.any():
                low, high = (torch.from_numpy(part[waiting])[:, None] for part in (windows.low, windows.high))
                reached[waiting, 0] = 1.0 - share_beyond(low, high, torch.from_numpy(days[waiting])).numpy()
            return reached
        concepts = self._concepts[torch.from_numpy(tokens).to(hidden.device)][None]
        edges = self._edges

        def by_head(states: Tensor, low: Tensor, high: Tensor, later: Tensor) -> Tensor:
            """[b, k, g] of states [b, d], windows [b] and days [b, g]."""
            probabilities = head.log_probabilities(states[:, None], concepts).double().softmax(-1)  # [b, k, bins]
            within = share_within(edges, low, high)  # [b, bins]
            # Up to a day and with it: a gap of exactly 0 is of the first instant.
            until = torch.minimum(torch.nextafter(later, torch.full_like(later, torch.inf)), high[:, None])
            days, starts = until.flatten(), low.repeat_interleave(later.shape[1])
            reached = share_within(edges, starts, days).view(*later.shape, -1)  # [b, g, bins]
            whole = (probabilities * within[:, None]).sum(-1)[..., None]
            part = probabilities @ reached.transpose(1, 2)
            # Where a window has no probability a gap is uniform over it, or its beginning where it has no end.
            begin, end = low[:, None], high[:, None]
            evenly = torch.where(end.isinf(), 1.0, ((later - begin) / (end - begin)).clamp(0.0, 1.0))
            evenly = torch.where(later < begin, 0.0, evenly)[:, None]
            return torch.where(whole > 0, part / whole, evenly).clamp(0.0, 1.0)

        parts = [torch.from_numpy(part).to(hidden.device) for part in (windows.low, windows.high, days)]
        at_once = (self.is_instant[tokens] & ~waiting[:, None])[..., None]
        return np.where(at_once, reached, _in_blocks(by_head, hidden, *parts).cpu().numpy())


def _in_blocks(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """A function of rows, always called with `HEAD_ROWS` of them: [r, ...] each -> [r, ...]."""
    results = []
    for first in range(0, len(rows[0]), HEAD_ROWS):
        parts = [tensor[first : first + HEAD_ROWS] for tensor in rows]
        missing = HEAD_ROWS - len(parts[0])
        if missing:
            parts = [torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) for part in parts]
        results.append(function(*parts)[: HEAD_ROWS - missing])
    return torch.cat(results)


__all__ = ["GapLaw", "Windows"]

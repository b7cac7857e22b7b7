"""What a causal model of events learns beside the next token: how long until it, and how long nothing has come.

The three losses are the parts of one negative log-likelihood of a record, each divided by the number of tokens that are
predicted:

    loss = token_loss + time_loss + silence_loss

- `time_loss`: of the bin of each gap between events (`ehr_time_head.py`).
- `silence_loss`: a record that ends with a closed visit is followed by silence up to the end of the data. That is no
  token, yet it says that the patient has not come back for so long. Without it a model sees only those intervals that
  ended with a visit, and believes that everybody comes back, and soon. The term is -log of the probability that the
  interval is longer than the silence: the sum over interval tokens of their probability times the share of their span
  that lies beyond it. Whoever died is not silent: such records have no term.

Glossary: b batch, l length, d hidden_size, V vocabulary, n gaps, s silences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .configuration_ehrmamba import EhrMambaConfig
from .ehr_intervals import interval_spans, log_share_beyond
from .ehr_time_head import EhrTimeHead, gap_bins, known_specials, share_within
from .risk_tasks import IGNORED_LABEL

DAYS_IN_WEEK = 7.0


@dataclass(frozen=True)
class EventGaps:
    """Gaps of a batch, one entry each.

    Attributes:
        rows, positions: Where the token stands at whose hidden state the gap is told, int64 [n].
        days: float64 [n].
        low, high: Span that the gap is known to lie in, [low, high), float64 [n]: that of the interval token between
            visits, [0, inf) inside a visit.
    """

    rows: Tensor
    positions: Tensor
    days: Tensor
    low: Tensor
    high: Tensor


def event_gaps(
    config: EhrMambaConfig,
    input_ids: Tensor,
    times: Tensor,
    visit_segments: Tensor,
    labels: Tensor,
    real: Tensor | None,
    starts: Tensor | None,
) -> EventGaps:
    """The gaps between consecutive timed tokens of one sequence whose second token is a target.

    [REG] comes with its [VE] and is none. The first visit of a sequence gives none after its [VS]: where a history was
    cut inside a visit, the [VS] was put back, and what lay between is missing.

    Args:
        config: With `special_token_ids`.
        input_ids: [b, l].
        times: Weeks, [b, l].
        visit_segments: [b, l], 0 for tokens outside visits.
        labels: [b, l], -100 = no target.
        real: bool [b, l], False at padding; None = no padding.
        starts: bool [b, l], True at the first token of each packed sequence; None = not packed.
    """
    tokens = known_specials(config)
    spans = interval_spans(config).to(input_ids.device)[input_ids]  # [b, l, 2]
    # 1. Which tokens follow one another: token t and t + 1 stand at column t.
    follows = labels[:, 1:] != IGNORED_LABEL
    if real is not None:
        follows = follows & real[:, 1:] & real[:, :-1]
    if starts is not None:
        follows = follows & ~starts[:, 1:]
    in_visit = visit_segments > 0
    opens = input_ids == tokens["[VS]"]
    is_interval = ~spans[..., 0].isnan()
    # 2. Inside a visit from token to token.
    after_interval = torch.zeros_like(opens)
    after_interval[:, 1:] = is_interval[:, :-1]
    told = in_visit & (~opens | after_interval)
    inside = follows & told[:, :-1] & in_visit[:, 1:] & (input_ids[:, 1:] != tokens.get("[REG]", -1))
    # 3. Between visits from the token before the interval to [VS].
    between = follows & is_interval[:, :-1] & opens[:, 1:]
    between[:, 0] = False
    between[:, 1:] &= in_visit[:, :-2]
    if real is not None:
        between[:, 1:] &= real[:, :-2]
    if starts is not None:
        between &= ~starts[:, :-1]

    rows, positions = (inside | between).nonzero(as_tuple=True)
    is_between = between[rows, positions]
    exact = times.double()
    before = exact[rows, torch.where(is_between, positions - 1, positions)]
    days = ((exact[rows, positions + 1] - before) * DAYS_IN_WEEK).clamp(min=0.0)
    low = torch.where(is_between, spans[rows, positions, 0], 0.0)
    high = torch.where(is_between, spans[rows, positions, 1], float("inf"))
    # Times of single precision are known to a few seconds; the token says exactly what whole day it was.
    days = torch.minimum(torch.maximum(days, low), torch.nextafter(high, low))
    return EventGaps(rows, positions, days, low, high)


def gap_loss(
    config: EhrMambaConfig, time_head: EhrTimeHead, hidden_states: Tensor, next_concepts: Tensor, gaps: EventGaps
) -> Tensor:
    """Sum over the gaps of -log probability of their bin, within the span that they are known to lie in.

    Args:
        config: With `time_edges`.
        time_head: The model's.
        hidden_states: [n, d], after the token before each gap (the interval token between visits).
        next_concepts: Word embeddings of the token after it, [n, d].
        gaps: The gaps.
    """
    edges = torch.tensor(config.time_edges, dtype=torch.float64, device=hidden_states.device)
    log_probs = time_head.log_probabilities(hidden_states, next_concepts)
    share = share_within(edges, gaps.low, gaps.high)
    inside = (log_probs + share.log().to(log_probs.dtype)).log_softmax(-1)
    return -inside.gather(1, gap_bins(edges, gaps.days)[:, None]).sum()


def silence_loss(config: EhrMambaConfig, logits: Tensor, silent_days: Tensor) -> Tensor:
    """Sum over silences of -log probability that the next interval is longer.

    Args:
        config: With `special_token_ids`.
        logits: Of the next token after each record's end, [s, V].
        silent_days: How long nothing came, [s], above 0.
    """
    spans = interval_spans(config).to(logits.device)
    ids = (~spans[:, 0].isnan()).nonzero().squeeze(1)  # [intervals]
    low, high = spans[ids].unbind(-1)
    beyond = log_share_beyond(low, high, silent_days.double()[:, None])  # [s, intervals]
    log_probs = logits.log_softmax(-1)[:, ids]
    return -(log_probs + beyond.to(log_probs.dtype)).logsumexp(-1).sum()


def check_silence(config: EhrMambaConfig, input_ids: Tensor, silent_days: Tensor, real: Tensor | None) -> None:
    """Refuse silences that cannot be; values are looked at on CPU only, as those of other channels.

    Raises:
        ValueError: Another shape than the ids', days that are negative or not finite, or days at another token than
            the [REG] of a closed visit.
    """
    tokens = known_specials(config)
    if silent_days.shape != input_ids.shape:
        raise ValueError(
            f"silent_days has shape {list(silent_days.shape)}, expected {list(input_ids.shape)} like the other "
            "channels: the days stand at the last token of a record, 0 elsewhere."
        )
    if silent_days.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not bool(torch.isfinite(silent_days).all()) or bool((silent_days < 0).any()):
        raise ValueError("silent_days holds negative, NaN or infinite values; expected days, 0 where nothing is known.")
    misplaced = (silent_days > 0) & (input_ids != tokens.get("[REG]", -1))
    if real is not None:
        misplaced |= (silent_days > 0) & ~real
    if bool(misplaced.any()):
        row, place = misplaced.nonzero()[0].tolist()
        raise ValueError(
            f"silent_days has {float(silent_days[row, place])} at token {place} of row {row}; expected days only at "
            "the [REG] behind a closed visit that ends its record."
        )


__all__ = ["EventGaps", "check_silence", "event_gaps", "gap_loss", "silence_loss"]

"""What classifiers of a patient's events are made of: which tokens are real, which one is read, and the head.

Glossary: b batch, l length (tokens), d hidden_size, S packed sequences of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_ehr_events import EhrEventConfig
from .ehr_embeddings import last_positions_of_segments, last_real_positions
from .risk_tasks import IGNORED_LABEL


class EventClassificationHead(nn.Module):
    """Dropout, dense, SiLU, dropout, projection to the classes."""

    def __init__(self, config: EhrEventConfig, num_labels: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        """[..., d] -> [..., num_labels]."""
        return self.out_proj(self.dropout(F.silu(self.dense(self.dropout(pooled)))))


def real_tokens(attention_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor | None:
    """Mask [b, l], bool, False at padding; None when there is none."""
    if segment_ids is not None:
        packed = segment_ids > 0
        return packed if attention_mask is None else packed & attention_mask.bool()
    if attention_mask is None:
        return None
    if attention_mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None  # spares the masking; asking costs nothing on CPU, and a synchronisation elsewhere
    return attention_mask.bool()


def pool_last_tokens(
    hidden_states: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, labels: Tensor | None
) -> Tensor:
    """Hidden state of each row's last real token [b, d], or of each packed sequence's last token [b, S, d].

    S is the width of `labels`, or the largest number of sequences in a row without labels.
    """
    return _pool(hidden_states, attention_mask, segment_ids, labels, from_behind=False)


def pool_first_tokens(
    hidden_states: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, labels: Tensor | None
) -> Tensor:
    """The same of the first real token, with a prompt the task token as well."""
    # The first token is the last one of what is read from behind.
    attention_mask = None if attention_mask is None else attention_mask.flip(1)
    segment_ids = None if segment_ids is None else segment_ids.flip(1)
    return _pool(hidden_states.flip(1), attention_mask, segment_ids, labels, from_behind=True)


def _pool(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    labels: Tensor | None,
    from_behind: bool,
) -> Tensor:
    if segment_ids is not None:
        most = int(segment_ids.max())
        num_segments = most if labels is None else labels.shape[-1]
        if most > num_segments:
            raise ValueError(
                f"A row packs {most} sequences, labels have room for {num_segments}: give labels [batch, sequences], "
                f"padded with {IGNORED_LABEL}."
            )
        return gather_tokens(hidden_states, last_positions_of_segments(segment_ids, num_segments))
    real = real_tokens(attention_mask, None)
    if real is None:
        return hidden_states[:, -1]
    length = hidden_states.shape[1]  # of a mask that covers the history as well, the end is meant
    last = last_real_positions(real[:, :length] if from_behind else real[:, -length:])
    if last.device.type == "cpu" and not torch.compiler.is_compiling() and bool((last < 0).any()):
        empty = (last < 0).nonzero().flatten().tolist()
        raise ValueError(f"Rows {empty} hold padding only (attention_mask is 0): there is nothing to classify.")
    return gather_tokens(hidden_states, last.clamp(min=0)[:, None]).squeeze(1)


def gather_tokens(states: Tensor, positions: Tensor) -> Tensor:
    """The states [b, l, d] at positions [b, m]: [b, m, d]."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


__all__ = [
    "EventClassificationHead",
    "gather_tokens",
    "pool_first_tokens",
    "pool_last_tokens",
    "real_tokens",
]

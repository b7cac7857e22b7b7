"""The embedding layer of EhrMamba: what a token is, when it happened, how old the patient was, and in which visit.

    e = tanh(W [concept; T2V(time difference); T2V(age)] + b) + type + visit order + visit segment, then dropout, then
    LayerNorm

Glossary (paper: arXiv:2405.14567, section 3): b batch, l length (tokens), d hidden_size, k time_embeddings_size.
Channels, all [b, l]: input_ids, token_type_ids, visit_orders, visit_segments int64; times float32, weeks; ages
float32, years; attention_mask 1 = real token, 0 = padding at either end; segment_ids int64, 0 = padding, 1 .. S = the
packed sequences in order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_ehr_events import EhrEventConfig
from .fast_linear import linear


class TimeEmbedding(nn.Module):
    """T2V(x) = sin(x w + phi), a learned periodic embedding of one number; no linear term, as in the paper's code."""

    def __init__(self, size: int):
        super().__init__()
        self.w = nn.Parameter(torch.empty(1, size))
        self.phi = nn.Parameter(torch.empty(1, size))

    def forward(self, x: Tensor) -> Tensor:
        """[b, l] -> [b, l, k]. At least float32: a time of 1000 weeks has no phase left in bfloat16."""
        dtype = torch.promote_types(self.w.dtype, torch.float32)
        return torch.sin(x.to(dtype)[..., None] * self.w.to(dtype) + self.phi.to(dtype))


class EhrEmbeddings(nn.Module):
    """Embedding layer of EhrMamba (and of the baselines compared with it)."""

    def __init__(self, config: EhrEventConfig):
        super().__init__()
        d, k = config.hidden_size, config.time_embeddings_size
        self.word_embeddings = nn.Embedding(config.vocab_size, d, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, d)
        self.visit_order_embeddings = nn.Embedding(config.max_num_visits, d)
        self.visit_segment_embeddings = nn.Embedding(config.visit_segment_size, d)
        self.time_embeddings = TimeEmbedding(k)
        self.age_embeddings = TimeEmbedding(k)
        self.projection = nn.Linear(d + 2 * k, d)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)

    @torch.no_grad()
    def let_history_speak(self, part: nn.Module, initializer_range: float) -> None:
        """Initialise one part of the layer for `config.initialization = "history_first"`; other modules are left alone.

        Concepts weigh more than time and age, whose sines are nearly the same for all tokens of a patient and would
        drown the concepts in a sum over tokens; and the embeddings are small beside what the blocks add to them. Of the
        product of concept and projection the concept is the small factor: an optimiser such as Adam, whose steps do not
        depend on a weight's size, then turns a concept ten times faster than one of order 1, and a model that starts
        from random concepts has little else to learn from. (Part by part, because transformers asks for no
        initialisation of a module without weights of its own.)

        Args:
            part: A module, perhaps of this layer.
            initializer_range: Standard deviation of the concepts, whose part of the projection is N(0, 1).
        """
        if part is self.word_embeddings:
            concepts = initializer_range * torch.randn_like(self.word_embeddings.weight)
            if self.word_embeddings.padding_idx is not None:
                concepts[self.word_embeddings.padding_idx] = 0.0
            init.copy_(self.word_embeddings.weight, concepts)
        elif part is self.projection:
            weight = torch.randn_like(self.projection.weight)
            weight[:, self.word_embeddings.embedding_dim :] *= 0.1 * initializer_range
            init.copy_(self.projection.weight, weight)
        elif part is self.layer_norm:
            init.constant_(self.layer_norm.weight, 0.1)

    def forward(
        self,
        concepts: Tensor,
        time_differences: Tensor,
        ages: Tensor,
        token_type_ids: Tensor,
        visit_orders: Tensor,
        visit_segments: Tensor,
    ) -> Tensor:
        """Embed one batch.

        Args:
            concepts: Word embeddings, [b, l, d].
            time_differences: Weeks since the previous token, [b, l] (see `time_differences`).
            ages: Years, [b, l].
            token_type_ids: [b, l].
            visit_orders: [b, l].
            visit_segments: [b, l].

        Returns:
            Embeddings [b, l, d].
        """
        # 1. What and when: concept, time difference and age, projected back to the width of the model.
        when = torch.cat([self.time_embeddings(time_differences), self.age_embeddings(ages)], dim=-1)  # [b, l, 2k]
        embeddings = torch.tanh(linear(self.projection, torch.cat([concepts, when.to(concepts.dtype)], dim=-1)))
        # 2. Where in the history.
        embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + self.visit_order_embeddings(visit_orders)
        embeddings = embeddings + self.visit_segment_embeddings(visit_segments)
        # 3. Dropout before the norm, as in the paper's code.
        return self.layer_norm(self.dropout(embeddings))


def time_differences(
    times: Tensor, real: Tensor | None = None, starts: Tensor | None = None, last_times: Tensor | None = None
) -> Tensor:
    """Weeks since the previous token of the same sequence.

    Args:
        times: Weeks, [b, l].
        real: bool [b, l], False at padding (at either end of a row); None when there is none.
        starts: bool [b, l], True at the first token of each packed sequence; None without packing.
        last_times: Time of the last token seen before this call, [b], NaN where there was none; None at the start.

    Returns:
        At least float32, [b, l]; 0 at the first real token of a row without a past and at each packed sequence's
        start. What stands at padding has no meaning.
    """
    times = times.to(torch.promote_types(times.dtype, torch.float32) if times.is_floating_point() else torch.float32)
    differences = torch.diff(times, dim=1, prepend=times[:, :1])
    if real is None:
        first = torch.zeros_like(times, dtype=torch.bool)
        first[:, 0] = True
    else:
        first = real & (real.cumsum(1) == 1)
    if last_times is None:
        since_past = torch.zeros_like(times)
    else:
        past = last_times.to(times.dtype)[:, None]
        since_past = torch.where(past.isnan(), 0.0, times - past)
    differences = torch.where(first, since_past, differences)
    return differences if starts is None else differences.masked_fill(starts, 0.0)


def segment_starts(segment_ids: Tensor) -> Tensor:
    """Bool [b, l], True at the first token of each packed sequence: segment_ids [b, l], 0 = padding."""
    before = torch.cat([torch.zeros_like(segment_ids[:, :1]), segment_ids[:, :-1]], dim=1)
    return (segment_ids != before) & (segment_ids > 0)


def last_real_positions(real: Tensor) -> Tensor:
    """Index of each row's last real token, int64 [b], -1 where a row has none: real bool [b, l]."""
    positions = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, positions, -1).amax(dim=1)


def last_positions_of_segments(segment_ids: Tensor, num_segments: int) -> Tensor:
    """Index of the last token of each packed sequence, int64 [b, S]; 0 where a row has fewer."""
    positions = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    last = positions.new_zeros(segment_ids.shape[0], num_segments + 1)
    return last.scatter_reduce(1, segment_ids, positions, "amax")[:, 1:]


def check_channels(config: EhrEventConfig, shape: tuple[int, int], **channels: Tensor | None) -> None:
    """Raise a ValueError that names the channel for a wrong shape, an id out of range or a value that is not finite.

    Values are looked at on CPU only: elsewhere that would wait for the device, and embedding lookups fail there by
    themselves.
    """
    if shape[1] == 0:
        raise ValueError("The inputs have no tokens: expected [batch, tokens] with at least one token a row.")
    sizes = {
        "input_ids": ("vocab_size", config.vocab_size),
        "token_type_ids": ("type_vocab_size", config.type_vocab_size),
        "visit_orders": ("max_num_visits", config.max_num_visits),
        "visit_segments": ("visit_segment_size", config.visit_segment_size),
    }
    for name, channel in channels.items():
        if channel is None:
            continue
        if channel.shape != shape:
            raise ValueError(
                f"{name} has shape {list(channel.shape)}, expected {list(shape)} like the other channels: pad and cut "
                "all channels together (tokenizer.pad does)."
            )
        if channel.device.type != "cpu" or channel.numel() == 0 or torch.compiler.is_compiling():
            continue
        if name in sizes:
            field, size = sizes[name]
            low, high = int(channel.min()), int(channel.max())
            if low < 0 or high >= size:
                raise ValueError(
                    f"{name} holds values from {low} to {high}, expected 0 .. {size - 1} (config.{field}={size})."
                )
        elif name in ("times", "ages") and not bool(torch.isfinite(channel).all()):
            raise ValueError(
                f"{name} holds NaN or infinite values: mend them before the model, they would spoil whole rows."
            )
        elif name == "segment_ids":
            check_segment_ids(channel)


def check_segment_ids(segment_ids: Tensor) -> None:
    """Packed sequences must be 1 .. S in order, each in one piece: otherwise tokens would be mixed silently."""
    starts = segment_starts(segment_ids)
    numbers = starts.cumsum(1).masked_fill(segment_ids <= 0, 0)
    if bool((numbers != segment_ids).any()):
        row = int((numbers != segment_ids).any(1).nonzero()[0])
        raise ValueError(
            f"segment_ids of row {row} are {segment_ids[row].unique_consecutive().tolist()}: expected 0 for padding "
            "and 1, 2, ... S in order, each sequence in one piece."
        )


__all__ = [
    "EhrEmbeddings",
    "TimeEmbedding",
    "check_channels",
    "check_segment_ids",
    "last_positions_of_segments",
    "last_real_positions",
    "segment_starts",
    "time_differences",
]

"""The CEHR-BERT baseline of EhrMamba's table: a bidirectional transformer over events with times (arXiv:2111.08585).

Glossary: b batch, l length (tokens), d hidden_size, n sequences (rows, or packed ones), m tokens of the longest. The
input channels are those of `EhrTokenizer`, all [b, l]: see ehr_embeddings.py.

    x^0 = e + position                           the embeddings, and a learned one of the place in the sequence
    x^k = BERT layer(x^(k-1))                    transformers' own; a sequence's tokens see that sequence and no padding
    r   = x^K at the first token                 with a prompt, the task's

Pretrained by masked language modelling (MLM, 15 % of the events), finetuned for one task or, prompted, for several.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer

from .configuration_cehrbert import CehrBertConfig, EventTransformerConfig
from .event_classification import pool_first_tokens, pool_last_tokens
from .event_encoder import EventEncoderModel, EventForMaskedLM, EventForSequenceClassification, EventPreTrainedModel


class PositionEmbedding(nn.Module):
    """A learned vector for each place in a sequence."""

    def __init__(self, config: EventTransformerConfig):
        super().__init__()
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Add them to [n, m, d].

        Raises:
            ValueError: A sequence longer than the model's context.
        """
        length, context = tokens.shape[1], self.position_embeddings.num_embeddings
        if length > context:
            raise ValueError(
                f"A sequence has {length} tokens, this model reads at most {context} "
                "(config.max_position_embeddings): tokenize with truncation=True and that max_length, which keeps the "
                "most recent events."
            )
        return tokens + self.position_embeddings.weight[:length]


class TransformerForSequenceClassification(EventForSequenceClassification):
    """The clinical head on an attention encoder, which reads the first token."""

    config: Any

    def pool(
        self, hidden_states: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        """Hidden state of the first token of each row or packed sequence, or of the last one (`config.pooling`)."""
        pool = pool_first_tokens if self.config.pooling == "first" else pool_last_tokens
        return pool(hidden_states, attention_mask, segment_ids, labels)


class CehrBertPreTrainedModel(EventPreTrainedModel):
    """What the Trainer and the Hub ask of every class of the family."""

    config: CehrBertConfig
    config_class = CehrBertConfig
    auto_classes = {
        "AutoModel": "CehrBertModel",
        "AutoModelForMaskedLM": "CehrBertForMaskedLM",
        "AutoModelForPreTraining": "CehrBertForMaskedLM",
        "AutoModelForSequenceClassification": "CehrBertForSequenceClassification",
    }
    supports_gradient_checkpointing = True
    _no_split_modules = ["BertLayer"]
    _supports_sdpa = True


class CehrBertModel(CehrBertPreTrainedModel, EventEncoderModel):
    """The EHR embedding layer with places, and BERT's layers."""

    _auto_class = "AutoModel"  # so that what saves it carries its code

    def __init__(self, config: CehrBertConfig):
        super().__init__(config)
        self.positions = PositionEmbedding(config)
        self.layers = nn.ModuleList(BertLayer(config, layer_idx=i) for i in range(config.num_hidden_layers))
        self.post_init()

    def encode(
        self, tokens: Tensor, lengths: Tensor, output_attentions: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The layers; fast attention kernels return no weights, so who asks for them gets the plain computation."""
        tokens = self.positions(tokens)
        mask = attention_bias(lengths, tokens)
        layers: Any = self.layers
        for layer in layers:
            if output_attentions:
                tokens, weights = plain_layer(layer, tokens, mask)
                yield tokens, weights
            else:
                tokens = layer(tokens, mask)
                yield tokens, None


def attention_bias(lengths: Tensor, tokens: Tensor) -> Tensor | None:
    """What padding adds to the attention scores, [n, 1, 1, m], or None where there is none."""
    length = tokens.shape[1]
    if int(lengths.min()) == length:
        return None
    padding = torch.arange(length) >= lengths[:, None]
    bias = tokens.new_zeros(len(lengths), 1, 1, length)
    return bias.masked_fill(padding[:, None, None].to(tokens.device), torch.finfo(tokens.dtype).min)


def plain_layer(layer: BertLayer, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A layer's output [n, m, d] and its attention weights [n, heads, m, m], those before their dropout."""
    attention = layer.attention.self
    shape = (*tokens.shape[:2], attention.num_attention_heads, attention.attention_head_size)
    queries, keys, values = (
        part(tokens).view(shape).transpose(1, 2) for part in (attention.query, attention.key, attention.value)
    )
    scores = queries @ keys.transpose(-1, -2) * attention.attention_head_size**-0.5
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    mixed = (attention.dropout(weights) @ values).transpose(1, 2).reshape(tokens.shape)
    return layer.feed_forward_chunk(layer.attention.output(mixed, tokens)), weights


class CehrBertForMaskedLM(CehrBertPreTrainedModel, EventForMaskedLM):
    """Masked events foretold from both sides."""

    _auto_class = "AutoModelForMaskedLM"  # so that what saves it carries its code

    def __init__(self, config: CehrBertConfig):
        EventForMaskedLM.__init__(self, config, CehrBertModel(config))


class CehrBertForSequenceClassification(CehrBertPreTrainedModel, TransformerForSequenceClassification):
    """The clinical head on CEHR-BERT."""

    _auto_class = "AutoModelForSequenceClassification"  # so that what saves it carries its code

    def __init__(self, config: CehrBertConfig):
        EventForSequenceClassification.__init__(self, config, CehrBertModel(config))


__all__ = [
    "CehrBertForMaskedLM",
    "CehrBertForSequenceClassification",
    "CehrBertModel",
    "CehrBertPreTrainedModel",
    "PositionEmbedding",
    "TransformerForSequenceClassification",
    "attention_bias",
    "plain_layer",
]

"""The bi-LSTM baseline of EhrMamba's table: bidirectional LSTM layers over the events of a patient's record.

Glossary: b batch, l length (tokens), d hidden_size, h = d / 2 each direction's width, n sequences (rows, or packed
ones), m tokens of the longest. The input channels are those of `EhrTokenizer`, all [b, l]: see ehr_embeddings.py.

    x^0 = e                                      the embeddings
    x^k = [forward LSTM(x^(k-1)); backward]      dropout before every layer but the first
    r   = [forward at the last token; backward at the first]

The classifier reads r, where both directions have seen the whole record; with a prompt these two tokens are the task's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .configuration_ehr_lstm import EhrLstmConfig
from .ehr_embeddings import EhrEmbeddings
from .event_classification import pool_first_tokens, pool_last_tokens
from .event_encoder import EventEncoderOutput, EventForSequenceClassification, EventPreTrainedModel, embed_events


class EhrLstmPreTrainedModel(EventPreTrainedModel):
    """Weights, initialisation and what the Hub asks of every class of the family."""

    config: EhrLstmConfig
    config_class = EhrLstmConfig
    auto_classes = {
        "AutoModel": "EhrLstmModel",
        "AutoModelForSequenceClassification": "EhrLstmForSequenceClassification",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As all baselines; LSTM weights uniform in +-1 / sqrt(h), the biases too, as torch has them."""
        super()._init_weights(module)
        if isinstance(module, nn.LSTM):
            bound = module.hidden_size**-0.5
            for weight in module.parameters():
                init.uniform_(weight, -bound, bound)


@dataclass
class _Sequences:
    """Where each real token stands among the sequences of a batch.

    Attributes:
        real: bool [b, l].
        sequence: Number of each real token's sequence, [tokens].
        place: Its place in that sequence, [tokens].
        lengths: Tokens of each sequence, [n], on the CPU.
    """

    real: Tensor
    sequence: Tensor
    place: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, real: Tensor, segment_ids: Tensor | None) -> _Sequences:
        """Rows without a token are no sequence; packed rows have one for each segment."""
        segments = torch.ones_like(real, dtype=torch.int64) if segment_ids is None else segment_ids
        row = torch.arange(real.shape[0], device=real.device)[:, None]
        owner = (row * (segments.amax() + 1) + segments)[real]  # rises from token to token
        _, sequence, lengths = torch.unique_consecutive(owner, return_inverse=True, return_counts=True)
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(len(owner), device=real.device) - starts[sequence]
        return cls(real, sequence, place, lengths.cpu())

    def take(self, tokens: Tensor) -> Tensor:
        """[b, l, d] -> [n, m, d], padded with 0 on the right."""
        out = tokens.new_zeros(len(self.lengths), int(self.lengths.max()), tokens.shape[-1])
        return out.index_put((self.sequence, self.place), tokens[self.real])

    def restore(self, tokens: Tensor) -> Tensor:
        """[n, m, d] -> [b, l, d], 0 at padding."""
        out = tokens.new_zeros(*self.real.shape, tokens.shape[-1])
        return out.masked_scatter(self.real[..., None], tokens[self.sequence, self.place])


class EhrLstmModel(EhrLstmPreTrainedModel):
    """The EHR embedding layer and the bidirectional layers."""

    def __init__(self, config: EhrLstmConfig):
        super().__init__(config)
        self.embeddings = EhrEmbeddings(config)
        self.layers = nn.ModuleList(
            nn.LSTM(config.hidden_size, config.direction_size, batch_first=True, bidirectional=True)
            for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        times: Tensor | None = None,
        ages: Tensor | None = None,
        visit_orders: Tensor | None = None,
        visit_segments: Tensor | None = None,
        segment_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> EventEncoderOutput:
        """Encode a batch of histories.

        Args:
            input_ids: Token ids, [b, l].
            attention_mask: 1 at real tokens, 0 at padding (on either side), [b, l]. None: no padding.
            token_type_ids: [b, l]. Like every channel below: None means 0 everywhere.
            times: Weeks since the first timed event, [b, l].
            ages: Years, [b, l].
            visit_orders: [b, l].
            visit_segments: [b, l].
            segment_ids: Several sequences packed into one row, [b, l], 0 = padding, 1 .. S = the sequences in order.
                They do not see each other.
            inputs_embeds: Concept embeddings in place of `input_ids`, [b, l, d].
            output_hidden_states: Return all hidden states.
            output_attentions: Accepted because callers pass it to any model; an LSTM has no attentions.

        Raises:
            ValueError: Channels of different shapes, ids out of range, values that are not finite, or nothing but
                padding.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        # 1. Embeddings, and each sequence in a row of its own, from the left.
        embedded = embed_events(
            self.embeddings,
            self.config,
            input_ids,
            inputs_embeds,
            attention_mask,
            segment_ids,
            token_type_ids=token_type_ids,
            times=times,
            ages=ages,
            visit_orders=visit_orders,
            visit_segments=visit_segments,
        )
        hidden_states = embedded.hidden_states
        everything = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        real = everything if embedded.real is None else embedded.real
        if not bool(real.any()):
            raise ValueError("All rows hold padding only (attention_mask is 0): there is nothing to read.")
        all_hidden_states = [hidden_states] if output_hidden_states else []
        sequences = _Sequences.of(real, segment_ids)
        tokens = sequences.take(hidden_states)

        # 2. The layers: packed, so that the backward direction starts at each sequence's own end.
        for number, layer in enumerate(self.layers):
            if number:
                tokens = F.dropout(tokens, self.config.lstm_dropout, self.training)
            packed = pack_padded_sequence(tokens, sequences.lengths, batch_first=True, enforce_sorted=False)
            tokens, _ = pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=tokens.shape[1])
            if output_hidden_states:
                all_hidden_states.append(sequences.restore(tokens))
        return EventEncoderOutput(
            last_hidden_state=sequences.restore(tokens),
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )


class EhrLstmForSequenceClassification(EhrLstmPreTrainedModel, EventForSequenceClassification):
    """The clinical head on the bi-LSTM: it reads the last state of each direction."""

    def __init__(self, config: EhrLstmConfig):
        EventForSequenceClassification.__init__(self, config, EhrLstmModel(config))

    def pool(
        self, hidden_states: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        """[forward at the last real token; backward at the first], [b, d] or [b, S, d]."""
        h = self.config.direction_size
        last = pool_last_tokens(hidden_states, attention_mask, segment_ids, labels)
        first = pool_first_tokens(hidden_states, attention_mask, segment_ids, labels)
        return torch.cat([last[..., :h], first[..., h:]], dim=-1)


__all__ = ["EhrLstmForSequenceClassification", "EhrLstmModel", "EhrLstmPreTrainedModel"]

"""The bi-LSTM baseline of EhrMamba's table: bidirectional LSTM layers over the events of a patient's record.

Glossary: b batch, l length (tokens), d hidden_size, h = d / 2 each direction's width, n sequences (rows, or packed
ones), m tokens of the longest. The input channels are those of `EhrTokenizer`, all [b, l]: see ehr_embeddings.py.

    x^0 = e                                      the embeddings
    x^k = [forward LSTM(x^(k-1)); backward]      dropout before every layer but the first
    r   = [forward at the last token; backward at the first]

The classifier reads r, where both directions have seen the whole record; with a prompt these two tokens are the task's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import initialization as init

from .configuration_ehr_lstm import EhrLstmConfig
from .event_classification import pool_first_tokens, pool_last_tokens
from .event_encoder import EventEncoderModel, EventForSequenceClassification, EventPreTrainedModel


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


class EhrLstmModel(EhrLstmPreTrainedModel, EventEncoderModel):
    """The EHR embedding layer and the bidirectional layers."""

    _auto_class = "AutoModel"  # so that what saves it carries its code

    def __init__(self, config: EhrLstmConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            nn.LSTM(config.hidden_size, config.direction_size, batch_first=True, bidirectional=True)
            for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    def encode(self, tokens: Tensor, lengths: Tensor, output_attentions: bool) -> Iterator[tuple[Tensor, None]]:
        """The layers, on packed sequences, so that the backward direction starts at each one's own end.

        An LSTM has no attention weights; callers ask any model for them.
        """
        for number, layer in enumerate(self.layers):
            if number:
                tokens = F.dropout(tokens, self.config.lstm_dropout, self.training)
            packed = pack_padded_sequence(tokens, lengths, batch_first=True, enforce_sorted=False)
            tokens, _ = pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=tokens.shape[1])
            yield tokens, None


class EhrLstmForSequenceClassification(EhrLstmPreTrainedModel, EventForSequenceClassification):
    """The clinical head on the bi-LSTM: it reads the last state of each direction."""

    _auto_class = "AutoModelForSequenceClassification"  # so that what saves it carries its code

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

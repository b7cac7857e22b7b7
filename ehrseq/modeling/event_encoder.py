"""What the baselines on EhrMamba's embedding layer share: inputs, initialisation, and the prompted classifier.

A baseline is a configuration (an `EhrEventConfig`) and an encoder; the table of the paper (EhrMamba, arXiv:2405.14567)
compares them on equal embeddings. Glossary: b batch, l length (tokens), d hidden_size, S packed sequences of a row. The
input channels are those of `EhrTokenizer`, all [b, l]: see ehr_embeddings.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_ehr_events import EhrEventConfig
from .ehr_embeddings import EhrEmbeddings, TimeEmbedding, check_channels, segment_starts, time_differences
from .event_classification import EventClassificationHead, EventClassifierMixin, pool_last_tokens, real_tokens
from .hub_mixin import EhrHubMixin
from .risk_tasks import RiskScoresMixin


@dataclass
class EventEncoderOutput(ModelOutput):
    """Output of an encoder of events.

    Attributes:
        last_hidden_state: [b, l, d].
        hidden_states: Embeddings, then the output of each layer: layers + 1 tensors [b, l, d].
        attentions: Weights of each layer that has attention.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class EventSequenceClassifierOutput(ModelOutput):
    """Output of a classifier of events.

    Attributes:
        loss: When `labels` are given.
        logits: [b, num_labels], or [b, S, num_labels] for packed rows; float32. Class 1 is the positive outcome.
        hidden_states: As in `EventEncoderOutput`.
        attentions: As in `EventEncoderOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class EventPreTrainedModel(EhrHubMixin, PreTrainedModel):
    """Initialisation and what the Trainer and the Hub ask of every class."""

    config: EhrEventConfig
    base_model_prefix = "model"
    _input_embed_layer = "word_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings and linear layers N(0, initializer_range) with zero biases and a zero [PAD] concept, norms at 1
        and 0 (all by the base class), Xavier-uniform time embeddings.
        """
        super()._init_weights(module)
        if isinstance(module, TimeEmbedding):
            init.xavier_uniform_(module.w)
            init.xavier_uniform_(module.phi)


@dataclass
class EmbeddedEvents:
    """What an encoder starts from.

    Attributes:
        hidden_states: Embeddings, [b, l, d].
        real: bool [b, l], False at padding; None where there is none.
    """

    hidden_states: Tensor
    real: Tensor | None


def embed_events(
    embeddings: EhrEmbeddings,
    config: EhrEventConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    **channels: Tensor | None,
) -> EmbeddedEvents:
    """Check the channels of a batch and embed them.

    Args:
        embeddings: The embedding layer.
        config: Its configuration.
        input_ids: Token ids, [b, l], or None with `inputs_embeds`, concept embeddings [b, l, d].
        inputs_embeds: See there.
        attention_mask: 1 at real tokens, [b, l]; None: no padding.
        segment_ids: Packed sequences, [b, l]; None: one a row.
        channels: token_type_ids, times, ages, visit_orders, visit_segments, [b, l] each; None means 0 everywhere.

    Raises:
        ValueError: As `check_channels`; both or none of `input_ids` and `inputs_embeds`.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    shape = (given.shape[0], given.shape[1] if given.dim() > 1 else 0)
    masks = {"attention_mask": attention_mask, "segment_ids": segment_ids}
    check_channels(config, shape, input_ids=input_ids, **masks, **channels)
    nothing = torch.zeros(shape, dtype=torch.int64, device=given.device)
    values = {name: nothing if channel is None else channel for name, channel in channels.items()}
    concepts = embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
    real = real_tokens(attention_mask, segment_ids)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    differences = time_differences(values.pop("times"), real, starts)
    return EmbeddedEvents(embeddings(concepts, differences, **values), real)


class EventForSequenceClassification(EventClassifierMixin, RiskScoresMixin, EventPreTrainedModel):
    """One head for prompted tasks on any encoder; class 1 is the task's positive outcome.

    Subclasses make `self.model`, and may read another token than the last one (`pool`).
    """

    accepts_loss_kwargs = False  # Trainer divides by the accumulation steps itself

    def __init__(self, config: EhrEventConfig, encoder: nn.Module):
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.model = encoder
        self.classifier = EventClassificationHead(config, self.num_labels)
        self.post_init()

    def pool(
        self, hidden_states: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        """What the head reads, [b, d] or [b, S, d]: the hidden state of the last real token, the task token."""
        return pool_last_tokens(hidden_states, attention_mask, segment_ids, labels)

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
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> EventSequenceClassifierOutput:
        """Classify each row (or each packed sequence); the channels are those of the encoder.

        Args:
            labels: Classes int64 [b], or [b, S] padded with -100 for packed rows. With another `config.problem_type`,
                the targets that transformers' loss of that name takes.
            task_ids: Index of each row's task in `config.tasks`, [b]. Unused: it is here so that Trainer keeps the
                column for metrics per task (`label_names=["labels", "task_ids"]`).
        """
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(
                input_ids, attention_mask if segment_ids is None else segment_ids.clamp(max=1)
            )
        encoder: Any = self.model
        outputs = encoder(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            times=times,
            ages=ages,
            visit_orders=visit_orders,
            visit_segments=visit_segments,
            segment_ids=segment_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        pooled = self.pool(outputs.last_hidden_state, attention_mask, segment_ids, labels)
        logits = self.classifier(pooled).float()
        return EventSequenceClassifierOutput(
            loss=None if labels is None else self.classification_loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "EmbeddedEvents",
    "EventEncoderOutput",
    "EventForSequenceClassification",
    "EventPreTrainedModel",
    "EventSequenceClassifierOutput",
    "embed_events",
]

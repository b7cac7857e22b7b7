"""What all models over a patient's events share: inputs, initialisation, and the heads.

A model of the table of the paper (EhrMamba, arXiv:2405.14567) is a configuration (an `EhrEventConfig`) and the layers
of an encoder, compared on equal embeddings. EhrMamba's own encoder (modeling_ehrmamba.py) reads padded and packed rows
as they are and adds a state to all outputs; the baselines' layers see one sequence at a time (`EventEncoderModel`).

Glossary: b batch, l length (tokens), d hidden_size, S packed sequences of a row, n sequences of the batch (rows, or
packed ones), m tokens of the longest. The input channels are those of `EhrTokenizer`, all [b, l]: see
ehr_embeddings.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_ehr_events import EhrEventConfig
from .ehr_embeddings import EhrEmbeddings, TimeEmbedding, check_channels, segment_starts, time_differences
from .event_classification import EventClassificationHead, gather_tokens, pool_last_tokens, real_tokens
from .hub_mixin import EhrHubMixin
from .risk_tasks import IGNORED_LABEL, RiskScoresMixin


@dataclass
class EventEncoderOutput(ModelOutput):
    """Output of an encoder of events.

    Attributes:
        last_hidden_state: [b, l, d].
        hidden_states: Embeddings, then the output of each layer: layers + 1 tensors [b, l, d].
        attentions: Weights of each layer that has attention, [n, heads, m, m]: each sequence stands in a row of its
            own, from the left (for rows padded on the right, and without packing, that is [b, heads, l, l]).
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class EventMaskedLMOutput(ModelOutput):
    """Output of a masked language model of events.

    Attributes:
        loss: Mean cross-entropy of the masked tokens, when `labels` are given.
        logits: [b, l, vocab_size].
        hidden_states: As in `EventEncoderOutput`.
        attentions: As in `EventEncoderOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class EventSequenceClassifierOutput(ModelOutput):
    """Output of a classifier of events.

    Attributes:
        loss: When `labels` are given.
        logits: [b, num_labels], or [b, S, num_labels] for packed rows, at least float32. Class 1 is the positive
            outcome.
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
class EventInputs:
    """The checked inputs of a batch.

    Attributes:
        concepts: Concept embeddings, [b, l, d].
        channels: token_type_ids, times, ages, visit_orders, visit_segments, [b, l] each.
        real: bool [b, l], False at padding; None where there is none.
        starts: bool [b, l], True at the first token of each packed sequence; None without packing.
    """

    concepts: Tensor
    channels: dict[str, Tensor]
    real: Tensor | None
    starts: Tensor | None

    @classmethod
    def of(
        cls,
        embeddings: EhrEmbeddings,
        config: EhrEventConfig,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        times: Tensor | None,
        ages: Tensor | None,
        visit_orders: Tensor | None,
        visit_segments: Tensor | None,
        segment_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> EventInputs:
        """Check the first arguments of a `forward`, which has them in this order and says what they are.

        Args:
            embeddings: The embedding layer.
            config: Its configuration.

        Raises:
            ValueError: As `check_channels`; both or none of `input_ids` and `inputs_embeds`.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        shape = (tokens.shape[0], tokens.shape[1] if tokens.dim() > 1 else 0)
        masks = {"attention_mask": attention_mask, "segment_ids": segment_ids}
        channels = {
            "token_type_ids": token_type_ids,
            "times": times,
            "ages": ages,
            "visit_orders": visit_orders,
            "visit_segments": visit_segments,
        }
        check_channels(config, shape, input_ids=input_ids, **masks, **channels)
        nothing = torch.zeros(shape, dtype=torch.int64, device=tokens.device)
        return cls(
            embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds,
            {name: nothing if channel is None else channel for name, channel in channels.items()},
            real_tokens(attention_mask, segment_ids),
            None if segment_ids is None else segment_starts(segment_ids),
        )

    def ordered(self, order: Tensor) -> EventInputs:
        """The same tokens with those at positions `order` [b, l] in this order; rows must not be packed."""
        channels = {name: channel.gather(1, order) for name, channel in self.channels.items()}
        real = None if self.real is None else self.real.gather(1, order)
        return EventInputs(gather_tokens(self.concepts, order), channels, real, self.starts)

    def embed(self, embeddings: EhrEmbeddings, last_times: Tensor | None = None) -> Tensor:
        """Embeddings [b, l, d] of tokens that follow others, the last of them at `last_times` [b]."""
        others = {name: channel for name, channel in self.channels.items() if name != "times"}
        differences = time_differences(self.channels["times"], self.real, self.starts, last_times)
        return embeddings(self.concepts, differences, **others)


@dataclass
class EventSequences:
    """The sequences of a batch, each in a row of its own and from the left.

    Padding on either side and packed rows then are one and the same to a layer.

    Attributes:
        real: bool [b, l], False at padding.
        sequence: Number of each real token's sequence, [tokens].
        place: Its place in that sequence, [tokens].
        lengths: Tokens of each sequence, [n], on the CPU.
    """

    real: Tensor
    sequence: Tensor
    place: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, real: Tensor, segment_ids: Tensor | None) -> EventSequences:
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


class EventModel(EventPreTrainedModel):
    """The EHR embedding layer, under whatever layers a subclass makes after it."""

    def __init__(self, config: EhrEventConfig):
        super().__init__(config)
        self.embeddings = EhrEmbeddings(config)


class EventEncoderModel(ABC, EventModel):
    """A model whose layers see one sequence at a time; subclasses run them in `encode`."""

    @abstractmethod
    def encode(
        self, tokens: Tensor, lengths: Tensor, output_attentions: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Run the layers one after the other.

        Args:
            tokens: Embeddings of the sequences, [n, m, d], padded on the right.
            lengths: Tokens of each sequence, int64 [n], on the CPU.
            output_attentions: Whether attention weights are asked for.

        Yields:
            Of each layer its output [n, m, d], and its attention weights [n, heads, m, m] or None.
        """

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
            output_attentions: Return the attention weights of the layers that have attention.

        Raises:
            ValueError: Channels of different shapes, ids out of range, values that are not finite, or nothing but
                padding.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)
        # 1. Embeddings.
        tokens = (input_ids, attention_mask, token_type_ids, times, ages)
        visits = (visit_orders, visit_segments, segment_ids, inputs_embeds)
        inputs = EventInputs.of(self.embeddings, self.config, *tokens, *visits)
        hidden_states = inputs.embed(self.embeddings)
        real = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool) if inputs.real is None else inputs.real
        if not bool(real.any()):
            raise ValueError("All rows hold padding only (attention_mask is 0): there is nothing to read.")
        all_hidden_states, attentions = [hidden_states], []

        # 2. Each sequence in a row of its own through the layers, and back to where it stood.
        sequences = EventSequences.of(real, segment_ids)
        encoded = sequences.take(hidden_states)
        for layer_output, weights in self.encode(encoded, sequences.lengths, output_attentions):
            encoded = layer_output
            if output_hidden_states:
                all_hidden_states.append(sequences.restore(encoded))
            if weights is not None:
                attentions.append(weights)
        return EventEncoderOutput(
            last_hidden_state=sequences.restore(encoded),
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if attentions else None,
        )


class EventMaskedLMHead(nn.Module):
    """Dense, GELU, LayerNorm, projection to the vocabulary: BERT's head, its weights its own."""

    def __init__(self, config: EhrEventConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [..., vocab_size]."""
        return self.decoder(self.layer_norm(F.gelu(self.dense(hidden_states))))


class EventForMaskedLM(EventPreTrainedModel):
    """Masked-language-model pretraining (MLM) of an encoder: which events stood where [MASK] stands now.

    Subclasses make `self.model`. `DataCollatorForMaskedEvents` of ehrseq.data makes such batches.
    """

    accepts_loss_kwargs = False  # Trainer divides by the accumulation steps itself

    def __init__(self, config: EhrEventConfig, encoder: nn.Module):
        super().__init__(config)
        self.model = encoder
        self.head = EventMaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The projection to the vocabulary."""
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace it (resizing of the vocabulary does)."""
        self.head.decoder = new_embeddings

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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> EventMaskedLMOutput:
        """Predict the token at every place; the channels are those of the encoder.

        Args:
            labels: The tokens that were masked, int64 [b, l], -100 elsewhere. A batch without any has loss 0.
        """
        tokens = (input_ids, attention_mask, token_type_ids, times, ages)
        visits = (visit_orders, visit_segments, segment_ids, inputs_embeds)
        outputs = self.model(*tokens, *visits, output_hidden_states, output_attentions)
        logits = self.head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:-1]:
                raise ValueError(
                    f"labels have shape {list(labels.shape)}, expected {list(logits.shape[:-1])}, one for each token."
                )
            asked = labels != IGNORED_LABEL
            total = F.cross_entropy(logits[asked].float(), labels[asked], reduction="sum")
            loss = total / asked.sum().clamp(min=1)
        return EventMaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class EventForSequenceClassification(RiskScoresMixin, EventPreTrainedModel):
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

    def classify(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        segment_ids: Tensor | None,
        labels: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:
        """(loss where there are labels, logits, at least float32) from what the encoder made of these, [b, l, d]."""
        if input_ids is not None:
            mask = attention_mask if segment_ids is None else segment_ids.clamp(max=1)
            self.warn_if_padding_and_no_attention_mask(input_ids, mask)
        logits = self.classifier(self.pool(hidden_states, attention_mask, segment_ids, labels))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return None if labels is None else self.classification_loss(logits, labels), logits

    def classification_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted cross-entropy over the classes, or transformers' loss of another `config.problem_type`."""
        classes = not labels.is_floating_point() and self.num_labels > 1
        if self.config.problem_type not in (None, "single_label_classification") or not classes:
            return self.loss_function(labels=labels, logits=logits, pooled_logits=logits, config=self.config)
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels have shape {list(labels.shape)}, expected one label for each of the "
                f"{list(logits.shape[:-1])} rows (packed: [batch, sequences])."
            )
        weights = self.config.class_weights
        return F.cross_entropy(
            logits.reshape(-1, self.num_labels),
            labels.reshape(-1).long(),
            weight=None if weights is None else logits.new_tensor(weights),
            ignore_index=IGNORED_LABEL,
        )

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
        tokens = (input_ids, attention_mask, token_type_ids, times, ages)
        visits = (visit_orders, visit_segments, segment_ids, inputs_embeds)
        outputs = self.model(*tokens, *visits, output_hidden_states, output_attentions)
        loss, logits = self.classify(outputs.last_hidden_state, input_ids, attention_mask, segment_ids, labels)
        return EventSequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


__all__ = [
    "EventEncoderModel",
    "EventEncoderOutput",
    "EventForMaskedLM",
    "EventForSequenceClassification",
    "EventInputs",
    "EventMaskedLMOutput",
    "EventModel",
    "EventPreTrainedModel",
    "EventSequenceClassifierOutput",
    "EventSequences",
]

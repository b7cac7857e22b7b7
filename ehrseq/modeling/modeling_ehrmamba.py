"""EhrMamba: a Mamba over the events of a patient's record (arXiv:2405.14567), its forecasting head and its clinical
head.

Glossary: b batch, l length (tokens), d hidden_size, S packed sequences of a row, V vocab_size. The input channels are
    those of
`EhrTokenizer`, all [b, l]: see ehr_embeddings.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_ehrmamba import EhrMambaConfig
from .ehr_embeddings import EhrEmbeddings, last_real_positions, segment_starts
from .ehr_gap_losses import check_silence, event_gaps, gap_loss, silence_loss
from .ehr_time_head import EhrTimeHead
from .ehrmamba_branches import branch_states
from .ehrmamba_cache import EhrMambaCache
from .ehrmamba_forecasts import EhrMambaForecastMixin
from .ehrmamba_generation import EhrMambaGenerationMixin
from .event_classification import gather_tokens, real_tokens
from .event_encoder import EventForSequenceClassification, EventInputs, EventModel, EventPreTrainedModel
from .fast_linear import linear
from .fast_step import step_blocks
from .mamba_block import EhrMambaBlock, EhrMambaMixer, EhrMambaRMSNorm, at_least_float32
from .risk_prefixes import check_prefixes
from .risk_tasks import IGNORED_LABEL


@dataclass
class EhrMambaOutput(ModelOutput):
    """Output of `EhrMambaModel`.

    Attributes:
        last_hidden_state: After the final norm, [b, l, d].
        cache_params: State after each row's last real token, when `use_cache`.
        hidden_states: Embeddings, then the output of each block, the last one after the final norm: layers + 1 tensors
            [b, l, d].
    """

    last_hidden_state: Tensor | None = None
    cache_params: EhrMambaCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class EhrMambaCausalLMOutput(ModelOutput):
    """Output of `EhrMambaForCausalLM`.

    Attributes:
        loss: Cross-entropy of the next token, when `labels` are given; with a time head or silences the sum of the
            three parts below (`ehr_gap_losses.py`).
        logits: [b, l, V], float32.
        cache_params: As in `EhrMambaOutput`.
        hidden_states: As in `EhrMambaOutput`.
        token_loss: Cross-entropy of the next token, where the loss has other parts.
        time_loss: That of the gaps, with a time head.
        silence_loss: That of what did not come, with `silent_days`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: EhrMambaCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    token_loss: Tensor | None = None
    time_loss: Tensor | None = None
    silence_loss: Tensor | None = None


@dataclass
class EhrMambaSequenceClassifierOutput(ModelOutput):
    """Output of `EhrMambaForSequenceClassification`.

    Attributes:
        loss: When `labels` are given.
        logits: [b, num_labels], or [b, S, num_labels] for packed rows, at least float32. Class 1 is the positive
            outcome.
        cache_params: As in `EhrMambaOutput`.
        hidden_states: As in `EhrMambaOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: EhrMambaCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class EhrMambaPreTrainedModel(EventPreTrainedModel):
    """Weights, initialisation and what the Trainer and the Hub ask of every EhrMamba class."""

    config: EhrMambaConfig
    config_class = EhrMambaConfig
    auto_classes = {
        "AutoModel": "EhrMambaModel",
        "AutoModelForCausalLM": "EhrMambaForCausalLM",
        "AutoModelForPreTraining": "EhrMambaForCausalLM",
        "AutoModelForSequenceClassification": "EhrMambaForSequenceClassification",
    }
    supports_gradient_checkpointing = True
    _no_split_modules = ["EhrMambaBlock"]
    _is_stateful = True  # the state cannot be rolled back: no assisted decoding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The paper's initialisation, or `config.initialization`.

        Embeddings, heads and norms as in all models of events, the mixer as in `EhrMambaMixer.reset_parameters`. A
        module comes after its parts, so the mixer has the last word on its projections.
        """
        super()._init_weights(module)
        if isinstance(module, EhrMambaMixer):
            module.reset_parameters()
        elif self.config.initialization == "history_first":
            embeddings = cast(EhrEmbeddings, self.base_model.embeddings)
            embeddings.let_history_speak(module, self.config.initializer_range)


class EhrMambaModel(EhrMambaPreTrainedModel, EventModel):
    """The EHR embedding layer, the Mamba blocks and a final norm."""

    _auto_class = "AutoModel"  # so that what saves it carries its code

    def __init__(self, config: EhrMambaConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(EhrMambaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm_f = EhrMambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
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
        cache_params: EhrMambaCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> EhrMambaOutput:
        """Encode a batch of histories.

        Args:
            input_ids: Token ids, [b, l].
            attention_mask: 1 at real tokens, 0 at padding (on either side), [b, l]. None: no padding. With
                `cache_params` it may cover the history as well (as `generate` makes it): its end is read.
            token_type_ids: [b, l]. Like every channel below: None means 0 everywhere.
            times: Weeks since the first timed event, [b, l]; the model takes their differences itself.
            ages: Years, [b, l].
            visit_orders: [b, l].
            visit_segments: [b, l].
            segment_ids: Several sequences packed into one row, [b, l], 0 = padding, 1 .. S = the sequences in order.
                They do not see each other; the outcome equals that of unpacked rows.
            inputs_embeds: Concept embeddings in place of `input_ids`, [b, l, d]. The other channels are added as
                always.
            cache_params: State to continue from; with `use_cache` it is updated in place.
            use_cache: Return the state. Default: `config.use_cache`, but never in training, nor for packed rows.
            output_hidden_states: Return all hidden states.
            output_attentions: Accepted because callers such as PEFT pass it to any model; a Mamba has no attentions.

        Raises:
            ValueError: channels of different shapes, ids out of range, values that are not finite, a state of another
                batch size, or a cache together with packed rows.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and segment_ids is None
        if use_cache and self.gradient_checkpointing and self.training:
            use_cache = False  # the recomputation would advance the state a second time

        # 1. Inputs: what is padding, where packed sequences start.
        if attention_mask is not None and cache_params is not None:
            shown = input_ids if input_ids is not None else inputs_embeds
            attention_mask = attention_mask if shown is None else attention_mask[:, -shown.shape[1] :]
        tokens = (input_ids, attention_mask, token_type_ids, times, ages)
        visits = (visit_orders, visit_segments, segment_ids, inputs_embeds)
        inputs = EventInputs.of(self.embeddings, self.config, *tokens, *visits)
        batch, length = inputs.concepts.shape[:2]
        if cache_params is not None:
            cache_params.check_fits(self.config)
        if cache_params is not None and cache_params.batch_size != batch:
            raise ValueError(f"cache_params holds {cache_params.batch_size} rows, the inputs {batch}: they must match.")
        if segment_ids is not None and (use_cache or cache_params is not None):
            raise ValueError(
                "Packed rows (segment_ids) have no single state: give no cache_params, and use_cache=False."
            )

        # 2. A continued row must follow its past without a gap: real tokens move to the front, outputs back at the end.
        order = None
        if inputs.real is not None and cache_params is not None and cache_params.seen_tokens > 0:
            order = torch.argsort(~inputs.real, dim=1, stable=True)
            inputs = inputs.ordered(order)
        real, starts = inputs.real, inputs.starts

        # 3. Embeddings.
        hidden_states = inputs.embed(self.embeddings, None if cache_params is None else cache_params.last_times)
        all_hidden_states = [hidden_states] if output_hidden_states else []

        # 4. Blocks: all at once where that is possible, a single token that continues a state.
        lengths = last_real_positions(real) + 1 if real is not None and use_cache else None  # only the state needs it
        stepped = None
        if length == 1 and use_cache and cache_params is not None and not self.training and not output_hidden_states:
            stepped = step_blocks(self.layers, hidden_states, real, cache_params)
        new_states = []
        for index, block in enumerate(self.layers if stepped is None else ()):
            state = None
            if cache_params is not None:
                state = (cache_params.conv_states[index], cache_params.ssm_states[index])
            hidden_states, new_state = block(hidden_states, state, real, starts, lengths, use_cache)
            new_states.append(new_state)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
        hidden_states = self.norm_f(hidden_states if stepped is None else stepped)
        if output_hidden_states:
            all_hidden_states[-1] = hidden_states

        # 5. State after each row's last real token.
        if use_cache:
            if cache_params is None:
                concepts = inputs.concepts
                cache_params = EhrMambaCache(self.config, batch, dtype=concepts.dtype, device=concepts.device)
            newest = _last_times(inputs.channels["times"], lengths, cache_params)
            if stepped is None:
                conv_states, ssm_states = (torch.stack(states) for states in zip(*new_states, strict=True))
                cache_params.update(conv_states, ssm_states, newest, length)
            else:
                cache_params.advance(newest, length)

        if order is not None:
            back = torch.argsort(order, dim=1)
            hidden_states = gather_tokens(hidden_states, back)
            all_hidden_states = [gather_tokens(states, back) for states in all_hidden_states]
        return EhrMambaOutput(
            last_hidden_state=hidden_states,
            cache_params=cache_params if use_cache else None,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )


class EhrMambaForCausalLM(EhrMambaPreTrainedModel, EhrMambaForecastMixin, EhrMambaGenerationMixin):
    """Next-token prediction: pretraining, and forecasting with `trajectories`, `forecast` and `generate`.

    The head is not tied to the embeddings. With `config.time_edges` there is a `time_head` as well, which tells when
    the next token comes.
    """

    _auto_class = "AutoModelForCausalLM"  # so that what saves it carries its code

    def __init__(self, config: EhrMambaConfig):
        super().__init__(config)
        self.model = EhrMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.time_head = None if config.time_edges is None else EhrTimeHead(config)
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
        labels: Tensor | None = None,
        cache_params: EhrMambaCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        silent_days: Tensor | None = None,
        **loss_kwargs: Any,
    ) -> EhrMambaCausalLMOutput:
        """Predict each next token; the channels and the cache are those of `EhrMambaModel.forward`.

        Args:
            labels: Usually the input ids, [b, l], -100 = no target; they are shifted inside. Padding and the first
                token of a row or packed sequence are never targets, whatever stands there.
            logits_to_keep: Compute logits of the last tokens only (a number, 0 = all), or of these positions.
            silent_days: Float [b, l], for the loss: at the [REG] that ends a record the days in which nothing came
                until the end of the data, 0 at all other tokens and where that is not known (or the patient died).
            loss_kwargs: Passed on to the loss, such as Trainer's `num_items_in_batch`, by which gradient accumulation
                over rows of different length stays exact.
        """
        tokens = (input_ids, attention_mask, token_type_ids, times, ages)
        visits = (visit_orders, visit_segments, segment_ids, inputs_embeds)
        outputs = self.model(*tokens, *visits, cache_params, use_cache, output_hidden_states)
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = linear(self.lm_head, hidden_states).float()

        losses: dict[str, Tensor] = {}
        if labels is not None:
            real = real_tokens(attention_mask, segment_ids)
            if real is not None:
                real = real[:, -labels.shape[1] :]
                labels = labels.masked_fill(~real | (real.cumsum(1) == 1), IGNORED_LABEL)
            starts = None if segment_ids is None else segment_starts(segment_ids)
            if starts is not None:
                labels = labels.masked_fill(starts, IGNORED_LABEL)
            vocab_size = self.config.vocab_size
            losses["loss"] = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **loss_kwargs)
            if self.time_head is not None or silent_days is not None:
                states = outputs.last_hidden_state
                channels = {"input_ids": input_ids, "times": times, "visit_segments": visit_segments}
                items = loss_kwargs.get("num_items_in_batch")
                losses |= self._losses_of_time(
                    losses["loss"], states, channels, labels, real, starts, silent_days, items
                )
        return EhrMambaCausalLMOutput(
            logits=logits, cache_params=outputs.cache_params, hidden_states=outputs.hidden_states, **losses
        )

    def _losses_of_time(
        self,
        token_loss: Tensor,
        hidden_states: Tensor,
        channels: Mapping[str, Tensor | None],
        labels: Tensor,
        real: Tensor | None,
        starts: Tensor | None,
        silent_days: Tensor | None,
        targets: Tensor | int | None,
    ) -> dict[str, Tensor]:
        """The parts of the loss and their sum, each over as many tokens as the loss of tokens is."""
        missing = [name for name, channel in channels.items() if channel is None]
        if missing:
            raise ValueError(
                f"the loss of times needs {missing} beside labels: give all channels of the tokenizer, and ids in "
                "place of inputs_embeds."
            )
        input_ids, times, segments = (cast(Tensor, channel) for channel in channels.values())
        if targets is None:
            targets = (labels[:, 1:] != IGNORED_LABEL).sum()
        parts = {"token_loss": token_loss}
        if self.time_head is not None:
            gaps = event_gaps(self.config, input_ids, times, segments, labels, real, starts)
            concepts = self.model.embeddings.word_embeddings(input_ids[gaps.rows, gaps.positions + 1])
            states = hidden_states[gaps.rows, gaps.positions]
            parts["time_loss"] = gap_loss(self.config, self.time_head, states, concepts, gaps) / targets
        if silent_days is not None:
            check_silence(self.config, input_ids, silent_days, real)
            ends = silent_days > 0
            logits = linear(self.lm_head, hidden_states[ends]).float()
            parts["silence_loss"] = silence_loss(self.config, logits, silent_days[ends]) / targets
        return {**parts, "loss": torch.stack([part.to(token_loss) for part in parts.values()]).sum()}


class EhrMambaForSequenceClassification(EhrMambaPreTrainedModel, EventForSequenceClassification):
    """One head for every prompted task (MPF): it reads the hidden state of the last real token, the task token.

    Class 1 is the task's positive outcome. Use `risk_scores` to turn logits into probabilities.
    """

    _auto_class = "AutoModelForSequenceClassification"  # so that what saves it carries its code

    def __init__(self, config: EhrMambaConfig):
        EventForSequenceClassification.__init__(self, config, EhrMambaModel(config))

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
        cache_params: EhrMambaCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> EhrMambaSequenceClassifierOutput:
        """Classify each row (or each packed sequence); the channels and the cache are those of `EhrMambaModel.forward`.

        Args:
            labels: Classes int64 [b], or [b, S] padded with -100 for packed rows. With another `config.problem_type`,
                the targets that transformers' loss of that name takes.
            task_ids: Index of each row's task in `config.tasks`, [b]. Unused: it is here so that Trainer keeps the
                column for metrics per task (`label_names=["labels", "task_ids"]`).
            use_cache: Return the state; default False.
        """
        tokens = (input_ids, attention_mask, token_type_ids, times, ages)
        visits = (visit_orders, visit_segments, segment_ids, inputs_embeds)
        outputs = self.model(*tokens, *visits, cache_params, bool(use_cache), output_hidden_states)
        loss, logits = self.classify(outputs.last_hidden_state, input_ids, attention_mask, segment_ids, labels)
        return EhrMambaSequenceClassifierOutput(loss, logits, outputs.cache_params, outputs.hidden_states)

    @torch.no_grad()
    def prefix_logits(
        self, inputs: Mapping[str, Tensor], ends: Tensor, tails: Mapping[str, Tensor], tail_lengths: Tensor
    ) -> Tensor:
        """Logits after each of some prefixes of one row, as `RiskScoresMixin.prefix_logits`, all of one pass."""
        check_prefixes(inputs, ends, tails, tail_lengths)
        logits = self.classifier(branch_states(self.model, inputs, ends, tails, tail_lengths))
        return at_least_float32(logits)


def _last_times(times: Tensor, lengths: Tensor | None, cache: EhrMambaCache) -> Tensor:
    """Time of each row's last real token, [b]; what the cache holds where a row has no new one."""
    if lengths is None:
        return times[:, -1].to(cache.last_times.dtype)
    newest = times.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1).to(cache.last_times.dtype)
    return torch.where(lengths > 0, newest, cache.last_times)


__all__ = [
    "EhrMambaForCausalLM",
    "EhrMambaForSequenceClassification",
    "EhrMambaModel",
    "EhrMambaPreTrainedModel",
]

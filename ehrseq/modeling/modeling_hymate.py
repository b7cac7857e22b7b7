"""HyMaTE: triplets of an irregular series through Mamba, self-attention and fusion attention (arXiv:2509.24118), with
its forecasting head and its clinical head.

Glossary: b batch, n length (triplets), S packed sequences of a row, V num_variables, D num_static, d hidden_size, H
num_horizons, p pooled_size (2d; d without static values; d more with summaries). A triplet is (time t, variable v,
value x); its input channels are `times`, `variable_ids` and `values`, all [b, n].

    e   = e_f(v) + e_v(x) + e_t(t)          hymate_embeddings.py
    h   = h + Drop(Mamba(RMSNorm h))        M times, linear in n: the whole history into every triplet
    h   = h + Drop(MHA(RMSNorm h)), h + Drop(FFN(RMSNorm h))       K times: between all triplets, in both directions
    z_T = sum_i alpha_i h_i                 fusion attention, hymate_attention.py
    r   = [z_T; s']                         with the static values, s' = W2 tanh(W1 s + b1) + b2
    r   = [z_T; s'; g]                      beyond the paper: g of each variable's summary, hymate_summaries.py
    o   = W r + b + sum_i f_i(x_i)          beyond the paper: logits with an additive part of the same summaries

The paper has sections, not sizes: what it leaves open is told field by field in configuration_hymate.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_hymate import HyMaTEConfig
from .fast_dropout import FastDropout
from .fast_linear import as_input_of
from .hub_mixin import EhrHubMixin
from .hymate_attention import FusionAttention, HyMaTEAttentionBlock
from .hymate_embeddings import BinnedEmbeddings, NumberEmbedding, TripletEmbeddings
from .hymate_inputs import check_inputs, check_labels, check_rows, num_segments_of, real_triplets
from .hymate_layout import TripletLayout, joined_layout, layout_as_given, owners
from .hymate_summaries import AdditiveHead, ForecastHead, SummaryEmbedding, summarise_variables
from .mamba_block import EhrMambaMixer, EhrMambaRMSNorm, at_least_float32
from .risk_tasks import IGNORED_LABEL, RiskScoresMixin


@dataclass
class HyMaTEOutput(ModelOutput):
    """Output of `HyMaTEModel`.

    Attributes:
        last_hidden_state: After the final norm, [b, n, d], 0 at padding; [b S, B, d] in the mode "binned".
        pooler_output: What the heads read, r: [b, p], or [b, S, p] for packed rows.
        fusion_attentions: Weight of each triplet in its patient, alpha: [b, n], 0 at padding, sums of 1.
        hidden_states: Embeddings, then the output of each block, the last one after the final norm: M + K + 1 tensors.
        attentions: Self-attention weights, K tensors [b, heads, n, n].
        last_values: Each variable's last value, 0 where there is none: [b, V], or [b, S, V]; None where the config asks
            neither for `variable_summaries` nor for `forecast_from_last_value`.
        summary_features: Numbers of each variable, [b, V F], or [b, S, V F], see hymate_summaries.py; with
            `additive_summaries` alone.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    fusion_attentions: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    last_values: Tensor | None = None
    summary_features: Tensor | None = None


@dataclass
class HyMaTEForecastOutput(ModelOutput):
    """Output of `HyMaTEForPreTraining`.

    Attributes:
        loss: Masked mean squared error, when `labels` are given; 0 without a target in the batch.
        predictions: z-scored values, float32: [b, V], or [b, H, V] for several horizons; with S after b when packed.
        fusion_attentions, hidden_states, attentions: As in `HyMaTEOutput`.
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None
    fusion_attentions: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class HyMaTESequenceClassifierOutput(ModelOutput):
    """Output of `HyMaTEForSequenceClassification`.

    Attributes:
        loss: When `labels` are given.
        logits: [b, num_labels], or [b, S, num_labels] for packed rows; float32. Class 1 is the positive outcome.
        auxiliary_predictions: The auxiliary outcomes in their own units, [b, A] or [b, S, A]; None where there are
            none.
        fusion_attentions, hidden_states, attentions: As in `HyMaTEOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    auxiliary_predictions: Tensor | None = None
    fusion_attentions: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class HyMaTEMambaBlock(GradientCheckpointingLayer):
    """h + Drop(Mamba(RMSNorm h)): EhrMamba's mixer, with the dropout that small data need."""

    def __init__(self, config: HyMaTEConfig):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = EhrMambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = EhrMambaMixer(config)
        self.dropout = FastDropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, layout: TripletLayout) -> Tensor:
        """[1, T, d] or [b, n, d] -> the same shape."""
        residual = at_least_float32(hidden_states) if self.residual_in_fp32 else hidden_states
        mixed, _ = self.mixer(self.norm(hidden_states), starts=layout.starts)  # padding, if any, stands last
        return residual + self.dropout(mixed)


class StaticEmbedding(nn.Module):
    """s' = W2 tanh(W1 s + b1) + b2, D -> 2d -> d (STraTS)."""

    def __init__(self, config: HyMaTEConfig):
        super().__init__()
        self.dense_in = nn.Linear(config.num_static, 2 * config.hidden_size)
        self.dense_out = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, static_values: Tensor) -> Tensor:
        """[..., D] -> [..., d]."""
        return self.dense_out(torch.tanh(self.dense_in(as_input_of(self.dense_in, static_values))))


class HyMaTEPreTrainedModel(EhrHubMixin, PreTrainedModel):
    """Weights, initialisation and what the Trainer and the Hub ask of every HyMaTE class."""

    config: HyMaTEConfig
    config_class = HyMaTEConfig
    base_model_prefix = "model"
    main_input_name = "variable_ids"
    auto_classes = {
        "AutoModel": "HyMaTEModel",
        "AutoModelForPreTraining": "HyMaTEForPreTraining",
        "AutoModelForSequenceClassification": "HyMaTEForSequenceClassification",
    }
    supports_gradient_checkpointing = True
    # No class takes loss kwargs: Trainer must divide by the accumulation steps itself.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["HyMaTEMambaBlock", "HyMaTEAttentionBlock"]
    _input_embed_layer = "variable_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every weight has a rule here, so that what a checkpoint lacks is never left as it lay in memory.

        Variables N(0, initializer_range); Xavier-uniform linear layers with zero biases; norms at 1; number embeddings
        and fusion attention as in STraTS; the mixer as in `EhrMambaMixer.reset_parameters`. A module comes after its
        parts, so the mixer has the last word on its projections.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, AdditiveHead | ForecastHead | NumberEmbedding | FusionAttention | EhrMambaMixer):
            module.reset_parameters()


class HyMaTEModel(HyMaTEPreTrainedModel):
    """From triplets and static values to one vector for each patient."""

    _auto_class = "AutoModel"  # so that what saves it carries its code

    def __init__(self, config: HyMaTEConfig):
        super().__init__(config)
        binned = config.embedding_mode == "binned"
        self.embeddings = BinnedEmbeddings(config) if binned else TripletEmbeddings(config)
        self.dropout = FastDropout(config.hidden_dropout_prob)
        shared = config.share_layer_weights
        num_mamba = min(config.num_mamba_layers, 1) if shared else config.num_mamba_layers
        num_attention = min(config.num_attention_layers, 1) if shared else config.num_attention_layers
        self.mamba_layers = nn.ModuleList(HyMaTEMambaBlock(config) for _ in range(num_mamba))
        self.attention_layers = nn.ModuleList(HyMaTEAttentionBlock(config) for _ in range(num_attention))
        self.norm_f = EhrMambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.fusion_attention = FusionAttention(config)
        self.static_embedding = StaticEmbedding(config) if config.num_static else None
        self.summary_embedding = SummaryEmbedding(config) if config.variable_summaries else None
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        variable_ids: Tensor | None = None,
        times: Tensor | None = None,
        values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        static_values: Tensor | None = None,
        segment_ids: Tensor | None = None,
        num_segments: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_fusion_attentions: bool | None = None,
    ) -> HyMaTEOutput:
        """Encode a batch of patients; each one's triplets stand in the order of time.

        Args:
            variable_ids: 0 .. V - 1, int64 [b, n].
            times: Time in the observation window, -1 its start and 1 its end, [b, n].
            values: z-scored values, [b, n].
            attention_mask: 1 at triplets, 0 at padding (on either side), [b, n]. None: no padding.
            static_values: [b, D], or [b, S, D] for packed rows; None where the config has none.
            segment_ids: Several patients packed into one row, [b, n], 0 = padding, 1 .. S = the patients in order. They
                do not see each other; the outcome equals that of unpacked rows.
            num_segments: S; by default as many as `static_values` or `segment_ids` have.
            output_hidden_states: Return all hidden states.
            output_attentions: Return the weights of self-attention and fusion attention. They are written out as [b,
                heads, n, n], whatever `attn_implementation` is: a lot of memory for long rows.
            output_fusion_attentions: Return the weights of the fusion attention alone, which cost nothing.

        Raises:
            ValueError: channels missing or of different shapes, ids out of range, values that are not finite, segments
                out of order, or a row without a triplet.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)

        # 1. Inputs: who has which triplets, and how they lie in memory.
        channels = {"variable_ids": variable_ids, "times": times, "values": values}
        masks = {"attention_mask": attention_mask, "segment_ids": segment_ids}
        check_inputs(self.config, static_values, channels, masks)
        triplets = cast("dict[str, Tensor]", channels)
        packed = segment_ids is not None
        num_segments = num_segments_of(segment_ids, static_values, num_segments)
        real = real_triplets(attention_mask, segment_ids)
        check_rows(real, segment_ids)
        owner = owners(triplets["values"], real, segment_ids, num_segments)
        as_given = output_hidden_states or output_attentions
        hidden_states, layout = self._embed(triplets, owner, num_segments, real, packed, as_given)

        # 2. Mamba blocks, then self-attention blocks.
        all_hidden_states, all_attentions = [hidden_states], []
        for mamba_block in repeat(self.mamba_layers, self.config.num_mamba_layers):
            hidden_states = mamba_block(hidden_states, layout)
            all_hidden_states.append(hidden_states)
        for attention_block in repeat(self.attention_layers, self.config.num_attention_layers):
            hidden_states, weights = attention_block(hidden_states, layout, output_attentions)
            all_hidden_states.append(hidden_states)
            all_attentions.append(weights)
        hidden_states = self.norm_f(hidden_states)
        all_hidden_states[-1] = hidden_states

        # 3. One vector for each patient: fused triplets, and the static values beside them.
        pooled, alpha = self.fusion_attention(hidden_states, layout)
        parts = [pooled.unflatten(0, (-1, num_segments)) if packed else pooled]
        if self.static_embedding is not None:
            parts.append(self.static_embedding(cast(Tensor, static_values)))
        last_values: Tensor | None = None
        features: Tensor | None = None
        config = self.config
        if config.variable_summaries or config.additive_summaries or config.forecast_from_last_value:
            size = (owner.shape[0] * num_segments, self.config.num_variables)
            summaries = summarise_variables(**triplets, owner=owner, num_sequences=size[0], num_variables=size[1])
            last_values, features = summaries.last_values, summaries.features
            if packed:
                last_values, features = (part.unflatten(0, (-1, num_segments)) for part in (last_values, features))
            if self.summary_embedding is not None:
                parts.append(self.summary_embedding(features))

        return HyMaTEOutput(
            last_hidden_state=layout.restore(hidden_states),
            pooler_output=torch.cat(parts, dim=-1),
            fusion_attentions=layout.restore(alpha) if output_attentions or output_fusion_attentions else None,
            hidden_states=tuple(map(layout.restore, all_hidden_states)) if output_hidden_states else None,
            attentions=tuple(map(layout.restore_pairs, all_attentions)) if output_attentions else None,
            last_values=last_values,
            summary_features=features if config.additive_summaries else None,
        )

    def _embed(
        self,
        channels: dict[str, Tensor],
        owner: Tensor,
        num_segments: int,
        real: Tensor | None,
        packed: bool,
        as_given: bool,
    ) -> tuple[Tensor, TripletLayout]:
        """Choose the layout and embed: (hidden states of that layout, layout)."""
        num_sequences = owner.shape[0] * num_segments
        if isinstance(self.embeddings, BinnedEmbeddings):
            # The grid has a row for each patient, packed or not, and hours in the place of triplets.
            triplets = TripletLayout(owner, num_sequences, shape=(owner.shape[0], owner.shape[1]))
            grid, real = self.embeddings.grid(**channels, layout=triplets)
            layout = choose_layout(owners(grid, real), num_sequences, real, False, as_given)
            embedded = self.embeddings(layout.take(grid))
        else:
            layout = choose_layout(owner, num_sequences, real, packed, as_given)
            embedded = self.embeddings(
                **{name: layout.take(channel) for name, channel in channels.items()}, layout=layout
            )
        if self.config.shuffle_order and self.training:
            layout, order = layout.shuffled()
            embedded = embedded.flatten(0, 1)[order].view(embedded.shape)
        return self.dropout(embedded), layout


class HyMaTEForPreTraining(HyMaTEPreTrainedModel):
    """Masked forecasting: the next value of each variable in the window (or windows) after the triplets."""

    _auto_class = "AutoModelForPreTraining"  # so that what saves it carries its code

    def __init__(self, config: HyMaTEConfig):
        super().__init__(config)
        self.model = HyMaTEModel(config)
        self.dropout = FastDropout(config.classifier_dropout)
        self.forecast_head = ForecastHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        variable_ids: Tensor | None = None,
        times: Tensor | None = None,
        values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        static_values: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        label_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_fusion_attentions: bool | None = None,
    ) -> HyMaTEForecastOutput:
        """Forecast; the channels are those of `HyMaTEModel.forward`.

        Args:
            labels: z-scored targets, [b, V]; for several horizons [b, H, V] or [b, H V], horizon by horizon; with S
                after b for packed rows.
            label_mask: 1 where there is a target, shape of `labels`; None: at every label that is not NaN.
        """
        stays = (variable_ids, times, values, attention_mask, static_values, segment_ids)
        num_segments = None if labels is None or segment_ids is None else labels.shape[1]
        wanted = (output_hidden_states, output_attentions, output_fusion_attentions)
        outputs = self.model(*stays, num_segments, *wanted)
        flat = self.forecast_head(self.dropout(outputs.pooler_output), outputs.last_values).float()  # [..., H V]
        horizons = (self.config.num_horizons, self.config.num_variables)
        return HyMaTEForecastOutput(
            loss=None if labels is None else masked_squared_error(flat, labels, label_mask),
            predictions=flat.unflatten(-1, horizons) if self.config.num_horizons > 1 else flat,
            fusion_attentions=outputs.fusion_attentions,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class HyMaTEForSequenceClassification(RiskScoresMixin, HyMaTEPreTrainedModel):
    """One outcome of a stay, directly from the pooled patient or by way of the forecast, as `classifier_head` says.

    Class 1 is the task's positive outcome. Use `risk_scores` to turn logits into probabilities.
    """

    _auto_class = "AutoModelForSequenceClassification"  # so that what saves it carries its code

    _keys_to_ignore_on_load_unexpected = [r"^forecast_head\."]  # of pretraining, where the head does not read it

    def __init__(self, config: HyMaTEConfig):
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.model = HyMaTEModel(config)
        self.dropout = FastDropout(config.classifier_dropout)
        width = config.pooled_size
        self.forecast_head = None
        if config.classifier_head == "via_forecast":
            self.forecast_head = ForecastHead(config)
            width = config.num_horizons * config.num_variables
        self.classifier = nn.Linear(width, self.num_labels)
        self.additive_head = AdditiveHead(config, self.num_labels) if config.additive_summaries else None
        outcomes = config.auxiliary_outcomes or []
        self.auxiliary_head = nn.Linear(config.pooled_size, len(outcomes)) if outcomes else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        variable_ids: Tensor | None = None,
        times: Tensor | None = None,
        values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        static_values: Tensor | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
        auxiliary_targets: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_fusion_attentions: bool | None = None,
    ) -> HyMaTESequenceClassifierOutput:
        """Classify each patient; the channels are those of `HyMaTEModel.forward`.

        Args:
            labels: Classes int64 [b], or [b, S] padded with -100 for packed rows. With another `config.problem_type`,
                the targets that transformers' loss of that name takes.
            task_ids: Index of each row's task in `config.tasks`, [b]. Unused: it is here so that Trainer keeps the
                column for metrics per task (`label_names=["labels", "task_ids"]`).
            auxiliary_targets: The auxiliary outcomes in their own units, [b, A] or [b, S, A], NaN where unknown. (No
                "label" in the name, lest Trainer wait for it before it evaluates.)
        """
        stays = (variable_ids, times, values, attention_mask, static_values, segment_ids)
        num_segments = None if labels is None or segment_ids is None else labels.shape[1]
        wanted = (output_hidden_states, output_attentions, output_fusion_attentions)
        outputs = self.model(*stays, num_segments, *wanted)
        pooled = self.dropout(outputs.pooler_output)
        read = pooled if self.forecast_head is None else self.forecast_head(pooled, outputs.last_values)
        logits = at_least_float32(self.classifier(read))
        if self.additive_head is not None:
            logits = logits + at_least_float32(self.additive_head(outputs.summary_features, static_values))

        loss = None if labels is None else self._loss(logits, labels, segment_ids)
        predictions = None
        if self.auxiliary_head is not None:
            predictions, auxiliary_loss = self._auxiliary(pooled, auxiliary_targets)
            if loss is not None and auxiliary_loss is not None:
                loss = loss + self.config.auxiliary_loss_weight * auxiliary_loss
        elif auxiliary_targets is not None:
            raise ValueError("auxiliary_targets were given, and config.auxiliary_outcomes names none: name them there.")
        return HyMaTESequenceClassifierOutput(
            loss=loss,
            logits=logits,
            auxiliary_predictions=predictions,
            fusion_attentions=outputs.fusion_attentions,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, logits: Tensor, labels: Tensor, segment_ids: Tensor | None) -> Tensor:
        """Weighted cross-entropy over the classes, or transformers' loss of another `config.problem_type`.

        The weighted losses are summed and divided by the number of rows, as in STraTS, not by the sum of the weights:
        so a positive weighs the same whichever rows share its batch, and the shift of the log-odds is exactly that of
        the weights.
        """
        classes = not labels.is_floating_point() and self.num_labels > 1
        if self.config.problem_type not in (None, "single_label_classification") or not classes:
            return self.loss_function(labels=labels, logits=logits, pooled_logits=logits, config=self.config)
        check_labels(labels, logits, segment_ids)
        weights = self.config.class_weights
        total = F.cross_entropy(
            logits.reshape(-1, self.num_labels),
            labels.reshape(-1).long(),
            weight=None if weights is None else logits.new_tensor(weights),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )
        return total / (labels != IGNORED_LABEL).sum().clamp(min=1)

    def _auxiliary(self, pooled: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Auxiliary outcomes in their own units, and the mean squared error of the standardised ones."""
        standardised = cast(nn.Module, self.auxiliary_head)(pooled).float()
        outcomes = self.config.auxiliary_outcomes or []
        mean = standardised.new_tensor([outcome["mean"] for outcome in outcomes])
        std = standardised.new_tensor([outcome["std"] for outcome in outcomes])
        loss = None if targets is None else masked_squared_error(standardised, (targets - mean) / std, None)
        return standardised * std + mean, loss


def repeat(blocks: nn.ModuleList, times: int) -> Iterator[nn.Module]:
    """`times` blocks: the given ones, or the one that all of them share."""
    return (blocks[index % len(blocks)] for index in range(times))


def choose_layout(
    owner: Tensor, num_sequences: int, real: Tensor | None, packed: bool, as_given: bool
) -> TripletLayout:
    """The faster layout for this device and batch; see hymate_layout.py.

    Args:
        owner: [b, n], as made by `owners`.
        num_sequences: R.
        real: bool [b, n], None without padding.
        packed: Whether rows hold several sequences.
        as_given: The rows must stay as they are.
    """
    on_cpu = owner.device.type == "cpu" and not torch.compiler.is_compiling()
    if as_given or not on_cpu or (real is None and not packed):
        return layout_as_given(owner, num_sequences, real, packed)
    return joined_layout(owner, num_sequences)


def masked_squared_error(predictions: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    """Masked mean: sum c (y^ - y)^2 / sum c over a whole batch; 0, with a gradient of 0, where no target is.

    Args:
        predictions: [..., m].
        targets: As many values, in any split of the last dimension.
        mask: c, like `targets`, 1 where there is a target; None: where it is not NaN.

    Raises:
        ValueError: another number of targets, or a target that is not finite.
    """
    lead = predictions.dim() - 1
    for name, given in (("labels", targets), ("label_mask", mask)):
        if given is not None and (given.shape[:lead] != predictions.shape[:-1] or given.numel() != predictions.numel()):
            raise ValueError(
                f"{name} have shape {list(given.shape)}, expected {list(predictions.shape)}: one number for each "
                "horizon and variable."
            )
    targets = targets.reshape(predictions.shape).to(predictions.dtype)
    known = ~targets.isnan() if mask is None else mask.reshape(predictions.shape).bool()
    error = torch.where(known, predictions - targets, 0.0)
    on_cpu = error.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not bool(torch.isfinite(targets[known]).all()):
        raise ValueError(
            "labels hold NaN or infinite values where label_mask is 1: set it to 0 where there is no value."
        )
    return error.square().sum() / known.sum().clamp(min=1)


__all__ = [
    "HyMaTEForPreTraining",
    "HyMaTEForSequenceClassification",
    "HyMaTEModel",
    "HyMaTEPreTrainedModel",
]

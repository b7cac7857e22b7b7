"""Configuration of the HyMaTE models."""

# No `from __future__ import annotations` here: `strict` leaves fields unchecked whose type is a string.
import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_mamba_block import MambaBlockConfig, width_as_factors
from .hub_mixin import EhrConfigMixin
from .hymate_intervals import ForecastCalibration
from .risk_tasks import RiskConfigMixin


@strict
class HyMaTEConfig(RiskConfigMixin, MambaBlockConfig, EhrConfigMixin, PreTrainedConfig):
    r"""Configuration of `HyMaTEModel` and its heads (arXiv:2509.24118).

    The paper states few sizes. Marked below: [P] the paper, [S] STraTS, on which it builds, [T] the authors' sibling
    code, [C] a choice of this package. Keyword-only and strictly typed: a value of the wrong type or out of range
    raises an error that names the field. The Mamba blocks have the fields of `MambaBlockConfig`.

    The names that all models of transformers have are understood too, a value that contradicts a field is refused:
    `num_hidden_layers` counts the blocks of both kinds (where one kind is not given, it gets what the other leaves;
    where neither is, attention has its default), `intermediate_size` is the width inside the blocks of both kinds
    (`expand` and `feed_forward_expand`), `vocab_size` is `num_variables`.

    Args:
        num_variables: Number of variables (V): `variable_ids` are 0 .. V - 1, and forecasts have V values. [S] has 37
            on PhysioNet-2012.
        num_static: Number of static values of a patient (D); 0 for none.
        hidden_size: Width (d). [T] 16, [S] 64; the default suits a CPU.
        num_mamba_layers: Mamba blocks (M) [T]; 0 is the ablation without Mamba, which is close to STraTS.
        num_attention_layers: Self-attention blocks behind them (K) [P]; 0 is the paper's ablation without attention.
        num_attention_heads: Heads of each [S].
        feed_forward_expand: The feed-forward part of an attention block is this many times d wide [S].
        max_position_embeddings: Triplets that the model is meant for. There are no positional embeddings, so nothing in
            the model enforces it: pipelines and `ehrseq predict` cut stays there, and a recipe's `max_length` becomes
            it. [T] 1497 is the longest stay of PhysioNet-2012.

        embedding_mode: How a triplet becomes a vector: "sum" of the embeddings of variable, value and time [P]; their
            "concat"enation, projected to d; "value" alone, the paper's ablation without triplets; or "binned", where
            no triplet remains: `num_bins` steps of equal length, each with mean, mask and age of all variables.
        num_bins: Steps of the window [-1, 1] in the mode "binned": 48 are hours of PhysioNet-2012.
        value_change_embedding: Also embed the change since the variable's previous value [C]. Not in the paper.
        time_gap_embedding: Also embed the time since the variable's previous value [C]. Not in the paper.
        variable_summaries: The patient's vector also has an embedding of each variable's count, mean, deviation,
            extremes, first and last value, times and slope, computed from the triplets [C]. Not in the paper.
        additive_summaries: The classifier's logits also have an additive part: a piecewise linear function of each of
            those numbers and of each static value, as in a generalised additive model [C]. Not in the paper.
        shuffle_order: In training, permute the triplets of each patient at random before the blocks. An ablation only:
            the sibling code does so in finetuning [T], which is harmless for attention and wrong for Mamba.
        share_layer_weights: All Mamba blocks are one block with the same weights, and so are all attention blocks. An
            ablation.

        hidden_dropout_prob: Dropout after the embedding and on what each block adds [S].
        attention_probs_dropout_prob: Dropout of the self-attention weights. Above 0, PyTorch's fast attention for CPUs
            cannot be used in training.
        classifier_dropout: Dropout of what the heads read.
        additive_dropout: Dropout of what the additive part reads [C].
        initializer_range: Standard deviation of the variables' embeddings at initialisation; the default makes them
            as large as the embeddings of a typical value and time [C].

        num_horizons: Forecasting windows (H), each predicted by outputs of its own [C]; 1 in [P] and [S].
        forecast_from_last_value: Forecast a correction of each variable's last value instead of the value [C]. Not in
            the paper.
        forecast_calibration: Horizons in minutes, intervals of the forecasts and units of the variables, as
            `ForecastCalibration.to_dict` has them [C]. Pretraining fits it; None: forecasts have no interval.
        classifier_head: "direct", from the pooled patient to the classes, or "via_forecast", from the forecast to the
            classes [S].
        class_weights: Weight of each class in the cross-entropy of the classifier, or None. [S] weighs positives by
            their rarity: `[1.0, negatives / positives]`. Weighting shifts the log-odds by log(w[1] / w[0]);
            `risk_scores` subtracts that shift, so it does not belong in `log_odds_shift`.
        tasks: The one task, as in `EhrMambaConfig`: "name", "horizon", "definition", "positive_label" and
            "log_odds_shift", the shift of the log-odds that a balancing sampler caused (0.0 when absent).
        auxiliary_outcomes: Outcomes with a number for an answer that finetuning learns besides the class, such as the
            length of stay or a severity score; one dict each: "name", and "mean" and "std" of the training patients (0
            and 1 when absent), by which targets are standardised inside the loss [C].
        auxiliary_loss_weight: Weight of their mean squared error beside the classifier's loss [C].

        tie_word_embeddings: Must stay False.
    """

    model_type = "hymate"
    attribute_map = {"vocab_size": "num_variables"}
    keys_to_ignore_at_inference = [
        "auxiliary_predictions",
        "fusion_attentions",
        "hidden_states",
        "attentions",
        "last_values",
        "summary_features",
    ]

    # Size
    num_variables: int = 37
    num_static: int = 9
    hidden_size: int = 32
    num_mamba_layers: int = 2
    num_attention_layers: int = 1
    num_attention_heads: int = 4
    feed_forward_expand: int = 2
    max_position_embeddings: int = 1497

    # Triplets (HyMaTE, section 3.2.1), and what stands in their place in the ablations
    embedding_mode: Literal["sum", "concat", "value", "binned"] = "sum"
    num_bins: int = 48
    value_change_embedding: bool = False
    time_gap_embedding: bool = False
    variable_summaries: bool = False
    additive_summaries: bool = False
    shuffle_order: bool = False
    share_layer_weights: bool = False

    # Regularisation (STraTS)
    hidden_dropout_prob: float = 0.2
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout: float = 0.0
    additive_dropout: float = 0.5
    initializer_range: float = 0.2

    # Forecasting and outcomes
    num_horizons: int = 1
    forecast_from_last_value: bool = False
    forecast_calibration: dict[str, Any] | None = None
    classifier_head: Literal["direct", "via_forecast"] = "direct"
    class_weights: list[float] | None = None
    tasks: list[dict[str, Any]] | None = None
    auxiliary_outcomes: list[dict[str, Any]] | None = None
    auxiliary_loss_weight: float = 0.1

    # transformers
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.resolve_time_step_rank()
        self.tasks = [] if self.tasks is None else [dict(task) for task in self.tasks]
        outcomes = self.auxiliary_outcomes or []
        self.auxiliary_outcomes = [{"mean": 0.0, "std": 1.0, **outcome} for outcome in outcomes]
        self._check_values()
        super().__post_init__(**kwargs)
        self.check_number_of_class_weights(self.num_labels)

    @classmethod
    def from_common_names(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """`num_hidden_layers` gives the number of blocks of either kind, `intermediate_size` their inner width."""
        fields = width_as_factors(arguments, cls.hidden_size, "expand", "feed_forward_expand")
        variables = fields.pop("vocab_size", None)
        if variables is not None and fields.setdefault("num_variables", variables) != variables:
            raise ValueError(f"vocab_size={variables} contradicts num_variables={fields['num_variables']}: give one.")
        total = fields.pop("num_hidden_layers", None)
        if total is None:
            return fields
        if not isinstance(total, int):
            raise ValueError(f"num_hidden_layers={total!r}: expected an integer, the number of blocks of both kinds.")
        if "num_mamba_layers" not in fields:
            fields.setdefault("num_attention_layers", cls.num_attention_layers)
            fields["num_mamba_layers"] = total - fields["num_attention_layers"]
        fields.setdefault("num_attention_layers", total - fields["num_mamba_layers"])
        mamba, attention = fields["num_mamba_layers"], fields["num_attention_layers"]
        if mamba + attention != total or mamba < 0 or attention < 0:
            raise ValueError(
                f"num_hidden_layers={total} does not fit num_mamba_layers={mamba} and num_attention_layers="
                f"{attention}: it is their sum; give the two."
            )
        return fields

    def _check_values(self) -> None:
        """Raise a ValueError for the first field whose value no model could be built from."""
        positive = (
            "num_variables hidden_size num_attention_heads feed_forward_expand max_position_embeddings state_size "
            "conv_kernel expand time_step_rank num_bins num_horizons"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer of at least 1.")
        for name in ("num_static", "num_mamba_layers", "num_attention_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer of at least 0.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of num_attention_heads={self.num_attention_heads}: "
                "every head takes an equal part of the width."
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "additive_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a probability in [0, 1).")
        self.check_time_steps()
        if self.embedding_mode == "binned" and (self.value_change_embedding or self.time_gap_embedding):
            raise ValueError(
                "embedding_mode='binned' has no triplets to which value_change_embedding or time_gap_embedding could "
                "belong: leave them False, or take another mode."
            )
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True: HyMaTE has no output that could be tied; leave it False.")
        self.check_tasks()
        self._check_auxiliary_outcomes()
        self.read_calibration()

    def _check_auxiliary_outcomes(self) -> None:
        if not self.auxiliary_loss_weight >= 0.0:
            raise ValueError(f"auxiliary_loss_weight={self.auxiliary_loss_weight}: expected a number of at least 0.")
        for outcome in self.auxiliary_outcomes or []:
            mean, std = outcome["mean"], outcome["std"]
            numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in (mean, std))
            if not isinstance(outcome.get("name"), str) or not numbers or std <= 0.0:
                raise ValueError(
                    f"auxiliary_outcomes: got {outcome!r}; expected dicts with a name, and the mean and a positive "
                    "std of its values in training."
                )

    def read_calibration(self) -> ForecastCalibration | None:
        """`forecast_calibration` as an object, None where there is none.

        Raises:
            ValueError: It is damaged, or of a model of another size.
        """
        if self.forecast_calibration is None:
            return None
        return ForecastCalibration.from_dict(self.forecast_calibration, self.num_horizons, self.num_variables)

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of either kind."""
        return self.num_mamba_layers + self.num_attention_layers

    @property
    def pooled_size(self) -> int:
        """Width of what the heads read: the fused triplets and, where there are any, static values and summaries."""
        return self.hidden_size * (1 + bool(self.num_static) + self.variable_summaries)


__all__ = ["HyMaTEConfig"]

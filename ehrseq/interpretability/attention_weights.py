"""What a model looks at: attention weights of CEHR-BERT, BigBird and HyMaTE, and HyMaTE's weights in pooling a stay.

Weights are shares of attention: those of a row sum to 1 (of the hidden attention of Mamba, mamba_attention.py, they sum
to nothing). They do not say whether a token raised or lowered the risk, nor what it would be without it.

Glossary: h heads, m real tokens (triplets) of one patient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from ehrseq.interpretability.explanation import Attribution, Explanation
from ehrseq.interpretability.relevance_propagation import at_least_single, without_dropout

if TYPE_CHECKING:
    from ehrseq.interpretability.questions import Question


@dataclass(frozen=True)
class AttentionWeights:
    """What a model looks at, over the real tokens (triplets) of one patient's row.

    Attributes:
        layers: Weights of each layer: [h, m, m] of self-attention, [m, m] or [m] of hidden attention, [m] of the fusion
            attention. Of a matrix the second last axis reads, the last is read. Empty where the task does not apply.
        what: What they are, in words.
        tokens: One row for each token, with the columns of `Explanation.contributions` that say what it is: `position`,
            `event`, `time`, `code`, `value`, `text`, `unit`, `visit`, `kind`, `display`.
        numbers: Which of the model's layers these are, from 0.
        reason: Why the task does not apply, None where it does.
    """

    layers: list[NDArray[np.float64]]
    what: str
    tokens: pl.DataFrame
    numbers: tuple[int, ...] = ()
    reason: str | None = None

    @property
    def mean(self) -> NDArray[np.float64]:
        """Averaged over layers and heads, [m, m] or [m].

        Raises:
            ValueError: There are no weights, because the task does not apply.
        """
        if not self.layers:
            raise ValueError(f"no {self.what}: the task does not apply ({self.reason}).")
        over_layers: NDArray[np.float64] = np.mean(self.layers, axis=0)
        return over_layers.mean(0) if over_layers.ndim == 3 else over_layers

    def table(self) -> pl.DataFrame:
        """`tokens` with their `weight`, averaged over the layers.

        Raises:
            ValueError: The weights are matrices, in which a token has one for each that reads it; or there are none.
        """
        weights = self.mean
        if weights.ndim != 1:
            raise ValueError(f"{self.what} are matrices {list(weights.shape)}: take a row of `mean` or of `layers`.")
        return self.tokens.with_columns(weight=pl.Series(weights, dtype=pl.Float64))

    @classmethod
    def of(
        cls,
        question: Question,
        layers: Sequence[Tensor],
        what: str,
        numbers: Sequence[int] | None = None,
        displays: Mapping[str, str] | None = None,
    ) -> AttentionWeights:
        """Name weights over the real tokens of a question's row; without an answer there are none."""
        nothing = Attribution(np.zeros(len(question.event_of)), 0.0, 0.0) if question.has_answer else None
        named = Explanation.of(question, nothing, method=what, baseline_name="", displays=displays)
        tokens = named.contributions.drop("group", "contribution", "score_after")
        if question.has_answer:
            tokens = tokens.filter(pl.Series(real_tokens_of(question.inputs).cpu().numpy()))
        weights = [layer.detach().cpu().numpy().astype(np.float64) for layer in layers]
        return cls(
            weights,
            what,
            tokens,
            tuple(range(len(weights)) if numbers is None else numbers),
            None if question.has_answer else question.reason,
        )


def attentions(question: Question, displays: Mapping[str, str] | None = None) -> AttentionWeights:
    """Self-attention weights of CEHR-BERT, BigBird or HyMaTE, layer by layer and head by head, [h, m, m] each.

    Args:
        question: What is asked.
        displays: Code -> description.

    Raises:
        ValueError: As in `attention_matrices`.
    """
    model = question.checkpoint.model
    check_has_attention(model)
    layers = attention_matrices(model, question.inputs) if question.has_answer else []
    return AttentionWeights.of(question, layers, "attention weights", displays=displays)


def fusion_weights(question: Question, displays: Mapping[str, str] | None = None) -> AttentionWeights:
    """The weight of each triplet in HyMaTE's pooled stay, [m] that sum to 1 (HyMaTE's figure 3).

    `fusion_weights(question).table()` has them beside time, code and value.

    Args:
        question: What is asked.
        displays: Code -> description.

    Raises:
        ValueError: As in `fusion_row`.
    """
    model = question.checkpoint.model
    check_has_fusion(model)
    layers = []
    if question.has_answer:
        layers = [fusion_row(model, question.inputs)[0][real_tokens_of(question.inputs)]]
    return AttentionWeights.of(question, layers, "fusion weights", displays=displays)


def attention_matrices(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Self-attention weights of one patient.

    Args:
        model: A classifier of CEHR-BERT, BigBird or HyMaTE.
        inputs: Channels as its `forward` takes them, one row, padded on either side.

    Returns:
        Of each attention layer [h, m, m] over the real tokens: the second axis reads, the last is read, rows sum to 1.

    Raises:
        ValueError: A model without attention, or several patients.
    """
    check_has_attention(model)
    real = real_tokens_of(inputs)
    given = {name: channel for name, channel in inputs.items() if name not in ("labels", "task_ids")}
    model = at_least_single(model)
    with without_dropout(model), torch.no_grad():
        layers = model(**given, output_attentions=True).attentions
    if (
        model.config.model_type == "hymate"
    ):  # as the triplets lie in the row; the models over events give the real tokens alone
        return [layer[0][:, real][:, :, real] for layer in layers]
    return [layer[0] for layer in layers]


def fusion_row(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The weight of each triplet in HyMaTE's pooled patient, [b, n]: 0 at padding, those of a stay sum to 1.

    Args:
        model: A classifier of HyMaTE.
        inputs: Channels as its `forward` takes them, padded on either side or packed.

    Raises:
        ValueError: Another family, or a HyMaTE of binned values, which has no triplets.
    """
    check_has_fusion(model)
    given = {name: channel for name, channel in inputs.items() if name not in ("labels", "task_ids")}
    model = at_least_single(model)
    with without_dropout(model), torch.no_grad():
        weights: Tensor = model(**given, output_fusion_attentions=True).fusion_attentions
    return weights


def check_has_attention(model: Any) -> None:
    """Raise a ValueError unless the model has self-attention over tokens or triplets."""
    family = getattr(model.config, "model_type", None)
    if family not in ("cehrbert", "ehr_bigbird", "hymate"):
        raise ValueError(
            f"attentions: {family!r} has none, which cehrbert, ehr_bigbird and hymate have: a Mamba has hidden "
            "attention (hidden_attention)."
        )
    if family == "hymate" and not model.config.num_attention_layers:
        raise ValueError(
            "attentions: this HyMaTE has no self-attention (num_attention_layers=0): it has fusion weights."
        )
    _refuse_bins(model, "attentions")


def check_has_fusion(model: Any) -> None:
    """Raise a ValueError unless the model has a fusion attention over triplets."""
    family = getattr(model.config, "model_type", None)
    if family != "hymate":
        raise ValueError(f"fusion_weights: {family!r} has no fusion attention, which hymate has.")
    _refuse_bins(model, "fusion_weights")


def real_tokens_of(inputs: Mapping[str, Tensor]) -> Tensor:
    """Bool [l] of one patient's row, False at padding.

    Raises:
        ValueError: Several patients.
    """
    first = inputs.get("input_ids", inputs.get("variable_ids"))
    if first is None or first.dim() != 2 or first.shape[0] != 1 or "segment_ids" in inputs:
        shape = None if first is None else list(first.shape)
        raise ValueError(f"attention is shown of one patient, got inputs of shape {shape}: give one row, not packed.")
    mask = inputs.get("attention_mask")
    return torch.ones_like(first[0], dtype=torch.bool) if mask is None else mask[0].bool()


def _refuse_bins(model: Any, method: str) -> None:
    if getattr(model.config, "embedding_mode", None) == "binned":
        raise ValueError(
            f"{method}: this HyMaTE has embedding_mode='binned': its weights are of steps of the grid, not of triplets."
        )


__all__ = [
    "AttentionWeights",
    "attention_matrices",
    "attentions",
    "check_has_attention",
    "check_has_fusion",
    "fusion_row",
    "fusion_weights",
    "real_tokens_of",
]

"""What a model looks at: attention weights of CEHR-BERT, BigBird and HyMaTE, and the weights by which HyMaTE pools a stay.

Weights are shares of attention: those of a row sum to 1 (of the hidden attention of Mamba, hidden_attention.py, they sum
to nothing). They do not say whether a token raised or lowered the risk, nor what it would be without it.

Glossary: h heads, m real tokens (triplets) of one patient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from ehrseq.interpretability.relevance import at_least_single, without_dropout

if TYPE_CHECKING:
    from ehrseq.interpretability.questions import Question


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
    real = _real(model, inputs, "attentions")
    given = {name: channel for name, channel in inputs.items() if name not in ("labels", "task_ids")}
    model = at_least_single(model)
    with without_dropout(model), torch.no_grad():
        layers = model(**given, output_attentions=True).attentions
    if family == "hymate":  # as the triplets lie in the row; the models over events give the real tokens alone
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
    family = getattr(model.config, "model_type", None)
    if family != "hymate":
        raise ValueError(f"fusion_weights: {family!r} has no fusion attention, which hymate has.")
    _refuse_bins(model, "fusion_weights")
    given = {name: channel for name, channel in inputs.items() if name not in ("labels", "task_ids")}
    model = at_least_single(model)
    with without_dropout(model), torch.no_grad():
        weights: Tensor = model(**given, output_fusion_attentions=True).fusion_attentions
    return weights


def _real(model: Any, inputs: Mapping[str, Tensor], method: str) -> Tensor:
    """Bool [l] of the one patient's row, False at padding."""
    _refuse_bins(model, method)
    first = inputs.get("input_ids", inputs.get("variable_ids"))
    if first is None or first.dim() != 2 or first.shape[0] != 1 or "segment_ids" in inputs:
        shape = None if first is None else list(first.shape)
        raise ValueError(f"{method}: shows one patient, got inputs of shape {shape}: give one row, not packed.")
    mask = inputs.get("attention_mask")
    return torch.ones_like(first[0], dtype=torch.bool) if mask is None else mask[0].bool()


def _refuse_bins(model: Any, method: str) -> None:
    if getattr(model.config, "embedding_mode", None) == "binned":
        raise ValueError(
            f"{method}: this HyMaTE has embedding_mode='binned': its weights are of steps of the grid, not of triplets."
        )


__all__ = ["attention_matrices", "fusion_row"]

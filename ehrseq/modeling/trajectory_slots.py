"""Slots: rows of a model that many trajectories live in, one after the other, each with a state of its own.

`TorchSlots` works on every device and in every dtype. Its rows are computed in blocks of a fixed size whatever their
number, because products of matrices round otherwise for other numbers of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from .ehrmamba_cache import EhrMambaCache
from .fast_linear import linear
from .trajectory_tokens import NextTokens, TokenSets, inverse_cdf

if TYPE_CHECKING:
    from .modeling_ehrmamba import EhrMambaForCausalLM

BLOCK_SLOTS = 64


@dataclass(frozen=True)
class Sampling:
    """What is done to the model's distribution before it is drawn from; by default nothing."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the model's own distribution is drawn from."""
        return self.temperature == 1.0 and self.top_k is None and self.top_p is None

    def probabilities(self, logits: Tensor) -> Tensor:
        """float64 [r, V] of logits [r, V]."""
        logits = logits.double() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
            beyond = ranked.cumsum(-1) - ranked >= self.top_p  # what stands before has enough already
            probabilities = probabilities.masked_fill(beyond.gather(-1, order.argsort(-1)), 0.0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities


@dataclass
class DenseTokens:
    """`NextTokens` with all weights at hand.

    Attributes:
        hidden: [r, d].
        weights: float64 [r, V], summing to 1; or [V] where all rows share them.
        sets: Whose probabilities are told.
    """

    hidden: Tensor
    weights: np.ndarray
    sets: TokenSets

    @property
    def probabilities(self) -> np.ndarray:
        """Of the tokens of the sets, float64 [r, k]."""
        asked = self.weights[..., self.sets.ids]
        return np.broadcast_to(asked, (len(self.hidden), len(self.sets.ids)))

    def draw(self, uniforms: np.ndarray, avoided: np.ndarray | None, kept: np.ndarray | None) -> np.ndarray:
        """See `NextTokens`."""
        if avoided is None or kept is None:
            return inverse_cdf(self.weights, uniforms)
        weights = np.array(np.broadcast_to(self.weights, (len(uniforms), self.weights.shape[-1])))
        for row, number in enumerate(avoided):
            part = self.sets.part(number)
            weights[row, self.sets.ids[part]] *= kept[row, : part.stop - part.start]
        return inverse_cdf(weights, uniforms)


@dataclass
class NewTokens:
    """The latest token of some rows, which the model has not read yet, float32 or int64 [r] each."""

    ids: np.ndarray
    types: np.ndarray
    times: np.ndarray
    ages: np.ndarray
    orders: np.ndarray
    segments: np.ndarray
    before: np.ndarray  # `times` of the token before it


class Slots(Protocol):
    """Rows of a model."""

    def put(self, rows: np.ndarray, state: EhrMambaCache) -> None:
        """Give slots [r] the state of a record (of batch 1)."""
        ...

    def refresh(self) -> None:
        """Look at the model again: other code ran in between, which may have changed it."""
        ...

    def step(self, rows: np.ndarray, new: NewTokens) -> NextTokens:
        """Read one token in each of these slots, ascending [r]."""
        ...


class TorchSlots:
    """Slots by the model's own forward.

    Args:
        model: In evaluation mode.
        size: Number of slots.
        sets: Whose probabilities are told.
        sampling: What is drawn from.
    """

    def __init__(self, model: EhrMambaForCausalLM, size: int, sets: TokenSets, sampling: Sampling):
        self._model, self._sets, self._sampling = model, sets, sampling
        weight = model.lm_head.weight
        self._blocks = [
            EhrMambaCache(model.config, BLOCK_SLOTS, dtype=weight.dtype, device=weight.device)
            for _ in range(0, size, BLOCK_SLOTS)
        ]

    def put(self, rows: np.ndarray, state: EhrMambaCache) -> None:
        """See `Slots`."""
        for number in np.unique(rows // BLOCK_SLOTS):
            block = self._blocks[number]
            places = torch.from_numpy(rows[rows // BLOCK_SLOTS == number] % BLOCK_SLOTS).to(block.last_times.device)
            block.conv_states[:, places] = state.conv_states
            block.ssm_states[:, places] = state.ssm_states

    def refresh(self) -> None:
        """See `Slots`: the model is asked anew at every step."""

    def step(self, rows: np.ndarray, new: NewTokens) -> NextTokens:
        """See `Slots`."""
        hidden, weights = [], []
        for number in np.unique(rows // BLOCK_SLOTS):
            mine = rows // BLOCK_SLOTS == number
            states, logits = self._read(self._blocks[number], rows[mine] % BLOCK_SLOTS, new, mine)
            hidden.append(states)
            weights.append(self._sampling.probabilities(logits).cpu().numpy())
        return DenseTokens(torch.cat(hidden), np.concatenate(weights), self._sets)

    def _read(
        self, block: EhrMambaCache, places: np.ndarray, new: NewTokens, mine: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [r, d] and logits [r, V] of the rows at these places; the others read a pad token."""
        device = block.last_times.device

        def column(values: np.ndarray) -> Tensor:
            whole = np.zeros(BLOCK_SLOTS, dtype=values.dtype)
            whole[places] = values[mine]
            return torch.from_numpy(whole).to(device)[:, None]

        block.last_times = column(new.before)[:, 0].to(block.last_times.dtype)
        outputs = self._model.model(
            input_ids=column(new.ids),
            token_type_ids=column(new.types),
            times=column(new.times),
            ages=column(new.ages),
            visit_orders=column(new.orders),
            visit_segments=column(new.segments),
            cache_params=block,
            use_cache=True,
        )
        hidden = outputs.last_hidden_state[:, 0]
        logits = linear(self._model.lm_head, hidden).float()
        index = torch.from_numpy(places).to(device)
        return hidden[index], logits[index]


__all__ = ["DenseTokens", "NewTokens", "Sampling", "Slots", "TorchSlots"]

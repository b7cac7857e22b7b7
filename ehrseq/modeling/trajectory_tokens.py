"""Next tokens of a forecast: their probabilities at each row of a model, and draws from them by inverse CDF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class TokenSets:
    """Sets of tokens whose probabilities are asked for, one behind the other.

    Attributes:
        ids: int64 [k].
        starts: Where each set begins, and where the last one ends, int64 [sets + 1].
    """

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, sets: Sequence[np.ndarray]) -> TokenSets:
        """Of sets of ids."""
        starts = np.cumsum([0, *(len(ids) for ids in sets)], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, dtype=np.int64), *sets]).astype(np.int64), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def part(self, number: int) -> slice:
        """Where a set's tokens stand in `ids`."""
        return slice(int(self.starts[number]), int(self.starts[number + 1]))


class NextTokens(Protocol):
    """The distributions of the next token of some rows [r]."""

    @property
    def hidden(self) -> Tensor:
        """Hidden states that they come from, [r, d]."""
        ...

    @property
    def probabilities(self) -> np.ndarray:
        """Of the tokens of the sets, float64 [r, k]."""
        ...

    def draw(self, uniforms: np.ndarray, avoided: np.ndarray | None, kept: np.ndarray | None) -> np.ndarray:
        """One token of each row.

        Args:
            uniforms: In [0, 1), float64 [r].
            avoided: Number of the set whose tokens are less likely, int64 [r].
            kept: By what their probabilities are multiplied, float64 [r, most tokens of a set]; what is left is
                renormalised.

        Returns:
            int64 [r], -1 where nothing is left.
        """
        ...


def inverse_cdf(weights: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """The first token at which the summed weights exceed the uniform's share of all.

    Args:
        weights: At least 0, not necessarily normalised, float64 [V] or [r, V].
        uniforms: In [0, 1), float64 [r].

    Returns:
        int64 [r], -1 where all weights are 0. A token of weight 0 is never drawn.
    """
    sums = np.cumsum(weights, axis=-1)
    if sums.ndim == 1:
        drawn = np.searchsorted(sums, uniforms * sums[-1], side="right")
        return np.where(sums[-1] > 0, drawn, -1)
    drawn = (sums <= (uniforms * sums[:, -1])[:, None]).sum(axis=1)
    return np.where(sums[:, -1] > 0, drawn, -1)


__all__ = ["NextTokens", "TokenSets", "inverse_cdf"]

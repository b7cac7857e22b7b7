"""One token of many trajectories in two calls, on CPU in float32: each row's distribution of what comes next, a draw.

The first call takes the newest event of each row through the whole model (csrc/forecast.h), from its embedding to the
exponentials of its logits. The second draws from them. In between Python may look at what the model says. Every number
of a row is computed alike whatever the other rows and the threads.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import cpu_library
from .cpu_step import MIN_WORK_OF_A_TEAM

# Fields of ForecastCall (csrc/forecast.h): the weights around the blocks, float32 and contiguous.
FORECAST_WEIGHTS = (
    "words",
    "types",
    "orders",
    "segments",
    "time_w",
    "time_phi",
    "age_w",
    "age_phi",
    "project",
    "project_bias",
    "layer_weight",
    "layer_bias",
    "norm",
    "head",
)


class ForecastKernel:
    """Slots of a model's state, and the two calls that move rows of them on.

    Args:
        slots: Rows of the state.
        sizes: (layers, width, channels, state, rank, kernel) of the model.
        vocabulary: Tokens.
        time_size: Sines of a time.
        asked: Ids of the tokens whose probabilities are told, int64 [k].
        threads: At most so many.

    Attributes:
        conv_states: [layers, slots, channels, kernel - 1].
        ssm_states: [layers, slots, channels, state].
        hidden: After the final norm, [slots, width]; the first r rows are those of the last step.
        weights: exp(logit - largest), float32 [slots, V], likewise; a draw that avoids tokens changes them.
        probabilities: Of the asked tokens, float64 [slots, k], likewise.
    """

    def __init__(
        self,
        slots: int,
        sizes: tuple[int, int, int, int, int, int],
        vocabulary: int,
        time_size: int,
        asked: np.ndarray,
        threads: int,
    ):
        layers, self._width, channels, state, _, kernel = sizes
        self._sizes, self._vocabulary, self._time_size = sizes, vocabulary, time_size
        self._asked, self._threads = np.ascontiguousarray(asked, dtype=np.int64), threads
        self.conv_states = torch.zeros(layers, slots, channels, kernel - 1)
        self.ssm_states = torch.zeros(layers, slots, channels, state)
        self.hidden = torch.zeros(slots, self._width)
        self._embedded = torch.zeros(slots, self._width)
        self.weights = np.zeros((slots, vocabulary), dtype=np.float32)
        self.probabilities = np.zeros((slots, len(self._asked)))
        self._totals = np.zeros(slots)

    def step(
        self,
        table: Tensor,
        weights: Sequence[int],
        epsilons: tuple[float, float],
        places: np.ndarray,
        ids: Sequence[np.ndarray],
        times: Sequence[np.ndarray],
    ) -> None:
        """Read one token in each of some slots.

        Args:
            table: Of `step_table`, for the blocks.
            weights: Addresses, in the order of `FORECAST_WEIGHTS`.
            epsilons: Of the embedding's norm and of the final one.
            places: The slots, int64 [r].
            ids: Token, type, visit order and visit segment, int64 [r] each, within their tables.
            times: Weeks since the token before, and age in years, float32 [r] each.

        Raises:
            ValueError: The model gives no distribution (logits that are not finite).
        """
        layers, width, channels, state, rank, kernel = self._sizes
        rows, slots = len(places), len(self._totals)
        alone = cpu_library._forked or rows * max(channels, self._vocabulary // 2) * width < MIN_WORK_OF_A_TEAM
        step = [layers, rows, width, channels, state, rank, kernel, 1 if alone else self._threads]
        states = [table.data_ptr(), self._embedded.data_ptr(), self.conv_states.data_ptr(), self.ssm_states.data_ptr()]
        inputs = [_address(part) for part in (*ids, *times)]
        outputs = [_address(array) for array in (self.weights, self._totals, self.probabilities)]
        cpu_library.call(
            "ehrseq_forecast_step",
            [
                *(*step, *states, 0, slots, _address(places)),
                *(self._vocabulary, self._time_size, len(self._asked), *weights),
                *struct.unpack("2q", struct.pack("2d", *epsilons)),
                *(*inputs, _address(self._asked), self.hidden.data_ptr(), *outputs),
            ],
        )
        if not np.isfinite(self._totals[:rows]).all():
            raise ValueError("The model's logits are not finite: its weights, or the times of a record, are not sound.")

    def draw(
        self,
        uniforms: np.ndarray,
        ids: np.ndarray,
        starts: np.ndarray,
        avoided: np.ndarray | None,
        kept: np.ndarray | None,
    ) -> np.ndarray:
        """One token of each row of the last step, by inverse distribution function.

        Args:
            uniforms: Within [0, 1), float64 [r].
            ids: Of sets of tokens, one behind the other, int64 [k].
            starts: Where each set begins, and where the last one ends, int64 [sets + 1].
            avoided: The set of each row whose tokens are less likely, int64 [r]; None: none.
            kept: By what their weights are multiplied, float64 [r, most tokens of a set].

        Returns:
            int64 [r], -1 where all weights are 0.
        """
        drawn = np.empty(len(uniforms), dtype=np.int64)
        kept = None if kept is None else np.ascontiguousarray(kept)
        arrays = (self.weights, uniforms, ids, starts, avoided, kept, drawn)
        most = 0 if kept is None else kept.shape[1]
        cpu_library.call("ehrseq_forecast_draw", [len(uniforms), self._vocabulary, most, *map(_address, arrays)])
        return drawn


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else int(array.__array_interface__["data"][0])


__all__ = ["FORECAST_WEIGHTS", "ForecastKernel"]

"""The state of EhrMamba after the tokens seen so far: all that is needed to go on; its size does not grow with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .configuration_ehrmamba import EhrMambaConfig


class EhrMambaCache:
    """Recurrent state of a batch of patients, passed to and returned by the models as `cache_params`.

    Any number of further tokens of each row may follow: the outcome equals that of one pass over all of them. A
        forward pass replaces the
    three tensors; `clone()` keeps a state to come back to. It carries no gradients.

    Attributes:
        conv_states: Last inputs of each block's convolution, [layers, batch, d_inner, conv_kernel - 1], in the dtype
            of the model.
        ssm_states: State of each block's scan, [layers, batch, d_inner, state_size], at least float32.
        last_times: `times` of the last real token, [batch], weeks; NaN where a row has had none yet.
        seen_tokens: Columns of all passes so far, padding included.
    """

    is_compileable = False  # asked by `generate`
    is_croppable = False

    def __init__(
        self,
        config: EhrMambaConfig,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        layers, channels = config.num_hidden_layers, config.intermediate_size
        wide = torch.promote_types(dtype, torch.float32)
        self.conv_states = torch.zeros(layers, batch_size, channels, config.conv_kernel - 1, dtype=dtype, device=device)
        self.ssm_states = torch.zeros(layers, batch_size, channels, config.state_size, dtype=wide, device=device)
        self.last_times = torch.full((batch_size,), float("nan"), dtype=wide, device=device)
        self.seen_tokens = 0

    def __repr__(self) -> str:
        layers = self.ssm_states.shape[0]
        return f"EhrMambaCache(batch_size={self.batch_size}, layers={layers}, seen_tokens={self.seen_tokens})"

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.last_times.shape[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of all passes so far (the name that `generate` knows)."""
        return self.seen_tokens

    def update(self, conv_states: Tensor, ssm_states: Tensor, last_times: Tensor, num_tokens: int) -> None:
        """Replace the state by the one `num_tokens` columns later (shapes as in the attributes)."""
        self.conv_states = conv_states.detach().to(self.conv_states.dtype)
        self.ssm_states = ssm_states.detach()
        self.last_times = last_times.detach()
        self.seen_tokens += num_tokens

    def select(self, rows: Tensor | Sequence[int]) -> EhrMambaCache:
        """A new cache of these rows, in this order; a row may be taken several times."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.last_times.device)
        if index.dim() != 1:
            raise ValueError(
                f"EhrMambaCache.select: rows has {index.dim()} dimensions, expected a flat list of row numbers."
            )
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.batch_size):
            raise ValueError(
                f"EhrMambaCache.select: rows must lie in 0 .. {self.batch_size - 1}, got {index.tolist()}."
            )
        return self._replaced(self.conv_states[:, index], self.ssm_states[:, index], self.last_times[index])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in the order of `beam_idx` [batch], in place (beam search)."""
        self.__dict__.update(self.select(beam_idx).__dict__)

    def clone(self) -> EhrMambaCache:
        """A copy that further passes over this cache do not touch."""
        return self._replaced(self.conv_states.clone(), self.ssm_states.clone(), self.last_times.clone())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> EhrMambaCache:
        """A cache on another device; `dtype` applies to the convolution states, the others stay float32 or wider."""
        return self._replaced(
            self.conv_states.to(device=device, dtype=dtype),
            self.ssm_states.to(device=device),
            self.last_times.to(device=device),
        )

    @staticmethod
    def batch(caches: Sequence[EhrMambaCache]) -> EhrMambaCache:
        """One cache of the rows of several, in order; their histories may differ in length.

        Raises:
            ValueError: no cache given, or caches of models of different sizes.
        """
        if not caches:
            raise ValueError("EhrMambaCache.batch: got no cache, expected at least one.")
        shapes = {
            (*cache.conv_states.shape[::2], cache.conv_states.shape[3], *cache.ssm_states.shape[2:]) for cache in caches
        }
        if len(shapes) > 1:
            raise ValueError(f"EhrMambaCache.batch: the caches come from models of different sizes: {sorted(shapes)}.")
        merged = caches[0]._replaced(
            torch.cat([cache.conv_states for cache in caches], dim=1),
            torch.cat([cache.ssm_states for cache in caches], dim=1),
            torch.cat([cache.last_times for cache in caches]),
        )
        merged.seen_tokens = max(cache.seen_tokens for cache in caches)
        return merged

    def _replaced(self, conv_states: Tensor, ssm_states: Tensor, last_times: Tensor) -> EhrMambaCache:
        other = object.__new__(EhrMambaCache)
        other.conv_states, other.ssm_states, other.last_times = conv_states, ssm_states, last_times
        other.seen_tokens = self.seen_tokens
        return other


__all__ = ["EhrMambaCache"]

"""The state of EhrMamba after the tokens seen so far: all that is needed to go on; its size does not grow with them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .configuration_ehrmamba import EhrMambaConfig
from .ehrmamba_clock import GenerationClock

FILE_FORMAT = "ehrmamba-cache-1"
_TENSORS = {"conv_states": 4, "ssm_states": 4, "last_times": 1}  # name -> dimensions


class EhrMambaCache:
    """Recurrent state of a batch of patients, passed to and returned by the models as `cache_params`.

    Any number of further tokens of each row may follow: the outcome equals that of one pass over all of them. A forward
    pass replaces the three tensors, or changes them in place (single tokens on CPU); `clone()` keeps a state to come
    back to, `save()` one for another day. It carries no gradients.

    Attributes:
        conv_states: Last inputs of each block's convolution, [layers, batch, d_inner, conv_kernel - 1], in the dtype
            of the model.
        ssm_states: State of each block's scan, [layers, batch, d_inner, state_size], at least float32.
        last_times: `times` of the last real token, [batch], weeks; NaN where a row has had none yet.
        seen_tokens: Columns of all passes so far, padding included.
        clock: Where each row's clock stands, which `generate` keeps here; None outside of it. It is not saved.
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
        self.clock: GenerationClock | None = None
        self._own: tuple[Tensor, Tensor] | None = None

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
        self.advance(last_times, num_tokens)

    def advance(self, last_times: Tensor, num_tokens: int) -> None:
        """Take over the time of the last real tokens [batch], once the states are those `num_tokens` columns later."""
        self.last_times = last_times.detach()
        self.seen_tokens += num_tokens

    def states_to_change(self) -> tuple[Tensor, Tensor]:
        """(conv_states, ssm_states), contiguous, for a change in place.

        The first time they are copied: whoever holds the tensors of before keeps them as they were. The copies are the
        cache's own from then on, and what it hands out of them changes with every step. Autograd is told.
        """
        own = self._own
        if own is None or own[0] is not self.conv_states or own[1] is not self.ssm_states:
            conv_states, ssm_states = (
                t.detach().clone(memory_format=torch.contiguous_format) for t in (self.conv_states, self.ssm_states)
            )
            self.conv_states, self.ssm_states = self._own = own = (conv_states, ssm_states)
        for tensor in own:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        return own

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
        selected = self._replaced(self.conv_states[:, index], self.ssm_states[:, index], self.last_times[index])
        selected.clock = None if self.clock is None else self.clock.select(index)
        return selected

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in the order of `beam_idx` [batch], in place (beam search)."""
        self.__dict__.update(self.select(beam_idx).__dict__)

    def clone(self) -> EhrMambaCache:
        """A copy that further passes over this cache do not touch."""
        return self._replaced(self.conv_states.clone(), self.ssm_states.clone(), self.last_times.clone())

    __copy__ = clone  # `copy.copy`: two caches must not share what a step changes in place

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> EhrMambaCache:
        """A cache on another device; `dtype` applies to the convolution states, the others stay float32 or wider."""
        return self._replaced(
            self.conv_states.to(device=device, dtype=dtype, copy=True),
            self.ssm_states.to(device=device, copy=True),
            self.last_times.to(device=device, copy=True),
        )

    @staticmethod
    def batch(caches: Sequence[EhrMambaCache]) -> EhrMambaCache:
        """One cache of the rows of several, in order; their histories may differ in length.

        Raises:
            ValueError: no cache given, or caches of models of different sizes, dtypes or devices.
        """
        if not caches:
            raise ValueError("EhrMambaCache.batch: got no cache, expected at least one.")
        sizes = {cache.sizes for cache in caches}
        if len(sizes) > 1:
            raise ValueError(f"EhrMambaCache.batch: the caches come from models of different sizes: {sorted(sizes)}.")
        kinds = {(str(cache.conv_states.dtype), str(cache.last_times.device)) for cache in caches}
        if len(kinds) > 1:
            raise ValueError(
                f"EhrMambaCache.batch: the caches differ in dtype or device: {sorted(kinds)}. Use `cache.to(...)`."
            )
        merged = caches[0]._replaced(
            torch.cat([cache.conv_states for cache in caches], dim=1),
            torch.cat([cache.ssm_states for cache in caches], dim=1),
            torch.cat([cache.last_times for cache in caches]),
        )
        merged.seen_tokens = max(cache.seen_tokens for cache in caches)
        return merged

    def check_fits(self, config: EhrMambaConfig) -> None:
        """Raise a ValueError unless this is a state of a model of that configuration."""
        expected = (config.num_hidden_layers, config.intermediate_size, config.conv_kernel - 1, config.state_size)
        if self.sizes != expected:
            names = ("num_hidden_layers", "intermediate_size", "conv_kernel - 1", "state_size")
            wrong = [
                f"{name} {size} (the model has {own})"
                for name, size, own in zip(names, self.sizes, expected, strict=True)
                if size != own
            ]
            raise ValueError(f"This EhrMambaCache comes from another model: {', '.join(wrong)}. Prefill it again.")

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, which appears whole or not at all; folders are made.

        Its size depends on the model and the number of rows, not on the history. It holds no codes and no dates, but
        what the model gathered about the patients: keep it as carefully as their records.
        """
        target = Path(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).cpu().contiguous() for name in _TENSORS}
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            save_file(tensors, part, metadata={"format": FILE_FORMAT, "seen_tokens": str(self.seen_tokens)})
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def load(
        file: str | os.PathLike[str], config: EhrMambaConfig | None = None, device: torch.device | str = "cpu"
    ) -> EhrMambaCache:
        """Read what `save` wrote: the state continues exactly where it stopped.

        Args:
            file: The file.
            config: Configuration of the model that is to go on from it; checked when given.
            device: Where the tensors shall be.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is none of `save`, is damaged, or does not fit the configuration.
        """
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}: expected a state written by EhrMambaCache.save.")
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
        if metadata.get("format") != FILE_FORMAT or {name: t.dim() for name, t in tensors.items()} != _TENSORS:
            raise ValueError(
                f"{path} holds {sorted(tensors)} in format {metadata.get('format')!r}, expected {sorted(_TENSORS)} in "
                f"{FILE_FORMAT!r}: it was not written by EhrMambaCache.save."
            )
        cache = EhrMambaCache._of(**tensors, seen_tokens=int(metadata.get("seen_tokens", 0)))
        batches = {cache.conv_states.shape[1], cache.ssm_states.shape[1], cache.last_times.shape[0]}
        layers_and_channels = {(tensor.shape[0], tensor.shape[2]) for tensor in (cache.conv_states, cache.ssm_states)}
        if len(batches) > 1 or len(layers_and_channels) > 1:
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(f"{path} holds tensors that do not belong together: {shapes}.")
        if config is not None:
            cache.check_fits(config)
        return cache

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(layers, d_inner, conv_kernel - 1, state_size) of the model it belongs to."""
        layers, _, channels, past = self.conv_states.shape
        return layers, channels, past, self.ssm_states.shape[3]

    def _replaced(self, conv_states: Tensor, ssm_states: Tensor, last_times: Tensor) -> EhrMambaCache:
        return EhrMambaCache._of(conv_states, ssm_states, last_times, self.seen_tokens)

    @staticmethod
    def _of(conv_states: Tensor, ssm_states: Tensor, last_times: Tensor, seen_tokens: int) -> EhrMambaCache:
        cache = object.__new__(EhrMambaCache)
        cache.conv_states, cache.ssm_states, cache.last_times = conv_states, ssm_states, last_times
        cache.seen_tokens = seen_tokens
        cache.clock = None
        cache._own = None
        return cache


__all__ = ["EhrMambaCache"]

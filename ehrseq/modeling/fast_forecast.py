"""Slots of a forecast in the C++ kernels: one token of many trajectories through the whole model in one call.

Taken wherever it gives what the model's own forward would (float32 on CPU, evaluation); anything that stands in between
(hooks, adapters, quantised or offloaded weights, another backend asked for) leaves the rows to `TorchSlots`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .ehr_embeddings import EhrEmbeddings, TimeEmbedding
from .ehrmamba_cache import EhrMambaCache
from .fast_step import is_readable, is_wrapped, plan_blocks
from .mamba_block import EhrMambaRMSNorm
from .trajectory_slots import NewTokens
from .trajectory_tokens import NextTokens, TokenSets

if TYPE_CHECKING:
    from .modeling_ehrmamba import EhrMambaForCausalLM

try:  # absent where the file runs as a checkpoint's own code without the package
    from ehrseq.kernels import cpu_library
    from ehrseq.kernels.cpu_forecast import ForecastKernel
except ImportError:
    ForecastKernel = None  # type: ignore[assignment, misc]

# Modules around the blocks: (path in the model, class). Exactly these classes: another one does something else.
_MODULES: tuple[tuple[str, type[nn.Module]], ...] = (
    ("model.embeddings", EhrEmbeddings),
    ("model.embeddings.word_embeddings", nn.Embedding),
    ("model.embeddings.token_type_embeddings", nn.Embedding),
    ("model.embeddings.visit_order_embeddings", nn.Embedding),
    ("model.embeddings.visit_segment_embeddings", nn.Embedding),
    ("model.embeddings.time_embeddings", TimeEmbedding),
    ("model.embeddings.age_embeddings", TimeEmbedding),
    ("model.embeddings.projection", nn.Linear),
    ("model.embeddings.layer_norm", nn.LayerNorm),
    ("model.norm_f", EhrMambaRMSNorm),
    ("lm_head", nn.Linear),
)
# Their weights, in the order of `ehrseq.kernels.cpu_forecast.FORECAST_WEIGHTS`.
_WEIGHTS = (
    ("model.embeddings.word_embeddings", "weight"),
    ("model.embeddings.token_type_embeddings", "weight"),
    ("model.embeddings.visit_order_embeddings", "weight"),
    ("model.embeddings.visit_segment_embeddings", "weight"),
    ("model.embeddings.time_embeddings", "w"),
    ("model.embeddings.time_embeddings", "phi"),
    ("model.embeddings.age_embeddings", "w"),
    ("model.embeddings.age_embeddings", "phi"),
    ("model.embeddings.projection", "weight"),
    ("model.embeddings.projection", "bias"),
    ("model.embeddings.layer_norm", "weight"),
    ("model.embeddings.layer_norm", "bias"),
    ("model.norm_f", "weight"),
    ("lm_head", "weight"),
)


@dataclass(frozen=True)
class _Reach:
    """How the kernels reach a model, at the moment of asking.

    Attributes:
        table: Of the blocks.
        rank: Of the step-size projections.
        addresses: Of `_WEIGHTS`.
        epsilons: Of the embedding's norm and of the final one.
    """

    table: Tensor
    rank: int
    addresses: list[int]
    epsilons: tuple[float, float]


def why_not_fast(model: EhrMambaForCausalLM) -> str | None:
    """None where the kernels can draw from this model, else why they cannot."""
    reach = _reach(model)
    return reach if isinstance(reach, str) else None


def _reach(model: EhrMambaForCausalLM) -> _Reach | str:
    if ForecastKernel is None:
        return "the ehrseq package is not installed: the code of the checkpoint runs alone"
    reason = cpu_library.why_no_library()
    if reason is not None:
        return reason
    if os.environ.get("EHRSEQ_BACKEND") not in (None, "", "cpp"):
        return f"the environment variable EHRSEQ_BACKEND is {os.environ['EHRSEQ_BACKEND']!r}"
    if model.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled("cpu") or not cpu_library.is_plain() or torch.jit.is_tracing():
        return "autocast, a trace or a transform is on"
    if nn.modules.module._has_any_global_hook():
        return "a hook is set on all modules"
    if type(model.model).forward.__qualname__ != "EhrMambaModel.forward":
        return f"{type(model.model).__name__} is not the encoder that the kernels know"
    modules: dict[str, nn.Module] = {"": model, "model": model.model}
    for path, kind in _MODULES:
        holder, _, name = path.rpartition(".")
        module = modules[holder]._modules.get(name)
        if type(module) is not kind:
            return f"{path} is a {type(module).__name__}, not a {kind.__name__}"
        modules[path] = module
    wrapped = [path or "the model" for path, module in modules.items() if is_wrapped(module)]
    if wrapped:
        return f"{wrapped[0]} has hooks or a forward of its own"
    blocks = plan_blocks(model.model.layers)
    if blocks is None:
        return "a block is not what the kernels know, or not float32 on the CPU"
    shapes = _shapes(model.config)
    addresses = []
    for (path, name), shape in zip(_WEIGHTS, shapes, strict=True):
        weight = modules[path]._parameters.get(name)
        if not is_readable(weight, shape):
            return f"{path}.{name} is not a plain contiguous float32 tensor {list(shape)} on the CPU"
        addresses.append(weight.data_ptr())  # type: ignore[union-attr]
    layer_norm: Any = modules["model.embeddings.layer_norm"]
    norm: Any = modules["model.norm_f"]
    return _Reach(blocks.table, blocks.rank, addresses, (layer_norm.eps, norm.eps))


def _shapes(config: Any) -> list[tuple[int, ...]]:
    d, k = config.hidden_size, config.time_embeddings_size
    tables = (config.vocab_size, config.type_vocab_size, config.max_num_visits, config.visit_segment_size)
    return [*((size, d) for size in tables), *4 * [(1, k)], (d, d + 2 * k), *4 * [(d,)], (config.vocab_size, d)]


class FastSlots:
    """`Slots` in the kernels.

    Args:
        model: One for which `why_not_fast` is None.
        size: Number of slots.
        sets: Whose probabilities are told.
        threads: At most so many.
    """

    def __init__(self, model: EhrMambaForCausalLM, size: int, sets: TokenSets, threads: int):
        config = model.config
        self._model, self._sets = model, sets
        sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.state_size)
        whole = (*sizes, int(config.time_step_rank), config.conv_kernel)
        self.refresh()
        self._kernel = ForecastKernel(size, whole, config.vocab_size, config.time_embeddings_size, sets.ids, threads)

    def put(self, rows: np.ndarray, state: EhrMambaCache) -> None:
        """See `Slots`."""
        places = torch.from_numpy(rows)
        self._kernel.conv_states[:, places] = state.conv_states
        self._kernel.ssm_states[:, places] = state.ssm_states

    def refresh(self) -> None:
        """See `Slots`.

        Raises:
            RuntimeError: The model was changed since, so that the kernels no longer know it.
        """
        reach = _reach(self._model)
        if isinstance(reach, str):
            raise RuntimeError(f"The model was changed while trajectories were drawn from it: {reach}.")
        self._reach = reach

    def step(self, rows: np.ndarray, new: NewTokens) -> NextTokens:
        """See `Slots`."""
        reach, ids = self._reach, (new.ids, new.types, new.orders, new.segments)
        self._kernel.step(reach.table, reach.addresses, reach.epsilons, rows, ids, (new.times - new.before, new.ages))
        return _KernelTokens(self._kernel, len(rows), self._sets)


class _KernelTokens:
    """`NextTokens` whose weights stay in the kernels, until the next step."""

    def __init__(self, kernel: ForecastKernel, rows: int, sets: TokenSets):
        self.hidden = kernel.hidden[:rows]
        self.probabilities = kernel.probabilities[:rows]
        self._kernel, self._sets = kernel, sets

    def draw(self, uniforms: np.ndarray, avoided: np.ndarray | None, kept: np.ndarray | None) -> np.ndarray:
        """See `NextTokens`."""
        return self._kernel.draw(uniforms, self._sets.ids, self._sets.starts, avoided, kept)


__all__ = ["FastSlots", "why_not_fast"]

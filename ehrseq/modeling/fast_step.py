"""The streaming step: one token of each row through all blocks in one call of the C++ kernels.

`EhrMambaModel.forward` takes it by itself where it gives what the blocks would (float32 on CPU, evaluation without
gradients, one token a row that continues a state), and runs the blocks wherever anything stands in between: hooks,
adapters, quantised or offloaded weights, tracing, another backend asked for.

The walk over a model's modules for the addresses of its weights is made once and kept. Every step then looks whether
all of it still holds: the same modules without hooks, the same weights at the same place in the same layout. Values are
read where they are, so a change in place needs no notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .ehrmamba_cache import EhrMambaCache
from .mamba_block import CausalConv1d, EhrMambaBlock, EhrMambaMixer, EhrMambaRMSNorm

try:  # absent where the file runs as a checkpoint's own code without the package
    from ehrseq.kernels.cpu_step import run_step, step_serves, step_table
except ImportError:
    run_step = None  # type: ignore[assignment]

# A block's modules: (path inside the block, class). Exactly these classes: another one does something else.
_MODULES: tuple[tuple[str, type[nn.Module]], ...] = (
    ("norm", EhrMambaRMSNorm),
    ("mixer", EhrMambaMixer),
    ("mixer.in_proj", nn.Linear),
    ("mixer.conv1d", CausalConv1d),
    ("mixer.x_proj", nn.Linear),
    ("mixer.dt_proj", nn.Linear),
    ("mixer.out_proj", nn.Linear),
)
# Its weights, (path of the module, name), in the order of `ehrseq.kernels.cpu_step.STEP_WEIGHTS`.
_WEIGHTS = (
    ("norm", "weight"),
    ("mixer.in_proj", "weight"),
    ("mixer.in_proj", "bias"),
    ("mixer.conv1d", "weight"),
    ("mixer.conv1d", "bias"),
    ("mixer.x_proj", "weight"),
    ("mixer.dt_proj", "weight"),
    ("mixer.dt_proj", "bias"),
    ("mixer", "A_log"),
    ("mixer", "D"),
    ("mixer.out_proj", "weight"),
    ("mixer.out_proj", "bias"),
)


def step_blocks(layers: nn.ModuleList, hidden: Tensor, real: Tensor | None, cache: EhrMambaCache) -> Tensor | None:
    """One token of each row through the blocks, the cache's states updated in place.

    Args:
        layers: The `EhrMambaBlock`s.
        hidden: Embeddings, [b, 1, d].
        real: bool [b, 1], False at padding; None when there is none.
        cache: State to continue; its `conv_states` and `ssm_states` are moved on when a result is returned.

    Returns:
        Output of the last block [b, 1, d], or None when the blocks must be run the ordinary way; nothing has been
        changed then.
    """
    states = (cache.conv_states, cache.ssm_states)
    if run_step is None or torch.is_grad_enabled() or not step_serves(hidden.shape[0], hidden, *states):
        return None
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in (hidden, *states)):
        return None
    plan = plan_blocks(layers)
    if plan is None or hidden.shape[2] != plan.width:
        return None
    conv_states, ssm_states = cache.states_to_change()
    flags = None if real is None else real[:, 0]
    return run_step(plan.table, hidden[:, 0], conv_states, ssm_states, flags, plan.rank)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# The plan: what was found on the walk over the modules, and what it rests on
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class BlocksPlan:
    """What a walk found; it runs before every step, so `holds` loops over flat lists.

    Attributes:
        modules: (dict that holds the module, its name there, module).
        slots: (dict that holds the weight, its name there, weight or None).
        weights: The weights that are there, in order.
        layouts: Their addresses, sizes and strides at the time of the walk.
        norms: The norms, with the epsilons at that time.
        width: Hidden size.
        rank: Rank of the step-size projection.
        table: For `run_step`.
    """

    modules: list[tuple[dict[str, Any], str, nn.Module]]
    slots: list[tuple[dict[str, Any], str, Tensor | None]]
    weights: list[Tensor]
    layouts: list[list[Any]]
    norms: list[tuple[EhrMambaRMSNorm, float]]
    width: int
    rank: int
    table: Tensor

    def holds(self) -> bool:
        """Whether the model is still as it was on the walk."""
        for holder, name, module in self.modules:
            if holder.get(name) is not module or is_wrapped(module):
                return False
        for slot, name, weight in self.slots:
            if slot.get(name) is not weight:
                return False
        for norm, epsilon in self.norms:
            if norm.eps != epsilon:
                return False
        return _layouts(self.weights) == self.layouts and all(w.dtype is torch.float32 for w in self.weights)


_plans: WeakKeyDictionary[nn.Module, BlocksPlan] = WeakKeyDictionary()


def plan_blocks(layers: nn.ModuleList) -> BlocksPlan | None:
    """How the kernels reach the weights of these blocks, here and now; None where they cannot."""
    if type(layers) is not nn.ModuleList or nn.modules.module._has_any_global_hook():
        return None
    plan = _plans.get(layers)
    if plan is None or len(plan.norms) != len(layers) or not plan.holds():
        plan = _walk(layers)
        if plan is None:
            _plans.pop(layers, None)
        else:
            _plans[layers] = plan
    return plan


def _walk(layers: nn.ModuleList) -> BlocksPlan | None:
    """The plan of these blocks, None where a module or a weight is not what the kernels know."""
    modules: list[tuple[dict[str, Any], str, nn.Module]] = []
    slots: list[tuple[dict[str, Any], str, Tensor | None]] = []
    norms: list[tuple[EhrMambaRMSNorm, float]] = []
    rows = []
    shapes: dict[tuple[str, str], tuple[int, ...]] | None = None
    for index, block in layers._modules.items():
        found: dict[str, Any] = {"": block}
        if type(block) is not EhrMambaBlock:
            return None
        modules.append((layers._modules, index, block))
        for path, kind in _MODULES:
            parent, _, name = path.rpartition(".")
            holder = found[parent]._modules
            module = found[path] = holder.get(name)
            if type(module) is not kind:
                return None
            modules.append((holder, name, module))
        own_shapes = _shapes(found["mixer"])
        if shapes is not None and own_shapes != shapes:
            return None
        shapes = own_shapes
        addresses = []
        for path, name in _WEIGHTS:
            holder = found[path]._parameters
            tensor = holder.get(name)
            if tensor is None and name == "bias" and path != "mixer.dt_proj":
                slots.append((holder, name, None))
                addresses.append(0)
                continue
            if not is_readable(tensor, shapes[path, name]):
                return None
            slots.append((holder, name, tensor))
            addresses.append(tensor.data_ptr())
        norms.append((found["norm"], found["norm"].eps))
        rows.append((addresses, norms[-1][1]))
    if shapes is None or any(is_wrapped(module) for _, _, module in modules):
        return None
    width, rank = shapes["norm", "weight"][0], shapes["mixer.dt_proj", "weight"][1]
    weights = [tensor for _, _, tensor in slots if tensor is not None]
    return BlocksPlan(modules, slots, weights, _layouts(weights), norms, width, rank, step_table(rows))


def _shapes(mixer: EhrMambaMixer) -> dict[tuple[str, str], tuple[int, ...]]:
    config = mixer.config
    d, e, n, r = config.hidden_size, config.intermediate_size, config.state_size, int(config.time_step_rank)
    return {
        ("norm", "weight"): (d,),
        ("mixer.in_proj", "weight"): (2 * e, d),
        ("mixer.in_proj", "bias"): (2 * e,),
        ("mixer.conv1d", "weight"): (e, 1, config.conv_kernel),
        ("mixer.conv1d", "bias"): (e,),
        ("mixer.x_proj", "weight"): (r + 2 * n, e),
        ("mixer.dt_proj", "weight"): (e, r),
        ("mixer.dt_proj", "bias"): (e,),
        ("mixer", "A_log"): (e, n),
        ("mixer", "D"): (e,),
        ("mixer.out_proj", "weight"): (d, e),
        ("mixer.out_proj", "bias"): (d,),
    }


def is_readable(tensor: Any, shape: tuple[int, ...]) -> bool:
    """Whether it is a plain contiguous float32 tensor of that shape in this process's memory."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.shape == shape
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
    )


def _layouts(weights: list[Tensor]) -> list[list[Any]]:
    """Addresses, sizes and strides, by which a weight that was moved, cast or reshaped in its place is told."""
    return [list(map(of, weights)) for of in (Tensor.data_ptr, Tensor.numel, Tensor.stride)]


def is_wrapped(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's `forward`: hooks, or an own `forward` (offloading)."""
    return bool("forward" in module.__dict__ or module._forward_pre_hooks or module._forward_hooks)


__all__ = ["BlocksPlan", "is_readable", "is_wrapped", "plan_blocks", "step_blocks"]

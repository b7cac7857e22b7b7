"""One token through all blocks of a model in one call, on CPU in float32: the step that follows a patient's events.

A step of a single row multiplies little and reads every weight once, so what costs is reading them, and after that each
call from Python. Here a whole model is one call (csrc/step.h): its weights go over as addresses.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu_library

# Fields of StepLayer (csrc/step.h) before epsilon.
STEP_WEIGHTS = (
    "norm",
    "in_weight",
    "in_bias",
    "conv_weight",
    "conv_bias",
    "x_weight",
    "dt_weight",
    "dt_bias",
    "A_log",
    "D",
    "out_weight",
    "out_bias",
)
# Multiplications of the input projection (rows x channels x width) below which one thread does it all: a team waits for
# each other 200 times a step, and on a busy machine that costs more than it brings. 8 rows of the paper's model.
MIN_WORK_OF_A_TEAM = 9_000_000
MAX_ROWS = 128  # above, the ordinary pass is as fast


def step_table(layers: Sequence[tuple[Sequence[int], float]]) -> Tensor:
    """The table of a model's weights for `run_step`.

    Args:
        layers: For each block the addresses of its weights in the order of `STEP_WEIGHTS` (0 where there is none),
            float32 and contiguous, and the epsilon of its norm. Who calls `run_step` must keep the weights alive.
    """
    packed = b"".join(struct.pack(f"{len(STEP_WEIGHTS)}qd", *addresses, epsilon) for addresses, epsilon in layers)
    return torch.frombuffer(bytearray(packed), dtype=torch.int64)


def step_serves(rows: int, *tensors: Tensor) -> bool:
    """Whether `run_step` can serve that many rows of these tensors, here and now."""
    return (
        0 < rows <= MAX_ROWS
        and os.environ.get("EHRSEQ_BACKEND") in (None, "", "cpp")
        and cpu_library.is_plain(*tensors)
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and cpu_library.why_no_library() is None
    )


def run_step(
    table: Tensor,
    hidden: Tensor,
    conv_states: Tensor,
    ssm_states: Tensor,
    real: Tensor | None,
    rank: int,
) -> Tensor:
    """One token of each row through all blocks; the states are updated in place.

    Args:
        table: Of `step_table`.
        hidden: Embeddings, [b, d].
        conv_states: [layers, b, e, kernel - 1], contiguous.
        ssm_states: [layers, b, e, n], contiguous.
        real: bool [b], False at padding, which changes no state; None when there is none.
        rank: Rank of the step-size projection.

    Returns:
        Output of the last block, before the final norm, [b, d].
    """
    out = hidden.clone(memory_format=torch.contiguous_format)
    layers, rows, channels, state = ssm_states.shape
    alone = cpu_library._forked or rows * channels * hidden.shape[1] < MIN_WORK_OF_A_TEAM
    threads = 1 if alone else torch.get_num_threads()
    fields = [layers, rows, hidden.shape[1], channels, state, rank, conv_states.shape[3] + 1, threads]
    tensors = (out, conv_states, ssm_states)
    real = None if real is None else real.contiguous()
    addresses = [table.data_ptr(), *(t.data_ptr() for t in tensors), cpu_library.pointer(real)]
    cpu_library.call("ehrseq_model_step", [*fields, *addresses, rows, 0])
    return out


__all__ = ["MAX_ROWS", "MIN_WORK_OF_A_TEAM", "STEP_WEIGHTS", "run_step", "step_serves", "step_table"]

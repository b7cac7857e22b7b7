"""Hidden attention of a selective scan: what each step takes from every step before it (arXiv:2403.01590).

    h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t,    y_t = C_t h_t + D u_t

is, written out, an attention of each channel of its own:

    y_t = sum_(j <= t) a_(t,j) u_j + D u_t,    a_(t,j) = sum_n C_(t,n) exp(A_n sum_(k=j+1..t) delta_k) delta_j B_(j,n)

(Ali, Zimerman & Wolf, ACL 2025, with the step sizes summed in one exponential.) With step sizes, B and C given, y is
linear in u, so that a_(t,j) is the derivative of y_t by u_j: the backward of the scan's own kernel gives a whole row t
of all channels in O(l d n) time and the memory of an activation. No matrix l x l is made, and no exponential is kept.

Glossary: b batch, l length, d channels, n state size, m rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ehrseq.modeling.selective_scan import selective_scan


def scan_attention(
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    rows: Tensor | None = None,
    reset_mask: Tensor | None = None,
) -> Tensor:
    """Weights a_(t,j) of every channel, for some rows t or for all.

    Args:
        delta: Step sizes after bias and softplus, 0 at padding, [b, l, d].
        A: Decay rates, [d, n].
        B: [b, l, n].
        C: [b, l, n].
        rows: Steps t, int64 [b, m]; None for all, which takes l backward passes and l times the memory.
        reset_mask: bool [b, l], True where the state is zeroed before a step (packed sequences).

    Returns:
        [b, m, l, d], float32 at least: exactly 0 where j > t, and where the state is reset between the two.

    Raises:
        ValueError: Shapes that do not fit, or a row outside the length.
    """
    weigh = row_weights(delta, A, B, C, reset_mask)
    batch, length = delta.shape[:2]
    if rows is None:
        rows = torch.arange(length, device=delta.device).expand(batch, length)
    if rows.dim() != 2 or rows.shape[0] != batch or rows.is_floating_point():
        raise ValueError(f"scan_attention: rows are {rows.dtype} {list(rows.shape)}, expected int64 [{batch}, rows].")
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < length:
        raise ValueError(
            f"scan_attention: rows from {int(rows.min())} to {int(rows.max())}, expected 0 .. {length - 1}."
        )
    steps = torch.arange(length, device=delta.device)
    return torch.stack([weigh(steps == row[:, None]) for row in rows.unbind(1)], dim=1)


def row_weights(
    delta: Tensor, A: Tensor, B: Tensor, C: Tensor, reset_mask: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """A function that weighs one row of each sequence; arguments as in `scan_attention`.

    Returns:
        Chosen steps t, bool [b, l], one a sequence -> weights a_(t,j) of the steps j of that sequence, [b, l, d]. (More
        than one a sequence: the sum of their weights.)
    """
    dtype = torch.promote_types(delta.dtype, torch.float32)
    with torch.enable_grad():
        u = torch.zeros_like(delta, dtype=dtype).requires_grad_()
        constants = (delta.detach(), A.detach(), B.detach(), C.detach())
        y = cast(Tensor, selective_scan(u, *constants, reset_mask=reset_mask))

    def weigh(chosen: Tensor) -> Tensor:
        gradient = chosen[..., None].to(y.dtype).expand_as(y).contiguous()
        return torch.autograd.grad(y, u, gradient, retain_graph=True)[0]

    return weigh


__all__ = ["row_weights", "scan_attention"]

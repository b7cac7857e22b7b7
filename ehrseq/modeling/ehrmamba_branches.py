"""EhrMamba asked after each of many prefixes of one row in one pass: the state at each cut answers its own question.

The row goes through a block once. At a cut, where a prefix ends, the block's state is what a pass over the prefix alone
would have left: from there the prefix's tail (a visit's end, the task's token) is a branch of two tokens at most. All
branches go through the block as one batch, so that the price is one pass and two tokens a cut.

Where cuts lie close to one another, one state serves several: the few steps between are scanned again in the batch, by
the projections that are there already. Rows are read in chunks of tokens, branches in chunks of cuts: the memory is
that of the hidden states, and of one chunk's states, whatever the number of cuts.

Glossary: l tokens of the row, k prefixes, d hidden_size, e channels inside the mixer, n state_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .event_encoder import EventInputs
from .fast_linear import linear
from .mamba_block import EhrMambaBlock, Selection, at_least_float32

if TYPE_CHECKING:
    from .modeling_ehrmamba import EhrMambaModel

CHUNK_TOKENS = 2048
CHUNK_BRANCHES = 128
STEPS_AGAIN = 8
"""Steps between a kept state and a cut that it serves are fewer than this."""

_CHANNELS = ("token_type_ids", "times", "ages", "visit_orders", "visit_segments")


@dataclass(frozen=True)
class _Branches:
    """Where the branches leave the row. One entry a prefix.

    Attributes:
        cuts: Tokens of the row before the branch, [k], ascending, on the CPU.
        real: bool [k, 2], False where a branch is shorter.
    """

    cuts: Tensor
    real: Tensor


@torch.no_grad()
def branch_states(
    model: EhrMambaModel, inputs: Mapping[str, Tensor], ends: Tensor, tails: Mapping[str, Tensor], tail_lengths: Tensor
) -> Tensor:
    """What a head reads after each prefix: the normed hidden state of its last token, [k, d].

    Args:
        model: The encoder, in evaluation mode.
        inputs: Channels of the row, [1, l], unpadded.
        ends: First tokens that each prefix keeps, [k], ascending.
        tails: Channel -> [k, 2], what follows them.
        tail_lengths: How much of the two that is, 1 or 2, [k].
    """
    last = int(ends[-1])
    row = _embed(model, {name: channel[:, :last] for name, channel in inputs.items()}, None, None)
    real = torch.arange(2, device=tail_lengths.device) < tail_lengths[:, None]
    before = inputs["times"][0, ends - 1] if "times" in inputs else None
    branches = torch.cat(
        [
            _embed(
                model,
                {name: tail[part].to(inputs[name].dtype) for name, tail in tails.items() if name in inputs},
                real[part],
                None if before is None else before[part],
            )
            for part in torch.arange(len(ends), device=ends.device).split(CHUNK_TOKENS)
        ]
    )
    where = _Branches(ends.cpu(), real)
    for index, block in enumerate(model.layers):
        is_last = index == len(model.layers) - 1
        row, branches = _through_block(cast(EhrMambaBlock, block), row, branches, where, is_last)
    read = branches.gather(1, (tail_lengths - 1)[:, None, None].expand(-1, 1, branches.shape[-1]))
    hidden: Tensor = model.norm_f(read).squeeze(1)
    return hidden


def _embed(
    model: EhrMambaModel, inputs: Mapping[str, Tensor], real: Tensor | None, last_times: Tensor | None
) -> Tensor:
    """Embeddings [b, m, d] of tokens that follow others, the last of them at `last_times` [b]."""
    mask = None if real is None else real.long()
    types, times, ages, orders, segments = (inputs.get(name) for name in _CHANNELS)
    read = EventInputs.of(
        model.embeddings,
        model.config,
        inputs["input_ids"],
        mask,
        types,
        times,
        ages,
        orders,
        segments,
        None,
        None,
    )
    return read.embed(model.embeddings, last_times)


def _through_block(
    block: EhrMambaBlock, row: Tensor, branches: Tensor, where: _Branches, is_last: bool
) -> tuple[Tensor, Tensor]:
    """The row [1, l, d] (of the last block nothing is read but its states) and its branches [k, 2, d] after a block."""
    mixer, past = block.mixer, block.mixer.config.conv_kernel - 1
    new_row, new_branches = [], []
    before = row.new_zeros(1, past, mixer.config.intermediate_size)  # the convolution's last inputs
    state: Tensor | None = None
    start, first = 0, 0
    for chunk in row.split(CHUNK_TOKENS, dim=1):
        # 1. The row, up to the scan.
        x, z = mixer.project(block.norm(chunk))
        before = before.to(x.dtype)
        u, _ = mixer.conv1d(x, before.transpose(1, 2), None, None, False)
        selection = mixer.select(u)
        inputs = torch.cat([before, x], dim=1)[0]  # [past + m, e]
        before = inputs[None, inputs.shape[0] - past :]
        # 2. The scan, which stops where a state is kept.
        stop = start + chunk.shape[1]
        behind = first + int((where.cuts[first:] <= stop).sum())
        cuts = where.cuts[first:behind] - start  # tokens of the chunk before each branch
        kept_at, kept_of = _kept(cuts)
        states, outputs, done = [], [], 0
        for until in [*kept_at.tolist(), chunk.shape[1]]:
            if until > done:
                part = slice(done, until)
                y, state = mixer.scan(u[:, part], z[:, part], _at(selection, part), state, None, True)
                outputs.append(y)
                done = until
            states.append(cast(Tensor, state))
        if not is_last:
            new_row.append(_residual(block, chunk) + linear(mixer.out_proj, torch.cat(outputs, dim=1)))
        # 3. The branches that leave it here.
        for low in range(0, len(cuts), CHUNK_BRANCHES):
            part = slice(low, min(low + CHUNK_BRANCHES, len(cuts)))
            members = slice(first + part.start, first + part.stop)
            serving = torch.cat([states[number] for number in kept_of[part].tolist()])
            new_branches.append(
                _branch_off(
                    block,
                    branches[members],
                    where.real[members],
                    cuts[part],
                    kept_at[kept_of[part]],
                    serving,
                    inputs,
                    u,
                    selection,
                )
            )
        start, first = stop, behind
    return torch.cat(new_row, dim=1) if new_row else row, torch.cat(new_branches)


def _branch_off(
    block: EhrMambaBlock,
    hidden: Tensor,
    real: Tensor,
    cuts: Tensor,
    kept_at: Tensor,
    states: Tensor,
    inputs: Tensor,
    u: Tensor,
    selection: Selection,
) -> Tensor:
    """Branches [c, 2, d] after a block.

    Args:
        block: The block.
        hidden: Before it, [c, 2, d].
        real: bool [c, 2].
        cuts: Tokens of the chunk before each branch, [c].
        kept_at: Those before the state that serves it, [c].
        states: These states, [c, e, n].
        inputs: Inputs of the chunk's convolution behind the k - 1 before them, [k - 1 + m, e].
        u: The convolution's outputs in the chunk, [1, m, e].
        selection: What they choose.
    """
    mixer, past, device = block.mixer, block.mixer.config.conv_kernel - 1, hidden.device
    x, z = mixer.project(block.norm(hidden), real)
    window = (cuts[:, None] + torch.arange(past)).to(device)
    branch_u, _ = mixer.conv1d(x, inputs[window].transpose(1, 2), None, None, False)
    branch = mixer.select(branch_u, real)
    # The steps between the kept state and the cut, again; before them steps of size 0.
    again = int((cuts - kept_at).max())
    steps = cuts[:, None] - again + torch.arange(again)  # [c, again]
    none = (steps < kept_at[:, None]).to(device)
    steps = steps.clamp(min=0).to(device)
    joined = Selection(
        torch.cat([selection.delta[0, steps].masked_fill(none[..., None], float("-inf")), branch.delta], dim=1),
        torch.cat([selection.B[0, steps], branch.B], dim=1),
        torch.cat([selection.C[0, steps], branch.C], dim=1),
        branch.delta_bias,
    )
    scanned = torch.cat([u[0, steps], branch_u], dim=1)
    gate = torch.cat([z.new_zeros(len(cuts), again, z.shape[-1]), z], dim=1)
    y, _ = mixer.scan(scanned, gate, joined, states)
    return _residual(block, hidden) + linear(mixer.out_proj, y[:, again:])


def _kept(cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Where states are kept, [a], and which of them serves each cut, [c]: that of the first of a run of close cuts."""
    places: list[int] = []
    serves = []
    for cut in cuts.tolist():
        if not places or cut - places[-1] >= STEPS_AGAIN:
            places.append(cut)
        serves.append(len(places) - 1)
    return torch.tensor(places, dtype=torch.int64), torch.tensor(serves, dtype=torch.int64)


def _at(selection: Selection, part: slice) -> Selection:
    return Selection(selection.delta[:, part], selection.B[:, part], selection.C[:, part], selection.delta_bias)


def _residual(block: EhrMambaBlock, hidden: Tensor) -> Tensor:
    return at_least_float32(hidden) if block.residual_in_fp32 else hidden


__all__ = ["branch_states"]

"""Integrated gradients, and what every explanation is held against: gradient x input, and numbers drawn by chance.

    integrated_gradients(question)                                  # 64 nodes from [PAD] in the place of every event
    integrated_gradients(question, ("padding", "mean"))             # the mean over two baselines
    gradient_times_input(question), random_contributions(question, seed=0)

On the straight line from a baseline x' to the record x the log-odds of the risk F change by what each token's part of
the line adds (Sundararajan 2017, arXiv:1703.01365):

    IG_i = (x_i - x'_i) . integral over a in (0, 1) of dF/dx_i(x' + a (x - x')),       sum_i IG_i = F(x) - F(x')

The integral is taken at Gauss-Legendre nodes, so that the sum is met up to a remainder which falls with the number of
nodes; the remainder is told.

What is moved and what is held. In the models of events x is the concept embedding of each token: what was recorded. Its
time, age, visit and kind are other channels, which the line leaves alone, as it does marks of visits and intervals
(unless `over` names them) and the task's token, the question itself. In HyMaTE x are the values of the triplets, and
their times where `over` says so. Which variable was measured, and how often, is held: that something was measured at
all is no part of the answer (occlusion has it). The summaries and the additive part of HyMaTE are computed from the
same values inside of F, and so is their part of the contributions. Of times some features are steps (the last quarter
of a window, an hour's bin), which no gradient sees; what they add is in the remainder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from ehrseq.batches.scoring import RiskModel

LogOdds = Callable[[dict[str, Tensor]], Tensor]
"""Inputs of a model -> log-odds of the risk, [b], or [b, S] of packed rows."""

EVENT_BASELINES = {
    "padding": "[PAD] in the place of every event",
    "unknown": "[UNK] in the place of every event",
    "mean": "the mean code in the place of every event",
    "structure": "the same visits without codes: of every event its kind alone",
}
"""Baselines of the models of events, in words; `structure` is the mean code of the event's own kind."""
STAY_BASELINES = {"mean": "every value at its variable's mean"}
"""Baselines of HyMaTE: z-scores of 0 (and times in the middle of the window, where times are moved)."""

EVENT_PARTS = ("events", "structure")
STAY_PARTS = ("values", "times")
TOKENS_AT_ONCE = 16_384
"""Tokens of the points of a line that are computed together: bounds the memory, which is linear in the length."""


@dataclass(frozen=True)
class Line:
    """A row as a point that can be moved.

    Attributes:
        record: The channels that are moved, as the record has them: `inputs_embeds` [b, l, d], or `values` and perhaps
            `times` [b, n], in the dtype of the weights.
        held: All other channels.
        moves: bool [b, l], the tokens or triplets that are moved.
    """

    record: dict[str, Tensor]
    held: dict[str, Tensor]
    moves: Tensor

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Tensor], moves: Tensor, parts: Sequence[str]) -> Line:
        """Split the inputs of a model.

        Args:
            model: A classifier, of events or of stays.
            inputs: What its `forward` takes.
            moves: bool [b, l].
            parts: For a model of stays, the channels that are moved.
        """
        dtype = next(model.parameters()).dtype
        if "input_ids" not in inputs:
            record = {name: inputs[name].to(dtype) for name in parts}
            return cls(record, {name: tensor for name, tensor in inputs.items() if name not in record}, moves)
        embed = cast(Any, model).get_input_embeddings()
        with torch.no_grad():
            record = {"inputs_embeds": embed(inputs["input_ids"])}
        return cls(record, {name: tensor for name, tensor in inputs.items() if name != "input_ids"}, moves)

    def from_point(self, elsewhere: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The record with the moved tokens elsewhere: the start of the line."""
        return {
            name: torch.where(self.moves[..., None] if tensor.dim() == 3 else self.moves, elsewhere[name], tensor)
            for name, tensor in self.record.items()
        }


# -- numerics --------------------------------------------------------------------------------------------------------


def integrate_gradients(
    log_odds: LogOdds, line: Line, start: Mapping[str, Tensor], nodes: int, tokens_at_once: int = TOKENS_AT_ONCE
) -> Tensor:
    """Contribution of every token: the integral of the gradient along the line, by captum.

    Args:
        log_odds: F.
        line: The record.
        start: The baseline, shapes as `line.record`.
        nodes: Gauss-Legendre nodes.
        tokens_at_once: Tokens of all points that are computed together.

    Returns:
        [b, l], exactly 0 where nothing moves.
    """
    attribution = load_captum()
    names, held = list(line.record), list(line.held)
    batch, length = line.moves.shape
    at_once = max(1, tokens_at_once // max(1, batch * length))

    def forward(*tensors: Tensor) -> Tensor:
        return total_of_rows(log_odds, dict(zip([*names, *held], tensors, strict=True)))

    parts = attribution.IntegratedGradients(forward).attribute(
        tuple(line.record[name] for name in names),
        tuple(start[name] for name in names),
        additional_forward_args=tuple(line.held[name] for name in held),
        n_steps=nodes,
        method="gausslegendre",
        internal_batch_size=batch * min(at_once, nodes),
    )
    return sum_of_channels(parts)


def gradient_times_difference(log_odds: LogOdds, line: Line, start: Mapping[str, Tensor]) -> Tensor:
    """(x - x') . dF/dx(x) of every token, [b, l]."""
    points = {name: tensor.clone().requires_grad_() for name, tensor in line.record.items()}
    with torch.enable_grad():
        total = total_of_rows(log_odds, {**points, **line.held}).sum()
    gradients = torch.autograd.grad(total, list(points.values()))
    return sum_of_channels(
        gradient * (line.record[name] - start[name]) for name, gradient in zip(points, gradients, strict=True)
    )


def total_of_rows(log_odds: LogOdds, inputs: dict[str, Tensor]) -> Tensor:
    """Log-odds of each row, [b]; of a packed row the sum of its patients', who do not see each other.

    Every moved channel is part of the sum, a channel that the model does not read with a gradient of 0.
    """
    values = log_odds(inputs)
    segments = inputs.get("segment_ids")
    if segments is not None:
        numbers = torch.arange(1, values.shape[-1] + 1, device=values.device)
        values = torch.where(numbers <= segments.amax(1, keepdim=True), values, 0.0).sum(1)
    moved = [tensor for tensor in inputs.values() if tensor.requires_grad]
    return values + sum((0.0 * tensor.flatten(1).sum(1) for tensor in moved), torch.zeros_like(values))


def sum_of_channels(parts: Any) -> Tensor:
    """Sum over channels and their widths: tensors [b, l, ...] -> [b, l]."""
    total: Tensor = sum(part.flatten(2).sum(-1) if part.dim() > 2 else part for part in parts)  # type: ignore[assignment]
    return total.detach()


def concepts_elsewhere(
    weight: Tensor, baseline: str, token_type_ids: Tensor, types: Tensor, pad_id: int, unknown_id: int
) -> Tensor:
    """The concept embedding that stands for each token at a baseline.

    Args:
        weight: Embeddings of the vocabulary, [V, d].
        baseline: One of `EVENT_BASELINES`.
        token_type_ids: Kind of each token, [b, l].
        types: Kind of each id of the vocabulary, [V], negative where it is no event.
        pad_id: Of [PAD].
        unknown_id: Of [UNK].

    Returns:
        [b, l, d]. `mean` is the mean over the vocabulary's events, each counted once: a tokenizer does not keep how
        often it saw them.
    """
    events = types >= 0
    everything = weight[events].mean(0) if bool(events.any()) else weight[unknown_id]
    if baseline == "structure":
        table = weight.new_zeros(int(max(token_type_ids.max(), types.max())) + 1, weight.shape[1])
        for kind in range(len(table)):
            here = types == kind
            table[kind] = weight[here].mean(0) if bool(here.any()) else everything
        return table[token_type_ids]
    stands = {"padding": weight[pad_id], "unknown": weight[unknown_id], "mean": everything}[baseline]
    return stands.expand(*token_type_ids.shape, -1)


def noisy(line: Line, start: Mapping[str, Tensor], share: float, generator: torch.Generator) -> Line:
    """The record with noise on what is moved, of `share` times the root mean square of its way from the baseline."""
    record = {}
    for name, tensor in line.record.items():
        moves = line.moves[..., None] if tensor.dim() == 3 else line.moves
        way = (tensor - start[name])[moves.expand_as(tensor)]
        scale = share * way.square().mean().sqrt() if len(way) else way.new_zeros(())
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        record[name] = tensor + scale * drawn * moves
    return Line(record, line.held, line.moves)


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode and without gradients of its weights, in float32 at least; as it was, afterwards.

    A model in half precision is copied: the mean of sixty rounded gradients would be off by more than many
    contributions.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if any(torch.finfo(dtype).bits < 32 for dtype in dtypes):
        model = copy.deepcopy(model).float()
    training = model.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    # cuDNN has no backward pass of an LSTM in evaluation mode.
    has_lstm = any(isinstance(module, nn.LSTM) for module in model.modules())
    without_cudnn = torch.backends.cudnn.flags(enabled=False) if has_lstm and torch.cuda.is_available() else nullcontext()
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with without_cudnn, torch.inference_mode(False):
            yield model
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)


def load_captum() -> Any:
    """`captum.attr`.

    Raises:
        ImportError: captum is not installed; the message names the extra.
    """
    try:
        import captum.attr
    except ImportError as error:
        raise ImportError('Integrated gradients need captum: pip install "ehrseq[explain]".') from error
    return captum.attr

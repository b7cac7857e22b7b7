"""Gradients of the log-odds by what was recorded, the baselines that they start from, and the two explanations that
every other is held against: gradient x input, and numbers drawn by chance.

    gradient_times_input(question), random_contributions(question, seed=0)

What is moved and what is held. In the models of events it is the concept embedding of each token: what was recorded.
Its time, age, visit and kind are other channels and are held, as are marks of visits and intervals (unless `over` names
them) and the task's token, the question itself. In HyMaTE it is the values of the triplets, and their times where
`over` says so. Which variable was measured, and how often, is held: that something was measured at all is no part of
the answer (occlusion has it). The summaries and the additive part of HyMaTE are computed from the same values inside
of the model, and so is their part of the contributions. Of times some numbers are steps (the last quarter of a window,
an hour's bin), which no gradient sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ehrseq.interpretability.explanation import Attribution, Explanation
from ehrseq.interpretability.relevance_propagation import at_least_single, check_two_classes, without_dropout
from ehrseq.tokenization.ehr_vocabulary import KIND_TYPES, UNK

if TYPE_CHECKING:
    from ehrseq.interpretability.questions import Question

EVENT_BASELINES = {
    "padding": "[PAD] in the place of every event",
    "unknown": "[UNK] in the place of every event",
    "mean": "the mean code in the place of every event",
    "structure": "the same visits without codes: of every event its kind alone",
}
"""Baselines of the models of events, in words."""
STAY_BASELINES = {"mean": "every value at its variable's mean"}
"""Baselines of HyMaTE: z-scores of 0, and times in the middle of the window where times are moved."""
EVENT_PARTS = ("events", "structure")
STAY_PARTS = ("values", "times")

_EVENT_TYPES = sorted(set(KIND_TYPES.values()))


@dataclass(frozen=True)
class Line:
    """The straight way from a baseline to a record; what stands at its two ends is a row of the model.

    Attributes:
        start: Channels that are moved, at the baseline: `inputs_embeds` [b, l, d], or `values` and perhaps `times`
            [b, l], in the dtype of the weights.
        end: The same of the record.
        held: All other channels.
    """

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    held: dict[str, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens)."""
        rows, tokens = next(iter(self.end.values())).shape[:2]
        return rows, tokens


def event_line(
    model: Any, inputs: Mapping[str, Tensor], moves: Tensor, baseline: str, types: Sequence[int], unknown_id: int
) -> Line:
    """The way of a row of events from a baseline.

    Args:
        model: A classifier of events.
        inputs: Its channels, [b, l].
        moves: bool [b, l], the tokens that are moved.
        baseline: One of `EVENT_BASELINES`. The mean code is the mean over the vocabulary's events, each counted once
            (a tokenizer does not keep how often it saw them); `structure` takes that of the token's own kind.
        types: Token type of each id of the vocabulary.
        unknown_id: Of [UNK].
    """
    weight = model.get_input_embeddings().weight.detach()
    record = weight[inputs["input_ids"]]
    kinds = torch.as_tensor(types, device=weight.device)
    is_event = torch.isin(kinds, torch.as_tensor(_EVENT_TYPES, device=weight.device))
    is_event[unknown_id] = False
    mean = weight[: len(kinds)][is_event].mean(0) if bool(is_event.any()) else weight[unknown_id]
    if baseline == "structure":
        rows = inputs["token_type_ids"]
        table = mean.repeat(int(max(rows.max(), kinds.max())) + 1, 1)
        for kind in kinds[is_event].unique().tolist():
            table[kind] = weight[: len(kinds)][is_event & (kinds == kind)].mean(0)
        elsewhere = table[rows]
    else:
        stands = {"padding": weight[model.config.pad_token_id], "unknown": weight[unknown_id], "mean": mean}
        elsewhere = stands[baseline].expand_as(record)
    start = torch.where(moves[..., None], elsewhere, record)
    held = {name: channel for name, channel in inputs.items() if name != "input_ids"}
    return Line({"inputs_embeds": start}, {"inputs_embeds": record}, held)


def stay_line(model: Any, inputs: Mapping[str, Tensor], parts: Sequence[str]) -> Line:
    """The way of a stay from z-scores of 0 (`parts` has "values"), and times in the middle of the window ("times")."""
    dtype = next(model.parameters()).dtype
    end = {name: inputs[name].to(dtype) for name in STAY_PARTS if name in parts}
    held = {name: channel for name, channel in inputs.items() if name not in end}
    return Line({name: torch.zeros_like(channel) for name, channel in end.items()}, end, held)


def row_log_odds(model: Any, inputs: Mapping[str, Tensor], task_id: int) -> Tensor:
    """Log-odds of each row, [b]; of a packed row the sum of its patients', who do not see each other."""
    logits = model(**inputs).logits
    task_ids = torch.full(logits.shape[:-1], task_id, dtype=torch.int64, device=logits.device)
    log_odds: Tensor = model.log_odds(logits, task_ids)
    segments = inputs.get("segment_ids")
    if segments is None:
        return log_odds
    numbers = torch.arange(1, log_odds.shape[-1] + 1, device=log_odds.device)
    return torch.where(numbers <= segments.amax(1, keepdim=True), log_odds, 0.0).sum(1)


def differentiable_log_odds(model: Any, inputs: Mapping[str, Tensor], task_id: int) -> Tensor:
    """The same, in which every channel has a part: one that the model does not read, with a gradient of 0."""
    log_odds = row_log_odds(model, inputs, task_id)
    for channel in inputs.values():
        if channel.requires_grad:
            log_odds = log_odds + 0.0 * channel.flatten(1).sum(1)
    return log_odds


def gradient_times_way(model: Any, line: Line, task_id: int) -> Tensor:
    """(x - x') . dF/dx(x) of every token, [b, l]: the way to the record by the gradient at its end."""
    points = {name: channel.clone().requires_grad_() for name, channel in line.end.items()}
    total = differentiable_log_odds(model, {**points, **line.held}, task_id).sum()
    gradients = torch.autograd.grad(total, list(points.values()))
    return sum_of_channels(
        gradient * (line.end[name] - line.start[name]) for name, gradient in zip(points, gradients, strict=True)
    )


def sum_of_channels(parts: Iterator[Tensor] | Sequence[Tensor]) -> Tensor:
    """Channels [b, l, ...] summed over their widths and over each other: [b, l]."""
    sums = [part.detach().flatten(2).sum(2) if part.dim() > 2 else part.detach() for part in parts]
    return torch.stack(sums).sum(0)


@contextmanager
def ready_for_gradients(method: str, model: Any) -> Iterator[Any]:
    """The model without dropout and without gradients of its weights, in float32 at least; as it was, afterwards.

    A model in half precision is copied: the mean of sixty rounded gradients would be off by more than many
    contributions are.

    Raises:
        ValueError: Another number of classes than two.
    """
    check_two_classes(method, model)
    model = at_least_single(model)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # cuDNN has no backward pass of an LSTM in evaluation mode.
    is_recurrent = any(isinstance(module, nn.LSTM) for module in model.modules())
    plain: Any = torch.backends.cudnn.flags(enabled=False) if is_recurrent else nullcontext()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with without_dropout(model), plain, torch.inference_mode(False), torch.enable_grad():
            yield model
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


# -- of a question ---------------------------------------------------------------------------------------------------


def reads_stays(question: Question) -> bool:
    """Whether the model reads triplets, not tokens."""
    return "input_ids" not in question.inputs


def checked_parts(question: Question, over: str | Sequence[str] | None) -> tuple[str, ...]:
    """What is moved, in the one order of `EVENT_PARTS` or `STAY_PARTS`; by default the first of them.

    Raises:
        ValueError: A part that the model does not have, or none.
    """
    known = STAY_PARTS if reads_stays(question) else EVENT_PARTS
    wanted = known[:1] if over is None else (over,) if isinstance(over, str) else tuple(over)
    if not wanted or not set(wanted) <= set(known):
        raise ValueError(f"over got {over!r}; a model of this family has {list(known)}, name at least one.")
    return tuple(part for part in known if part in wanted)


def moved_tokens(question: Question, parts: Sequence[str]) -> np.ndarray:
    """Bool [l], the tokens that `parts` names; the task's token never."""
    made = question.event_of >= 0
    if reads_stays(question):
        return np.ones_like(made)
    encoder: Any = question.checkpoint.encoder
    questions = encoder.convert_tokens_to_ids(list(encoder.task_tokens.values()))
    asks = np.isin(question.inputs["input_ids"][0].cpu().numpy(), questions) & ~made
    moved: np.ndarray = (made & ("events" in parts)) | (~made & ~asks & ("structure" in parts))
    return moved


def question_line(question: Question, model: Any, baseline: str, parts: Sequence[str]) -> Line:
    """The way of a question's row from a baseline of this name."""
    inputs = {name: channel.clone() for name, channel in question.inputs.items()}  # none of inference mode
    if reads_stays(question):
        return stay_line(model, inputs, parts)
    encoder: Any = question.checkpoint.encoder
    moves = torch.from_numpy(moved_tokens(question, parts))[None].to(model.device)
    unknown = encoder.convert_tokens_to_ids(UNK)
    return event_line(model, inputs, moves, baseline, encoder.token_types, unknown)


def ends_of_line(model: Any, line: Line, task_id: int) -> tuple[float, float]:
    """Log-odds at (the baseline, the record) of a single row."""
    with torch.no_grad():
        start, end = (float(row_log_odds(model, {**part, **line.held}, task_id)[0]) for part in (line.start, line.end))
    return start, end


def gradient_times_input(question: Question, over: str | Sequence[str] | None = None) -> Explanation:
    """The gradient at the record by each token's embedding, times the embedding; of stays, times the z-score.

    The embedding is taken from that of [PAD], which is 0 in the checkpoints of this package. The contributions sum to
    nothing: what is left to the log-odds, from [PAD] in the place of every event on, is the remainder.

    Args:
        question: What is explained.
        over: What has contributions, see the head of this module: "events" (default) and "structure", or of stays
            "values" (default) and "times".

    Raises:
        ValueError: A part that the model does not have, or another number of classes than two.
    """
    parts = checked_parts(question, over)
    baseline, words = next(iter((STAY_BASELINES if reads_stays(question) else EVENT_BASELINES).items()))
    named: dict[str, Any] = {"method": "gradient_times_input", "baseline_name": words, "settings": {"over": parts}}
    if not question.has_answer:
        return Explanation.of(question, None, **named)
    with ready_for_gradients("gradient_times_input", question.checkpoint.model) as model:
        line = question_line(question, model, baseline, parts)
        start, end = ends_of_line(model, line, question.task_id)
        values = gradient_times_way(model, line, question.task_id)[0].double().cpu().numpy()
    return Explanation.of(question, Attribution(values, end, start), **named)


def random_contributions(question: Question, seed: int = 0) -> Explanation:
    """Numbers drawn by chance that sum to the log-odds of the risk: what every method must beat.

    Args:
        question: What is explained.
        seed: Seed of the draws.

    Raises:
        ValueError: A seed that is no whole number of at least 0, or another number of classes than two.
    """
    check_whole_number("seed", seed, 0)
    parts = checked_parts(question, None)
    baseline, words = next(iter((STAY_BASELINES if reads_stays(question) else EVENT_BASELINES).items()))
    named: dict[str, Any] = {"method": "random_contributions", "baseline_name": words, "settings": {"seed": seed}}
    if not question.has_answer:
        return Explanation.of(question, None, **named)
    with ready_for_gradients("random_contributions", question.checkpoint.model) as model:
        start, end = ends_of_line(model, question_line(question, model, baseline, parts), question.task_id)
    moved = np.flatnonzero(moved_tokens(question, parts))
    values = np.zeros(len(question.event_of))
    if len(moved):
        drawn = np.random.default_rng(seed).normal(size=len(moved))
        values[moved] = (end - start) / len(moved) + drawn - drawn.mean()
    return Explanation.of(question, Attribution(values, end, start), **named)


def check_whole_number(name: str, value: object, least: int) -> None:
    """Raise a ValueError unless it is one of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} got {value!r}; expected a whole number of at least {least}.")

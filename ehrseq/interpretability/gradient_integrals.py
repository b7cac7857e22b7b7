"""Integrated gradients: what each token adds to the log-odds on the way from a baseline to the record.

    integrated_gradients(question)                              # 64 nodes from [PAD] in the place of every event
    integrated_gradients(question, ("padding", "mean"))         # the mean over two baselines
    integrated_gradients(question, noise=8, seed=0)             # the mean over eight records with noise

On the straight line from a baseline x' to the record x (Sundararajan 2017, arXiv:1703.01365; computed by captum)

    IG_i = (x_i - x'_i) . integral over a in (0, 1) of dF/dx_i(x' + a (x - x')),       sum_i IG_i = F(x) - F(x')

The integral is taken at Gauss-Legendre nodes: the sum is met up to a remainder that falls with their number and is
told. Where F has a cliff on the way (a trained LSTM between [PAD] and a record), 64 nodes may miss a tenth of it: then
their number is doubled until 1 % is left. What x is, and what is held, stands at the head of `gradients`. A step in F,
such as a time that leaves the window's last quarter, is met by no node: where HyMaTE's times are moved, it stays in the
remainder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ehrseq.interpretability.explanation import Attribution, Explanation
from ehrseq.interpretability.gradients import (
    EVENT_BASELINES,
    STAY_BASELINES,
    Line,
    check_whole_number,
    checked_parts,
    differentiable_log_odds,
    ends_of_line,
    question_line,
    reads_stays,
    ready_for_gradients,
    sum_of_channels,
)

if TYPE_CHECKING:
    from ehrseq.interpretability.questions import Question

POINT_TOKENS = 2_048
"""Tokens of the points that are computed together: bounds the memory, which is linear in the length of a row."""
MOST_REFINEMENT = 16
LEAST_REMAINDER = 1e-5
"""Log-odds that no further node is worth."""


def integrate_gradients(model: Any, line: Line, task_id: int, nodes: int, tokens_at_once: int = POINT_TOKENS) -> Tensor:
    """Contribution of every token.

    Args:
        model: A classifier, made ready by `ready_for_gradients`.
        line: From a baseline to a record; rows padded on either side, or packed.
        task_id: Index in `config.tasks`.
        nodes: Gauss-Legendre nodes.
        tokens_at_once: Tokens of the points that are computed together.

    Returns:
        [b, l], exactly 0 where the ends of the line are equal. Of a packed row each patient's own.

    Raises:
        ImportError: captum is not installed.
    """
    method = load_captum().IntegratedGradients
    names, held = list(line.end), list(line.held)
    rows, length = line.shape
    points = min(nodes, max(1, tokens_at_once // (rows * length)))

    def log_odds(*channels: Tensor) -> Tensor:
        return differentiable_log_odds(model, dict(zip([*names, *held], channels, strict=True)), task_id)

    parts: tuple[Tensor, ...] = method(log_odds).attribute(
        tuple(line.end[name] for name in names),
        tuple(line.start[name] for name in names),
        additional_forward_args=tuple(line.held[name] for name in held),
        n_steps=nodes,
        method="gausslegendre",
        internal_batch_size=rows * points,
    )
    return sum_of_channels(parts)


def integrated_gradients(
    question: Question,
    baseline: str | Sequence[str] | None = None,
    *,
    nodes: int = 64,
    over: str | Sequence[str] | None = None,
    tolerance: float | None = 0.01,
    noise: int = 0,
    noise_share: float = 0.1,
    seed: int = 0,
) -> Explanation:
    """Integrated gradients of a record.

    Args:
        question: What is explained.
        baseline: Where the line begins, "padding" (default), "unknown", "mean" or "structure" (`EVENT_BASELINES`); of
            stays "mean". Several of them: the mean over all.
        nodes: Gauss-Legendre nodes; doubled, up to sixteenfold, where more than `tolerance` is left.
        tolerance: Largest remainder, as a share of F(x) - F(x'); None: these nodes and no more.
        over: What is moved, see `gradients`: "events" (default) and "structure", or of stays "values" (default) and
            "times".
        noise: Records with noise on what is moved, over which the mean is taken (as SmoothGrad does, arXiv:1706.03825);
            0 = the record itself. Their sums are not F(x) - F(x'), and the remainder says by how much.
        noise_share: Standard deviation of the noise, as a share of the root mean square of the way x - x'.
        seed: Of the noise.

    Returns:
        The explanation, from the mean log-odds of the baselines.

    Raises:
        ValueError: A baseline or part that the model does not have; a number that is none of its kind; another number
            of classes than two.
        ImportError: captum is not installed; the message names the extra.
    """
    load_captum()
    known = STAY_BASELINES if reads_stays(question) else EVENT_BASELINES
    names = checked_baselines(baseline, known)
    parts = checked_parts(question, over)
    check_whole_number("nodes", nodes, 1)
    check_whole_number("noise", noise, 0)
    check_whole_number("seed", seed, 0)
    _check_share("noise_share", noise_share)
    if tolerance is not None:
        _check_share("tolerance", tolerance)
    settings: dict[str, Any] = {"baseline": list(names), "nodes": nodes, "over": list(parts)}
    if noise:
        settings |= {"noise": noise, "noise_share": noise_share, "seed": seed}
    words = known[names[0]] if len(names) == 1 else "the mean of: " + "; ".join(known[name] for name in names)
    named: dict[str, Any] = {"method": "integrated_gradients", "baseline_name": words, "settings": settings}
    if not question.has_answer:
        return Explanation.of(question, None, **named)
    values, starts, end, most = [], [], math.nan, nodes
    generator = torch.Generator().manual_seed(seed)
    with ready_for_gradients("integrated_gradients", question.checkpoint.model) as model:
        for name in names:
            line = question_line(question, model, name, parts)
            start, end = ends_of_line(model, line, question.task_id)
            starts.append(start)
            for each in [with_noise(line, noise_share, generator) for _ in range(noise)] or [line]:
                found, used = refined_gradients(model, each, question.task_id, nodes, tolerance)
                values.append(found)
                most = max(most, used)
    settings["nodes"] = most
    mean = torch.stack(values).mean(0).cpu().numpy()
    return Explanation.of(question, Attribution(mean, end, float(np.mean(starts))), **named)


def refined_gradients(model: Any, line: Line, task_id: int, nodes: int, tolerance: float | None) -> tuple[Tensor, int]:
    """Contributions of a single row, float64 [l], by as many nodes as leave `tolerance`; and the number of nodes."""
    start, end = ends_of_line(model, line, task_id)
    most = nodes if tolerance is None else MOST_REFINEMENT * nodes
    while True:
        values = integrate_gradients(model, line, task_id, nodes)[0].double()
        remainder = abs(end - start - float(values.sum()))
        # Below the second bound it is the rounding of float32.
        if 2 * nodes > most or remainder <= (tolerance or 0.0) * abs(end - start) or remainder < LEAST_REMAINDER:
            return values, nodes
        nodes *= 2


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} got {value!r}; expected a number above 0, such as 0.1.")


def with_noise(line: Line, share: float, generator: torch.Generator) -> Line:
    """The line to a record with noise on what is moved, of `share` times the root mean square of the way there."""
    end = {}
    for name, record in line.end.items():
        way = record - line.start[name]
        moved = (way != 0).flatten(2).any(2).view(*way.shape[:2], *[1] * (way.dim() - 2)) if way.dim() > 2 else way != 0
        size = way.square().sum() / moved.expand_as(way).sum().clamp(min=1)
        drawn = torch.randn(way.shape, generator=generator, dtype=torch.float64).to(way)
        end[name] = record + share * size.sqrt() * drawn * moved
    return Line(line.start, end, line.held)


def checked_baselines(baseline: str | Sequence[str] | None, known: dict[str, str]) -> tuple[str, ...]:
    """Names of baselines, each once.

    Raises:
        ValueError: An unknown one, or none.
    """
    names = (next(iter(known)),) if baseline is None else (baseline,) if isinstance(baseline, str) else tuple(baseline)
    if not names or not set(names) <= set(known) or len(set(names)) < len(names):
        raise ValueError(f"baseline got {baseline!r}; a model of this family has {list(known)}, each at most once.")
    return names


def load_captum() -> Any:
    """`captum.attr`.

    Raises:
        ImportError: captum is not installed; the message names the extra.
    """
    try:
        import captum.attr
    except ImportError as error:
        raise ImportError('integrated gradients need captum: pip install "ehrseq[explain]".') from error
    return captum.attr

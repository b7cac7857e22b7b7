"""Forecasts of records: from a tokenizer's channels to probabilities with their errors, and the trajectories behind.

Whatever is drawn depends on seed, record and trajectory alone, so blocks, slots and the company in which a record is
read change no bit of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from .ehr_trajectories import ForecastPrompt, OutcomeTokens, PatientTrajectories, TrajectoryRequest
from .outcome_estimates import OutcomeEstimate, check_outcomes, estimate_outcomes, estimate_to_error

BLOCK = 64
"""Records whose trajectories are drawn together."""

_FLOATS = ("times", "ages")


@dataclass(frozen=True)
class RecordForecast:
    """What is foretold of one record.

    Attributes:
        estimates: One an outcome.
        trajectories: Ordinary ones (none avoids an outcome), with their tokens; None where they were not asked for.
    """

    estimates: list[OutcomeEstimate]
    trajectories: PatientTrajectories | None = None


class TokenRecord(Protocol):
    """One record, as `EhrTokenizer.forecast_prompt` gives it.

    Attributes:
        inputs: Channel -> [l] or [1, l], arrays or tensors, unpadded.
        elapsed_days: Days from the last token to the prediction time.
        key: What makes its random numbers its own.
    """

    @property
    def inputs(self) -> Mapping[str, Any]:
        """See above."""

    @property
    def elapsed_days(self) -> float:
        """See above."""

    @property
    def key(self) -> int:
        """See above."""


def to_prompt(record: TokenRecord) -> ForecastPrompt:
    """One record as a model reads it.

    Raises:
        ValueError: Several records, a packed or padded one, an empty one, one of which nothing can be forecast, or an
            elapsed time that is none.
    """
    if not all(hasattr(record, name) for name in ("inputs", "elapsed_days", "key")):
        raise ValueError(
            f"a record got {type(record).__name__}; expected what EhrTokenizer.forecast_prompt(patient) gives."
        )
    if reason := getattr(record, "reason", None):
        raise ValueError(f"this record has no forecast ({reason}); leave out records that have a reason.")
    channels = {name: torch.as_tensor(channel) for name, channel in record.inputs.items()}
    ids = channels.get("input_ids")
    if ids is None:
        raise ValueError("a record to forecast has no input_ids; make it with EhrTokenizer.forecast_prompt(patient).")
    if "segment_ids" in channels:
        raise ValueError(
            "a record to forecast has segment_ids: it is a packed row, which holds several. Give each record by "
            "itself, as EhrTokenizer.forecast_prompt makes it."
        )
    channels = {name: channel if channel.ndim > 1 else channel[None] for name, channel in channels.items()}
    shape = channels["input_ids"].shape
    if len(shape) != 2 or shape[0] != 1 or not shape[1] or any(c.shape != shape for c in channels.values()):
        shapes = {name: list(channel.shape) for name, channel in channels.items()}
        raise ValueError(f"a record to forecast has the channels {shapes}; expected one record, [1, length] alike.")
    mask = channels.pop("attention_mask", None)
    if mask is not None and not bool(mask.all()):
        raise ValueError("a record to forecast is padded; give it alone and unpadded, as forecast_prompt makes it.")
    elapsed = float(record.elapsed_days)
    if not math.isfinite(elapsed) or elapsed < 0:
        raise ValueError(f"elapsed_days got {elapsed}; expected the days since the last event, at least 0.")
    inputs = {name: _typed(name, channel) for name, channel in channels.items()}
    return ForecastPrompt(inputs=inputs, elapsed_days=elapsed, key=int(record.key))


def forecast_records(
    model: Any,
    records: Iterable[TokenRecord],
    *,
    horizon_days: float,
    outcomes: Iterable[Any] = (),
    num: int = 32,
    estimator: str = "reach",
    seed: int = 0,
    grid_days: tuple[float, ...] = (),
    death_ids: tuple[int, ...] = (),
    until_ids: tuple[int, ...] = (),
    standard_error: float | None = None,
    max_num: int = 4096,
    max_tokens: int = 4096,
    keep_tokens: bool = False,
    slots: int | None = None,
) -> Iterator[RecordForecast]:
    """Foretell the outcomes of records.

    Args:
        model: `EhrMambaForCausalLM`.
        records: From `EhrTokenizer.forecast_prompt`, read block by block as they are needed.
        horizon_days: How far.
        outcomes: Anything with `name`, `ids` and `complement` (`OutcomeTokens`, or what the tokenizer reads); none
            where only trajectories are wanted.
        num: Trajectories a record; of "reach" a record and outcome.
        estimator: "monte_carlo", "scope" or "reach", see `PatientTrajectories.incidence`.
        seed: Of the whole call.
        grid_days: Days at which the cumulative incidence is told, the last one the horizon.
        death_ids: Tokens of a death, which ends a trajectory.
        until_ids: Tokens after which nothing counts.
        standard_error: Draw more, beginning with `num`, until every error of a record is at most this.
        max_num: Most trajectories a record where an error is wanted.
        max_tokens: Longest trajectory.
        keep_tokens: Give `num` ordinary trajectories with their tokens as well.
        slots: Trajectories at once.

    Yields:
        The forecast of each record, in order.

    Raises:
        ValueError: A horizon, number, estimator or outcome that cannot be used, or a record that is none.
    """
    asked = tuple(OutcomeTokens(each.name, each.ids, each.complement) for each in outcomes)
    request = TrajectoryRequest(
        horizon_days=horizon_days,
        num=num,
        seed=seed,
        outcomes=asked,
        estimator=estimator,  # type: ignore[arg-type]  # checked below
        grid_days=tuple(grid_days),
        death_ids=tuple(death_ids),
        until_ids=tuple(until_ids),
        max_tokens=max_tokens,
    )
    _check(request, keep_tokens=keep_tokens)
    if not asked:
        request = replace(request, estimator="monte_carlo")  # there is nothing that the trajectories could avoid
    if standard_error is not None:
        estimate_to_error(model.trajectories, [], request, standard_error=standard_error, max_num=max_num)  # checks it
    if model.training:
        raise ValueError("the model is in training mode, in which dropout changes every forecast: call model.eval().")
    return _in_blocks(model, records, request, standard_error, max_num, keep_tokens, slots)


def _in_blocks(
    model: Any,
    records: Iterable[TokenRecord],
    request: TrajectoryRequest,
    standard_error: float | None,
    max_num: int,
    keep_tokens: bool,
    slots: int | None,
) -> Iterator[RecordForecast]:
    def draw(prompts: Iterable[ForecastPrompt], request: TrajectoryRequest) -> Iterator[PatientTrajectories]:
        trajectories: Iterator[PatientTrajectories] = model.trajectories(prompts, request, slots=slots)
        return trajectories

    # One draw gives tokens and estimates where its trajectories are ordinary ones and their number is settled.
    together = keep_tokens and request.estimator != "reach" and standard_error is None
    ordinary = replace(request, outcomes=(), grid_days=(), estimator="monte_carlo", keep_tokens=True)
    waiting = iter(records)
    while prompts := [to_prompt(record) for record in islice(waiting, BLOCK)]:
        if together:
            for trajectories in draw(prompts, replace(request, keep_tokens=True)):
                estimates = estimate_outcomes(trajectories, request) if request.outcomes else []
                yield RecordForecast(estimates, trajectories)
            continue
        all_kept: Iterable[PatientTrajectories | None] = [None] * len(prompts)
        if keep_tokens:
            all_kept = draw(prompts, ordinary)
        all_estimates: Iterable[list[OutcomeEstimate]]
        if standard_error is None:
            all_estimates = (estimate_outcomes(each, request) for each in draw(prompts, request))
        else:
            all_estimates = estimate_to_error(draw, prompts, request, standard_error=standard_error, max_num=max_num)
        for estimates, kept in zip(all_estimates, all_kept, strict=True):
            yield RecordForecast(estimates, kept)


def _check(request: TrajectoryRequest, *, keep_tokens: bool) -> None:
    horizon = request.horizon_days
    if isinstance(horizon, bool) or not isinstance(horizon, (int, float)) or not 0 < horizon < math.inf:
        raise ValueError(f"horizon_days got {horizon!r}; expected a number of days above 0.")
    grid = request.grid
    if list(grid) != sorted(set(grid)) or grid[0] <= 0 or grid[-1] != horizon:
        raise ValueError(f"grid_days got {list(grid)}; expected ascending days above 0, the last one the horizon.")
    if request.outcomes or not keep_tokens:
        check_outcomes(request.outcomes, request)
    elif isinstance(request.num, bool) or request.num < 1:
        raise ValueError(f"num got {request.num!r}; expected at least 1 trajectory a patient, like 32.")


def _typed(name: str, channel: Tensor) -> Tensor:
    return channel.to(torch.float32 if name in _FLOATS else torch.int64)


__all__ = ["BLOCK", "RecordForecast", "TokenRecord", "forecast_records", "to_prompt"]

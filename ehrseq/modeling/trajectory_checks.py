"""What can be asked of a trajectory sampler, and of whom: requests and prompts are refused before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from .configuration_ehrmamba import EhrMambaConfig
from .ehr_embeddings import check_channels
from .ehr_intervals import INTERVAL_SPANS
from .ehr_trajectories import ESTIMATORS, ForecastPrompt, TrajectoryRequest
from .ehrmamba_clock import CLOCK_CHANNELS
from .outcome_estimates import check_outcomes

logger = logging.get_logger(__name__)

_CHANNELS = ("input_ids", *CLOCK_CHANNELS)


def check_trajectory_request(config: EhrMambaConfig, request: TrajectoryRequest) -> None:
    """Raise a ValueError for the first thing that cannot be drawn, or not from this model.

    Sampling options that change the model's distribution are told once in a warning.
    """
    specials = config.special_token_ids or {}
    missing = {"[VS]", "[VE]"} - set(specials)
    if missing or not INTERVAL_SPANS.keys() & set(specials):
        lacking = sorted(missing) or ["interval tokens"]
        raise ValueError(
            f"config.special_token_ids lacks {lacking}: without them no clock can move. Call "
            "config.update_from_tokenizer(tokenizer) with the model's own tokenizer."
        )
    if not _is_number(request.horizon_days) or not request.horizon_days > 0:
        raise ValueError(f"horizon_days got {request.horizon_days!r}; expected days above 0 and finite, like 30.")
    for name, least in (("num", 1), ("first", 0), ("max_tokens", 1)):
        value = getattr(request, name)
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} got {value!r}; expected an integer of at least {least}.")
    if isinstance(request.seed, bool) or not isinstance(request.seed, Integral):
        raise ValueError(f"seed got {request.seed!r}; expected an integer.")
    grid = request.grid
    if not all(_is_number(day) for day in grid) or not _ascends((0.0, *grid)) or grid[-1] != request.horizon_days:
        raise ValueError(
            f"grid_days got {list(grid)}; expected ascending days above 0, the last one the horizon "
            f"({request.horizon_days})."
        )
    if request.estimator not in ESTIMATORS:
        raise ValueError(f"estimator got {request.estimator!r}; expected one of {list(ESTIMATORS)}.")
    if request.outcomes:
        check_outcomes(request.outcomes, request)
    elif request.estimator != "monte_carlo":
        raise ValueError(
            f"estimator {request.estimator!r} needs an outcome to look for; name one, or take monte_carlo."
        )
    for outcome in request.outcomes:
        _check_ids(config, f"the outcome {outcome.name!r}", outcome.ids)
        if not _ascends(outcome.ids):
            raise ValueError(
                f"the ids of the outcome {outcome.name!r} must ascend, each once: {list(outcome.ids)[:8]}."
            )
        intervals = sorted(name for name in INTERVAL_SPANS if specials.get(name) in outcome.ids)
        if intervals:
            raise ValueError(f"the outcome {outcome.name!r} holds {intervals[:3]}, which stand for no event of a time.")
    _check_ids(config, "death_ids", request.death_ids)
    _check_ids(config, "until_ids", request.until_ids)
    _check_sampling(request)


def _check_sampling(request: TrajectoryRequest) -> None:
    if not _is_number(request.temperature) or not request.temperature > 0:
        raise ValueError(f"temperature got {request.temperature!r}; expected a number above 0.")
    if request.top_k is not None and (not isinstance(request.top_k, Integral) or request.top_k < 1):
        raise ValueError(f"top_k got {request.top_k!r}; expected an integer of at least 1, or None.")
    if request.top_p is not None and (not _is_number(request.top_p) or not 0 < request.top_p <= 1):
        raise ValueError(f"top_p got {request.top_p!r}; expected a number in (0, 1], or None.")
    if (request.temperature, request.top_k, request.top_p) != (1.0, None, None):
        logger.warning_once(
            f"temperature={request.temperature}, top_k={request.top_k}, top_p={request.top_p}: trajectories come from "
            "another distribution than the model learned, and what is estimated is that of another model. Leave them "
            "out for the model's own probabilities."
        )


def check_forecast_prompt(config: EhrMambaConfig, prompt: ForecastPrompt, death_ids: Sequence[int]) -> None:
    """Raise a ValueError unless this is one unpadded record of a patient who is alive, before an open future."""
    inputs = prompt.inputs
    ids = inputs.get("input_ids")
    name = f"the prompt with key {prompt.key}"
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        got = "no input_ids" if ids is None else f"input_ids {list(np.shape(ids))}"
        raise ValueError(
            f"{name} has {got}; expected one record, [1, tokens], as EhrTokenizer.encode_patient gives it."
        )
    if inputs.get("segment_ids") is not None:
        raise ValueError(f"{name} is packed (segment_ids); give every record a prompt of its own.")
    unknown = sorted(set(inputs) - {*_CHANNELS, "attention_mask", "segment_ids"})
    if unknown:
        raise ValueError(f"{name} has unknown channels {unknown}; expected {list(_CHANNELS)}.")
    mask = inputs.get("attention_mask")
    if mask is not None and (mask.shape != ids.shape or not bool(mask.all())):
        raise ValueError(f"{name} is padded; take the padding off, a record is read alone.")
    check_channels(config, (1, ids.shape[1]), **{channel: inputs.get(channel) for channel in _CHANNELS})
    if not _is_number(prompt.elapsed_days) or prompt.elapsed_days < 0:
        raise ValueError(f"{name} has elapsed_days {prompt.elapsed_days!r}; expected days of at least 0.")
    if isinstance(prompt.key, bool) or not isinstance(prompt.key, Integral):
        raise ValueError(f"a prompt's key is {prompt.key!r}; expected an integer.")
    last = int(ids[0, -1])
    for token, number in (config.special_token_ids or {}).items():
        if last == number and token in INTERVAL_SPANS:
            raise ValueError(
                f"{name} ends on the interval token {token}, whose day would be drawn: cut it off, elapsed_days tells "
                "how much time has passed."
            )
    if len(death_ids) and bool(torch.isin(ids, torch.tensor(list(death_ids), device=ids.device)).any()):
        raise ValueError(f"{name} holds the patient's death: there is nothing to forecast.")


def prompts_of_batch(
    inputs: Mapping[str, Tensor], elapsed_days: float | Sequence[float] = 0.0, keys: Sequence[int] | None = None
) -> list[ForecastPrompt]:
    """One prompt a row of a batch of channels, without its padding (on either side).

    Args:
        inputs: Channels [b, l].
        elapsed_days: Of all rows, or one a row.
        keys: One a row; by default their numbers.

    Raises:
        ValueError: Packed rows, a row of padding only, or numbers that are not those of the rows.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError("the inputs need input_ids, [rows, tokens], as the collator makes them.")
    if inputs.get("segment_ids") is not None:
        raise ValueError("the inputs are packed (segment_ids); give every record a row of its own.")
    rows = ids.shape[0]
    elapsed = [float(elapsed_days)] * rows if isinstance(elapsed_days, (int, float)) else list(elapsed_days)
    numbers = list(range(rows)) if keys is None else list(keys)
    for name, values in (("elapsed_days", elapsed), ("keys", numbers)):
        if len(values) != rows:
            raise ValueError(f"{name} has {len(values)} entries for {rows} rows; give one a row.")
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    wrong = [name for name, channel in inputs.items() if channel.shape != ids.shape]
    if wrong:
        raise ValueError(
            f"{wrong[0]} has shape {list(inputs[wrong[0]].shape)}, expected {list(ids.shape)} like input_ids."
        )
    if not bool(real.any(1).all()):
        raise ValueError(
            f"row {int((~real.any(1)).nonzero()[0])} holds padding only: there is no record to go on from."
        )
    channels = {name: channel for name, channel in inputs.items() if name != "attention_mask"}
    return [
        ForecastPrompt({name: channel[row][real[row]][None] for name, channel in channels.items()}, elapsed[row], key)
        for row, key in enumerate(numbers)
    ]


def _check_ids(config: EhrMambaConfig, what: str, ids: Any) -> None:
    values = np.asarray(ids)
    if values.size and (values.ndim != 1 or not np.issubdtype(values.dtype, np.integer)):
        raise ValueError(f"{what} must be a flat list of token ids, got {ids!r}.")
    if values.size and not (values.min() >= 0 and values.max() < config.vocab_size):
        raise ValueError(
            f"{what} holds the ids {values.min()} to {values.max()}, the model's vocabulary 0 .. "
            f"{config.vocab_size - 1}: take those of the model's own tokenizer."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _ascends(values: Sequence[Any] | np.ndarray) -> bool:
    return all(a < b for a, b in pairwise(values))


__all__ = ["check_forecast_prompt", "check_trajectory_request", "prompts_of_batch"]

"""Beyond the paper: each variable of a stay as a few numbers, beside what Mamba and attention read.

Gradient boosting on such numbers is hard to beat on PhysioNet-2012: a mean or a last value over two days is something
that a small network otherwise spends its capacity on learning to compute. They are computed here, from the triplets
that the model is given, so that they hold for a stay that was cut, packed or had variables dropped as for a whole one.

Glossary: b batch, n length, R sequences (hymate_layout.py), V num_variables, F numbers of a variable, d hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_hymate import HyMaTEConfig
from .fast_dropout import FastDropout
from .fast_linear import as_input_of, fast_linear, linear
from .mamba_block import at_least_float32

VARIABLE_SUMMARIES = (
    "measured",
    "log_count",
    "mean",
    "std",
    "min",
    "max",
    "first",
    "last",
    "first_time",
    "last_time",
    "slope",
    "late_mean",
)
"""Numbers of a variable, in this order; all 0 where it was never measured. Values are z-scores, times in [-1, 1] over
the window; `slope` is of the regression on time; `late_mean` of the window's last quarter, else the last value."""

LATE = 0.5
KNOTS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
LIMIT = 3.0
_SLOPE_RIDGE = 0.01  # (a tenth of half a window)^2: values minutes apart have no slope to speak of


@dataclass(frozen=True)
class VariableSummaries:
    """What `summarise_variables` finds.

    Attributes:
        features: [R, V F] in float32 at least, variable by variable.
        last_values: [R, V], 0 (the training mean) where a variable was never measured.
    """

    features: Tensor
    last_values: Tensor


def summarise_variables(
    variable_ids: Tensor, times: Tensor, values: Tensor, owner: Tensor, num_sequences: int, num_variables: int
) -> VariableSummaries:
    """Numbers of every variable in every sequence.

    Args:
        variable_ids: int64 [b, n].
        times: [b, n], ascending within a sequence.
        values: z-scored, [b, n].
        owner: Sequence of each triplet, R at padding: as made by `owners`.
        num_sequences: R.
        num_variables: V.
    """
    values = at_least_float32(values).flatten()
    times = times.to(values.dtype).flatten()
    group = (owner * num_variables + variable_ids).flatten().clamp(max=num_sequences * num_variables)  # padding: last
    empty = values.new_zeros(num_sequences * num_variables + 1)

    # 1. Means, then sums of deviations, not of squares: no cancellation.
    count = empty.index_add(0, group, torch.ones_like(values))
    divisor = count.clamp(min=1.0)

    def mean_of(what: Tensor) -> Tensor:
        return empty.index_add(0, group, what) / divisor

    mean, mean_time = mean_of(values), mean_of(times)
    deviation, time_deviation = values - mean[group], times - mean_time[group]
    slope = mean_of(deviation * time_deviation) / (mean_of(time_deviation.square()) + _SLOPE_RIDGE)
    variance = mean_of(deviation.square())
    spread = variance > 0
    std = torch.where(spread, variance, 1.0).sqrt() * spread  # the square root has no gradient at 0

    # 2. The first and last triplet of a group: the order of the rows is the order of time.
    place = torch.arange(len(group), device=group.device)
    first = torch.full_like(empty, len(group) - 1, dtype=torch.int64).scatter_reduce(0, group, place, "amin")
    last = torch.zeros_like(empty, dtype=torch.int64).scatter_reduce(0, group, place, "amax")
    measured = count > 0
    low = empty.scatter_reduce(0, group, values, "amin", include_self=False)
    high = empty.scatter_reduce(0, group, values, "amax", include_self=False)

    # 3. The last quarter of the window.
    late = (times >= LATE).to(values.dtype)
    late_count = empty.index_add(0, group, late)
    late_mean = empty.index_add(0, group, late * values) / late_count.clamp(min=1.0)

    columns = {
        "measured": measured.to(values.dtype),
        "log_count": torch.log1p(count),
        "mean": mean,
        "std": std,
        "min": low,
        "max": high,
        "first": values[first],
        "last": values[last],
        "first_time": times[first],
        "last_time": times[last],
        "slope": slope,
        "late_mean": torch.where(late_count > 0, late_mean, values[last]),
    }
    table = torch.stack([columns[name] for name in VARIABLE_SUMMARIES], dim=-1)[:-1]
    table = torch.where(measured[:-1, None], table, 0.0).view(num_sequences, num_variables, len(VARIABLE_SUMMARIES))
    return VariableSummaries(table.flatten(1), table[..., VARIABLE_SUMMARIES.index("last")])


class SummaryEmbedding(nn.Module):
    """g = W2 Drop(tanh(W1 x + b1)) + b2 of the summaries, V F -> 4d -> d, as `StaticEmbedding` of the static values."""

    def __init__(self, config: HyMaTEConfig):
        super().__init__()
        self.dense_in = nn.Linear(len(VARIABLE_SUMMARIES) * config.num_variables, 4 * config.hidden_size)
        self.dropout = FastDropout(config.hidden_dropout_prob)
        self.dense_out = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """[R, V F] -> [R, d]."""
        units = torch.tanh(linear(self.dense_in, as_input_of(self.dense_in, features)))
        return linear(self.dense_out, self.dropout(units))


class AdditiveHead(nn.Module):
    """sum_i f_i(x_i) with f_i piecewise linear: what boosting's stumps would find, beside what the network finds.

    f(x) = a clip(x, -3, 3) + sum_k b_k clip(x - k, 0, 1) over `KNOTS` k; x is one of `VARIABLE_SUMMARIES` or a static
    value. All weights are 0 at first, so that the classifier begins as if the part were not there. No `nn.Linear`: what
    reads two things is none for a library that adapts or quantises those.
    """

    def __init__(self, config: HyMaTEConfig, num_labels: int):
        numbers = len(VARIABLE_SUMMARIES) * config.num_variables + config.num_static
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_labels, (1 + len(KNOTS)) * numbers))
        self.dropout = FastDropout(config.additive_dropout)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every f_i = 0."""
        init.zeros_(self.weight)

    def forward(self, features: Tensor, static_values: Tensor | None) -> Tensor:
        """([..., V F], [..., D]) -> [..., num_labels]."""
        parts = [features] if static_values is None else [features, static_values.to(features.dtype)]
        numbers = torch.cat(parts, dim=-1)
        pieces = [numbers.clamp(-LIMIT, LIMIT), *((numbers - knot).clamp(0.0, 1.0) for knot in KNOTS)]
        return fast_linear(self.dropout(torch.cat(pieces, dim=-1).to(self.weight.dtype)), self.weight)


class ForecastHead(nn.Module):
    """The next values: Linear(p -> H V); beyond the paper, as a correction of what was measured last.

    y^ = W r + b, or, with `forecast_from_last_value`, y^ = rho * last value + W r + b with a learned rho of each
    horizon and variable, 1 at first: W = 0 and b = 0 would carry the last value forward. No `nn.Linear`, as
    `AdditiveHead`.
    """

    def __init__(self, config: HyMaTEConfig):
        outputs = config.num_horizons * config.num_variables
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, config.pooled_size))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.num_horizons = config.num_horizons
        self.persistence = nn.Parameter(torch.ones(outputs)) if config.forecast_from_last_value else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier-uniform, as every layer of the model."""
        init.xavier_uniform_(self.weight)
        init.zeros_(self.bias)
        if self.persistence is not None:
            init.ones_(self.persistence)

    def forward(self, pooled: Tensor, last_values: Tensor | None = None) -> Tensor:
        """(r [..., p], last values [..., V] where they are used) -> [..., H V]."""
        forecast = fast_linear(pooled, self.weight, self.bias)
        if self.persistence is None or last_values is None:
            return forecast
        repeated = last_values.repeat(*[1] * (last_values.dim() - 1), self.num_horizons)
        return forecast + (self.persistence * repeated).to(forecast.dtype)


__all__ = [
    "VARIABLE_SUMMARIES",
    "AdditiveHead",
    "ForecastHead",
    "SummaryEmbedding",
    "VariableSummaries",
    "summarise_variables",
]

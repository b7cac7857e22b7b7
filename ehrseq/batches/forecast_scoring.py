"""Forecasts of the rows of many stays: what a pretrained HyMaTE says of each, in the order of the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ehrseq.batches.scoring import ScoredRows, check_batch_size
from ehrseq.batches.triplet_collation import CHANNEL_TYPES, DataCollatorForTriplets
from ehrseq.work.progress import progress_bar

if TYPE_CHECKING:
    from ehrseq.modeling.modeling_hymate import HyMaTEForPreTraining
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

_READ = (*CHANNEL_TYPES, "static_values")


@dataclass(frozen=True)
class RowForecasts:
    """Forecasts of n rows.

    Attributes:
        predictions: Of the model, z-scores, float64 [n, H, V].
        measured: Whether the row holds the variable, bool [n, V].
        last_values: The variable's last z-score in the row, float64 [n, V]; NaN where there is none.
    """

    predictions: NDArray[np.float64]
    measured: NDArray[np.bool_]
    last_values: NDArray[np.float64]


def forecast_rows(
    model: HyMaTEForPreTraining,
    extractor: HyMaTEFeatureExtractor,
    rows: ScoredRows,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> RowForecasts:
    """Forecast after every row.

    Args:
        model: A trained forecaster; dropout is off meanwhile.
        extractor: Its feature extractor.
        rows: `ForecastRows` with fixed times (their labels are not looked at) or `TripletRows`.
        batch_size: Rows in one forward pass, of about one length each.
        progress: Show a progress bar.

    Raises:
        ValueError: `batch_size` is no number of rows, or a row has no triplet.
    """
    check_batch_size(batch_size)
    collate = DataCollatorForTriplets(extractor)
    sizes = (model.config.num_horizons, model.config.num_variables)
    predictions = np.empty((len(rows), *sizes), np.float64)
    last = np.full((len(rows), sizes[1]), np.nan)
    order = np.argsort(rows.lengths, kind="stable")
    hidden = not progress or len(order) < 8 * batch_size
    was_training = model.training
    model.train(False)
    try:
        with torch.inference_mode(), progress_bar(total=len(order), desc="Forecasting", disable=hidden) as bar:
            for first in range(0, len(order), batch_size):
                members = order[first : first + batch_size]
                items: list[dict[str, Any]] = [{name: rows[int(k)][name] for name in _READ} for k in members]
                batch = {name: tensor.to(model.device) for name, tensor in collate(items).items()}
                given = model(**batch).predictions.float().cpu().numpy()
                predictions[members] = given.reshape(len(members), *sizes)
                for member, item in zip(members, items, strict=True):
                    last[member, item["variable_ids"]] = item["values"]  # in order of time: the last one stays
                bar.update(len(members))
    finally:
        model.train(was_training)
    return RowForecasts(predictions, ~np.isnan(last), last)

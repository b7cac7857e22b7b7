"""Forecasts of many rows are those of each alone, whatever the batch, the side of the padding and the order."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ehrseq import HyMaTEFeatureExtractor
from ehrseq.batches.forecast_scoring import forecast_rows
from ehrseq.batches.triplet_collation import DataCollatorForPackedTriplets, PackableTriplets
from ehrseq.batches.triplet_rows import ForecastRows, TripletRows
from tests.checkpoints.forecaster import make_forecaster


@pytest.fixture(scope="module")
def made():
    return make_forecaster(horizons=(120.0, 480.0), stays=40)


def naive(made, rows):
    """Each row alone, without padding."""
    out = []
    for row in range(len(rows)):
        names = ("variable_ids", "times", "values", "static_values")
        one = {name: torch.tensor(rows[row][name])[None] for name in names}
        with torch.no_grad():
            out.append(made.model(**one).predictions[0].numpy())
    return np.stack(out)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_and_padding_change_no_forecast(made, side, batch_size):
    rows = ForecastRows(made.tuning, made.extractor, horizons=(120.0, 480.0), epochs=1)
    extractor = HyMaTEFeatureExtractor(**{**made.extractor.to_dict(), "padding_side": side})
    given = forecast_rows(made.model, extractor, rows, batch_size=batch_size)
    assert given.predictions.shape == (len(rows), 2, 4)
    np.testing.assert_allclose(given.predictions, naive(made, rows), atol=1e-5)


def test_packing_changes_no_forecast(made):
    rows = TripletRows(made.tuning.subset(np.arange(6)), made.extractor)
    collate = DataCollatorForPackedTriplets(made.extractor, max_length=64)
    packed = PackableTriplets(rows)
    batch = collate([packed[row] for row in range(6)])
    segments = [int(row.max()) for row in batch["segment_ids"]]
    assert max(segments) > 1
    with torch.no_grad():
        predictions = made.model(**batch).predictions
    together = np.concatenate([predictions[k, :count].numpy() for k, count in enumerate(segments)])
    alone = forecast_rows(made.model, made.extractor, rows).predictions
    np.testing.assert_allclose(
        sorted(together.reshape(6, -1).tolist()), sorted(alone.reshape(6, -1).tolist()), atol=1e-5
    )


def test_what_a_row_has_measured_is_told_beside_its_forecast(made):
    rows = TripletRows(made.tuning, made.extractor, max_length=3)
    given = forecast_rows(made.model, made.extractor, rows)
    for row in range(len(rows)):
        last = {}
        for variable, value in zip(rows[row]["variable_ids"], rows[row]["values"], strict=True):
            last[int(variable)] = value
        assert np.flatnonzero(given.measured[row]).tolist() == sorted(last)
        assert [given.last_values[row, variable] for variable in sorted(last)] == [last[k] for k in sorted(last)]
        assert np.isnan(given.last_values[row, ~given.measured[row]]).all()


def test_dropout_is_off_meanwhile_and_as_before_afterwards(made):
    rows = TripletRows(made.tuning.subset(np.arange(3)), made.extractor)
    made.model.train()
    try:
        one, two = (forecast_rows(made.model, made.extractor, rows).predictions for _ in range(2))
        assert made.model.training
    finally:
        made.model.eval()
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("batch_size", [0, True, 1.5])
def test_what_is_no_batch_size_is_refused(made, batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        forecast_rows(made.model, made.extractor, TripletRows(made.tuning, made.extractor), batch_size=batch_size)


def test_labels_are_not_read(made):
    table = replace(made.tuning, labels=np.ones(len(made.tuning), np.int64))
    with_labels = forecast_rows(made.model, made.extractor, TripletRows(table, made.extractor))
    without = forecast_rows(made.model, made.extractor, TripletRows(made.tuning, made.extractor))
    np.testing.assert_array_equal(with_labels.predictions, without.predictions)

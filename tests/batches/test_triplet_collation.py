"""Batches of stays: padding and packing keep every row, and Trainer takes them as they are."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from ehrseq.batches.triplet_collation import (
    DataCollatorForPackedTriplets,
    DataCollatorForTriplets,
    PackableTriplets,
)
from ehrseq.batches.triplet_rows import EpochOfRows, ForecastRows, TripletRows
from ehrseq.data.simulate.stays import simulate_stays
from ehrseq.encode.triplets import PHYSIONET2012, build_triplets
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

CHANNELS = ("variable_ids", "times", "values")


@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    from ehrseq.data import load_physionet2012

    loaded = load_physionet2012(simulate_stays(24, seed=2).write(tmp_path_factory.mktemp("stays")))
    built = build_triplets(loaded.events, PHYSIONET2012, loaded.labels)
    return built, HyMaTEFeatureExtractor.fit(built)


@pytest.fixture(params=["classes", "forecasts"])
def rows(request, challenge):
    if request.param == "classes":
        targets = np.random.default_rng(0).normal(size=(len(challenge[0]), 2))
        return TripletRows(*challenge, max_length=80, auxiliary_targets=targets)
    return ForecastRows(*challenge, horizons=(60, 120))


def check_entries(batch, row, where):
    """Static values, labels and the rest of one row at its place in the batch."""
    for name in set(row) - set(CHANNELS) - {"segment_ids"}:
        np.testing.assert_array_equal(batch[name][where], np.asarray(row[name]), err_msg=name)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_keeps_every_row(challenge, rows, side):
    extractor = HyMaTEFeatureExtractor.fit(challenge[0], padding_side=side)
    features = [rows[number] for number in range(5)]
    batch = DataCollatorForTriplets(extractor, pad_to_multiple_of=16)(features)
    longest = max(len(row["times"]) for row in features)
    assert batch["times"].shape == (5, -(-longest // 16) * 16)
    assert batch["static_values"].shape == (5, 9)
    for number, row in enumerate(features):
        mask = batch["attention_mask"][number].bool()
        assert int(mask.sum()) == len(row["times"])
        assert bool(mask[-1 if side == "left" else 0])
        for name in CHANNELS:
            np.testing.assert_array_equal(batch[name][number][mask], row[name])
            assert not batch[name][number][~mask].any()
        check_entries(batch, row, number)
    assert batch["variable_ids"].dtype == torch.int64
    assert batch["labels"].dtype == (torch.int64 if batch["labels"].dim() == 1 else torch.float32)


def test_packing_keeps_every_row(challenge, rows):
    features = [PackableTriplets(rows)[number] for number in range(11)]
    length = 2 * max(len(row["times"]) for row in features)
    batch = DataCollatorForPackedTriplets(challenge[1], max_length=length)(features)
    segments = batch["segment_ids"]
    assert segments.shape[0] < 11
    assert segments.shape[1] <= length
    found = 0
    for number in range(len(segments)):
        present = segments[number].unique(sorted=True).tolist()
        assert [s for s in present if s] == list(range(1, max(present) + 1))
        np.testing.assert_array_equal(batch["attention_mask"][number] > 0, segments[number] > 0)
        for segment in range(1, max(present) + 1):
            mask = segments[number] == segment
            where = [
                k
                for k, row in enumerate(features)
                if len(row["values"]) == int(mask.sum())
                and np.array_equal(batch["values"][number][mask], row["values"])
            ]
            assert len(where) == 1
            row = features[where[0]]
            for name in CHANNELS:
                np.testing.assert_array_equal(batch[name][number][mask], row[name])
            check_entries(batch, row, (number, segment - 1))
            found += 1
        for empty in range(max(present), batch["static_values"].shape[1]):
            assert not batch["static_values"][number, empty].any()
            if batch["labels"].dim() == 2:
                assert batch["labels"][number, empty] == -100
                assert batch["auxiliary_targets"][number, empty].isnan().all()
            else:
                assert not batch["label_mask"][number, empty].any()
    assert found == 11


def test_rows_that_are_not_marked_are_padded(challenge, rows):
    features = [rows[number] for number in range(3)]
    padded = DataCollatorForTriplets(challenge[1])(features)
    batch = DataCollatorForPackedTriplets(challenge[1], max_length=1000)(features)
    assert set(batch) == set(padded)
    for name in batch:
        torch.testing.assert_close(batch[name], padded[name], equal_nan=True)


def row(size=3, **change):
    base = {
        "variable_ids": np.arange(size),
        "times": np.linspace(-1, 1, size, dtype=np.float32),
        "values": np.zeros(size, np.float32),
        "static_values": np.zeros(2, np.float32),
    }
    return {**base, **change}


@pytest.mark.parametrize(
    ("features", "error"),
    [
        ([], "no rows"),
        ([row(0)], "row 0 holds no triplet"),
        ([row(), row(values=np.zeros(2))], "row 1: channel 'values' has length 2"),
        ([row(times=None)], "lacks the channel 'times'"),
        ([row(static_values=None)], "lacks the channel 'static_values'"),
        ([row(labels=1), row()], "some rows have 'labels'"),
        ([row(segment_ids=np.ones(3)), row()], "marked as packable"),
        ([row(12, segment_ids=np.ones(12))], "from 1 to max_length=10"),
    ],
)
def test_bad_batches(challenge, features, error):
    with pytest.raises(ValueError, match=error):
        DataCollatorForPackedTriplets(challenge[1], max_length=10)(features)


def test_packed_and_padded_batches_give_the_model_the_same(challenge):
    from ehrseq.modeling.configuration_hymate import HyMaTEConfig
    from ehrseq.modeling.modeling_hymate import HyMaTEForPreTraining, HyMaTEForSequenceClassification

    built, extractor = challenge
    config = HyMaTEConfig(hidden_size=16, num_mamba_layers=1, num_labels=2)
    for rows, model_class in (
        (TripletRows(built, extractor, max_length=50), HyMaTEForSequenceClassification),
        (ForecastRows(built, extractor), HyMaTEForPreTraining),
    ):
        model = model_class(config).eval()
        padded = DataCollatorForTriplets(extractor)([rows[k] for k in range(6)])
        packed = DataCollatorForPackedTriplets(extractor, max_length=700)([PackableTriplets(rows)[k] for k in range(6)])
        assert len(packed["times"]) < 6
        with torch.no_grad():
            torch.testing.assert_close(model(**packed).loss, model(**padded).loss, rtol=1e-4, atol=1e-5)


def test_trainer_trains_and_evaluates_and_tells_the_epoch(challenge, tmp_path):
    from ehrseq.modeling.configuration_hymate import HyMaTEConfig
    from ehrseq.modeling.modeling_hymate import HyMaTEForPreTraining

    built, extractor = challenge
    train = ForecastRows(built, extractor, max_length=40, seed=1)
    tuning = ForecastRows(built, extractor, max_length=40, epochs=1)
    seen = []
    set_epoch = train.set_epoch
    train.set_epoch = lambda epoch: (seen.append(epoch), set_epoch(epoch))[0]
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        report_to=[],
        save_strategy="no",
        eval_strategy="epoch",
        label_names=["labels"],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        HyMaTEForPreTraining(HyMaTEConfig(hidden_size=16, num_mamba_layers=1)),
        arguments,
        train_dataset=PackableTriplets(train),
        eval_dataset=tuning,
        data_collator=DataCollatorForPackedTriplets(extractor, max_length=200),
        callbacks=[EpochOfRows()],
    )
    trainer.train()
    assert sorted(set(seen)) == [0, 1, 2]
    assert np.isfinite([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]).all()

"""Masked events: how many, which ones, by what, and that nothing else of a batch changes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ehrseq.batches.collation import DataCollatorForNextToken
from ehrseq.batches.masking import EVENT_TYPES, DataCollatorForMaskedEvents
from ehrseq.batches.packing import DataCollatorForPackedNextToken, PackableRows
from tests.batches.test_packing import CHANNELS, ROWS

MASK = 2
# 0 [PAD], 1 [CLS], 2 [MASK], 3 [VS], 4 an interval, 5-14 labs, 15-24 medications, 25-27 static, 28 the only vital,
# 29-39 others.
TYPES = [0, 1, 0, 2, 4, *[5] * 10, *[6] * 10, *[12] * 3, 10, *[11] * 11]
TOKENIZER = SimpleNamespace(model_input_names=CHANNELS, padding_side="right", token_types=TYPES, mask_token_id=MASK)


def long_row(length, seed):
    ids = np.random.default_rng(seed).integers(1, 40, length)
    ids[ids == MASK] = 1
    return {**{name: np.zeros(length, np.int64) for name in CHANNELS}, "input_ids": ids, "attention_mask": ids * 0 + 1}


def test_shares_are_those_of_bert():
    row = long_row(200_000, 0)
    batch = DataCollatorForMaskedEvents(TOKENIZER)([row])
    ids, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
    events = np.isin(np.take(TYPES, row["input_ids"]), EVENT_TYPES)
    asked = labels != -100
    assert asked.sum() / events.sum() == pytest.approx(0.15, abs=0.003)
    assert (ids[asked] == MASK).mean() == pytest.approx(0.8, abs=0.01)
    types = np.take(TYPES, row["input_ids"])
    # One in ten is drawn anew, from its type: of ten labs one in ten is then what it was.
    labs = asked & (types == 5)
    kept = (ids[labs] == row["input_ids"][labs]).mean()
    assert kept == pytest.approx(0.1 + 0.1 * 0.1, abs=0.01)
    shown = asked & (ids != MASK)
    np.testing.assert_array_equal(np.take(TYPES, ids[shown]), types[shown])


def test_only_events_are_asked_for_and_only_they_change():
    row = long_row(20_000, 1)
    batch = DataCollatorForMaskedEvents(TOKENIZER, mlm_probability=1.0)([row])
    labels = batch["labels"][0].numpy()
    events = np.isin(np.take(TYPES, row["input_ids"]), EVENT_TYPES)
    np.testing.assert_array_equal(labels != -100, events)
    np.testing.assert_array_equal(labels[events], row["input_ids"][events])
    np.testing.assert_array_equal(batch["input_ids"][0].numpy()[~events], row["input_ids"][~events])


def test_padding_is_never_asked_for_and_other_channels_are_those_of_the_other_collator():
    collate = DataCollatorForMaskedEvents(TOKENIZER, mlm_probability=0.5, pad_to_multiple_of=8)
    batch, plain = collate(ROWS), DataCollatorForNextToken(TOKENIZER, 8)(ROWS)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    for name in CHANNELS:
        if name != "input_ids":
            assert torch.equal(batch[name], plain[name])
    assert batch.keys() == plain.keys()


def test_packed_rows_are_packed():
    rows = PackableRows(ROWS)
    features = [rows[i] for i in range(len(rows))]
    batch = DataCollatorForMaskedEvents(TOKENIZER, max_length=16, mlm_probability=1.0)(features)
    plain = DataCollatorForPackedNextToken(TOKENIZER, 16)(features)
    assert torch.equal(batch["segment_ids"], plain["segment_ids"])
    events = np.isin(np.take(TYPES, plain["input_ids"].numpy()), EVENT_TYPES) & (plain["segment_ids"].numpy() > 0)
    # A sequence's first token, too: it has what follows to be told from.
    np.testing.assert_array_equal(batch["labels"].numpy() != -100, events)


def test_draws_depend_on_seed_and_rows_alone():
    collate = DataCollatorForMaskedEvents(TOKENIZER, mlm_probability=0.5)
    first, other = collate([ROWS[6]]), collate([ROWS[1]])
    again = collate([ROWS[6]])
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert torch.equal(first["labels"], again["labels"])
    seeded = DataCollatorForMaskedEvents(TOKENIZER, mlm_probability=0.5, seed=1)([ROWS[6]])
    assert not torch.equal(first["labels"], seeded["labels"])
    assert not torch.equal(first["labels"][0, :14], other["labels"][0])


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_refuses_shares_that_are_none(share):
    with pytest.raises(ValueError, match="expected a share above 0"):
        DataCollatorForMaskedEvents(TOKENIZER, mlm_probability=share)


@pytest.mark.parametrize("lacking", ["token_types", "mask_token_id"])
def test_refuses_a_tokenizer_that_cannot_mask(lacking):
    fields = {name: value for name, value in vars(TOKENIZER).items() if name != lacking}
    with pytest.raises(ValueError, match="give an EhrTokenizer"):
        DataCollatorForMaskedEvents(SimpleNamespace(**fields))


def test_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="empty batch"):
        DataCollatorForMaskedEvents(TOKENIZER)([])

"""Padding of channels and of next-token labels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ehrseq.batches.collation import DataCollatorForNextToken, pad_channels

CHANNELS = ["input_ids", "attention_mask", "times"]


def _row(size: int) -> dict[str, np.ndarray]:
    return {"input_ids": np.arange(1, size + 1), "times": np.linspace(0.5, 9.5, size, dtype=np.float32)}


@pytest.mark.parametrize("side", ["right", "left"])
def test_channels_are_padded_with_zero_and_labels_with_minus_100(side):
    tokenizer = SimpleNamespace(model_input_names=CHANNELS, padding_side=side)
    rows = [_row(3), _row(5), _row(1)]
    batch = DataCollatorForNextToken(tokenizer)(rows)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == batch["labels"].dtype == torch.int64
    assert batch["times"].dtype == torch.float32
    for position, row in enumerate(rows):
        size = len(row["input_ids"])
        real = slice(0, size) if side == "right" else slice(5 - size, 5)
        assert batch["input_ids"][position, real].tolist() == row["input_ids"].tolist()
        assert batch["labels"][position, real].tolist() == row["input_ids"].tolist()
        assert torch.equal(batch["times"][position, real], torch.tensor(row["times"]))
        padded = torch.ones(5, dtype=torch.bool)
        padded[real] = False
        for channel in CHANNELS:
            assert (batch[channel][position, padded] == 0).all()
        assert (batch["labels"][position, padded] == -100).all()
        assert batch["attention_mask"][position].sum() == size


def test_padding_is_no_target_of_the_loss():
    """The same rows alone and padded have the same summed next-token loss."""
    tokenizer = SimpleNamespace(model_input_names=CHANNELS, padding_side="right")
    rows = [_row(3), _row(6)]
    logits = torch.randn(2, 6, 10)
    labels = DataCollatorForNextToken(tokenizer)(rows)["labels"]
    padded = F.cross_entropy(logits[:, :-1].reshape(-1, 10), labels[:, 1:].reshape(-1), reduction="sum")
    alone = sum(
        F.cross_entropy(logits[i, : len(r["input_ids"]) - 1], torch.tensor(r["input_ids"][1:]), reduction="sum")
        for i, r in enumerate(rows)
    )
    assert padded.item() == pytest.approx(float(alone), rel=1e-6)


def test_a_label_column_of_the_row_is_replaced_and_length_rounds_up():
    tokenizer = SimpleNamespace(model_input_names=CHANNELS, padding_side="right")
    batch = DataCollatorForNextToken(tokenizer, pad_to_multiple_of=8)([_row(3) | {"labels": 1, "task_ids": 2}])
    assert batch["labels"].shape == (1, 8)
    assert "task_ids" not in batch


@pytest.mark.parametrize(
    ("rows", "channels", "side", "message"),
    [
        ([], CHANNELS, "right", "empty batch"),
        ([_row(2)], CHANNELS, "middle", "padding_side"),
        ([_row(2)], [*CHANNELS, "ages"], "right", "lacks the channel 'ages'"),
        ([_row(2) | {"times": [0.0]}], CHANNELS, "right", "length 1, input_ids has 2"),
    ],
)
def test_bad_rows_are_clear_errors(rows, channels, side, message):
    with pytest.raises(ValueError, match=message):
        pad_channels(rows, channels, padding_side=side)

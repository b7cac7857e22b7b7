"""What HyMaTE's model and heads refuse, each with a message that names it."""

import pytest
import torch

from tests.modeling.hymate_stays import collate, model_of, pack, random_stay


def with_(**changes):
    return lambda batch: {**batch, **changes}


def put(name, value):
    def changed(batch):
        values = batch[name].clone()
        values[0, 1] = value
        return {**batch, name: values}

    return changed


TWO = [random_stay(6, 1), random_stay(4, 2)]
BAD_INPUTS = {
    "no values": (with_(values=None), "values missing: a triplet has variable_ids, times and values"),
    "nothing": (lambda b: {}, "variable_ids and times and values missing"),
    "a short channel": (lambda b: {**b, "times": b["times"][:, :-1]}, r"times has shape \[2, 5\], expected \[2, 6\]"),
    "a mask of one row": (with_(attention_mask=torch.ones(1, 6)), r"attention_mask has shape \[1, 6\]"),
    "an unknown variable": (put("variable_ids", 6), "holds values from 0 to 6, expected 0 .. 5"),
    "a negative variable": (put("variable_ids", -1), "holds values from -1"),
    "a time that is no number": (put("times", float("nan")), "times holds NaN or infinite"),
    "an infinite value": (put("values", float("inf")), "values holds NaN or infinite"),
    "an unknown static value": (put("static_values", float("nan")), "static_values holds NaN or infinite"),
    "no static values": (with_(static_values=None), r"static_values missing: expected \[2, 3\]"),
    "too many static values": (with_(static_values=torch.ones(2, 4)), r"static_values has shape \[2, 4\], expected"),
    "static values of others": (with_(static_values=torch.ones(3, 3)), r"shape \[3, 3\], expected \[2, 3\]"),
    "flat ids": (lambda b: {**b, "variable_ids": b["variable_ids"][0]}, r"expected \[batch, triplets\]"),
    "no triplets": (lambda b: {**b, "variable_ids": b["variable_ids"][:, :0]}, "at least one triplet a row"),
    "an empty row": (
        with_(attention_mask=torch.tensor([[1] * 6, [0] * 6])),
        r"Rows \[1\] hold no triplet .* variable dropout",
    ),
    "packed without its static values": (
        with_(segment_ids=torch.ones(2, 6, dtype=torch.long)),
        r"static_values has shape \[2, 3\], expected \[2, sequences, 3\]",
    ),
    "segments in the wrong order": (
        with_(segment_ids=torch.tensor([[2, 2, 1, 1, 0, 0]] * 2), static_values=torch.ones(2, 2, 3)),
        "segment_ids of row 0",
    ),
    "more stays than static values": (
        with_(segment_ids=torch.tensor([[1, 1, 2, 2, 3, 0]] * 2), static_values=torch.ones(2, 2, 3)),
        "packs 3 sequences, static_values have room for 2",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_model_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        model_of()(**change(collate(TWO)))


BAD_LABELS = {
    "too few": ("classifier", {"labels": torch.zeros(3, dtype=torch.long)}, r"labels have shape \[3\]"),
    "of another number of variables": ("forecast", {"labels": torch.zeros(2, 5)}, r"expected \[2, 6\]"),
    "of other patients": ("forecast", {"labels": torch.zeros(3, 6)}, r"labels have shape \[3, 6\]"),
    "a mask of another shape": (
        "forecast",
        {"labels": torch.zeros(2, 6), "label_mask": torch.ones(2, 5)},
        r"label_mask have shape \[2, 5\]",
    ),
    "a target that is no number": (
        "forecast",
        {"labels": torch.full((2, 6), float("nan")), "label_mask": torch.ones(2, 6)},
        "NaN or infinite values where label_mask is 1",
    ),
}


@pytest.mark.parametrize(("kind", "given", "message"), BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_heads_refuse_labels(kind, given, message):
    with pytest.raises(ValueError, match=message):
        model_of(kind)(**collate(TWO), **given)


def test_packed_labels_must_fit_the_segments():
    model, batch = model_of("classifier"), pack([TWO, TWO[:1]])
    with pytest.raises(ValueError, match="labels have room for 1"):
        model(**batch, labels=torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="labels have room for 3 sequences a row, static_values for 2"):
        model(**batch, labels=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="classes for sequences that segment_ids does not have"):
        model(**batch, labels=torch.zeros(2, 2, dtype=torch.long))

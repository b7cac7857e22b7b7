"""Attention and fusion weights: those of a naive loop, over the real tokens, each row a distribution."""

import math

import pytest
import torch
from torch.testing import assert_close

from ehrseq.interpretability.attention_weights import attention_matrices, fusion_row
from tests.interpretability.small_models import (
    batch,
    lengths_of,
    packed,
    packed_parts,
    patients,
    real_parts,
    small_model,
)
from tests.modeling import hymate_stays
from tests.modeling.naive_hymate import naive_hymate

ATTENTIVE = ("cehrbert", "ehr_bigbird", "hymate")


@pytest.mark.parametrize("family", ATTENTIVE)
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_row_is_a_distribution_over_the_real_tokens(family, side):
    model, rows = small_model(family), patients(family, [23])
    plain = attention_matrices(model, batch(family, rows))
    assert len(plain) == (1 if family == "hymate" else 2)
    found = attention_matrices(model, batch(family, rows, side, length=30))
    for layer, expected in zip(found, plain, strict=True):
        assert layer.shape == (4, 23, 23)
        assert float(layer.min()) >= 0.0
        assert_close(layer.sum(-1), torch.ones(4, 23, dtype=torch.float64))
        assert_close(layer, expected, rtol=1e-9, atol=1e-12)


def test_the_first_layers_weights_are_those_of_a_loop():
    model, rows = small_model("cehrbert"), patients("cehrbert", [5])
    inputs = batch("cehrbert", rows)
    caught = []
    hook = model.model.positions.register_forward_hook(lambda layer, given, out: caught.append(out))
    found = attention_matrices(model, inputs)[0]
    hook.remove()
    x, self_attention = caught[0][0].detach(), model.model.layers[0].attention.self
    query, key = (
        [(part.weight @ token + part.bias).detach() for token in x]
        for part in (self_attention.query, self_attention.key)
    )
    for head in range(4):
        part = slice(head * 6, head * 6 + 6)
        for i in range(5):
            scores = [float(query[i][part] @ key[j][part]) / math.sqrt(6) for j in range(5)]
            total = sum(math.exp(score) for score in scores)
            expected = torch.tensor([math.exp(score) / total for score in scores], dtype=torch.float64)
            assert_close(found[head, i], expected)


def test_a_bigbird_reads_some_blocks_only():
    model, rows = small_model("ehr_bigbird", num_random_blocks=1), patients("ehr_bigbird", [40])
    plan = model.model.layers[0].attention.self._plan
    weights = attention_matrices(model, batch("ehr_bigbird", rows))[0]
    for head in range(4):
        for i in range(40):
            a = i // 4
            seen = {*range(10)} if a == 0 else {0, a - 1, a, a + 1, *plan[head][a - 1].tolist()}
            assert {j // 4 for j in range(40) if float(weights[head, i, j]) > 0} == {b for b in seen if b < 10}


@pytest.mark.parametrize("name", ["paper", "no attention", "no Mamba", "concatenated"])
def test_fusion_weights_are_those_of_a_naive_twin_wherever_the_triplets_lie(name):
    model = small_model("hymate", **hymate_stays.SWITCHES[name])
    stays = patients("hymate")
    weights = {
        key.removeprefix("model."): value for key, value in model.state_dict().items() if key.startswith("model.")
    }
    expected = [
        torch.stack(list(naive_hymate(weights, model.config, hymate_stays.lists(stay))["alpha"])).flatten()
        for stay in stays
    ]
    for side in ("right", "left"):
        found = fusion_row(model, batch("hymate", stays, side, length=27))
        assert_close(found.sum(1), torch.ones(len(stays), dtype=torch.float64))
        for part, alpha in zip(real_parts(found, stays, side), expected, strict=True):
            assert_close(part, alpha, rtol=1e-9, atol=1e-12)
    for part, alpha in zip(packed_parts(fusion_row(model, packed("hymate", stays)), stays), expected, strict=True):
        assert_close(part, alpha, rtol=1e-9, atol=1e-12)


def test_half_precision_and_dropout():
    rows = patients("cehrbert", [6])
    half = small_model("cehrbert", torch.bfloat16).train()
    found = attention_matrices(half, batch("cehrbert", rows, dtype=torch.float32))
    again = attention_matrices(half, batch("cehrbert", rows, dtype=torch.float32))
    assert half.training
    assert found[0].dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert lengths_of(rows) == [found[0].shape[-1]]


def bad_inputs():
    stays, events = patients("hymate"), patients("cehrbert")
    binned = small_model("hymate", embedding_mode="binned", num_bins=4)
    return [
        (attention_matrices, small_model("ehrmamba"), batch("ehrmamba", events[:1]), "attentions: 'ehrmamba' has none"),
        (attention_matrices, small_model("cehrbert"), batch("cehrbert", events), "of one patient"),
        (attention_matrices, small_model("cehrbert"), packed("cehrbert", events), "one row, not packed"),
        (attention_matrices, small_model("cehrbert"), {}, "of one patient, got inputs of shape None"),
        (
            attention_matrices,
            small_model("hymate", num_attention_layers=0),
            batch("hymate", stays[:1]),
            "num_attention_layers=0",
        ),
        (attention_matrices, binned, batch("hymate", stays[:1]), "steps of the grid"),
        (fusion_row, binned, batch("hymate", stays[:1]), "steps of the grid"),
        (fusion_row, small_model("cehrbert"), batch("cehrbert", events[:1]), "'cehrbert' has no fusion attention"),
    ]


@pytest.mark.parametrize("case", range(8))
def test_bad_input_is_told(case):
    function, model, inputs, message = bad_inputs()[case]
    with pytest.raises(ValueError, match=message):
        function(model, inputs)

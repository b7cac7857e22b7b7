"""Relevance: the rewritten network is the model, conserves its log-odds, and gives what a naive twin gives."""

import copy

import pytest
import torch
from torch.testing import assert_close

from ehrseq.interpretability import relevance_hymate
from ehrseq.interpretability.mamba_attention import mean_hidden_attention
from ehrseq.interpretability.relevance_propagation import NETWORKS, token_relevance
from ehrseq.interpretability.relevance_rules import activation_rule
from ehrseq.modeling.configuration_ehr_lstm import EhrLstmConfig
from ehrseq.modeling.hymate_layout import layout_as_given
from ehrseq.modeling.modeling_ehr_bigbird import padded_length
from ehrseq.modeling.modeling_ehr_lstm import EhrLstmForSequenceClassification
from tests.interpretability import naive_relevance as naive
from tests.interpretability.small_models import (
    FAMILIES,
    LENGTHS,
    batch,
    packed,
    packed_parts,
    patients,
    real_parts,
    small_model,
    without_biases,
)
from tests.modeling.hymate_stays import SWITCHES

HYMATE = {name: changes for name, changes in SWITCHES.items() if changes.get("embedding_mode") != "binned"}
CASES = [pytest.param(family, {}, id=family) for family in FAMILIES]
CASES += [
    pytest.param(family, changes, id=f"{family}, {changes}")
    for family, changes in (
        ("ehrmamba", {"use_bias": True, "use_conv_bias": False, "residual_in_fp32": False}),
        ("ehrmamba", {"num_hidden_layers": 1, "expand": 3, "conv_kernel": 2}),
        ("cehrbert", {"pooling": "last", "hidden_act": "gelu_new"}),
        ("ehr_bigbird", {"pooling": "last", "hidden_act": "relu"}),
    )
]
CASES += [pytest.param("hymate", changes, id=f"hymate, {name}") for name, changes in HYMATE.items() if name != "paper"]


def static_size(changes):
    return changes.get("num_static", 3)


def exact_log_odds(model, inputs):
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.dtype == torch.float64
    return logits[..., 1] - logits[..., 0]


@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_the_rewritten_network_is_the_model(family, changes, kind):
    model, rows = small_model(family, **changes), patients(family, static=static_size(changes))
    inputs = packed(family, rows) if kind == "packed" else batch(family, rows, kind, length=26)
    assert_close(token_relevance(model, inputs).log_odds, exact_log_odds(model, inputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_without_biases_every_layer_holds_the_whole_log_odds(family, changes):
    model = without_biases(small_model(family, **changes))
    rows = patients(family, static=static_size(changes))
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        found = token_relevance(copy.deepcopy(model).to(dtype), batch(family, rows, dtype=dtype))
        whole = found.log_odds - sum(found.parts.values())
        assert float(whole.abs().max()) > 1e-3
        assert len(found.layers) == 1 + (
            model.config.num_hidden_layers
            if family != "hymate"
            else model.config.num_mamba_layers + model.config.num_attention_layers
        )
        for sums in found.layers:
            assert_close(sums, whole, rtol=tolerance, atol=tolerance)
        assert_close(found.tokens.sum(1), whole, rtol=tolerance, atol=tolerance)
        assert float(found.remainder.abs().max()) <= tolerance * 10


@pytest.mark.parametrize("family", FAMILIES)
def test_with_biases_the_remainder_is_what_they_add(family):
    model, inputs = small_model(family), batch(family, patients(family))
    found = token_relevance(model, inputs)
    assert float(found.remainder.abs().max()) > 1e-3
    assert_close(found.tokens.sum(1) + sum(found.parts.values()) + found.remainder, found.log_odds)
    # The bias of the last layer is a part of it that is known by itself.
    before = found.remainder.clone()
    layer = model.classifier if family == "hymate" else model.classifier.out_proj
    with torch.no_grad():
        layer.bias += torch.tensor([0.25, 1.0])
    assert_close(token_relevance(model, inputs).remainder - before, torch.full_like(before, 0.75))


def test_what_passes_hymates_triplets_by_is_told():
    changes = SWITCHES["beyond the paper"]
    model, inputs = small_model("hymate", **changes), batch("hymate", patients("hymate"))
    parts = token_relevance(model, inputs).parts
    assert set(parts) == {"static values", "variable summaries", "last values", "additive part"}

    def without(layer, name):  # the log-odds when that part's weights are 0 and its output therefore is
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in layer(changed):
                parameter.zero_()
        return exact_log_odds(model, inputs) - exact_log_odds(changed, inputs), name

    for difference, name in (
        without(lambda m: m.model.static_embedding.parameters(), "static values"),
        without(lambda m: m.model.summary_embedding.parameters(), "variable summaries"),
        without(lambda m: [m.forecast_head.persistence], "last values"),
        without(lambda m: m.additive_head.parameters(), "additive part"),
    ):
        assert_close(parts[name], difference, msg=name)


@pytest.mark.parametrize(("family", "length"), [("ehrmamba", 6), ("cehrbert", 4), ("ehr_bigbird", 25), ("hymate", 5)])
def test_a_naive_twin_gives_the_same(family, length):
    small = {"hidden_size": 8, "num_attention_heads": 2}
    if family == "ehrmamba":
        small = {"hidden_size": 8, "num_hidden_layers": 2, "state_size": 3}
    elif family == "hymate":
        small |= {"state_size": 3, "num_mamba_layers": 1}
    else:
        small |= {"num_hidden_layers": 1 if family == "ehr_bigbird" else 2, "intermediate_size": 6}
        if family == "ehr_bigbird":
            small["num_random_blocks"] = 1
    model, rows = small_model(family, **small), patients(family, [length])
    inputs = batch(family, rows)
    weights, config = model.state_dict(), model.config
    embedded = NETWORKS[family](model, inputs).embedded[0, :length]
    if family == "ehrmamba":
        network = naive.ehrmamba(weights, config)
    elif family == "cehrbert":
        network = naive.transformer(weights, config, lambda layer, head, i, j: True)
    elif family == "ehr_bigbird":
        plans = [layer.attention.self._plan for layer in model.model.layers]
        blocks = padded_length(length, 4) // 4

        def may_read(layer, head, i, j):
            a, b = i // 4, j // 4
            return a == 0 or b in (0, a - 1, a, a + 1) or b in plans[layer][head][a - 1]

        assert blocks > 6
        assert not all(may_read(0, h, 10, j) for h in range(2) for j in range(length))
        network = naive.transformer(weights, config, may_read)
    else:
        static = model.model.static_embedding(inputs["static_values"])[0].detach()
        network = naive.hymate(weights, config, [static])
    of = [0, 9, 24] if family == "ehr_bigbird" else list(range(length))  # the loops are slow
    log_odds, expected = naive.naive_relevance(network, embedded, of)
    found = token_relevance(model, inputs)
    assert_close(float(found.log_odds[0]), log_odds, rtol=1e-9, atol=1e-9)
    assert float(expected.abs().max()) > 1e-4
    assert_close(found.tokens[0, of], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_packing_and_batch_change_nothing(family):
    model, rows = small_model(family), patients(family)
    alone = [token_relevance(model, batch(family, [row])) for row in rows]
    for side in ("right", "left"):
        found = token_relevance(model, batch(family, rows, side, length=27))
        for part, one, odds in zip(real_parts(found.tokens, rows, side), alone, found.log_odds, strict=True):
            assert_close(part, one.tokens[0], rtol=1e-9, atol=1e-11)
            assert_close(odds, one.log_odds[0], rtol=1e-9, atol=1e-11)
        assert_close(found.tokens.sum(1), found.layers[0])  # nothing stands at padding
    row = token_relevance(model, packed(family, rows))
    for i, (part, one) in enumerate(zip(packed_parts(row.tokens, rows), alone, strict=True)):
        assert_close(part, one.tokens[0], rtol=1e-9, atol=1e-11)
        assert_close(row.layers[:, 0, i], one.layers[:, 0], rtol=1e-9, atol=1e-11)
        assert_close(row.remainder[0, i], one.remainder[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_hymates_rows_may_lie_as_on_other_devices(kind, monkeypatch):
    """On a GPU padded and packed rows stay as they are, under masks; on a CPU real triplets are joined."""
    model, rows = small_model("hymate"), patients("hymate")
    inputs = packed("hymate", rows) if kind == "packed" else batch("hymate", rows, kind, length=27)
    expected, weights = token_relevance(model, inputs), mean_hidden_attention(model, inputs)
    assert NETWORKS["hymate"](model, inputs).embedded.shape[:2] == (1, sum(LENGTHS))

    def as_given(owner, num_sequences, real, packed, as_given):
        return layout_as_given(owner, num_sequences, real, packed)

    monkeypatch.setattr(relevance_hymate, "choose_layout", as_given)
    assert NETWORKS["hymate"](model, inputs).embedded.shape[:2] == inputs["values"].shape
    found = token_relevance(model, inputs)
    assert_close(found.tokens, expected.tokens, rtol=1e-9, atol=1e-11)
    assert_close(found.layers, expected.layers, rtol=1e-9, atol=1e-11)
    for layer, other in zip(mean_hidden_attention(model, inputs), weights, strict=True):
        assert_close(layer, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_with_fewer_sequences_is_not_given_those_of_others(family):
    model, rows = small_model(family), patients(family, (5, 3, 4))
    one, two = packed(family, rows[:1]), packed(family, rows[1:])
    length = max(one["segment_ids"].shape[1], two["segment_ids"].shape[1])
    inputs = {}
    for name in one:
        short = 2 if name == "static_values" else length
        parts = [part if part.shape[1] == short else pad_to(part, short) for part in (one[name], two[name])]
        inputs[name] = torch.cat(parts)
    found = token_relevance(model, inputs)
    assert found.log_odds.shape == (2, 2)
    assert float(found.log_odds[0, 1]) == 0.0
    assert float(found.remainder[0, 1]) == 0.0
    assert_close(found.tokens[0, :5], token_relevance(model, batch(family, rows[:1])).tokens[0], rtol=1e-9, atol=1e-11)


def pad_to(part, size):
    shape = list(part.shape)
    shape[1] = size - shape[1]
    return torch.cat([part, part.new_zeros(shape)], dim=1)


@pytest.mark.parametrize("family", ["ehrmamba", "hymate"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_every_kernel_backend_gives_the_same(family, dtype, tolerance, monkeypatch):
    from ehrseq.kernels import cpu_library

    rows = patients(family)
    found = {}
    for backend in ("naive", "torch", "cpp"):
        if backend == "cpp" and cpu_library.why_no_library():
            continue
        monkeypatch.setenv("EHRSEQ_BACKEND", backend)
        found[backend] = token_relevance(small_model(family, dtype), packed(family, rows, dtype)).tokens
    for backend, tokens in found.items():
        assert_close(tokens, found["naive"], rtol=tolerance, atol=tolerance * 1e-2, msg=backend)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_computed_in_float32_and_dropout_is_off(family):
    rows = patients(family)
    half = small_model(family, torch.bfloat16)
    same = copy.deepcopy(half).float()
    expected = token_relevance(same, batch(family, rows, dtype=torch.float32))
    half.train()
    found = token_relevance(half, batch(family, rows, dtype=torch.float32))
    assert found.tokens.dtype == torch.float32
    assert_close(found.tokens, expected.tokens)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    same.train()
    modes = [module.training for module in same.modules()]
    assert_close(token_relevance(same, batch(family, rows, dtype=torch.float32)).tokens, expected.tokens)
    assert [module.training for module in same.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in same.parameters())


@pytest.mark.parametrize("function", [torch.tanh, torch.nn.functional.gelu, torch.nn.functional.silu])
def test_an_activation_keeps_its_value_and_has_a_factor_at_zero(function):
    x = torch.tensor([-3.0, -1e-12, 0.0, 1e-300, 2.0], dtype=torch.float64, requires_grad=True)
    out = activation_rule(x, function)
    assert_close(out, function(x))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    limit = {torch.tanh: 1.0}.get(function, 0.5)
    assert_close(gradient[1:4], torch.full((3,), limit, dtype=torch.float64), rtol=0, atol=1e-4)
    assert_close(gradient * x, function(x))


@pytest.mark.parametrize("family", ["ehrmamba", "hymate"])
def test_a_hundred_thousand_tokens_take_one_pass(family):
    small = {"hidden_size": 8, "state_size": 2} | ({"num_attention_layers": 0} if family == "hymate" else {})
    model = without_biases(small_model(family, torch.float32, **small))
    inputs = batch(family, patients(family, [100_000]), dtype=torch.float32)
    found = token_relevance(model, inputs)
    whole = found.log_odds - sum(found.parts.values())
    assert_close(found.tokens.double().sum(1), whole.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_a_library_has_changed_are_called(family):
    """An adapter or quantised weights are not read as weights: the layer itself is called."""
    model, inputs = small_model(family), batch(family, patients(family))
    expected, called = token_relevance(model, inputs), []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda layer, given, out: called.append(layer))
    found = token_relevance(model, inputs)
    assert len(set(called)) > 5
    assert_close(found.tokens, expected.tokens)
    assert_close(found.log_odds, expected.log_odds)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_can_be_asked_where_gradients_are_off(family, mode):
    model, rows = small_model(family), patients(family)
    expected = token_relevance(model, packed(family, rows)).tokens
    with mode():
        inputs = packed(family, rows)  # tensors of inference mode, where that is on
        assert_close(token_relevance(model, inputs).tokens, expected)
        if family in ("ehrmamba", "hymate"):
            assert len(mean_hidden_attention(model, inputs)) > 0


def bad_inputs():
    lstm = EhrLstmForSequenceClassification(EhrLstmConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1))
    rows = batch("ehrmamba", patients("ehrmamba"))
    empty = {**rows, "attention_mask": torch.zeros_like(rows["attention_mask"])}
    binned = small_model("hymate", embedding_mode="binned", num_bins=4)
    return [
        (lstm, rows, "'ehr_lstm' has no rules of relevance propagation, which ehrmamba, hymate"),
        (small_model("ehrmamba", num_labels=3), rows, "the model has 3 classes, expected 2"),
        (small_model("ehrmamba"), empty, "hold padding only"),
        (small_model("cehrbert"), empty, "hold padding only"),
        (small_model("ehrmamba"), {"ages": rows["ages"]}, "exactly one of input_ids and inputs_embeds"),
        (small_model("ehrmamba"), {**rows, "input_ids": rows["input_ids"] + 100}, "input_ids holds values"),
        (small_model("ehrmamba"), {**rows, "times": rows["times"] * float("nan")}, "times holds NaN"),
        (small_model("hymate"), {"times": rows["times"]}, "variable_ids and values missing"),
        (binned, batch("hymate", patients("hymate")), "embedding_mode='binned'"),
    ]


@pytest.mark.parametrize("case", range(9))
def test_bad_input_is_told(case):
    model, inputs, message = bad_inputs()[case]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        token_relevance(model, inputs)

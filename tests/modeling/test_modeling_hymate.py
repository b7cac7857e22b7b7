"""HyMaTE's layers against their naive twins, and what must change nothing: padding, batching, packing, the layout."""

import math

import pytest
import torch
from safetensors.torch import load_file

from ehrseq.modeling import modeling_hymate
from ehrseq.modeling.hymate_layout import joined_layout, layout_as_given, owners
from tests.modeling.common import assert_close, assert_same_gradients, checkpoint_activations, gradients
from tests.modeling.hymate_stays import (
    BEYOND,
    CLASSES,
    LENGTHS,
    STATIC,
    SWITCHES,
    VARIABLES,
    collate,
    lists,
    model_of,
    pack,
    random_stay,
    random_stays,
    tiny_config,
)
from tests.modeling.naive_hymate import naive_hymate, naive_logits

KINDS = ("base", "forecast", "classifier")
each_switch = pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())
# Every switch once, in the classifier, and the other classes with the paper's model.
each_model = pytest.mark.parametrize(
    ("kind", "changes"),
    [("base", {}), ("forecast", {}), ("forecast", BEYOND), *(("classifier", changes) for changes in SWITCHES.values())],
    ids=["base", "forecast", "forecast beyond the paper", *SWITCHES],
)
paper_and_beyond = pytest.mark.parametrize("changes", [{}, BEYOND], ids=["paper", "beyond"])


def stays_for(changes):
    return random_stays(static=changes.get("num_static", STATIC))


def in_float64(stay):
    return {name: v.double() if v.is_floating_point() else v for name, v in stay.items()}


def as_given(monkeypatch):
    """Let the model keep the rows as they are given, as it does on accelerators."""
    choose = modeling_hymate.choose_layout
    monkeypatch.setattr(modeling_hymate, "choose_layout", lambda *args: choose(*args[:-1], True))


def labels_for(kind, rows):
    """Labels and what goes with them, different for each row."""
    if kind == "classifier":
        return {"labels": torch.arange(rows) % 2}
    targets = torch.linspace(-1, 1, rows * VARIABLES).view(rows, VARIABLES)
    return {"labels": targets, "label_mask": (torch.arange(rows * VARIABLES).view(rows, VARIABLES) % 3 > 0).long()}


def in_packs(name, values, rows):
    """Per-stay values [stays, ...] as [rows, segments, ...], padded."""
    most, out, first = max(map(len, rows)), [], 0
    for row in rows:
        part = values[first : first + len(row)]
        filler = -100 if name == "labels" and part.dim() == 1 else 0
        pad = part.new_full((most - len(row), *part.shape[1:]), filler)
        out.append(torch.cat([part, pad]))
        first += len(row)
    return torch.stack(out)


# -- against the naive twin --------------------------------------------------------------------------------------------


@each_switch
def test_equals_the_naive_float64_loop(changes):
    model = model_of(**changes).double()
    stay = in_float64(random_stay(9, 3, changes.get("num_static", STATIC)))
    with torch.no_grad():
        outputs = model(**collate([stay]), output_fusion_attentions=True)
    expected = naive_hymate(model.state_dict(), model.config, lists(stay))
    length = len(expected["hidden"])
    assert_close(outputs.last_hidden_state[0, :length], expected["hidden"], 1e-12, "hidden states")
    assert_close(outputs.fusion_attentions[0, :length], torch.stack(expected["alpha"]), 1e-12, "fusion attention")
    assert_close(outputs.pooler_output[0], expected["pooled"], 1e-12, "pooled")


@each_switch
def test_gradients_equal_those_of_the_naive_loop(changes):
    model = model_of(**changes).double()
    stay = in_float64(random_stay(6, 4, changes.get("num_static", STATIC)))
    probe = torch.randn(model.config.pooled_size, dtype=torch.float64)
    actual = gradients(model, (model(**collate([stay])).pooler_output[0] * probe).sum())
    naive_weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    (naive_hymate(naive_weights, model.config, lists(stay))["pooled"] * probe).sum().backward()
    scale = max(float(w.grad.abs().max()) for w in naive_weights.values() if w.grad is not None)
    for name, weight in naive_weights.items():
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        error = float((actual[name] - expected).abs().max())
        assert error <= 1e-9 * max(float(expected.abs().max()), 1e-3 * scale), name


def test_in_float32_it_stays_close_to_the_naive_loop():
    model = model_of()
    for stay in (random_stay(40, 3), random_stay(1, 4)):
        with torch.no_grad():
            actual = model(**collate([stay])).pooler_output[0]
        assert_close(actual, naive_hymate(model.state_dict(), model.config, lists(stay))["pooled"], 2e-5, "pooled")


@pytest.mark.parametrize("name", ["paper", "summaries", "additive", "additive, no static values"])
def test_logits_equal_those_of_the_naive_loop(name):
    changes = SWITCHES[name]
    model = model_of("classifier", **changes).double()
    stay = in_float64(random_stay(9, 3, changes.get("num_static", STATIC)))
    with torch.no_grad():
        logits = model(**collate([stay])).logits
    # float32 is what heads answer in
    assert_close(logits[0], naive_logits(model.state_dict(), model.config, lists(stay)), 1e-6, "logits")


def test_the_additive_part_begins_as_if_it_were_not_there_and_learns():
    torch.manual_seed(0)
    model = CLASSES["classifier"](tiny_config(additive_summaries=True)).eval()
    outputs = model(**collate(random_stays()), labels=torch.tensor([0, 1, 0, 1, 1]))
    part = model.additive_head.weight
    assert not part.any()
    outputs.loss.backward()
    assert part.grad.any()
    model.additive_head = None
    assert torch.equal(model(**collate(random_stays())).logits, outputs.logits)


def test_the_classifier_reads_the_forecast_where_the_config_says_so():
    model, stays = model_of("classifier", classifier_head="via_forecast").double(), random_stays()
    forecaster = model_of("forecast").double()
    forecaster.load_state_dict({n: w for n, w in model.state_dict().items() if not n.startswith("classifier")})
    batch = {name: v.double() if v.is_floating_point() else v for name, v in collate(stays).items()}
    # float32 is what heads answer in
    expected = forecaster(**batch).predictions.double() @ model.classifier.weight.T + model.classifier.bias
    assert_close(model(**batch).logits, expected, 1e-6, "logits")


# -- padding, batching, packing, layouts -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["joined", "as given"])
@pytest.mark.parametrize("side", ["left", "right"])
@each_switch
def test_padding_and_batching_change_nothing(changes, side, layout, monkeypatch):
    model, stays = model_of(**changes), stays_for(changes)
    alone = [model(**collate([stay]), output_fusion_attentions=True) for stay in stays]
    if layout == "as given":
        as_given(monkeypatch)
    batch = collate(stays, side, length=max(LENGTHS) + 3, filler=3)  # what stands in the padding must not matter
    together = model(**batch, output_fusion_attentions=True)
    for row, single in enumerate(alone):
        assert_close(together.pooler_output[row], single.pooler_output[0], 1e-5, f"pooled, stay {row}")
        if changes.get("embedding_mode") == "binned":
            continue
        real = batch["attention_mask"][row] == 1
        assert_close(together.last_hidden_state[row][real], single.last_hidden_state[0], 1e-5, f"hidden, stay {row}")
        assert_close(together.fusion_attentions[row][real], single.fusion_attentions[0], 1e-5, f"alpha, stay {row}")
        assert not together.fusion_attentions[row][~real].any()


@pytest.mark.parametrize("layout", ["joined", "as given"])
@pytest.mark.parametrize("kind", ["forecast", "classifier"])
@each_switch
def test_packed_rows_equal_padded_ones(changes, kind, layout, monkeypatch):
    model, stays = model_of(kind, **changes), stays_for(changes)
    given = labels_for(kind, len(stays))
    padded = model(**collate(stays), **given)
    if layout == "as given":
        as_given(monkeypatch)
    rows = [stays[:3], stays[3:]]  # the second row has room for one more
    packed = model(**pack(rows), **{name: in_packs(name, values, rows) for name, values in given.items()})
    answers = packed[1].shape[:2]
    assert answers == (2, 3)
    assert_close(torch.cat([packed[1][0], packed[1][1, :2]]), padded[1], 1e-5, "answers")
    assert_close(packed.loss, padded.loss, 1e-6, "loss")
    assert_same_gradients(gradients(model, packed.loss), gradients(model, padded.loss), 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", ["joined", "as given"])
@pytest.mark.parametrize("kind", ["forecast", "classifier"])
@paper_and_beyond
def test_padding_changes_no_gradient(changes, kind, layout, side, monkeypatch):
    model, stays = model_of(kind, **changes), random_stays((6, 6, 6))
    given = labels_for(kind, len(stays))
    exact = model(**{**collate(stays), "attention_mask": None}, **given)  # rows of one length: no padding at all
    expected = gradients(model, exact.loss)
    if layout == "as given":
        as_given(monkeypatch)
    padded = model(**collate(stays, side, length=9, filler=2), **given)
    assert_close(padded.loss, exact.loss, 1e-6, "loss")
    assert_same_gradients(gradients(model, padded.loss), expected, 1e-4)


@paper_and_beyond
def test_a_mask_with_holes_is_the_stay_without_those_triplets(changes, monkeypatch):
    model, stay = model_of(**changes), random_stay(8, 5)
    kept = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1]).bool()
    without = {name: v[kept] if len(v) == 8 else v for name, v in stay.items()}
    expected = model(**collate([without])).pooler_output
    batch = {**collate([stay]), "attention_mask": kept[None].long()}
    assert_close(model(**batch).pooler_output, expected, 1e-5, "joined")
    segments = {**batch, "segment_ids": torch.ones(1, 8, dtype=torch.long)}
    segments["static_values"] = batch["static_values"][:, None]
    assert_close(model(**segments).pooler_output[0], expected, 1e-5, "packed")
    as_given(monkeypatch)
    assert_close(model(**batch).pooler_output, expected, 1e-5, "as given")
    assert_close(model(**segments).pooler_output[0], expected, 1e-5, "packed, as given")


@paper_and_beyond
def test_the_order_of_padding_does_not_matter(changes):
    """Pads may stand before, behind and between: permuting them permutes the hidden states and nothing else."""
    model, stay = model_of(**changes), random_stay(5, 6)
    batch = collate([stay], length=9, filler=1)
    expected = model(**batch)
    places = torch.tensor([5, 0, 6, 1, 2, 7, 3, 4, 8])  # the triplets keep their order
    moved = {name: v[:, places] if name != "static_values" else v for name, v in batch.items()}
    actual = model(**moved)
    assert_close(actual.pooler_output, expected.pooler_output, 1e-6, "pooled")
    assert_close(actual.last_hidden_state, expected.last_hidden_state[:, places], 1e-6, "hidden states")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attentions_give_the_same_in_both_layouts(attention, monkeypatch):
    expected, batch = model_of()(**collate(random_stays())), collate(random_stays())
    model = model_of()
    model.set_attn_implementation(attention)
    assert_close(model(**batch).last_hidden_state, expected.last_hidden_state, 1e-5, "joined")
    as_given(monkeypatch)
    rows = model(**batch).last_hidden_state * batch["attention_mask"][..., None]
    assert_close(rows, expected.last_hidden_state, 1e-5, "as given")


def test_layouts_say_which_sequence_a_triplet_belongs_to():
    segments = torch.tensor([[1, 1, 2, 0], [1, 2, 2, 2]])
    owner = owners(segments, segments > 0, segments, 2)
    assert owner.tolist() == [[0, 0, 1, 4], [2, 3, 3, 3]]
    joined = joined_layout(owner, 4)
    assert joined.lengths == (2, 1, 1, 3)
    assert joined.starts.tolist() == [[True, False, True, True, True, False, False]]
    assert joined.take(segments).tolist() == [[1, 1, 2, 1, 2, 2, 2]]
    assert torch.equal(joined.restore(joined.take(segments)), segments)
    rows = layout_as_given(owner, 4, segments > 0, True)
    assert rows.mask[0, 0].tolist() == [[True, True, False, False]] * 2 + [[False, False, True, False]] + [
        [False, False, False, True]
    ]


# -- what is returned --------------------------------------------------------------------------------------------------


def test_attention_weights_are_those_that_were_used():
    model, stays = model_of(num_attention_layers=2), random_stays()
    batch = collate(stays, "left")
    plain = model(**batch)
    shown = model(**batch, output_attentions=True, output_hidden_states=True)
    assert_close(shown.pooler_output, plain.pooler_output, 1e-5, "pooled")
    assert len(shown.attentions) == 2
    assert len(shown.hidden_states) == 2 + 2 + 1
    assert torch.equal(shown.hidden_states[-1], shown.last_hidden_state)
    real = batch["attention_mask"].bool()
    for weights in shown.attentions:
        assert weights.shape == (5, 4, 13, 13)
        assert_close(weights.sum(-1), torch.ones(5, 4, 13), 1e-5, "sums")
        assert not weights.permute(0, 3, 1, 2)[~real].any(), "padding is read"
    fused = (shown.fusion_attentions[..., None] * shown.last_hidden_state).sum(1)
    assert_close(shown.pooler_output[:, :24], fused, 1e-5, "the fusion weights' sum")


def test_packed_attention_weights_stay_within_a_stay():
    model, stays = model_of(), random_stays()
    batch = pack([stays[:3], stays[3:]])
    shown = model(**batch, output_attentions=True)
    segments = batch["segment_ids"]
    other = segments[:, :, None] != segments[:, None, :]
    assert not shown.attentions[0].amax(1)[other].any()
    sums = shown.fusion_attentions.new_zeros(2, 4).scatter_add(1, segments, shown.fusion_attentions)
    assert_close(sums[0, 1:], torch.ones(3), 1e-5, "each stay's weights")
    assert sums[:, 0].tolist() == [0.0, 0.0]


@paper_and_beyond
def test_nothing_is_returned_that_was_not_asked_for(changes):
    outputs = model_of("classifier", **changes)(**collate(random_stays()))
    assert set(outputs.keys()) == {"logits"}
    assert set(model_of("forecast", **changes)(**collate(random_stays())).keys()) == {"predictions"}


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizons", [1, 3])
def test_forecast_loss_is_the_mean_over_the_targets_that_are_there(horizons):
    from tests.modeling.naive_hymate import naive_forecast_loss

    model, batch = model_of("forecast", num_horizons=horizons), collate(random_stays())
    labels = torch.randn(5, horizons, VARIABLES)
    mask = torch.rand(5, horizons, VARIABLES) < 0.4
    flat, flat_mask = labels.flatten(1), mask.flatten(1)
    outputs = model(**batch, labels=flat, label_mask=flat_mask.long())
    assert outputs.predictions.shape == ((5, VARIABLES) if horizons == 1 else (5, horizons, VARIABLES))
    expected = naive_forecast_loss(outputs.predictions.flatten(1).tolist(), flat.tolist(), flat_mask.tolist())
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)
    if horizons > 1:
        assert torch.equal(model(**batch, labels=labels, label_mask=mask).loss, outputs.loss)
    unknown = flat.masked_fill(~flat_mask, float("nan"))
    for given in ({"labels": unknown}, {"labels": unknown, "label_mask": flat_mask}):
        again = model(**batch, **given)
        assert torch.equal(again.loss, outputs.loss)
        assert all(torch.isfinite(g).all() for g in gradients(model, again.loss).values())


def test_a_batch_without_a_target_has_a_loss_of_zero_with_a_gradient():
    model, batch = model_of("forecast"), collate(random_stays())
    loss = model(**batch, labels=torch.randn(5, VARIABLES), label_mask=torch.zeros(5, VARIABLES)).loss
    assert loss.item() == 0.0
    found = gradients(model, loss)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert not any(g.any() for g in found.values())


def test_class_weights_are_those_of_bce_and_shift_the_scores_back():
    batch, labels = collate(random_stays()), torch.tensor([0, 1, 0, 0, 1])
    model = model_of("classifier", class_weights=[1.0, 4.0])
    outputs = model(**batch, labels=labels)
    log_odds = outputs.logits[:, 1] - outputs.logits[:, 0]
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    assert_close(outputs.loss, bce(log_odds, labels.float(), pos_weight=torch.tensor(4.0)), 1e-6, "loss")
    assert_close(model.risk_scores(outputs.logits), torch.sigmoid(log_odds - math.log(4.0)), 1e-5, "scores")
    plain = model_of("classifier")
    assert_close(plain(**batch, labels=labels).loss, bce(log_odds, labels.float()), 1e-6, "without weights")


def test_weighted_training_gives_scores_whose_mean_is_the_prevalence():
    """The log-odds shift of the class weights, taken back: a score is a probability."""
    torch.manual_seed(0)
    model = model_of("classifier", class_weights=[1.0, 6.0], num_mamba_layers=0, num_attention_layers=0)
    stays = random_stays([4] * 160)
    batch = {**collate(stays), "static_values": torch.zeros(160, STATIC)}
    batch["values"] = torch.zeros_like(batch["values"])
    labels = (torch.arange(160) % 7 == 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    scores = model.risk_scores(model(**batch).logits)
    assert scores.mean().item() == pytest.approx(labels.float().mean().item(), abs=0.02)


def test_auxiliary_outcomes_are_learnt_in_standard_units_and_answered_in_their_own():
    outcomes = [{"name": "length_of_stay", "mean": 13.0, "std": 12.0}, {"name": "saps1"}]
    model = model_of("classifier", auxiliary_outcomes=outcomes, auxiliary_loss_weight=0.5)
    batch, labels = collate(random_stays()), torch.tensor([0, 1, 0, 0, 1])
    targets = torch.tensor([[10.0, 2.0], [float("nan"), 1.0], [40.0, float("nan")], [3.0, 0.0], [8.0, -1.0]])
    plain = model(**batch, labels=labels)
    outputs = model(**batch, labels=labels, auxiliary_targets=targets)
    error = ((outputs.auxiliary_predictions - targets) / torch.tensor([12.0, 1.0]))[~targets.isnan()]
    assert_close(outputs.loss, plain.loss + 0.5 * error.square().mean(), 1e-5, "loss")
    assert torch.equal(outputs.auxiliary_predictions, plain.auxiliary_predictions)
    found = gradients(model, outputs.loss)
    assert all(torch.isfinite(g).all() for g in found.values())
    assert found["auxiliary_head.weight"].any()
    with pytest.raises(ValueError, match="auxiliary_outcomes names none"):
        model_of("classifier")(**batch, auxiliary_targets=targets)


# -- dtype, checkpointing, saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@paper_and_beyond
def test_bfloat16_stays_close(changes, kind, tmp_path, monkeypatch):
    model, batch = model_of(kind, **changes), collate(random_stays())
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    name = "pooler_output" if kind == "base" else None
    for layout in ("joined", "as given"):
        if layout == "as given":
            as_given(monkeypatch)
        with torch.no_grad():
            actual, expected = half(**batch), model(**batch)
        assert_close(actual[name or 0], expected[name or 0], 0.08, layout)
    half.train()(**batch)[name or 0].float().sum().backward()
    if kind == "base":
        shown = half(**batch, output_hidden_states=True)
        assert {states.dtype for states in shown.hidden_states[1:-1]} == {torch.float32}


def test_under_autocast_times_keep_their_resolution():
    model = model_of()
    fine = torch.tensor([[0.5, 0.5 + 2**-12]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        units = model.embeddings.time_embeddings
        inner = torch.tanh(fine[..., None] * units.w1[:, 0] + units.b1)
    assert inner.dtype == torch.float32
    given = {**collate(random_stays()), "labels": torch.tensor([0, 1, 0, 1, 0])}
    for changes in ({}, BEYOND):
        model = model_of("classifier", **changes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**given).loss
        assert loss.item() == pytest.approx(model(**given).loss.item(), rel=0.05)


@pytest.mark.parametrize("kind", ["forecast", "classifier"])
@paper_and_beyond
def test_gradient_checkpointing_gives_the_same_gradients(changes, kind):
    model = model_of(kind, **changes).train()
    batch, given = collate(random_stays()), labels_for(kind, 5)
    expected = gradients(model, model(**batch, **given).loss)
    for reentrant in (False, True):
        checkpoint_activations(model, use_reentrant=reentrant)
        if reentrant:  # the reentrant kind needs an input with a gradient, as the embeddings have
            assert model.model.gradient_checkpointing or model.model.mamba_layers[0].gradient_checkpointing
        assert_same_gradients(gradients(model, model(**batch, **given).loss), expected, 1e-5)


@pytest.mark.parametrize("kind", ["forecast", "classifier"])
def test_every_weight_receives_a_gradient(kind):
    model = model_of(kind, **BEYOND)
    found = gradients(model, model(**collate(random_stays()), **labels_for(kind, 5)).loss)
    assert {n for n, g in found.items() if float(g.abs().max()) > 0} == {n for n, _ in model.named_parameters()}


@each_model
def test_saves_safetensors_and_reloads_exactly(kind, changes, tmp_path):
    model, batch = model_of(kind, **changes), collate(stays_for(changes))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())
    with torch.no_grad():
        # Weights that were read from a file lie at other addresses, by which BLAS may sum in another order.
        torch.testing.assert_close(again(**batch)[0], model(**batch)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["direct", "via_forecast"])
@paper_and_beyond
def test_finetuning_starts_from_the_pretrained_weights(changes, head, tmp_path):
    pretrained = model_of("forecast", **changes)
    pretrained.save_pretrained(tmp_path)
    config = tiny_config(**{**changes, "classifier_head": head})
    model, info = CLASSES["classifier"].from_pretrained(tmp_path, config=config, output_loading_info=True)
    start = pretrained.state_dict()
    shared = [name for name in start if head == "via_forecast" or not name.startswith("forecast_head")]
    for name in shared:
        assert torch.equal(model.state_dict()[name], start[name]), name
    new = {name for name in model.state_dict() if name.startswith(("classifier.", "additive_head."))}
    assert set(info["missing_keys"]) == new
    assert not info["unexpected_keys"]
    assert set(model.untrained_weights()) == new
    backbone = CLASSES["base"].from_pretrained(tmp_path)
    assert all(torch.equal(w, start[f"model.{name}"]) for name, w in backbone.state_dict().items())


def test_starts_from_the_documented_initialisation():
    check_initialisation(CLASSES["classifier"](big_config()))


def big_config():
    return tiny_config(hidden_size=64, num_variables=200, num_static=40, **BEYOND)


def check_initialisation(model):
    embeddings, config = model.model.embeddings, model.config
    assert embeddings.variable_embeddings.weight.std().item() == pytest.approx(config.initializer_range, rel=0.05)
    assert torch.equal(model.forecast_head.persistence.data, torch.ones(200))
    assert not model.additive_head.weight.any()
    for numbers in (embeddings.value_embeddings, embeddings.time_embeddings, embeddings.change_embeddings):
        assert not numbers.b1.any()
        for weight in (numbers.w1, numbers.w2):
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.8 * bound < weight.abs().max().item() <= bound
    block, attention = model.model.mamba_layers[0], model.model.attention_layers[0]
    inner = (attention.attention.qkv_proj, attention.up_proj, model.model.static_embedding.dense_in)
    summaries = (model.model.summary_embedding.dense_in, model.model.summary_embedding.dense_out)
    for linear in (*inner, *summaries, model.forecast_head):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert 0.95 * bound < linear.weight.abs().max().item() <= bound
        assert not linear.bias.any()
    assert block.mixer.in_proj.weight.abs().max().item() <= 1 / math.sqrt(64)  # Kaiming, as EhrMamba's
    assert torch.equal(block.mixer.D.data, torch.ones(128))
    assert torch.equal(attention.attention_norm.weight.data, torch.ones(64))
    assert 0 < model.model.fusion_attention.u.abs().max().item() <= math.sqrt(6 / 65)


def test_weights_that_a_checkpoint_lacks_are_initialised_not_left_as_garbage(tmp_path):
    model = CLASSES["classifier"](big_config())
    model.save_pretrained(tmp_path, state_dict={"model.norm_f.weight": torch.full((64,), 3.0)})
    loaded = CLASSES["classifier"].from_pretrained(tmp_path)
    assert torch.equal(loaded.model.norm_f.weight.data, torch.full((64,), 3.0))
    check_initialisation(loaded)


# -- ablations ---------------------------------------------------------------------------------------------------------


def test_switches_leave_out_what_they_name():
    def names(**changes):
        return {name.split(".")[0] for name, _ in CLASSES["base"](tiny_config(**changes)).named_parameters()}

    everything = {"embeddings", "mamba_layers", "attention_layers", "norm_f", "fusion_attention", "static_embedding"}
    assert names() == everything
    assert names(num_mamba_layers=0) == everything - {"mamba_layers"}
    assert names(num_attention_layers=0) == everything - {"attention_layers"}
    assert names(num_static=0) == everything - {"static_embedding"}
    assert names(variable_summaries=True) == everything | {"summary_embedding"}
    assert names(forecast_from_last_value=True) == everything
    shared = CLASSES["base"](tiny_config(share_layer_weights=True, num_mamba_layers=3))
    assert len(shared.mamba_layers) == 1


def test_shuffled_order_is_for_training_only_and_stays_within_a_stay(monkeypatch):
    model, stays = model_of(shuffle_order=True), random_stays()
    batch = collate(stays)
    plain = model_of()(**batch)
    assert torch.equal(model(**batch).last_hidden_state, plain.last_hidden_state)
    model.train()
    torch.manual_seed(1)
    first = model(**batch)
    torch.manual_seed(1)
    assert torch.equal(model(**batch).last_hidden_state, first.last_hidden_state), "not seeded"
    torch.manual_seed(2)
    assert not torch.equal(model(**batch).last_hidden_state, first.last_hidden_state)
    assert_close(first.pooler_output[1], plain.pooler_output[1], 1e-5, "a stay of one triplet has one order")
    # Without Mamba the order of a set does not matter: the outputs come back at their triplets' places.
    for layout in ("joined", "as given"):
        if layout == "as given":
            as_given(monkeypatch)
        ordered = model_of(num_mamba_layers=0)(**batch).last_hidden_state * batch["attention_mask"][..., None]
        shuffled = model_of(num_mamba_layers=0, shuffle_order=True).train()(**batch).last_hidden_state
        assert_close(shuffled * batch["attention_mask"][..., None], ordered, 1e-5, layout)


def test_dropout_is_drawn_in_training_only():
    model, batch = model_of(hidden_dropout_prob=0.5, classifier_dropout=0.5), collate(random_stays())
    assert torch.equal(model(**batch).pooler_output, model(**batch).pooler_output)
    model.train()
    assert not torch.equal(model(**batch).pooler_output, model(**batch).pooler_output)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("forecast", {}), ("forecast", BEYOND), *(("classifier", changes) for changes in SWITCHES.values())],
    ids=["forecast", "forecast beyond the paper", *SWITCHES],
)
def test_every_ablation_overfits_a_few_stays(kind, changes):
    torch.manual_seed(0)
    model = CLASSES[kind](tiny_config(**changes)).train()
    batch, given = collate(stays_for(changes)), labels_for(kind, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    first = None
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**batch, **given).loss
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
        if loss.item() < 0.25 * first:
            return
    pytest.fail(f"the loss of {first:.3f} fell to {loss.item():.3f} only")

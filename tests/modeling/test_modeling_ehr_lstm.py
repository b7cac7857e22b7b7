"""The bi-LSTM baseline against a naive float64 loop, and what every model of the package must satisfy."""

import pytest
import torch

from ehrseq.modeling.configuration_ehr_lstm import EhrLstmConfig
from ehrseq.modeling.modeling_ehr_lstm import EhrLstmForSequenceClassification, EhrLstmModel
from tests.modeling.common import ModelCommonTests, assert_close, collate, gradients, pack
from tests.modeling.naive_ehrmamba import naive_embeddings
from tests.modeling.test_modeling_ehrmamba import lists, random_patient


def tiny_config(**changes):
    fields = {
        "vocab_size": 40,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "time_embeddings_size": 6,
        "max_num_visits": 16,
    }
    return EhrLstmConfig(**{**fields, **changes})


class TestEhrLstm(ModelCommonTests):
    model_classes = {"base": EhrLstmModel, "classifier": EhrLstmForSequenceClassification}

    def config(self, **changes):
        return tiny_config(**changes)

    def patients(self):
        return [random_patient(length, seed) for seed, length in enumerate([7, 1, 13, 4, 2])]


def model_of(kind="base", **changes):
    return TestEhrLstm().model(kind, **changes)


# -- against a naive twin ----------------------------------------------------------------------------------------------


def naive_direction(w, layer, suffix, xs):
    """One LSTM over a list of vectors, gate by gate, the gates i, f, g, o in torch's order."""
    weights = {
        name: w[f"layers.{layer}.{name}_l0{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    size = weights["weight_hh"].shape[1]
    h = c = torch.zeros(size, dtype=torch.float64)
    out = []
    for x in xs:
        gates = weights["weight_ih"] @ x + weights["bias_ih"] + weights["weight_hh"] @ h + weights["bias_hh"]
        i, f, g, o = gates.split(size)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return out


def naive_lstm(weights, config, tokens):
    w = {name: tensor.double() for name, tensor in weights.items()}
    xs = naive_embeddings(w, tokens)
    for layer in range(config.num_hidden_layers):
        forward = naive_direction(w, layer, "", xs)
        backward = naive_direction(w, layer, "_reverse", xs[::-1])[::-1]
        xs = [torch.cat(both) for both in zip(forward, backward, strict=True)]
    return torch.stack(xs)


def test_equals_the_naive_float64_loop():
    model = model_of()
    for patient in (random_patient(19, 3), random_patient(1, 4)):
        with torch.no_grad():
            actual = model(**collate([patient])).last_hidden_state[0]
        assert_close(actual, naive_lstm(model.state_dict(), model.config, lists(patient)), 2e-5, "hidden states")


def test_the_head_reads_where_both_directions_have_seen_everything():
    model, patient = model_of("classifier").double(), random_patient(9, 2)
    patient = {name: v.double() if v.is_floating_point() else v for name, v in patient.items()}
    weights = {name.removeprefix("model."): weight for name, weight in model.state_dict().items()}
    hidden = naive_lstm(weights, model.config, lists(patient))
    pooled = torch.cat([hidden[-1][:12], hidden[0][12:]])
    assert_close(model(**collate([patient])).logits[0], model.classifier(pooled).float(), 1e-6, "logits")


# -- packing and padding -----------------------------------------------------------------------------------------------


def test_packed_sequences_do_not_see_each_other():
    model, patients = model_of(), TestEhrLstm().patients()
    row = pack(patients)
    with torch.no_grad():
        together = model(**row).last_hidden_state[0]
        alone = [model(**collate([patient])).last_hidden_state[0] for patient in patients]
    assert_close(together[row["segment_ids"][0] > 0], torch.cat(alone), 1e-6, "hidden states")
    assert not together[row["segment_ids"][0] == 0].any()


def test_a_mask_with_holes_is_the_row_without_those_tokens():
    model, patient = model_of(), random_patient(8, 5)
    kept = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1]).bool()
    # Time differences are taken over the tokens as they stand, so the times are one and the same here.
    patient["times"] = torch.full((8,), 3.0)
    without = {name: values[kept] for name, values in patient.items()}
    batch = {**collate([patient]), "attention_mask": kept[None].long()}
    with torch.no_grad():
        expected = model(**collate([without])).last_hidden_state[0]
        assert_close(model(**batch).last_hidden_state[0][kept], expected, 1e-6, "hidden states")


def test_dropout_stands_between_the_layers_alone():
    one, two = (model_of(num_hidden_layers=n, lstm_dropout=0.9, hidden_dropout_prob=0.0).train() for n in (1, 2))
    batch = collate([random_patient(5, 0)])
    assert torch.equal(one(**batch)[0], one(**batch)[0])
    assert not torch.equal(two(**batch)[0], two(**batch)[0])


def test_initialisation_is_torchs_and_a_lacking_weight_gets_it(tmp_path):
    torch.manual_seed(0)
    model = EhrLstmModel(tiny_config(hidden_size=64))
    bound = 32**-0.5
    for weight in model.layers[1].parameters():
        assert 0.8 * bound < float(weight.detach().abs().max()) <= bound
    kept = {name: weight for name, weight in model.state_dict().items() if not name.startswith("layers.1")}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = EhrLstmModel.from_pretrained(tmp_path)
    for weight in loaded.layers[1].parameters():
        assert 0.8 * bound < float(weight.detach().abs().max()) <= bound


# -- configuration and bad input ---------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    config = EhrLstmConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.direction_size) == (768, 6, 384)
    assert (config.lstm_dropout, config.model_type) == (0.1, "ehr_lstm")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 25}, "hidden_size=25: expected an even number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"lstm_dropout": 1.0}, r"lstm_dropout=1.0: expected a probability in \[0, 1\)"),
        ({"tie_word_embeddings": True}, "heads of ehr_lstm models"),
    ],
)
def test_refuses_values_no_model_could_be_built_from(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.full((1, 4), 40)}, "input_ids holds values from 40 to 40"),
        ({"times": torch.full((1, 4), float("nan"))}, "times holds NaN"),
        ({"ages": torch.zeros(1, 3)}, r"ages has shape \[1, 3\]"),
        ({"attention_mask": torch.zeros(1, 4, dtype=torch.long)}, "padding only"),
        ({"segment_ids": torch.tensor([[2, 2, 1, 1]])}, "segment_ids of row 0"),
        ({"inputs_embeds": torch.zeros(1, 4, 24)}, "exactly one of input_ids and inputs_embeds"),
        ({"labels": torch.tensor([0, 1])}, "expected one label for each"),
    ],
)
def test_bad_input_is_told(change, message):
    model = model_of("classifier")
    with pytest.raises(ValueError, match=message):
        model(**{**collate([random_patient(4, 0)]), **change})


def test_every_weight_learns_from_packed_rows_too():
    model, patients = model_of("classifier"), TestEhrLstm().patients()
    labels = torch.tensor([[0, 1, 0, 1, 1]])
    found = gradients(model, model(**pack(patients), labels=labels).loss)
    learning = {name for name, gradient in found.items() if gradient.abs().max() > 0}
    assert learning == {name for name, _ in model.named_parameters()}

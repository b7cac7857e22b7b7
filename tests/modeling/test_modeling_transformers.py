"""CEHR-BERT and BigBird against a naive float64 twin, and what every model of the package must satisfy."""

import math

import numpy as np
import pytest
import torch

from ehrseq.modeling.configuration_cehrbert import CehrBertConfig
from ehrseq.modeling.configuration_ehr_bigbird import EhrBigBirdConfig
from ehrseq.modeling.modeling_cehrbert import CehrBertForMaskedLM, CehrBertForSequenceClassification, CehrBertModel
from ehrseq.modeling.modeling_ehr_bigbird import (
    EhrBigBirdForMaskedLM,
    EhrBigBirdForSequenceClassification,
    EhrBigBirdModel,
    draw_blocks,
    padded_length,
)
from tests.modeling.common import ModelCommonTests, assert_close, collate, gradients, pack
from tests.modeling.naive_ehrmamba import naive_embeddings
from tests.modeling.test_modeling_ehrmamba import lists, random_patient

FIELDS = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "time_embeddings_size": 6,
    "max_num_visits": 16,
    "max_position_embeddings": 64,
}


def patients():
    return [random_patient(length, seed) for seed, length in enumerate([7, 1, 43, 4, 2, 26])]


class TestCehrBert(ModelCommonTests):
    model_classes = {
        "base": CehrBertModel,
        "masked": CehrBertForMaskedLM,
        "classifier": CehrBertForSequenceClassification,
    }

    def config(self, **changes):
        # The test that asks for the same gradients twice must draw nothing.
        quiet = {"attention_probs_dropout_prob": 0.0} if changes.get("hidden_dropout_prob") == 0.0 else {}
        return CehrBertConfig(**{**FIELDS, **quiet, **changes})

    def patients(self):
        return patients()


class TestEhrBigBird(ModelCommonTests):
    model_classes = {
        "base": EhrBigBirdModel,
        "masked": EhrBigBirdForMaskedLM,
        "classifier": EhrBigBirdForSequenceClassification,
    }

    def config(self, **changes):
        return EhrBigBirdConfig(**{**FIELDS, "block_size": 4, "num_random_blocks": 2, **changes})

    def patients(self):
        return patients()


both = pytest.mark.parametrize("family", [TestCehrBert, TestEhrBigBird])


# -- against a naive twin ----------------------------------------------------------------------------------------------


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def normed(w, name, x):
    scaled = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-12)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def naive_transformer(model, patient, sees):
    """Hidden states of one patient, float64 [l, d]; `sees(layer, head, query, key)` says which tokens meet."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config, length = model.config, len(patient["input_ids"])
    x = torch.stack(naive_embeddings(w, lists(patient))) + w["positions.position_embeddings.weight"][:length]
    size = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}"
        parts = {part: linear(w, f"{name}.attention.self.{part}", x) for part in ("query", "key", "value")}
        mixed = torch.zeros_like(x)
        for head in range(config.num_attention_heads):
            columns = slice(head * size, (head + 1) * size)
            for query in range(length):
                keys = [key for key in range(length) if sees(layer, head, query, key)]
                scores = parts["key"][keys, columns] @ parts["query"][query, columns] / math.sqrt(size)
                mixed[query, columns] = torch.softmax(scores, 0) @ parts["value"][keys, columns]
        x = normed(w, f"{name}.attention.output.LayerNorm", linear(w, f"{name}.attention.output.dense", mixed) + x)
        inner = gelu(linear(w, f"{name}.intermediate.dense", x))
        x = normed(w, f"{name}.output.LayerNorm", linear(w, f"{name}.output.dense", inner) + x)
    return x


def everything(layer, head, query, key):
    return True


def blocks_of(model):
    """Which blocks meet, as the paper has it, with the random ones that the model drew."""
    size = model.config.block_size
    plans = [layer.attention.self._plan for layer in model.layers]

    def sees(layer, head, query, key):
        i, j = query // size, key // size
        return i == 0 or j == 0 or abs(i - j) <= 1 or j in plans[layer][head, i - 1]

    return sees


@both
@pytest.mark.parametrize("length", [1, 9, 43, 64])
def test_equals_the_naive_float64_twin(family, length):
    model, patient = family().model("base"), random_patient(length, length)
    sees = everything if family is TestCehrBert else blocks_of(model)
    with torch.no_grad():
        actual = model(**collate([patient])).last_hidden_state[0]
    assert_close(actual, naive_transformer(model, patient, sees), 2e-5, "hidden states")


@both
def test_the_classifier_reads_the_first_token_or_the_last(family):
    for pooling, place in (("first", 0), ("last", -1)):
        model = family().model("classifier", pooling=pooling)
        for side in ("left", "right"):
            batch = collate(patients(), side)
            hidden = model.model(**batch).last_hidden_state
            rows = [row[mask.bool()][place] for row, mask in zip(hidden, batch["attention_mask"], strict=True)]
            expected = model.classifier(torch.stack(rows))
            assert_close(model(**batch).logits, expected, 1e-6, f"{pooling}, padded on the {side}")


@both
def test_the_loss_is_that_of_the_masked_tokens(family):
    model, batch = family().model("masked"), collate(patients())
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 2], labels[2, 40] = 5, 6
    with torch.no_grad():
        outputs = model(**batch, labels=labels)
    chances = torch.log_softmax(outputs.logits.double(), -1)
    expected = -(chances[0, 2, 5] + chances[2, 40, 6]) / 2
    assert float(outputs.loss) == pytest.approx(float(expected), rel=1e-6)
    assert float(model(**batch, labels=torch.full_like(labels, -100)).loss.detach()) == 0.0


# -- attention weights -------------------------------------------------------------------------------------------------


@both
def test_attention_weights_are_those_of_the_output(family):
    model, batch = family().model("base"), collate(patients())
    with torch.no_grad():
        outputs = model(**batch, output_attentions=True, output_hidden_states=True)
        layer = model.layers[1]
        values = layer.attention.self.value(outputs.hidden_states[1])
        for row, patient in enumerate(patients()):
            length = len(patient["input_ids"])
            weights = outputs.attentions[1][row, :, :length, :length]
            assert_close(weights.sum(-1), torch.ones(4, length), 1e-5, "sum of the weights")
            heads = values[row, :length].view(length, 4, 6).transpose(0, 1)
            mixed = (weights @ heads).transpose(0, 1).reshape(length, 24)
            after = layer.feed_forward_chunk(layer.attention.output(mixed, outputs.hidden_states[1][row, :length]))
            assert_close(after, outputs.hidden_states[2][row, :length], 1e-5, f"patient {row}")
    assert outputs.last_hidden_state is not None
    assert model(**batch).attentions is None


@both
def test_no_weight_lies_on_padding(family):
    model = family().model("base")
    for side in ("left", "right"):
        outputs = model(**collate(patients(), side), output_attentions=True)
        for row, patient in enumerate(patients()):
            length = len(patient["input_ids"])
            assert float(outputs.attentions[0][row, :, :length, length:].abs().sum()) == 0.0


@both
def test_packed_sequences_do_not_see_each_other(family):
    model, row = family().model("base"), pack(patients())
    with torch.no_grad():
        together = model(**row).last_hidden_state[0]
        alone = [model(**collate([patient])).last_hidden_state[0] for patient in patients()]
    assert_close(together[row["segment_ids"][0] > 0], torch.cat(alone), 1e-5, "hidden states")


# -- BigBird stays what it is ------------------------------------------------------------------------------------------


def test_attention_is_sparse_after_a_short_batch():
    model, long = TestEhrBigBird().model("base"), collate([random_patient(60, 1)])
    with torch.no_grad():
        before = model(**long).last_hidden_state
        model(**collate([random_patient(3, 2)]))
        outputs = model(**long, output_attentions=True)
    assert torch.equal(outputs.last_hidden_state, before)
    unseen = (outputs.attentions[0][0] == 0).double().mean()
    assert unseen > 0.3  # of the 15 blocks a block in the middle sees six


def test_training_sees_the_blocks_of_evaluation_and_leaves_numpy_alone():
    model, batch = TestEhrBigBird().model("base", hidden_dropout_prob=0.0), collate(patients())
    state = np.random.get_state()[1].copy()  # noqa: NPY002  the global one is what must not move
    with torch.no_grad():
        assert torch.equal(model.train()(**batch).last_hidden_state, model.eval()(**batch).last_hidden_state)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_drawn_blocks_belong_to_the_configuration():
    models = [TestEhrBigBird().model("base", random_blocks_seed=seed) for seed in (3, 3, 4)]
    plans = [model.layers[0].attention.self._plan for model in models]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert (plans[0] != plans[2]).any()
    model = TestEhrBigBird().model("base")
    assert (model.layers[0].attention.self._plan != model.layers[1].attention.self._plan).any()


def test_no_block_is_seen_twice():
    plan = draw_blocks(np.random.default_rng(0), 3, 20, 4)
    assert plan.shape == (3, 18, 4)
    for head in plan:
        for i, drawn in enumerate(head, start=1):
            assert len(set(drawn)) == 4
            assert not {0, i - 1, i, i + 1, 19} & set(drawn)
    few = draw_blocks(np.random.default_rng(0), 1, 5, 4)  # blocks 1 and 3 alone can see each other
    assert few[0].tolist() == [[3, 4, 4, 4], [4, 4, 4, 4], [1, 4, 4, 4]]


@pytest.mark.parametrize(("length", "padded"), [(1, 320), (256, 320), (257, 384), (960, 1088), (2048, 2112)])
def test_the_last_block_is_always_padding(length, padded):
    assert padded_length(length, 64) == padded
    assert padded - length >= 64


def test_every_length_runs():
    """Lengths at which transformers has another plan of random blocks, too."""
    model = EhrBigBirdModel(EhrBigBirdConfig(**{**FIELDS, "max_position_embeddings": 1100, "num_hidden_layers": 1}))
    with torch.no_grad():
        for length in (1, 64, 319, 320, 959, 960, 961, 1024, 1100):
            assert model(torch.ones(1, length, dtype=torch.long)).last_hidden_state.shape == (1, length, 24)


# -- configuration and bad input ---------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    bert, bird = CehrBertConfig(), EhrBigBirdConfig()
    assert (bert.num_hidden_layers, bert.num_attention_heads, bert.intermediate_size) == (6, 8, 3072)
    assert (bert.max_position_embeddings, bert.hidden_size, bert.model_type) == (512, 768, "cehrbert")
    assert (bird.num_hidden_layers, bird.num_attention_heads, bird.intermediate_size) == (6, 12, 3072)
    assert (bird.max_position_embeddings, bird.block_size, bird.num_random_blocks) == (2048, 64, 3)


@both
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5: expected a divisor of hidden_size=24"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"attention_probs_dropout_prob": 1.5}, r"attention_probs_dropout_prob=1.5: expected a probability"),
        ({"pooling": "mean"}, 'pooling=\'mean\': expected "first" or "last"'),
    ],
)
def test_refuses_values_no_model_could_be_built_from(family, fields, message):
    with pytest.raises(ValueError, match=message):
        family().config(**fields)


def test_bigbird_refuses_blocks_without_tokens():
    with pytest.raises(ValueError, match="block_size=0"):
        EhrBigBirdConfig(block_size=0)


@both
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("base", {"input_ids": torch.full((1, 4), 40)}, "input_ids holds values from 40 to 40"),
        ("base", {"times": torch.full((1, 4), float("inf"))}, "times holds NaN"),
        ("base", {"attention_mask": torch.zeros(1, 4, dtype=torch.long)}, "padding only"),
        ("base", {"inputs_embeds": torch.zeros(1, 4, 24)}, "exactly one of input_ids and inputs_embeds"),
        ("masked", {"labels": torch.zeros(1, 3, dtype=torch.long)}, r"labels have shape \[1, 3\], expected \[1, 4\]"),
        ("classifier", {"labels": torch.tensor([0, 1])}, "expected one label for each"),
    ],
)
def test_bad_input_is_told(family, kind, change, message):
    with pytest.raises(ValueError, match=message):
        family().model(kind)(**{**collate([random_patient(4, 0)]), **change})


@both
def test_a_history_beyond_the_context_is_told(family):
    with pytest.raises(ValueError, match="A sequence has 65 tokens, this model reads at most 64"):
        family().model("base")(**collate([random_patient(65, 0)]))


@both
def test_every_weight_learns_from_packed_rows_too(family):
    model, row = family().model("masked"), pack(patients())
    found = gradients(model, model(**row, labels=row["input_ids"]).loss)
    assert {n for n, g in found.items() if g.abs().max() > 0} == {name for name, _ in model.named_parameters()}

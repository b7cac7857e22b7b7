"""Parity with the reference tensors: weights, inputs, outputs and gradients of the first implementation."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ehrseq.hub.convert_odyssey import convert_odyssey_checkpoint
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM, EhrMambaForSequenceClassification
from tests.modeling.common import assert_close

TOLERANCE = 1e-5  # of the scale; the bar is 1e-4


@pytest.fixture(scope="module")
def odyssey(reference_fixtures):
    folder = reference_fixtures / "odyssey-ehrmamba"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the reference tensors are needed")
    return folder


def channels(inputs):
    return {
        "input_ids": inputs["concept_ids"],
        "attention_mask": inputs["attention_mask"],
        "token_type_ids": inputs["type_ids"],
        "times": inputs["time_stamps"],
        "ages": inputs["ages"],
        "visit_orders": inputs["visit_orders"],
        "visit_segments": inputs["visit_segments"],
    }


def their_name(name, prefix):
    """Name of our weight in their gradients; written down on its own, so that the converter is not its own judge."""
    for ours, theirs in (
        ("model.embeddings.projection.", f"{prefix}embeddings.scale_back_concat_layer."),
        ("model.embeddings.visit_segment_embeddings.", f"{prefix}embeddings.visit_segment_embeddings.embedding."),
        ("model.embeddings.layer_norm.", f"{prefix}embeddings.LayerNorm."),
        ("model.embeddings.", f"{prefix}embeddings."),
        ("model.", "model.backbone."),
        ("classifier.", "model.classifier."),
        ("lm_head.", "model.backbone.embeddings."),  # their alias of the head
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def assert_gradients(model, loss, expected, prefix):
    loss.backward()
    compared = set()
    for name, parameter in model.named_parameters():
        theirs = their_name(name, prefix)
        assert_close(parameter.grad, expected[theirs], TOLERANCE, name)
        compared.add(theirs)
    assert compared == set(expected)


def test_pretrained_logits_hidden_states_and_loss(odyssey):
    model = convert_odyssey_checkpoint(odyssey / "pretrain_state.safetensors")
    assert isinstance(model, EhrMambaForCausalLM)
    inputs = channels(load_file(odyssey / "pretrain_inputs.safetensors"))
    expected = load_file(odyssey / "pretrain_outputs.safetensors")
    with torch.no_grad():
        outputs = model(**inputs, labels=inputs["input_ids"], output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    assert_close(outputs.logits[real], expected["logits"][real], TOLERANCE, "logits")
    assert_close(outputs.loss, expected["loss_pad_ignored"], TOLERANCE, "loss without padding")
    ours = [outputs.hidden_states[i] for i in (0, 1, 2, 3, 4)]
    theirs = [expected[name] for name in ("embeddings", "hidden_0", "hidden_1", "hidden_2", "hidden_4")]
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(a[real], b[real], TOLERANCE, f"hidden states {i}")


def test_pretrained_loss_and_gradients_as_they_trained_it(odyssey):
    """They fed padding to the blocks and counted it as a target; without a mask this model does so too."""
    model = convert_odyssey_checkpoint(odyssey / "pretrain_state.safetensors")
    inputs = channels(load_file(odyssey / "pretrain_inputs.safetensors"))
    expected = load_file(odyssey / "pretrain_outputs.safetensors")
    outputs = model(**{**inputs, "attention_mask": None}, labels=inputs["input_ids"])
    assert_close(outputs.logits, expected["logits"], TOLERANCE, "logits at every position")
    assert_close(outputs.loss, expected["loss_odyssey_pad_counted"], TOLERANCE, "loss")
    assert_gradients(model, outputs.loss, load_file(odyssey / "pretrain_grads.safetensors"), "")


def test_finetuned_logits_loss_and_gradients(odyssey):
    model = convert_odyssey_checkpoint(odyssey / "finetune_single_state.safetensors")
    assert isinstance(model, EhrMambaForSequenceClassification)
    inputs = load_file(odyssey / "finetune_inputs.safetensors")
    expected = load_file(odyssey / "finetune_single_outputs.safetensors")
    outputs = model(**channels(inputs), labels=inputs["labels"], task_ids=inputs["task_indices"])
    assert_close(outputs.logits, expected["logits"], TOLERANCE, "logits")
    assert_close(outputs.loss, expected["loss"], TOLERANCE, "loss")
    assert_close(model.risk_scores(outputs.logits), expected["probs"][:, 1], TOLERANCE, "probabilities")
    assert_gradients(model, outputs.loss, load_file(odyssey / "finetune_single_grads.safetensors"), "pretrained_model.")


def test_greedy_forecast_with_a_frozen_clock_is_theirs(odyssey):
    """Without types and special ids new tokens have type 0 and the prompt's last channels, as in the reference."""
    model = convert_odyssey_checkpoint(odyssey / "pretrain_state.safetensors")
    manifest = json.loads((odyssey / "manifest.json").read_text())["forecast_greedy"]
    row, length = manifest["row"], manifest["prompt_len"]
    inputs = load_file(odyssey / "pretrain_inputs.safetensors")
    prompt = {name: values[row : row + 1, :length] for name, values in channels(inputs).items()}
    tokens = model.generate(**prompt, max_new_tokens=len(manifest["ids"]), do_sample=False)
    assert tokens[0, length:].tolist() == manifest["ids"]


def test_all_sizes_come_from_the_shapes(odyssey):
    config = convert_odyssey_checkpoint(odyssey / "pretrain_state.safetensors", max_position_embeddings=64).config
    theirs = json.loads((odyssey / "manifest.json").read_text())["pretrain_config"]
    assert config.hidden_size == theirs["embedding_size"]
    assert config.visit_segment_size == theirs["visit_order_size"]
    for name in ("vocab_size", "time_embeddings_size", "type_vocab_size", "max_num_visits", "state_size"):
        assert getattr(config, name) == theirs[name], name
    for name in ("num_hidden_layers", "expand", "conv_kernel"):
        assert getattr(config, name) == theirs[name], name
    assert (config.time_step_rank, config.max_position_embeddings) == (4, 64)


def test_a_converted_model_saves_and_reloads_with_equal_logits(odyssey, tmp_path):
    model = convert_odyssey_checkpoint(odyssey / "finetune_single_state.safetensors")
    model.save_pretrained(tmp_path)
    inputs = channels(load_file(odyssey / "finetune_inputs.safetensors"))
    again = EhrMambaForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_torch_files_and_lightning_checkpoints_are_read(odyssey, tmp_path, wrap):
    state = load_file(odyssey / "pretrain_state.safetensors")
    torch.save(wrap(state), tmp_path / "last.ckpt")
    expected = convert_odyssey_checkpoint(state).state_dict()
    for name, weight in convert_odyssey_checkpoint(str(tmp_path / "last.ckpt")).state_dict().items():
        assert torch.equal(weight, expected[name]), name


def finetuned(odyssey):
    return load_file(odyssey / "finetune_single_state.safetensors")


def pretrained(odyssey):
    return load_file(odyssey / "pretrain_state.safetensors")


def multi_head(odyssey):
    state = finetuned(odyssey)
    head = {name: state.pop(name) for name in list(state) if name.startswith("model.classifier.")}
    for task in range(6):
        for name, weight in head.items():
            state[name.replace("classifier.", f"classifier.classifiers.{task}.")] = weight
    return state


def mamba2(odyssey):
    state = pretrained(odyssey)
    state["model.backbone.layers.0.mixer.dt_bias"] = torch.zeros(8)
    return state


def without_a_block(odyssey):
    return {name: w for name, w in pretrained(odyssey).items() if ".layers.2." not in name}


def of_another_shape(odyssey):
    return {**pretrained(odyssey), "model.backbone.norm_f.weight": torch.zeros(3)}


def with_an_extra_weight(odyssey):
    return {**pretrained(odyssey), "model.backbone.extra": torch.zeros(3)}


def of_two_models(odyssey):
    state = finetuned(odyssey)
    state["pretrained_model.model.backbone.norm_f.weight"] = torch.zeros(64)
    return state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (multi_head, "6 classification heads"),
        (mamba2, "EhrMamba2"),
        (lambda folder: {"bert.encoder.weight": torch.zeros(2)}, "Not an Odyssey EhrMamba state dict"),
        (lambda folder: {}, "nothing"),
        (without_a_block, r"lacks model\.layers\.2"),
        (of_another_shape, r"wrong shapes: model\.norm_f\.weight \[3\], expected \[64\]"),
        (with_an_extra_weight, r"unknown weights: model\.extra"),
        (of_two_models, r"holds model\.backbone\.norm_f\.weight twice with different values"),
    ],
)
def test_refuses_what_it_cannot_convert(odyssey, make, message):
    with pytest.raises(ValueError, match=message):
        convert_odyssey_checkpoint(make(odyssey))


def test_refuses_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        convert_odyssey_checkpoint(tmp_path / "nowhere.safetensors")
    for name in ("broken.safetensors", "broken.pt"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(ValueError, match="is not a readable"):
            convert_odyssey_checkpoint(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds list, expected a state dict"):
        convert_odyssey_checkpoint(tmp_path / "list.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="Not an Odyssey EhrMamba"):
        convert_odyssey_checkpoint(tmp_path / "other.safetensors")

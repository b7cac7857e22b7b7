"""What every model of the package must satisfy: one base of tests, a short subclass for each family.

A subclass gives `config()`, `model_classes` and `patients()`; a model takes batches of the patients' channels. Padding,
packing and half precision then behave alike for all of them.
"""

import copy
import inspect

import pytest
import torch
from safetensors.torch import load_file


def assert_close(actual, expected, tolerance, label):
    """Largest error, relative to the largest expected value, within `tolerance`."""
    assert actual.shape == expected.shape, f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-12)
    assert error <= tolerance, f"{label}: relative error {error:.2e} above {tolerance:.0e}"


def collate(patients, side="right", length=None):
    """Batch of patients (dicts of flat tensors), padded with 0 on one side."""
    longest = length or max(len(patient["input_ids"]) for patient in patients)
    batch = {}
    for name in [*patients[0], "attention_mask"]:
        rows = []
        for patient in patients:
            values = patient.get(name, torch.ones_like(patient["input_ids"]))
            pad = values.new_zeros(longest - len(values))
            rows.append(torch.cat([values, pad] if side == "right" else [pad, values]))
        batch[name] = torch.stack(rows)
    return batch


def pack(patients, padding=2):
    """One row of all patients, then some padding."""
    row = {name: torch.cat([patient[name] for patient in patients]) for name in patients[0]}
    segments = [torch.full_like(patient["input_ids"], i + 1) for i, patient in enumerate(patients)]
    row["segment_ids"] = torch.cat(segments)
    return {name: torch.nn.functional.pad(values, (0, padding))[None] for name, values in row.items()}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        error = float((actual[name] - gradient).abs().max())
        own = float(gradient.abs().max())
        assert error <= tolerance * max(own, 1e-3 * scale), f"gradient of {name}: error {error:.2e}, size {own:.2e}"


def checkpoint_activations(model, **kwargs):
    """Switch gradient checkpointing on, by the name that the installed transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


class ModelCommonTests:
    """Subclass it as `class TestX(ModelCommonTests)`."""

    model_classes: dict = {}  # "base", "causal", "masked" and "classifier", those that exist

    def config(self, **changes):
        raise RuntimeError("give a tiny configuration")

    def patients(self):
        raise RuntimeError("give a few patients of different length, dicts of flat tensors")

    def model(self, kind, **changes):
        if kind not in self.model_classes:
            pytest.skip(f"this family has no {kind} model")
        torch.manual_seed(0)
        model = self.model_classes[kind](self.config(**changes)).eval()
        with torch.no_grad():  # leave the symmetric start, where wrong biases and norms would not show
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model

    @pytest.mark.parametrize("kind", ["base", "causal", "masked", "classifier"])
    def test_saves_safetensors_and_reloads_exactly(self, kind, tmp_path):
        model, batch = self.model(kind), collate(self.patients())
        model.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        assert stored.keys() == model.state_dict().keys()
        again = type(model).from_pretrained(tmp_path)
        assert not again.training
        assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())
        with torch.no_grad():
            # Weights that were read from a file lie at other addresses, by which BLAS may sum in another order.
            torch.testing.assert_close(again(**batch)[0], model(**batch)[0], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", ["causal", "masked", "classifier"])
    def test_starts_from_the_weights_of_a_base_model(self, kind, tmp_path):
        base, head = self.model("base"), self.model(kind)
        base.save_pretrained(tmp_path)
        loaded = type(head).from_pretrained(tmp_path)
        for name, weight in base.state_dict().items():
            assert torch.equal(loaded.base_model.state_dict()[name], weight), name
        for name, weight in loaded.state_dict().items():
            assert torch.isfinite(weight).all(), f"{name} was left uninitialised"

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, side):
        model, patients = self.model("base"), self.patients()
        with torch.no_grad():
            batch = collate(patients, side, length=max(len(p["input_ids"]) for p in patients) + 3)
            hidden = model(**batch).last_hidden_state
            for row, patient in enumerate(patients):
                alone = model(**collate([patient])).last_hidden_state[0]
                assert_close(hidden[row][batch["attention_mask"][row] == 1], alone, 1e-5, f"patient {row}, {side}")

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_classifier_reads_the_last_real_token(self, side):
        model, patients = self.model("classifier"), self.patients()
        with torch.no_grad():
            alone = torch.cat([model(**collate([patient])).logits for patient in patients])
            unpadded = torch.cat([model(**{k: v[None] for k, v in patient.items()}).logits for patient in patients])
            padded = model(**collate(patients, side)).logits
        assert_close(unpadded, alone, 1e-5, "without a mask")
        assert_close(padded, alone, 1e-5, f"padded on the {side}")

    def test_packed_rows_equal_unpacked_ones_for_the_classifier(self):
        model, patients = self.model("classifier"), self.patients()
        labels = torch.tensor([i % 2 for i in range(len(patients))])
        padded = model(**collate(patients), labels=labels)
        packed_labels = torch.full((1, len(patients) + 1), -100)
        packed_labels[0, : len(patients)] = labels
        packed = model(**pack(patients), labels=packed_labels)
        assert packed.logits.shape == (1, len(patients) + 1, 2)
        assert_close(packed.logits[0, : len(patients)], padded.logits, 1e-5, "logits")
        assert_close(packed.loss, padded.loss, 1e-6, "loss")
        assert_same_gradients(gradients(model, packed.loss), gradients(model, padded.loss), 1e-4)

    def test_packed_rows_equal_unpacked_ones_for_the_causal_model(self):
        model, patients = self.model("causal"), self.patients()
        batch, row = collate(patients), pack(patients)
        padded = model(**batch, labels=batch["input_ids"])
        packed = model(**row, labels=row["input_ids"])  # neither padding nor a first token may count as a target
        real = batch["attention_mask"].bool()
        assert_close(packed.logits[0][row["segment_ids"][0] > 0], padded.logits[real], 1e-5, "logits")
        assert_close(packed.loss, padded.loss, 1e-6, "loss")
        assert_same_gradients(gradients(model, packed.loss), gradients(model, padded.loss), 1e-4)

    def heads(self):
        return [kind for kind in ("causal", "masked", "classifier") if kind in self.model_classes]

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        if not self.model_classes["base"].supports_gradient_checkpointing:
            pytest.skip("this family has no blocks to checkpoint")
        for kind in self.heads():
            model = self.model(kind, hidden_dropout_prob=0.0, classifier_dropout=0.0).train()
            batch = collate(self.patients())
            labels = batch["input_ids"] if kind != "classifier" else torch.tensor([0, 1] * 9)[: len(batch["input_ids"])]
            expected = gradients(model, model(**batch, labels=labels).loss)
            for reentrant in (False, True):
                checkpoint_activations(model, use_reentrant=reentrant)
                cache = {"use_cache": True} if "use_cache" in inspect.signature(model.forward).parameters else {}
                outputs = model(**batch, labels=labels, **cache)
                assert outputs.get("cache_params") is None
                assert_same_gradients(gradients(model, outputs.loss), expected, 1e-5)

    @pytest.mark.parametrize("kind", ["base", "causal", "masked", "classifier"])
    def test_bfloat16_stays_close(self, kind, tmp_path):
        model, batch = self.model(kind), collate(self.patients())
        model.save_pretrained(tmp_path)
        half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            expected, actual = model(**batch)[0], half(**batch)[0]
            if kind != "classifier":
                real = batch["attention_mask"].bool()
                expected, actual = expected[real], actual[real]
            assert_close(actual, expected, 0.08, kind)
        copy.deepcopy(half).train()(**batch)[0].float().sum().backward()

    def test_every_weight_receives_a_gradient(self):
        for kind in self.heads():
            model, batch = self.model(kind), collate(self.patients())
            labels = batch["input_ids"] if kind != "classifier" else torch.tensor([0, 1] * 9)[: len(batch["input_ids"])]
            found = gradients(model, model(**batch, labels=labels).loss)
            assert {n for n, g in found.items() if float(g.abs().max()) > 0} == {n for n, _ in model.named_parameters()}

    def test_word_embeddings_can_be_resized(self):
        for kind in self.heads():
            model = self.model(kind)
            size = model.config.vocab_size + 5
            model.resize_token_embeddings(size)
            logits = model(**collate(self.patients())).logits
            assert model.config.vocab_size == size
            assert logits.shape[-1] == (size if kind != "classifier" else 2)

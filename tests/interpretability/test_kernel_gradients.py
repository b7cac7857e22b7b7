"""Gradients by the embeddings flow through the compiled kernels, and are those of a plain loop."""

import pytest
import torch
from torch.testing import assert_close

from ehrseq.kernels import cpu_library
from tests.interpretability.small_models import batch, packed, patients, small_model


def embedding_gradients(dtype, kind, backend, monkeypatch):
    """(log-odds, their gradients by `inputs_embeds`) of EhrMamba by a kernel backend."""
    monkeypatch.setenv("EHRSEQ_BACKEND", backend)
    model, rows = small_model("ehrmamba", dtype), patients("ehrmamba")
    inputs = packed("ehrmamba", rows, dtype) if kind == "packed" else batch("ehrmamba", rows, kind, 26, dtype)
    embeds = model.model.embeddings.word_embeddings(inputs.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **inputs).logits
    log_odds = logits[..., 1] - logits[..., 0]
    return log_odds.detach(), torch.autograd.grad(log_odds.sum(), embeds)[0]


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_gradients_by_the_embeddings_are_those_of_the_plain_loop(backend, dtype, tolerance, kind, monkeypatch):
    if backend == "cpp" and cpu_library.why_no_library():
        pytest.skip(f"no compiled kernels: {cpu_library.why_no_library()}")
    expected_odds, expected = embedding_gradients(dtype, kind, "naive", monkeypatch)
    log_odds, found = embedding_gradients(dtype, kind, backend, monkeypatch)
    assert found.dtype == dtype
    assert_close(log_odds, expected_odds, rtol=1e-5, atol=1e-6)  # logits are rounded to float32
    assert float(expected.abs().max()) > 0
    assert float((found - expected).abs().max() / expected.abs().max()) <= tolerance
    if kind != "packed":
        padding = batch("ehrmamba", patients("ehrmamba"), kind, 26)["attention_mask"] == 0
        assert float(found[padding].abs().max()) == 0.0

"""Hidden attention: its weights make the scan's output, end at the edges of records, are the same by every kernel."""

import copy

import pytest
import torch
from torch.testing import assert_close

from ehrseq.interpretability import mamba_attention
from ehrseq.interpretability.mamba_attention import mean_hidden_attention
from ehrseq.interpretability.relevance_mamba import MambaLayer
from ehrseq.interpretability.relevance_propagation import NETWORKS
from ehrseq.interpretability.scan_weights import row_weights, scan_attention
from ehrseq.modeling.selective_scan import selective_scan
from tests.interpretability.small_models import (
    batch,
    lengths_of,
    packed,
    packed_parts,
    patients,
    real_parts,
    small_model,
)

MAMBAS = ("ehrmamba", "hymate")


def random_scan(dtype, batch=2, length=9, channels=5, state=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "delta": normal(batch, length, channels).exp(),
        "A": -normal(channels, state).exp(),
        "B": normal(batch, length, state),
        "C": normal(batch, length, state),
    }, normal(batch, length, channels)


def naive_weights(delta, A, B, C, starts=None):
    """The equation, a number at a time: [b, l, l, d] in float64."""
    (b, length, channels), n = delta.shape, A.shape[1]
    out = torch.zeros(b, length, length, channels, dtype=torch.float64)
    delta, A, B, C = (t.double() for t in (delta, A, B, C))
    for row in range(b):
        for t in range(length):
            for j in range(t + 1):
                if starts is not None and bool(starts[row, j + 1 : t + 1].any()):
                    continue
                for c in range(channels):
                    elapsed = sum(float(delta[row, k, c]) for k in range(j + 1, t + 1))
                    for s in range(n):
                        decay = torch.exp(A[c, s] * elapsed)
                        out[row, t, j, c] += C[row, t, s] * decay * delta[row, j, c] * B[row, j, s]
    return out


def test_weights_are_those_of_the_equation():
    terms, _ = random_scan(torch.float64)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 4] = starts[1, 0] = starts[1, 6] = True
    for reset in (None, starts):
        expected = naive_weights(**terms, starts=reset)
        assert_close(scan_attention(**terms, reset_mask=reset), expected, rtol=1e-12, atol=1e-13)
        rows = torch.tensor([[8, 3], [5, 0]])
        chosen = torch.stack([expected[i, row] for i, row in enumerate(rows)])
        assert_close(scan_attention(**terms, rows=rows, reset_mask=reset), chosen, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["naive", "torch", "cpp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_weights_times_inputs_and_the_skip_are_the_scans_output(backend, dtype, tolerance, monkeypatch):
    from ehrseq.kernels import cpu_library

    if backend == "cpp" and cpu_library.why_no_library():
        pytest.skip(f"no compiled kernels: {cpu_library.why_no_library()}")
    monkeypatch.setenv("EHRSEQ_BACKEND", backend)
    terms, u = random_scan(dtype, length=60, channels=7, state=4)
    skip = torch.linspace(-1, 1, 7, dtype=dtype)
    starts = torch.zeros(2, 60, dtype=torch.bool)
    starts[:, 35] = True
    for reset in (None, starts):
        weights = scan_attention(**terms, reset_mask=reset)
        out = torch.einsum("btjc,bjc->btc", weights.double(), u.double()) + (skip * u).double()
        expected = selective_scan(u, **terms, D=skip, reset_mask=reset).double()
        assert float((out - expected).abs().max() / expected.abs().max()) <= tolerance
    assert torch.equal(weights[:, 35:, :35], torch.zeros_like(weights[:, 35:, :35]))  # nothing over the edge
    future = torch.ones(60, 60).triu(1).bool()
    assert float(weights[:, future].abs().max()) == 0.0


def recorded_layers(family, model, inputs):
    """(terms of the scan of each Mamba layer, whether a sequence starts there)."""
    network, found = NETWORKS[family](model, inputs), []
    with torch.no_grad():
        x = network.embedded
        for layer in network.layers:
            if isinstance(layer, MambaLayer):
                found.append((layer.terms(x), layer))
            x = layer(x)
    return network, found


@pytest.mark.parametrize("family", MAMBAS)
@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_in_a_model_the_last_row_makes_the_scans_output(family, kind):
    model, rows = small_model(family), patients(family)
    inputs = packed(family, rows) if kind == "packed" else batch(family, rows, kind, length=25)
    network, layers = recorded_layers(family, model, inputs)
    assert len(layers) == (3 if family == "ehrmamba" else 2)
    assert int(network.ends.sum()) == len(rows)
    for terms, layer in layers:
        y = selective_scan(terms.u, terms.step_sizes, terms.A, terms.B, terms.C, D=terms.D, reset_mask=layer.starts)
        rows_at = network.ends.nonzero()
        for i, t in rows_at.tolist():
            chosen = torch.zeros_like(network.ends)
            chosen[i, t] = True
            weights = row_weights(terms.step_sizes, terms.A, terms.B, terms.C, layer.starts)(chosen)
            out = (weights[i] * terms.u[i]).sum(0) + terms.D * terms.u[i, t]
            assert_close(out, y[i, t], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", MAMBAS)
def test_padding_packing_and_batch_change_nothing(family):
    model, rows = small_model(family), patients(family)
    alone = [mean_hidden_attention(model, batch(family, [row])) for row in rows]
    for side in ("right", "left"):
        found = mean_hidden_attention(model, batch(family, rows, side, length=27))
        for k, layer in enumerate(found):
            for part, one in zip(real_parts(layer, rows, side), alone, strict=True):
                assert_close(part, one[k][0], rtol=1e-10, atol=1e-14)
            for row, one in zip(layer, alone, strict=True):
                assert_close(row.sum(), one[k].sum())  # nothing stands at padding
    found = mean_hidden_attention(model, packed(family, rows))
    for k, layer in enumerate(found):
        for part, one in zip(packed_parts(layer, rows), alone, strict=True):
            assert_close(part, one[k][0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("family", MAMBAS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_last_row_of_the_matrix_is_the_row(family, side):
    model, rows = small_model(family), patients(family, [11])
    inputs = batch(family, rows, side, length=14)
    row, square = mean_hidden_attention(model, inputs), mean_hidden_attention(model, inputs, matrix=True)
    real = slice(0, 11) if side == "right" else slice(3, 14)
    _, layers = recorded_layers(family, model, batch(family, rows))
    for k, (terms, _) in enumerate(layers):
        expected = naive_weights(terms.step_sizes, terms.A, terms.B, terms.C).abs().mean(-1)[0]
        assert square[k].shape == (14, 14)
        assert_close(square[k][real, real], expected, rtol=1e-10, atol=1e-14)
        assert_close(row[k][0, real], expected[-1], rtol=1e-10, atol=1e-14)
        outside = square[k].clone()
        outside[real, real] = 0.0
        assert float(outside.abs().max()) == 0.0


def test_half_precision_is_computed_in_float32():
    rows = patients("ehrmamba")
    half = small_model("ehrmamba", torch.bfloat16)
    inputs = batch("ehrmamba", rows, dtype=torch.float32)
    found, same = mean_hidden_attention(half, inputs), mean_hidden_attention(copy.deepcopy(half).float(), inputs)
    assert found[0].dtype == torch.float32
    for layer, expected in zip(found, same, strict=True):
        assert_close(layer, expected)


def models(name):
    return {
        "transformer": lambda: small_model("cehrbert"),
        "no Mamba": lambda: small_model("hymate", num_mamba_layers=0),
        "ehrmamba": lambda: small_model("ehrmamba"),
    }[name]()


@pytest.mark.parametrize(
    ("name", "lengths", "matrix", "message"),
    [
        ("transformer", (4,), False, "'cehrbert' has no Mamba layers, which ehrmamba and hymate have"),
        ("no Mamba", (4,), False, r"no Mamba layers \(num_mamba_layers=0\)"),
        ("ehrmamba", (4, 3), True, "shows one patient, got 2"),
        ("ehrmamba", (30,), True, "at most 20 tokens, this one has 30"),
    ],
)
def test_bad_input_is_told(name, lengths, matrix, message, monkeypatch):
    monkeypatch.setattr(mamba_attention, "LONGEST_MATRIX", 20)
    family = "hymate" if name == "no Mamba" else "ehrmamba"
    inputs = batch(family, patients(family, lengths))
    with pytest.raises(ValueError, match=message):
        mean_hidden_attention(models(name), inputs, matrix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": torch.tensor([[9], [0]])}, r"rows from 0 to 9, expected 0 \.\. 8"),
        ({"rows": torch.tensor([1, 2])}, r"rows are torch.int64 \[2\], expected int64 \[2, rows\]"),
        ({"rows": torch.tensor([[1.0], [2.0]])}, "rows are torch.float32"),
        ({"B": torch.zeros(2, 8, 3, dtype=torch.float64)}, r"B is a tensor of shape \[2, 8, 3\]"),
        ({"A": torch.zeros(4, 3, dtype=torch.float64)}, r"A is a tensor of shape \[4, 3\]"),
        ({"reset_mask": torch.zeros(2, 9)}, "reset_mask is torch.float32, expected torch.bool"),
    ],
)
def test_bad_terms_are_told(changes, message):
    terms, _ = random_scan(torch.float64)
    with pytest.raises(ValueError, match=message):
        scan_attention(**{**terms, **changes})


def test_patients_stand_in_the_order_of_the_batch():
    rows = patients("hymate")
    inputs = batch("hymate", rows)
    network = NETWORKS["hymate"](small_model("hymate"), inputs)
    ends = network.restore(network.ends.double())
    assert [int(row.argmax()) for row in ends] == [n - 1 for n in lengths_of(rows)]

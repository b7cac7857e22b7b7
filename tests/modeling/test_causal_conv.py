"""The shifted-add convolution against `torch.nn.functional.conv1d`, its gradients, and its carried state."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ehrseq.modeling.causal_conv import causal_conv1d, conv_final_state, positions_in_segment


@pytest.fixture(autouse=True)
def _torch_serves(monkeypatch):
    """Where the compiled kernels are there too, they would be picked."""
    monkeypatch.setenv("EHRSEQ_BACKEND", "torch")


def make_inputs(batch=2, length=13, channels=5, kernel=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, length, channels),
        "weight": normal(channels, kernel),
        "bias": normal(channels),
        "initial_state": normal(batch, channels, kernel - 1),
    }


def reference(x, weight, bias=None, initial_state=None, activation="silu"):
    """torch's own grouped convolution over the state followed by the inputs; no resets."""
    past = weight.shape[1] - 1
    before = x.new_zeros(x.shape[0], x.shape[2], past) if initial_state is None else initial_state
    inputs = torch.cat([before, x.transpose(1, 2)], -1)
    out = F.conv1d(inputs, weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    return F.silu(out) if activation == "silu" else out


def make_resets(batch=2, length=13, rate=0.25, seed=1):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < rate


# --- values and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("left_out", [(), ("bias",), ("initial_state",), ("bias", "initial_state")])
def test_equals_torch_conv1d_with_its_gradients(length, kernel, activation, left_out):
    inputs = {k: v for k, v in make_inputs(length=length, kernel=kernel).items() if k not in left_out}
    results = []
    for conv in (causal_conv1d, reference):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        out = conv(**leaves, activation=activation)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), list(leaves.values()))])
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("lengths", [None, [1, 0], [1, 1]])
def test_gradcheck_of_output_and_final_state(length, with_resets, lengths):
    inputs = make_inputs(length=length, channels=3)
    leaves = [t.requires_grad_() for t in inputs.values()]
    options = {
        "reset_mask": make_resets(2, length) if with_resets else None,
        "lengths": None if lengths is None else torch.tensor(lengths),
        "return_final_state": True,
    }

    def conv(x, weight, bias, initial_state):
        return causal_conv1d(x, weight, bias, initial_state=initial_state, **options)

    assert torch.autograd.gradcheck(conv, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_only_round(dtype):
    inputs = make_inputs(dtype=dtype)
    exact = {k: v.double().requires_grad_() for k, v in inputs.items()}
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    out, want = causal_conv1d(**leaves), reference(**exact)
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert torch.allclose(out.double(), want, rtol=2 * eps, atol=2 * eps)
    out.sum().backward()
    want.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == dtype
        assert torch.allclose(leaf.grad.double(), exact[name].grad, rtol=4 * eps, atol=8 * eps), name


def test_half_of_a_projection_needs_no_copy_by_the_caller():
    inputs = make_inputs()
    wide = torch.cat([inputs["x"], inputs["x"] + 1], -1).requires_grad_()
    out = causal_conv1d(wide.chunk(2, -1)[0], inputs["weight"], inputs["bias"])
    assert torch.allclose(out, reference(inputs["x"], inputs["weight"], inputs["bias"]), atol=1e-12)
    out.sum().backward()
    assert wide.grad[..., 5:].abs().max() == 0
    assert wide.grad[..., :5].abs().max() > 0


def test_no_gradient_no_graph_same_values():
    inputs = make_inputs()
    inputs["x"].requires_grad_()
    with torch.no_grad():
        out = causal_conv1d(**inputs)
    assert not out.requires_grad
    assert torch.equal(out, causal_conv1d(**inputs))


def test_a_second_derivative_is_refused_clearly():
    inputs = make_inputs()
    x = inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(causal_conv1d(**inputs).sum(), x, create_graph=True)


def test_unwritten_memory_is_never_read(monkeypatch):
    def run():
        leaves = {k: v.requires_grad_() for k, v in make_inputs().items()}
        out = causal_conv1d(**leaves, reset_mask=make_resets())
        return [out, *torch.autograd.grad(out.sum(), list(leaves.values()))]

    want = run()
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))


# --- segments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[5, 8], [1, 1, 1, 10], [13], [2, 3, 1, 7]])
def test_reset_equals_separate_sequences(lengths):
    inputs = make_inputs(batch=1)
    edges = [0, *itertools.accumulate(lengths)]
    resets = torch.zeros(1, 13, dtype=torch.bool)
    resets[0, edges[:-1]] = True
    out, state = causal_conv1d(**inputs, reset_mask=resets, return_final_state=True)
    for start, stop in itertools.pairwise(edges):
        alone = inputs["x"][:, start:stop]  # a reset at step 0 overrides the initial state
        assert torch.allclose(out[:, start:stop], reference(alone, inputs["weight"], inputs["bias"]), atol=1e-12)
    assert torch.equal(state, conv_final_state(alone, 4)), "nothing of an earlier segment may wait in the state"


def test_resets_send_no_gradient_over_the_edge():
    inputs = make_inputs(batch=1)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    resets = torch.zeros(1, 13, dtype=torch.bool)
    resets[0, 6] = True
    out, state = causal_conv1d(**leaves, reset_mask=resets, return_final_state=True)
    (out[:, 6:].sum() + state.sum()).backward()
    assert leaves["x"].grad[:, :6].abs().max() == 0
    assert leaves["initial_state"].grad.abs().max() == 0


def test_a_nan_stays_in_its_own_segment():
    inputs = make_inputs(batch=1)
    resets = torch.zeros(1, 13, dtype=torch.bool)
    resets[0, 6] = True
    clean, _ = causal_conv1d(**inputs, reset_mask=resets, return_final_state=True)
    inputs["x"][0, 5] = math.nan
    out, state = causal_conv1d(**inputs, reset_mask=resets, return_final_state=True)
    assert torch.equal(out[:, 6:], clean[:, 6:])
    assert state.isfinite().all()


def test_positions_count_from_the_last_start():
    resets = torch.tensor([[False, False, True, False, True, True, False]])
    assert positions_in_segment(resets).tolist() == [[0, 1, 0, 1, 0, 0, 1]]
    assert positions_in_segment(resets, before=3).tolist() == [[3, 4, 0, 1, 0, 0, 1]]


# --- carried state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[1] * 13, [12, 1], [1, 12], [2, 1, 3, 7], [6, 7]])
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_any_split_with_the_carried_state_equals_the_whole(pieces, with_resets, kernel):
    inputs = make_inputs(kernel=kernel)
    resets = make_resets() if with_resets else None
    whole, whole_state = causal_conv1d(**inputs, reset_mask=resets, return_final_state=True)
    x, state, outputs = inputs.pop("x"), inputs.pop("initial_state"), []
    for start, stop in itertools.pairwise([0, *itertools.accumulate(pieces)]):
        mask = None if resets is None else resets[:, start:stop]
        options = {"initial_state": state, "reset_mask": mask, "return_final_state": True}
        out, state = causal_conv1d(x[:, start:stop], **inputs, **options)
        outputs.append(out)
    assert torch.allclose(torch.cat(outputs, 1), whole, atol=1e-13)
    assert torch.equal(state, whole_state)


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_right_padded_rows_keep_the_state_of_their_last_real_step(with_resets, kernel):
    inputs = make_inputs(batch=5, kernel=kernel)
    lengths = torch.tensor([0, 1, 2, 9, 13])
    resets = make_resets(5) if with_resets else None
    padded, state = causal_conv1d(**inputs, reset_mask=resets, lengths=lengths, return_final_state=True)
    assert torch.equal(padded, causal_conv1d(**inputs, reset_mask=resets)), "lengths touch the state only"
    assert torch.equal(state[0], inputs["initial_state"][0]), "a row of pads keeps the state it came with"
    for row, length in enumerate(lengths.tolist()[1:], start=1):
        alone = {k: v[row : row + 1] if k in ("x", "initial_state") else v for k, v in inputs.items()}
        alone["x"] = alone["x"][:, :length]
        mask = None if resets is None else resets[row : row + 1, :length]
        _, want = causal_conv1d(**alone, reset_mask=mask, return_final_state=True)
        assert torch.equal(state[row : row + 1], want)


def test_the_state_of_a_short_first_piece_starts_with_zeros():
    x = torch.arange(1.0, 3.0)[None, :, None]
    _, state = causal_conv1d(x, torch.ones(1, 4), return_final_state=True)
    assert state.tolist() == [[[0.0, 1.0, 2.0]]]


# --- bad input -----------------------------------------------------------------------------------------------------

BAD_INPUTS = [
    ({"x": torch.zeros(2, 13, 5).to_sparse()}, "x is a sparse_coo tensor, not a dense one, expected a tensor"),
    ({"bias": torch.zeros(5).to_sparse()}, "bias is a sparse_coo tensor, not a dense one, expected"),
    ({"x": torch.zeros(13, 5)}, r"x is a tensor of shape \[13, 5\], expected a tensor \[batch, length, channels\]"),
    ({"x": [1.0]}, "x is list, expected a tensor"),
    ({"x": torch.zeros(2, 0, 5)}, r"x has length 0 \(\[2, 0, 5\]\), expected at least one step"),
    ({"x": torch.zeros(2, 13, 5, dtype=torch.int64)}, "x is torch.int64, expected a floating dtype"),
    (
        {"weight": torch.zeros(5, 1, 4)},
        r"weight is a tensor of shape \[5, 1, 4\], expected a tensor \[channels, kernel\]",
    ),
    ({"weight": torch.zeros(4, 4)}, r"weight .*\[4, 4\], expected \[channels, kernel\] = \[5, 4\]"),
    ({"weight": torch.zeros(5, 0)}, "weight has kernel size 0"),
    ({"bias": torch.zeros(4)}, r"bias .*\[4\], expected \[channels\] = \[5\]"),
    ({"initial_state": torch.zeros(2, 3, 5)}, r"initial_state .*\[2, 3, 5\], expected .* = \[2, 5, 3\]"),
    ({"initial_state": torch.zeros(2, 5, 4)}, r"initial_state .*\[2, 5, 4\], expected .* = \[2, 5, 3\]"),
    ({"reset_mask": torch.zeros(2, 12, dtype=torch.bool)}, r"reset_mask .*\[2, 12\], expected .* = \[2, 13\]"),
    ({"reset_mask": torch.zeros(2, 13)}, "reset_mask is torch.float32, expected torch.bool"),
    ({"lengths": torch.tensor([3])}, r"lengths .*\[1\], expected \[batch\] = \[2\]"),
    ({"lengths": torch.tensor([3.0, 4.0])}, "lengths is torch.float32, expected integers"),
    ({"lengths": torch.tensor([3, 14])}, r"lengths is \[3, 14\], expected values from 0 to 13"),
    ({"lengths": torch.tensor([-1, 4])}, r"lengths is \[-1, 4\], expected values from 0 to 13"),
    ({"bias": torch.zeros(5, device="meta")}, "bias is on meta, x on cpu"),
    ({"activation": "relu"}, "unknown activation 'relu', expected 'silu' or None"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS)
def test_bad_input_is_named_with_what_is_expected(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(make_inputs() | change))

"""The torch scan against its naive twin: values, final state, every gradient; and what streaming and packing need."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch

from ehrseq.modeling import selective_scan as module
from ehrseq.modeling.kernel_backends import OperatorBackend
from ehrseq.modeling.selective_scan import SCAN_BACKENDS, selective_scan, selective_scan_naive

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@pytest.fixture(autouse=True)
def _torch_serves(monkeypatch):
    """Where the compiled kernels are there too, they would be picked."""
    monkeypatch.setenv("EHRSEQ_BACKEND", "torch")


def make_inputs(batch=2, length=37, channels=6, state=4, dtype=torch.float64, seed=0, delta_scale=1.0):
    """All optional inputs too; the truth of the tests is `selective_scan_naive` on the same values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "u": normal(batch, length, channels),
        "delta": delta_scale * normal(batch, length, channels),
        "A": -torch.exp(normal(channels, state)),
        "B": normal(batch, length, state),
        "C": normal(batch, length, state),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels),
        "initial_state": normal(batch, channels, state),
        "delta_softplus": True,
    }


def make_resets(batch, length, rate=0.15, seed=1):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < rate


def relative_error(got, want):
    scale = want.double().norm()
    return ((got.double() - want.double()).norm() / (scale if scale > 0 else 1)).item()


def run_with_gradients(scan, inputs, reset_mask=None, seed=3):
    """(y, final state, {input: gradient}) of a random linear function of both results."""
    leaves = {k: v.detach().clone().requires_grad_() if torch.is_tensor(v) else v for k, v in inputs.items()}
    y, final_state = scan(**leaves, reset_mask=reset_mask, return_final_state=True)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, final_state)]
    tensors = {k: v for k, v in leaves.items() if torch.is_tensor(v)}
    loss = (y * weights[0]).sum() + (final_state * weights[1]).sum()
    return y, final_state, dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


# --- parity with the naive twin ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 37, 64])
@pytest.mark.parametrize("with_resets", [False, True])
def test_equals_naive_in_float64(length, with_resets):
    inputs = make_inputs(length=length)
    resets = make_resets(2, length) if with_resets else None
    y, state, grads = run_with_gradients(selective_scan, inputs, resets)
    y_naive, state_naive, grads_naive = run_with_gradients(selective_scan_naive, inputs, resets)
    assert relative_error(y, y_naive) < 1e-13
    assert relative_error(state, state_naive) < 1e-13
    for name in NAMES:
        assert relative_error(grads[name], grads_naive[name]) < 1e-12, f"gradient of {name}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("left_out", [(), ("initial_state",), ("D", "z", "delta_bias")])
def test_a_single_step_without_gradients_equals_naive(dtype, with_resets, left_out):
    inputs = {k: v for k, v in make_inputs(batch=4, length=1, dtype=dtype).items() if k not in left_out}
    before = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
    options = {"reset_mask": torch.tensor([[True], [False]] * 2) if with_resets else None, "return_final_state": True}
    y, state = selective_scan(**inputs, **options)
    y_naive, state_naive = selective_scan_naive(**inputs, **options)
    assert y.dtype == dtype
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6  # as for whole passes: the same formula in another order
    assert relative_error(y, y_naive) < max(tolerance, torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0)
    assert relative_error(state, state_naive) < tolerance
    assert all(torch.equal(inputs[name], before[name]) for name in before), "the caller's tensors are left alone"


@pytest.mark.parametrize("left_out", ["D", "z", "delta_bias", "initial_state", "all"])
def test_equals_naive_without_optional_inputs(left_out):
    optional = ("D", "z", "delta_bias", "initial_state")
    inputs = {k: v for k, v in make_inputs().items() if k != left_out and not (left_out == "all" and k in optional)}
    y, state, grads = run_with_gradients(selective_scan, inputs)
    y_naive, state_naive, grads_naive = run_with_gradients(selective_scan_naive, inputs)
    assert relative_error(y, y_naive) < 1e-13
    assert relative_error(state, state_naive) < 1e-13
    for name, grad in grads_naive.items():
        assert relative_error(grads[name], grad) < 1e-12, f"gradient of {name}"


def test_delta_is_used_as_given_without_softplus():
    inputs = make_inputs() | {"delta_softplus": False}
    inputs["delta"] = inputs["delta"].abs()
    inputs["delta_bias"] = inputs["delta_bias"].abs()
    y, state, grads = run_with_gradients(selective_scan, inputs)
    y_naive, state_naive, grads_naive = run_with_gradients(selective_scan_naive, inputs)
    assert relative_error(y, y_naive) < 1e-13
    assert relative_error(state, state_naive) < 1e-13
    assert all(relative_error(grads[name], grads_naive[name]) < 1e-12 for name in NAMES)


@pytest.mark.parametrize("delta_scale", [1.0, 6.0, 30.0])
def test_float32_is_as_close_to_float64_as_the_naive_loop(delta_scale):
    inputs = make_inputs(length=300, channels=24, state=16, delta_scale=delta_scale)
    half = {k: v.float() if torch.is_tensor(v) else v for k, v in inputs.items()}
    resets = make_resets(2, 300, rate=0.02)
    y, state, grads = run_with_gradients(selective_scan_naive, inputs, resets)
    y32, state32, grads32 = run_with_gradients(selective_scan, half, resets)
    assert y32.dtype == state32.dtype == torch.float32
    assert relative_error(y32, y) < 1e-6
    assert relative_error(state32, state) < 1e-6
    for name in NAMES:
        assert relative_error(grads32[name], grads[name]) < 3e-6, f"gradient of {name}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 50])
def test_half_precision_goes_in_and_out_and_only_rounds(dtype, length):
    """Computed in float32: the error is the rounding of the output, never that of the recurrence."""
    half = make_inputs(length=length, dtype=dtype)
    exact = {k: v.double() if torch.is_tensor(v) else v for k, v in half.items()}
    y, state, grads = run_with_gradients(selective_scan, half)
    y64, state64, grads64 = run_with_gradients(selective_scan_naive, exact)
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert relative_error(y, y64) < eps
    assert relative_error(state, state64) < 1e-6
    for name in NAMES:
        assert grads[name].dtype == dtype
        assert relative_error(grads[name], grads64[name]) < 2 * eps, f"gradient of {name}"


def test_autocast_does_not_touch_the_recurrence():
    inputs = make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state, grads = run_with_gradients(selective_scan, inputs)
    y_plain, state_plain, grads_plain = run_with_gradients(selective_scan, inputs)
    assert torch.equal(y, y_plain)
    assert torch.equal(state, state_plain)
    assert all(relative_error(grads[name], grads_plain[name]) < 1e-6 for name in NAMES)


def test_strided_inputs_need_no_copy_by_the_caller():
    """A block hands over halves of one projection: views with gaps between the steps."""
    inputs = make_inputs()
    wide = torch.cat([inputs["u"], inputs["z"]], -1)
    narrow = torch.cat([inputs["B"], inputs["C"]], -1)
    views = inputs | dict(zip(("u", "z"), wide.chunk(2, -1), strict=True))
    views |= dict(zip(("B", "C"), narrow.chunk(2, -1), strict=True))
    assert torch.allclose(selective_scan(**views), selective_scan(**inputs), atol=1e-13)
    leaf = wide.clone().requires_grad_()
    u, z = leaf.chunk(2, -1)
    selective_scan(**(views | {"u": u, "z": z})).square().sum().backward()
    plain = {k: v.clone().requires_grad_() if k in ("u", "z") else v for k, v in inputs.items()}
    selective_scan(**plain).square().sum().backward()
    assert torch.allclose(leaf.grad, torch.cat([plain["u"].grad, plain["z"].grad], -1), atol=1e-12)


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 19])
@pytest.mark.parametrize("with_resets", [False, True])
def test_gradcheck_of_every_input_through_both_results(length, with_resets):
    inputs = make_inputs(length=length, channels=2, state=2)
    resets = make_resets(2, length, rate=0.3) if with_resets else None
    leaves = [inputs[name].requires_grad_() for name in NAMES]

    def scan(*tensors):
        named = dict(zip(NAMES, tensors, strict=True))
        return selective_scan(**named, delta_softplus=True, reset_mask=resets, return_final_state=True)

    assert torch.autograd.gradcheck(scan, leaves)


def test_gradient_through_the_final_state_alone():
    inputs = make_inputs(length=21)
    grads = []
    for scan in (selective_scan, selective_scan_naive):
        leaves = {k: v.clone().requires_grad_() if torch.is_tensor(v) else v for k, v in inputs.items()}
        scan(**leaves, return_final_state=True)[1].square().sum().backward()
        grads.append({name: leaves[name].grad for name in NAMES})
    for name in ("u", "delta", "A", "B", "delta_bias", "initial_state"):
        assert relative_error(grads[0][name], grads[1][name]) < 1e-12, name
    assert all(grads[0][name].abs().max() == 0 for name in ("C", "D", "z")), "they do not enter the state"


@pytest.mark.parametrize("name", NAMES)
def test_gradient_when_one_input_alone_asks_for_it(name):
    inputs = make_inputs(length=20)
    both = []
    for scan in (selective_scan, selective_scan_naive):
        leaf = inputs[name].clone().requires_grad_()
        scan(**(inputs | {name: leaf})).square().sum().backward()
        both.append(leaf.grad)
    assert relative_error(*both) < 1e-12


def test_a_second_derivative_is_refused_clearly():
    inputs = make_inputs(length=20)
    u = inputs["u"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='naive'"):
        torch.autograd.grad(selective_scan(**inputs).sum(), u, create_graph=True)
    (grad,) = torch.autograd.grad(selective_scan(**inputs, backend="naive").square().sum(), u, create_graph=True)
    grad.square().sum().backward()
    assert u.grad.isfinite().all()


def test_backward_work_is_linear_in_length():
    """Counts the elements that forward and backward write: four times the length, four times the work."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class CountElements(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not func.is_view:  # views cost nothing
                self.total += sum(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))
            return out

    work = []
    for length in (256, 1024):
        with CountElements() as counter:
            run_with_gradients(selective_scan, make_inputs(batch=1, length=length))
        work.append(counter.total)
    assert work[1] < 4.2 * work[0]


def test_states_are_kept_for_training_only():
    inputs = make_inputs(length=320)
    with mock.patch.object(module._TiledScan, "apply", side_effect=AssertionError("training path")):
        selective_scan(**inputs)  # nothing asks for a gradient
        inputs["u"].requires_grad_()
        with torch.no_grad():
            y = selective_scan(**inputs)
        with torch.inference_mode():
            selective_scan(**inputs)
    assert not y.requires_grad


# --- carried states, resets, padding -------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[1] * 40, [39, 1], [1, 39], [16, 24], [7, 9, 24], [17, 1, 1, 21]])
@pytest.mark.parametrize("with_resets", [False, True])
def test_any_split_with_the_carried_state_equals_the_whole(pieces, with_resets):
    inputs = make_inputs(length=40)
    resets = make_resets(2, 40) if with_resets else None
    whole, whole_state = selective_scan(**inputs, reset_mask=resets, return_final_state=True)
    state, outputs = inputs["initial_state"], []
    for start, stop in itertools.pairwise([0, *itertools.accumulate(pieces)]):
        piece = {k: v[:, start:stop] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
        piece["initial_state"] = state
        mask = None if resets is None else resets[:, start:stop]
        y, state = selective_scan(**piece, reset_mask=mask, return_final_state=True)
        outputs.append(y)
    assert torch.allclose(torch.cat(outputs, 1), whole, rtol=1e-12, atol=1e-12)
    assert torch.allclose(state, whole_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", [1, 16, 23])
def test_gradients_flow_through_the_carried_state(split):
    inputs = make_inputs(length=40)
    over_time = ("u", "delta", "B", "C", "z")

    def in_two_pieces(return_final_state, reset_mask, **leaves):
        first = {k: v[:, :split] if k in over_time else v for k, v in leaves.items()}
        second = {k: v[:, split:] if k in over_time else v for k, v in leaves.items()}
        y1, state = selective_scan(**first, return_final_state=True)
        y2, state = selective_scan(**(second | {"initial_state": state}), return_final_state=True)
        return torch.cat([y1, y2], 1), state

    _, _, grads = run_with_gradients(in_two_pieces, inputs)
    _, _, grads_whole = run_with_gradients(selective_scan, inputs)
    assert all(relative_error(grads[name], grads_whole[name]) < 1e-12 for name in NAMES)


@pytest.mark.parametrize("lengths", [[5, 12, 3], [16, 16, 16], [1, 1, 30], [33]])
def test_reset_equals_separate_sequences_exactly(lengths):
    total = sum(lengths)
    inputs = make_inputs(batch=1, length=total, dtype=torch.float32)
    edges = [0, *itertools.accumulate(lengths)]
    resets = torch.zeros(1, total, dtype=torch.bool)
    resets[0, edges[:-1]] = True
    packed, packed_state = selective_scan(**inputs, reset_mask=resets, return_final_state=True)
    alone = {k: v for k, v in inputs.items() if k != "initial_state"}  # a reset at step 0 overrides it
    for start, stop in itertools.pairwise(edges):
        piece = {k: v[:, start:stop] if k in ("u", "delta", "B", "C", "z") else v for k, v in alone.items()}
        y, state = selective_scan(**piece, return_final_state=True)
        assert torch.allclose(y, packed[:, start:stop], rtol=0, atol=1e-6)
    assert torch.allclose(state, packed_state, rtol=0, atol=1e-6)


def test_a_nan_stays_in_its_own_segment():
    inputs = make_inputs(batch=1, length=40)
    resets = torch.zeros(1, 40, dtype=torch.bool)
    resets[0, 20] = True
    clean, clean_state = selective_scan(**inputs, reset_mask=resets, return_final_state=True)
    inputs["u"][0, 11] = math.nan
    y, state = selective_scan(**inputs, reset_mask=resets, return_final_state=True)
    assert y[:, 11:20].isnan().all()
    assert torch.equal(y[:, 20:], clean[:, 20:])
    assert torch.equal(state, clean_state)


@pytest.mark.parametrize("real", [1, 15, 16, 17, 30])
def test_right_padding_of_minus_infinity_holds_the_state_and_its_gradients(real):
    inputs = make_inputs(length=real)
    y, state, grads = run_with_gradients(selective_scan, inputs)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[:, :real] = True
    garbage = make_inputs(length=40, seed=9)
    padded = {k: inputs[k] for k in ("A", "D", "delta_bias", "initial_state", "delta_softplus")}
    for name in ("u", "delta", "B", "C", "z"):
        padded[name] = torch.cat([inputs[name], garbage[name][:, real:]], 1)

    def scan(**leaves):
        leaves["delta"] = leaves["delta"].masked_fill(~mask[..., None], -math.inf)
        y, state = selective_scan(**leaves)
        return y[:, :real], state

    y_padded, state_padded, grads_padded = run_with_gradients(scan, padded)
    assert torch.allclose(y_padded, y, atol=1e-13)
    assert torch.allclose(state_padded, state, atol=1e-13), "the state at the last real step"
    for name, grad in grads_padded.items():
        if name in ("u", "delta", "B", "C", "z"):
            assert grad[:, real:].abs().max() == 0, f"no gradient may reach a pad step ({name})"
            grad = grad[:, :real]
        assert relative_error(grad, grads[name]) < 1e-12, f"gradient of {name}"


def test_left_padding_leaves_the_initial_state_alone():
    inputs = make_inputs(length=30)
    inputs["delta"][:, :11] = -math.inf
    y, state = selective_scan(**inputs, return_final_state=True)
    short = {k: v[:, 11:] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    y_short, state_short = selective_scan(**short, return_final_state=True)
    assert torch.allclose(y[:, 11:], y_short, atol=1e-13)
    assert torch.allclose(state, state_short, atol=1e-13)


# --- numbers at the edge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [-1e4, -30.0, 0.0, 30.0, 1e4, 1e30])
def test_extreme_step_sizes_stay_finite(delta):
    inputs = make_inputs(length=33, dtype=torch.float32)
    inputs["delta"] = torch.full_like(inputs["delta"], delta)
    if delta > 1e6:
        inputs["u"] = inputs["u"] / delta  # delta * u is the input itself: only the decay is at its limit here
    y, state, grads = run_with_gradients(selective_scan, inputs)
    assert y.isfinite().all()
    assert state.isfinite().all()
    assert all(grad.isfinite().all() for name, grad in grads.items() if name != "u" or delta < 1e6)


def test_65536_steps_stay_finite_and_accurate():
    """Step sizes sweep from 1e-6 to 1e4 and back to 1e-6, sixteen times; the truth is the float64 loop."""
    length = 65_536
    inputs = make_inputs(batch=1, length=length, channels=8, dtype=torch.float32)
    inputs["delta"] = torch.logspace(-6, 4, 4096).repeat(16)[None, :, None].expand(1, -1, 8)
    inputs |= {"delta_softplus": False, "delta_bias": torch.zeros(8)}
    y, state, grads = run_with_gradients(selective_scan, inputs)
    assert all(grad.isfinite().all() for grad in grads.values())
    exact = {name: inputs[name].double().numpy() for name in NAMES}
    u, delta, B, C, z, h = (exact[name][0] for name in ("u", "delta", "B", "C", "z", "initial_state"))
    A, D = exact["A"], exact["D"]
    decays, additions = np.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, None]
    states = np.empty_like(decays)
    for t in range(length):
        h = states[t] = decays[t] * h + additions[t]
    want = ((states * C[:, None]).sum(-1) + D * u) * z / (1 + np.exp(-z))
    assert relative_error(y[0], torch.from_numpy(want)) < 1e-5
    assert relative_error(state[0], torch.from_numpy(h)) < 1e-5


def test_unwritten_memory_is_never_read(monkeypatch):
    """Every buffer starts as NaN: what the code forgot to write would show."""
    inputs = make_inputs(length=37)
    resets = make_resets(2, 37)
    want = run_with_gradients(selective_scan, inputs, resets)
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(math.nan))
    got = run_with_gradients(selective_scan, inputs, resets)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert all(torch.equal(got[2][name], want[2][name]) for name in NAMES)


def test_inputs_are_left_as_they_were():
    inputs = make_inputs(length=37)
    before = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
    run_with_gradients(selective_scan, inputs, make_resets(2, 37))
    selective_scan(**inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in before)


def test_an_empty_batch_gives_an_empty_result():
    y, state = selective_scan(**make_inputs(batch=0), return_final_state=True)
    assert y.shape == (0, 37, 6)
    assert state.shape == (0, 6, 4)


# --- backends and bad input ----------------------------------------------------------------------------------------


def test_backends_are_chosen_in_order_and_a_forced_one_that_cannot_serve_raises(monkeypatch):
    monkeypatch.setattr(SCAN_BACKENDS, "entries", SCAN_BACKENDS.entries)
    monkeypatch.delenv("EHRSEQ_BACKEND")
    seen = []

    def run(inputs):
        seen.append("fast")
        return module._run_naive(inputs)

    def why_not(inputs):
        return None if inputs.reset_mask is None else "it has no reset"

    SCAN_BACKENDS.register("fast", OperatorBackend(run, why_not))
    assert next(iter(SCAN_BACKENDS.entries)) == "fast"
    inputs = make_inputs()
    selective_scan(**inputs)
    assert seen == ["fast"], "the first of the table that can"
    selective_scan(**inputs, reset_mask=make_resets(2, 37))
    assert seen == ["fast"], "skipped where it lacks a feature"
    with pytest.raises(ValueError, match="'fast' cannot serve this call: it has no reset"):
        selective_scan(**inputs, reset_mask=make_resets(2, 37), backend="fast")


@pytest.mark.parametrize("name", ["torch", "naive"])
def test_a_forced_backend_is_the_one_that_runs(name):
    inputs = make_inputs()
    assert torch.allclose(selective_scan(**inputs, backend=name), selective_scan_naive(**inputs), atol=1e-12)


def test_an_unknown_backend_names_those_there_are():
    with pytest.raises(ValueError, match=r"Unknown scan backend 'cuda9000': expected one of .*'torch', 'naive'"):
        selective_scan(**make_inputs(), backend="cuda9000")


BAD_INPUTS = [
    ({"u": torch.zeros(2, 37)}, r"u is a tensor of shape \[2, 37\], expected a tensor \[batch, length, channels\]"),
    ({"u": [[1.0]]}, "u is list, expected a tensor"),
    ({"A": torch.zeros(6)}, r"A is a tensor of shape \[6\], expected a tensor \[channels, state\]"),
    ({"A": -torch.ones(5, 4)}, r"A is a tensor of shape \[5, 4\], expected \[channels, state\] = \[6, 4\]"),
    ({"delta": torch.zeros(2, 36, 6)}, r"delta .*\[2, 36, 6\], expected .* = \[2, 37, 6\]"),
    ({"delta": None}, "delta is NoneType"),
    ({"B": torch.zeros(2, 37, 3)}, r"B .*\[2, 37, 3\], expected \[batch, length, state\] = \[2, 37, 4\]"),
    ({"C": torch.zeros(1, 37, 4)}, r"C .*\[1, 37, 4\], expected \[batch, length, state\] = \[2, 37, 4\]"),
    ({"D": torch.zeros(6, 1)}, r"D .*\[6, 1\], expected \[channels\] = \[6\]"),
    ({"z": torch.zeros(2, 37, 12)}, r"z .*\[2, 37, 12\], expected"),
    ({"delta_bias": torch.zeros(1)}, r"delta_bias .*\[1\], expected \[channels\] = \[6\]"),
    ({"initial_state": torch.zeros(2, 4, 6)}, r"initial_state .*\[2, 4, 6\], expected .* = \[2, 6, 4\]"),
    ({"reset_mask": torch.zeros(2, 36, dtype=torch.bool)}, r"reset_mask .*\[2, 36\], expected .* = \[2, 37\]"),
    ({"reset_mask": torch.zeros(2, 37, dtype=torch.int64)}, r"reset_mask is torch.int64, expected torch.bool"),
    ({"u": torch.zeros(2, 37, 6, dtype=torch.int64)}, "u is torch.int64, expected a floating dtype"),
    ({"A": torch.zeros(6, 4, dtype=torch.complex64)}, "A is torch.complex64, expected a floating dtype"),
    ({"B": torch.zeros(2, 37, 4, device="meta")}, "B is on meta, u on cpu"),
    ({"u": torch.zeros(2, 37, 6).to_sparse()}, r"u is a sparse_coo tensor, not a dense one, expected a tensor \[batch"),
    ({"delta": torch.zeros(2, 37, 6).to_sparse()}, "delta is a sparse_coo tensor, not a dense one, expected"),
    (
        {"u": torch.nested.nested_tensor([torch.zeros(3, 6), torch.zeros(2, 6)], layout=torch.jagged)},
        "u is a nested tensor, not a dense",
    ),
    ({"reset_mask": [[False] * 37] * 2}, "reset_mask is list, expected"),
    ({"delta_softplus": "yes"}, "delta_softplus is 'yes', expected True or False"),
    ({"delta_softplus": None}, "delta_softplus is None, expected True or False"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUTS)
@pytest.mark.parametrize("scan", [selective_scan, selective_scan_naive])
def test_bad_input_is_named_with_what_is_expected(scan, change, message):
    with pytest.raises(ValueError, match=message):
        scan(**(make_inputs() | change))


@pytest.mark.parametrize("length", [1, 20])
def test_tensors_without_data_give_shapes(length):
    inputs = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in make_inputs(length=length).items()}
    y, state = selective_scan(**inputs, return_final_state=True)
    assert (y.shape, y.device.type, state.shape) == ((2, length, 6), "meta", (2, 6, 4))


@pytest.mark.parametrize("empty", [{"channels": 0}, {"state": 0}])
def test_without_channels_or_states_the_result_is_empty_or_the_skip_alone(empty):
    inputs = make_inputs(**empty)
    assert torch.allclose(selective_scan(**inputs), selective_scan_naive(**inputs), atol=1e-13)


def test_length_zero_is_refused():
    with pytest.raises(ValueError, match=r"u has length 0 \(\[2, 0, 6\]\), expected at least one step"):
        selective_scan(**make_inputs(length=0))

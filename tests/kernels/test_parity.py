"""Every backend that this machine has against the float64 naive twin: outputs, final state, every gradient.

The error is max |difference| / max |reference|: at most 1e-6 in float32 up to 8,192 steps, 1e-4 beyond.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ehrseq.modeling.causal_conv import causal_conv1d
from ehrseq.modeling.selective_scan import selective_scan, selective_scan_naive
from tests.kernels.inputs import (
    SCAN_NAMES,
    as_double,
    conv_backends_here,
    conv_inputs,
    errors,
    long_inputs,
    max_error,
    needs_cpu_library,
    normal,
    resets,
    scan_backends_here,
    scan_inputs,
    with_gradients,
)
from tests.properties import examples

SCANS = pytest.mark.parametrize("backend", scan_backends_here())
CONVS = pytest.mark.parametrize("backend", conv_backends_here())
OPTIONAL = ("D", "z", "delta_bias", "initial_state")


def check_scan(backend, inputs, tolerance, reset_mask=None, floor=0.0):
    """One call in the dtype of `inputs` against the naive twin in float64."""
    got = with_gradients(selective_scan, inputs, reset_mask=reset_mask, backend=backend)
    want = with_gradients(selective_scan_naive, as_double(inputs), reset_mask=reset_mask)
    worst = errors(got, want, floor)
    assert max(worst.values()) < tolerance, worst


def check_conv(backend, inputs, tolerance, reset_mask=None, activation="silu", floor=0.0):
    options = {"reset_mask": reset_mask, "activation": activation}
    got = with_gradients(causal_conv1d, inputs, **options, backend=backend)
    want = with_gradients(causal_conv1d, as_double(inputs), **options, backend="naive")
    worst = errors(got, want, floor)
    assert max(worst.values()) < tolerance, worst


# --- random shapes ---------------------------------------------------------------------------------------------------


@SCANS
@examples(40, derandomize=True)
@given(data=st.data())
def test_scan_over_random_shapes(backend, data):
    """Always the same shapes: of 939 others four float32 results were off by 1.1e-6 to 3.1e-6, for two reasons.

    Sums over all steps of which little is left (gradients of delta_bias, A, D): one rounding of the inputs moves the
    exact gradient of delta_bias by 3.3e-6 in the worst of them. And one of the C++ kernel's own: its backward keeps
    exp(x) - 1, so that a state that forgets nearly all in a step has its decay to 6e-8 of 1, not of itself (gradient of
    delta, 1.1e-6 where the naive twin in float32 has 1.5e-7).
    """
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 100))
    channels, state = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 20))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64] if backend == "cpp" else [torch.float32]))
    left_out = data.draw(st.sets(st.sampled_from(OPTIONAL)))
    inputs = scan_inputs(batch, length, channels, state, dtype, seed=data.draw(st.integers(0, 5)))
    inputs = {k: v for k, v in inputs.items() if k not in left_out}
    mask = resets(batch, length, data.draw(st.sampled_from([0.02, 0.3]))) if data.draw(st.booleans()) else None
    check_scan(backend, inputs, 1e-6 if dtype == torch.float32 else 1e-13, mask, floor=1.0)


@CONVS
@examples(40, derandomize=True)
@given(data=st.data())
def test_convolution_over_random_shapes(backend, data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    channels, kernel = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 4))
    inputs = conv_inputs(batch, length, channels, kernel, torch.float32, seed=data.draw(st.integers(0, 5)))
    inputs = {
        k: v for k, v in inputs.items() if k not in data.draw(st.sets(st.sampled_from(("bias", "initial_state"))))
    }
    mask = resets(batch, length, data.draw(st.sampled_from([0.05, 0.5]))) if data.draw(st.booleans()) else None
    check_conv(backend, inputs, 1e-6, mask, data.draw(st.sampled_from(["silu", None])), floor=1.0)


@SCANS
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65])
def test_scan_around_the_edges_of_a_tile(backend, length):
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[0, -1] = mask[1, 0] = True
    for reset_mask in (None, mask):
        check_scan(backend, scan_inputs(length=length, channels=17, state=16, dtype=torch.float32), 1e-6, reset_mask)


@CONVS
@pytest.mark.parametrize("step", [0, 1, 6, 7, 8, 9, 14, 15, 16, 17, 18])
def test_convolution_with_a_reset_around_the_edges_of_a_tile(backend, step):
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, step] = True
    check_conv(backend, conv_inputs(length=20, channels=17, dtype=torch.float32), 1e-6, mask)


@SCANS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(backend, dtype):
    inputs = scan_inputs(length=70, channels=37, state=16, dtype=dtype)
    inputs |= {k: inputs[k].float() for k in ("A", "D", "delta_bias", "initial_state")}
    got = with_gradients(selective_scan, inputs, backend=backend)
    want = with_gradients(selective_scan_naive, as_double(inputs))
    assert got["y"].dtype == dtype
    assert got["final_state"].dtype == torch.float32
    for name, error in errors(got, want).items():
        rounds = name == "y" or name.removeprefix("grad of ") in ("u", "delta", "B", "C", "z")
        # grad_y itself is rounded to the dtype before anything is computed from it
        assert error < (torch.finfo(dtype).eps if rounds or name.startswith("grad") else 1e-6), name


@CONVS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_convolution_is_rounded_once(backend, dtype):
    check_conv(backend, conv_inputs(length=70, channels=37, dtype=dtype), 2 * torch.finfo(dtype).eps)


@SCANS
@pytest.mark.parametrize("state", [1, 4, 16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("left_out", [(), ("initial_state",), ("D", "z", "delta_bias")])
def test_a_single_step_without_gradients(backend, state, dtype, left_out):
    inputs = scan_inputs(3, 1, 37, state, dtype)
    inputs = {k: v for k, v in inputs.items() if k not in left_out}
    for mask in (None, torch.tensor([[True], [False], [True]])):
        y, final_state = selective_scan(**inputs, reset_mask=mask, return_final_state=True, backend=backend)
        want = selective_scan_naive(**as_double(inputs), reset_mask=mask, return_final_state=True)
        tolerance = 1e-13 if dtype == torch.float64 else 1e-6
        assert max_error(y, want[0]) < max(tolerance, torch.finfo(dtype).eps)
        assert max_error(final_state, want[1]) < tolerance


# --- long sequences, tiny and huge steps -----------------------------------------------------------------------------


def check_long(backend, inputs, tolerance, reset_mask=None, without=()):
    """Against the fastest backend in float64, itself held to the naive twin: the twin would take minutes."""
    got = with_gradients(selective_scan, inputs, reset_mask=reset_mask, backend=backend)
    want = with_gradients(selective_scan, as_double(inputs), reset_mask=reset_mask)
    worst = {k: v for k, v in errors(got, want).items() if k not in without}
    assert max(worst.values()) < tolerance, worst


@SCANS
def test_long_sequences_in_float64_equal_the_naive_twin(backend):
    """So that every backend may be the reference of the others."""
    check_scan(backend, as_double(long_inputs(1024, 1e-3, channels=3, state=2)), 1e-12, resets(1, 1024, rate=3e-3))


@SCANS
@pytest.mark.parametrize("dt", ["random", 1e-4, 1e-3, 1e-2, 0.03, 0.1, 1.0, 10.0])
def test_8192_steps_to_1e_6(backend, dt):
    # After steps of 10 nothing is left of the initial state: its gradient is rounding of nothing.
    without = ("grad of initial_state", "grad of A") if dt == 10.0 else ()
    check_long(backend, long_inputs(8192, dt), 1e-6, without=without)


@SCANS
@pytest.mark.slow
@pytest.mark.parametrize("dt", [1e-6, "sweep"])
def test_65536_steps_to_1e_5(backend, dt):
    """In float32 a plain loop is off by 1e-3 after 65,536 steps of 1e-6: each rounds the decay to the same side."""
    check_long(backend, long_inputs(65_536, dt, channels=8), 1e-5)


@SCANS
@pytest.mark.parametrize("dt", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("across", ["states", "channels"])
def test_slow_and_fast_states_side_by_side_stay_accurate(backend, across, dt):
    inputs = long_inputs(8192, dt)
    rates = -torch.logspace(-4, 1.5, 16)
    inputs["A"] = (rates if across == "states" else rates[:, None]).expand(16, 16).contiguous()
    check_long(backend, inputs, 1e-6)


@SCANS
@pytest.mark.parametrize("dt", [1e-3, 3e-2])
def test_resets_in_a_long_sequence_stay_accurate(backend, dt):
    check_long(backend, long_inputs(8192, dt), 1e-6, resets(1, 8192, rate=1e-3))


@SCANS
@pytest.mark.parametrize("dt", [1e4, 1e30])
def test_huge_steps_forget_everything_and_stay_finite(backend, dt):
    inputs = long_inputs(33, dt)
    inputs["u"] = inputs["u"] / dt
    got = with_gradients(selective_scan, inputs, backend=backend)
    assert all(value.isfinite().all() for name, value in got.items() if name != "grad of u")


@SCANS
def test_a_step_of_size_zero_holds_the_state_exactly(backend):
    inputs = scan_inputs(length=70, channels=20, state=16, dtype=torch.float32)
    inputs["delta"] = torch.full_like(inputs["delta"], -math.inf)
    got = with_gradients(selective_scan, inputs, backend=backend)
    assert torch.equal(got["final_state"], inputs["initial_state"])
    for name in ("delta", "B", "A"):
        assert (got[f"grad of {name}"] == 0).all(), name


# --- gradcheck -------------------------------------------------------------------------------------------------------


@needs_cpu_library
@pytest.mark.parametrize("with_resets", [False, True])
def test_gradcheck_of_the_scan(with_resets):
    inputs = scan_inputs(length=35, channels=3, state=2)
    leaves = [inputs[name].requires_grad_() for name in SCAN_NAMES]
    mask = resets(2, 35) if with_resets else None

    def scan(*tensors):
        named = dict(zip(SCAN_NAMES, tensors, strict=True))
        return selective_scan(**named, delta_softplus=True, reset_mask=mask, return_final_state=True, backend="cpp")

    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


@needs_cpu_library
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_gradcheck_of_the_convolution(with_resets, kernel):
    leaves = [t.requires_grad_() for t in conv_inputs(length=19, channels=2, kernel=kernel).values()]
    mask = resets(2, 19) if with_resets else None

    def conv(x, weight, bias, initial_state):
        return causal_conv1d(x, weight, bias, initial_state=initial_state, reset_mask=mask, backend="cpp")

    assert torch.autograd.gradcheck(conv, leaves, fast_mode=True)


# --- layouts ---------------------------------------------------------------------------------------------------------


def views(inputs, kind):
    """The same values in another layout."""
    over_time = [k for k in ("u", "delta", "B", "C", "z") if k in inputs]
    if kind == "halves":  # of one projection: gaps between the steps
        return inputs | {k: torch.cat([inputs[k], inputs[k]], -1).chunk(2, -1)[1] for k in over_time}
    if kind == "transposed":  # channels first: the last dimension is not contiguous
        return inputs | {k: inputs[k].transpose(1, 2).contiguous().transpose(1, 2) for k in over_time}
    if kind == "every other step":
        return inputs | {k: inputs[k].repeat_interleave(2, 1)[:, ::2] for k in over_time}
    return inputs | {k: inputs[k].transpose(0, 1).contiguous().transpose(0, 1) for k in over_time}  # steps first


@SCANS
@pytest.mark.parametrize("kind", ["halves", "transposed", "every other step", "steps first"])
def test_layouts_of_the_scan_give_the_same(backend, kind):
    inputs = scan_inputs(length=40, channels=20, dtype=torch.float32)
    other = views(inputs, kind)
    mask = resets(40, 2).t()  # a view as well
    want = selective_scan(**inputs, reset_mask=mask, backend=backend)
    assert max_error(selective_scan(**other, reset_mask=mask, backend=backend), want) < 1e-6
    leaves = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in other.items()}
    grads = torch.autograd.grad(
        selective_scan(**leaves, reset_mask=mask, backend=backend).sum(), [leaves[k] for k in SCAN_NAMES]
    )
    plain = {k: v.clone().requires_grad_() if torch.is_tensor(v) else v for k, v in inputs.items()}
    want = torch.autograd.grad(
        selective_scan(**plain, reset_mask=mask, backend=backend).sum(), [plain[k] for k in SCAN_NAMES]
    )
    for got, expected in zip(grads, want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6)


@SCANS
def test_lazily_negated_tensors_of_the_scan_are_read_as_what_they_show(backend):
    """`x.conj().imag` is a view with a mark: the memory holds the opposite sign."""
    inputs = scan_inputs(length=5, channels=20, dtype=torch.float32)
    marked = {k: torch._neg_view(-v) if torch.is_tensor(v) else v for k, v in inputs.items()}
    assert max_error(selective_scan(**marked, backend=backend), selective_scan(**inputs, backend="torch")) < 1e-6


@CONVS
def test_lazily_negated_tensors_of_the_convolution_are_read_as_what_they_show(backend):
    inputs = conv_inputs(dtype=torch.float32)
    marked = {k: torch._neg_view(-v) for k, v in inputs.items()}
    assert max_error(causal_conv1d(**marked, backend=backend), causal_conv1d(**inputs, backend="torch")) < 1e-6


@SCANS
def test_overlapping_views_are_read_as_what_they_show(backend):
    inputs = scan_inputs(length=40, channels=20, dtype=torch.float32)
    inputs |= {
        "delta": normal(1, 1, 20, seed=5, dtype=torch.float32).expand(2, 40, 20),
        "z": normal(40, 1, seed=6, dtype=torch.float32).expand(2, 40, 20),
        "u": normal(60, seed=7, dtype=torch.float32).as_strided((2, 40, 20), (1, 1, 1)),
        "B": normal(1, 40, 4, seed=8, dtype=torch.float32).expand(2, 40, 4),
    }
    solid = {k: v.contiguous() if torch.is_tensor(v) else v for k, v in inputs.items()}
    got, want = (selective_scan(**i, backend=backend) for i in (inputs, solid))
    assert max_error(got, want) < 1e-6


@CONVS
def test_layouts_of_the_convolution_give_the_same(backend):
    inputs = conv_inputs(length=40, channels=20, dtype=torch.float32)
    want = causal_conv1d(**inputs, backend=backend)
    x = inputs["x"]
    half = torch.cat([x, x], -1).chunk(2, -1)[1]
    for view in (half, x.transpose(1, 2).contiguous().transpose(1, 2), x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert max_error(causal_conv1d(**(inputs | {"x": view}), backend=backend), want) < 1e-6
    grad = normal(1, 1, 20, seed=9, dtype=torch.float32).expand(2, 40, 20)
    for view in (x, half):
        leaf = view.detach().requires_grad_()
        causal_conv1d(**(inputs | {"x": leaf}), backend=backend).backward(grad)
        if view is x:
            want = leaf.grad
    assert max_error(leaf.grad, want) < 1e-6

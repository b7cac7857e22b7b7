"""The Triton kernels: on a GPU where there is one, else by Triton's interpreter on CPU, in a process of its own.

The interpreter must be asked for before triton is imported and would then serve the whole process, so the one test that
runs here starts this file again with TRITON_INTERPRET=1. Sizes are small: it computes about 10,000 elements a second.
"""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ehrseq.kernels import triton_scan
from ehrseq.modeling.causal_conv import causal_conv1d
from ehrseq.modeling.selective_scan import selective_scan, selective_scan_naive
from tests.kernels.inputs import (
    SCAN_NAMES,
    as_double,
    conv_inputs,
    errors,
    long_inputs,
    max_error,
    resets,
    scan_inputs,
    with_gradients,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
OPTIONAL = ("D", "z", "delta_bias", "initial_state")
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="no GPU here: run by test_with_the_interpreter in its own process"
)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels run in this process")
@pytest.mark.parametrize("selection", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_with_the_interpreter(selection):
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        selection,
        __file__,
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout


def check_scan(inputs, reset_mask=None):
    reset_mask = None if reset_mask is None else reset_mask.to(DEVICE)
    got = with_gradients(selective_scan, inputs, reset_mask=reset_mask, backend="triton")
    naive_mask = None if reset_mask is None else reset_mask.cpu()
    want = with_gradients(selective_scan_naive, as_double(inputs), reset_mask=naive_mask)
    dtype = inputs["u"].dtype
    for name, error in errors(got, want, floor=1.0).items():
        # In half precision also what is computed in float32 starts from a rounded grad_y.
        exact = dtype in TOLERANCE or name == "final_state"
        assert error < (TOLERANCE.get(dtype, 1e-6) if exact else torch.finfo(dtype).eps), (name, error)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 16, 17, 40])
def test_scan_around_the_edges_of_a_tile(length, dtype):
    batch = 2 if length < 40 else 1
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[0, length // 2] = mask[-1, -1] = True
    check_scan(scan_inputs(batch, length, 2, 2, dtype, device=DEVICE), mask if length != 16 else None)


@runs_kernels
@pytest.mark.parametrize("left_out", [OPTIONAL, ("D", "delta_bias"), ("z", "initial_state")])
def test_scan_without_optional_arguments(left_out):
    inputs = scan_inputs(1, 18, 3, 3, torch.float32, device=DEVICE)
    if "z" in left_out:
        inputs |= {"delta": inputs["delta"].abs(), "delta_bias": inputs["delta_bias"].abs(), "delta_softplus": False}
    check_scan({k: v for k, v in inputs.items() if k not in left_out})


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scan_in_half_precision_is_rounded_once(dtype):
    inputs = scan_inputs(1, 18, 3, 3, dtype, device=DEVICE)
    check_scan(inputs | {k: inputs[k].float() for k in ("A", "D", "delta_bias", "initial_state")})


@runs_kernels
def test_scan_over_several_blocks_of_channels(monkeypatch):
    monkeypatch.setattr(triton_scan, "_TILE_ELEMENTS", 2 * triton_scan.TRITON_TILE_STEPS * 2)  # blocks of 2 channels
    check_scan(scan_inputs(1, 3, 3, 2, torch.float32, device=DEVICE), resets(1, 3, rate=0.4))


@runs_kernels
@pytest.mark.parametrize("dt", [1e-4, 1.0, 1e4])
def test_slow_and_fast_decay(dt):
    """The carried state is rounded once a tile; at 1e4 nothing is left of it."""
    inputs = scan_inputs(1, 100, 1, 2, torch.float32, device=DEVICE)
    inputs |= {"delta": torch.full_like(inputs["u"], dt), "delta_bias": None, "delta_softplus": False}
    inputs["u"] = inputs["u"] / max(1.0, dt)
    inputs = {k: v for k, v in inputs.items() if v is not None}
    got = with_gradients(selective_scan, inputs, backend="triton")
    want = with_gradients(selective_scan_naive, as_double(inputs))
    without = ("grad of A", "grad of initial_state", "grad of delta") if dt > 1 else ()
    worst = {k: v for k, v in errors(got, want).items() if k not in without}
    assert max(worst.values()) < 1e-6, worst


@runs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("dt", [1e-2, "random"])
def test_8192_steps_to_1e_6(dt):
    inputs = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in long_inputs(8192, dt, channels=1).items()}
    got = with_gradients(selective_scan, inputs, backend="triton")
    want = with_gradients(selective_scan, as_double(inputs), backend="torch")
    # Of one channel the gradient of delta_bias is a single sum of which little is left; delta's own is compared.
    worst = {k: v for k, v in errors(got, want).items() if k != "grad of delta_bias"}
    assert max(worst.values()) < 1e-6, worst


@runs_kernels
@pytest.mark.slow
def test_gradcheck_over_two_tiles_and_a_reset():
    inputs = scan_inputs(1, 18, 2, 2, device=DEVICE)
    leaves = [inputs[name].requires_grad_() for name in SCAN_NAMES]
    mask = torch.zeros(1, 18, dtype=torch.bool, device=DEVICE)
    mask[0, 11] = True

    def scan(*tensors):
        named = dict(zip(SCAN_NAMES, tensors, strict=True))
        return selective_scan(**named, delta_softplus=True, reset_mask=mask, return_final_state=True, backend="triton")

    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


@runs_kernels
def test_a_step_of_size_zero_holds_the_state_exactly():
    inputs = scan_inputs(1, 20, 2, 2, torch.float32, device=DEVICE)
    inputs["delta"] = torch.full_like(inputs["delta"], -math.inf)
    got = with_gradients(selective_scan, inputs, backend="triton")
    assert torch.equal(got["final_state"], inputs["initial_state"])
    for name in ("delta", "B", "A", "delta_bias"):
        assert (got[f"grad of {name}"] == 0).all(), name


@runs_kernels
def test_a_broken_patient_leaves_the_next_one_in_the_row_alone():
    inputs = scan_inputs(1, 20, 2, 2, torch.float32, device=DEVICE)
    inputs["u"][0, 3] = math.nan
    mask = torch.zeros(1, 20, dtype=torch.bool, device=DEVICE)
    mask[0, [0, 9]] = True
    y = selective_scan(**inputs, reset_mask=mask, backend="triton")
    assert y[0, 3:9].isnan().all()
    assert not y[0, :3].isnan().any()
    assert not y[0, 9:].isnan().any()


@runs_kernels
def test_layouts_and_overlapping_views_of_the_scan():
    inputs = scan_inputs(2, 9, 4, 2, torch.float32, device=DEVICE)
    inputs["z"] = inputs["z"][:1].expand(2, 9, 4)
    mask = resets(9, 2).t().to(DEVICE)
    want = selective_scan(
        **{k: v.contiguous() if torch.is_tensor(v) else v for k, v in inputs.items()}, backend="torch"
    )
    other = inputs | {"u": torch.cat([inputs["u"]] * 2, -1).chunk(2, -1)[1], "B": inputs["B"].mT.contiguous().mT}
    assert max_error(selective_scan(**other, backend="triton"), want) < 1e-6
    want = selective_scan(**inputs, reset_mask=mask, backend="torch")
    assert max_error(selective_scan(**other, reset_mask=mask, backend="triton"), want) < 1e-6


@runs_kernels
@pytest.mark.parametrize(
    ("length", "kernel", "dtype"),
    [
        (1, 4, torch.float32),
        (2, 3, torch.float64),
        (35, 2, torch.float32),
        (35, 4, torch.float32),
        (9, 4, torch.float64),
        (9, 4, torch.bfloat16),
    ],
)
def test_convolution(length, kernel, dtype):
    batch = 2 if length < 35 else 1  # the interpreter's time goes by programs
    masks = None, resets(batch, length, 0.3), resets(batch, length, 0.05)
    for activation, mask in zip(("silu", "silu", None), masks, strict=True):
        inputs = conv_inputs(batch, length, 5, kernel, dtype, device=DEVICE)
        options = {"activation": activation}
        got_mask = None if mask is None else mask.to(DEVICE)
        got = with_gradients(causal_conv1d, inputs, **options, reset_mask=got_mask, backend="triton")
        want = with_gradients(causal_conv1d, as_double(inputs), **options, reset_mask=mask, backend="naive")
        worst = errors(got, want, floor=1.0)
        assert max(worst.values()) < TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps), (activation, worst)


@runs_kernels
def test_convolution_without_bias_and_state_of_a_view():
    inputs = conv_inputs(2, 20, 5, dtype=torch.float32, device=DEVICE)
    x = torch.cat([inputs["x"]] * 2, -1).chunk(2, -1)[1]
    want = causal_conv1d(inputs["x"], inputs["weight"], backend="torch")
    assert max_error(causal_conv1d(x, inputs["weight"], backend="triton"), want) < 1e-6


@runs_kernels
def test_gradients_are_the_same_in_every_run():
    inputs = scan_inputs(1, 20, 3, 2, torch.float32, device=DEVICE)
    first, second = (with_gradients(selective_scan, inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@runs_kernels
def test_the_operators_know_their_shapes_and_gradients():
    scan = scan_inputs(1, 5, 2, 2, torch.float32, device=DEVICE)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")
    leaves = [v.requires_grad_() if torch.is_tensor(v) else v for v in (scan[name] for name in order)]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.ehrseq.triton_selective_scan.default, (*leaves, resets(1, 5).to(DEVICE), True), test_utils=checks
    )
    conv = [v.requires_grad_() for v in conv_inputs(1, 5, 2, dtype=torch.float32, device=DEVICE).values()]
    torch.library.opcheck(torch.ops.ehrseq.triton_causal_conv1d.default, (*conv, None, True), test_utils=checks)


@runs_kernels
def test_the_interpreter_serves_only_when_it_is_asked_for():
    if DEVICE == "cuda":
        pytest.skip("on a GPU triton is picked by itself")
    from ehrseq.kernels import conv_backends, scan_backends

    assert not scan_backends()["triton"].automatic
    assert not conv_backends()["triton"].automatic


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves CPU tensors")
def test_on_cpu_it_says_why_not():
    inputs = scan_inputs(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"'triton' cannot serve this call: it runs on CUDA, the tensors are on cpu"):
        selective_scan(**inputs, backend="triton")
    with pytest.raises(ValueError, match=r"'triton' cannot serve this call: it runs on CUDA, the tensors are on cpu"):
        causal_conv1d(**conv_inputs(), backend="triton")

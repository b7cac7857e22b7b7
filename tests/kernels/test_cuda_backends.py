"""The backends of mamba-ssm and causal-conv1d: when they refuse, and what they hand to a kernel (here a stand-in)."""

import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from ehrseq.kernels import cuda_scan, doctor
from ehrseq.modeling.causal_conv import causal_conv1d
from ehrseq.modeling.kernel_backends import OperatorBackend
from ehrseq.modeling.selective_scan import SCAN_BACKENDS, selective_scan, selective_scan_naive
from tests.kernels.inputs import conv_inputs, max_error, resets, scan_inputs


def as_cuda(tensor, **changes):
    """What a backend looks at before it runs, without a GPU."""
    values = {"device": torch.device("cuda", 0), "dtype": tensor.dtype, "shape": tensor.shape, "numel": tensor.numel}
    return SimpleNamespace(**(values | changes))


def scan_call(**changes):
    inputs = scan_inputs(dtype=torch.float32)
    inputs |= {"u": as_cuda(inputs["u"]), "initial_state": None, "reset_mask": None, "needs_grad": False}
    return SimpleNamespace(**(inputs | changes))


def conv_call(**changes):
    inputs = conv_inputs(channels=8, dtype=torch.float32)
    inputs |= {"x": as_cuda(inputs["x"]), "initial_state": None, "reset_mask": None, "activation": "silu"}
    return SimpleNamespace(**(inputs | changes))


def test_on_cpu_they_say_why_not():
    with pytest.raises(ValueError, match=r"'cuda' cannot serve this call: it runs on CUDA, the tensors are on cpu"):
        selective_scan(**scan_inputs(), backend="cuda")
    with pytest.raises(ValueError, match=r"'cuda' cannot serve this call: it runs on CUDA, the tensors are on cpu"):
        causal_conv1d(**conv_inputs(), backend="cuda")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"u": as_cuda(torch.empty(2, 3, 4), dtype=torch.float64)}, "u is torch.float64"),
        ({"A": torch.ones(6, 4, dtype=torch.float64)}, "no float64"),
        ({"initial_state": torch.zeros(2, 6, 4)}, "no initial state"),
        ({"reset_mask": resets(2, 37)}, "no resets"),
        ({"A": -torch.ones(6, 300)}, "A has 300"),
    ],
)
def test_what_the_scan_lacks_is_refused(changes, reason):
    assert reason in cuda_scan.CUDA_SCAN.why_not(scan_call(**changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight": torch.ones(8, 5)}, "weight has 5"),
        ({"x": as_cuda(torch.empty(2, 13, 5))}, "x has 5"),
        ({"reset_mask": resets(2, 13), "initial_state": torch.zeros(2, 8, 3)}, "resets together with an initial state"),
        ({"x": as_cuda(torch.empty(2, 1, 8)), "initial_state": torch.zeros(2, 8, 3)}, "at least 3 steps"),
    ],
)
def test_what_the_convolution_lacks_is_refused(changes, reason):
    assert reason in cuda_scan.CUDA_CONV.why_not(conv_call(**changes))


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch):
    cuda_scan._function.cache_clear()
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # an import of None raises ModuleNotFoundError
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    for backend, call, package in (
        (cuda_scan.CUDA_SCAN, scan_call(), "mamba-ssm"),
        (cuda_scan.CUDA_CONV, conv_call(), "causal-conv1d"),
    ):
        reason = backend.why_not(call)
        assert package in reason
        assert "--no-build-isolation" in reason
    cuda_scan._function.cache_clear()


def test_a_package_whose_kernels_do_not_load_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    (tmp_path / "half_installed.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    function, reason = cuda_scan._function("half-installed", "half_installed", "f", "half_installed_cuda")
    assert function is None
    assert "undefined symbol" in reason


@pytest.fixture
def without_extension(monkeypatch, tmp_path):
    """mamba-ssm and causal-conv1d as they are installed without a compiler: the functions import, and raise on call."""
    for module, function in (
        ("mamba_ssm/ops/selective_scan_interface", "selective_scan_fn"),
        ("causal_conv1d/causal_conv1d_interface", "causal_conv1d_fn"),
    ):
        file = tmp_path / f"{module}.py"
        file.parent.mkdir(parents=True)
        for folder in (file.parent, tmp_path / module.split("/")[0]):
            (folder / "__init__.py").touch()
        file.write_text(f"def {function}(*arguments, **options):\n    raise RuntimeError('no extension')\n")
    for name in [name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "causal_conv1d")]:
        monkeypatch.delitem(sys.modules, name)
    for extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
        monkeypatch.setitem(sys.modules, extension, None)
    monkeypatch.syspath_prepend(tmp_path)
    cuda_scan._function.cache_clear()
    yield
    cuda_scan._function.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "causal_conv1d")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_package_without_its_compiled_extension_is_passed_over(without_extension):
    """The function imports: only the extension tells that it would raise."""
    for backend, call, package, extension in (
        (cuda_scan.CUDA_SCAN, scan_call(), "mamba-ssm", "selective_scan_cuda"),
        (cuda_scan.CUDA_CONV, conv_call(), "causal-conv1d", "causal_conv1d_cuda"),
    ):
        reason = backend.why_not(call)
        assert f"{package} was installed without its CUDA kernels (no module {extension})" in reason
        assert "MAMBA_KEEP_CUDA_BUILD=TRUE" in reason


def test_the_next_backend_is_chosen_then_and_the_doctor_says_why(without_extension, monkeypatch):
    triton = OperatorBackend(lambda inputs: None)
    monkeypatch.setitem(SCAN_BACKENDS.entries, "triton", triton)
    assert SCAN_BACKENDS.choose(None, scan_call()) is triton
    machine = doctor.report_machine(doctor.describe_machine())
    assert re.search(r"mamba-ssm +none: .* without its CUDA kernels .*MAMBA_KEEP_CUDA_BUILD=TRUE", machine)
    assert re.search(r"causal-conv1d +none: .* without its CUDA kernels", machine)


def test_with_the_extension_the_function_is_taken(without_extension, monkeypatch):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", SimpleNamespace())
    cuda_scan._function.cache_clear()
    assert cuda_scan.CUDA_SCAN.why_not(scan_call()) is None
    assert SCAN_BACKENDS.choose(None, scan_call()) is cuda_scan.CUDA_SCAN
    assert ("mamba-ssm", "its CUDA kernels are there") in doctor.describe_machine()


def stand_in(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """mamba-ssm's function: [batch, channels, length], float32 parameters, no gradient of the state."""
    assert all(t.is_contiguous() and t.dtype == u.dtype for t in (u, delta, B, C, z) if t is not None)
    assert all(t.dtype == torch.float32 for t in (A, D, delta_bias) if t is not None)
    z = None if z is None else z.mT
    y, state = selective_scan_naive(
        u.mT, delta.mT, A, B.mT, C.mT, D, z, delta_bias, delta_softplus, return_final_state=return_last_state
    )
    return y.mT, state.detach()


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins that run on CPU for both packages."""
    monkeypatch.setattr(cuda_scan, "_mamba_scan", lambda: (stand_in, ""))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan_gets_its_layout_and_dtypes(kernels, dtype):
    inputs = scan_inputs(dtype=dtype)
    del inputs["initial_state"]
    call = SimpleNamespace(**inputs, initial_state=None, reset_mask=None, needs_grad=False)
    y, state = cuda_scan.CUDA_SCAN.run(call)
    want, want_state = selective_scan_naive(**inputs, return_final_state=True)
    assert y.dtype == dtype
    assert max_error(y, want) < torch.finfo(dtype).eps
    assert max_error(state, want_state) < 1e-5


def test_a_gradient_of_the_final_state_is_an_error_not_a_zero(kernels):
    inputs = scan_inputs(dtype=torch.float32)
    del inputs["initial_state"]
    u = inputs["u"].requires_grad_()
    call = SimpleNamespace(**inputs, initial_state=None, reset_mask=None, needs_grad=True)
    y, state = cuda_scan.CUDA_SCAN.run(call)
    assert torch.autograd.grad(y.sum(), u, retain_graph=True)[0].abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"no gradient of the final state.*backend='triton'"):
        torch.autograd.grad(state.sum(), u)


def test_nothing_is_imported_before_the_first_call():
    """torch itself imports triton where it is installed; our kernels and the CUDA packages wait for a call."""
    code = (
        "import sys, ehrseq.kernels as k; k.scan_backends(); k.conv_backends();"
        "print([m for m in sys.modules if m.split('.')[0] in ('mamba_ssm', 'causal_conv1d') or 'n_kernels' in m"
        " or 'v_kernels' in m])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""What must not go wrong around the CPU kernels: threads, forks, DataLoader workers, NaN, bad input, forced choices."""

import math
import multiprocessing
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from ehrseq.kernels import cpu_library
from ehrseq.modeling import causal_conv, selective_scan
from ehrseq.modeling.causal_conv import causal_conv1d
from ehrseq.modeling.kernel_backends import OperatorBackend
from tests.kernels.inputs import conv_inputs, max_error, needs_cpu_library, resets, scan_inputs, with_gradients
from tests.kernels.scanned_rows import ScannedRows

scan = selective_scan.selective_scan


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- threads and processes -------------------------------------------------------------------------------------------


@needs_cpu_library
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.usefixtures("_threads")
def test_any_number_of_threads_gives_the_same(monkeypatch, batch):
    monkeypatch.setattr(cpu_library, "_WORK_OF_A_THREAD", 1)
    inputs = scan_inputs(batch, 100, 150, 16, torch.float32)
    conv = conv_inputs(batch, 100, 150, dtype=torch.float32)
    mask = resets(batch, 100)
    results = {}
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found = with_gradients(scan, inputs, reset_mask=mask, backend="cpp")
        found |= {
            f"conv {k}": v for k, v in with_gradients(causal_conv1d, conv, reset_mask=mask, backend="cpp").items()
        }
        results[threads] = found
    for threads, found in results.items():
        for name, value in found.items():
            assert max_error(value, results[1][name]) < 1e-6, (threads, name)


def run_apart(code, timeout=120):
    """Run code in a fresh interpreter: a hang must not hang the tests."""
    environment = os.environ | {"OMP_NUM_THREADS": "4"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@needs_cpu_library
def test_a_forked_process_does_not_hang():
    """OpenMP's threads do not follow a fork: asking for them in the child would wait for ever.

    torch's own operators do hang there with several threads, so that the child runs ours alone.
    """
    out = run_apart(
        """
        import os, torch
        from tests.kernels.inputs import scan_inputs, conv_inputs
        from ehrseq.modeling.selective_scan import selective_scan
        from ehrseq.kernels import cpu_library
        from ehrseq.modeling.causal_conv import causal_conv1d

        torch.set_num_threads(4)
        cpu_library._WORK_OF_A_THREAD = 1
        calls = []
        for function, inputs in ((selective_scan, scan_inputs(4, 64, 64, 16)), (causal_conv1d, conv_inputs(4, 64, 64))):
            inputs = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in inputs.items()}
            leaves = [v for v in inputs.values() if torch.is_tensor(v)]
            calls.append((function, inputs, leaves, torch.ones(4, 64, 64, dtype=torch.float64)))

        def work():
            for function, inputs, leaves, grad in calls:
                torch.autograd.grad(function(**inputs, backend="cpp"), leaves, grad)
                with torch.no_grad():
                    function(**inputs, backend="cpp")

        work()
        child = os.fork()
        if child == 0:
            work()
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        work()
        """
    )
    assert out == "7"


@needs_cpu_library
@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])  # a spawned one imports for seconds
def test_dataloader_workers_compute_the_same(method, workers, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    dataset = ScannedRows()
    want = torch.stack([dataset[i] for i in range(6)])
    context = multiprocessing.get_context(method)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=3, num_workers=workers, multiprocessing_context=context, timeout=90
    )
    assert max_error(torch.cat(list(loader)), want) < 1e-6


@needs_cpu_library
def test_the_callers_treatment_of_denormals_comes_back():
    tiny = torch.tensor([1e-40])
    scan(**scan_inputs(dtype=torch.float32), backend="cpp")
    assert (tiny * 1.0).item() != 0.0


# --- NaN and bad input -----------------------------------------------------------------------------------------------


@needs_cpu_library
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z", "initial_state", "A", "D", "delta_bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_numbers_come_out_again_without_a_crash(name, value):
    inputs = scan_inputs(length=70, channels=20, state=16, dtype=torch.float32)
    inputs[name].view(-1)[7] = value
    results = with_gradients(scan, inputs, backend="cpp")
    if math.isnan(value):
        assert results["y"].isnan().any()


@needs_cpu_library
def test_a_nan_stays_in_its_own_segment_forwards_and_backwards():
    inputs = {k: v for k, v in scan_inputs(1, 70, 20, 16, torch.float32).items() if k != "initial_state"}
    mask = torch.zeros(1, 70, dtype=torch.bool)
    mask[0, [20, 45]] = True
    clean = with_gradients(scan, inputs, reset_mask=mask, backend="cpp")
    inputs["B"] = inputs["B"].clone()
    inputs["B"][0, 30] = math.nan
    broken = with_gradients(scan, inputs, reset_mask=mask, backend="cpp")
    others = [*range(20), *range(45, 70)]
    for name in ("y", "grad of u", "grad of delta", "grad of B", "grad of C", "grad of z"):
        assert torch.equal(broken[name][:, others], clean[name][:, others]), name
        assert broken[name][:, 30:45].isnan().any() or name == "grad of B", name


@needs_cpu_library
def test_odd_payloads_of_nan_stay_nan():
    inputs = scan_inputs(length=40, channels=20, dtype=torch.float32)
    inputs["delta"].view(torch.int32)[0, 5, 3] = 0x7FFFFFFF
    y = scan(**inputs, backend="cpp")
    assert y[0, 5:, 3].isnan().all()
    assert y[0, :, 4].isfinite().all()


@needs_cpu_library
def test_unwritten_memory_is_never_read(monkeypatch):
    inputs = scan_inputs(length=37, channels=19, state=5, dtype=torch.float32)
    mask = resets(2, 37)
    want = with_gradients(scan, inputs, reset_mask=mask, backend="cpp")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    got = with_gradients(scan, inputs, reset_mask=mask, backend="cpp")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("late", [0, 1, 5, 36])
def test_a_mask_that_starts_late_leaves_the_state_before_it_alone(late):
    inputs = scan_inputs(length=37, dtype=torch.float32)
    mask = torch.zeros(2, 37, dtype=torch.bool)
    mask[:, late] = True
    y = scan(**inputs, reset_mask=mask)
    assert torch.equal(y[:, :late], scan(**inputs)[:, :late])
    fresh = {k: v[:, late:] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    assert max_error(y[:, late:], scan(**(fresh | {"initial_state": None}))) < 1e-6


def test_zero_length_is_refused_by_both_operators():
    with pytest.raises(ValueError, match="length 0"):
        scan(**scan_inputs(length=0))
    with pytest.raises(ValueError, match="length 0"):
        causal_conv1d(**conv_inputs(length=0))


@needs_cpu_library
def test_an_empty_batch_gives_empty_gradients():
    results = with_gradients(scan, scan_inputs(batch=0), backend="cpp")
    assert results["y"].shape == (0, 37, 6)
    assert (results["grad of A"] == 0).all()
    assert (with_gradients(causal_conv1d, conv_inputs(batch=0), backend="cpp")["grad of weight"] == 0).all()


@needs_cpu_library
def test_inputs_are_left_as_they_were():
    inputs = scan_inputs()
    before = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
    with_gradients(scan, inputs, reset_mask=resets(2, 37), backend="cpp")
    assert all(torch.equal(inputs[k], v) for k, v in before.items())


# --- choice of the backend -------------------------------------------------------------------------------------------


@needs_cpu_library
def test_the_compiled_backend_is_the_default_on_cpu():
    table = selective_scan.SCAN_BACKENDS
    assert table.choose(None, scan_call()) is table.entries["cpp"]


def scan_call(**changes):
    inputs = scan_inputs() | changes
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")
    return selective_scan.ScanInputs(*(inputs[k] for k in order), None)


@pytest.mark.parametrize("name", ["torch", "naive"])
def test_the_environment_variable_forces_both_operators(monkeypatch, name):
    monkeypatch.setenv("EHRSEQ_BACKEND", name)
    seen = []
    for table in (selective_scan.SCAN_BACKENDS, causal_conv.CONV_BACKENDS):
        entry = table.entries[name]

        def run(inputs, entry=entry, operator=table.operator):
            seen.append(operator)
            return entry.run(inputs)

        monkeypatch.setitem(table.entries, name, OperatorBackend(run))
    scan(**scan_inputs())
    causal_conv1d(**conv_inputs())
    assert seen == ["scan", "conv"]


def test_an_unknown_name_in_the_environment_says_what_there_is(monkeypatch):
    monkeypatch.setenv("EHRSEQ_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"Unknown scan backend 'abacus': expected one of .*'torch'"):
        scan(**scan_inputs())
    with pytest.raises(ValueError, match=r"Unknown conv backend 'abacus': expected one of .*'torch'"):
        causal_conv1d(**conv_inputs())


def test_without_a_library_torch_serves_and_a_forced_cpp_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_library, "_loaded", None)
    monkeypatch.setattr(cpu_library, "LIBRARY_FOLDER", tmp_path)
    monkeypatch.setattr(selective_scan, "_announced", set())
    warnings = []
    monkeypatch.setattr(selective_scan.logger, "warning", warnings.append)
    y = scan(**scan_inputs())
    scan(**scan_inputs())
    assert torch.equal(y, scan(**scan_inputs(), backend="torch"))
    assert len(warnings) == 1, "one warning, not one a call"
    assert "no C++ compiler" in warnings[0]
    assert "ehrseq doctor" in warnings[0]
    with pytest.raises(ValueError, match=r"'cpp' cannot serve this call: .*no compiled kernels.*install g\+\+"):
        scan(**scan_inputs(), backend="cpp")
    with pytest.raises(ValueError, match="'cpp' cannot serve this call"):
        causal_conv1d(**conv_inputs(), backend="cpp")


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_broken_library_is_passed_over(monkeypatch, tmp_path, content):
    for variant in cpu_library.variants():
        (tmp_path / f"libehrseq-{variant}.so").write_bytes(content)
    monkeypatch.setattr(cpu_library, "_loaded", None)
    monkeypatch.setattr(cpu_library, "LIBRARY_FOLDER", tmp_path)
    assert cpu_library.library() is None
    scan(**scan_inputs())


@needs_cpu_library
def test_a_library_of_another_interface_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_library, "_loaded", None)
    monkeypatch.setattr(cpu_library, "ABI_VERSION", 999)
    assert "install ehrseq again" in (cpu_library.why_no_library() or "")


@needs_cpu_library
def test_every_variant_of_this_cpu_gives_the_same(monkeypatch):
    inputs = scan_inputs(channels=50, state=16, dtype=torch.float32)
    results = []
    for variant in cpu_library.variants():
        path = cpu_library.LIBRARY_FOLDER / f"libehrseq-{variant}.so"
        monkeypatch.setattr(cpu_library, "_loaded", (cpu_library._open(path, variant), ""))
        found = with_gradients(scan, inputs, reset_mask=resets(2, 37), backend="cpp")
        conv = with_gradients(causal_conv1d, conv_inputs(channels=50, dtype=torch.float32), backend="cpp")
        results.append(found | {f"conv {k}": v for k, v in conv.items()})
    for found in results[1:]:
        assert all(max_error(found[name], results[0][name]) < 1e-6 for name in results[0])


def test_a_convolution_with_many_taps_goes_to_torch():
    inputs = conv_inputs(kernel=6)
    with pytest.raises(ValueError, match=r"'cpp' cannot serve this call: it has up to 4 taps, weight has 6"):
        causal_conv1d(**inputs, backend="cpp")
    assert causal_conv1d(**inputs).shape == (2, 13, 5)


def test_importing_the_kernels_loads_no_library():
    code = """
    import sys, ehrseq.kernels
    from ehrseq.kernels import cpu_library
    ehrseq.kernels.scan_backends(), ehrseq.kernels.conv_backends()
    assert cpu_library._loaded is None
    assert not {"mamba_ssm", "causal_conv1d", "polars"} & set(sys.modules), "heavy imports"
    """
    run_apart(code)

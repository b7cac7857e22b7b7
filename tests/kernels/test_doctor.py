"""`ehrseq doctor` says what is there, what is not and why, and notices a kernel that computes the wrong thing."""

import re

import pytest
import torch
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.kernels import cpu_library, doctor
from ehrseq.modeling import causal_conv, selective_scan
from ehrseq.modeling.kernel_backends import OperatorBackend
from tests.kernels.inputs import needs_cpu_library


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS_OF_A_MEASUREMENT", 1e-9)


def run():
    return CliRunner().invoke(app, ["doctor"])


@needs_cpu_library
def test_doctor_prints_the_machine_and_a_passed_self_test():
    result = run()
    assert result.exit_code == 0, result.output
    for text in ("instruction set", "threads", "C++ compiler here", "bit vectors, compiled by", "scan: cpp is used"):
        assert text in result.output


def test_doctor_without_a_library_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_library, "_loaded", None)
    monkeypatch.setattr(cpu_library, "LIBRARY_FOLDER", tmp_path)
    result = run()
    assert result.exit_code == 0
    assert "CPU kernels" in result.output
    assert "install g++" in result.output
    assert "scan: torch is used." in result.output


def test_doctor_fails_where_a_backend_is_wrong(monkeypatch):
    def wrong(inputs):
        y, state = selective_scan._run_naive(inputs)
        return y * 1.001, state

    monkeypatch.setitem(selective_scan.SCAN_BACKENDS.entries, "cpp", OperatorBackend(wrong))
    result = run()
    assert result.exit_code == 1
    assert re.search(r"scan +cpp +WRONG RESULTS: error \d\.\de-0[23]", result.output)


def test_a_check_knows_error_and_times():
    checks = doctor.check_backends(
        selective_scan.selective_scan,
        causal_conv.causal_conv1d,
        {"torch": selective_scan.SCAN_BACKENDS.entries["torch"]},
        {"torch": causal_conv.CONV_BACKENDS.entries["torch"]},
    )
    assert [(c.operator, c.backend, c.problem) for c in checks] == [("scan", "torch", None), ("conv", "torch", None)]
    assert all(c.error < 1e-5 and min(c.milliseconds) > 0 for c in checks)
    assert torch.backends.cpu.get_cpu_capability() in doctor.report_machine(doctor.describe_machine())

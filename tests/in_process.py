"""A command in this process: what a new interpreter would print and return, without its seconds of imports.

Each command keeps one test that starts a real process, and whatever is about processes (killed ones, imports, remote
code) does so too.
"""

import contextlib
import importlib
import io
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

DEMO = ("demo", "--patients", 120, "--recipe", Path(__file__).resolve().parent / "demo" / "short.yaml")
"""The demo of the run, which `.ci/run` makes before the tests: the fixture `demo` in tests/conftest.py."""


def run_module(
    module: str, *arguments: object, function: str | None = "main", folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module as `python -m MODULE ARGUMENTS` would.

    Args:
        module: Its full name.
        arguments: Its arguments; each is turned into text.
        function: What it runs as a command; None: the whole file once more, as `__main__`.
        folder: Working directory; by default this process's.

    Returns:
        Exit status and what was printed, as `subprocess.run(..., capture_output=True, text=True)` gives them.
    """
    if function is None:
        command = partial(runpy.run_module, module, run_name="__main__", alter_sys=True)
    else:
        command = getattr(importlib.import_module(module), function)
    return _run(command, [module, *map(str, arguments)], folder)


def run_ehrseq(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `ehrseq ARGUMENTS`; see `run_module`."""
    return run_module("ehrseq.cli.app", *arguments, folder=folder)


def run_python_file(file: Path, *arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python FILE ARGUMENTS`; see `run_module`."""

    def function() -> None:
        runpy.run_path(str(file), run_name="__main__")

    return _run(function, [str(file), *map(str, arguments)], folder)


def _run(function: Callable[[], object], command: list[str], folder: Path | None) -> subprocess.CompletedProcess[str]:
    printed, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.setattr(sys, "argv", command)
        if folder is not None:
            patch.chdir(folder)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            status = _status(function)
    return subprocess.CompletedProcess(command, status, printed.getvalue(), errors.getvalue())


def _status(function: Callable[[], object]) -> int:
    try:
        function()
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
            return 1
        return int(stopped.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0

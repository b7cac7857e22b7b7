"""Fixtures shared by every test: the real data, the reference tensors, one demo, and a quiet, seeded environment."""

import gc
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock

import tests.properties  # noqa: F401  (its profiles have to be there before the command line names one)
from tests.in_process import DEMO, run_ehrseq
from tests.modeling.fetch_upstream import why_absent

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network; the Hub tests talk to a loopback server
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # who waits for a thread of a busy core does not spin beside it


def _take_a_share_of_the_cores() -> None:
    """With `-n N`, each test process has its own cores, and as many threads and worker processes as those."""
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    number = int(worker.removeprefix("gw"))
    os.sched_setaffinity(0, cores[number::count] or [cores[number % len(cores)]])


_take_a_share_of_the_cores()  # before torch and polars count them

REPOSITORY = Path(__file__).resolve().parent.parent


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, REPOSITORY.parent / default))
    if not folder.is_dir():
        pytest.skip(f"{variable} is not set and {folder} is absent: real data or reference tensors are needed")
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Callable[..., None]) -> object:
    """With `-n N`, tests that share a fixture run in one process, which makes it once; files of many tests come first.

    Who runs is who is free: a file, or a folder whose `conftest.py` makes something in processes of its own.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return next((folder for folder in ("tests/hub/", "tests/pipelines/") if file.startswith(folder)), file)

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """What was imported stays: Trainer collects garbage at every turn, and went through all of torch each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_unconfigure() -> None:
    """At the end libraries look for what they have left behind."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A run without transformers' own tests says so, and why: they are skipped by whole files."""
    if reason := why_absent(version("transformers")):
        terminalreporter.write_line(f"NOT RUN: transformers' own tests are absent: {reason}", yellow=True)


@pytest.fixture(scope="session")
def ehr_data() -> Path:
    """Folder of open real EHR data (environment variable EHRSEQ_DATA)."""
    return _folder("EHRSEQ_DATA", "shared/data")


@pytest.fixture(scope="session")
def reference_fixtures() -> Path:
    """Folder of reference tensors (environment variable EHRSEQ_FIXTURES)."""
    return _folder("EHRSEQ_FIXTURES", "shared/fixtures")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what the command `DEMO` wrote, with what it printed in `printed.txt`; not to be changed, though the
    same command may be run again.

    One demo serves all processes of a run. `.ci/run`, which has made one already, names it in EHRSEQ_DEMO.
    """
    if ready := os.environ.get("EHRSEQ_DEMO"):
        return Path(ready)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(f"{folder}.lock"):
        if not (folder / "printed.txt").exists():
            done = run_ehrseq(*DEMO, "--output", folder)
            assert done.returncode == 0, done.stderr
            (folder / "printed.txt").write_text(done.stdout)
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    import random

    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (transformers and sklearn read the global state)
    torch.manual_seed(0)

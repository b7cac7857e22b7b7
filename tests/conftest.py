"""Fixtures shared by every test: where the real data and the reference tensors lie, and a quiet, seeded environment."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network; the Hub tests talk to a loopback server
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

REPOSITORY = Path(__file__).resolve().parent.parent


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, REPOSITORY.parent / default))
    if not folder.is_dir():
        pytest.skip(f"{variable} is not set and {folder} is absent: real data or reference tensors are needed")
    return folder


@pytest.fixture(scope="session")
def ehr_data() -> Path:
    """Folder of open real EHR data (environment variable EHRSEQ_DATA)."""
    return _folder("EHRSEQ_DATA", "shared/data")


@pytest.fixture(scope="session")
def reference_fixtures() -> Path:
    """Folder of reference tensors (environment variable EHRSEQ_FIXTURES)."""
    return _folder("EHRSEQ_FIXTURES", "shared/fixtures")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    import random

    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (transformers and sklearn read the global state)
    torch.manual_seed(0)

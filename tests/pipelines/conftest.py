"""One checkpoint for all pipeline tests."""

from pathlib import Path

import pytest

from tests.checkpoints.complete import complete_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small trained classifier with its tokenizer."""
    return complete_checkpoint("ehrmamba", tmp_path_factory.mktemp("pipeline") / "checkpoint")

"""One trained checkpoint for all Hub tests."""

from pathlib import Path

import pytest

from tests.hub.checkpoints import train_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small trained classifier with its tokenizer."""
    return train_checkpoint(tmp_path_factory.mktemp("hub") / "checkpoint")

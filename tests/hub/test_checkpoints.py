"""A checkpoint's weights are read from safetensors, never from a pickle, which runs whatever it holds."""

import ast
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoModelForSequenceClassification

import ehrseq
from ehrseq import EhrMambaModel, HyMaTEModel
from ehrseq.hub.checkpoints import load_checkpoint
from tests.checkpoints.complete import complete_checkpoint


class Touch:
    """An object whose pickle, when it is read, makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def pickled(model_type: str, folder: Path) -> Path:
    """A checkpoint with pickled weights; returns the file that appears when they are read."""
    complete_checkpoint(model_type, folder)
    (folder / "model.safetensors").unlink()
    run = folder.parent / "was_run"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Touch(run)}))
    return run


LOADERS: dict[str, Callable[[Path], Any]] = {
    "ehrmamba": EhrMambaModel.from_pretrained,
    "hymate": HyMaTEModel.from_pretrained,
    "ehr_lstm": AutoModel.from_pretrained,
    "cehrbert": AutoModelForSequenceClassification.from_pretrained,
}


@pytest.mark.parametrize("model_type", LOADERS)
def test_every_class_reads_safetensors_only(model_type: str, tmp_path: Path) -> None:
    run = pickled(model_type, tmp_path / "model")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LOADERS[model_type](tmp_path / "model")
    assert not run.exists()


@pytest.mark.parametrize("model_type", ["ehrmamba", "hymate"])
def test_load_checkpoint_says_that_a_pickle_is_not_read(model_type: str, tmp_path: Path) -> None:
    run = pickled(model_type, tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no \*\.safetensors; .*pickled weights are not read"):
        load_checkpoint(tmp_path / "model")
    assert not run.exists()


def test_no_auto_class_of_the_package_reads_a_pickle() -> None:
    """An Auto class may meet a model of somebody else's, which does not refuse pickles by itself."""
    calls = []
    for file in sorted(Path(ehrseq.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.match(r"AutoModel\w*\.from_pretrained$", ast.unparse(node.func)):
                calls.append((f"{file}:{node.lineno}", {keyword.arg for keyword in node.keywords}))
    assert calls
    assert not [place for place, words in calls if "use_safetensors" not in words]


def test_weights_in_several_files_are_read(tmp_path: Path) -> None:
    whole = load_checkpoint(complete_checkpoint("ehrmamba", tmp_path / "whole")).model
    whole.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    for file in (tmp_path / "whole").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "parts")
    parts = load_checkpoint(tmp_path / "parts").model
    for name, weight in whole.state_dict().items():
        assert parts.state_dict()[name].equal(weight), name

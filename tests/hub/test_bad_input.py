"""What cannot be pushed, or written on a card, is said before anything is created on the Hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ehrseq.hub import EhrModelCard, push_to_hub


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the Hub was asked before the arguments were looked at")

    monkeypatch.setattr("ehrseq.hub.push.HfApi.create_repo", refuse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": 5}, "checkpoint got int; expected a folder, a model or a pipeline"),
        ({"checkpoint": None}, "checkpoint got NoneType"),
        ({"checkpoint": "nowhere"}, "nowhere is not a folder"),
        ({"tokenizer": "folder"}, "tokenizer got str; expected a tokenizer, not its folder"),
        ({"card": "# My card"}, "card got str; expected an EhrModelCard"),
        ({"repo_id": None}, "repo_id got None; expected owner/name"),
    ],
)
def test_arguments_of_another_kind(checkpoint: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        push_to_hub(**{"checkpoint": checkpoint, "repo_id": "me/model"} | change)


def test_a_tokenizer_is_no_checkpoint(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"EhrTokenizer has no config\.json"):
        push_to_hub(AutoTokenizer.from_pretrained(checkpoint), "me/model")


def config_with(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps(json.loads(text) | changes).encode()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda _: b"{", "config.json is no JSON"),
        ("config.json", lambda _: b"[]", "config.json is no config of a model"),
        ("config.json", config_with(auto_map="x"), "config.json is no config of a model"),
        ("config.json", config_with(auto_map=None), "lacks the code that loads it"),
        ("README.md", lambda _: b"\xff\xfe", "README.md is not UTF-8"),
        ("model.safetensors", lambda _: bytes(50), "model.safetensors is damaged"),
        ("model.safetensors", lambda weights: weights[:-40], "model.safetensors is damaged"),
    ],
)
def test_damaged_files(
    checkpoint: Path, tmp_path: Path, file: str, change: Callable[[bytes], bytes], message: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "damaged")
    path = tmp_path / "damaged" / file
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    with pytest.raises(ValueError, match=message):
        push_to_hub(tmp_path / "damaged", "me/model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": ""}, "name got ''; expected text"),
        ({"data": "MIMIC-IV"}, "data got 'MIMIC-IV'; expected a DataDescription"),
        ({"results": {"mortality_30d": 0.8}}, "results got .*; expected TaskMetrics by task"),
        ({"limits": "One sentence."}, "limits got 'One sentence.'; expected a list"),
        ({"tags": "ehr"}, "tags got 'ehr'; expected a list"),
        ({"coverage": {"exact": 1.0}}, r"coverage got .*; expected tokenizer.coverage\(events\)"),
    ],
)
def test_bad_cards(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"EhrModelCard: {message}"):
        EhrModelCard(**{"name": "model"} | settings)


def test_a_card_of_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is no config of a model"):
        EhrModelCard("model").render(tmp_path)

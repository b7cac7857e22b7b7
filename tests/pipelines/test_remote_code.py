"""A checkpoint carries its code: with the package nobody asks for trust, without it the folder is enough."""

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.dynamic_module_utils import get_imports

import ehrseq
from tests.pipelines.conftest import PATIENTS

PACKAGE = Path(ehrseq.__file__).parent
FOLDERS = ("modeling", "tokenization", "pipelines")
TRAVELLING = [file for folder in FOLDERS for file in sorted((PACKAGE / folder).glob("*.py")) if file.stem != "__init__"]
BARE = {"torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "numpy"}


@pytest.fixture
def without_package(scored_without_package: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What an interpreter without ehrseq, polars and pyarrow makes of the checkpoint."""
    return scored_without_package["ehrmamba"]


def scores(answers: list[list[dict[str, Any]]]) -> np.ndarray:
    return np.array([[item["score"] for item in answer] for answer in answers])


def test_without_the_package_the_folder_scores_a_patient(without_package: dict[str, Any], checkpoint: Path) -> None:
    expected = pipeline("ehr-risk", model=str(checkpoint), device="cpu")(PATIENTS)
    np.testing.assert_allclose(scores(without_package["answers"]), scores(expected), atol=1e-6)
    np.testing.assert_allclose(without_package["scores"], scores(expected)[:, 0], atol=1e-6)
    assert [[(item["task"], item["label"]) for item in answer] for answer in without_package["answers"]] == [
        [(item["task"], item["label"]) for item in answer] for answer in expected
    ]


def test_without_the_package_the_dead_have_no_risk(without_package: dict[str, Any]) -> None:
    assert {(item["score"], item["reason"]) for item in without_package["dead"]} == {(None, "died_before_prediction")}


def test_without_the_package_every_part_comes_from_the_checkpoint(without_package: dict[str, Any]) -> None:
    assert without_package["forbidden"] == []
    assert all(module.startswith("transformers_modules.") for module in without_package["modules"])
    assert without_package["shape"][0] == len(PATIENTS)


def test_without_the_package_refusals_are_clear(without_package: dict[str, Any]) -> None:
    assert "trust_remote_code=True" in without_package["refusals"]["untrusted"]
    assert "pip install ehrseq" in without_package["refusals"]["bundle"]
    for name in ("table", "coverage", "train"):
        assert without_package["refusals"][name].startswith("ImportError: tables of events need the package: pip inst")


def test_what_remote_code_saved_is_whole_again(without_package: dict[str, Any], checkpoint: Path) -> None:
    saved = Path(without_package["saved"])
    assert {file.name for file in saved.glob("*.py")} == {file.name for file in checkpoint.glob("*.py")}
    again, original = (json.loads((folder / "config.json").read_text()) for folder in (saved, checkpoint))
    assert again["auto_map"] == original["auto_map"]
    assert again["custom_pipelines"] == original["custom_pipelines"]
    expected = pipeline("ehr-risk", model=str(checkpoint), device="cpu")(PATIENTS)
    np.testing.assert_allclose(scores(pipeline("ehr-risk", model=str(saved), device="cpu")(PATIENTS)), scores(expected))


@pytest.mark.parametrize("trust", [None, False, True])
def test_with_the_package_its_classes_win_and_no_trust_is_asked(checkpoint: Path, trust: bool | None) -> None:
    options = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(checkpoint, **options)) is ehrseq.EhrMambaConfig
    assert type(AutoTokenizer.from_pretrained(checkpoint, **options)) is ehrseq.EhrTokenizer
    assert type(AutoModel.from_pretrained(checkpoint, **options)) is ehrseq.EhrMambaModel
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoint, **options)
    assert type(classifier) is ehrseq.EhrMambaForSequenceClassification
    risk = pipeline("ehr-risk", model=str(checkpoint), device="cpu", **options)
    assert (type(risk), type(risk.model), type(risk.tokenizer)) == (
        ehrseq.EhrRiskPipeline,
        ehrseq.EhrMambaForSequenceClassification,
        ehrseq.EhrTokenizer,
    )


def test_a_tokenizer_alone_loads_without_trust(checkpoint: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ehrseq.EhrTokenizer


def test_every_code_file_of_a_checkpoint_is_the_package_s_own(checkpoint: Path) -> None:
    ours = {file.name: file.read_bytes() for file in TRAVELLING}
    config = json.loads((checkpoint / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForPreTraining",
        "AutoModelForSequenceClassification",
    }
    copied = {file.name: file.read_bytes() for file in checkpoint.glob("*.py")}
    assert copied == {name: ours[name] for name in copied}
    needed = {name.split(".")[0] + ".py" for name in config["auto_map"].values()} | {
        "ehr_forecast.py",
        "ehr_risk.py",
        "tokenization_ehr.py",
    }
    assert needed <= set(copied)


def test_the_columnar_code_does_not_travel(checkpoint: Path) -> None:
    """What reads one patient goes along; what reads and makes tables stays in the package."""
    others = {file.name for folder in ("modeling", "pipelines") for file in (PACKAGE / folder).glob("*.py")}
    assert {file.name for file in checkpoint.glob("*.py")} - others == {
        "tokenization_ehr.py",
        *(f"ehr_{name}.py" for name in ("anchors", "codes", "histories", "plans", "prefixes", "prompts", "rows")),
        *(f"ehr_{name}.py" for name in ("sequence", "visits", "vocabulary")),
        *(f"ehr_{name}.py" for name in ("durations", "forecast_prompts", "forecast_questions", "outcomes")),
    }
    assert len([file for file in TRAVELLING if file.parent.name == "tokenization"]) == 19


def test_file_names_are_unique_over_the_travelling_folders() -> None:
    repeated = [name for name, count in Counter(file.name for file in TRAVELLING).items() if count > 1]
    assert repeated == []


@pytest.mark.parametrize("file", TRAVELLING, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_travelling_files_import_only_what_travels(file: Path) -> None:
    """transformers finds relative imports by a regular expression and copies files flat into one folder."""
    text = file.read_text()
    tree = ast.parse(text)
    relative = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{ast.unparse(node)}: one dot only"
            assert node.module, f"{ast.unparse(node)}: name a file after the dot"
            assert "." not in node.module, f"{ast.unparse(node)}: no subfolder"
            assert (file.parent / f"{node.module}.py").is_file()
            relative.add(node.module)
    assert set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, re.MULTILINE)) == relative, "an import in a docstring"
    # Whatever transformers finds outside `try` it demands before it loads the file, lazy imports in functions included.
    assert set(get_imports(file)) <= {*sys.stdlib_module_names, *BARE}

"""The Hub round trip of a HyMaTE checkpoint: pushed whole, in parts and by a pipeline, loaded in fresh processes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import pipeline

from tests.checkpoints.complete import complete_checkpoint
from tests.checkpoints.stays import make_stay
from tests.hub.bare_interpreter import link_packages, run_python
from tests.hub.minihub import MiniHub, card_problems

PATIENTS = [make_stay(subject_id) for subject_id in range(200, 203)]

PUSH = """
from huggingface_hub import hf_hub_download
from transformers import AutoFeatureExtractor, AutoModelForSequenceClassification, pipeline
import ehrseq
from ehrseq.hub import DataDescription, EhrModelCard, push_to_hub

model = AutoModelForSequenceClassification.from_pretrained(given["model"])
extractor = AutoFeatureExtractor.from_pretrained(given["model"])
card = EhrModelCard("tiny-hymate", data=DataDescription("tiny simulated stays", simulated=True))
push_to_hub(given["model"], "user/whole", card=card)
model.push_to_hub("user/parts")
extractor.push_to_hub("user/parts")
pipeline("ehr-risk", model=given["model"], device="cpu").push_to_hub("user/pipe")
try:
    push_to_hub(model, "user/half")
except ValueError as error:
    refusal = str(error)
names = ("user/whole", "user/parts", "user/pipe")
cards = {name: open(hf_hub_download(name, "README.md")).read() for name in names}
print(json.dumps({"cards": cards, "refusal": refusal}))
"""

LOAD = """
from transformers import pipeline
if given["package"]:
    import ehrseq
trust = {} if given["package"] else {"trust_remote_code": True}
print(json.dumps({
    name: pipeline("ehr-risk", model=name, device="cpu", **trust)(given["patients"], batch_size=2)
    for name in ("user/whole", "user/parts", "user/pipe")
}))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[MiniHub]:
    with MiniHub() as server:
        yield server


@pytest.fixture(scope="module")
def hymate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_checkpoint("hymate", tmp_path_factory.mktemp("hymate") / "checkpoint")


@pytest.fixture(scope="module")
def pushed(hub: MiniHub, hymate: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_python(PUSH, {"model": str(hymate)}, hub.environment(tmp_path_factory.mktemp("push")))


@pytest.mark.parametrize("package", [True, False], ids=["with the package", "without the package"])
def test_risks_after_a_round_trip_equal_those_before(
    package: bool, hub: MiniHub, hymate: Path, pushed: dict[str, Any], tmp_path: Path
) -> None:
    patients = json.loads(json.dumps(PATIENTS, default=lambda time: time.isoformat()))
    bare = None if package else link_packages(tmp_path / "packages")
    given = {"package": package, "patients": patients}
    loaded = run_python(LOAD, given, hub.environment(tmp_path / "home"), bare)
    expected = [answer[0]["score"] for answer in pipeline("ehr-risk", model=str(hymate), device="cpu")(PATIENTS)]
    for name, answers in loaded.items():
        np.testing.assert_allclose([answer[0]["score"] for answer in answers], expected, atol=1e-6, err_msg=name)


def test_the_cards_speak_of_triplets(pushed: dict[str, Any]) -> None:
    for card in pushed["cards"].values():
        assert card_problems(card) == []
        assert "triplets of time, variable and value" in card
        assert "Context of 64 triplets of 3 variables." in card
        assert "tokenizer" not in card
        assert "- hymate" in card


def test_a_model_without_its_feature_extractor_is_refused(pushed: dict[str, Any]) -> None:
    assert "without it nobody can turn a patient into the model's input" in pushed["refusal"]

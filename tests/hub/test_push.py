"""The Hub round trip, with the real huggingface_hub client against a server on the loopback interface.

What the three processes of `conftest.py` report is compared with the scores that the checkpoint had before.
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from transformers import pipeline

from ehrseq.hub.cards import CARD_MARKER
from tests.hub.minihub import MiniHub, card_problems


@pytest.fixture
def pushed(all_pushed: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return all_pushed["ehrmamba"]


@pytest.fixture
def loaded(all_loaded: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return all_loaded["ehrmamba"]


def log_odds(answers: list[list[dict[str, Any]]]) -> np.ndarray:
    scores = np.array([[item["score"] for item in answer] for answer in answers])
    return np.log(scores / (1 - scores))


def test_risks_after_a_reload_in_a_fresh_process_equal_those_before(
    loaded: dict[str, Any], checkpoint: Path, patients: dict[str, Any]
) -> None:
    before = pipeline("ehr-risk", model=str(checkpoint), device="cpu")(patients["ehrmamba"])
    for source in ("first", "snapshot", "private", "user/parts", "user/pipe", "user/saved", "user/trainer"):
        for answer, expected in zip(loaded["answers"][source], before, strict=True):
            assert [(item["task"], item["label"]) for item in answer] == [(x["task"], x["label"]) for x in expected]
            np.testing.assert_allclose([x["score"] for x in answer], [x["score"] for x in expected], atol=1e-6)


def test_explanations_after_a_reload_in_a_fresh_process_equal_those_before(
    loaded: dict[str, Any], checkpoint: Path, patients: dict[str, Any]
) -> None:
    before = pipeline("ehr-risk", model=str(checkpoint), device="cpu")(patients["ehrmamba"], explain=True)
    for answer, expected in zip(loaded["answers"]["explained"], before, strict=True):
        for item, same in zip(answer, expected, strict=True):
            assert item["baseline"] == pytest.approx(same["baseline"], abs=1e-5)
            assert [x["code"] for x in item["contributions"]] == [x["code"] for x in same["contributions"]]
            parts = [[x["contribution"] for x in explained["contributions"]] for explained in (item, same)]
            np.testing.assert_allclose(*parts, atol=1e-5)


def test_a_second_push_a_revision_and_a_branch_are_told_apart(loaded: dict[str, Any]) -> None:
    first = log_odds(loaded["answers"]["first"])
    np.testing.assert_allclose(log_odds(loaded["answers"]["user/whole"]), first + 1, atol=1e-4)
    np.testing.assert_allclose(log_odds(loaded["answers"]["experiment"]), first + 2, atol=1e-4)


def test_loading_what_is_not_there_says_so(loaded: dict[str, Any]) -> None:
    refusals = loaded["refusals"]
    assert refusals["missing repository"][0] == "OSError"
    assert "user/nowhere" in refusals["missing repository"][1]
    assert "v9" in refusals["missing revision"][1]
    assert refusals["missing file"][0] in ("EntryNotFoundError", "RemoteEntryNotFoundError")
    assert refusals["no tokenizer"] is not None
    assert refusals["private, no token"][0] == "OSError"
    assert "private" in refusals["private, no token"][1]


def test_a_push_is_one_commit_with_everything(hub: MiniHub, pushed: dict[str, Any]) -> None:
    assert hub.history("user/whole") == ["Second push", "Upload checkpoint", "initial commit"]
    files = hub.files("user/whole", pushed["first"])
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert {"modeling_ehrmamba.py", "tokenization_ehr.py", "ehr_risk.py"} <= set(files)
    assert files["model.safetensors"].is_lfs
    assert not files["config.json"].is_lfs
    assert not {"training_args.bin", "optimizer.pt"} & set(files)


def test_a_second_push_uploads_only_new_weights(hub: MiniHub, pushed: dict[str, Any]) -> None:
    first, second = (hub.files("user/whole", revision) for revision in (pushed["first"], pushed["second"]))
    assert first["model.safetensors"].sha256 != second["model.safetensors"].sha256
    assert first["tokenizer.json"] == second["tokenizer.json"]
    assert hub.history("user/whole", "experiment")[0] == "Upload checkpoint"


def test_old_shards_do_not_stay_beside_new_weights(hub: MiniHub, pushed: dict[str, Any]) -> None:
    sharded = [sha for sha, commit in hub.repository("user/saved").commits.items()
               if any("-of-" in path for path in commit.files)]  # fmt: skip
    assert sharded
    weights = [path for path in hub.files("user/saved") if ".safetensors" in path]
    assert weights == ["model.safetensors"]


def test_every_push_carries_a_valid_card(hub: MiniHub, pushed: dict[str, Any]) -> None:
    for _, name in hub.state.repositories:
        for sha, commit in hub.repository(name).commits.items():
            if commit.parent is not None:
                assert card_problems(commit.files["README.md"].content.decode()) == [], f"{name} {sha}"


@pytest.mark.parametrize("name", ["user/whole", "user/parts", "user/saved", "user/trainer", "user/pipe"])
def test_cards_are_filled_from_the_checkpoint(hub: MiniHub, pushed: dict[str, Any], name: str) -> None:
    card = hub.files(name)["README.md"].content.decode()
    assert CARD_MARKER in card
    assert "| `mortality_30d` | death within 30 days | 30 days | Death within 30 days of a discharge alive. |" in card
    assert f'pipeline("ehr-risk", model="{name}")' in card
    if name in ("user/whole", "user/trainer", "user/pipe"):
        assert "Trained on simulated patients" in card


def test_a_card_written_by_hand_stays(pushed: dict[str, Any]) -> None:
    assert pushed["kept"].endswith("# My own words\n")


def test_refused_pushes_say_why_and_leave_nothing(hub: MiniHub, pushed: dict[str, Any]) -> None:
    refusals = pushed["refusals"]
    for case in ("bad token", "bad token, model"):
        assert refusals[case][0] == "HfHubHTTPError", refusals[case]
        assert "401" in refusals[case][1]
    assert refusals["no tokenizer"][0] == "ValueError"
    assert "no tokenizer" in refusals["no tokenizer"][1]
    assert refusals["no folder"][0] == "ValueError"
    assert ("model", "user/half") not in hub.state.repositories


def test_the_example_pushes_a_card_with_the_results_of_a_scored_table(
    hub: MiniHub, pushed: dict[str, Any], scored: Path
) -> None:
    positives = pl.read_parquet(scored)["label"].sum()
    card = hub.files("user/example")["README.md"].content.decode()
    assert card_problems(card) == []
    assert f"| mortality_30d | 100 | 200 | {positives} | 1.000 [1.000, 1.000] |" in card
    assert "| long_stay_7d | 0 | 0 | 0 | not estimable |" in card
    assert yaml.safe_load(card.split("---\n")[1])["model-index"][0]["name"] == "example"

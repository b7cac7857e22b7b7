"""The Hub round trip, with the real huggingface_hub client against a server on the loopback interface.

Three processes: one pushes a trained checkpoint in every way there is, one with the package and one without it load
what was pushed. What they report is compared with the scores that the checkpoint had before.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from transformers import pipeline

from ehrseq.hub.cards import CARD_MARKER
from tests.checkpoints.patients import make_patient
from tests.hub.bare_interpreter import link_packages, run_python
from tests.hub.minihub import MiniHub, card_problems

PATIENTS = [make_patient(subject_id, seed=3) for subject_id in range(3)]

PUSH = """
import torch
from huggingface_hub import HfApi, hf_hub_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline
import ehrseq
from ehrseq.hub import DataDescription, EhrModelCard, push_to_hub, use_card

model = AutoModelForSequenceClassification.from_pretrained(given["model"])
tokenizer = AutoTokenizer.from_pretrained(given["model"])
data = DataDescription("tiny simulated patients", simulated=True, counts={"patients": 40})
card = EhrModelCard("tiny-ehrmamba", data=data, training={"optimizer steps": 12})

# 1. The folder in one commit; then changed weights, on main and on a branch.
first = push_to_hub(given["model"], "user/whole", card=card)
with torch.no_grad():
    model.classifier.out_proj.bias.add_(torch.tensor([0.0, 1.0]))
second = push_to_hub(model, "user/whole", tokenizer=tokenizer, commit_message="Second push")
with torch.no_grad():
    model.classifier.out_proj.bias.add_(torch.tensor([0.0, 1.0]))
push_to_hub(model, "user/whole", tokenizer=tokenizer, revision="experiment")

# 2. transformers' own ways, one part at a time.
model = AutoModelForSequenceClassification.from_pretrained(given["model"])
model.push_to_hub("user/parts")
tokenizer.push_to_hub("user/parts")
tokenizer.push_to_hub("user/tokenizer-only")
pipeline("ehr-risk", model=given["model"], device="cpu").push_to_hub("user/pipe")
model.save_pretrained(given["saved"], push_to_hub=True, repo_id="user/saved", max_shard_size="20KB")
model.config.push_to_hub("user/config-only")

# 3. Trainer, with its own card and with ours.
arguments = TrainingArguments(given["run"], hub_model_id="user/trainer", report_to=[], use_cpu=True, disable_tqdm=True)
trainer = Trainer(model=model, args=arguments, processing_class=tokenizer)
use_card(trainer, card)
trainer.push_to_hub()

# 4. A card that somebody wrote stays, unless a card is given.
api = HfApi()
own = "---\\nlicense: mit\\n---\\n# My own words\\n"
api.upload_file(path_or_fileobj=own.encode(), path_in_repo="README.md", repo_id="user/pipe")
model.push_to_hub("user/pipe")
push_to_hub(model, "user/pipe", tokenizer=tokenizer)
kept = open(hf_hub_download("user/pipe", "README.md", force_download=True)).read()
push_to_hub(model, "user/pipe", tokenizer=tokenizer, card=card)

# 5. Sharded weights give way to a single file.
push_to_hub(model, "user/saved", tokenizer=tokenizer)

# 6. A private repository.
push_to_hub(model, "user/private", tokenizer=tokenizer, private=True)

# 7. What goes wrong.
def refusal(action):
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None

refusals = {
    "bad token": refusal(lambda: push_to_hub(given["model"], "user/whole", token="hf_wrong")),
    "bad token, model": refusal(lambda: model.push_to_hub("user/whole", token="hf_wrong")),
    "no tokenizer": refusal(lambda: push_to_hub(model, "user/half")),
    "no folder": refusal(lambda: push_to_hub(given["model"] + "/nowhere", "user/half")),
}
print(json.dumps({"first": first.oid, "second": second.oid, "kept": kept, "refusals": refusals}))
"""

LOAD = """
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
if given["package"]:
    import ehrseq

def score(repository, **options):
    trust = {} if given["package"] else {"trust_remote_code": True}
    return pipeline("ehr-risk", model=repository, device="cpu", **trust, **options)(given["patients"], batch_size=4)

def refusal(action):
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None

# Before anything is in the cache, from which transformers would answer.
locked_out = refusal(lambda: AutoModelForSequenceClassification.from_pretrained("user/private", token=False))
answers = {repository: score(repository) for repository in given["repositories"]}
answers["first"] = score("user/whole", revision=given["first"])
answers["experiment"] = score("user/whole", revision="experiment")
answers["snapshot"] = score(snapshot_download("user/parts"))
answers["private"] = score("user/private")
refusals = {
    "missing repository": refusal(lambda: AutoModelForSequenceClassification.from_pretrained("user/nowhere")),
    "missing revision": refusal(lambda: AutoTokenizer.from_pretrained("user/whole", revision="v9")),
    "missing file": refusal(lambda: hf_hub_download("user/whole", "nowhere.json")),
    "no tokenizer": refusal(lambda: score("user/config-only")),
    "private, no token": locked_out,
}
print(json.dumps({"answers": answers, "refusals": refusals}))
"""
REPOSITORIES = ["user/whole", "user/parts", "user/pipe", "user/saved", "user/trainer"]


@pytest.fixture(scope="module")
def hub() -> Iterator[MiniHub]:
    with MiniHub() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub: MiniHub, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("push")
    given = {"model": str(checkpoint), "saved": str(folder / "saved"), "run": str(folder / "run")}
    return run_python(PUSH, given, hub.environment(folder / "home"))


@pytest.fixture(scope="module", params=["with the package", "without the package"])
def loaded(
    request: pytest.FixtureRequest,
    hub: MiniHub,
    pushed: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folder, package = tmp_path_factory.mktemp("load"), request.param == "with the package"
    patients = json.loads(json.dumps(PATIENTS, default=lambda time: time.isoformat()))
    given = {"package": package, "patients": patients, "first": pushed["first"], "repositories": REPOSITORIES}
    bare = None if package else link_packages(folder / "packages")
    return run_python(LOAD, given, hub.environment(folder / "home"), bare)


def log_odds(answers: list[list[dict[str, Any]]]) -> np.ndarray:
    scores = np.array([[item["score"] for item in answer] for answer in answers])
    return np.log(scores / (1 - scores))


def test_risks_after_a_reload_in_a_fresh_process_equal_those_before(loaded: dict[str, Any], checkpoint: Path) -> None:
    before = pipeline("ehr-risk", model=str(checkpoint), device="cpu")(PATIENTS)
    for source in ("first", "snapshot", "private", "user/parts", "user/pipe", "user/saved", "user/trainer"):
        for answer, expected in zip(loaded["answers"][source], before, strict=True):
            assert [(item["task"], item["label"]) for item in answer] == [(x["task"], x["label"]) for x in expected]
            np.testing.assert_allclose([x["score"] for x in answer], [x["score"] for x in expected], atol=1e-6)


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
    hub: MiniHub, checkpoint: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 200)
    rows = {
        "subject_id": np.arange(200) // 2,
        "task": ["mortality_30d"] * 200,
        "label": labels,
        "score": (labels + random.random(200)) / 2,
    }
    pl.DataFrame(rows).write_parquet(tmp_path / "risks.parquet")
    script = (
        "import runpy, sys\nsys.argv = given['command']\nrunpy.run_path(sys.argv[0], run_name='__main__')\nprint(0)"
    )
    command = ["examples/05_push_to_hub.py", "--model", str(checkpoint), "--repo_id", "user/example"]
    command += ["--scores", str(tmp_path / "risks.parquet")]
    run_python(script, {"command": command}, hub.environment(tmp_path / "home"))
    card = hub.files("user/example")["README.md"].content.decode()
    assert card_problems(card) == []
    assert f"| mortality_30d | 100 | 200 | {labels.sum()} | 1.000 [1.000, 1.000] |" in card
    assert "| long_stay_7d | 0 | 0 | 0 | not estimable |" in card
    assert yaml.safe_load(card.split("---\n")[1])["model-index"][0]["name"] == "example"

"""A push of a whole checkpoint to the Hub in one commit, never without a card.

    push_to_hub("runs/finetuned", "me/ehrmamba-simulated", card=card)

`push_to_hub` here writes the card it is given; `model.push_to_hub`, `tokenizer.push_to_hub` and `pipe.push_to_hub` of
transformers write `model.model_card` when it is set, keep a card that somebody wrote by hand, and otherwise fill the
template with what the checkpoint itself knows. `use_card(trainer, card)` does it for `Trainer`.
"""

import fnmatch
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from ehrseq.hub.cards import (
    CARD_MARKER,
    DescribedModel,
    EhrModelCard,
    ModelFacts,
    is_gated,
    part_card,
    read_config,
    read_text,
    weights_in,
)
from ehrseq.hub.checkpoints import Savable

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

STOCK_CARD = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."
# What a training run leaves beside a checkpoint and nobody needs for a risk.
NOT_PUSHED = (
    "optimizer.*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    "*.log",
)


def push_to_hub(
    checkpoint: str | os.PathLike[str] | Savable,
    repo_id: str,
    *,
    tokenizer: Savable | None = None,
    card: EhrModelCard | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload checkpoint",
    allow_credentialed: bool = False,
) -> CommitInfo:
    """Push a whole checkpoint in one commit: weights, config, tokenizer, the code that loads them, and the card.

    Args:
        checkpoint: Folder of a checkpoint (Trainer's `output_dir` will do), a model, or an ehr-risk pipeline.
        repo_id: `owner/name`; created when it does not exist.
        tokenizer: Tokenizer or feature extractor, where `checkpoint` is a model, or a folder that lacks it.
        card: The card. By default `model.model_card`, the folder's own `README.md`, or the template filled with what
            the checkpoint itself knows.
        private: Whether a new repository is private.
        token: Access token, the stored one by default.
        revision: Branch to push to, created when it does not exist.
        commit_message: Title of the commit.
        allow_credentialed: Needed for weights trained on credentialed data; a new repository is then private.

    Returns:
        The commit, as huggingface_hub describes it.

    Raises:
        ValueError: Not a complete checkpoint, a damaged file, an argument of another kind, or weights from credentialed
            data without `allow_credentialed`.
    """
    if not isinstance(checkpoint, str | os.PathLike | Savable):
        raise ValueError(f"checkpoint got {type(checkpoint).__name__}; expected a folder, a model or a pipeline.")
    if tokenizer is not None and not isinstance(tokenizer, Savable):
        raise ValueError(f"tokenizer got {type(tokenizer).__name__}; expected a tokenizer, not its folder.")
    if card is not None and not isinstance(card, EhrModelCard):
        raise ValueError(f"card got {type(card).__name__}; expected an EhrModelCard (a text of yours: README.md).")
    if not isinstance(repo_id, str):
        raise ValueError(f"repo_id got {repo_id!r}; expected owner/name.")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as staged:
        # 1. Gather the files, and look at them before anything is created on the Hub.
        folder = Path(staged)
        if isinstance(checkpoint, str | os.PathLike):
            model: Any = checkpoint
            files = _files_of(Path(checkpoint))
        else:
            model = _model_of(checkpoint)
            checkpoint.save_pretrained(folder)
            files = {}
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _check_complete(files | _files_of(folder), checkpoint)
        card = card or getattr(model, "model_card", None)
        known_card = card.render(model) if card is not None else read_text(files.get("README.md"))
        if is_gated(known_card):
            _refuse_credentialed(allow_credentialed)
            private = True if private is None else private

        # 2. The repository and its card.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = api.list_repo_files(repo_id, revision=revision)
        if card is not None:
            card.save(folder, model=model, repo_id=repo_id)
        elif "README.md" not in files:
            if "README.md" in present:
                shutil.copyfile(api.hf_hub_download(repo_id, "README.md", revision=revision), folder / "README.md")
            ensure_card(folder, model, repo_id, allow_credentialed=allow_credentialed)

        # 3. One commit. Weights in other shards than before would stay behind and be loaded.
        files |= _files_of(folder)
        stale = [path for path in present if fnmatch.fnmatch(path, "*.safetensors*") and path not in files]
        operations: list[Any] = [
            *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=local) for path, local in sorted(files.items())),
            *(CommitOperationDelete(path_in_repo=path) for path in stale),
        ]
        logger.info(f"Pushing {len(files)} files to {repo_id}, deleting the old weights {stale}")
        return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)


def ensure_card(
    folder: str | os.PathLike[str], pushed: object, repo_id: str | None = None, *, allow_credentialed: bool = False
) -> None:
    """Make sure that a folder which is about to be pushed has a card of ours, or one that somebody wrote.

    Args:
        folder: The folder. A README.md in it is the repository's present card, or transformers' stock card.
        pushed: Model, pipeline, folder, tokenizer or config. `pushed.model_card` replaces every generated card.
        repo_id: Where it will be found.
        allow_credentialed: Whether weights from credentialed data may be pushed.

    Raises:
        ValueError: The card says that the data are credentialed, and that was not allowed.
    """
    readme = Path(folder) / "README.md"
    present = read_text(readme)
    model: Any = _model_of(pushed)
    by_hand = bool(present) and CARD_MARKER not in present and STOCK_CARD not in present
    card: EhrModelCard | None = getattr(model, "model_card", None)
    loaded_from = getattr(model, "name_or_path", None)
    origin = read_text(Path(loaded_from) / "README.md") if loaded_from else ""
    if is_gated(card.render(model) if card is not None else origin):
        _refuse_credentialed(allow_credentialed)
    if by_hand or (present and CARD_MARKER in present and card is None):
        return
    if card is not None:
        card.save(folder, model=model, repo_id=repo_id)
        return
    if origin:
        readme.write_text(origin, encoding="utf-8")
    elif isinstance(model, str | os.PathLike | DescribedModel):
        name = repo_id or ModelFacts.of(model).class_name
        EhrModelCard(name).save(folder, model=model, repo_id=repo_id)
    else:
        readme.write_text(part_card(model), encoding="utf-8")


def _model_of(pushed: object) -> Any:
    """The model of a pipeline, anything else as it is."""
    from transformers import Pipeline

    return pushed.model if isinstance(pushed, Pipeline) else pushed


def use_card(trainer: "Trainer", card: EhrModelCard) -> None:
    """Let `trainer.push_to_hub` write this card instead of Trainer's own draft.

    Trainer's log of losses goes into the card's training table.
    """

    def create_model_card(**_: Any) -> None:
        if trainer.is_world_process_zero():
            ran = {"epochs": round(trainer.state.epoch or 0, 2), "optimizer steps": trainer.state.global_step}
            filled = replace(card, training={**ran, **card.training})
            filled.save(trainer.args.output_dir or ".", model=trainer.model, repo_id=trainer.hub_model_id)

    if card.data is not None and card.data.credentialed:
        _refuse_credentialed(False)
    setattr(trainer, "create_model_card", create_model_card)  # noqa: B010  (of this trainer alone)


def _refuse_credentialed(allowed: bool) -> None:
    if not allowed:
        raise ValueError(
            "The card says that these weights were trained on credentialed data, whose agreements forbid or restrict "
            "sharing them. If you may share them, call ehrseq.push_to_hub(..., allow_credentialed=True): a new "
            "repository is then private, and its card asks visitors for their agreement."
        )


def _files_of(folder: Path) -> dict[str, Path]:
    """Path in the repository -> local file: the top level and `.eval_results`, without what only training needs."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the folder of a saved checkpoint, a model or a pipeline.")
    found = {path.name: path for path in folder.iterdir() if path.is_file()}
    found |= {f".eval_results/{path.name}": path for path in folder.glob(".eval_results/*.yaml")}
    return {name: path for name, path in found.items() if not any(fnmatch.fnmatch(name, p) for p in NOT_PUSHED)}


def _check_complete(files: Mapping[str, Path], checkpoint: object) -> None:
    where = checkpoint if isinstance(checkpoint, str | os.PathLike) else type(checkpoint).__name__
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise ValueError(
            f"{where} has no config.json with *.safetensors: save a model there with save_pretrained first."
        )
    if "tokenizer_config.json" not in files and "preprocessor_config.json" not in files:
        raise ValueError(
            f"{where} has no tokenizer, and without it nobody can turn a patient into the model's input: pass "
            f"tokenizer=..., or save it into the folder."
        )
    config = read_config(files["config.json"])
    pipelines = (config.get("custom_pipelines") or {}).values()
    wanted = [*(config.get("auto_map") or {}).values(), *(pipeline["impl"] for pipeline in pipelines)]
    missing = sorted({name.split(".")[0] + ".py" for name in wanted if "--" not in name} - files.keys())
    if missing or not config.get("auto_map"):
        raise ValueError(
            f"{where} lacks the code that loads it ({', '.join(missing) or 'no auto_map in config.json'}): load it "
            f"with ehrseq imported and call save_pretrained again."
        )
    for name, file in files.items():
        if name.endswith(".safetensors"):
            weights_in(file)  # or says that it is damaged, before anything is created on the Hub

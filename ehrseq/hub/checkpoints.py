"""Checkpoint folders: a model with the tokenizer or feature extractor that it was trained with, saved, checked, loaded.

save_checkpoint("runs/finetuned", model, tokenizer)
model, encoder = load_checkpoint("runs/finetuned")       # a risk model, or a ValueError that says what is wrong
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from huggingface_hub.errors import StrictDataclassError

from ehrseq.hub.families import FAMILIES, Family
from ehrseq.work.files import file_digest
from ehrseq.work.progress import bars_are_shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ehrseq.batches.scoring import RiskModel
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

    RiskEncoder = EhrTokenizer | HyMaTEFeatureExtractor
    """What turns records into rows of a model."""


_UNKNOWN_FAMILY = Family(config="", models={})


class Checkpoint(NamedTuple):
    """A finetuned checkpoint.

    Attributes:
        model: The risk classifier.
        encoder: Its tokenizer, or its feature extractor.
    """

    model: RiskModel
    encoder: RiskEncoder


class Backbone(NamedTuple):
    """A model without its head.

    Attributes:
        model: From channels or triplets to hidden states, in evaluation mode.
        encoder: Its tokenizer, or its feature extractor.
    """

    model: PreTrainedModel
    encoder: RiskEncoder


@runtime_checkable
class Savable(Protocol):
    """A model, tokenizer or feature extractor."""

    def save_pretrained(self, save_directory: str | Path, /) -> object:
        """Write it into a folder."""


def save_checkpoint(folder: str | Path, model: Savable, encoder: Savable) -> None:
    """Write a model and its tokenizer or feature extractor into one folder."""
    with quiet_loading():
        model.save_pretrained(folder)
        encoder.save_pretrained(folder)


def load_checkpoint(checkpoint: str | Path) -> Checkpoint:
    """Load a finetuned checkpoint.

    Args:
        checkpoint: Folder that `save_checkpoint` wrote, or `owner/name` on the Hub.

    Raises:
        ValueError: A file is missing or damaged, or the head was never trained.
        OSError: The Hub does not give it.
    """
    from ehrseq.batches.scoring import RiskModel
    from ehrseq.hub.families import load_class

    checkpoint = str(checkpoint)
    model, encoder, _ = load_parts(checkpoint, "AutoModelForSequenceClassification")
    family = FAMILIES.get(model.config.model_type, _UNKNOWN_FAMILY)
    is_risk_model = isinstance(model, RiskModel)
    untrained = model.untrained_weights() if is_risk_model else []
    if untrained:
        raise ValueError(
            f"{checkpoint} lacks {untrained}: it is a pretrained model; finetune it, or give a finetuned one."
        )
    if not is_risk_model or not isinstance(encoder, load_class(family.encoder)):
        raise ValueError(
            f"{checkpoint} holds a {type(model).__name__} and a {type(encoder).__name__}; expected a risk classifier "
            "of ehrseq with its EhrTokenizer or HyMaTEFeatureExtractor."
        )
    return Checkpoint(model, encoder)


def load_backbone(checkpoint: str | Path) -> Backbone:
    """Load what a checkpoint knows of patients: a pretrained or a finetuned model without its head.

    Args:
        checkpoint: Folder of any model of the package with its encoder, or `owner/name` on the Hub.

    Raises:
        ValueError: A file is missing or damaged, a weight is missing, or it is no model of the package.
        OSError: The Hub does not give it.
    """
    from ehrseq.hub.families import load_class

    checkpoint = str(checkpoint)
    model, encoder, missing = load_parts(checkpoint, "AutoModel")
    family = FAMILIES.get(model.config.model_type, _UNKNOWN_FAMILY)
    if not family.models or not isinstance(encoder, load_class(family.encoder)):
        raise ValueError(
            f"{checkpoint} holds a {type(model).__name__} and a {type(encoder).__name__}; expected a model of ehrseq "
            "with its EhrTokenizer or HyMaTEFeatureExtractor."
        )
    if missing:
        raise ValueError(
            f"{checkpoint} lacks {len(missing)} weights, e.g. {missing[0]}: they would be random. Save the model again."
        )
    return Backbone(model.eval(), encoder)


@lru_cache(maxsize=1)
def kept_backbone(checkpoint: str, digest: str) -> Backbone:
    """`load_backbone`, once for many calls; arguments as of `kept_checkpoint`."""
    return load_backbone(checkpoint)


@lru_cache(maxsize=1)
def kept_checkpoint(checkpoint: str, digest: str) -> Checkpoint:
    """`load_checkpoint`, once for many calls: a worker has it at hand, and loads it again where its files have changed.

    Args:
        checkpoint: As of `load_checkpoint`.
        digest: `checkpoint_digest` of it.
    """
    return load_checkpoint(checkpoint)


def notice_of(checkpoint: Checkpoint) -> str:
    """What everybody who reads its risks must know of a checkpoint; empty where there is nothing."""
    return str(getattr(checkpoint.model.config, "notice", None) or "")


def checkpoint_digest(checkpoint: str | Path) -> str:
    """What a checkpoint is: a hash of its files; of one on the Hub its name."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return str(checkpoint)
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors", ".bin")]
    return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bars for a second's work and no warning that a head is new, while a checkpoint is read or written."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # its functions are not typed
    verbosity, bars = logging.get_verbosity(), bars_are_shown()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_parts(checkpoint: str, auto_model: str) -> tuple[Any, Any, list[str]]:
    """The model of an Auto class, its encoder, and the names of weights that the files lack.

    Raises:
        ValueError: A file is missing or damaged.
        OSError: The Hub does not give it.
    """
    import transformers
    from safetensors import SafetensorError

    check_checkpoint_files(checkpoint)
    try:
        with quiet_loading():
            # The registered classes need no trust; without this, a folder of somebody else's would ask for it.
            # A class of somebody else's, which is refused by the caller, would read a pickle.
            model, found = getattr(transformers, auto_model).from_pretrained(
                checkpoint, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
            family = FAMILIES.get(model.config.model_type, _UNKNOWN_FAMILY)
            auto_encoder = "AutoTokenizer" if family.feature_extractor is None else "AutoFeatureExtractor"
            encoder = getattr(transformers, auto_encoder).from_pretrained(checkpoint, trust_remote_code=False)
    except (SafetensorError, StrictDataclassError, RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{checkpoint} cannot be loaded, a file of it is damaged or of another model: {reason}"
        ) from error
    return model, encoder, sorted(found["missing_keys"])


def check_checkpoint_files(checkpoint: str) -> None:
    """Say in our own words what transformers would say about its classes."""
    folder = Path(checkpoint)
    if not checkpoint.strip():
        raise ValueError("the checkpoint has an empty name; give a folder that save_pretrained wrote, or owner/name.")
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or checkpoint.count("/") != 1:
            raise ValueError(
                f"no checkpoint folder {checkpoint}; give a folder that save_pretrained wrote, or owner/name."
            )
        return
    family = FAMILIES.get(_model_type(folder / "config.json"), _UNKNOWN_FAMILY)
    needed = {"config.json": "model"}
    if family.feature_extractor is None:
        needed |= {"tokenizer.json": "tokenizer", "tokenizer_config.json": "tokenizer"}
    else:
        needed |= {"preprocessor_config.json": "extractor"}
    for file, part in needed.items():
        if not (folder / file).is_file():
            raise ValueError(
                f"{checkpoint} is no whole checkpoint: it has no {file}; save the {part} that it was trained with "
                f"into the same folder ({part}.save_pretrained(folder))."
            )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{checkpoint} has no *.safetensors; save the model into it by model.save_pretrained(folder): pickled "
            "weights are not read, since a pickle runs what it holds."
        )


def _model_type(config: Path) -> str:
    """`model_type` of a config file; empty where it cannot be read, which loading says better."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(values.get("model_type")) if isinstance(values, dict) else ""

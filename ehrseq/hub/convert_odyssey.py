"""Checkpoints of the first EhrMamba implementation, the Odyssey toolkit, as models of this package: equal outputs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM, EhrMambaForSequenceClassification

logger = logging.getLogger(__name__)

# The published vocabularies stop at type 8 (REG) and have no visit order beyond 511; sizes are read from the weights
# all the same.
_EMBEDDING_NAMES = {
    "scale_back_concat_layer.": "projection.",
    "visit_segment_embeddings.embedding.": "visit_segment_embeddings.",
    "LayerNorm.": "layer_norm.",
}
_BLOCK = "model.backbone.layers.0.mixer."


def convert_odyssey_checkpoint(
    checkpoint: str | os.PathLike[str] | Mapping[str, Tensor], **config_overrides: Any
) -> EhrMambaForCausalLM | EhrMambaForSequenceClassification:
    """Convert an Odyssey EhrMamba checkpoint; its logits, losses and gradients stay the same.

    Odyssey feeds times and ages as whole weeks and years; the channels are otherwise those of this package. It counts
    padding as a target of the next-token loss, which this package does not.

    Args:
        checkpoint: State dict, or a file that holds one: `.safetensors`, or a torch file (`.pt`, `.bin`, a Lightning
            `.ckpt` with a "state_dict"), which is read without executing code from it.
        config_overrides: Fields of `EhrMambaConfig` that no weight tells, e.g. `max_position_embeddings` or `tasks`.

    Returns:
        `EhrMambaForCausalLM` for a pretrained checkpoint, `EhrMambaForSequenceClassification` for a finetuned one,
        float32 as stored, in evaluation mode. Token types keep the checkpoint's number (9 in the published ones).

    Raises:
        ValueError: not a file of weights, not an EhrMamba (its keys do not fit; a Mamba-2 variant), or a finetuned
            model with one head a task.
        FileNotFoundError: no such file.
    """
    source = dict(checkpoint) if isinstance(checkpoint, Mapping) else _read_state_dict(Path(checkpoint))
    _check_kind(source)
    _check_duplicates(source)
    finetuned = "model.classifier.dense.weight" in source
    config = _infer_config(source, finetuned, config_overrides)
    state_dict, unused = _translate(source, finetuned)

    model_class = EhrMambaForSequenceClassification if finetuned else EhrMambaForCausalLM
    model = model_class(config)
    expected = model.state_dict()
    missing = sorted(expected.keys() - state_dict.keys())
    misshapen = sorted(
        f"{name} {list(state_dict[name].shape)}, expected {list(expected[name].shape)}"
        for name in expected.keys() & state_dict.keys()
        if state_dict[name].shape != expected[name].shape
    )
    unknown = sorted(state_dict.keys() - expected.keys())
    for problem, names in (("lacks", missing), ("has wrong shapes:", misshapen), ("holds unknown weights:", unknown)):
        if names:
            raise ValueError(
                f"The Odyssey checkpoint {problem} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} "
                f"({len(names)} in all, named as in {model_class.__name__}): it is incomplete or of another "
                "architecture."
            )
    if unused:
        logger.info(
            f"Odyssey weights that are copies of others or not read by the model, left out: {', '.join(unused)}"
        )
    model.load_state_dict(state_dict)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a .safetensors, .pt, .bin or .ckpt file of weights.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets in a foreign file
        raise ValueError(
            f"{path} is not a readable torch file of weights ({type(error).__name__}: {error}). A "
            "Lightning checkpoint with pickled objects must be reduced first: "
            'torch.save(torch.load(..., weights_only=False)["state_dict"], ...).'
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} holds {type(loaded).__name__}, expected a state dict: names mapped to tensors.")
    return dict(loaded)


def _check_kind(source: Mapping[str, Tensor]) -> None:
    """Tell what is not convertible apart, each with its own reason."""
    if f"{_BLOCK}dt_bias" in source:
        raise ValueError(
            "This Odyssey checkpoint is an EhrMamba2 (Mamba-2 mixers: mixer.dt_bias); only EhrMamba with Mamba-1 "
            "mixers (mixer.x_proj, mixer.dt_proj) can be converted."
        )
    heads = {name.split(".")[3] for name in source if name.startswith("model.classifier.classifiers.")}
    if heads:
        raise ValueError(
            f"This Odyssey checkpoint has {len(heads)} classification heads, one a task; EhrMamba here has "
            "one head for every prompted task. Convert a single-head (multi_head=False) checkpoint, or the pretrained "
            "one and finetune it."
        )
    if f"{_BLOCK}x_proj.weight" not in source:
        shown = ", ".join(sorted(source)[:3]) or "nothing"
        raise ValueError(f"Not an Odyssey EhrMamba state dict: no {_BLOCK}x_proj.weight among its keys ({shown} ...).")


def _embedding_prefix(source: Mapping[str, Tensor]) -> str:
    """Where the embedding layer is: a finetuned file holds it once or twice, as that of the model it started from."""
    return "embeddings." if "embeddings.word_embeddings.weight" in source else "pretrained_model.embeddings."


def _check_duplicates(source: Mapping[str, Tensor]) -> None:
    """A finetuned Odyssey model shares its weights with `pretrained_model`; if they differ, nobody knows which were
    trained.
    """
    for name, tensor in source.items():
        copy = source.get(f"pretrained_model.{name}")
        if copy is not None and not torch.equal(tensor, copy):
            raise ValueError(
                f"The Odyssey checkpoint holds {name} twice with different values (also as pretrained_model.{name}): "
                "it was put together from two models. Convert the state dict as Odyssey saved it."
            )


def _infer_config(source: Mapping[str, Tensor], finetuned: bool, overrides: dict[str, Any]) -> EhrMambaConfig:
    """All sizes from the shapes of the weights."""
    prefix = _embedding_prefix(source)

    def rows(name: str) -> int:
        if prefix + name not in source:
            raise ValueError(
                f"The Odyssey checkpoint lacks {prefix + name}: it is incomplete or of another architecture."
            )
        return source[prefix + name].shape[0]

    vocab_size = rows("word_embeddings.weight")
    hidden_size = source[prefix + "word_embeddings.weight"].shape[1]
    layers = {int(name.split(".")[3]) for name in source if name.startswith("model.backbone.layers.")}
    channels, state_size = source[f"{_BLOCK}A_log"].shape
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": max(layers) + 1,
        "state_size": state_size,
        "conv_kernel": source[f"{_BLOCK}conv1d.weight"].shape[-1],
        "expand": channels // hidden_size,
        "time_step_rank": source[f"{_BLOCK}dt_proj.weight"].shape[1],
        "use_bias": f"{_BLOCK}in_proj.bias" in source,
        "use_conv_bias": f"{_BLOCK}conv1d.bias" in source,
        "time_embeddings_size": source[prefix + "time_embeddings.w"].shape[1],
        "type_vocab_size": rows("token_type_embeddings.weight"),
        "max_num_visits": rows("visit_order_embeddings.weight"),
        "visit_segment_size": rows("visit_segment_embeddings.embedding.weight"),
    }
    if finetuned:
        fields["num_labels"] = source["model.classifier.out_proj.weight"].shape[0]
    return EhrMambaConfig(**{**fields, **overrides})


def _translate(source: Mapping[str, Tensor], finetuned: bool) -> tuple[dict[str, Tensor], list[str]]:
    """(weights under this package's names, names of the weights left out)."""
    prefix = _embedding_prefix(source)
    translated: dict[str, Tensor] = {}
    unused: list[str] = []
    for name, tensor in source.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            for theirs, ours in _EMBEDDING_NAMES.items():
                rest = ours + rest.removeprefix(theirs) if rest.startswith(theirs) else rest
            translated[f"model.embeddings.{rest}"] = tensor
        elif name == "model.backbone.embeddings.weight" or (finetuned and name.startswith("pretrained_model.")):
            unused.append(
                name
            )  # alias of the head, never an input; a finetuned file repeats the backbone it started from
        elif name.startswith("model.backbone."):
            translated[f"model.{name.removeprefix('model.backbone.')}"] = tensor
        elif name.startswith("model."):
            translated[name.removeprefix("model.")] = tensor  # lm_head, classifier
        else:
            translated[name] = tensor  # reported as unknown by the caller
    return translated, unused


__all__ = ["convert_odyssey_checkpoint"]

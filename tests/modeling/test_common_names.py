"""Every configuration understands the names that all models of transformers have, and refuses what contradicts them."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from ehrseq.hub.families import FAMILIES
from ehrseq.modeling.configuration_hymate import HyMaTEConfig

COMMON = {"vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 2}
MORE = {
    "ehrmamba": {"intermediate_size": 72},
    "cehrbert": {"intermediate_size": 72, **HEADS},
    "ehr_bigbird": {"intermediate_size": 72, **HEADS},
    "hymate": {"intermediate_size": 72, **HEADS},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_common_names_are_understood_and_survive_saving(model_type: str, tmp_path: Path) -> None:
    names = {**COMMON, **MORE.get(model_type, {})}
    config = AutoConfig.for_model(model_type, **names)
    assert {name: getattr(config, name) for name in names} == names
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in names} == names
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()


@pytest.mark.parametrize(
    ("names", "mamba", "attention"),
    [
        ({"num_hidden_layers": 2}, 1, 1),
        ({"num_hidden_layers": 1}, 0, 1),
        ({"num_hidden_layers": 5, "num_mamba_layers": 2}, 2, 3),
        ({"num_hidden_layers": 5, "num_attention_layers": 2}, 3, 2),
        ({"num_hidden_layers": 3, "num_mamba_layers": 2, "num_attention_layers": 1}, 2, 1),
    ],
)
def test_one_number_of_layers_is_shared_out_over_both_kinds(names: dict[str, int], mamba: int, attention: int) -> None:
    config = HyMaTEConfig(**names)
    assert (config.num_mamba_layers, config.num_attention_layers) == (mamba, attention)
    assert config.num_hidden_layers == names["num_hidden_layers"]


@pytest.mark.parametrize(
    ("model_type", "names", "message"),
    [
        ("hymate", {"num_hidden_layers": 2, "num_mamba_layers": 2, "num_attention_layers": 1}, "it is their sum"),
        ("hymate", {"num_hidden_layers": 2, "num_mamba_layers": 3}, "num_attention_layers=-1: it is their sum"),
        ("hymate", {"num_hidden_layers": 0}, "num_mamba_layers=-1"),
        ("hymate", {"num_hidden_layers": "2"}, "num_hidden_layers='2': expected an integer"),
        ("hymate", {"vocab_size": 12, "num_variables": 11}, "vocab_size=12 contradicts num_variables=11"),
        ("hymate", {"intermediate_size": 33}, "expected a multiple of hidden_size=32"),
        ("hymate", {"intermediate_size": 128, "feed_forward_expand": 2}, "feed_forward_expand=2, by which it would be"),
        ("ehrmamba", {"intermediate_size": 24, "hidden_size": 8, "expand": 2}, "contradicts expand=2, .* would be 16"),
        ("ehrmamba", {"intermediate_size": 20, "hidden_size": 8}, "expected a multiple of hidden_size=8"),
        ("ehrmamba", {"intermediate_size": 20, "hidden_size": "8"}, "hidden_size"),
    ],
)
def test_contradictions_are_refused(model_type: str, names: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=message):
        AutoConfig.for_model(model_type, **names)

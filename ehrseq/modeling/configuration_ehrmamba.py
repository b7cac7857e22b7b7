"""Configuration of the EhrMamba models."""

# No `from __future__ import annotations` here: `strict` leaves fields unchecked whose type is a string.
from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_ehr_events import INTERVAL_DAYS, EhrEventConfig
from .configuration_mamba_block import MambaBlockConfig, width_as_factors


@strict
class EhrMambaConfig(EhrEventConfig, MambaBlockConfig):
    r"""Configuration of `EhrMambaModel` and its heads; the defaults are the paper's model (arXiv:2405.14567).

    Keyword-only and strictly typed: a value of the wrong type or out of range raises an error that names the field.
    Vocabulary, width, embedding layer, tasks and classification head are the fields of `EhrEventConfig`. EhrMamba has
    no positional embedding, so nothing in the model enforces `max_position_embeddings`: tokenizers, training and
    generation read it. `generate` alone reads `token_type_runs` and `special_token_ids`; without an end token (the
    paper has none) it stops at its length limit.

    Args:
        num_hidden_layers: Number of Mamba blocks.
        use_cache: Whether the models without a classification head return their state outside training.
    """

    model_type = "ehrmamba"
    keys_to_ignore_at_inference = ["cache_params"]

    # Size (paper: 768 wide, 32 blocks, context 2048)
    num_hidden_layers: int = 32

    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.resolve_time_step_rank()
        super().__post_init__(**kwargs)

    @classmethod
    def from_common_names(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """`intermediate_size` gives `expand`."""
        return width_as_factors(arguments, cls.hidden_size, "expand")

    def _check_values(self) -> None:
        super()._check_values()
        self.check_positive("num_hidden_layers state_size conv_kernel expand time_step_rank")
        self.check_time_steps()


__all__ = ["INTERVAL_DAYS", "EhrMambaConfig"]

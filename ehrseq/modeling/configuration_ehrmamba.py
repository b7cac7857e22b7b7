"""Configuration of the EhrMamba models."""

# No `from __future__ import annotations` here: `strict` leaves fields unchecked whose type is a string.
import math
from itertools import pairwise
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
        time_edges: Edges in days of the bins in which the causal model's time head tells gaps between events
            (`ehr_time_head.py`, which has default ones); ascending, the first 0. None: it has no time head, as in the
            paper.
    """

    model_type = "ehrmamba"
    keys_to_ignore_at_inference = ["cache_params", "token_loss", "time_loss", "silence_loss"]

    # Size (paper: 768 wide, 32 blocks, context 2048)
    num_hidden_layers: int = 32

    use_cache: bool = True

    # Finer time than the paper's
    time_edges: list[float | int] | None = None

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
        edges = self.time_edges
        if edges is not None and (
            len(edges) < 2
            or edges[0] != 0
            or not all(math.isfinite(edge) for edge in edges)
            or any(low >= high for low, high in pairwise(edges))
        ):
            raise ValueError(
                f"time_edges={edges}: expected at least 2 finite numbers of days, ascending, the first 0.0 (such as "
                "DEFAULT_TIME_EDGES), or None for no time head."
            )


__all__ = ["INTERVAL_DAYS", "EhrMambaConfig"]

"""Configuration of the EhrMamba models."""

# No `from __future__ import annotations` here: `strict` leaves fields unchecked whose type is a string.
import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .configuration_ehr_events import INTERVAL_DAYS, EhrEventConfig


@strict
class EhrMambaConfig(EhrEventConfig):
    r"""Configuration of `EhrMambaModel` and its heads; the defaults are the paper's model (arXiv:2405.14567).

    Keyword-only and strictly typed: a value of the wrong type or out of range raises an error that names the field.
    Vocabulary, width, embedding layer, tasks and classification head are the fields of `EhrEventConfig`. EhrMamba has
    no positional embedding, so nothing in the model enforces `max_position_embeddings`: tokenizers, training and
    generation read it. `generate` alone reads `token_type_runs` and `special_token_ids`; without an end token (the
    paper has none) it stops at its length limit.

    Args:
        num_hidden_layers: Number of Mamba blocks.
        state_size: State dimensions per channel of the scan (N).
        conv_kernel: Taps of the causal convolution.
        expand: The mixer works on `expand * hidden_size` channels.
        time_step_rank: Rank of the step-size projection; "auto" is `ceil(hidden_size / 16)`.
        time_step_min, time_step_max, time_step_floor: Range of the step sizes at initialisation (log-uniform).
        use_bias: Bias in the mixer's input and output projection.
        use_conv_bias: Bias in the convolution.
        hidden_act: Activation after the convolution; only "silu" is supported, as in Mamba.
        layer_norm_epsilon: Epsilon of the RMS norms of the blocks.
        residual_in_fp32: Keep the residual stream in float32 when the weights are in half precision.

        initialization: "paper", or "history_first": the history of a row weighs as much as its last token from the
            first step on, where the paper's initialisation starts it a hundred times weaker. Small models that are
            trained for minutes learn several times faster from it; nothing is known yet about large ones.
        use_cache: Whether the models without a classification head return their state outside training.
    """

    model_type = "ehrmamba"
    keys_to_ignore_at_inference = ["cache_params"]

    # Size (paper: 768 wide, 32 blocks, context 2048)
    num_hidden_layers: int = 32

    # Mamba block (Gu & Dao 2023, arXiv:2312.00752)
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    time_step_rank: int | str = "auto"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: Literal["silu"] = "silu"
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True

    initialization: Literal["paper", "history_first"] = "paper"
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)

    def _check_values(self) -> None:
        super()._check_values()
        if not isinstance(self.time_step_rank, int):
            raise ValueError(f"time_step_rank={self.time_step_rank!r}: expected a positive integer or 'auto'.")
        self.check_positive("num_hidden_layers state_size conv_kernel expand time_step_rank")
        if not 0.0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"time_step_min={self.time_step_min}, time_step_max={self.time_step_max}: expected "
                "0 < time_step_min <= time_step_max."
            )

    @property
    def intermediate_size(self) -> int:
        """Channels inside a mixer."""
        return self.expand * self.hidden_size


__all__ = ["INTERVAL_DAYS", "EhrMambaConfig"]

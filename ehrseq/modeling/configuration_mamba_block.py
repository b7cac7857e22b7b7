"""What the configurations of models with Mamba blocks share."""

# No `from __future__ import annotations` here: `strict` leaves fields unchecked whose type is a string.
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal


@dataclass(kw_only=True, repr=False)
class MambaBlockConfig:
    """Base of configurations with Mamba blocks (Gu & Dao 2023, arXiv:2312.00752).

    Args:
        state_size: State dimensions per channel of the scan (N).
        conv_kernel: Taps of the causal convolution.
        expand: The mixer works on `expand * hidden_size` channels. `intermediate_size`, that number of channels, is
            understood in its place.
        time_step_rank: Rank of the step-size projection; "auto" is `ceil(hidden_size / 16)`.
        time_step_min, time_step_max, time_step_floor: Range of the step sizes at initialisation (log-uniform).
        use_bias: Bias in the mixer's input and output projection.
        use_conv_bias: Bias in the convolution.
        hidden_act: Activation after the convolution; only "silu" is supported, as in Mamba.
        initialization: "paper", or "history_first": the history of a row weighs as much as its last token from the
            first step on, where the paper's initialisation starts it a hundred times weaker. Small models that are
            trained for minutes learn several times faster from it; nothing is known yet about large ones.
        layer_norm_epsilon: Epsilon of the RMS norms of the blocks.
        residual_in_fp32: Keep the residual stream in float32 when the weights are in half precision.
    """

    if TYPE_CHECKING:
        hidden_size: int

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
    initialization: Literal["paper", "history_first"] = "paper"
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True

    @property
    def intermediate_size(self) -> int:
        """Channels inside a mixer."""
        return self.expand * self.hidden_size

    def resolve_time_step_rank(self) -> None:
        """Replace "auto" by its number.

        Raises:
            ValueError: It is another text.
        """
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        if not isinstance(self.time_step_rank, int):
            raise ValueError(f"time_step_rank={self.time_step_rank!r}: expected a positive integer or 'auto'.")

    def check_time_steps(self) -> None:
        """Raise a ValueError for step sizes that no initialisation could draw."""
        if not 0.0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"time_step_min={self.time_step_min}, time_step_max={self.time_step_max}: expected "
                "0 < time_step_min <= time_step_max."
            )


def width_as_factors(arguments: dict[str, Any], hidden_size: int, *factors: str) -> dict[str, Any]:
    """A config's arguments with `intermediate_size` replaced by these factors of the hidden size.

    Raises:
        ValueError: No multiple of the hidden size, or another factor than the one that was given as well.
    """
    arguments = dict(arguments)
    width, hidden_size = arguments.pop("intermediate_size", None), arguments.get("hidden_size", hidden_size)
    if width is None or not isinstance(hidden_size, int) or hidden_size < 1:  # the latter is the field's own error
        return arguments
    if not isinstance(width, int) or width < 1 or width % hidden_size:
        raise ValueError(f"intermediate_size={width!r}: expected a multiple of hidden_size={hidden_size}.")
    for factor in factors:
        if arguments.setdefault(factor, width // hidden_size) * hidden_size != width:
            raise ValueError(
                f"intermediate_size={width} contradicts {factor}={arguments[factor]}, by which it would be "
                f"{arguments[factor] * hidden_size}: give one of them."
            )
    return arguments


__all__ = ["MambaBlockConfig", "width_as_factors"]

"""One Mamba block: x + mixer(norm(x)), with padding, packing and a carried state.

The mixer is that of Gu & Dao 2023 (arXiv:2312.00752, figure 3); its weights are named as in `transformers`.

Glossary: b batch, l length (tokens), d hidden_size, e = expand * d channels inside the mixer, n state_size (N in the
paper), r time_step_rank, k conv_kernel. The state of a block is the pair (conv [b, e, k - 1], ssm [b, e, n]).
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .causal_conv import causal_conv1d
from .configuration_mamba_block import MambaBlockConfig
from .fast_linear import fast_linear, halves, is_bare, linear
from .fast_norm import rms_norm
from .selective_scan import selective_scan

BlockState = tuple[Tensor, Tensor]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class EhrMambaRMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 and returned in the dtype of the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[b, l, d] -> [b, l, d]."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Size and epsilon, for `print(model)`."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class CausalConv1d(nn.Module):
    """Weights of the depthwise causal convolution, in the layout of `nn.Conv1d`, and its call."""

    def __init__(self, channels: int, kernel: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(
        self, x: Tensor, initial_state: Tensor | None, starts: Tensor | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Convolution and SiLU of x [b, l, e], and the last k - 1 inputs of each row [b, e, k - 1] when asked for."""
        out = causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            initial_state=initial_state,
            reset_mask=starts,
            lengths=lengths,
            return_final_state=return_state,
        )
        return cast(tuple[Tensor, Tensor], out) if return_state else (cast(Tensor, out), None)


def step_sizes(projection: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Step sizes before softplus, and the part of the bias that is still to be added.

    The bias joins in float32, inside the scan, lest bfloat16 loses the input's small part. What a library has put in
    the projection's place adds it itself, in the dtype in which it computes.

    Args:
        projection: `nn.Linear` (r -> e), or what stands in its place.
        x: [b, l, r].

    Returns:
        (step sizes [b, l, e]; bias [e], or None where they hold it).
    """
    if is_bare(projection):
        return fast_linear(x, cast(Tensor, projection.weight)), at_least_float32(cast(Tensor, projection.bias))
    return linear(projection, x), None


class Selection(NamedTuple):
    """What a token chooses of the scan.

    Attributes:
        delta: Step sizes before bias and softplus, [b, l, e].
        B: Input projections, [b, l, n].
        C: Output projections, [b, l, n].
        delta_bias: What is added to the step sizes, [e]; None where they hold it.
    """

    delta: Tensor
    B: Tensor
    C: Tensor
    delta_bias: Tensor | None


class EhrMambaMixer(nn.Module):
    """Mamba's selective state-space mixer."""

    def __init__(self, config: MambaBlockConfig):
        super().__init__()
        self.config = config
        d, e, n, r = config.hidden_size, config.intermediate_size, config.state_size, int(config.time_step_rank)
        self.in_proj = nn.Linear(d, 2 * e, bias=config.use_bias)
        self.conv1d = CausalConv1d(e, config.conv_kernel, bias=config.use_conv_bias)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, e, bias=True)
        self.A_log = nn.Parameter(torch.empty(e, n))
        self.D = nn.Parameter(torch.empty(e))
        self.out_proj = nn.Linear(e, d, bias=config.use_bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the paper's training code does.

        `transformers` 5.23 draws Mamba's in_proj and x_proj from N(0, 0.1) instead; Kaiming-uniform is what EhrMamba
        was trained from. `transformers.initialization` leaves weights alone that were loaded from a checkpoint.
        """
        config = self.config
        for projection in (self.in_proj, self.x_proj, self.out_proj):
            init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
            if projection.bias is not None:
                init.zeros_(projection.bias)
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        if self.conv1d.bias is not None:
            init.zeros_(self.conv1d.bias)

        # S4D-real: A = -(1 .. n) in every channel.
        n = torch.arange(1, config.state_size + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, n.log().expand(self.A_log.shape))
        init.ones_(self.D)

        # The bias is the inverse softplus of a step size drawn log-uniformly from [time_step_min, time_step_max].
        bound = int(config.time_step_rank) ** -0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        step = torch.rand(self.dt_proj.bias.shape, device=self.dt_proj.bias.device) * (high - low) + low
        step = step.exp().clamp(min=config.time_step_floor)
        init.copy_(self.dt_proj.bias, step + torch.log(-torch.expm1(-step)))
        if config.initialization == "history_first":
            self._let_history_speak()

    def _let_history_speak(self) -> None:
        """Start with an output that is made of the history.

        In the paper's initialisation a past token reaches the output by the product of four small factors (step size,
        u, B, C), and D * u of the last token alone is some hundred times larger: at that scale a head that reads the
        last token first learns nothing about the rest. Here D starts at zero; biases in the convolution give u, and
        with it B and C, a part that all tokens share, so that the scan starts as a sum of the tokens over fading
        windows; B and C are larger.
        """
        r = int(self.config.time_step_rank)
        init.zeros_(self.D)
        if self.conv1d.bias is not None:
            init.uniform_(self.conv1d.bias, -1.0, 1.0)
        weight = torch.empty_like(self.x_proj.weight)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        weight[r:] *= 3.0
        init.copy_(self.x_proj.weight, weight)

    def forward(
        self,
        hidden_states: Tensor,
        state: BlockState | None = None,
        real: Tensor | None = None,
        starts: Tensor | None = None,
        lengths: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, BlockState | None]:
        """Mix along the length; arguments as in `EhrMambaBlock`."""
        initial_conv, initial_ssm = state if state is not None else (None, None)

        # 1. Input projection: the branch that is mixed, and its gate.
        x, z = self.project(hidden_states, real)  # [b, l, e] each

        # 2. Short causal convolution.
        u, conv_state = self.conv1d(x, initial_conv, starts, lengths, return_state)

        # 3. Input-dependent step size, B and C.
        selection = self.select(u, real)

        # 4. Selective scan, gated.
        y, ssm_state = self.scan(u, z, selection, initial_ssm, starts, return_state)

        # 5. Output projection.
        new_state = (conv_state, ssm_state) if conv_state is not None and ssm_state is not None else None
        return linear(self.out_proj, y), new_state

    def project(self, hidden_states: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The branch that is mixed, 0 at padding, and its gate, [b, l, e] each."""
        x, z = halves(self.in_proj, hidden_states)
        if real is not None:
            # a tap on left padding reads what stands before the first token: zero
            x = x.masked_fill(~real[..., None], 0.0)
        return x, z

    def select(self, u: Tensor, real: Tensor | None = None) -> Selection:
        """What the convolution's output u [b, l, e] chooses: step sizes, B and C."""
        r, n = int(self.config.time_step_rank), self.config.state_size
        low_rank_step, B, C = linear(self.x_proj, u).split([r, n, n], dim=-1)
        delta, delta_bias = step_sizes(self.dt_proj, low_rank_step)
        if real is not None:
            # step size exactly 0: nothing is added, the state held
            delta = delta.masked_fill(~real[..., None], float("-inf"))
        return Selection(delta, B, C, delta_bias)

    def scan(
        self,
        u: Tensor,
        z: Tensor,
        selection: Selection,
        initial_state: Tensor | None = None,
        starts: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The gated scan's output [b, l, e], and the state [b, e, n] after it when asked for."""
        out = selective_scan(
            u,
            selection.delta,
            -torch.exp(at_least_float32(self.A_log)),
            selection.B,
            selection.C,
            D=at_least_float32(self.D),
            z=z,
            delta_bias=selection.delta_bias,
            delta_softplus=True,
            initial_state=initial_state,
            reset_mask=starts,
            return_final_state=return_state,
        )
        return cast(tuple[Tensor, Tensor], out) if return_state else (cast(Tensor, out), None)


class EhrMambaBlock(GradientCheckpointingLayer):
    """Pre-norm residual block."""

    def __init__(self, config: MambaBlockConfig):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = EhrMambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = EhrMambaMixer(config)

    def forward(
        self,
        hidden_states: Tensor,
        state: BlockState | None = None,
        real: Tensor | None = None,
        starts: Tensor | None = None,
        lengths: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, BlockState | None]:
        """One block.

        Args:
            hidden_states: [b, l, d].
            state: State after the tokens before these; None at the start.
            real: bool [b, l], False at padding; None when there is none. Padding changes no state.
            starts: bool [b, l], True where a packed sequence starts: nothing flows over that edge.
            lengths: int64 [b], index of each row's last real token + 1; None without padding.
            return_state: Also return the state after each row's last real token.

        Returns:
            (hidden states [b, l, d], new state or None).
        """
        residual = at_least_float32(hidden_states) if self.residual_in_fp32 else hidden_states
        mixed, new_state = self.mixer(self.norm(hidden_states), state, real, starts, lengths, return_state)
        return residual + mixed, new_state


__all__ = ["BlockState", "EhrMambaBlock", "EhrMambaMixer", "EhrMambaRMSNorm", "Selection"]

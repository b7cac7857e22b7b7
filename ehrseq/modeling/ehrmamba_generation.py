"""Forecasting: `generate` with a recurrent state and a clock that moves with the generated tokens.

A generated token needs its channels before the model can read it. They follow from the end of the prompt and from the
tokens generated since: an interval token ([W_k], [M_k], [LT]) moves the clock by the middle of its interval, [VS]
opens the next visit (order + 1, other segment), every other token happens at the clock's time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.utils import logging

from .configuration_ehrmamba import INTERVAL_DAYS, EhrMambaConfig
from .ehrmamba_cache import EhrMambaCache

logger = logging.get_logger(__name__)

DAYS_PER_WEEK = 7.0
DAYS_PER_YEAR = 365.25
CLOCK_CHANNELS = ("token_type_ids", "times", "ages", "visit_orders", "visit_segments")


@dataclass
class GenerationClock:
    """Where a history stands after its last token, one value a row [b].

    Attributes:
        times: Weeks since the first timed event.
        ages: Years; 0 exactly = unknown, and stays 0.
        visit_orders: Order of the current or latest visit.
        visit_segments: Its segment: 1 or 2, 0 before the first visit.
    """

    times: Tensor
    ages: Tensor
    visit_orders: Tensor
    visit_segments: Tensor


def read_clock(config: EhrMambaConfig, input_ids: Tensor, channels: dict[str, Tensor], real: Tensor) -> GenerationClock:
    """The clock at the end of a prompt.

    Args:
        config: With `special_token_ids`.
        input_ids: [b, l].
        channels: `CLOCK_CHANNELS`, each [b, l].
        real: bool [b, l], False at padding.

    Returns:
        The channels of the last token inside a visit (segment above 0), moved on by the interval tokens after it; all
        0 where a row has had no visit yet.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    inside = real & (channels["visit_segments"] > 0)
    last = torch.where(inside, positions, -1).amax(1)  # [b]
    begun = last >= 0

    def at_last(name: str) -> Tensor:
        values = channels[name].gather(1, last.clamp(min=0)[:, None]).squeeze(1)
        return torch.where(begun, values, torch.zeros_like(values))

    days = interval_days(config, input_ids).masked_fill(~real | (positions <= last[:, None]), 0.0).sum(1)
    return GenerationClock(
        times=at_last("times").float() + days / DAYS_PER_WEEK,
        ages=_older(at_last("ages").float(), days),
        visit_orders=at_last("visit_orders"),
        visit_segments=at_last("visit_segments"),
    )


def advance(config: EhrMambaConfig, clock: GenerationClock, generated: Tensor) -> dict[str, Tensor]:
    """Channels of the tokens generated after a prompt.

    Args:
        config: With `special_token_ids` and `token_type_runs`.
        clock: At the end of the prompt.
        generated: Token ids, [b, g].

    Returns:
        `CLOCK_CHANNELS`, each [b, g]. As in the tokenizer's rows, an interval token has time, age and segment 0 and the
        order of the visit before it.
    """
    days = interval_days(config, generated)  # [b, g]
    elapsed = days.cumsum(1)
    visits = (generated == (config.special_token_ids or {})["[VS]"]).cumsum(1)
    orders = (clock.visit_orders[:, None] + visits).clamp(max=config.max_num_visits - 1)
    # Segments alternate 1, 2, 1 ...; a history without a visit (0) starts with 1, as if a 2 had come before.
    before = torch.where(clock.visit_segments == 0, 2, clock.visit_segments)[:, None]
    segments = torch.where(visits == 0, clock.visit_segments[:, None], (before - 1 + visits) % 2 + 1)
    interval = days > 0
    return {
        "token_type_ids": token_types(config, generated),
        "times": (clock.times[:, None] + elapsed / DAYS_PER_WEEK).masked_fill(interval, 0.0),
        "ages": _older(clock.ages[:, None], elapsed).masked_fill(interval, 0.0),
        "visit_orders": orders,
        "visit_segments": segments.masked_fill(interval, 0),
    }


def _older(ages: Tensor, days: Tensor) -> Tensor:
    """Ages in years some days later; an age of 0, which tokenizers give to patients without a birth date, stays 0."""
    return torch.where(ages == 0, 0.0, ages + days / DAYS_PER_YEAR)


def freeze(config: EhrMambaConfig, channels: dict[str, Tensor], real: Tensor, generated: Tensor) -> dict[str, Tensor]:
    """Channels of generated tokens where the specials are unknown: the prompt's last ones, types as far as known."""
    last = torch.where(real, torch.arange(real.shape[1], device=real.device), 0).amax(1)[:, None]  # [b, 1]
    frozen = {name: channels[name].gather(1, last).expand(generated.shape) for name in CLOCK_CHANNELS}
    return {**frozen, "token_type_ids": token_types(config, generated)}


def interval_days(config: EhrMambaConfig, input_ids: Tensor) -> Tensor:
    """Days that each token moves the clock by, float32, 0 for all but interval tokens: ids [b, l] -> [b, l]."""
    table = torch.zeros(config.vocab_size, dtype=torch.float32, device=input_ids.device)
    for token, days in INTERVAL_DAYS.items():
        if token in (config.special_token_ids or {}):
            table[config.special_token_ids[token]] = days  # type: ignore[index]
    return table[input_ids]


def token_types(config: EhrMambaConfig, input_ids: Tensor) -> Tensor:
    """Type of each token, 0 where the config does not know: ids [b, l] -> [b, l]."""
    types = config.token_types()
    if types is None:
        return torch.zeros_like(input_ids)
    return torch.tensor(types, device=input_ids.device)[input_ids]


class EhrMambaGenerationMixin(GenerationMixin):
    """`generate` for EHR channels; everything else is transformers' own (greedy, sampling, beam search, stopping
    criteria).

    The prompt's channels stay in the model kwargs at the prompt's length. Those of generated tokens are computed from
    the ids at each step, so a beam that is put in another place takes its clock along.
    """

    config: EhrMambaConfig

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own `EhrMambaCache`

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The step that sees every call of `generate` once, before its loop: check and complete the prompt."""
        if input_ids is None:
            raise ValueError("generate needs input_ids: the clock is read from the tokens.")
        config = self.config
        missing = [] if config.special_token_ids is None else {"[VS]", "[VE]"} - set(config.special_token_ids)
        if missing:
            raise ValueError(
                f"config.special_token_ids lacks {sorted(missing)}: call config.update_from_tokenizer(tokenizer)."
            )
        if config.special_token_ids is None:
            logger.warning_once(
                "config.special_token_ids is not set: the generated tokens keep the time, age, order and segment of "
                "the prompt's last token. Call config.update_from_tokenizer(tokenizer) for a clock that advances."
            )
        mask = model_kwargs.get("attention_mask")
        if mask is not None and bool((mask[:, -1] == 0).any()):
            raise ValueError(
                "generate: a prompt is padded on the right; pad prompts on the left (tokenizer.padding_side='left')."
            )
        if model_kwargs.get("segment_ids") is not None:
            raise ValueError("generate: prompts must not be packed (segment_ids); give one prompt a row.")
        for name in CLOCK_CHANNELS:
            if model_kwargs.get(name) is None:
                model_kwargs[name] = torch.zeros_like(
                    input_ids, dtype=torch.float32 if name in ("times", "ages") else None
                )
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size,
            is_encoder_decoder,
            input_ids,  # type: ignore[arg-type]
            **model_kwargs,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]  # the state's name is `cache_params`, as in Mamba
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache_params: EhrMambaCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of the next forward pass: with a state only the newest token, else everything."""
        prompt = {name: kwargs.pop(name) for name in CLOCK_CHANNELS}
        prompt_length = prompt["times"].shape[1]
        generated = input_ids[:, prompt_length:]
        channels = prompt
        if generated.shape[1] > 0:
            real = torch.ones_like(prompt["times"], dtype=torch.bool)
            if attention_mask is not None:
                past = (
                    attention_mask.shape[1] - input_ids.shape[1]
                )  # columns of an earlier call, when continuing a cache
                real = attention_mask[:, past : past + prompt_length].bool()
            if self.config.special_token_ids is None:
                new = freeze(self.config, prompt, real, generated)
            else:
                clock = read_clock(self.config, input_ids[:, :prompt_length], prompt, real)
                new = advance(self.config, clock, generated)
            channels = {
                name: torch.cat([prompt[name], new[name].to(prompt[name].dtype)], dim=1) for name in CLOCK_CHANNELS
            }
        inputs: dict[str, Any] = {"input_ids": input_ids, **channels}
        if use_cache and not is_first_iteration:
            inputs = {name: channel[:, -1:] for name, channel in inputs.items()}
            attention_mask = None
        kwargs = {name: value for name, value in kwargs.items() if name not in ("labels", "position_ids")}
        return {
            **inputs,
            "attention_mask": attention_mask,
            "cache_params": cache_params if use_cache else None,
            "use_cache": use_cache,
            **kwargs,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        """Take over the state, extend the mask; the prompt's channels stay as they are."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            new = mask.new_ones(mask.shape[0], num_new_tokens)
            model_kwargs["attention_mask"] = torch.cat([mask, new], dim=1)
        if outputs.cache_params is not None:
            model_kwargs["cache_params"] = outputs.cache_params
        return model_kwargs


__all__ = ["CLOCK_CHANNELS", "EhrMambaGenerationMixin", "GenerationClock", "advance", "freeze", "read_clock"]

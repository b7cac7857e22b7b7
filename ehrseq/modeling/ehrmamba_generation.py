"""`generate` with a recurrent state and a clock that moves with the generated tokens (see ehrmamba_clock.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.utils import logging

from .configuration_ehrmamba import EhrMambaConfig
from .ehr_embeddings import last_real_positions
from .ehrmamba_cache import EhrMambaCache
from .ehrmamba_clock import CLOCK_CHANNELS, TokenEffects, read_clock

logger = logging.get_logger(__name__)


class EhrMambaGenerationMixin(GenerationMixin):
    """`generate` for EHR channels; everything else is transformers' own (greedy, sampling, beam search, stopping
    criteria).

    The prompt's channels stay in the model kwargs at the prompt's length. The clock of generated tokens stands in the
    state, so that a beam that is put in another place takes it along; without a state, all their channels are made anew
    at each step, as all else is.
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
        generated = input_ids[:, prompt["times"].shape[1] :]
        channels = prompt
        if generated.shape[1] > 0:
            state = cache_params if use_cache and not is_first_iteration else None
            if generated.shape[1] > 1 and state is not None and state.clock is not None:
                new, state.clock = state.clock.step(generated[:, -1:])
            else:
                new = self._channels_after(input_ids, prompt, attention_mask, state)
            new = {name: channel.to(prompt[name].dtype) for name, channel in new.items()}
            channels = {name: torch.cat([prompt[name], new[name]], dim=1) for name in prompt} if state is None else new
        if use_cache and not is_first_iteration:
            input_ids = input_ids[:, -1:]
            channels = {name: channel[:, -1:] for name, channel in channels.items()}
            attention_mask = None
        kwargs = {name: value for name, value in kwargs.items() if name not in ("labels", "position_ids")}
        return {
            "input_ids": input_ids,
            **channels,
            "attention_mask": attention_mask,
            "cache_params": cache_params if use_cache else None,
            "use_cache": use_cache,
            **kwargs,
        }

    def _channels_after(
        self,
        input_ids: Tensor,
        prompt: Mapping[str, Tensor],
        attention_mask: Tensor | None,
        state: EhrMambaCache | None,
    ) -> dict[str, Tensor]:
        """`CLOCK_CHANNELS` of all generated tokens, [b, g]; a state that is given gets the clock after the first one.

        Where the specials are unknown they are those of the prompt's last token, types as far as known.
        """
        length = prompt["times"].shape[1]
        generated = input_ids[:, length:]
        real = torch.ones_like(prompt["times"], dtype=torch.bool)
        if attention_mask is not None:
            past = attention_mask.shape[1] - input_ids.shape[1]  # columns of an earlier call, when continuing a cache
            real = attention_mask[:, past : past + length].bool()
        effects = TokenEffects.of(self.config, input_ids.device)
        if self.config.special_token_ids is None:
            last = last_real_positions(real)[:, None]
            frozen = {name: channel.gather(1, last).expand(generated.shape) for name, channel in prompt.items()}
            return {**frozen, "token_type_ids": effects.types[generated]}
        clock = read_clock(effects, input_ids[:, :length], prompt, real)
        if state is None:
            return clock.follow(generated)
        channels, state.clock = clock.step(generated)
        return channels

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


__all__ = ["EhrMambaGenerationMixin"]

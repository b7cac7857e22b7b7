"""From a prompt to the start of its trajectories: the record is checked, read once, and its clock told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .ehr_time_head import waiting_weights
from .ehr_trajectories import ForecastPrompt
from .ehrmamba_cache import EhrMambaCache
from .ehrmamba_clock import CLOCK_CHANNELS, TokenEffects, read_clock
from .fast_linear import linear

if TYPE_CHECKING:
    from .modeling_ehrmamba import EhrMambaForCausalLM


@dataclass(frozen=True)
class RecordEnd:
    """Where a record stands after its last token.

    Attributes:
        key: Of the prompt.
        elapsed_days: From its last event to the prediction time.
        state: Of the model, one row.
        hidden: Of the last token, [d].
        logits: Of the next one, float32 [V].
        waiting: By what each next token's probability is multiplied, since nothing happened in the elapsed days,
            float64 [V].
        weeks: Time of its last event.
        age: Then, years; 0 = unknown.
        order: Visit order.
        segment: Visit segment, 0 before the first visit.
        last_time: `times` of its last token, weeks.
        inside_visit: Whether a visit is open.
    """

    key: int
    elapsed_days: float
    state: EhrMambaCache
    hidden: Tensor
    logits: Tensor
    waiting: np.ndarray
    weeks: float
    age: float
    order: int
    segment: int
    last_time: float
    inside_visit: bool


@torch.no_grad()
def read_record(model: EhrMambaForCausalLM, effects: TokenEffects, prompt: ForecastPrompt) -> RecordEnd:
    """Read a record, alone and unpadded, so that nothing depends on what is read beside it.

    Args:
        model: In evaluation mode.
        effects: Of its vocabulary, on the CPU.
        prompt: Checked here.

    Raises:
        ValueError: The prompt is none of a single unpadded record.
    """
    device = model.lm_head.weight.device
    ids = prompt.inputs["input_ids"]
    channels = {name: prompt.inputs.get(name) for name in CLOCK_CHANNELS}
    given = {
        name: torch.zeros(ids.shape, dtype=torch.float32 if name in ("times", "ages") else torch.int64)
        if channel is None
        else channel.cpu()
        for name, channel in channels.items()
    }
    clock = read_clock(effects, ids.cpu(), given, torch.ones(ids.shape, dtype=torch.bool))
    outputs = model.model(
        input_ids=ids.to(device), **{name: channel.to(device) for name, channel in given.items()}, use_cache=True
    )
    hidden = outputs.last_hidden_state[:, -1]
    specials = model.config.special_token_ids or {}
    # After [VS], where whole records are begun, nothing of the visit has happened: its first event comes at once.
    outside = int(ids[0, -1]) in {specials.get(token) for token in ("[VS]", "[VE]", "[REG]")}
    inside_visit = not outside and int(given["visit_segments"][0, -1]) > 0
    words = model.model.embeddings.word_embeddings.weight
    waiting = waiting_weights(model.config, model.time_head, words, hidden[0], float(prompt.elapsed_days), inside_visit)
    return RecordEnd(
        key=prompt.key,
        elapsed_days=float(prompt.elapsed_days),
        state=outputs.cache_params,
        hidden=hidden[0],
        logits=linear(model.lm_head, hidden)[0].float(),
        waiting=waiting.cpu().numpy(),
        weeks=float(clock.times[0]),
        age=float(clock.ages[0]),
        order=int(clock.visit_orders[0]),
        segment=int(clock.visit_segments[0]),
        last_time=float(given["times"][0, -1]),
        inside_visit=inside_visit,
    )


__all__ = ["RecordEnd", "read_record"]

"""What comes next for a patient: trajectories drawn from a model of next tokens, and probabilities that they give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from .ehr_trajectories import ForecastPrompt, OutcomeTokens, PatientTrajectories, TrajectoryRequest
from .record_forecasts import RecordForecast, TokenRecord, forecast_records
from .trajectory_checks import check_trajectory_request, prompts_of_batch
from .trajectory_engine import DEFAULT_SLOTS, TrajectoryEngine

if TYPE_CHECKING:
    from .modeling_ehrmamba import EhrMambaForCausalLM


class EhrMambaForecastMixin:
    """Trajectories and forecasts of `EhrMambaForCausalLM`."""

    def trajectories(
        self,
        prompts: Iterable[ForecastPrompt],
        request: TrajectoryRequest,
        *,
        slots: int | None = None,
        progress: bool = False,
    ) -> Iterator[PatientTrajectories]:
        """Draw futures of patients.

        Each record is read once and its state copied for every trajectory; all go on together, and one that ended makes
        room for the next. The same request gives the same bytes on one machine whatever the number of slots and
        threads, the other prompts and their order, and in however many calls (`request.first`).

        Args:
            prompts: Records, taken one after the other as they are needed: memory does not grow with their number.
            request: What is drawn.
            slots: Trajectories at once, by default 64. More need more memory, and cost less each on a wide machine.
            progress: Show a bar of patients.

        Yields:
            The trajectories of each prompt, in the prompts' order.

        Raises:
            ValueError: A request that cannot be drawn from this model, at once; a prompt that is none, when its turn
                comes.
        """
        model = cast("EhrMambaForCausalLM", self)
        if model.training:
            raise ValueError(
                "the model is in training mode, its dropout would be part of the future: call model.eval()."
            )
        if slots is not None and (isinstance(slots, bool) or not isinstance(slots, int) or slots < 1):
            raise ValueError(f"slots got {slots!r}; expected an integer of at least 1, or None.")
        if not isinstance(request, TrajectoryRequest):
            raise ValueError(f"request got {type(request).__name__}; expected a TrajectoryRequest.")
        _check_iterable("prompts", prompts, "a list of ForecastPrompt")
        check_trajectory_request(model.config, request)
        return _drawn(model, prompts, request, DEFAULT_SLOTS if slots is None else slots, progress)

    def forecast(
        self,
        records: Iterable[TokenRecord] | Mapping[str, Tensor],
        *,
        outcomes: Mapping[str, Sequence[int]] | Iterable[Any] = (),
        elapsed_days: float | Sequence[float] = 0.0,
        keys: Sequence[int] | None = None,
        **request: Any,
    ) -> Iterator[RecordForecast]:
        """Foretell outcomes of records, with their errors.

            records = [tokenizer.forecast_prompt(patient)]
            asked = tokenizer.forecast_question("30d", {"death": "death"})
            model.forecast(records, horizon_days=30, outcomes=asked.outcomes, death_ids=asked.death_ids)

        Args:
            records: From `EhrTokenizer.forecast_prompt`, read as they are needed; or a batch of its channels, [b, l],
                padded on either side.
            outcomes: `OutcomeTokens`, or name -> token ids: an outcome happens when the first of its tokens comes.
            elapsed_days: Of a batch: days from each record's last event to the prediction time.
            keys: Of a batch: what tells the random numbers of its rows apart, by default their place.
            **request: As of `record_forecasts.forecast_records`.

        Returns:
            The forecast of each record, in order.

        Raises:
            ValueError: See there; a packed batch.
        """
        if isinstance(records, Mapping):
            records = prompts_of_batch(records, elapsed_days, keys)
        elif elapsed_days != 0.0 or keys is not None:
            raise ValueError("elapsed_days and keys are those of a batch's rows; records have their own.")
        _check_iterable("records", records, "a list of EhrTokenizer.forecast_prompt(patient)")
        _check_iterable("outcomes", outcomes, "a mapping of name -> token ids, or OutcomeTokens")
        if isinstance(outcomes, Mapping):
            outcomes = [OutcomeTokens(name, _sorted_ids(name, ids)) for name, ids in outcomes.items()]
        outcomes = list(outcomes)
        if unknown := [each for each in outcomes if not hasattr(each, "ids")]:
            raise ValueError(
                f"outcomes holds {unknown[0]!r}; expected a mapping of name -> token ids, or OutcomeTokens."
            )
        for name in ("grid_days", "death_ids", "until_ids"):
            _check_iterable(name, request.get(name, ()), "a tuple of numbers")
        return forecast_records(self, records, outcomes=outcomes, **request)


@torch.no_grad()
def _drawn(
    model: EhrMambaForCausalLM,
    prompts: Iterable[ForecastPrompt],
    request: TrajectoryRequest,
    slots: int,
    progress: bool,
) -> Iterator[PatientTrajectories]:
    """The generator behind `trajectories`, whose arguments are checked before it is first asked."""
    total = len(prompts) if isinstance(prompts, Sized) else None
    with logging.tqdm(total=total, unit="patient", disable=not progress) as bar:
        engine = TrajectoryEngine(model, request, slots)
        for patient in engine.run(prompts):
            yield patient
            bar.update()


def _check_iterable(name: str, value: object, expected: str) -> None:
    """Refuse what cannot be gone through, or is gone through letter by letter."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{name} got {value!r}; expected {expected}.")


def _sorted_ids(name: str, ids: Any) -> np.ndarray:
    """Ids of an outcome, ascending, each once."""
    values = np.asarray(ids)
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"the outcome {name!r} is {ids!r}; expected token ids.")
    return np.unique(values.astype(np.int64))


__all__ = ["EhrMambaForecastMixin"]

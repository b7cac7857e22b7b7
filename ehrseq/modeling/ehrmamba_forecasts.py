"""What comes next for a patient: trajectories drawn from a model of next tokens, and probabilities that they give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from .ehr_trajectories import Estimator, ForecastPrompt, OutcomeTokens, PatientTrajectories, TrajectoryRequest
from .outcome_estimates import OutcomeEstimate, estimate_outcomes, estimate_to_error
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
        check_trajectory_request(model.config, request)
        return _drawn(model, prompts, request, DEFAULT_SLOTS if slots is None else slots, progress)

    def forecast(
        self,
        inputs: Mapping[str, Tensor] | Iterable[ForecastPrompt],
        *,
        outcomes: Mapping[str, Sequence[int]] | Sequence[OutcomeTokens],
        horizon_days: float,
        num: int = 32,
        estimator: Estimator = "reach",
        seed: int = 0,
        standard_error: float | None = None,
        max_num: int = 4096,
        elapsed_days: float | Sequence[float] = 0.0,
        keys: Sequence[int] | None = None,
        slots: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[list[OutcomeEstimate]]:
        """How probable outcomes are within a horizon.

        Args:
            inputs: A batch of the tokenizer's channels, [b, l], padded on either side, or prompts.
            outcomes: Name -> token ids of an outcome, which happens when the first of them comes; or `OutcomeTokens`.
            horizon_days: How far ahead.
            num: Trajectories a patient (for "reach": and outcome).
            estimator: "monte_carlo", "scope" or "reach", see `PatientTrajectories`.
            seed: Of the random numbers.
            standard_error: Draw until each outcome is known to this error, `num` in the first round.
            max_num: At most so many trajectories a patient then.
            elapsed_days: Of a batch: days from each record's last event to the prediction time.
            keys: Of a batch: what tells the random numbers of its rows apart, by default their place.
            slots: As in `trajectories`.
            progress: As in `trajectories`.
            options: Further fields of `TrajectoryRequest`, such as `grid_days` and `death_ids`.

        Returns:
            For each row or prompt one estimate an outcome.

        Raises:
            ValueError: As `trajectories`; or an option that a request does not have.
        """
        unknown = sorted(set(options) - set(TrajectoryRequest.__dataclass_fields__))
        if unknown:
            fields = sorted(TrajectoryRequest.__dataclass_fields__)
            raise ValueError(f"forecast got unknown options {unknown}; expected fields of a request: {fields}.")
        named = (
            tuple(OutcomeTokens(name, _sorted_ids(name, ids)) for name, ids in outcomes.items())
            if isinstance(outcomes, Mapping)
            else tuple(outcomes)
        )
        if not named:
            raise ValueError("no outcome is asked for; name at least one, like {'death': death_ids}.")
        request = TrajectoryRequest(
            horizon_days=horizon_days, num=num, seed=seed, outcomes=named, estimator=estimator, **options
        )
        if isinstance(inputs, Mapping):
            prompts: Iterable[ForecastPrompt] = prompts_of_batch(inputs, elapsed_days, keys)
        else:
            prompts = inputs

        def draw(some: Iterable[ForecastPrompt], asked: TrajectoryRequest) -> Iterator[PatientTrajectories]:
            return self.trajectories(some, asked, slots=slots, progress=progress)

        if standard_error is not None:
            return estimate_to_error(draw, prompts, request, standard_error=standard_error, max_num=max_num)
        return [estimate_outcomes(drawn, request) for drawn in draw(prompts, request)]


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


def _sorted_ids(name: str, ids: Any) -> np.ndarray:
    """Ids of an outcome, ascending, each once."""
    values = np.asarray(ids)
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"the outcome {name!r} is {ids!r}; expected token ids.")
    return np.unique(values.astype(np.int64))


__all__ = ["EhrMambaForecastMixin"]

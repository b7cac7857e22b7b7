"""What comes next for a patient: trajectories drawn from the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .ehr_trajectories import ForecastPrompt, PatientTrajectories, TrajectoryRequest
from .trajectory_engine import DEFAULT_SLOTS, TrajectoryEngine


class EhrMambaForecastMixin:
    """Trajectories and forecasts of `EhrMambaForCausalLM`."""

    @torch.no_grad()
    def trajectories(
        self,
        prompts: Iterable[ForecastPrompt],
        request: TrajectoryRequest,
        *,
        slots: int | None = None,
        progress: bool = False,
    ) -> Iterator[PatientTrajectories]:
        """Draw futures of patients.

        Args:
            prompts: Records, read one after the other as they are needed.
            request: What is drawn.
            slots: Trajectories at once; what is drawn does not depend on it.
            progress: Show a bar of patients.

        Yields:
            The trajectories of each prompt, in the prompts' order.
        """
        engine = TrajectoryEngine(self, request, DEFAULT_SLOTS if slots is None else slots)  # type: ignore[arg-type]
        yield from engine.run(prompts)


__all__ = ["EhrMambaForecastMixin"]

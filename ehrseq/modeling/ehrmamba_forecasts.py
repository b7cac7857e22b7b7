"""What comes next for a patient: trajectories drawn from the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .ehr_trajectories import ForecastPrompt, PatientTrajectories, TrajectoryRequest
from .record_forecasts import RecordForecast, TokenRecord, forecast_records
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

    def forecast(self, records: Iterable[TokenRecord], **request: Any) -> Iterator[RecordForecast]:
        """Foretell outcomes of records, with their errors.

            records = [tokenizer.forecast_prompt(patient)]
            asked = tokenizer.forecast_question("30d", {"death": "death"})
            model.forecast(records, horizon_days=30, outcomes=asked.outcomes, death_ids=asked.death_ids)

        Args:
            records: From `EhrTokenizer.forecast_prompt`; read as they are needed.
            **request: As of `record_forecasts.forecast_records`.

        Returns:
            The forecast of each record, in order.

        Raises:
            ValueError: See there.
        """
        return forecast_records(self, records, **request)


__all__ = ["EhrMambaForecastMixin"]

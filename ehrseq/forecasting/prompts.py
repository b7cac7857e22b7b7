"""From tables of patients to the records that a model continues, and what it is asked about them.

A patient's record is cut at each of its prediction times by the tokenizer's one-patient path, as the pipeline does it:
reading is a small part of what its futures cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from ehrseq.data.schema import LABEL_KEYS
from ehrseq.forecasting.task_forecast import TaskForecast
from ehrseq.forecasting.task_outcomes import task_outcome
from ehrseq.hub.checkpoints import checkpoint_digest, load_parts
from ehrseq.modeling.ehr_trajectories import ESTIMATORS, Estimator, OutcomeTokens
from ehrseq.pipelines.ehr_forecast import EhrForecastPipeline
from ehrseq.tasks.moments import last_times

if TYPE_CHECKING:
    from ehrseq.tokenization.ehr_forecast_prompts import RecordToForecast
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer


@dataclass(frozen=True)
class ForecastSettings:
    """How forecasts are made, the same for all patients of a call.

    Attributes:
        num: Trajectories a record; of "reach" a record and outcome.
        estimator: "reach", "scope" or "monte_carlo".
        standard_error: Draw more, beginning with `num`, until every error is at most this; None = `num` settles it.
        seed: Of the random numbers.
        steps: Steps up to the horizon at which the cumulative incidence is told; 0 = none.
        trajectories: Keep `num` ordinary trajectories a record.
    """

    num: int = 32
    estimator: Estimator = "reach"
    standard_error: float | None = None
    seed: int = 0
    steps: int = 0
    trajectories: bool = False


def load_forecaster(checkpoint: str | Path) -> EhrForecastPipeline:
    """Load a pretrained event model with its tokenizer, as the pipeline that checks both.

    Args:
        checkpoint: Folder that `save_checkpoint` wrote, or `owner/name` on the Hub.

    Raises:
        ValueError: A checkpoint without a trained forecasting head, of another family, or with another's tokenizer.
        OSError: There is none.
    """
    model, tokenizer, _ = load_parts(str(checkpoint), "AutoModelForPreTraining")
    if model.config.model_type == "hymate":
        raise ValueError(
            f"{checkpoint} reads stays and foretells values, no events: use forecast_stays, or "
            'pipeline("ehr-forecast").'
        )
    return EhrForecastPipeline(model=model, tokenizer=tokenizer, device="cpu")


@lru_cache(maxsize=1)
def kept_forecaster(checkpoint: str, digest: str) -> EhrForecastPipeline:
    """`load_forecaster`, once for many calls of a worker; loaded again where its files have changed (the digest)."""
    return load_forecaster(checkpoint)


def has_time_head(forecaster: EhrForecastPipeline) -> bool:
    """Whether the model has a time of its own for the events of a visit."""
    return getattr(forecaster.model, "time_head", None) is not None


def read_asked(
    forecaster: EhrForecastPipeline,
    tasks: Sequence[str | Path] = (),
    outcomes: Mapping[str, Any] | None = None,
    *,
    horizon: Any = None,
    until: Any = None,
) -> tuple[TaskForecast, ...]:
    """What is asked for: tasks with their own horizon, and outcomes with a common one.

    Args:
        forecaster: From `load_forecaster`.
        tasks: Names of packaged tasks, or YAML files of ours or of ACES.
        outcomes: Name -> what stands for it (`ehr_outcomes.py`); with neither, death and any admission.
        horizon: Of the outcomes, such as "30d", which is the default.
        until: Of the outcomes, as of the pipeline.

    Raises:
        ValueError: What cannot be forecast, two of the same name, or a horizon where there are only tasks.
    """
    tokenizer = cast("EhrTokenizer", forecaster.tokenizer)
    time_head = has_time_head(forecaster)
    asked = [task_outcome(task, tokenizer.vocabulary, time_head=time_head) for task in tasks]
    if outcomes or not tasks:
        question = tokenizer.forecast_question(
            "30d" if horizon is None else horizon, outcomes or None, until=until, time_head=time_head
        )
        general = [
            note for note in question.notes if not any(note.startswith(f"{o.name}: ") for o in question.outcomes)
        ]
        asked += [
            TaskForecast(
                name=outcome.name,
                horizon_days=question.horizon_days,
                outcome=OutcomeTokens(outcome.name, outcome.ids, outcome.complement),
                until_ids=question.until_ids,
                death_ids=question.death_ids,
                needs_time_head=False,
                moments="at any time",
                notes=(*general, *outcome.notes),
            )
            for outcome in question.outcomes
        ]
    elif horizon is not None or until is not None:
        raise ValueError("a task has its own horizon and end; horizon and until are those of outcomes.")
    names = [each.name for each in asked]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice} are asked for twice; give each outcome a name of its own.")
    return tuple(replace(each, outcome=replace(each.outcome, name=each.name)) for each in asked)


def groups_of(asked: Sequence[TaskForecast], *, apart: bool) -> list[list[TaskForecast]]:
    """Questions that one set of trajectories answers: of the same horizon and end, complements by themselves.

    Args:
        asked: The questions.
        apart: Whether each has times of its own.
    """

    def key(each: TaskForecast) -> tuple[Any, ...]:
        own = each.name if apart else ""
        return each.horizon_days, each.until_ids, each.death_ids, each.outcome.complement, own

    return [list(group) for _, group in groupby(sorted(asked, key=key), key=key)]


def check_forecast_settings(
    forecaster: EhrForecastPipeline, asked: Sequence[TaskForecast], settings: ForecastSettings
) -> None:
    """Refuse what cannot be drawn, before anybody is read.

    Raises:
        ValueError: See above.
    """
    if settings.estimator not in ESTIMATORS:
        raise ValueError(f"estimator got {settings.estimator!r}; expected one of {list(ESTIMATORS)}.")
    if isinstance(settings.seed, bool) or not isinstance(settings.seed, int):
        raise ValueError(f"seed got {settings.seed!r}; expected a whole number.")
    for group in groups_of(asked, apart=False):
        draw(forecaster, [], group, settings)


def draw(
    forecaster: EhrForecastPipeline,
    records: Sequence[RecordToForecast],
    group: Sequence[TaskForecast],
    settings: ForecastSettings,
) -> Iterator[Any]:
    """The forecasts of records for questions of one group."""
    first = group[0]
    steps = 0 if first.outcome.complement else settings.steps
    horizon = first.horizon_days
    model: Any = forecaster.model
    forecasts: Iterator[Any] = model.forecast(
        records,
        horizon_days=horizon,
        outcomes=[each.outcome for each in group],
        num=settings.num,
        estimator=settings.estimator,
        seed=settings.seed,
        grid_days=(*(step * horizon / steps for step in range(1, steps)), horizon) if steps else (),
        death_ids=first.death_ids,
        until_ids=first.until_ids,
        standard_error=settings.standard_error,
    )
    return forecasts


def draw_futures(
    forecaster: EhrForecastPipeline,
    records: Sequence[RecordToForecast],
    asked: Sequence[TaskForecast],
    settings: ForecastSettings,
) -> Iterator[Any]:
    """Ordinary trajectories of records, up to the longest horizon that is asked for, whatever comes."""
    model: Any = forecaster.model
    forecasts: Iterator[Any] = model.forecast(
        records,
        horizon_days=max(each.horizon_days for each in asked),
        num=settings.num,
        seed=settings.seed,
        death_ids=asked[0].death_ids,
        keep_tokens=True,
    )
    return forecasts


def moments_here(events: pl.DataFrame, moments: pl.DataFrame | None, names: Sequence[str]) -> pl.DataFrame:
    """subject_id and prediction_time of some questions about these patients, in order.

    Args:
        events: Event table of whole patients.
        moments: subject_id, prediction_time, task; None = the end of each record.
        names: The questions.
    """
    if moments is None:
        times = last_times(events)
    else:
        here = pl.col("task").is_in(list(names)) & pl.col("subject_id").is_in(events["subject_id"].unique().implode())
        times = moments.filter(here).select(LABEL_KEYS).unique()
    return times.select(LABEL_KEYS).sort(LABEL_KEYS)


def records_at(
    forecaster: EhrForecastPipeline, events: pl.DataFrame, times: pl.DataFrame
) -> Iterator[tuple[int, Any, RecordToForecast]]:
    """(subject_id, prediction_time, record) of each time, in order; a patient's rows are taken up once."""
    tokenizer = cast("EhrTokenizer", forecaster.tokenizer)
    context = getattr(forecaster.model.config, "max_position_embeddings", None)
    wanted = events.filter(pl.col("subject_id").is_in(times["subject_id"].unique().implode()))
    of_subject = wanted.partition_by("subject_id", as_dict=True, include_key=False)
    for subject, group in groupby(times.iter_rows(), key=lambda row: row[0]):
        patient = {"subject_id": subject, "events": of_subject[(subject,)].to_dicts()}
        for _, time in group:
            yield subject, time, tokenizer.forecast_prompt(patient, time, context)


def asked_digest(asked: Sequence[TaskForecast], checkpoint: str | Path) -> str:
    """What decides the answers beside the settings: the tokens that are looked for, and the model."""
    said = [
        (each.name, each.horizon_days, each.outcome.ids.tolist(), each.outcome.complement, each.until_ids)
        for each in asked
    ]
    return hashlib.sha256(f"{checkpoint_digest(checkpoint)}{said}".encode()).hexdigest()

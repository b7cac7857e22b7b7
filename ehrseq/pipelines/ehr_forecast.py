"""`pipeline("ehr-forecast")`: what comes next for a patient.

Of an event model (EhrMamba) the futures of a patient are drawn, token by token, from the record as it stands at the
prediction time; probabilities of outcomes, with their errors, and the most likely events are read off them. Of a model
of stays (HyMaTE) the values of its variables are foretold, each with an interval (`stay_forecasts.py`).
"""

import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, cast, runtime_checkable

import torch
from transformers.pipelines import base as pipelines_base  # by way of its package: threads may import that, too
from transformers.utils import logging

from .forecast_answers import next_events, outcome_answers, trajectory_answers, words_of_counts
from .patient_inputs import check_rows_at_once, is_fhir, patient_from_fhir
from .stay_forecasts import StayForecaster

logger = logging.get_logger(__name__)

BATCH_SIZE = 16
"""Patients whose futures are drawn together."""

_OF_EVENTS = ("horizon", "outcomes", "n", "estimator", "seed", "until", "grid", "trajectories", "standard_error")
_OF_STAYS = ("alpha",)
_OF_BOTH = ("prediction_time", "max_length")
_STAYS = "hymate"


@runtime_checkable
class _ForecastTokenizer(Protocol):
    """A tokenizer whose records a model can continue (`EhrTokenizer`)."""

    all_special_ids: list[int]
    forecast_reasons: Mapping[str, str]
    token_types: list[int]

    def forecast_prompt(self, patient: Any, prediction_time: Any, max_length: int | None) -> Any: ...

    def forecast_question(self, horizon: Any, outcomes: Any, **more: Any) -> Any: ...

    def token_meanings(self) -> Mapping[int, Any]: ...


class EhrForecastPipeline(pipelines_base.Pipeline):
    """Forecasts of a pretrained model.

    Args:
        model: `EhrMambaForCausalLM`, or `HyMaTEForPreTraining`.
        tokenizer: Tokenizer of the checkpoint, for event models.
        feature_extractor: Feature extractor of the checkpoint, for models of stays.
        horizon: How far ahead, such as "30d" or "48h"; up to ten years. Default "30d".
        outcomes: Name -> codes (`{"icu": "ICU_ADMISSION//*"}`), words ("death", "any_admission"), unions, or limits of
            a value (`{"code": "LAB//...", "above": 5.5}`); a code or a list of codes. Default: death and any admission.
        n: Trajectories a patient and outcome, 32 by default.
        estimator: "reach" (default), "scope" or "monte_carlo".
        standard_error: Draw more, from n on, until every error is at most this.
        seed: Of the random numbers; 0 by default.
        until: "visit_end", or what may stand for an outcome: what comes after it does not count.
        grid: Durations, or a number of steps up to the horizon, at which the cumulative `incidence` is told.
        trajectories: Give n trajectories as well.
        alpha: Models of stays: share of values that may lie outside their intervals, 0.1 by default.
        prediction_time: What is known after this time is not read; by default each patient's own `prediction_time`,
            else the end of the record.
        max_length: Context length in tokens, the model's by default; the most recent events are kept.
        batch_size: Patients whose futures are drawn together, 16 by default. It changes no answer.
        device, dtype: As in every pipeline of transformers.

    Example:
        ```python
        import ehrseq  # registers the task
        from transformers import pipeline

        forecast = pipeline("ehr-forecast", model="my-pretrained-checkpoint")
        forecast({"subject_id": 1, "events": [{"time": "2150-03-01T08:00", "code": "DIAGNOSIS//ICD10CM//I10"}]})
        # {"outcomes": [{"outcome": "death", "probability": 0.01, "standard_error": 0.005, "horizon": "30d"}, ...],
        #  "next": [{"code": "VISIT_START//AMB", "probability": 0.4, "time": "2150-03-12T09:10:00"}, ...]}
        ```
    """

    # Both optional for transformers, exactly one for us: `__init__` holds the rule and says what is missing.
    _load_tokenizer = None
    _load_feature_extractor = None
    _load_image_processor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_processor = False  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_rows_at_once(kwargs.get("batch_size"))
        super().__init__(*args, **kwargs)
        self._reasons: Counter[str] = Counter()  # of this call's patients without a forecast
        self._cut = 0  # patients of this call with trajectories that were cut at the longest length
        self._stays: StayForecaster | None = None
        if self._reads_stays:
            self._stays = StayForecaster(self.model, self.feature_extractor, alpha=self._settings().get("alpha", 0.1))
        else:
            self._check_event_model()

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Forecast one patient or many.

        Args:
            inputs: A patient (a dict of `subject_id`, `events` and optionally `prediction_time`; a table of one
                subject's rows; a FHIR R4 Bundle as a dict, where `ehrseq` is installed), a list of them, or a
                generator or dataset of them, which is read block by block.
            **kwargs: For this call, see the class.

        Returns:
            For one patient a dict, for a list a list of dicts, for a generator or dataset an iterable of them.

            `outcomes`: a list of `{"outcome", "probability", "standard_error", "horizon"}`, with a grid also
            `incidence`, a list of `{"days", "probability", "standard_error"}`. `next`: the events that most of n
            trajectories hold, `{"code", "probability", "time"}` with the median time of the first one. With
            `trajectories` a list of n lists of `{"time", "code"}`, a value told by the range of its bin (`low`,
            `high`, `unit`). Where there is nothing to forecast (the patient is dead), probabilities are None, and
            `reason` says why.

            Models of stays give `values` in the place of `next`, see `StayForecaster.answer`.

        Raises:
            ValueError: An unknown argument, an unreadable patient, a horizon, outcome, estimator or number that cannot
                be used.
        """
        batch_size = kwargs.pop("batch_size", None)
        check_rows_at_once(batch_size)
        settings = self._settings(**kwargs)
        question = None
        if self._stays is None:
            question = self._ask(settings)
        elif "alpha" in settings:
            self._stays.check_alpha(settings["alpha"])
        if notice := getattr(self.model.config, "notice", None):
            logger.warning(notice)
        self._reasons.clear()
        self._cut = 0
        size = batch_size or getattr(self, "_batch_size", None) or BATCH_SIZE
        if _is_one(inputs):
            (answer,) = self._answers(iter([inputs]), question, settings, size)
            return answer
        answers = self._answers(iter(inputs), question, settings, size)
        if isinstance(inputs, list | tuple):
            return list(answers)
        return answers

    def _answers(
        self, patients: Iterator[Any], question: Any, settings: Mapping[str, Any], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """Block after block, and what has to be said behind the last."""
        while block := list(islice(patients, batch_size)):
            records = [self.preprocess(patient, **_subset(settings, _OF_BOTH)) for patient in block]
            with self.device_placement(), torch.inference_mode():
                outputs = self._forward(records, question=question, settings=settings)
            for output in outputs:
                yield self.postprocess(output, question=question, settings=settings)
        self._warn_at_the_end()

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        given.pop("local_files_only", None)  # the factory's own, handed through
        known = (*(_OF_STAYS if self._reads_stays else _OF_EVENTS), *_OF_BOTH)
        unknown = sorted(given.keys() - set(known))
        if unknown:
            kind = "a model of stays" if self._reads_stays else "an event model"
            raise ValueError(
                f"Unknown argument(s) {unknown} for pipeline('ehr-forecast') of {kind}: it takes {', '.join(known)} "
                f"and batch_size."
            )
        return given, {}, {}

    def _settings(self, **given: Any) -> dict[str, Any]:
        """The arguments of a call over those of the pipeline."""
        asked, _, _ = self._sanitize_parameters(**given)
        kept: dict[str, Any] = {**self._preprocess_params, **asked}
        return kept

    def _ask(self, settings: Mapping[str, Any]) -> Any:
        """The question of a call, and a warning where its answer is to another one."""
        question = self._tokenizer.forecast_question(
            settings.get("horizon", "30d"),
            settings.get("outcomes"),
            grid=settings.get("grid"),
            until=settings.get("until"),
            time_head=getattr(self.model, "time_head", None) is not None,
        )
        if question.notes:
            logger.warning(f"What is forecast differs from what is asked: {'; '.join(question.notes)}.")
        self._draw([], question, settings)  # refuses what cannot be drawn, before anybody is read
        return question

    def _draw(self, records: Iterable[Any], question: Any, settings: Mapping[str, Any]) -> Iterator[Any]:
        model: Any = self.model
        num = settings.get("n", 32)
        if isinstance(num, bool) or not isinstance(num, int) or num < 1:
            raise ValueError(f"n got {num!r}; expected at least 1 trajectory a patient, like 32.")
        forecasts: Iterator[Any] = model.forecast(
            records,
            horizon_days=question.horizon_days,
            outcomes=question.outcomes,
            num=num,
            estimator=settings.get("estimator", "reach"),
            seed=settings.get("seed", 0),
            grid_days=question.grid_days,
            death_ids=question.death_ids,
            until_ids=question.until_ids,
            standard_error=settings.get("standard_error"),
            keep_tokens=True,
        )
        return forecasts

    # One patient -> a record, or a row of a model of stays.
    def preprocess(self, patient: Any, prediction_time: Any = None, max_length: int | None = None) -> Any:  # type: ignore[override]
        """What the model continues."""
        if is_fhir(patient):
            patient = patient_from_fhir(patient)
        if self._stays is not None:
            return self._stays.rows(patient, prediction_time, max_length)
        context = max_length
        if context is None:
            context = getattr(self.model.config, "max_position_embeddings", None)
        return self._tokenizer.forecast_prompt(patient, prediction_time, context)

    # Records -> their forecasts, None where there is nothing to forecast.
    def _forward(self, records: Any, question: Any = None, settings: Any = None) -> Any:  # type: ignore[override]
        if self._stays is None:
            drawn = self._draw((record for record in records if record.reason is None), question, settings)
            return [(record, next(drawn) if record.reason is None else None) for record in records]
        outputs = []
        for row in records:
            stay = row.pop("stay")
            model: Any = self.model
            channels = {name: channel.to(self.device) for name, channel in row.items()}
            outputs.append((stay, model(**channels).predictions))
        return outputs

    # A forecast -> the answer.
    def postprocess(self, output: Any, question: Any = None, settings: Any = None) -> dict[str, Any]:  # type: ignore[override]
        """The answer for one patient, see `__call__`."""
        if self._stays is not None:
            stay, predictions = output
            answer = self._stays.answer(predictions, stay, alpha=settings.get("alpha"))
            self._reasons[answer.get("reason", "")] += "reason" in answer
            return answer
        record, forecast = output
        if forecast is None:
            self._reasons[record.reason] += 1
            nothing = {"outcomes": outcome_answers(question, []), "next": [], "reason": record.reason}
            return {**nothing, "trajectories": []} if settings.get("trajectories") else nothing
        self._cut += any(estimate.cut for estimate in forecast.estimates)
        meanings, at = self._meanings, record.prediction_time
        answer = {
            "outcomes": outcome_answers(question, forecast.estimates),
            "next": next_events(forecast.trajectories, meanings, at, self._unknown),
        }
        if settings.get("trajectories"):
            answer["trajectories"] = trajectory_answers(forecast.trajectories, meanings, at)
        return answer

    def _warn_at_the_end(self) -> None:
        """One line a call for whom no forecast is given, and for trajectories that were too long."""
        reasons = +self._reasons
        if reasons:
            words = self._tokenizer.forecast_reasons if self._stays is None else self._stays.reasons
            logger.warning(f"No forecast for some patients, see their 'reason': {words_of_counts(reasons, words)}.")
        if self._cut:
            logger.warning(
                f"{self._cut} patients have trajectories that were cut at the longest length, before the horizon: what "
                "would have come is not counted. Ask for a shorter horizon."
            )

    @property
    def _reads_stays(self) -> bool:
        return bool(self.model.config.model_type == _STAYS)

    @property
    def _tokenizer(self) -> _ForecastTokenizer:
        return cast(_ForecastTokenizer, self.tokenizer)

    def _check_event_model(self) -> None:
        """Refuse a model that foretells nothing, and a tokenizer that is not its own."""
        model: Any = self.model
        name = getattr(model.config, "name_or_path", "") or type(model).__name__
        if not hasattr(model, "forecast"):
            raise ValueError(
                f"{name} is a {type(model).__name__}, which has no forecasting head: pipeline('ehr-forecast') needs a "
                f"pretrained EhrMambaForCausalLM or HyMaTEForPreTraining."
            )
        if untrained := model.untrained_weights():
            raise ValueError(
                f"{name} lacks {untrained}, which were drawn at random: it was saved by another class than "
                f"{type(model).__name__} (finetuned on outcomes?). Give the pretrained checkpoint."
            )
        if self.tokenizer is None:
            raise ValueError(
                f"The checkpoint {name} has no tokenizer, and its vocabulary cannot be guessed. Save the one it was "
                f"trained with into the same folder (tokenizer.save_pretrained(folder)), or give it: "
                f"pipeline('ehr-forecast', model=..., tokenizer=...)."
            )
        if not isinstance(self.tokenizer, _ForecastTokenizer):
            raise ValueError(
                f"The tokenizer of {name} was loaded as {type(self.tokenizer).__name__}, which reads no patients for a "
                f"forecast. Import ehrseq first, or pass trust_remote_code=True to use the checkpoint's own tokenizer."
            )
        _check_vocabulary(name, model.config, self._tokenizer)
        self._meanings = self._tokenizer.token_meanings()
        self._unknown = next(number for number, meaning in self._meanings.items() if meaning.code == "[UNK]")


def _check_vocabulary(name: str, config: Any, tokenizer: _ForecastTokenizer) -> None:
    """Refuse a tokenizer whose ids mean other tokens, as far as the config tells."""
    types = tokenizer.token_types
    if len(types) != config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(types)} tokens, and {name} {config.vocab_size}: it is another model's. Give the "
            f"one that the model was trained with."
        )
    runs = config.token_type_runs
    own = [list(run) for run in _runs(types)]
    if runs is None or [list(run) for run in runs] != own:
        raise ValueError(
            f"The tokenizer's tokens are of other kinds than those that {name} was trained on "
            f"(config.token_type_runs): it is another model's. Give the one that the model was trained with."
        )


def _runs(types: list[int]) -> Iterator[tuple[int, int]]:
    """(first id, type) of each run of one type."""
    for number, token_type in enumerate(types):
        if number == 0 or token_type != types[number - 1]:
            yield number, token_type


def _is_one(inputs: Any) -> bool:
    """Whether these are no several patients: a dict, or a table."""
    if isinstance(inputs, list | tuple | types.GeneratorType | Iterator):
        return False
    return (
        isinstance(inputs, Mapping) or _is_table(inputs) or not hasattr(inputs, "__iter__") or isinstance(inputs, str)
    )


def _is_table(inputs: Any) -> bool:
    """Whether it is a table of events (polars, pyarrow, pandas) and no dataset of patients."""
    names = getattr(inputs, "columns", None) if not hasattr(inputs, "column_names") else inputs.column_names
    try:
        return names is not None and "code" in list(names)
    except TypeError:
        return False


def _subset(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}

"""`pipeline("ehr-risk")`: from one patient's record to a risk per task.

A classifier of this package has one head and reads the question from the prompt: the task's token stands in the
sequence. So one patient and one task make one row of the model, and a patient with six tasks makes six. transformers
calls such a pipeline a chunk pipeline: rows are batched over patients and tasks alike, and gathered again per patient.
"""

import math
import types
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from transformers.pipelines import base as pipelines_base  # by way of its package: threads may import that, too
from transformers.utils import logging

from .patient_inputs import check_rows_at_once, is_fhir, nothing_is_known, patient_from_fhir, subject_of
from .risk_explanations import explain_rows, method_asked_for, rows_to_explain

logger = logging.get_logger(__name__)


@runtime_checkable
class _Encoder(Protocol):
    """What reads patients, and knows why a task cannot be asked about one."""

    task_reasons: Mapping[str, str]
    unanswerable_reasons: Collection[str]

    def reasons_against(
        self, patient: Any, tasks: Sequence[Mapping[str, Any]], prediction_time: Any
    ) -> list[str | None]: ...


@runtime_checkable
class _PromptTokenizer(_Encoder, Protocol):
    """A tokenizer of patients (`EhrTokenizer`): one row for each question."""

    all_special_ids: list[int]

    @property
    def task_tokens(self) -> Mapping[str, str]: ...

    def encode_prompts(
        self, patient: Any, tasks: Sequence[str], prediction_time: Any, max_length: int | None
    ) -> list[Mapping[str, Any]]: ...


class _StayEncoder(_Encoder, Protocol):
    """A feature extractor of patients (`HyMaTEFeatureExtractor`): one row for all questions."""

    def __call__(self, patient: Any, *, prediction_time: Any, max_length: int | None) -> Mapping[str, Any]: ...


@runtime_checkable
class _RiskModel(Protocol):
    """A classifier whose class 1 is the positive outcome."""

    config: Any

    def __call__(self, **inputs: Tensor) -> Any: ...

    def risk_scores(self, logits: Tensor, task_ids: Tensor | None = None) -> Tensor: ...

    def untrained_weights(self) -> list[str]: ...


class EhrRiskPipeline(pipelines_base.ChunkPipeline):
    """Risks of the tasks that a prompted classifier was trained for.

    A task is learnt at one kind of moment (a discharge, 24 hours after an admission) of patients for whom the answer is
    open. Where it is asked outside of that, the answer carries a fourth key "reason", and the call ends in one warning
    with the counts. `score` is then None where nothing is left to foretell (the patient is dead, the diagnosis is
    recorded already, a stay that is over), and given, to be read with care, where the moment is another one. The rules
    are those of tokenizer and feature extractor alike (`ehr_anchors.py`), as far as `config.tasks` holds them under
    "asked"; that the dead have no risk needs no entry there.

    Args:
        model: A model for sequence classification with `config.tasks` and `risk_scores(logits, task_ids)`.
        tokenizer: Tokenizer of the checkpoint. Exactly one of `tokenizer` and `feature_extractor` is needed.
        feature_extractor: Feature extractor of the checkpoint, for models that read triplets.
        tasks: Names of the tasks to score, all of them by default.
        prediction_time: What is known after this time is not read; by default each patient's own `prediction_time`,
            else the end of the record.
        max_length: Context length in tokens, the model's by default; the most recent events are kept.
        batch_size: Rows in one forward pass. A row is one (patient, task) pair.
        explain: True, or the name of a method (`ehrseq.interpretability.methods_of(model)`; without the package
            "prefix_deltas" alone): each score comes with its `baseline` and `contributions`.
        device, dtype, num_workers: As in every pipeline of transformers.

    Example:
        ```python
        import ehrseq  # registers the task
        from transformers import pipeline

        risk = pipeline("ehr-risk", model="my-checkpoint")
        risk({"subject_id": 1, "events": [{"time": "2150-03-01T08:00", "code": "DIAGNOSIS//ICD10CM//I10"}]})
        # [{"task": "mortality_30d", "label": "death within 30 days", "score": 0.04}, ...]
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
        self._outside: Counter[tuple[str, str]] = Counter()  # (reason, task) of this call's answers
        self.encoder = self._check_encoder()
        self._task_ids = self._check_model()

    @property
    def _classifier(self) -> _RiskModel:
        return cast(_RiskModel, self.model)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Score one patient or many.

        Args:
            inputs: A patient (a dict of `subject_id`, `events` and optionally `prediction_time`; a table of one
                subject's rows; a FHIR R4 Bundle as a dict, where `ehrseq` is installed), a list of them, or a
                generator or dataset of them, which is scored as it is read.
            **kwargs: `tasks`, `prediction_time`, `max_length`, `explain` and `batch_size` for this call.

        Returns:
            For one patient a list of `{"task", "label", "score"}`, for a list a list of such lists, for a generator or
            dataset an iterable of them. `label` is the task's positive outcome and `score` its probability, or None
            with a `reason`, see above. With `explain` each score has a `baseline` (log-odds), `contributions`, a list
            of `{"time", "code", "value", "contribution"}`, and where it is not 0 a `remainder`: together they are the
            log-odds of the score. Contributions of what is no event have a code such as "[VS]", or None (time that
            passes after the last event).

        Raises:
            ValueError: An unknown task, an unreadable patient, a `batch_size` below 1, a method that the model does not
                have or that needs the package.
        """
        check_rows_at_once(kwargs.get("batch_size"))
        if notice := getattr(self.model.config, "notice", None):
            logger.warning(notice)
        # transformers looks into the first element of a list, so an empty one has to be answered here.
        if isinstance(inputs, list | tuple) and not inputs:
            self._sanitize_parameters(**{name: kwargs[name] for name in kwargs.keys() - {"batch_size", "num_workers"}})
            return []
        if isinstance(inputs, list | tuple):
            inputs = list(inputs)
        elif isinstance(inputs, Iterator) and not isinstance(inputs, types.GeneratorType):
            inputs = (patient for patient in inputs)
        self._outside.clear()
        answers = super().__call__(inputs, **kwargs)  # type: ignore[no-untyped-call]
        if not isinstance(answers, list):
            return self._to_the_end(answers)
        self._warn_of_answers_outside()
        return answers

    def _to_the_end(self, answers: Iterable[Any]) -> Iterator[Any]:
        """Answers that are read one by one, and the warning behind the last."""
        yield from answers
        self._warn_of_answers_outside()

    def _sanitize_parameters(
        self,
        tasks: Any = None,
        prediction_time: Any = None,
        max_length: int | None = None,
        explain: Any = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown.pop("local_files_only", None)  # the factory's own, handed through
        if unknown:
            raise ValueError(
                f"Unknown argument(s) {sorted(unknown)} for pipeline('ehr-risk'): it takes tasks, prediction_time, "
                f"max_length, explain, batch_size and num_workers."
            )
        preprocess: dict[str, Any] = {}
        if tasks is not None:
            preprocess["tasks"] = self._select(tasks)
        if prediction_time is not None:
            preprocess["prediction_time"] = prediction_time
        if max_length is not None:
            preprocess["max_length"] = max_length
        if explain is not None:
            encoder = self.tokenizer if self.tokenizer is not None else self.feature_extractor
            preprocess["method"] = method_asked_for(self.model, encoder, explain)
        return preprocess, {}, {}

    # One patient -> one row per task.
    def preprocess(  # type: ignore[override]
        self,
        patient: Any,
        tasks: list[str] | None = None,
        prediction_time: Any = None,
        max_length: int | None = None,
        method: str | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield the model's inputs, one row `[1, length]` per task."""
        if is_fhir(patient):
            patient = patient_from_fhir(patient)
        names = tasks or list(self._task_ids)
        context = max_length
        if context is None:
            context = getattr(self.model.config, "max_position_embeddings", None)
        encoder = self.encoder
        if isinstance(encoder, _PromptTokenizer):
            rows = encoder.encode_prompts(patient, names, prediction_time, context)
            if words := nothing_is_known(encoder.all_special_ids, patient, rows[0]):
                logger.warning(words)
        else:  # triplets carry no prompt: every task reads the same row
            rows = [encoder(patient, prediction_time=prediction_time, max_length=context)] * len(names)
        entries = [self._classifier.config.tasks[self._task_ids[name]] for name in names]
        reasons = encoder.reasons_against(patient, entries, prediction_time)
        to_explain: Sequence[Any] = [None] * len(names)
        if method is not None:
            to_explain = rows_to_explain(encoder, method, patient, names, prediction_time, context)
        for name, row, reason, explained in zip(names, rows, reasons, to_explain, strict=True):
            yield {
                **{channel: _as_batch(values) for channel, values in row.items()},
                "task_ids": torch.tensor([self._task_ids[name]]),
                "subject_id": subject_of(patient),
                "reason": reason or "",
                "to_explain": None if reason and reason in encoder.unanswerable_reasons else explained,
                "is_last": name == names[-1],
            }

    # A batch of rows -> a probability for each.
    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        metadata = {name: model_inputs.pop(name) for name in ("subject_id", "reason", "is_last")}
        to_explain = model_inputs.pop("to_explain")
        task_ids = model_inputs["task_ids"]
        logits = self._classifier(**model_inputs).logits
        scores = self._classifier.risk_scores(logits, task_ids)
        rows = to_explain if isinstance(to_explain, list) else [to_explain]
        explained: Any = [None] * len(rows)
        if any(row is not None for row in rows):
            explained = explain_rows(self.model, self.encoder, model_inputs, logits, rows)
        if rows is not to_explain:  # a batch of one is none to transformers
            explained = explained[0]
        return {"scores": scores.float(), "task_ids": task_ids, "explained": explained, **metadata}

    # The rows of one patient -> the answer.
    def postprocess(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:  # type: ignore[override]
        """One `{"task", "label", "score"}` per row, in the order in which the tasks were asked for."""
        answers: list[dict[str, Any]] = []
        for row in rows:
            task = self.model.config.tasks[int(row["task_ids"])]
            score = float(row["scores"])
            if not math.isfinite(score):
                raise ValueError(
                    f"The model gives {score} as the risk of {task['name']} for subject {row['subject_id']}: its "
                    f"weights are damaged, or overflow in {self.dtype}. Load it again, or with dtype='float32'."
                )
            label = task.get("positive_label") or task["name"]  # only the name is mandatory in config.tasks
            answers.append({"task": task["name"], "label": label, "score": score})
            if reason := row["reason"]:
                self._outside[reason, task["name"]] += 1
                answers[-1]["reason"] = reason
                if reason in self.encoder.unanswerable_reasons:
                    answers[-1]["score"] = None
            if row["explained"] is not None:
                answers[-1] |= row["explained"]
        return answers

    def _warn_of_answers_outside(self) -> None:
        """One line a call for the answers to questions that the model was not trained for."""
        if not self._outside:
            return
        parts = []
        for reason, words in self.encoder.task_reasons.items():
            by_task = {task: count for (why, task), count in self._outside.items() if why == reason}
            if by_task:
                score = "no score" if reason in self.encoder.unanswerable_reasons else "scored all the same"
                tasks = ", ".join(f"{task} {count}" for task, count in by_task.items())
                parts.append(f"{words} ({score}): {tasks}")
        logger.warning(f"Risks asked for where the task does not apply, see their 'reason': {'; '.join(parts)}.")

    def _check_encoder(self) -> _PromptTokenizer | _StayEncoder:
        """The one encoder of this checkpoint, or an error that says what is missing."""
        where = getattr(self.model.config, "name_or_path", "") or type(self.model).__name__
        encoders = [part for part in (self.tokenizer, self.feature_extractor) if part is not None]
        if not encoders:
            raise ValueError(
                f"The checkpoint {where} has neither a tokenizer nor a feature extractor, and its vocabulary cannot be "
                f"guessed. Save the one it was trained with into the same folder (tokenizer.save_pretrained(folder)), "
                f"or give it: pipeline('ehr-risk', model=..., tokenizer=...)."
            )
        if len(encoders) > 1:
            raise ValueError(
                f"pipeline('ehr-risk') needs exactly one of tokenizer and feature extractor, got "
                f"{' and '.join(type(part).__name__ for part in encoders)}."
            )
        if self.tokenizer is not None and not isinstance(self.tokenizer, _PromptTokenizer):
            raise ValueError(
                f"The tokenizer of {where} was loaded as {type(self.tokenizer).__name__}, which reads text and no "
                f"patients. Import ehrseq first, or pass trust_remote_code=True to use the checkpoint's own tokenizer."
            )
        if self.feature_extractor is not None and not isinstance(self.feature_extractor, _Encoder):
            raise ValueError(
                f"The feature extractor of {where} was loaded as {type(self.feature_extractor).__name__}, which cannot "
                f"say whether a task can be asked about a patient. Import ehrseq first, or pass trust_remote_code=True "
                f"to use the checkpoint's own."
            )
        return cast("_PromptTokenizer | _StayEncoder", encoders[0])

    def _check_model(self) -> dict[str, int]:
        """Task name -> its index in `config.tasks`, which is what `task_ids` means."""
        model: object = self.model
        tasks = getattr(self.model.config, "tasks", None)
        name = type(model).__name__
        if not tasks:
            raise ValueError(
                f"config.tasks of this {name} is empty, so it is not known what its logits stand for. Finetune it on "
                f"tasks, or set config.tasks (name, token, horizon, definition, positive_label of each)."
            )
        if not isinstance(model, _RiskModel):
            raise ValueError(
                f"{name} has no risk_scores(logits, task_ids) and untrained_weights(): pipeline('ehr-risk') needs a "
                f"risk classifier."
            )
        untrained = model.untrained_weights()
        if untrained:
            raise ValueError(
                f"The checkpoint {model.config.name_or_path} lacks {untrained}, which were drawn at random: it "
                f"was saved by another class than {name} (a pretrained model?). Finetune it, or give a finetuned one."
            )
        known = self.encoder.task_tokens if isinstance(self.encoder, _PromptTokenizer) else None
        unknown = [task["name"] for task in tasks if known is not None and task["name"] not in known]
        if unknown:
            raise ValueError(
                f"The tokenizer has no token for {unknown}, which the model's config lists: this tokenizer (tasks "
                f"{sorted(known or ())}) is not the one that the model was trained with."
            )
        return {task["name"]: index for index, task in enumerate(tasks)}

    def _select(self, tasks: Any) -> list[str]:
        """The asked-for tasks as a list without repetition."""
        if not isinstance(tasks, str | list | tuple | set):
            raise ValueError(f"tasks got {tasks!r} ({type(tasks).__name__}); expected the name of a task, or a list.")
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        # `_sanitize_parameters` runs inside the base's __init__ as well, before `_task_ids` is there.
        known = [task["name"] for task in getattr(self.model.config, "tasks", None) or []]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"Unknown task(s) {unknown}: this model was trained for {known}.")
        if not names:
            raise ValueError(f"tasks is empty: name at least one of {known}, or leave it out for all of them.")
        return list(dict.fromkeys(names))


def _as_batch(values: Any) -> torch.Tensor:
    """`[1, length]`, whether or not the encoder made a batch of the single patient."""
    tensor = torch.as_tensor(values)
    return tensor if tensor.ndim > 1 else tensor.unsqueeze(0)

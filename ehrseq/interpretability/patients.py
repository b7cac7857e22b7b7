"""Explanations of the patients of an event table: who is asked, when, and what the model's answers rest on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from ehrseq.batches.readable_stays import readable_stays
from ehrseq.data.schema import EVENT_COLUMNS, LABEL_KEYS
from ehrseq.interpretability.explanation import Explanation
from ehrseq.interpretability.methods import choose_method, default_method
from ehrseq.interpretability.questions import read_question
from ehrseq.tasks.moments import last_times, moments_of_all

if TYPE_CHECKING:
    from ehrseq.hub.checkpoints import Checkpoint
    from ehrseq.interpretability.attention_weights import AttentionWeights
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor


@dataclass(frozen=True)
class Ways:
    """How answers are explained.

    Attributes:
        tasks: Names of tasks.
        methods: Names of methods.
        settings: Method -> its settings.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What was found of one patient at one time and for one task.

    Attributes:
        record: The patient's events, in the order in which they were explained.
        explanations: One for each method that explains.
        weights: Weights of each of the other methods, by name.
        reason: Why the patient cannot be read at all then; else None.
        moment: subject_id, prediction_time, task.
    """

    record: pl.DataFrame
    explanations: list[Explanation]
    weights: dict[str, AttentionWeights]
    reason: str | None
    moment: tuple[int, Any, str]


def ways_of(
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    methods: Sequence[str] | str | None,
    settings: Mapping[str, Mapping[str, Any]] | None,
    *,
    weights: bool,
) -> Ways:
    """The ways that were asked for, checked.

    Args:
        checkpoint: What is explained.
        tasks: Names of tasks.
        methods: Names of methods; None = the model's recommended one.
        settings: Method -> its settings.
        weights: Whether methods that show weights (attentions) are of use.

    Raises:
        ValueError: A method that the model lacks, or that is not wanted, or named twice; settings of another method.
    """
    names = [methods] if isinstance(methods, str) else list(methods or [default_method(checkpoint.model)])
    if len(set(names)) < len(names):
        raise ValueError(f"methods got {names}; name each once.")
    for name in names:
        if not choose_method(checkpoint.model, name).explains and not weights:
            raise ValueError(
                f"{name} shows weights, which are no contributions: they are for the page of a patient (subjects=...)."
            )
    chosen = dict(settings or {})
    foreign = sorted(set(chosen) - set(names))
    if foreign:
        raise ValueError(f"settings got those of {foreign}; the methods are {names}.")
    for name, own in chosen.items():
        known = list(signature(choose_method(checkpoint.model, name).load()).parameters)[1:]
        unknown = sorted(set(own) - set(known))
        if unknown:
            raise ValueError(f"{name} has no setting {unknown}; it has {known}.")
    return Ways(tuple(tasks), tuple(names), {name: dict(chosen.get(name, {})) for name in names})


def explain_events(
    checkpoint: Checkpoint,
    events: pl.DataFrame,
    moments: pl.DataFrame | None,
    ways: Ways,
    notes: Counter[str],
    displays: Mapping[str, str] | None = None,
) -> Iterator[Answer]:
    """Explain what a model answers about an event table's patients.

    Args:
        checkpoint: A finetuned model and its encoder.
        events: Event table of whole patients.
        moments: subject_id, prediction_time, task; None = all tasks where each record, or each stay, ends.
        ways: How.
        notes: Counts what was left out or is to be read with care.
        displays: Code -> description.

    Yields:
        An answer for each moment, by subject and time.

    Raises:
        ValueError: A setting that a method lacks, or what `read_question` refuses.
    """
    unreadable: dict[tuple[int, Any], str] = {}
    if "input_ids" not in checkpoint.encoder.model_input_names:
        extractor = cast("HyMaTEFeatureExtractor", checkpoint.encoder)
        stays = readable_stays(events, extractor, moments, notes, is_part=True).answers
        if moments is None:
            moments = moments_of_all(stays.select(LABEL_KEYS), ways.tasks)
        unread = stays.filter(pl.col("reason").is_not_null())
        unreadable = {(subject, at): why for subject, at, why in unread.select(*LABEL_KEYS, "reason").iter_rows()}
    elif moments is None:
        times = last_times(events)
        notes["patients without a timed event, not explained"] += events["subject_id"].n_unique() - times.height
        moments = moments_of_all(times, ways.tasks)
    moments = moments.filter(pl.col("task").is_in(list(ways.tasks))).sort(LABEL_KEYS, maintain_order=True)
    columns = [name for name in EVENT_COLUMNS if name in events.columns]
    records = {key[0]: record for key, record in events.select(columns).group_by("subject_id", maintain_order=True)}
    counted: tuple[int, Any] | None = None
    for subject, at, task in moments.select(*LABEL_KEYS, "task").iter_rows():
        record = records[subject]
        reason = unreadable.get((subject, at))
        if reason is not None:
            yield Answer(record, [], {}, reason, (subject, at, task))
            continue
        question = read_question(checkpoint, {"subject_id": subject, "events": record.to_dicts()}, task, at)
        if counted != (subject, at):  # the rows of all tasks are cut alike
            counted = subject, at
            notes.update(question.notes)
        explanations, weights = [], {}
        for name in ways.methods:
            method = choose_method(checkpoint.model, name)
            found = method.load()(question, **ways.settings[name])
            if method.explains:
                explanations.append(found.named(displays) if displays else found)
                notes.update({word: count for word, count in found.notes.items() if word not in question.notes})
            else:
                weights[name] = found
        if question.reason is not None:
            kind = "outside their task" if question.has_answer else "not given"
            words = getattr(checkpoint.encoder, "task_reasons", {}).get(question.reason, question.reason)
            notes[f"risks {kind}: {words}"] += 1
        yield Answer(record, explanations, weights, None, (subject, at, task))

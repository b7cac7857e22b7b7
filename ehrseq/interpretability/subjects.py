"""Single patients of a dataset: their explanations, and a page for each of their prediction times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.batches.requests import TaskNames, check_request, read_request
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import EVENT_COLUMNS
from ehrseq.data.shards import scan_shard
from ehrseq.data.sources import read_source
from ehrseq.hub.checkpoints import Checkpoint, checkpoint_digest, kept_checkpoint, notice_of
from ehrseq.interpretability.attention_weights import AttentionWeights
from ehrseq.interpretability.page import write_page
from ehrseq.interpretability.patients import Answer, explain_events, ways_of
from ehrseq.interpretability.picture import save_picture
from ehrseq.tasks.moments import LabelSource


def explain_subjects(
    checkpoint: str | Path,
    data: str | Path | pl.DataFrame,
    subjects: Sequence[int],
    *,
    tasks: TaskNames = None,
    methods: Sequence[str] | str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    prediction_times: str | Path | pl.DataFrame | None = None,
    labels: LabelSource | None = None,
    splits: Sequence[str] | None = None,
    on_error: str = "raise",
) -> tuple[list[Answer], ConversionReport]:
    """Explain the risks of some patients of a dataset.

    Args:
        checkpoint: As of `explain_dataset`; the arguments below too.
        data: See above.
        subjects: Their ids (`subject_id`).
        tasks: See above.
        methods: See above; those that show weights are taken as well.
        settings: See above.
        prediction_times: See above; times of other patients are left out, counted.
        labels: See above.
        splits: See above.
        on_error: See above.

    Returns:
        The answers, and what was read and left out.

    Raises:
        ValueError: A patient that is not there, or what `explain_dataset` refuses.
    """
    check_request(data, tasks, prediction_times, labels)
    wanted = _checked_ids(subjects)
    loaded = kept_checkpoint(str(checkpoint), checkpoint_digest(checkpoint))
    request = read_request(loaded.model, checkpoint, tasks, prediction_times, labels)
    ways = ways_of(loaded, list(request.tasks), methods, settings, weights=True)
    events, shards, report = read_source(data, splits, on_error, purpose="explain")
    report.notes.update(request.notes)
    these = pl.col("subject_id").is_in(wanted)
    if events is None:
        found = [scan_shard(shard).filter(these).select(EVENT_COLUMNS).collect() for shard in shards]
        events = pl.concat(found)
    else:
        events = events.filter(these)
    missing = sorted(set(wanted) - set(events["subject_id"].to_list()))
    if missing:
        raise ValueError(f"there is no patient {missing[0]} in these data{_hint(report)}.")
    moments = request.moments
    if moments is not None:
        moments = moments.filter(these)
        without = sorted(set(wanted) - set(moments["subject_id"].to_list()))
        if without:
            raise ValueError(f"patient {without[0]} has no prediction time; add one, or leave the times out.")
    report.events_written, report.subjects = events.height, len(wanted)
    notes: Counter[str] = Counter()
    answers = list(explain_events(loaded, events, moments, ways, notes, report.code_descriptions))
    report.notes.update(+notes)
    return answers, report


def write_pages(
    checkpoint: str | Path | Checkpoint, answers: Sequence[Answer], folder: str | Path, *, png: bool = False
) -> list[Path]:
    """Write the page of each patient and prediction time: all tasks and methods on it.

    Args:
        checkpoint: What was explained: its tasks are told on the page.
        answers: From `explain_subjects`.
        folder: Folder to write; pages are `patient_<id>.html`, with the time in their names where there are several of
            a patient.
        png: Write a picture beside each page.

    Returns:
        The files, in the order of the answers. Patients that cannot be read have none.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = kept_checkpoint(str(checkpoint), checkpoint_digest(checkpoint))
    by_time: dict[tuple[int, Any], list[Answer]] = {}
    for answer in answers:
        if answer.explanations:
            by_time.setdefault(answer.moment[:2], []).append(answer)
    times = Counter(subject for subject, _ in by_time)
    several_tasks = len({answer.moment[2] for answer in answers}) > 1
    written = []
    for (subject, at), group in by_time.items():
        explanations = [each for answer in group for each in answer.explanations]
        weights = [_named(each, answer, several_tasks) for answer in group for each in answer.weights.values()]
        flat = [each for each in weights if each.layers and each.layers[0].ndim == 1]
        name = f"patient_{subject}" if times[subject] == 1 else f"patient_{subject}_{at:%Y-%m-%dT%H%M%S}"
        file = Path(folder) / f"{name}.html"
        write_page(
            explanations,
            file,
            tasks=checkpoint.model.config.tasks or [],
            record=group[0].record,
            attention=[each for each in weights if each.layers and each.layers[0].ndim > 1],
            fusion=flat,
            notice=notice_of(checkpoint),
        )
        written.append(file)
        if png:
            picture = file.with_suffix(".png")
            save_picture(explanations, picture, record=group[0].record)
            written.append(picture)
    return written


def _named(weights: AttentionWeights, answer: Answer, several_tasks: bool) -> AttentionWeights:
    return replace(weights, what=f"{weights.what} ({answer.moment[2]})") if several_tasks else weights


def _checked_ids(subjects: Sequence[int]) -> list[int]:
    if isinstance(subjects, str | int) or not all(isinstance(s, int) and not isinstance(s, bool) for s in subjects):
        raise ValueError(f"subjects got {subjects!r:.100}; expected a list of subject_ids, whole numbers.")
    if not subjects:
        raise ValueError("subjects got nobody; name at least one patient.")
    return list(dict.fromkeys(subjects))


def _hint(report: ConversionReport) -> str:
    """What to say of sources whose own ids are no subject_ids."""
    example = next(iter(report.subject_ids.items()), None)
    return "" if example is None else f"; the source's {example[0]!r} is the patient {example[1]}"

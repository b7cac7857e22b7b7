"""What all systems of a table read: one tokenizer, one set of labelled rows, the same patients in the same splits.

The parent process fixes all of it once, as files of the run's folder; cells, perhaps in other processes, read it back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ehrseq.batches.prompts import prompted_dataset
from ehrseq.benchmark.budget import Budget
from ehrseq.data.dataset import EventDataset
from ehrseq.data.simulate.cohort import simulated_cohort
from ehrseq.encode.rows import PromptedDataset
from ehrseq.tasks import label_events, list_tasks, load_task, read_labels
from ehrseq.tasks.storage import label_tokens
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.work.files import write_json, write_whole

logger = logging.getLogger(__name__)

COHORT_PARTS = ("train", "tuning", "test")
LABELS, TOKENIZER, DESCRIPTION = "labels.parquet", "tokenizer", "data.json"


@dataclass(frozen=True)
class Source:
    """Where a run's patients and labels come from.

    Attributes:
        out: The run's folder.
        train: MEDS dataset with splits; its training and tuning patients.
        test: Another dataset whose patients are all tested on; None = the held-out patients of `train`.
        tasks: Names of the tasks.
        kinds: What enters a sequence: "all", or "paper" (procedures, medications, laboratory).
    """

    out: str
    train: str
    test: str | None
    tasks: tuple[str, ...]
    kinds: str = "all"


def prepare_data(source: Source, budget: Budget) -> None:
    """Label where there are no labels, draw the rows, train the tokenizer, describe it all; what is there is kept.

    Raises:
        ValueError: A dataset without splits, an unknown task, a task without labels in a part, or of one class in the
            training or tuning part.
    """
    out = Path(source.out)
    if not (out / LABELS).is_file():
        labels = _labels(source, budget)
        write_whole(out / LABELS, labels.write_parquet)
    data = BenchmarkData(source, budget)
    if not (out / TOKENIZER).is_dir():
        logger.info("Training the tokenizer on the patients of pretrain and train")
        events = EventDataset(source.train).events(_present(source.train, ("pretrain", "train")))
        tokenizer = EhrTokenizer.train(
            events, tasks=data.task_configs, model_max_length=budget.context, input_kinds=source.kinds
        )
        write_whole(out / TOKENIZER, tokenizer.save_pretrained)
    if not (out / DESCRIPTION).is_file():
        write_json(out / DESCRIPTION, data.describe())


class BenchmarkData:
    """The rows of a prepared run.

    Args:
        source: Where they come from.
        budget: Context and splits.
    """

    def __init__(self, source: Source, budget: Budget) -> None:
        self.source = source
        self.budget = budget
        self._parts: dict[str, PromptedDataset] = {}

    @cached_property
    def task_configs(self) -> list[dict[str, Any]]:
        """`config.tasks` entries in the order of the tasks: of packaged tasks, or of the dataset's own labels."""
        packaged, tokens = list_tasks(retrospective=None), label_tokens(self.source.train)
        return [
            load_task(name).to_config()
            if name in packaged
            else {"name": name, "token": tokens[name], "definition": "labels of the dataset", "positive_label": name}
            for name in self.source.tasks
        ]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return EhrTokenizer.from_pretrained(Path(self.source.out) / TOKENIZER)

    @cached_property
    def labels(self) -> pl.DataFrame:
        """part, task, subject_id, prediction_time, boolean_value, true_risk (null where unknown)."""
        return pl.read_parquet(Path(self.source.out) / LABELS)

    def rows(self, part: str, context: int) -> PromptedDataset:
        """The labelled rows of a part, cut at a context."""
        full = self._part(part)
        return PromptedDataset(full.histories, full.index, context)

    def windows(self, context: int) -> Any:
        """The pretraining windows of the patients of pretrain and train."""
        return self._pretraining.windows(context)

    def events(self, part: str) -> pl.DataFrame:
        """Events of the patients of a part."""
        dataset, splits = _where(self.source, self.budget, part)
        events = EventDataset(dataset).events(splits)
        subjects = self.labels.filter(pl.col("part") == part)["subject_id"].unique()
        return events.filter(pl.col("subject_id").is_in(subjects.implode()))

    def describe(self) -> dict[str, Any]:
        """Counts by part and task, and how much of the test events the tokenizer knows."""
        counts = (
            self.labels.group_by("part", "task")
            .agg(labels=pl.len(), patients=pl.col("subject_id").n_unique(), positives=pl.col("boolean_value").sum())
            .sort("part", "task")
        )
        return {
            "rows": counts.to_dicts(),
            "tokens": len(self.tokenizer),
            "coverage of the test events": dict(self.tokenizer.coverage(self.events("test"))),
        }

    @cached_property
    def _pretraining(self) -> Any:
        dataset = EventDataset(self.source.train)
        return self.tokenizer.encode_histories(dataset.events(_present(self.source.train, ("pretrain", "train"))))

    def _part(self, part: str) -> PromptedDataset:
        if part not in self._parts:
            of_part = self.labels.filter(pl.col("part") == part)
            tables = {
                task: of_part.filter(pl.col("task") == task).select("subject_id", "prediction_time", "boolean_value")
                for task in self.source.tasks
            }
            self._parts[part] = prompted_dataset(self.tokenizer, self.events(part), tables, self.budget.context)
        return self._parts[part]


@lru_cache(maxsize=1)
def load_data(source: Source, budget: Budget) -> BenchmarkData:
    """The rows of a run, encoded once a process."""
    return BenchmarkData(source, budget)


def _where(source: Source, budget: Budget, part: str) -> tuple[str, list[str] | None]:
    """Dataset and splits of a part; None = all its patients."""
    if part == "test" and source.test is not None:
        return source.test, None
    wanted = {"train": budget.finetune_splits, "tuning": ("tuning",), "test": ("held_out",)}[part]
    return source.train, _present(source.train, wanted)


def _present(dataset: str, wanted: Sequence[str]) -> list[str]:
    """Those of the splits that hold somebody.

    Raises:
        ValueError: None of them does.
    """
    known = EventDataset(dataset).splits["split"].unique().to_list()
    present = [name for name in wanted if name in known]
    if not present:
        raise ValueError(
            f"{dataset} has no patients in {' or '.join(wanted)}; its splits are {sorted(known) or 'none'}. "
            "`ehrseq prepare` or `ehrseq split` make pretrain, train, tuning and held_out."
        )
    return present


def _labels(source: Source, budget: Budget) -> pl.DataFrame:
    """The rows of all parts, those that are only scored thinned out."""
    tables = []
    known = {dataset: _labels_of(dataset, source.tasks) for dataset in {source.train, source.test or source.train}}
    tested = simulated_cohort(source.test or source.train)
    for part in COHORT_PARTS:
        dataset, splits = _where(source, budget, part)
        subjects = None
        if splits is not None:
            subjects = EventDataset(dataset).splits.filter(pl.col("split").is_in(splits))["subject_id"]
        for task in source.tasks:
            of_task = known[dataset][task].select("subject_id", "prediction_time", "boolean_value")
            of_task = of_task if subjects is None else of_task.filter(pl.col("subject_id").is_in(subjects.implode()))
            if part != "train" and budget.max_rows_per_task is not None:
                of_task = of_task.sample(min(of_task.height, budget.max_rows_per_task), seed=0)
            of_task = of_task.sort("subject_id", "prediction_time")
            _check_classes(of_task, part, task, dataset)
            risk = _true_risk(tested, task, of_task) if part == "test" else None
            best = pl.lit(None, pl.Float64) if risk is None else pl.Series(risk)
            tables.append(of_task.with_columns(part=pl.lit(part), task=pl.lit(task), true_risk=best))
    return pl.concat(tables)


def _labels_of(dataset: str, tasks: Sequence[str]) -> dict[str, pl.DataFrame]:
    """Labels that the dataset has, and labels of packaged tasks that it has not."""
    folder = Path(dataset) / "labels"
    there = [task for task in tasks if (folder / task).is_dir()]
    labels = read_labels(dataset, there) if there else {}
    missing = [task for task in tasks if task not in labels]
    packaged = list_tasks(retrospective=None)
    unknown = [task for task in missing if task not in packaged]
    if unknown:
        raise ValueError(
            f"{dataset} has no labels of {unknown}, and these are no packaged tasks ({packaged}); put label tables at "
            f"{folder}/<task>/, or name another task."
        )
    if missing:
        cohort = simulated_cohort(dataset)
        end = None if cohort is None else cohort.end_of_data
        events = EventDataset(dataset).events()
        labels |= label_events(events, [load_task(name) for name in missing], end_of_data=end).labels
    return labels


def _check_classes(rows: pl.DataFrame, part: str, task: str, dataset: str) -> None:
    positives = int(rows["boolean_value"].sum())
    if part != "test" and (positives == 0 or positives == rows.height):
        raise ValueError(
            f"{dataset}: the {part} patients have {rows.height:,} labels of {task}, {positives:,} of them positive; a "
            "model needs both classes to learn from and to be chosen on. Leave the task out, or give more patients."
        )


def _true_risk(cohort: Any | None, task: str, rows: pl.DataFrame) -> np.ndarray | None:
    """The best possible score of each row, where the patients are simulated."""
    from ehrseq.data.simulate.cohort import SIMULATED_TASKS

    if cohort is None or task not in SIMULATED_TASKS or rows.is_empty():
        return None
    result: np.ndarray | None = cohort.true_risk(task, rows["subject_id"], rows["prediction_time"])
    return result

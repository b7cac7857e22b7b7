"""Tasks in the language of ACES, another package's YAML files (https://eventstreamaces.readthedocs.io, extra
`ehrseq[aces]`), labelled file by file like our own.

ACES counts predicates in windows around a trigger; it knows neither admissions nor the end of the data: what a record
does not hold has not happened, and a window without end ends with the record. Where that matters, write the task as a
file of ours (`ehrseq.tasks.schema`). Patients who are dead at an unknown time have no label (`death_time_unknown`): to
ACES, which reads rows with a time, they would be alive.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from ehrseq.data.metadata import CodeMap, read_settings
from ehrseq.data.schema import LABEL_SCHEMA
from ehrseq.data.shards import ShardPart, dataset_shards, scan_shard
from ehrseq.tasks.deaths import DEATH_TIME_UNKNOWN, dead_at_unknown_time
from ehrseq.tasks.storage import LABEL_RULES, write_label_folder
from ehrseq.work.engine import Engine
from ehrseq.work.files import write_whole
from ehrseq.work.parts import kept_parts, run_parts


@dataclass(frozen=True)
class AcesPart(ShardPart[dict[str, int]]):
    """Labels of one file.

    Attributes:
        config: ACES's YAML file.
        code_map: As of `label_events`.
    """

    config: str
    code_map: CodeMap | None = None

    def make(self) -> dict[str, int]:
        """See `RecordedPart.make`."""
        events = scan_shard(self.shard)  # says what is wrong with a file that is none of ours
        labels = _query(_load(self.config), self.shard.path)
        unknown = dead_at_unknown_time(events, self.code_map)
        kept = labels.filter(~pl.col("subject_id").is_in(unknown.implode()))
        write_whole(self.beside(".parquet"), kept.write_parquet)
        return {"labels": kept.height, DEATH_TIME_UNKNOWN: labels.height - kept.height}


def is_aces_file(path: str | Path) -> bool:
    """Whether a YAML file is a task of ACES: it has predicates, and a trigger or windows."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # whoever reads it as a task of ours says what is wrong
    return isinstance(content, Mapping) and "predicates" in content and bool({"trigger", "windows"} & set(content))


def label_dataset_aces(
    dataset: str | Path, config: str | Path, *, engine: Engine | None = None
) -> tuple[str, pl.DataFrame]:
    """Label a prepared dataset for one task of ACES, and write the labels as those of other tasks are written.

    A run that was stopped goes on where it was, as `label_dataset` does.

    Args:
        dataset: Folder of a prepared dataset.
        config: ACES's YAML file; its name becomes the task's.
        engine: Where to work, default all cores of this machine.

    Returns:
        The task's name and its labels.

    Raises:
        ImportError: ACES is not installed.
        ValueError: No prepared dataset, or a file that ACES does not take, or one without label or index time.
    """
    _load(str(config))
    text = Path(config).read_text(encoding="utf-8")
    name = Path(config).stem
    shards = dataset_shards(dataset)
    root = Path(dataset) / "labels"
    rules = read_settings(dataset).rules
    with kept_parts(root / ".parts", [LABEL_RULES, text, rules]) as folder:
        parts = [AcesPart(shard, str(folder), str(Path(config).resolve()), rules) for shard in shards]
        counts = list(run_parts(parts, desc=f"Labelling {name}", folder=folder, engine=engine))
        labels = pl.concat([pl.read_parquet(part.beside(".parquet"), hive_partitioning=False) for part in parts])
        labels = labels.sort("subject_id", "prediction_time", maintain_order=True)
        report = {
            "task": {"name": name, "token": f"[{name.upper()}]", "aces": text},
            "labels": labels.height,
            "positives": int(labels["boolean_value"].sum()),
            "dropped": {DEATH_TIME_UNKNOWN: sum(count[DEATH_TIME_UNKNOWN] for count in counts)},
        }
        write_label_folder(root / name, labels, report)
    return name, labels


def _aces(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError('Tasks of ACES need the package es-aces: pip install "ehrseq[aces]".') from error


def _load(config: str) -> Any:
    """ACES's reading of a file.

    Raises:
        ValueError: ACES refuses it, or it has no label or no index time.
    """
    reader = _aces("aces.config")
    try:
        task = reader.TaskExtractorConfig.load(Path(config))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{config} is no task that ACES takes: {error}") from error
    if task.label_window is None or task.index_timestamp_window is None:
        raise ValueError(
            f"{config} says no {'label' if task.label_window is None else 'index_timestamp'}; give a window of it the "
            "key, so that there is something to predict, and a moment to do so."
        )
    return task


def _query(task: Any, path: str) -> pl.DataFrame:
    """Labels of one file."""
    predicates, query = _aces("aces.predicates"), _aces("aces.query")
    source = _aces("omegaconf").DictConfig({"path": path, "standard": "meds", "ts_format": None})
    logger = logging.getLogger("aces")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a file without any label is nothing to be warned of
    try:
        labels: pl.DataFrame = query.query(task, predicates.get_predicates_df(task, source))
    finally:
        logger.setLevel(level)
    if labels.is_empty():
        return pl.DataFrame(schema=LABEL_SCHEMA)
    return labels.select(
        "subject_id",
        pl.col("index_timestamp").alias("prediction_time"),
        (pl.col("label") > 0).alias("boolean_value"),
    ).cast(pl.Schema(LABEL_SCHEMA))

"""Tasks in the language of ACES, another package's YAML files (https://eventstreamaces.readthedocs.io, extra
`ehrseq[aces]`), labelled file by file like our own.

ACES counts predicates in windows around a trigger; it knows neither admissions nor the end of the data: what a record
does not hold has not happened, and a window without end ends with the record. Where that matters, write the task as a
file of ours (`ehrseq.tasks.schema`).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging as standard_logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from ehrseq.data.schema import LABEL_SCHEMA
from ehrseq.data.shards import Shard, dataset_shards, scan_shard
from ehrseq.work.engine import Engine, get_engine
from ehrseq.work.files import file_digest, remove, remove_unfinished, write_whole

_SOURCE = b"ehrseq.labels"
"""Key of the digest of a part's source in the metadata of its Parquet file."""


@dataclass(frozen=True)
class AcesWork:
    """One file to label: the shard, where its labels go, and ACES's YAML file."""

    shard: Shard
    part: str
    config: str

    @property
    def name(self) -> str:
        """The file, in messages."""
        return self.shard.path


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
    folder = root / f".parts-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        remove_unfinished(folder)
    work = [
        AcesWork(shard, str(folder / f"{shard.split}-{shard.number}.parquet"), str(Path(config).resolve()))
        for shard in shards
    ]
    parts = (engine or get_engine()).map(label_shard, work, desc=f"Labelling {name}")
    labels = pl.concat([pl.read_parquet(part, hive_partitioning=False) for part in parts])
    labels = labels.sort("subject_id", "prediction_time", maintain_order=True)
    report = {
        "task": {"name": name, "token": f"[{name.upper()}]", "aces": text},
        "labels": labels.height,
        "positives": int(labels["boolean_value"].sum()),
    }

    def write(temporary: Path) -> None:
        temporary.mkdir()
        labels.write_parquet(temporary / "labels.parquet")
        (temporary / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    write_whole(root / name, write)
    remove(folder)
    return name, labels


def label_shard(work: AcesWork) -> str:
    """Label one file, if its part is not there already; returns the part's path."""
    import pyarrow.parquet as pq

    digest = file_digest(work.shard.path)
    part = Path(work.part)
    if part.is_file() and (pq.read_schema(part).metadata or {}).get(_SOURCE) == digest.encode():
        return work.part
    scan_shard(work.shard)  # says what is wrong with a file that is none of ours
    labels = _query(_load(work.config), work.shard.path)
    write_whole(
        part,
        lambda file: pq.write_table(
            labels.to_arrow().replace_schema_metadata({_SOURCE: digest}), file, compression="zstd"
        ),
    )
    return work.part


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
    told = standard_logging.getLogger("aces")
    level = told.level
    told.setLevel(standard_logging.ERROR)  # a file without any label is nothing to be warned of
    try:
        found = query.query(task, predicates.get_predicates_df(task, source))
    finally:
        told.setLevel(level)
    if found.is_empty():
        return pl.DataFrame(schema=LABEL_SCHEMA)
    return found.select(
        "subject_id",
        pl.col("index_timestamp").alias("prediction_time"),
        (pl.col("label") > 0).alias("boolean_value"),
    ).cast(pl.Schema(LABEL_SCHEMA))

"""`ehrseq split`: other splits for a prepared dataset, by patient, stratified by a task's labels where asked.

    split_dataset("dataset/", fractions={"train": 0.8, "held_out": 0.2}, stratify="mortality_30d", seed=1)

Files of one number hold the patients of one partition, so each number is divided anew by itself. The dataset is
replaced when all of it is ready: a run that was killed leaves the old one, or the new one, and the next run goes on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ehrseq.data.dataset import make_folder, write_splits
from ehrseq.data.schema import arrow_schema
from ehrseq.data.shards import Shard, dataset_shards, scan_shard
from ehrseq.data.splits import DEFAULT_FRACTIONS, assign_splits, uniform_of
from ehrseq.prepare.shard_files import check_split_name
from ehrseq.prepare.spill import write_table
from ehrseq.tasks.storage import read_labels
from ehrseq.work.engine import Engine
from ehrseq.work.files import remove, write_json, write_whole
from ehrseq.work.parts import RecordedPart, run_parts, settings_key, table_digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitPart(RecordedPart[dict[str, int]]):
    """The files of one number.

    Attributes:
        number: Their number.
        files: The files, in every split that has one.
        folder: Folder of the new dataset, with the new splits.
    """

    number: str
    files: tuple[str, ...]
    folder: str

    @property
    def name(self) -> str:
        """The first file, in messages."""
        return self.files[0]

    @property
    def record(self) -> Path:
        """See `RecordedPart.record`."""
        return Path(self.folder) / "records" / f"{self.number}.json"

    def make(self) -> dict[str, int]:
        """Write the files of this number anew; returns the rows of each split."""
        splits = pl.read_parquet(Path(self.folder) / "splits.parquet")
        # Files as they are: a dataset keeps the columns that it has.
        rows = pl.concat([pl.read_parquet(file, hive_partitioning=False) for file in self.files])
        rows = rows.sort("subject_id", maintain_order=True)
        joined = rows.join(splits, on="subject_id", how="left", maintain_order="left")
        heights = {}
        for (name,), part in joined.partition_by("split", as_dict=True, maintain_order=True).items():
            table = part.drop("split").to_arrow()
            schema = arrow_schema()
            if set(table.column_names) == set(schema.names):
                table = table.select(schema.names).cast(schema)
            write_table(table, Path(self.folder) / "data" / str(name) / f"{self.number}.parquet")
            heights[str(name)] = part.height
        return heights


def split_dataset(
    dataset: str | Path,
    *,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    stratify: str | None = None,
    engine: Engine | None = None,
) -> pl.DataFrame:
    """Give a prepared dataset other splits: `data/<split>/` and `metadata/subject_splits.parquet` are made anew.

    Args:
        dataset: Folder that `ehrseq prepare` wrote.
        fractions: Split -> share. Default: `ehrseq.data.splits.DEFAULT_FRACTIONS`.
        seed: Another seed, other splits.
        stratify: Task with labels in the dataset: patients with a positive label, with negative ones only and without
            labels are each divided by the fractions, to a patient. Default: every patient is drawn by itself, and keeps
            its split when others join.
        engine: Where to work; default: all cores of this machine.

    Returns:
        One row a split: `split`, `patients`, and where stratified `with_labels` and `positive` patients.

    Raises:
        ValueError: No prepared dataset, no labels of the task, or fractions that do not sum to 1.
    """
    folder = Path(dataset)
    ready, old = (folder.absolute().parent / f".{folder.absolute().name}.{what}" for what in ("resplit", "replaced"))
    if old.is_dir() and not folder.exists():  # a run was stopped between its last two steps
        _move(ready, folder)
    remove(old)
    shards = dataset_shards(folder)
    for name in fractions or ():
        check_split_name(name)
    subjects = _subjects(shards)
    strata = (
        pl.Series("stratum", np.zeros(len(subjects), np.int8))
        if stratify is None
        else _strata(folder, stratify, subjects)
    )
    if stratify is None:
        splits = assign_splits(subjects, fractions=fractions, seed=seed)
    else:
        assign_splits([], fractions=fractions, seed=seed)
        splits = _stratified(subjects, strata, dict(fractions or DEFAULT_FRACTIONS), seed)
    try:
        _begin(ready, shards, splits)
        numbers: dict[str, list[str]] = {}
        for shard in shards:
            numbers.setdefault(shard.number, []).append(shard.path)
        parts = [SplitPart(number, tuple(files), str(ready)) for number, files in numbers.items()]
        list(run_parts(parts, desc="Dividing", folder=ready, engine=engine))
        _take_along(folder, ready)
        write_splits(splits, ready / "metadata")
        _move(folder, old)
        _move(ready, folder)
    finally:
        if folder.exists():
            remove(ready)
    remove(old)
    logger.warning(
        f"{folder} has other splits now: a tokenizer or rows made from the earlier ones must be made again, for they "
        "may know patients that are held out now."
    )
    return _sizes(splits, strata, stratify is not None)


def _begin(ready: Path, shards: Sequence[Shard], splits: pl.DataFrame) -> None:
    """The folder of the new dataset: the one that a killed run left, if it was to become the same, else a new one."""
    states = [(shard.path, stat.st_size, stat.st_mtime_ns) for shard in shards for stat in [Path(shard.path).stat()]]
    settings = settings_key([pl.__version__, table_digest(splits), states])
    kept = ready / "settings.json"
    if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) == settings:
        return
    remove(ready)
    make_folder(ready)
    write_whole(ready / "splits.parquet", splits.write_parquet)
    write_json(kept, settings)


def _move(source: Path, target: Path) -> None:
    os.replace(source, target)


def _take_along(folder: Path, ready: Path) -> None:
    """Everything beside the shards and the splits, as links to the same files; nothing else stays in the new folder."""
    for entry in ready.iterdir():
        if entry.name != "data":
            remove(entry)
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if not file.is_file() or inside.parts[0] == "data" or inside == Path("metadata/subject_splits.parquet"):
            continue
        (ready / inside).parent.mkdir(parents=True, exist_ok=True)
        os.link(file, ready / inside)
    (ready / "metadata").mkdir(exist_ok=True)


def _subjects(shards: Sequence[Shard]) -> pl.Series:
    subjects = [scan_shard(shard).select(pl.col("subject_id").unique()).collect()["subject_id"] for shard in shards]
    return pl.concat(subjects).unique().sort()


def _strata(folder: Path, task: str, subjects: pl.Series) -> pl.Series:
    """2 with a positive label of the task, 1 with negative ones only, 0 without any."""
    worst = (
        read_labels(folder, [task])[task]
        .group_by("subject_id")
        .agg((pl.col("boolean_value").max().cast(pl.Int8) + 1).alias("stratum"))
    )
    joined = pl.DataFrame({"subject_id": subjects}).join(worst, on="subject_id", how="left", maintain_order="left")
    return joined["stratum"].fill_null(0)


def _stratified(subjects: pl.Series, strata: pl.Series, shares: dict[str, float], seed: int) -> pl.DataFrame:
    """Each stratum in the order of its patients' draws, cut at the cumulated shares."""
    draws = uniform_of(subjects.to_numpy(), seed)
    names = np.empty(len(subjects), dtype=object)
    edges = np.cumsum(list(shares.values()))[:-1]
    for stratum in np.unique(strata.to_numpy()):
        members = np.flatnonzero(strata.to_numpy() == stratum)
        members = members[np.argsort(draws[members], kind="stable")]
        cuts = np.rint(edges * len(members)).astype(np.int64)
        for name, part in zip(shares, np.split(members, cuts), strict=True):
            names[part] = name
    return pl.DataFrame({"subject_id": subjects, "split": names.tolist()})


def _sizes(splits: pl.DataFrame, strata: pl.Series, stratified: bool) -> pl.DataFrame:
    more = [(strata > 0).alias("with_labels"), (strata > 1).alias("positive")] if stratified else []
    return (
        splits.with_columns(more)
        .group_by("split", maintain_order=True)
        .agg(pl.len().alias("patients"), *(pl.col(column.name).sum() for column in more))
        .sort("split")
    )


def lines(sizes: pl.DataFrame) -> Iterator[str]:
    """The sizes of the splits, in words."""
    for row in sizes.iter_rows(named=True):
        text = f"{row['split']}: {row['patients']:,} patients"
        if "positive" in row:
            text += f", {row['with_labels']:,} of them with labels, {row['positive']:,} with a positive one"
        yield text

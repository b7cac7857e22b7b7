"""The files of a prepared dataset, one by one: what work that never holds a whole dataset stands on.

A prepared dataset is `data/<split>/<n>.parquet` with the columns of the event table, as `write_dataset` and
`ehrseq prepare` make it. A subject's rows stand together in one file, subjects ascending; so each file is a table of
its own, and a file is read in blocks of whole subjects where even that would be much.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ehrseq.data.parquet import check_parquet
from ehrseq.data.schema import EVENT_COLUMNS, EVENT_SCHEMA, REQUIRED_COLUMNS
from ehrseq.work.files import file_digest
from ehrseq.work.parts import RecordedPart, Report

BLOCK_ROWS = 600_000
"""Rows of a block, about: what is read at once. Bounds the memory of one worker."""


@dataclass(frozen=True)
class Shard:
    """One file of a prepared dataset.

    Attributes:
        path: The file.
        split: Split of all its subjects.
        number: Its number within the split.
    """

    path: str
    split: str
    number: str

    @property
    def name(self) -> str:
        """`<split>/<number>`, in messages and as the name of what is made of it."""
        return f"{self.split}/{self.number}"


@dataclass(frozen=True)
class ShardPart(RecordedPart[Report]):
    """What is made of one file of a prepared dataset, and made again where the file has changed.

    Attributes:
        shard: The file.
        folder: Folder for what is made of all files; this one's is `<split>-<number>.*` in it.
    """

    shard: Shard
    folder: str

    @property
    def name(self) -> str:
        """The file, in messages."""
        return self.shard.path

    @property
    def record(self) -> Path:
        """See `RecordedPart.record`."""
        return Path(self.folder) / f"{self.shard.split}-{self.shard.number}.json"

    def provenance(self) -> dict[str, str]:
        """Digest of the file."""
        return {"source": file_digest(self.shard.path)}


def dataset_shards(dataset: str | Path, splits: Sequence[str] | None = None) -> list[Shard]:
    """The shards of a prepared dataset, by split and number.

    Args:
        dataset: Its folder.
        splits: Those of these splits, None = all.

    Raises:
        ValueError: There are none, an unknown split, or the files are not laid out as a prepared dataset's.
    """
    folder = Path(dataset)
    files = sorted((folder / "data").rglob("*.parquet")) if (folder / "data").is_dir() else []
    if not files:
        raise ValueError(f"{folder} holds no data/<split>/<n>.parquet; give a dataset that `ehrseq prepare` wrote.")
    elsewhere = [file for file in files if len(file.relative_to(folder / "data").parts) != 2]
    if elsewhere:
        raise ValueError(
            f"{elsewhere[0]} does not lie at data/<split>/<n>.parquet; bring the dataset into this form with "
            f"`ehrseq prepare {folder} NEW_FOLDER`."
        )
    shards = [Shard(str(file), file.parent.name, file.stem) for file in files]
    known = sorted({shard.split for shard in shards})
    unknown = [split for split in splits or () if split not in known]
    if unknown:
        raise ValueError(f"{dataset} has no split {unknown}; it has {known}.")
    shards = [shard for shard in shards if splits is None or shard.split in splits]
    return sorted(shards, key=lambda shard: (shard.split, _natural(shard.number)))


def scan_shard(shard: Shard) -> pl.LazyFrame:
    """The rows of a shard, lazily, with the columns and types of the event table.

    Raises:
        ValueError: It cannot be read, or a column is absent or of another type.
    """
    check_parquet(shard.path, EVENT_COLUMNS)
    try:
        lazy = pl.scan_parquet(shard.path, hive_partitioning=False, glob=False)
        schema = lazy.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{shard.path} cannot be read as Parquet ({error}); prepare the dataset again.") from error
    wrong = {
        name: str(schema.get(name, "absent"))
        for name, dtype in EVENT_SCHEMA.items()
        if schema.get(name, None if name in REQUIRED_COLUMNS else dtype) != dtype
    }
    if wrong:
        raise ValueError(
            f"{shard.path} is no file of a prepared dataset: {wrong}, expected "
            f"{ {name: str(EVENT_SCHEMA[name]) for name in wrong} }; bring it into this form with `ehrseq prepare`."
        )
    return lazy.select(
        pl.col(name) if name in schema else pl.lit(None, dtype).alias(name) for name, dtype in EVENT_SCHEMA.items()
    )


def read_blocks(
    shard: Shard, *, rows: int = BLOCK_ROWS, columns: tuple[str, ...] = EVENT_COLUMNS
) -> Iterator[pl.DataFrame]:
    """The rows of a shard in blocks of whole subjects, subjects ascending over the blocks.

    Args:
        shard: The file.
        rows: Rows of a block, about; a subject with more rows makes a block of its own.
        columns: Columns to read.

    Raises:
        ValueError: It cannot be read, or its subjects are not in order.
    """
    lazy = scan_shard(shard)
    try:
        subject = lazy.select("subject_id").collect()["subject_id"]
        if subject.null_count() or not subject.is_sorted():
            raise ValueError(
                f"{shard.path} has rows without subject, or subjects out of order; prepare the dataset again with "
                "`ehrseq prepare`."
            )
        values = subject.to_numpy()
        cuts = np.unique([0, *np.searchsorted(values, values[rows::rows]).tolist(), len(values)]).tolist()
        del subject, values
        for start, stop in pairwise(cuts):
            yield lazy.select(columns).slice(start, stop - start).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{shard.path} cannot be read as Parquet ({error}); prepare the dataset again.") from error


def latest_time(shards: list[Shard]) -> datetime | None:
    """The last instant of a dataset, from the statistics of its files where they have them; None without timed rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    last: datetime | None = None
    for shard in shards:
        try:
            metadata = pq.read_metadata(shard.path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{shard.path} cannot be read as Parquet ({error}); prepare the dataset again.") from error
        column = metadata.schema.to_arrow_schema().get_field_index("time")
        groups = [metadata.row_group(k).column(column).statistics for k in range(metadata.num_row_groups)]
        latest: Any
        if all(group is not None and (group.has_min_max or group.null_count == group.num_values) for group in groups):
            latest = max((group.max for group in groups if group.has_min_max), default=None)
        else:
            latest = scan_shard(shard).select(pl.col("time").max()).collect().item()
        if latest is not None and (last is None or latest > last):
            last = latest
    return last


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A key that sorts `10` behind `9`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]

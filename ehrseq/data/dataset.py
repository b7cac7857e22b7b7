"""Datasets on disk: a MEDS 0.4 folder, written atomically, read whole or split by split."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from ehrseq.data.meds import meds_files, read_meds_files, read_parquet, read_splits
from ehrseq.data.metadata import read_json, read_settings, written_by_us
from ehrseq.data.parquet import check_parquet
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import EVENT_COLUMNS, EVENT_SCHEMA, arrow_schema, validate_events
from ehrseq.data.splits import DEFAULT_FRACTIONS, SPLIT_SCHEMA, assign_splits, patients_needed
from ehrseq.version import __version__
from ehrseq.work.files import write_whole

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

MEDS_VERSION = "0.4.1"
DEFAULT_SHARD_SIZE = 5_000_000
"""Events per Parquet file, about: a subject's rows are never divided."""


def write_dataset(
    events: pl.DataFrame,
    path: str | Path,
    *,
    dataset_name: str,
    shard_size: int = DEFAULT_SHARD_SIZE,
    splits: pl.DataFrame | None = None,
    report: ConversionReport | None = None,
    overwrite: bool = False,
) -> EventDataset:
    """Write events as a MEDS 0.4 dataset: `data/<split>/<n>.parquet` and `metadata/`.

    The folder appears whole or not at all: it is written under a temporary name beside `path` and then moved.

    Args:
        events: Event table (see `validate_events`).
        path: Folder to create.
        dataset_name: Name kept in `metadata/dataset.json`.
        shard_size: Events per file, about; one subject stays in one file.
        splits: (subject_id, split) of every subject. Default: `assign_splits`, on top of the source's own splits where
            `report` has them.
        report: Conversion report; kept in `metadata/`, with code descriptions and the mapping of source ids.
        overwrite: Replace an existing dataset.

    Returns:
        The dataset.

    Raises:
        ValueError: `path` exists and `overwrite` is off, there are no events, or a subject has no split.
    """
    path = Path(path)
    if isinstance(shard_size, bool) or not isinstance(shard_size, int) or shard_size < 1:
        raise ValueError(f"shard_size must be at least 1 event, got {shard_size!r}.")
    if not isinstance(dataset_name, str) or not dataset_name.strip():
        raise ValueError(f"dataset_name got {dataset_name!r}; expected a name, which metadata/dataset.json keeps.")
    if splits is not None and not isinstance(splits, pl.DataFrame):
        raise ValueError(
            f"splits got {type(splits).__name__}; expected a polars DataFrame of subject_id and split, or None."
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not overwrite:
        raise ValueError(f"{path} exists; give another path, remove it, or pass overwrite=True.")
    checked = validate_events(events, source="events to write")
    if checked.is_empty():
        raise ValueError("There are no events to write; a dataset needs at least one.")
    table = _splits_for(checked, splits, report)
    make_folder(path.parent)
    created_at = datetime.now(UTC).isoformat(timespec="seconds")

    def write(folder: Path) -> None:
        _write_shards(checked, table, folder / "data", shard_size)
        write_metadata(
            folder / "metadata",
            dataset_name=dataset_name,
            codes=checked["code"].unique().sort().to_list(),
            splits=table,
            report=report,
            created_at=created_at,
        )

    write_whole(path, write)
    return EventDataset(path)


def make_folder(path: Path) -> None:
    """Make a folder with its parents.

    Raises:
        ValueError: A file stands in its way, or it may not be made there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {path} cannot be made ({error.strerror}); give one in a folder of yours.") from (
            error
        )


class EventDataset:
    """A MEDS dataset on disk, ours or a foreign one.

    Args:
        path: Folder with `data/**/*.parquet` and, where there are splits, `metadata/subject_splits.parquet`.

    Raises:
        ValueError: The folder holds no Parquet files below `data/`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder; expected a MEDS dataset (data/**/*.parquet, metadata/).")
        self.files = meds_files(self.path)

    def __repr__(self) -> str:
        return f"EventDataset({str(self.path)!r}, files={len(self.files)})"

    @cached_property
    def splits(self) -> pl.DataFrame:
        """(subject_id, split) of every subject; empty where the dataset has no splits."""
        splits = read_splits(self.path)
        return pl.DataFrame(schema=SPLIT_SCHEMA) if splits is None else splits

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """`metadata/dataset.json`, with the conversion report under `conversion_report` where there is one."""
        out: dict[str, Any] = {}
        for name in ("dataset", "conversion_report"):
            file = self.path / "metadata" / f"{name}.json"
            if file.is_file():
                content = read_json(file)
                out.update(content if name == "dataset" else {name: content})
        return out

    @cached_property
    def codes(self) -> pl.DataFrame:
        """`metadata/codes.parquet` (code, description, parent_codes); empty where there is none."""
        file = self.path / "metadata" / "codes.parquet"
        return read_parquet(file) if file.is_file() else pl.DataFrame(schema=_CODE_SCHEMA)

    def scan(self) -> pl.LazyFrame:
        """All rows, lazily, in file order; our columns only where the files are ours (foreign files: as they are)."""
        for file in self.files:
            check_parquet(file, EVENT_COLUMNS)
        return pl.scan_parquet(self.files, missing_columns="insert", extra_columns="ignore", hive_partitioning=False)

    def events(self, split: str | Sequence[str] | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """Rows of one split, several or all, as a sorted event table.

        Args:
            split: Name(s) of splits; None for all subjects.
            columns: Columns to return, of `EVENT_COLUMNS`; None for all.

        Raises:
            ValueError: An unknown split or column.
        """
        wanted = list(EVENT_COLUMNS if columns is None else columns)
        unknown = [name for name in wanted if name not in EVENT_SCHEMA]
        if unknown:
            raise ValueError(f"Unknown column(s) {unknown}; an event table has {list(EVENT_COLUMNS)}.")
        if not isinstance(split, str | Sequence | None) or isinstance(split, bytes):
            raise ValueError(f"split got {split!r}; expected the name of a split, a list of names, or None for all.")
        names = None if split is None else ([split] if isinstance(split, str) else list(split))
        if names is not None:
            known = self.splits["split"].unique().sort().to_list()
            absent = [name for name in names if name not in known]
            if absent:
                raise ValueError(self._why_absent(absent))
        frame = self._read(names)
        return frame.select(wanted)

    def _why_absent(self, absent: list[str]) -> str:
        """What to do about splits that hold nobody."""
        sizes = dict(self.splits["split"].value_counts(name="n").sort("split").iter_rows())
        if not sizes:
            return (
                f"{self.path} has no splits (metadata/subject_splits.parquet), so no {absent}; write it again with "
                "write_dataset(load_events(path)[0], ...), which makes them."
            )
        held = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        text = f"{self.path} has no patient in the split(s) {absent}; it has {sum(sizes.values()):,} patients: {held}."
        if not set(absent) <= set(DEFAULT_FRACTIONS):
            return f"{text} Name one of these splits."
        shares = ", ".join(f"{name} {share:.0%}" for name, share in DEFAULT_FRACTIONS.items())
        return (
            f"{text} Each split needs patients of its own, so that nothing is tested on whom it was trained on; a "
            f"hash of the patient draws the split ({shares}), and from about {patients_needed()} patients on hardly "
            "any is empty. Give more patients, or write_dataset(..., splits=...) with splits of your own."
        )

    def _read(self, names: list[str] | None) -> pl.DataFrame:
        files = self.files
        if names is not None and self._is_ours:
            # Our folders say the split in their path: only these files are opened.
            files = [file for file in files if file.relative_to(self.path / "data").parts[0] in names]
        said = read_settings(self.path)
        events, _ = read_meds_files(files, ours=self._is_ours, code_map=said.rules, timezone=said.timezone)
        if names is not None:
            subjects = self.splits.filter(pl.col("split").is_in(names)).select("subject_id")
            events = events.join(subjects, on="subject_id", how="semi", maintain_order="left")
        return events

    @property
    def _is_ours(self) -> bool:
        return written_by_us(self.path)


_CODE_SCHEMA: dict[str, pl.DataType] = {
    "code": pl.String(),
    "description": pl.String(),
    "parent_codes": pl.List(pl.String),
}


def _splits_for(events: pl.DataFrame, splits: pl.DataFrame | None, report: ConversionReport | None) -> pl.DataFrame:
    subjects = events["subject_id"].unique().sort()
    if splits is None:
        return assign_splits(subjects, source_splits=None if report is None else report.source_splits)
    if not set(SPLIT_SCHEMA) <= set(splits.columns):
        raise ValueError(f"splits has columns {splits.columns}; expected subject_id and split.")
    table = (
        splits.select(pl.col("subject_id").cast(pl.Int64), pl.col("split").cast(pl.String)).unique().sort("subject_id")
    )
    if table["subject_id"].n_unique() != table.height:
        raise ValueError("splits gives a subject two splits; splits must be disjoint by subject.")
    without = subjects.filter(~subjects.is_in(table["subject_id"].implode()))
    if len(without):
        raise ValueError(
            f"{len(without)} subject(s) have no split (first: {without[0]}); name every subject of the events in "
            "splits."
        )
    return table.filter(pl.col("subject_id").is_in(subjects.implode()))


def _write_shards(events: pl.DataFrame, splits: pl.DataFrame, folder: Path, shard_size: int) -> None:
    for name in splits["split"].unique().sort().to_list():
        if not name or name in (".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"{name!r} cannot be a split: it names a folder.")
        subjects = splits.filter(pl.col("split") == name).select("subject_id")
        rows = events.join(subjects, on="subject_id", how="semi", maintain_order="left")
        (folder / name).mkdir(parents=True)
        # A shard begins with the subject whose first row crosses the next multiple of shard_size.
        sizes = rows.group_by("subject_id", maintain_order=True).len()
        starts = sizes.select((pl.col("len").cum_sum() - pl.col("len")).alias("start"))["start"]
        shard = (starts // shard_size).rle_id()
        bounds = (
            sizes.with_columns(shard.alias("shard"))
            .group_by("shard", maintain_order=True)
            .agg(pl.col("len").sum())["len"]
            .to_list()
        )
        first = 0
        for number, height in enumerate(bounds):
            table = rows.slice(first, height).to_arrow().cast(arrow_schema())
            write_parquet(table, folder / name / f"{number}.parquet")
            first += height


def write_parquet(table: pa.Table, file: Path) -> None:
    """Write an Arrow table as the files of a dataset are written."""
    import pyarrow.parquet as pq

    pq.write_table(table, file, compression="zstd")


def write_metadata(
    folder: Path,
    *,
    dataset_name: str,
    codes: Sequence[str],
    splits: pl.DataFrame,
    report: ConversionReport | None,
    created_at: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of `metadata/`.

    Args:
        folder: The folder, which is made.
        dataset_name: Name of the dataset.
        codes: Every code of the events, sorted.
        splits: (subject_id, split), sorted.
        report: Conversion report, with code descriptions and the mapping of source ids.
        created_at: When the dataset was made; None where equal sources shall give equal bytes.
        more: Further entries of the report's file.
    """
    import pyarrow as pa

    folder.mkdir(parents=True)
    described = report.code_descriptions if report is not None else {}
    write_parquet(
        pa.table(
            {
                "code": codes,
                "description": [described.get(code) for code in codes],
                "parent_codes": [None] * len(codes),
            },
            schema=pa.schema(
                [
                    pa.field("code", pa.string(), nullable=False),
                    pa.field("description", pa.string()),
                    pa.field("parent_codes", pa.list_(pa.string())),
                ]
            ),
        ),
        folder / "codes.parquet",
    )
    write_splits(splits, folder)
    dataset = {
        "dataset_name": dataset_name,
        "etl_name": "ehrseq",
        "etl_version": __version__,
        "meds_version": MEDS_VERSION,
        **({} if created_at is None else {"created_at": created_at}),
        "raw_source_id_columns": ["visit_id"],
        "code_modifier_columns": ["unit"],
        **({} if report is None else report.settings),
    }
    _write_json(dataset, folder / "dataset.json")
    if report is None:
        return
    _write_json({**report.to_dict(), **(more or {})}, folder / "conversion_report.json")
    if report.subject_ids:
        mapping = pl.DataFrame(
            {"source_id": list(report.subject_ids), "subject_id": list(report.subject_ids.values())},
            schema_overrides={"subject_id": pl.Int64},
        )
        mapping.write_parquet(folder / "subject_ids.parquet")


def write_splits(splits: pl.DataFrame, folder: Path) -> None:
    """Write `subject_splits.parquet` into a folder of metadata."""
    import pyarrow as pa

    schema = pa.schema(
        [pa.field("subject_id", pa.int64(), nullable=False), pa.field("split", pa.string(), nullable=False)]
    )
    write_parquet(splits.to_arrow().cast(schema), folder / "subject_splits.parquet")


def _write_json(content: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""The audit of one file of a dataset: whatever needs its events, in blocks of whole patients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.audit.codes import add_up, count_block
from ehrseq.audit.labels import ROW_SCHEMA
from ehrseq.audit.outcomes import outcome_findings
from ehrseq.data.shards import Shard, read_blocks
from ehrseq.tasks.schema import Task
from ehrseq.tokenization.ehr_codes import code_kinds, split_kind

_BLOCK_ROWS = 300_000
_LEAST_ROWS = 10  # timed rows from which on equal histories are no chance
TABLES = ("codes", "values", "ahead")


@dataclass(frozen=True)
class ShardWork:
    """One file to audit.

    Attributes:
        shard: The file.
        rows: Parquet file of the labels of all tasks (`ROW_SCHEMA`, by subject).
        part: Folder for the results.
        names: Name of each task number.
        definitions: (number, task, end of its data) of the tasks whose definition is known.
        code_map: What codes are, default the tokenizer's own.
        input_kinds: Kinds of codes that a model reads; None: all.
    """

    shard: Shard
    rows: str
    part: str
    names: tuple[str, ...]
    definitions: tuple[tuple[int, Task, datetime], ...]
    code_map: tuple[tuple[str, ...], ...] | None = None
    input_kinds: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The file, in messages."""
        return self.shard.path


def audit_shard(work: ShardWork) -> str:
    """Audit one file; returns the folder with `subjects.parquet`, the tables of counts and `result.json`."""
    folder = Path(work.part)
    folder.mkdir(parents=True, exist_ok=True)
    subjects: list[pl.DataFrame] = []
    counts: dict[str, list[pl.DataFrame]] = {name: [] for name in TABLES}
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    matched = 0
    definitions = {number: (task, end) for number, task, end in work.definitions}
    labels = pl.scan_parquet(work.rows)
    for events in read_blocks(work.shard, rows=_BLOCK_ROWS):
        if events.is_empty():
            continue
        kinds = _kinds(events, work)
        subjects.append(_histories(events, kinds))
        first, last = events["subject_id"][0], events["subject_id"][-1]
        rows = labels.filter(pl.col("subject_id").is_between(first, last)).collect()
        rows = rows.join(subjects[-1].select("subject_id"), on="subject_id", how="semi", maintain_order="left")
        matched += rows.height
        if rows.is_empty():
            continue
        for name, table in count_block(events, rows, kinds).items():
            counts[name].append(table)
        for one in outcome_findings(events, rows, list(work.names), definitions, kinds, work.code_map):
            key = (one["kind"], one["task"], one["item"])
            if key in found:
                found[key]["count"] += one["count"]
                found[key]["positives"] += one["positives"]
            else:
                found[key] = one
    for name in TABLES:
        if counts[name]:
            add_up(counts[name]).write_parquet(folder / f"{name}.parquet")
    if subjects:
        pl.concat(subjects).write_parquet(folder / "subjects.parquet")
    content = {"split": work.shard.split, "matched": matched, "found": list(found.values())}
    (folder / "result.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def write_rows(rows: pl.DataFrame, path: Path) -> None:
    """The labels of all tasks where workers find them, in row groups that a range of subjects picks from."""
    rows.select(list(ROW_SCHEMA)).write_parquet(path, row_group_size=100_000)


def _kinds(events: pl.DataFrame, work: ShardWork) -> pl.DataFrame:
    """code, kind, entering."""
    codes = events["code"].unique().sort()
    kinds = pl.Series([split_kind(kind)[0] for kind in code_kinds(codes.to_list(), work.code_map)], dtype=pl.String)
    read = pl.lit(True) if work.input_kinds is None else pl.col("kind").is_in(list(work.input_kinds))
    return pl.DataFrame({"code": codes, "kind": kinds}).with_columns(
        (read & ~pl.col("kind").is_in(["birth", "ignore"])).alias("entering")
    )


def _histories(events: pl.DataFrame, kinds: pl.DataFrame) -> pl.DataFrame:
    """subject_id, first (first timed event after birth), rows, digest (of the history, times counted from its first
    event; null for short ones).
    """
    timed = (
        events.join(kinds.filter(pl.col("kind") == "birth"), on="code", how="anti")
        .filter(pl.col("time").is_not_null())
        .with_columns((pl.col("time") - pl.col("time").min().over("subject_id")).alias("since"))
        .with_columns(pl.struct("since", "code", "numeric_value").hash(seed=1).alias("hash"))
        .group_by("subject_id")
        .agg(
            pl.col("time").min().alias("first"),
            pl.len().cast(pl.Int64).alias("rows"),
            # Order of rows at one instant must not matter: a sum, in halves that cannot overflow.
            ((pl.col("hash") // 2**32).sum() * 31 + (pl.col("hash") % 2**32).sum()).alias("digest"),
        )
        .with_columns(pl.when(pl.col("rows") >= _LEAST_ROWS).then("digest").alias("digest"))
    )
    return events.select(pl.col("subject_id").unique().sort()).join(
        timed, on="subject_id", how="left", maintain_order="left"
    )

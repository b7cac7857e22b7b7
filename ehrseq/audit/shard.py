"""The audit of one file of a dataset: whatever needs its events, in blocks of whole patients."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TypedDict

import polars as pl

from ehrseq.audit.codes import add_up, count_block
from ehrseq.audit.outcomes import RowFinding, merged, outcome_findings
from ehrseq.data.shards import BLOCK_ROWS, ShardPart, read_blocks
from ehrseq.tasks.schema import Task
from ehrseq.tokenization.ehr_codes import code_kinds, split_kind
from ehrseq.work.files import write_whole

_LEAST_HISTORY = 10  # timed rows from which on equal histories are no chance


class AuditCounts(TypedDict):
    """What the audit of one file says beside its tables.

    Attributes:
        matched: Label rows whose patient is in the file.
        findings: Faults of label rows.
        tables: The tables that there are: `subjects`, and those of `count_block`.
    """

    matched: int
    findings: list[RowFinding]
    tables: list[str]


@dataclass(frozen=True)
class AuditPart(ShardPart[AuditCounts]):
    """The audit of one file.

    Attributes:
        rows: Parquet file of the labels of all tasks (`ROW_SCHEMA`, by subject).
        names: Name of each task number.
        definitions: (number, task, end of its data) of the tasks whose definition is known.
        code_map: What codes are to the model that reads them.
        rules: What codes are to the labels.
        timezone: Zone of patients whose rows name none.
        input_kinds: Kinds of codes that a model reads; None: all.
    """

    rows: str
    names: tuple[str, ...]
    definitions: tuple[tuple[int, Task, datetime], ...]
    code_map: tuple[tuple[str, ...], ...] | None = None
    input_kinds: tuple[str, ...] | None = None
    rules: tuple[tuple[str, ...], ...] | None = None
    timezone: str | None = None

    def make(self) -> AuditCounts:
        """See `RecordedPart.make`."""
        subjects: list[pl.DataFrame] = []
        counts: dict[str, list[pl.DataFrame]] = {}
        findings: list[RowFinding] = []
        matched = 0
        definitions = {number: (task, end) for number, task, end in self.definitions}
        labels = pl.scan_parquet(self.rows)
        for events in read_blocks(self.shard, rows=BLOCK_ROWS // 2):  # pairs of a moment and a code need their room
            if events.is_empty():
                continue
            kinds = self._kinds(events)
            subjects.append(_histories(events, kinds))
            first, last = events["subject_id"][0], events["subject_id"][-1]
            rows = labels.filter(pl.col("subject_id").is_between(first, last)).collect()
            rows = rows.join(subjects[-1].select("subject_id"), on="subject_id", how="semi", maintain_order="left")
            matched += rows.height
            if rows.is_empty():
                continue
            for name, table in count_block(events, rows, kinds).items():
                counts.setdefault(name, []).append(table)
            findings += outcome_findings(events, rows, list(self.names), definitions, kinds, self.rules, self.timezone)
        tables = {name: add_up(blocks) for name, blocks in counts.items()}
        if subjects:
            tables["subjects"] = pl.concat(subjects).with_columns(pl.lit(self.shard.split).alias("split"))
        for name, table in tables.items():
            write_whole(self.beside(f".{name}.parquet"), table.write_parquet)
        return {"matched": matched, "findings": merged(findings), "tables": list(tables)}

    def _kinds(self, events: pl.DataFrame) -> pl.DataFrame:
        """code, kind, entering."""
        codes = events["code"].unique().sort()
        kinds = pl.Series([split_kind(kind)[0] for kind in code_kinds(codes.to_list(), self.code_map)], dtype=pl.String)
        read = pl.lit(True) if self.input_kinds is None else pl.col("kind").is_in(list(self.input_kinds))
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
        .with_columns(pl.when(pl.col("rows") >= _LEAST_HISTORY).then("digest").alias("digest"))
    )
    return events.select(pl.col("subject_id").unique().sort()).join(
        timed, on="subject_id", how="left", maintain_order="left"
    )

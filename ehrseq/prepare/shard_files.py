"""The shards of a partition: one file a split, each written whole, and a record of what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import EVENT_COLUMNS, arrow_schema
from ehrseq.data.splits import SPLIT_SCHEMA, assign_splits
from ehrseq.prepare.spill import write_table
from ehrseq.work.files import write_json

_COUNTERS = ("skipped", "unresolved_references", "time_from_encounter_end", "notes")


@dataclass(frozen=True)
class ShardPlan:
    """How the shards of a dataset are written.

    Attributes:
        data: Folder of the shards, `<split>/<partition>.parquet` below it.
        records: Folder of the records.
        fractions: Split -> share, in order.
        seed: Seed of the splits.
        source_splits: Parquet file of the source's own splits, empty where it has none.
    """

    data: str
    records: str
    fractions: tuple[tuple[str, float], ...]
    seed: int
    source_splits: str = ""

    def record(self, number: int) -> Path:
        """The file that says that a partition is done, and what it holds."""
        return Path(self.records) / f"{number}.json"


def is_done(record: Path) -> bool:
    """Whether the shards that a record speaks of are complete: it is written after them."""
    return record.is_file()


def write_shards(events: pl.DataFrame, report: ConversionReport, plan: ShardPlan, number: int) -> None:
    """Write the shards of a partition, then its record.

    Args:
        events: Event table of all its subjects, sorted; may be empty.
        report: What was counted while it was made.
        plan: Where the shards go, and how the splits are drawn.
        number: Number of the partition, and of its files.

    Raises:
        ValueError: A split whose name cannot be a folder's.
    """
    content: dict[str, Any] = {
        **{name: dict(getattr(report, name)) for name in _COUNTERS},
        "duplicates_dropped": report.duplicates_dropped,
        "events": events.height,
        "splits": {},
    }
    if events.height:
        source = pl.read_parquet(plan.source_splits) if plan.source_splits else None
        splits = assign_splits(
            events["subject_id"].unique(), fractions=dict(plan.fractions), seed=plan.seed, source_splits=source
        )
        write_table(splits.to_arrow(), Path(plan.records) / f"{number}.splits.parquet")
        for (name,), members in splits.partition_by("split", as_dict=True).items():
            check_split_name(name)
            rows = events.join(members.select("subject_id"), on="subject_id", how="semi", maintain_order="left")
            table = rows.select(EVENT_COLUMNS).to_arrow().cast(arrow_schema())
            write_table(table, Path(plan.data) / name / f"{number}.parquet")
            content["splits"][name] = {"patients": members.height, "events": rows.height}
        content |= _summary(events)
    write_json(plan.record(number), content)


def check_split_name(name: str) -> None:
    """Refuse a name of a split that cannot be a folder's."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or name.startswith("."):
        raise ValueError(f"{name!r} cannot be a split: it names a folder.")


def _summary(events: pl.DataFrame) -> dict[str, Any]:
    # Not as datetimes: a date of the year 9999 may fall into the next one in another zone.
    times = events["time"].cast(pl.Int64)
    units = events.select(pl.col("unit").drop_nulls().value_counts()).unnest("unit")
    return {
        "codes": events["code"].unique().sort().to_list(),
        "units": dict(sorted(units.iter_rows())),
        "first": times.min(),
        "last": times.max(),
        "visits": events.filter(pl.col("visit_id").is_not_null()).select("subject_id", "visit_id").unique().height,
    }


def add_record(report: ConversionReport, content: Mapping[str, Any], whole: dict[str, Any]) -> None:
    """Add a partition's record to the report and to what is known of the whole dataset."""
    for name in _COUNTERS:
        for entry, count in content[name].items():
            getattr(report, name)[entry] += count
    report.duplicates_dropped += content["duplicates_dropped"]
    report.events_written += content["events"]
    for name, counts in content["splits"].items():
        split = whole["splits"].setdefault(name, {"patients": 0, "events": 0})
        for key, count in counts.items():
            split[key] += count
        report.subjects += counts["patients"]
        whole["shards"] += 1
    if content["events"]:
        whole["codes"].update(content["codes"])
        for unit, count in content["units"].items():
            whole["units"][unit] = whole["units"].get(unit, 0) + count
        whole["visits"] += content["visits"]
        for key, pick in (("first", min), ("last", max)):
            known = [moment for moment in (whole[key], content[key]) if moment is not None]
            whole[key] = pick(known) if known else None


def read_splits(plan: ShardPlan, numbers: range) -> pl.DataFrame:
    """(subject_id, split) of all partitions, sorted."""
    files = [Path(plan.records) / f"{number}.splits.parquet" for number in numbers]
    frames = [pl.read_parquet(file) for file in files if file.is_file()]
    return pl.concat([pl.DataFrame(schema=SPLIT_SCHEMA), *frames]).sort("subject_id")

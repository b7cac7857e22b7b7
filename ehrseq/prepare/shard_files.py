"""The shards of a partition: one file a split, each written whole, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import polars as pl

from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import EVENT_COLUMNS, EVENT_SCHEMA, arrow_schema
from ehrseq.data.splits import SPLIT_SCHEMA, assign_splits
from ehrseq.prepare.spill import write_table
from ehrseq.work.parts import RecordedPart

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
        """The record of a partition (`RecordedPart`)."""
        return Path(self.records) / f"{number}.json"


class ShardReport(TypedDict):
    """What the shards of a partition hold.

    Attributes:
        counters: Table of the conversion's report -> entry -> number.
        duplicates_dropped: Rows equal to an earlier one.
        events: Rows.
        splits: Split -> `patients` and `events`.
        codes: Distinct codes, sorted.
        units: Unit -> rows.
        first, last: First and last time, in microseconds since 1970; None where no row has a time.
        visits: Distinct visits.
    """

    counters: dict[str, dict[str, int]]
    duplicates_dropped: int
    events: int
    splits: dict[str, dict[str, int]]
    codes: list[str]
    units: dict[str, int]
    first: int | None
    last: int | None
    visits: int


@dataclass(frozen=True)
class PartitionPart(RecordedPart[ShardReport]):
    """The patients of one partition.

    Attributes:
        number: Its number.
        spill: Folder of the pieces and their index.
        plan: How its shards are written.
    """

    number: int
    spill: str
    plan: ShardPlan

    @property
    def name(self) -> str:
        """The partition, in messages."""
        return f"partition {self.number}"

    @property
    def record(self) -> Path:
        """See `RecordedPart.record`."""
        return self.plan.record(self.number)


def write_shards(events: pl.DataFrame, report: ConversionReport, plan: ShardPlan, number: int) -> ShardReport:
    """Write the shards of a partition.

    Args:
        events: Event table of all its subjects, sorted; may be empty.
        report: What was counted while it was made.
        plan: Where the shards go, and how the splits are drawn.
        number: Number of the partition, and of its files.

    Raises:
        ValueError: A split whose name cannot be a folder's.
    """
    sizes: dict[str, dict[str, int]] = {}
    if events.height:
        source = pl.read_parquet(plan.source_splits) if plan.source_splits else None
        splits = assign_splits(
            events["subject_id"].unique(), fractions=dict(plan.fractions), seed=plan.seed, source_splits=source
        )
        write_table(splits.to_arrow(), plan.record(number).with_suffix(".splits.parquet"))
        for (name,), members in splits.partition_by("split", as_dict=True).items():
            check_split_name(name)
            rows = events.join(members.select("subject_id"), on="subject_id", how="semi", maintain_order="left")
            table = rows.select(EVENT_COLUMNS).to_arrow().cast(arrow_schema())
            write_table(table, Path(plan.data) / name / f"{number}.parquet")
            sizes[name] = {"patients": members.height, "events": rows.height}
    else:
        events = pl.DataFrame(schema=EVENT_SCHEMA)
    # Not as datetimes: a date of the year 9999 may fall into the next one in another zone.
    time = pl.col("time").cast(pl.Int64)
    first, last = events.select(time.min().alias("first"), time.max().alias("last")).row(0)
    units = events.select(pl.col("unit").drop_nulls().value_counts()).unnest("unit")
    return {
        "counters": {name: dict(getattr(report, name)) for name in _COUNTERS},
        "duplicates_dropped": report.duplicates_dropped,
        "events": events.height,
        "splits": sizes,
        "codes": events["code"].unique().sort().to_list(),
        "units": dict(sorted(units.iter_rows())),
        "first": first,
        "last": last,
        "visits": events.filter(pl.col("visit_id").is_not_null()).select("subject_id", "visit_id").unique().height,
    }


def check_split_name(name: str) -> None:
    """Refuse a name of a split that cannot be a folder's."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or name.startswith("."):
        raise ValueError(f"{name!r} cannot be a split: it names a folder.")


def add_shards(shards: ShardReport, report: ConversionReport, whole: dict[str, Any]) -> None:
    """Add a partition to the report and to what is known of the whole dataset (see `PreparationReport`)."""
    for name, counts in shards["counters"].items():
        getattr(report, name).update(counts)
    report.duplicates_dropped += shards["duplicates_dropped"]
    report.events_written += shards["events"]
    for name, sizes in shards["splits"].items():
        split = whole["splits"].setdefault(name, {"patients": 0, "events": 0})
        for key, count in sizes.items():
            split[key] += count
        report.subjects += sizes["patients"]
        whole["shards"] += 1
    whole["codes"].update(shards["codes"])
    whole["units"].update(shards["units"])
    whole["visits"] += shards["visits"]
    firsts, lasts = (
        [moment for moment in (whole[key], shards[key]) if moment is not None] for key in ("first", "last")
    )
    whole["first"], whole["last"] = min(firsts, default=None), max(lasts, default=None)


def written_splits(plan: ShardPlan) -> pl.DataFrame:
    """(subject_id, split) of all partitions, sorted."""
    frames = [pl.read_parquet(file) for file in Path(plan.records).glob("*.splits.parquet")]
    return pl.concat([pl.DataFrame(schema=SPLIT_SCHEMA), *frames]).sort("subject_id")

"""Counts of a prepared dataset, file by file: what adds up over patients, so that no file is held beside another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.data.metadata import read_settings
from ehrseq.data.shards import ShardPart, dataset_shards, read_blocks, scan_shard
from ehrseq.tasks.label_sources import AuditedTask, read_audited
from ehrseq.tasks.visit_words import warn_without_admissions
from ehrseq.tokenization.ehr_codes import code_kinds, split_kind
from ehrseq.work.engine import Engine
from ehrseq.work.files import write_whole
from ehrseq.work.parts import kept_parts, run_parts

_TABLES = ("codes", "kinds", "patients", "calendar")
_KEYS = {"codes": ["code", "kind"], "kinds": ["kind"]}
_COUNTS = (
    *("rows", "patients", "patients_with_value", "without_time", "at_midnight", "with_value", "with_text"),
    "without_visit",
)
_Z = 1.959964  # of 95 %


@dataclass(frozen=True)
class DatasetStatistics:
    """What a dataset holds.

    Attributes:
        dataset: Its folder.
        patients: Split -> number of patients.
        events: Number of rows.
        codes: One row per code, the most frequent first: code, kind, rows, patients, patients_with_value, without_time,
            at_midnight (timed rows at 00:00:00, whose source may know the day only), with_value, with_text,
            without_visit, first, last (times), lowest, mean, highest (values, in whatever unit).
        kinds: The same counts by kind of code.
        events_per_patient: rows, to (a patient has as many rows, or at most `to`; null: no limit), patients.
        calendar: month, kind, rows, patients.
        prevalence: labels whose horizon the data cover (of the last horizon only those who died have one):
            task, from (start of a period), labels, positives, patients, positive_patients, negative_patients
            (who has such a label), prevalence, low, high (Wilson's 95 % interval).
    """

    dataset: str
    patients: dict[str, int]
    events: int
    codes: pl.DataFrame
    kinds: pl.DataFrame
    events_per_patient: pl.DataFrame
    calendar: pl.DataFrame
    prevalence: pl.DataFrame

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables by name, as they are written."""
        return {
            name: getattr(self, name) for name in ("codes", "kinds", "events_per_patient", "calendar", "prevalence")
        }


@dataclass(frozen=True)
class StatisticsPart(ShardPart[dict[str, int]]):
    """The tables of one file (`_TABLES`).

    Attributes:
        code_map: As of `label_events`.
    """

    code_map: tuple[tuple[str, ...], ...] | None

    def make(self) -> dict[str, int]:
        """See `RecordedPart.make`."""
        empty = scan_shard(self.shard).head(0).collect()  # a file may be without rows
        blocks = [
            _count_block(events, self.shard.split, self.code_map) for events in chain([empty], read_blocks(self.shard))
        ]
        for name in _TABLES:
            table = pl.concat(block[name] for block in blocks)
            write_whole(
                self.beside(f".{name}.parquet"),
                (_sum(table, _KEYS[name]) if name in _KEYS else table).write_parquet,
            )
        return {"blocks": len(blocks)}


def count_dataset(
    dataset: str | Path,
    labels: str | Path | None = None,
    *,
    work: str | Path | None = None,
    engine: Engine | None = None,
) -> DatasetStatistics:
    """Count a prepared dataset.

    Args:
        dataset: Its folder.
        labels: Labels for the prevalences: a dataset, a folder of labels or a label table; default: the dataset's own,
            where it has some.
        work: Folder for intermediate files (on a cluster: one that every machine sees), from which a run that was
            stopped goes on; default: a temporary one.
        engine: Where to work, default all cores of this machine.

    Raises:
        ValueError: No prepared dataset, one without events, no labels where some were named.
    """
    shards = dataset_shards(dataset)
    if labels is None and next((Path(dataset) / "labels").glob("*/**/*.parquet"), None) is not None:
        labels = dataset
    prevalence = _prevalences(labels)
    code_map = read_settings(dataset).rules
    settings = [str(Path(dataset).resolve()), code_map]
    with kept_parts(None if work is None else Path(work) / ".stats", settings) as folder:
        parts = [StatisticsPart(shard, str(folder), code_map) for shard in shards]
        list(run_parts(parts, desc="Counting", folder=folder, engine=engine))
        tables = {
            name: pl.concat(pl.read_parquet(part.beside(f".{name}.parquet")) for part in parts) for name in _TABLES
        }
    if tables["codes"].is_empty():
        raise ValueError(
            f"{dataset} holds no events, so that there is nothing to count; prepare a source that has some."
        )
    warn_without_admissions(tables["codes"].group_by("code").agg(pl.col("rows").sum()), code_map)
    patients = tables["patients"].group_by("split").agg(pl.col("patients").sum()).sort("split")
    per_patient = tables["patients"].group_by("rows").agg(pl.col("patients").sum()).sort("rows")
    return DatasetStatistics(
        str(dataset),
        dict(patients.iter_rows()),
        int(tables["kinds"]["rows"].sum()),
        _with_means(tables["codes"], ["code", "kind"]).sort("rows", "code", descending=[True, False]),
        _with_means(tables["kinds"], ["kind"])
        .drop("lowest", "mean", "highest")
        .sort("rows", "kind", descending=[True, False]),
        per_patient.select("rows", pl.col("rows").alias("to"), "patients"),
        tables["calendar"].group_by("month", "kind").agg(pl.col("rows", "patients").sum()).sort("month", "kind"),
        prevalence,
    )


def _count_block(events: pl.DataFrame, split: str, code_map: Sequence[Sequence[str]] | None) -> dict[str, pl.DataFrame]:
    """The tables of some whole patients."""
    unique = events["code"].unique()
    kinds = pl.DataFrame(
        {"code": unique, "kind": [split_kind(kind)[0] for kind in code_kinds(unique.to_list(), code_map)]},
        schema={"code": pl.String, "kind": pl.String},
    )
    table = events.join(kinds, on="code", how="left", maintain_order="left")
    rows, patients = pl.len().cast(pl.Int64).alias("rows"), pl.col("subject_id").n_unique().cast(pl.Int64)
    return {
        **{name: _count(table, keys) for name, keys in _KEYS.items()},
        "patients": table.group_by("subject_id")
        .agg(rows)
        .group_by("rows")
        .agg(pl.len().cast(pl.Int64).alias("patients"))
        .with_columns(pl.lit(split).alias("split")),
        "calendar": table.filter(pl.col("time").is_not_null() & (pl.col("kind") != "birth"))
        .group_by(pl.col("time").dt.truncate("1mo").dt.date().alias("month"), "kind")
        .agg(rows, patients.alias("patients")),
    }


def _count(table: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    time, value = pl.col("time"), pl.col("numeric_value").cast(pl.Float64)
    counts: dict[str, pl.Expr] = {
        "rows": pl.len(),
        "patients": pl.col("subject_id").n_unique(),
        "patients_with_value": pl.col("subject_id").filter(value.is_not_null()).n_unique(),
        "without_time": time.null_count(),
        "at_midnight": (time.dt.time() == pl.time(0, 0, 0)).sum(),
        "with_value": value.count(),
        "with_text": pl.col("text_value").count(),
        "without_visit": pl.col("visit_id").null_count(),
    }
    # In order, so that sums of values do not depend on the number of threads.
    return table.group_by(keys, maintain_order=True).agg(
        *(counts[name].cast(pl.Int64).alias(name) for name in _COUNTS),
        time.min().alias("first"),
        time.max().alias("last"),
        value.min().alias("lowest"),
        value.sum().alias("sum"),
        value.max().alias("highest"),
    )


def _sum(table: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Counts of several blocks together: no patient stands in two."""
    return table.group_by(keys, maintain_order=True).agg(
        pl.col(_COUNTS).sum(),
        pl.col("first").min(),
        pl.col("last").max(),
        pl.col("lowest").min(),
        pl.col("sum").sum(),
        pl.col("highest").max(),
    )


def _with_means(table: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    mean = pl.when(pl.col("with_value") > 0).then(pl.col("sum") / pl.col("with_value"))
    return _sum(table, keys).with_columns(mean.alias("sum")).rename({"sum": "mean"})


def _prevalences(labels: str | Path | None) -> pl.DataFrame:
    """Labels of each task by the period of their prediction time: years, or quarters or months of short spans."""
    counts = ("labels", "positives", "patients", "positive_patients", "negative_patients")
    schema: dict[str, Any] = {"task": pl.String, "from": pl.Date} | dict.fromkeys(counts, pl.Int64)
    schema |= dict.fromkeys(("prevalence", "low", "high"), pl.Float64)
    frames = [pl.DataFrame(schema=schema)]
    for name, table in _label_tables(labels):
        if table.is_empty():
            continue
        first, last = table["prediction_time"].min(), table["prediction_time"].max()
        years = (last - first).days / 365.25  # type: ignore[operator,union-attr]
        every = "1mo" if years <= 3 else "1q" if years <= 10 else "1y"
        subject, positive = pl.col("subject_id"), pl.col("boolean_value")
        n, p = pl.col("labels"), pl.col("positives") / pl.col("labels")
        middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * (p * (1 - p) / n + _Z**2 / (4 * n**2)).sqrt()
        frames.append(
            table.group_by(pl.col("prediction_time").dt.truncate(every).dt.date().alias("from"))
            .agg(
                pl.len().alias("labels"),
                positive.sum().alias("positives"),
                subject.n_unique().alias("patients"),
                subject.filter(positive).n_unique().alias("positive_patients"),
                subject.filter(~positive).n_unique().alias("negative_patients"),
            )
            .sort("from")
            .with_columns(pl.col(counts).cast(pl.Int64))
            .with_columns(
                pl.lit(name).alias("task"),
                p.alias("prevalence"),
                pl.min_horizontal(middle - half, p).clip(0).alias("low"),
                pl.max_horizontal(middle + half, p).clip(None, 1).alias("high"),
            )
            .select(list(schema))
        )
    return pl.concat(frames)


def _label_tables(labels: str | Path | None) -> Iterator[tuple[str, pl.DataFrame]]:
    if labels is None:
        return
    for task in read_audited(labels):
        yield task.name, _covered(task)


def _covered(task: AuditedTask) -> pl.DataFrame:
    """The labels whose horizon ends within the data: behind that there are those of the dead alone."""
    definition, end = task.definition, task.end_of_data
    if definition is None or end is None or definition.to_stay_end or not definition.censoring:
        return task.labels
    ahead = definition.horizon - (definition.offset if definition.horizon_from == "anchor" else timedelta(0))
    return task.labels.filter(pl.col("prediction_time") + ahead <= end)

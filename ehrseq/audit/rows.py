"""Encoded rows: does one hold an event later than its prediction time?

Two independent looks. Every row's `times` channel is held against its prediction time, both counted from the patient's
first event, which the events themselves tell. And rows drawn at random are encoded again from events that were cut at
the prediction time beforehand: a row may hold no token that the second encoding lacks. Where a model is given without
encoded rows, its tokenizer encodes the whole histories itself, and the rows cut from them must equal those of the cut
events in every channel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ehrseq.audit.findings import Finding, display_path
from ehrseq.audit.outcomes import RowFinding
from ehrseq.data.shards import Shard, scan_shard
from ehrseq.tokenization.ehr_codes import MINUTE_US, WEEK_US

_TOLERANCE_US = MINUTE_US  # and what float32 cannot tell apart
_BATCH = 4_096
_COLUMNS = ("subject_id", "prediction_time", "times")
_RECENT = 256  # tokens of a prompt cut from encoded patients: a later event would stand among the last


@dataclass(frozen=True)
class RowSource:
    """Encoded rows of one file or folder.

    Attributes:
        name: It, as the user would name it.
        batches: Reads subject_id, prediction_time, times and, where known, input_ids and task, batch by batch.
    """

    name: str
    batches: Callable[[], Iterator[pl.DataFrame]]


def row_sources(path: str | Path, labels: Mapping[str, pl.DataFrame]) -> list[RowSource]:
    """Encoded rows below a path: the folder of `ehrseq tokenize`, whose patients make a row for each label, or tables
    of rows as Parquet, or as Arrow that `datasets` writes.

    Raises:
        ValueError: There are none.
    """
    path = Path(path)
    if is_encoded_folder(path):
        return [RowSource(display_path(path), partial(_prompts, path, labels))]
    files = [path] if path.is_file() else sorted([*path.rglob("*.parquet"), *path.rglob("*.arrow")])
    if not files:
        raise ValueError(f"{path} holds no encoded rows (.parquet or .arrow with {list(_COLUMNS)}).")
    return [RowSource(display_path(file), partial(_batches, file)) for file in files]


def is_encoded_folder(path: Path) -> bool:
    """Whether `ehrseq tokenize` wrote this folder."""
    from ehrseq.encode.dataset import is_encoded

    return is_encoded(path)


def _prompts(path: Path, labels: Mapping[str, pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The row of every label, cut from encoded patients as training cuts it."""
    from ehrseq.encode.dataset import EncodedDataset

    data = EncodedDataset(path)
    known = {name: table for name, table in labels.items() if name in data.tokenizer.tasks}
    for table in data.prompts(known, _RECENT).tables():
        yield _frame(table.select([*_COLUMNS, "input_ids", "task"]))


def time_findings(sources: Sequence[RowSource], first: pl.DataFrame) -> Iterator[RowFinding]:
    """Rows whose tokens lie after the prediction time.

    Args:
        sources: Encoded rows.
        first: subject_id, first: each patient's first timed event after birth.

    Returns:
        One finding for each source with such rows.

    Raises:
        ValueError: A file without the columns that are needed.
    """
    for source in sources:
        late: RowFinding | None = None
        for batch in source.batches():
            table = batch.join(first, on="subject_id", how="left").with_columns(
                pl.col("times").list.max().cast(pl.Float64).alias("latest"),
                ((pl.col("prediction_time") - pl.col("first")).dt.total_microseconds() / WEEK_US).alias("bound"),
            )
            slack = _TOLERANCE_US / WEEK_US + pl.col("latest").abs() * 2.0 * float(np.finfo(np.float32).eps)
            beyond = table.filter(pl.col("latest") > pl.max_horizontal("bound", pl.lit(0.0)) + slack)
            if beyond.is_empty():
                continue
            row = beyond.row(0, named=True)
            if late is None:
                late = {
                    "kind": "future_event_in_row",
                    "task": str(row.get("task") or ""),
                    "item": source.name,
                    "count": 0,
                    "positives": 0,
                    "subject_id": row["subject_id"],
                    "prediction_time": str(row["prediction_time"]),
                    "text": f"its last token lies {(row['latest'] - row['bound']) * 7:.2f} days after it",
                }
            late["count"] += beyond.height
        if late is not None:
            yield late


def encoding_findings(
    tokenizer: Any, shards: Sequence[Shard], rows: pl.DataFrame, names: Sequence[str], encoded: Sequence[RowSource] = ()
) -> Iterator[Finding]:
    """Rows drawn at random, encoded again from events cut at their prediction time.

    Args:
        tokenizer: The model's tokenizer.
        shards: The dataset.
        rows: Labels drawn (`ROW_SCHEMA`).
        names: Name of each task number.
        encoded: Encoded rows; none: the tokenizer encodes the whole histories.
    """
    known = [number for number, name in enumerate(names) if name in tokenizer.tasks]
    rows = rows.filter(pl.col("task").is_in(known))
    subjects = rows["subject_id"].unique()
    events = pl.concat(
        scan_shard(shard).filter(pl.col("subject_id").is_in(subjects.implode())).collect() for shard in shards
    )
    wrong: dict[str, list[tuple[int, Any, str]]] = {}
    tables = events.sort("subject_id", maintain_order=True).partition_by("subject_id", as_dict=True)
    encoded_ids = _encoded_ids(encoded, rows, names) if encoded else None
    for number in sorted(set(rows["task"].to_list())):
        name = names[number]
        of_task = rows.filter(pl.col("task") == number)
        histories = None
        if encoded_ids is None:
            histories = tokenizer.encode_histories(events)
            index = histories.index_labels(
                {name: of_task.select("subject_id", "prediction_time", pl.col("label").alias("boolean_value"))}
            )
        for k, row in enumerate(of_task.iter_rows(named=True)):
            table = tables.get((row["subject_id"],))
            if table is None:
                continue
            at = row["prediction_time"]
            cut = table.filter(pl.col("time").is_null() | (pl.col("time") <= at))
            if cut.is_empty():
                continue
            patient = {"subject_id": row["subject_id"], "events": cut.to_dicts()}
            again = tokenizer.encode_patient(patient, name, at)
            if histories is not None:
                whole = histories.prompted_row(index, k)
                different = [channel for channel in again if not np.array_equal(whole[channel], again[channel])]
                if different:
                    wrong.setdefault(name, []).append((row["subject_id"], at, f"{', '.join(different)} differ"))
                continue
            ids = (encoded_ids or {}).get((row["subject_id"], at, name))
            if ids is None:
                continue
            extra = Counter(ids) - Counter(again["input_ids"].tolist())
            special = set(tokenizer.all_special_ids)
            tokens = [tokenizer.convert_ids_to_tokens(token) for token in extra if token not in special]
            if tokens:
                wrong.setdefault(name, []).append((row["subject_id"], at, f"it also holds {tokens[:3]}"))
    for name, cases in wrong.items():
        subject, at, what = cases[0]
        yield Finding(
            "future_event_in_row",
            name,
            "" if encoded_ids is None else "tokens",
            len(cases),
            f"{len(cases)} of {rows.height} rows drawn hold what the events up to their prediction time do not give.",
            example=f"{subject}\t{at}\t{what}",
        )


def _encoded_ids(
    sources: Sequence[RowSource], rows: pl.DataFrame, names: Sequence[str]
) -> dict[tuple[int, datetime, str], Sequence[int]]:
    """The `input_ids` of the rows drawn, where they are among the encoded ones."""
    wanted = rows.select("subject_id", "prediction_time").unique()
    ids: dict[tuple[int, datetime, str], Sequence[int]] = {}
    for source in sources:
        for batch in source.batches():
            drawn = batch.join(wanted, on=["subject_id", "prediction_time"], how="semi")
            for row in drawn.iter_rows(named=True):
                for name in [row["task"]] if row.get("task") else names:
                    ids[(row["subject_id"], row["prediction_time"], name)] = row.get("input_ids") or ()
    return ids


def _batches(file: Path) -> Iterator[pl.DataFrame]:
    """The columns that are looked at, in batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            parquet = pq.ParquetFile(file)
            columns = _present(parquet.schema_arrow.names, file)
            source: Iterator[Any] = parquet.iter_batches(batch_size=_BATCH, columns=columns)
        else:
            stream = pa.ipc.open_stream(pa.memory_map(str(file)))
            columns = _present(stream.schema.names, file)
            source = (batch.select(columns) for batch in stream)
        for batch in source:
            yield _frame(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as encoded rows ({error}).") from error


def _frame(batch: Any) -> pl.DataFrame:
    frame = pl.DataFrame(pl.from_arrow(batch))
    return frame.with_columns(
        pl.col("prediction_time").cast(pl.Datetime("us")),
        *([pl.col("task").cast(pl.String)] if "task" in frame.columns else []),
    )


def _present(names: Sequence[str], file: Path) -> list[str]:
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        raise ValueError(
            f"{file} lacks the columns {missing} (it has {list(names)}); encoded rows come from `ehrseq tokenize` or "
            "tokenizer.encode_table(events, labels=...)."
        )
    return [*_COLUMNS, *(name for name in ("input_ids", "task") if name in names)]

"""Encoded patients on disk: one row a patient, as Arrow that is mapped into memory or as Parquet.

| column | type | meaning |
|---|---|---|
| subject_id | int64 | the patient; ascending in a file |
| first | timestamp[us] | the first timed event after birth |
| birth | timestamp[us] | null where unknown |
| static_ids | list of int32 | tokens without a time |
| seconds | list of uint32 | of each row, the seconds since `first`; empty where one of them is not whole, or too many |
| micros | list of int64 | the same in microseconds; empty where `seconds` are there |
| ids | list of uint16 (int32 from 65,536 tokens on) | of each row, its token; 0 where it makes none of its own |
| flags | list of uint8 | of each row: token type (bits 0-3), opens a visit (bit 4), a visit is open after it (bit 5) |
| tokens | int32 | tokens that the rows are laid out as, static ones and task tokens not among them |

Seven bytes a row, and everything else follows: the channels (`ehr_rows.lay_out`), and what is known at any time, which
is the rows up to it. Training rows (windows, prompts) are therefore indices into these files, never copies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ehrseq.tokenization.ehr_codes import SECOND_US
from ehrseq.tokenization.ehr_rows import NO_TIME, HistoryRows

FORMATS = ("arrow", "parquet")
_KEY = b"ehrseq.encoded"
_OPENS, _OPEN, _TYPE = 1 << 4, 1 << 5, 15


def file_schema(vocab_size: int, provenance: Mapping[str, Any]) -> pa.Schema:
    """Schema of a file.

    Args:
        vocab_size: Tokens of the tokenizer.
        provenance: What the file is made of (digests), kept in it.
    """
    ids = pa.uint16() if vocab_size <= 1 << 16 else pa.int32()
    fields = {
        "subject_id": pa.int64(),
        "first": pa.timestamp("us"),
        "birth": pa.timestamp("us"),
        "static_ids": pa.list_(pa.int32()),
        "seconds": pa.list_(pa.uint32()),
        "micros": pa.list_(pa.int64()),
        "ids": pa.list_(ids),
        "flags": pa.list_(pa.uint8()),
        "tokens": pa.int32(),
    }
    return pa.schema(list(fields.items()), metadata={_KEY: json.dumps(provenance, sort_keys=True)})


def to_batch(rows: HistoryRows, schema: pa.Schema) -> pa.RecordBatch:
    """Patients as a batch of a file."""
    count = np.diff(rows.row_offsets)
    offset = rows.time - np.repeat(rows.first, count)
    # Patients whose times are not whole seconds (or span more than 136 years) keep microseconds.
    fine = (offset % SECOND_US != 0) | (offset < 0) | (offset >= SECOND_US << 32)
    is_fine = np.zeros(len(rows), bool)
    is_fine[np.repeat(np.arange(len(rows)), count)[fine]] = True
    of_fine = np.repeat(is_fine, count)
    opens = rows.opens.astype(np.int64)
    order = np.cumsum(opens) - np.repeat(np.concatenate([[0], np.cumsum(opens)])[rows.row_offsets[:-1]], count)
    width = (rows.types > 0) + opens * np.where(order > 1, 4, 1)
    tokens = np.diff(np.concatenate([[0], np.cumsum(width)])[rows.row_offsets])
    birth = pa.array(rows.birth, pa.int64(), mask=rows.birth == NO_TIME).cast(pa.timestamp("us"))
    ids = rows.ids.astype(schema.field("ids").type.value_type.to_pandas_dtype())
    flags = rows.types.astype(np.uint8) | opens.astype(np.uint8) * _OPENS | rows.is_open.astype(np.uint8) * _OPEN
    columns = [
        pa.array(rows.subject_ids, pa.int64()),
        pa.array(rows.first, pa.int64()).cast(pa.timestamp("us")),
        birth,
        _lists(rows.static_offsets, rows.static_ids.astype(np.int32)),
        _lists(_offsets(np.where(is_fine, 0, count)), (offset[~of_fine] // SECOND_US).astype(np.uint32)),
        _lists(_offsets(np.where(is_fine, count, 0)), offset[of_fine]),
        _lists(rows.row_offsets, ids),
        _lists(rows.row_offsets, flags),
        pa.array(tokens, pa.int32()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def from_batch(batch: pa.RecordBatch) -> HistoryRows:
    """The inverse of `to_batch`; any slice of a batch will do."""
    first = first_times(batch)
    births = batch.column("birth").view(pa.int64())
    birth = (births.fill_null(NO_TIME) if births.null_count else births).to_numpy()
    static_offsets, static_ids = _values(batch.column("static_ids"))
    row_offsets, ids = _values(batch.column("ids"))
    flags = _values(batch.column("flags"))[1]
    types = (flags & _TYPE).astype(np.int8)
    return HistoryRows(
        subject_ids=batch.column("subject_id").to_numpy(),
        first=first,
        birth=birth,
        static_offsets=static_offsets,
        static_ids=static_ids,
        row_offsets=row_offsets,
        time=row_times(batch, first, row_offsets),
        ids=ids.astype(np.int32),
        types=types,
        opens=(flags & _OPENS) > 0,
        is_open=is_open(flags),
    )


def first_times(batch: pa.RecordBatch) -> np.ndarray:
    """First timed event of each patient, microseconds."""
    array: np.ndarray = batch.column("first").view(pa.int64()).to_numpy()
    return array


def is_open(flags: np.ndarray) -> np.ndarray:
    """Whether a visit is open after rows of these flags."""
    return (flags & _OPEN) > 0


def row_times(batch: pa.RecordBatch, first: np.ndarray, row_offsets: np.ndarray) -> np.ndarray:
    """Instants (microseconds) of the rows of a batch."""
    count = np.diff(row_offsets)
    time = np.repeat(first, count)
    seconds, micros = _values(batch.column("seconds"))[1], batch.column("micros")
    fine_offsets, fine = _values(micros)
    if not len(fine):
        time += seconds.astype(np.int64) * SECOND_US
        return time
    of_fine = np.repeat(np.diff(fine_offsets) > 0, count)
    time[~of_fine] += seconds.astype(np.int64) * SECOND_US
    time[of_fine] += fine
    return time


class FileWriter:
    """Writes batches of patients into one file.

    Args:
        path: The file.
        schema: As `file_schema` makes it.
        format: One of `FORMATS`.
    """

    def __init__(self, path: Path, schema: pa.Schema, format: str) -> None:
        self._schema = schema
        if format == "arrow":
            self._writer: Any = pa.ipc.new_file(path, schema)
        else:
            # Seconds ascend in a patient: their differences are small. Tokens and flags repeat.
            self._writer = pq.ParquetWriter(
                path,
                schema,
                compression="zstd",
                use_dictionary=["ids.list.element", "flags.list.element", "static_ids.list.element"],
                column_encoding={"seconds.list.element": "DELTA_BINARY_PACKED"},
            )

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, rows: HistoryRows) -> None:
        """Append patients."""
        self._writer.write_batch(to_batch(rows, self._schema))


def provenance_of(path: str | Path) -> dict[str, Any]:
    """What a file says that it is made of; empty where it is no such file.

    Reads no more than its schema.
    """
    try:
        if Path(path).suffix == ".parquet":
            metadata = pq.read_schema(path).metadata
        else:
            with pa.memory_map(str(path)) as source:
                metadata = pa.ipc.open_file(source).schema.metadata
    except (pa.ArrowException, OSError):
        return {}
    values: dict[str, Any] = json.loads((metadata or {}).get(_KEY, b"{}"))
    return values


def open_batches(path: str | Path) -> list[pa.RecordBatch]:
    """The batches of a file: mapped, so that only what is used is read (Arrow), or read (Parquet).

    Raises:
        ValueError: It cannot be read.
    """
    try:
        if Path(path).suffix == ".parquet":
            batches: list[Any] = pq.read_table(path).combine_chunks().to_batches()
            return batches
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def stream_batches(path: str | Path) -> Iterator[pa.RecordBatch]:
    """The batches of a file one after the other, in bounded memory.

    Raises:
        ValueError: It cannot be read.
    """
    if Path(path).suffix != ".parquet":
        yield from open_batches(path)
        return
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from file.read_row_group(group).combine_chunks().to_batches()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as encoded rows ({error}); remove it and run `ehrseq tokenize` again.")


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def _values(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets from 0 on, and the values, of a list column, also of a slice of one; copies no values."""
    offsets = column.offsets.to_numpy()
    start, stop = int(offsets[0]), int(offsets[-1])
    return offsets.astype(np.int64) - start, column.values.slice(start, stop - start).to_numpy()

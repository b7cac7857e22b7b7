"""Rows on their way from the files of a source to the patients: pieces on disk, a row group for each partition.

A piece holds what a part of the source held, sorted by partition, so that everything of one partition is read from all
pieces without reading the rest. Partitions are drawn by a hash of the patient, so each is a table of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ehrseq.data.dataset import write_parquet
from ehrseq.data.fhir.references import bare_id
from ehrseq.work.files import write_whole


def partition_of_keys(keys: Iterable[str], partitions: int) -> np.ndarray:
    """Partition of each key of a patient (int32 `[n]`): by the id inside it, so that `x` and
    `https://server/fhir/Patient/x` meet.
    """
    hashes = np.fromiter((zlib.crc32(bare_id(key).encode()) for key in keys), dtype=np.uint64)
    return _fold(hashes, partitions)


def partition_of_subjects(subject_ids: np.ndarray, partitions: int) -> np.ndarray:
    """Partition of each subject_id (int32 `[n]`)."""
    return _fold(subject_ids.astype(np.int64).view(np.uint64), partitions)


def _fold(hashes: np.ndarray, partitions: int) -> np.ndarray:
    """Numbers below `partitions` whose value depends on all bits: the finalizer of splitmix64."""
    with np.errstate(over="ignore"):
        mixed = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    # The high 32 bits scaled to the range: no division, and no bias worth the name.
    scaled: np.ndarray = ((mixed >> np.uint64(32)) * np.uint64(partitions)) >> np.uint64(32)
    return scaled.astype(np.int32)


def write_piece(table: pa.Table, partition: np.ndarray, path: Path) -> list[int]:
    """Write a piece.

    Args:
        table: Rows in the order of the source.
        partition: int32 `[rows]`.
        path: File to write, whole or not at all.

    Returns:
        The partitions of its row groups, in order; partitions without a row have none.
    """
    order = np.argsort(partition, kind="stable")
    present, starts = np.unique(partition[order], return_index=True)
    bounds = [*starts.tolist(), len(order)]

    def write(file: Path) -> None:
        plain = pa.schema(
            [
                pa.field(item.name, item.type.value_type if pa.types.is_dictionary(item.type) else item.type)
                for item in table.schema
            ]
        )
        with pq.ParquetWriter(file, plain, compression="lz4", write_statistics=False) as writer:
            for number in range(len(present)):
                rows = table.take(pa.array(order[bounds[number] : bounds[number + 1]]))
                writer.write_table(rows.cast(plain), row_group_size=max(1, rows.num_rows))

    write_whole(path, write)
    return [int(number) for number in present]


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table, whole or not at all."""
    write_whole(path, partial(write_parquet, table))


def read_partition(
    path: str | Path, groups: Sequence[int], partition: int, *, dictionaries: Sequence[str] = ()
) -> pa.Table | None:
    """Rows of one partition of a piece, None where it has none.

    Args:
        path: The piece.
        groups: What `write_piece` returned.
        partition: The partition to read.
        dictionaries: String columns to read as indices into their distinct values.
    """
    if partition not in groups:
        return None
    with pq.ParquetFile(path, read_dictionary=list(dictionaries), memory_map=True) as file:
        return file.read_row_group(groups.index(partition), use_threads=False)


def codes_of(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """(distinct strings, index of each row into them int32) of a column that was read as dictionary."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], pa.dictionary(pa.int32(), pa.string()))
    return array.dictionary.to_pylist(), array.indices.to_numpy(zero_copy_only=False).astype(np.int32)

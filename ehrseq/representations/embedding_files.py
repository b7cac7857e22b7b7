"""Files of vectors: how `ehrseq embed` writes them, and how everything else reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ehrseq.data.parquet import check_parquet
from ehrseq.data.schema import LABEL_KEYS

VECTOR = "vector"
"""Column of the vectors, a list of fixed size of float32."""
VISIT_COLUMNS = ("visit", "start", "end")
_ABOUT = b"ehrseq"  # key of the file's own metadata


@dataclass(frozen=True)
class Embeddings:
    """Vectors of patients or visits.

    Attributes:
        table: subject_id, prediction_time, of visits also visit (from 1), start, end (null: open at that time).
        vectors: float32 [n, d], a row each.
        about: How they were made: model, digest, level, pooling, task, notice.
    """

    table: pl.DataFrame
    vectors: NDArray[np.float32]
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return self.table.height

    @property
    def keys(self) -> list[str]:
        """Columns that tell two vectors apart."""
        return [*LABEL_KEYS, *(["visit"] if "visit" in self.table.columns else [])]


def embedding_schema(size: int, *, visits: bool) -> dict[str, pl.DataType]:
    """Columns of a file of vectors of `size` numbers."""
    schema: dict[str, pl.DataType] = {"subject_id": pl.Int64(), "prediction_time": pl.Datetime("us")}
    if visits:
        schema |= {"visit": pl.Int64(), "start": pl.Datetime("us"), "end": pl.Datetime("us")}
    return {**schema, VECTOR: pl.Array(pl.Float32(), size)}


def with_vectors(table: pl.DataFrame, vectors: NDArray[np.float32]) -> pl.DataFrame:
    """A table with its vectors as a column."""
    size = vectors.shape[1]
    column = pl.Series(VECTOR, vectors, dtype=pl.Array(pl.Float32(), size)) if len(vectors) else None
    schema = embedding_schema(size, visits="visit" in table.columns)
    whole = table.with_columns(pl.lit(None, schema[VECTOR]).alias(VECTOR) if column is None else column)
    return whole.select(pl.col(name).cast(kind) for name, kind in schema.items())


def join_embeddings(parts: Iterable[Path], file: Path, about: Mapping[str, Any]) -> int:
    """Write the rows of many tables as one file, never all at once; returns how many there are."""
    writer: pq.ParquetWriter | None = None
    rows = 0
    try:
        for part in parts:
            table = pl.read_parquet(part, hive_partitioning=False).to_arrow()
            if writer is None:
                schema = table.schema.with_metadata({_ABOUT: json.dumps(about, sort_keys=True).encode()})
                writer = pq.ParquetWriter(file, schema, compression="zstd")
            if table.num_rows:
                writer.write_table(table.cast(writer.schema))
                rows += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    return rows


def read_embeddings(file: str | Path) -> Embeddings:
    """Read what `ehrseq embed` wrote.

    Raises:
        ValueError: No such file, no Parquet, other columns, an empty one, or vectors that are not finite.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no file {path}; give the Parquet file that `ehrseq embed` wrote.")
    check_parquet(path)
    try:
        raw = pq.read_table(path)
        table = pl.DataFrame(pl.from_arrow(raw))
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}; run `ehrseq embed` again.") from error
    kind = table.schema.get(VECTOR)
    missing = [name for name in LABEL_KEYS if name not in table.columns]
    if missing or not isinstance(kind, pl.Array) or not kind.inner.is_numeric():
        raise ValueError(
            f"{path} is no file of vectors: its columns are {dict(table.schema)}; expected subject_id, "
            f"prediction_time and {VECTOR!r}, a list of fixed size of float32, as `ehrseq embed` writes them."
        )
    if table.is_empty():
        raise ValueError(f"{path} holds no vector; embed patients who have a record.")
    vectors = table[VECTOR].cast(pl.Array(pl.Float32(), kind.size)).to_numpy()
    if table[VECTOR].null_count() or not np.isfinite(vectors).all():
        raise ValueError(f"{path} holds vectors that are absent or not finite; run `ehrseq embed` again.")
    about = json.loads((raw.schema.metadata or {}).get(_ABOUT, b"{}"))
    others = [name for name in (*LABEL_KEYS, *VISIT_COLUMNS) if name in table.columns]
    found = Embeddings(table.select(others), np.ascontiguousarray(vectors), about)
    if found.table.select(found.keys).is_duplicated().any():
        raise ValueError(f"{path} holds two vectors of one {' and '.join(found.keys)}; keep one of them.")
    return found

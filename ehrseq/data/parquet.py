"""Parquet files of others: what they unpack to is bounded by their size, and their zones are such as polars knows.

A file of a few kilobytes may state 10^9 rows (run lengths of one value), or pages that unpack to gigabytes. Both stand
in its footer, so that they are refused before anything is read: more than `MOST_VALUES_A_BYTE` values, or
`MOST_UNPACKED_A_BYTE` bytes, for each byte of the file. The demonstration data of MIMIC-IV as MEDS hold 4 values a byte
in all their columns, 1 in those that are read, and 1.3 bytes a byte; a table of one value all through has more, and
what fits into a little memory is read however well it packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

MOST_VALUES_A_BYTE, VALUES_ALWAYS_HELD = 50, 1 << 24
"""Values (rows times columns) of a file: as many for each of its bytes; so many whatever its size."""

MOST_UNPACKED_A_BYTE, BYTES_ALWAYS_HELD = 250, 64 << 20
"""Bytes of a file's pages, unpacked: as many for each of its bytes; so many whatever its size."""


def check_parquet(file: str | Path, columns: Sequence[str] | None = None) -> pa.Schema | None:
    """Refuse a file that was made to fill the memory.

    Args:
        file: The file.
        columns: The columns that are read, default all.

    Returns:
        Its schema; None of what is no Parquet (who reads it says so).

    Raises:
        ValueError: It holds more than its size allows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(file)
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError):
        return None
    size = Path(file).stat().st_size
    read = footer.num_columns if columns is None else len(set(columns) & set(schema.names))
    values = footer.num_rows * max(read, 1)
    unpacked = sum(footer.row_group(number).total_byte_size for number in range(footer.num_row_groups))
    for has, most, what in (
        (values, max(VALUES_ALWAYS_HELD, MOST_VALUES_A_BYTE * size), f"{footer.num_rows:,} rows of {read} columns"),
        (unpacked, max(BYTES_ALWAYS_HELD, MOST_UNPACKED_A_BYTE * size), f"{unpacked:,} bytes, unpacked"),
    ):
        if has > most:
            raise ValueError(
                f"{file}: the file of {size:,} bytes states {what}, more than any record of its size has (at most "
                f"{most:,}). Fetch it again; if it is whole, write it again without compression, or in smaller files."
            )
    return schema


def has_unknown_zone(schema: pa.Schema | None) -> bool:
    """Whether a time has a zone that polars cannot read: an offset (`+05:30`, as pandas writes) or no zone's name.

    The times themselves are UTC, whatever the name.
    """
    import pyarrow as pa

    from ehrseq.data.instants import check_zone

    for field in schema or ():
        zone = field.type.tz if pa.types.is_timestamp(field.type) else None
        if zone is None:
            continue
        try:
            check_zone(zone)
        except ValueError:
            return True
        if zone[:1] in "+-":
            return True
    return False

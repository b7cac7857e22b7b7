"""Which files hold FHIR, and how they are shared out: parts that can be read independently.

A plain file is cut at lines; a gzip file, which cannot be entered in the middle, is read whole by each of several
tasks, which parse every n-th block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ehrseq.data.fhir.blocks import ReadTask, file_size, is_ndjson

ENDINGS = (".ndjson", ".jsonl", ".json")
"""Endings of FHIR files, each perhaps with `.gz` behind it."""

# Names of files beside FHIR resources in packages and exports that are no resources themselves.
_NOT_RESOURCES = frozenset({"package.json", ".index.json", "manifest.json"})


def fhir_files(path: Path) -> list[Path]:
    """FHIR files at a path, sorted by name; hidden files and package manifests are left out."""
    if path.is_file():
        return [path] if _may_be_fhir(path) else []
    files = (file for file in path.rglob("*") if _may_be_fhir(file) and file.is_file())
    return sorted(file for file in files if file.name not in _NOT_RESOURCES and not file.name.startswith("."))


def _may_be_fhir(file: Path) -> bool:
    return file.name.removesuffix(".gz").endswith(ENDINGS)


def size_of(file: Path) -> int:
    """Bytes of uncompressed text of a file, about; 0 of one that cannot be read, which reading it then says."""
    try:
        return file_size(file)
    except OSError:
        return 0


def plan_reading(
    files: Sequence[Path],
    sizes: Sequence[int],
    *,
    part_bytes: int,
    stripes_of: Callable[[int], int],
    skip_errors: bool = False,
) -> list[ReadTask]:
    """Tasks that read all of the files, in their order.

    Args:
        files: The files.
        sizes: Bytes of text of each (`size_of`).
        part_bytes: Bytes of a part of a plain file, about.
        stripes_of: Size of a gzip file -> by how many tasks it is read.
        skip_errors: Count lines that cannot be read and go on.
    """
    tasks: list[ReadTask] = []
    for index, (file, size) in enumerate(zip(files, sizes, strict=True)):
        whole = ReadTask(index, str(file), cost=size, skip_errors=skip_errors)
        if not is_ndjson(whole.path):
            tasks.append(whole)
        elif file.suffix == ".gz":
            stripes = stripes_of(size)
            tasks += [replace(whole, stripe=n, stripes=stripes, cost=size // stripes) for n in range(stripes)]
        elif size <= part_bytes:
            tasks.append(whole)
        else:
            tasks += _line_ranges(whole, part_bytes)
    return tasks


def _line_ranges(whole: ReadTask, part_bytes: int) -> Iterator[ReadTask]:
    """A plain file in ranges of whole lines."""
    start, size = 0, whole.cost
    with open(whole.path, "rb") as stream:
        while start < size:
            stop = size
            if start + part_bytes < size:
                stream.seek(start + part_bytes)
                stream.readline()
                stop = stream.tell()
            yield replace(whole, start=start, stop=stop, cost=stop - start)
            start = stop

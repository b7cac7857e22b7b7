"""Which files hold FHIR, and how they are shared out: parts that can be read independently.

A plain file is cut at lines; a gzip file, which cannot be entered in the middle, is read whole by each of several
tasks, which parse every n-th block.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import orjson

from ehrseq.data.fhir.blocks import ReadTask, file_size, gzip_errors, is_ndjson, most_held, open_text
from ehrseq.data.metadata import NO_SETTINGS, DatasetSettings
from ehrseq.data.report import ConversionReport

ENDINGS = (".ndjson", ".jsonl", ".json")
"""Endings of FHIR files, each perhaps with `.gz` behind it."""

# Names of files beside FHIR resources in packages and exports that are no resources themselves.
_NOT_RESOURCES = frozenset({"package.json", ".index.json", "manifest.json", "log.ndjson"})
_MARK = b'"resourceType"'
_FIRST, _PEEK = 1 << 12, 1 << 16


def fhir_files(path: Path) -> list[Path]:
    """FHIR files at a path, sorted by name; hidden files and package manifests are left out."""
    if path.is_file():
        return [path] if _may_be_fhir(path) else []
    return sort_files(path)[0]


def sort_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder, sorted by name: those to read, and the others (other formats, by-products of tools)."""
    if path.is_file():
        return [path], []
    files = sorted(file for file in path.rglob("*") if file.is_file())
    to_read = [file for file in files if _may_be_fhir(file) and not _is_by_product(file, path)]
    if len(to_read) > 1:
        # What holds JSON and no resource at all lies beside the export; alone it would be all that was given.
        to_read = [file for file in to_read if not _holds_no_resource(file)] or to_read
    chosen = set(to_read)
    return to_read, [file for file in files if file not in chosen]


def count_unread(files: Sequence[Path], folder: Path, report: ConversionReport) -> None:
    """Name the files of a folder that are not read in a report: a few by name, the others by ending."""
    for number, file in enumerate(files):
        if number < _NAMED:
            report.files_not_read[file.relative_to(folder).as_posix()] += 1
        else:
            report.files_not_read[f"further files: *{''.join(file.suffixes[-2:]) or ' without ending'}"] += 1


_NAMED = 30
"""Files that a report names one by one."""


def _may_be_fhir(file: Path) -> bool:
    return file.name.removesuffix(".gz").endswith(ENDINGS)


def _is_by_product(file: Path, folder: Path) -> bool:
    inside = file.parts[len(folder.parts) :]
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in inside)
    return hidden or file.name.removesuffix(".gz") in _NOT_RESOURCES


def _holds_no_resource(file: Path) -> bool:
    """Whether a file is JSON, or lines of it, and no FHIR: a tool's log, a manifest. What cannot be read is left to
    reading, which says what is wrong.
    """
    try:
        if _MARK in _first_text(file):  # as in most files
            return False
        with open_text(str(file)) as stream:
            text = stream.read(_PEEK)
            if not text.strip() or _MARK in text:
                return False
            if is_ndjson(str(file)):
                first = text[: text.find(b"\n") + 1 or None]
                return isinstance(orjson.loads(first), dict) and not _finds(stream, text)
            if _finds(stream, text):
                return False
            stream.seek(0)
            most = most_held(str(file))
            whole = stream.read(most + 1)
            if len(whole) > most:
                return False
            orjson.loads(whole)
            return True
    except (OSError, ValueError):
        return False
    except gzip_errors():
        return False


def _first_text(file: Path) -> bytes:
    """The first few kilobytes of a file's text, without a reader of gzip, which would take in far more."""
    with file.open("rb", buffering=0) as stream:
        first = stream.read(_FIRST)
    if file.suffix != ".gz":
        return first
    try:
        return zlib.decompressobj(wbits=31).decompress(first, _FIRST)
    except zlib.error:
        return b""


def _finds(stream: IO[bytes], text: bytes) -> bool:
    """Whether the rest of a stream, `text` before it, names a resource."""
    while text:
        rest = stream.read(1 << 20)
        if _MARK in text[-len(_MARK) :] + rest:
            return True
        text = rest
    return False


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
    settings: DatasetSettings = NO_SETTINGS,
) -> list[ReadTask]:
    """Tasks that read all of the files, in their order.

    Args:
        files: The files.
        sizes: Bytes of text of each (`size_of`).
        part_bytes: Bytes of a part of a plain file, about.
        stripes_of: Size of a gzip file -> by how many tasks it is read.
        skip_errors: Count lines that cannot be read and go on.
        settings: What the user says about the source.
    """
    tasks: list[ReadTask] = []
    for index, (file, size) in enumerate(zip(files, sizes, strict=True)):
        whole = ReadTask(index, str(file), cost=size, skip_errors=skip_errors, settings=settings)
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

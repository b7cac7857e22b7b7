"""FHIR files as blocks of lines, and a block as arrays.

A block is some megabytes of whole lines. Blocks are read independently, in this process or in others, and numbered by
file and position, so that the result does not depend on who read what. A large gzip file, which cannot be entered in
the middle, is read by several workers that each decompress all of it (cheap) and parse every n-th block.

This module and what it imports stay light (no numpy, no polars, no transformers): worker processes load nothing else,
and are reading where numpy would still be loading.
"""

from __future__ import annotations

import gc
import gzip
import importlib
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson

from ehrseq.data.fhir.elements import MALFORMED, describe, what_is_wrong
from ehrseq.data.fhir.resources import Extractor
from ehrseq.data.fhir.rows import COLUMN_TYPES, TABLE_OF, Visit
from ehrseq.data.fhir.uniform import read_uniform
from ehrseq.data.metadata import NO_SETTINGS, DatasetSettings
from ehrseq.data.report import MAX_ERRORS

BLOCK_BYTES = 8 << 20
"""Bytes of text that are parsed at a time."""

_READ_BYTES = 1 << 20

_MIN_GZIP = 18
"""Bytes of head and end of a gzip member."""

_MOST_GROWTH = 36
"""Bytes by which gzip makes a short text longer, at most."""

_SURELY_BELOW_4_GIB = 2**32 // 1032
"""A gzip file below this size cannot hold 4 GiB: deflate packs 1032 to 1 at best."""

_LEAST_RATIO, _USUAL_RATIO = 3, 10
"""How far FHIR text shrinks in gzip, at least and about."""

_ALWAYS_HELD, _MOST_RATIO = 64 << 20, 250
"""Bytes of one line, or one document, that are held whatever the size of its file; times the file's own bytes beyond:
what unpacks to more was made to fill the memory."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_AFTER_ALL = 2**62  # number of the block behind all blocks of a file

_OFFSET_BITS = 41  # a file may hold 2 TB of text, a source 4 million files


@dataclass(frozen=True)
class ReadTask:
    """A part of a file to read.

    Attributes:
        file_index: Position of the file among those to read.
        path: The file.
        start, stop: Byte range of whole lines in a plain NDJSON file; stop -1 = to the end.
        stripe, stripes: Of a gzip file, read the blocks whose number leaves `stripe` when divided by `stripes`.
        cost: Bytes to read, about; for progress and for dealing out the work.
        skip_errors: Count lines that cannot be read and go on.
        settings: What the user says about the source.
        block_bytes: Bytes of text of a block; one number for all stripes of a file, which tell blocks by their number.
    """

    file_index: int
    path: str
    start: int = 0
    stop: int = -1
    stripe: int = 0
    stripes: int = 1
    cost: int = 0
    skip_errors: bool = False
    settings: DatasetSettings = NO_SETTINGS
    block_bytes: int = field(default_factory=lambda: BLOCK_BYTES)

    @property
    def name(self) -> str:
        """The file, in messages."""
        return self.path


@dataclass
class Block:
    """What one block held: columns of indices into its own string tables (see `Extractor`).

    Attributes:
        order: (file, position in it): the blocks of a source in order.
        offset: Where its text begins in the uncompressed file.
    """

    order: tuple[int, int]
    columns: dict[str, array[Any]]
    tables: dict[str, list[str]]
    names: list[str]
    updated: array[int]
    sizes: array[int]
    patients: list[tuple[list[str], str, list[str], int]]
    visits: list[Visit]
    medications: list[tuple[list[str], list[str], int]]
    deleted: list[tuple[str, int]]
    counts: Counter[tuple[str, str]]
    displays: dict[str, str]
    errors: list[str] = field(default_factory=list)
    bytes_read: int = 0
    offset: int = 0

    @property
    def place(self) -> int:
        """Where it stands in the source, as one number; what it holds has the numbers from here on, all below the next
        block's.
        """
        return (self.order[0] << _OFFSET_BITS) + self.offset


def read_task(task: ReadTask) -> Iterator[Block]:
    """Blocks of one task, in file order.

    Raises:
        ValueError: With file and line, unless the task is to skip errors.
    """
    extractor = Extractor(task.skip_errors, task.settings)
    try:
        if is_ndjson(task.path):
            yield from _read_lines(task, extractor)
        else:
            yield _read_document(task, extractor)
    except OSError as error:
        message = f"{task.path} cannot be read ({error.strerror or error})"
        if not task.skip_errors:
            raise ValueError(f"{message}; mend it, or leave it out by skipping errors.") from error
        if task.stripe == 0:
            extractor.counts["skipped", "file that cannot be read"] += 1
            extractor.errors.append(f"{message}.")
            yield block_of(extractor, (task.file_index, _AFTER_ALL))


def is_ndjson(path: str) -> bool:
    """Whether a file is named as lines of JSON (`.ndjson`, `.jsonl`, each perhaps `.gz`)."""
    return path.removesuffix(".gz").endswith((".ndjson", ".jsonl"))


def block_of(extractor: Extractor, order: tuple[int, int] = (0, 0)) -> Block:
    """What an extractor collected, as arrays; the extractor starts anew."""
    columns = list(zip(*extractor.rows, strict=True)) or [()] * len(COLUMN_TYPES)
    block = Block(
        order,
        {name: array(typecode, column) for (name, typecode), column in zip(COLUMN_TYPES.items(), columns, strict=True)},
        tables={name: list(getattr(extractor, name)) for name in TABLE_OF.values()},
        names=extractor.names,
        updated=array("q", extractor.updated),
        sizes=array("i", extractor.sizes),
        patients=extractor.patients,
        visits=extractor.visits,
        medications=extractor.medications,
        deleted=extractor.deleted,
        counts=extractor.counts,
        displays=extractor.coder.displays,
        errors=extractor.errors,
    )
    extractor.coder.displays = {}
    extractor.clear()
    return block


def open_text(path: str) -> IO[bytes]:
    """A file's uncompressed bytes; gzip by `isal` where it is installed (extra `fast-gzip`), else by the standard
    library.
    """
    if not path.endswith(".gz"):
        return open(path, "rb")
    library: Any = gzip
    with suppress(ImportError):
        library = importlib.import_module("isal.igzip")
    stream: IO[bytes] = library.open(path, "rb")
    return stream


def gzip_errors() -> tuple[type[Exception], ...]:
    """What reading a damaged gzip file raises."""
    try:
        library = importlib.import_module("isal.igzip_lib")
    except ImportError:
        return EOFError, zlib.error, gzip.BadGzipFile
    return EOFError, zlib.error, gzip.BadGzipFile, library.IsalError


def _read_lines(task: ReadTask, extractor: Extractor) -> Iterator[Block]:
    for number, offset, text in _blocks(task, extractor):
        with _no_garbage_collection():
            if not read_uniform(text, extractor):
                _read_block(text, offset, task, extractor)
            extractor.errors = _with_path(extractor.errors, task.path)
            block = block_of(extractor, (task.file_index, number))
        block.bytes_read, block.offset = len(text), offset
        yield block
    if extractor.counts or extractor.errors:
        # The file ended badly after its last whole block.
        yield block_of(extractor, (task.file_index, _AFTER_ALL))


def _read_block(text: bytes, offset: int, task: ReadTask, extractor: Extractor) -> None:
    loads, read = orjson.loads, extractor.read
    for index, line in enumerate(text.split(b"\n")):
        try:
            read(loads(line))
        except MALFORMED as error:
            if not line or line.isspace():
                continue
            if index == 0 and offset == 0 and line.startswith(_BYTE_ORDER_MARK):
                # The mark is no part of the first line: read the block again without it.
                extractor.clear()
                _read_block(text.removeprefix(_BYTE_ORDER_MARK), len(_BYTE_ORDER_MARK), task, extractor)
                return
            number = _lines_before(task.path, offset) + index + 1
            message = f"{task.path}, line {number}: {_what_is_wrong(line, error)}"
            if not task.skip_errors:
                raise ValueError(message) from error
            extractor.counts["skipped", "malformed line"] += 1
            if len(extractor.errors) < MAX_ERRORS:
                extractor.errors.append(message)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Parsing makes millions of containers and no circles: looking for circles among them costs a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _blocks(task: ReadTask, extractor: Extractor) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset in the uncompressed file, whole lines) of a task's blocks."""
    offset = task.start
    remaining = task.stop - task.start if task.stop >= 0 else None
    carry = b""
    number = 0
    most, what = most_held(task.path), "rest of a damaged gzip file"
    with open_text(task.path) as stream:
        stream.seek(task.start)
        while True:
            wanted = task.block_bytes if remaining is None else min(task.block_bytes, remaining)
            text, broken = _read_chunk(stream, wanted, task.path, carry)
            read = len(text) - len(carry)
            if remaining is not None:
                remaining -= read
            if broken and not task.skip_errors:
                raise ValueError(broken)
            last = not read or broken is not None
            cut = len(text) if last else text.rfind(b"\n") + 1
            carry = text[cut:]
            if len(carry) > most:
                # What cannot be held cannot be skipped to its end either: the rest of the file is left out.
                broken, what, last = _too_long(task.path), "rest of a file behind an endless line", True
                text, carry = text[:cut], b""
                if not task.skip_errors:
                    raise ValueError(broken)
            if cut:
                position = task.start + number if task.stop >= 0 or task.start else number
                if number % task.stripes == task.stripe:
                    yield position, offset, text[:cut] if carry else text
                offset += cut
                number += 1
            if last:
                if broken and task.stripe == 0:
                    extractor.counts["skipped", what] += 1
                    extractor.errors.append(broken)
                return


def _read_chunk(stream: Any, size: int, path: str, carry: bytes = b"") -> tuple[bytes, str | None]:
    """`carry` and the next bytes (all for size -1), and what is wrong with the file if it ends badly: what came before
    is kept.
    """
    pieces = [carry]
    length = 0
    most = most_held(path) if size < 0 else 0
    try:
        while size < 0 or length < size:
            piece = stream.read1(_READ_BYTES if size < 0 else min(_READ_BYTES, size - length))
            if not piece:
                break
            pieces.append(piece)
            length += len(piece)
            if size < 0 and length > most:
                return b"", _too_long(path)
    except gzip_errors() as error:
        return b"".join(pieces), f"{path}: the gzip file is damaged or cut short ({error}); fetch it again."
    return b"".join(pieces), None


def most_held(path: str) -> int:
    """Bytes of a line or document of a file that are held."""
    return max(_ALWAYS_HELD, _MOST_RATIO * os.stat(path).st_size)


def _too_long(path: str) -> str:
    return (
        f"{path}: one resource, or one line, unpacks to more than {most_held(path):,} bytes, {_MOST_RATIO} times what "
        "the file holds; no record does. Fetch the file again, or leave it out."
    )


def _lines_before(path: str, offset: int) -> int:
    """Newlines before an offset of the uncompressed file; only worked out for messages."""
    lines = 0
    with open_text(path) as stream:
        while offset > 0:
            chunk = stream.read(min(offset, BLOCK_BYTES))
            if not chunk:
                break
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines


def _what_is_wrong(line: bytes, error: Exception) -> str:
    """What is wrong with a line, in words."""
    if not isinstance(error, orjson.JSONDecodeError):
        try:
            resource = orjson.loads(line)
        except orjson.JSONDecodeError:
            resource = None
        if not isinstance(resource, dict):
            return f"expected one JSON object (a FHIR resource), got {line[:40].decode('utf-8', 'replace')!r}"
        return f"{describe(resource)}: {what_is_wrong(error)}"
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as decoding:
        return (
            f"not UTF-8 (byte 0x{line[decoding.start]:02x} at column {decoding.start + 1}); FHIR NDJSON must be UTF-8"
        )
    hint = "; is the line cut short?" if not line.rstrip().endswith(b"}") else ""
    return f"not JSON ({error}){hint} It begins {line[:60].decode('utf-8', 'replace')!r}."


def _read_document(task: ReadTask, extractor: Extractor) -> Block:
    """A JSON file: a Bundle, one resource or a list of resources; also lines of resources under a `.json` name."""
    size = 0
    try:
        with open_text(task.path) as stream:
            text, broken = _read_chunk(stream, -1, task.path)
        if broken:
            raise ValueError(broken)
        size = len(text)
        with _no_garbage_collection():
            _read_json(text, task.path, extractor)
    except MALFORMED as error:
        message = str(error) if str(error).startswith(task.path) else f"{task.path}: {what_is_wrong(error)}"
        if not task.skip_errors:
            raise ValueError(message) from error
        extractor.counts["skipped", "malformed file"] += 1
        extractor.errors.append(message)
    extractor.errors = _with_path(extractor.errors, task.path)
    block = block_of(extractor, (task.file_index, 0))
    block.bytes_read = size
    return block


def _with_path(errors: list[str], path: str) -> list[str]:
    """Messages that name their file, as many as are kept; those of a Bundle's entries do not know it."""
    return [error if error.startswith(path) else f"{path}, {error}" for error in errors[:MAX_ERRORS]]


def _read_json(text: bytes, path: str, extractor: Extractor) -> None:
    text = text.removeprefix(_BYTE_ORDER_MARK)
    try:
        documents = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        lines = [line for line in text.split(b"\n") if line.strip()]
        try:
            documents = (
                [orjson.loads(line) for line in lines] if len(lines) > 1 and b'"resourceType"' in lines[0] else None
            )
        except orjson.JSONDecodeError:
            documents = None
        if documents is None:
            raise ValueError(f"{path}: {_what_is_wrong(text, error)}") from error
    for document in documents if isinstance(documents, list) else [documents]:
        if not isinstance(document, dict) or not isinstance(document.get("resourceType"), str):
            raise ValueError(
                f"{path}: not a FHIR resource (no resourceType); expected a Bundle or another R4 resource."
            )
        extractor.read(document)


def file_size(path: Path) -> int:
    """Bytes of uncompressed text; of a gzip file what its end states, which is all it holds unless it has several
    members or exceeds 4 GiB: then about.
    """
    size = path.stat().st_size
    if path.suffix != ".gz" or size < _MIN_GZIP:
        return size
    with path.open("rb") as stream:
        stream.seek(-4, 2)
        stated = int.from_bytes(stream.read(4), "little")
    if size < _SURELY_BELOW_4_GIB:
        # Smaller than the file itself: the last of several members.
        return stated if stated >= size - _MOST_GROWTH else _USUAL_RATIO * size
    # The size is stated modulo 4 GiB.
    while stated < _LEAST_RATIO * size:
        stated += 2**32
    return stated

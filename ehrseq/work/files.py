"""Files that appear whole or not at all, and what tells one from another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def file_digest(path: str | Path) -> str:
    """SHA-256 over the bytes of a file."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file, or a folder, so that it appears whole or not at all; one that is there is replaced.

    Args:
        path: What to write; its folder is made.
        write: Writes under the (temporary) name that it is given, at which nothing stands.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    replaced = temporary.with_name(f"{temporary.name}-replaced")
    remove(temporary)
    try:
        write(temporary)
        if path.is_dir() or (temporary.is_dir() and path.exists()):  # removing a folder takes its time: aside with it
            os.replace(path, replaced)
        os.replace(temporary, path)
    finally:
        remove(temporary)
        remove(replaced)


def check_replaceable(folder: str | Path, is_ours: Callable[[str], bool], whose: str) -> None:
    """Refuse a folder that holds something else than what would replace it.

    Args:
        folder: Where to write; it need not be there.
        is_ours: Whether a name is one that is written there.
        whose: What writes there, in words.

    Raises:
        ValueError: It is a file, or holds another name.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a new folder.")
    unknown = sorted(path.name for path in folder.iterdir() if not is_ours(path.name)) if folder.is_dir() else []
    if unknown:
        raise ValueError(f"{folder} holds something other than {whose} ({unknown[0]}); name a new folder.")


def check_apart(output: str | Path, source: str | Path) -> None:
    """Refuse an output that is, or lies in, or holds what is read.

    Raises:
        ValueError: See above.
    """
    written, read = Path(output).resolve(), Path(source).resolve()
    if written == read or read in written.parents or written in read.parents:
        raise ValueError(f"{output} and {source}, which is read, lie in one another; write to a folder apart from it.")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) that appears whole or not at all."""

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    write_whole(path, write)


def write_json(path: str | Path, content: object, *, indent: int | None = None) -> None:
    """Write a JSON file that appears whole or not at all; with an indent it is meant for people, and ends its line."""
    write_text(path, json.dumps(content, indent=indent) + ("" if indent is None else "\n"))


def remove(path: Path) -> None:
    """Remove a file or a folder that may be there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what runs that were killed have left half-written below a folder, if there is one."""
    for path in folder.rglob(".*.writing-*"):
        remove(path)

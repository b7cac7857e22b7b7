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

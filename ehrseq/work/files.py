"""Files that appear whole or not at all, and what tells one from another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HASHED_BYTES = 1 << 22  # bytes of a file that are hashed at once


def file_digest(path: str | Path) -> str:
    """SHA-256 over the bytes of a file."""
    found = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(_HASHED_BYTES):
            found.update(chunk)
    return found.hexdigest()


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file, or a folder, so that it appears whole or not at all; one that is there is replaced.

    Args:
        path: What to write; its folder is made.
        write: Writes under the (temporary) name that it is given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        write(temporary)
        if path.is_dir():
            remove(path)
        os.replace(temporary, path)
    finally:
        remove(temporary)


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    text = json.dumps(content)

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    write_whole(path, write)


def remove(path: Path) -> None:
    """Remove a file or a folder that may be there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what runs that were killed have left half-written below a folder."""
    for path in folder.rglob(".*.writing-*"):
        remove(path)

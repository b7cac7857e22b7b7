"""Options and checks that several commands share."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


def is_writable(folder: Path) -> bool:
    """Whether files can be written into a folder, or into one that is made on the way to it."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def check_folder(folder: Path) -> None:
    """Refuse a folder for the output that is a file, or lies where nothing can be written, before the work."""
    if not is_writable(folder):
        raise ValueError(f"{folder} cannot be written; give the name of a new folder in a folder of yours.")


def check_new_folder(folder: Path) -> None:
    """Refuse a folder for the output that holds something already."""
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty; give a new folder, so that nothing is overwritten.")


class EngineName(StrEnum):
    """Where work is done."""

    local = "local"
    ray = "ray"


Dataset = Annotated[Path, typer.Argument(help="Folder that `ehrseq prepare` wrote.")]


EngineOption = Annotated[EngineName, typer.Option(help="Processes of this machine, or a Ray cluster.")]


Workers = Annotated[int | None, typer.Option(min=1, help="Tasks at a time. Default: one a core.")]

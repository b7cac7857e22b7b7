"""The YAML files of recipes: where they lie, by which names, and what a file says on top of its base."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

NAMED = Path(__file__).parent / "recipes"


def read_values(recipe: str | Path) -> dict[str, Any]:
    """What a recipe's file and its bases say, and its name."""
    file = _file_of(recipe, Path())
    return _read_with_bases(file, ()) | {"name": file.stem}


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """What a recipe's file says on top of what its base says; the model and the stages key by key."""
    if path.resolve() in above:
        raise ValueError(f"{path} has itself as its base; let one of the files stand on its own.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected the keys of a recipe.")
    base = values.pop("base", None)
    if base is None:
        return values
    merged = _read_with_bases(_file_of(str(base), path.parent), (*above, path.resolve()))
    for name, value in values.items():
        inner = merged.get(name)
        merged[name] = {**inner, **value} if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _file_of(recipe: str | Path, folder: Path) -> Path:
    """The YAML file of a name, or of a path (of a base: relative to the file that names it).

    Raises:
        ValueError: There is none.
    """
    text = str(recipe)
    if text.endswith((".yaml", ".yml")):
        if (folder / text).is_file():
            return folder / text
        raise ValueError(f"no recipe {folder / text}; give a YAML file, or a name of `ehrseq train --list`.")
    named = {recipe_name(file): file for file in NAMED.rglob("*.yaml")}
    if text not in named:
        near = difflib.get_close_matches(text, named, n=3, cutoff=0.4)
        meant = f", perhaps {' or '.join(near)}" if near else ""
        raise ValueError(f"no recipe {text!r}; give a YAML file, or a name of `ehrseq train --list`{meant}.")
    return named[text]


def recipe_name(file: Path) -> str:
    """Name of a packaged recipe."""
    return file.relative_to(NAMED).with_suffix("").as_posix()


def nearest_names(unknown: Sequence[str], known: Iterable[str]) -> str:
    """What was perhaps meant, for the end of a message; empty where nothing is near."""
    names = list(known)
    near = [match for name in unknown for match in difflib.get_close_matches(name, names, n=3, cutoff=0.4)]
    return f"; nearest: {', '.join(dict.fromkeys(near))}" if near else ""

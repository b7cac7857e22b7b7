"""The recipes of this package by name, and those of files: `read_recipe`, `list_recipes`.

What a recipe is stands in `ehrseq.training.recipe`, the families' own keys in `ehrseq.training.prompt_recipe`
(EhrMamba) and `ehrseq.training.triplet_recipe` (HyMaTE).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ehrseq.training.prompt_recipe import PromptRecipe
from ehrseq.training.recipe import NAMED, Recipe, nearest, read_with_bases, recipe_name, stage_keys
from ehrseq.training.triplet_recipe import TripletRecipe

FAMILY_RECIPES: dict[str, type[Recipe]] = {kind.family: kind for kind in (PromptRecipe, TripletRecipe)}


def read_recipe(recipe: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a name or a YAML file, with some of its values changed.

    Args:
        recipe: Name (`list_recipes`) or file.
        changes: `KEY=VALUE` each, as of `--set`: `finetune.learning_rate=1e-3`, `model.hidden_size=64`; a stage's key
            without the stage is set in all of them: `bf16=true`.

    Raises:
        ValueError: No such recipe, a circle of bases, no family, an unknown key or a value that cannot be.
    """
    values = read_with_bases(recipe)
    family = values.get("family")
    if family not in FAMILY_RECIPES:
        raise ValueError(f"{recipe} has the family {family!r}; expected `family:` to be one of {list(FAMILY_RECIPES)}.")
    for change in changes:
        _set(values, change, FAMILY_RECIPES[family])
    made = FAMILY_RECIPES[family].from_dict(values, where=f"{recipe}{' with --set' if changes else ''}")
    made.check_model()
    return made


def list_recipes() -> list[tuple[str, str, str]]:
    """(name, family, description) of every named recipe, by family and name."""
    named = [(recipe_name(file), read_with_bases(file)) for file in NAMED.rglob("*.yaml")]
    return sorted(
        ((name, str(values["family"]), str(values["description"])) for name, values in named),
        key=lambda entry: (entry[1], "/" in entry[0], entry[0]),
    )


def _set(values: dict[str, Any], change: str, kind: type[Recipe]) -> None:
    """Change one value, as of `--set`."""
    path, equals, text = change.partition("=")
    first, _, inner = path.strip().partition(".")
    known = {entry.name for entry in dataclasses.fields(kind)} - {"name", "description"}
    nested = [*kind.stage_names, "model"]
    if not equals or not path.strip():
        raise ValueError(f"--set got {change!r}; expected KEY=VALUE, such as finetune.learning_rate=1e-3.")
    if first not in known and not inner and first in stage_keys():  # of every stage
        for name in kind.stage_names:
            if values.get(name) is not None:
                _set(values, f"{name}.{change}", kind)
        return
    if first not in known or (first in nested) != bool(inner):
        if first in nested and text.strip() in ("null", "{}"):  # a stage is left out
            values[first] = None
            return
        keys = [*(name for name in known if name not in nested), *(f"{name}.KEY" for name in nested)]
        raise ValueError(f"--set got {path!r}; expected one of {sorted(keys)}{nearest([first], known)}.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {path} got {text!r}, which is no value: {' '.join(str(error).split())}") from error
    if inner:
        values[first] = {**(values.get(first) or {}), inner: value}
    else:
        values[first] = value

"""How a model is trained, as a small YAML file says it: a named one of this package, or one of your own.

    family: ehrmamba                     # or hymate
    description: What it is for, in one line.
    base: demo                           # a named recipe, or a .yaml file beside this one; then only what differs
    model: {hidden_size: 96}             # fields of the family's configuration
    finetune: {learning_rate: 1.0e-3}    # keys of a `Stage`, or any field of `TrainingArguments`

`read_recipe` gives the `Recipe` of a name or file, `list_recipes` what there is by name
(`ehrseq.training.named_recipes`).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

NAMED = Path(__file__).parent / "recipes"

SCHEDULES = ("constant", "cosine", "paper")
KEPT = ("best", "last")

# What TrainingArguments calls what a stage has a name of its own for; and what only the command may set.
_SAME = {"num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size"}
_TAKEN = {
    "output_dir": "the command names the folder",
    "seed": "give --seed",
    "resume_from_checkpoint": "a stage that was stopped goes on by itself",
}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class Stage:
    """How one stage is trained.

    Attributes:
        epochs: Passes over the training rows at most; None = no such limit.
        rows: Training rows to see at most, in EhrMamba's stages; None = no such limit.
        tokens: Tokens to see at most, in EhrMamba's stages; None = no such limit.
        learning_rate: The peak, of AdamW.
        schedule: "constant", as in STraTS; "cosine": up over the first twentieth of the steps, then down to 0 at the
            end [C], to be used with a patience that lets it get there; "paper", EhrMamba's (`paper_schedule`).
        batch_size: Rows of a step, of all processes together.
        patience: Evaluations without progress on the tuning rows before stopping.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        keep: "best", the evaluation with the best score of the tuning rows, or "last", the weights at the end whatever
            the tuning rows say: with a schedule that ends at 0, and where they are too few to choose by [C].
        arguments: Further fields of `TrainingArguments`; they win. In a file they stand among the others.
    """

    epochs: float | None = 50
    rows: int | None = None
    tokens: int | None = None
    learning_rate: float = 5e-4
    schedule: str = "constant"
    batch_size: int = 32
    patience: int = 10
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    keep: str = "best"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule got {self.schedule!r}; expected one of {SCHEDULES}.")
        if self.keep not in KEPT:
            raise ValueError(f"keep got {self.keep!r}; expected one of {KEPT}.")
        for name, least in (("learning_rate", 0), ("weight_decay", 0), ("max_grad_norm", 0)):
            check_number(name, getattr(self, name), least)
        for name, least in (("batch_size", 1), ("patience", 0), ("rows", 1), ("tokens", 1)):
            if getattr(self, name) is not None or name in ("batch_size", "patience"):
                check_number(name, getattr(self, name), least, whole=True)
        if self.epochs is not None:
            check_number("epochs", self.epochs, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values as a file has them: without limits that are not set, with further arguments among the others."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        arguments = values.pop("arguments")
        unset = [name for name in ("rows", "tokens") if not values[name]]
        result: dict[str, Any] = {name: value for name, value in values.items() if name not in unset}
        return {**result, **arguments}


@dataclass(frozen=True)
class Recipe:
    """What the recipes of both families have in common.

    Attributes:
        name: Its name.
        model: Fields of the configuration.
        pretrain: The first stage; None = none.
        finetune: The last stage, which makes the classifier.
        tasks: Tasks to learn, of those that the dataset has labels of; None = all.
        description: One line about it; says nothing of the training.
    """

    family: ClassVar[str] = ""
    stage_names: ClassVar[tuple[str, ...]] = ("pretrain", "finetune")
    stage_defaults: ClassVar[Mapping[str, Any]] = {}

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    pretrain: Stage | None = None
    finetune: Stage = field(default_factory=Stage)
    tasks: tuple[str, ...] | None = None
    description: str = field(default="", compare=False)

    @classmethod
    def read(cls, recipe: str | Path) -> Self:
        """The recipe of a name or a YAML file.

        Raises:
            ValueError: No such recipe, a circle of bases, or a key that no recipe has; the message says the file.
        """
        return cls.from_dict(read_with_bases(recipe), where=str(recipe))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "recipe") -> Self:
        """Make a recipe of plain values, `to_dict()` back.

        Args:
            values: Fields by name; the stages as dicts.
            where: For messages.

        Raises:
            ValueError: An unknown key, a value that cannot be.
        """
        values = {name: value for name, value in values.items() if name != "family"}
        check_keys(values, [entry.name for entry in dataclasses.fields(cls)], where)
        stages = {
            name: _stage(values[name], cls.stage_defaults, f"{where}: {name}")
            for name in cls.stage_names
            if values.get(name) is not None
        }
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        model = values.get("model", {})
        if not isinstance(model, Mapping):
            raise ValueError(f"{where}: model has {model!r}; expected fields of the configuration.")
        fields = {str(name): _number(value) for name, value in model.items()}
        try:
            return cls(**{"name": "recipe", **values, **stages, **lists, "model": fields})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML; the description and tasks that are not named are left out."""
        values: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name == "description" or (entry.name == "tasks" and value is None):
                continue
            if isinstance(value, Stage):
                value = value.to_dict()
            elif isinstance(value, Mapping):
                value = dict(value)
            elif isinstance(value, tuple):
                value = list(value)
            values[entry.name] = value
        return values

    def check_model(self) -> None:
        """Refuse model fields that the configuration does not have, which transformers would keep without a word, and
        values that it refuses.

        Raises:
            ValueError: See above.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        import ehrseq  # noqa: F401  registers the classes with the Auto classes

        config = type(AutoConfig.for_model(self.family))
        names = {entry.name for entry in dataclasses.fields(config)} | set(config.attribute_map)
        unknown = sorted(set(self.model) - names)
        if unknown:
            raise ValueError(
                f"model of the recipe {self.name!r} has {unknown}; expected fields of {config.__name__}"
                f"{nearest(unknown, names)}."
            )
        try:
            config(**self.model)
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise ValueError(f"model of the recipe {self.name!r}: {' '.join(str(error).split())}") from error


def check_keys(values: Any, known: Iterable[str], where: str) -> None:
    """Refuse what is no mapping, and keys that are unknown.

    Raises:
        ValueError: See above; the message names the nearest known keys.
    """
    names = sorted(known)
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} has {values!r}; expected keys out of {names}.")
    unknown = sorted(str(key) for key in values if key not in names)
    if unknown:
        raise ValueError(f"{where} has {unknown}; expected keys out of {names}{nearest(unknown, names)}.")


def check_number(name: str, value: Any, least: float, *, whole: bool = False) -> None:
    """Refuse what is no number of at least `least`.

    Raises:
        ValueError: See above.
    """
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
        expected = "a whole number" if whole else "a number"
        raise ValueError(f"{name} got {value!r}; expected {expected} of at least {least}.")


def read_with_bases(recipe: str | Path) -> dict[str, Any]:
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
    """Name of a recipe of this package, by its file."""
    return file.relative_to(NAMED).with_suffix("").as_posix()


def _stage(values: Any, defaults: Mapping[str, Any], where: str) -> Stage:
    """A stage of plain values; what is no key of a stage is a field of TrainingArguments."""
    stage_fields = {entry.name for entry in dataclasses.fields(Stage)} - {"arguments"}
    if not isinstance(values, Mapping):
        check_keys(values, stage_fields, where)
    values = {_SAME.get(name, name): _number(value) for name, value in values.items()}
    others = {name: value for name, value in values.items() if name not in stage_fields}
    if others:
        from transformers import TrainingArguments

        known = stage_keys()
        unknown = sorted(str(name) for name in others if name not in known)
        if unknown:
            raise ValueError(
                f"{where} has {unknown}; expected keys out of {sorted(stage_fields)}, or fields of TrainingArguments"
                f"{nearest(unknown, known)}."
            )
        for name, instead in _TAKEN.items():
            if name in others:
                raise ValueError(f"{where} has {name}, which no recipe sets: {instead}.")
        try:  # what needs the stage's own arguments beside it is seen when it begins
            TrainingArguments(report_to=[], **{**others, "load_best_model_at_end": False})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    try:
        chosen = {name: value for name, value in values.items() if name in stage_fields}
        return Stage(**{**defaults, **chosen}, arguments=others)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def stage_keys() -> set[str]:
    """Every key that a stage may have."""
    from transformers import TrainingArguments

    return {entry.name for kind in (Stage, TrainingArguments) for entry in dataclasses.fields(kind)} - {"arguments"}


def _number(value: Any) -> Any:
    """The value, or the number that YAML takes for a word: 1e-3."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def nearest(unknown: Sequence[str], known: Iterable[str]) -> str:
    """The end of a message that names what is like the unknown words, empty where nothing is."""
    names = list(known)
    near = [match for name in unknown for match in difflib.get_close_matches(name, names, n=3, cutoff=0.4)]
    return f"; nearest: {', '.join(dict.fromkeys(near))}" if near else ""

"""Makes transformers know the package: Auto classes and pipelines, by name, before any class of them is imported.

transformers keeps what others register in dictionaries beside its own tables. `import ehrseq` puts the names of
`ehrseq/hub/families.py` into those as soon as the module that holds them is imported (`ehrseq/_on_import.py`); the
class behind a name is imported when somebody asks for it. So registration imports nothing, costs nothing, and cannot
meet another thread's import half way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

from ehrseq.hub.families import FAMILIES, PIPELINES, RegisteredPipeline, load_class, registered_classes

_AUTO = "transformers.models.auto"


class NamedInCheckpoint:
    """Key under which the tokenizer is registered; no checkpoint has a config of this class.

    A checkpoint of the package names its tokenizer class, and that name is enough to find a registered class.
    Registered under the model's config, the class would lose against the checkpoint's own code as soon as somebody
    passes `trust_remote_code=True` (AutoTokenizer takes such a registration for one of transformers' own).
    """


class LazyItems(dict[Any, Any]):
    """A dictionary that imports its values when they are asked for.

    Args:
        content: What it holds already; stays as it is.
        later: Key -> class, both written `module:Class` under the package; a key without a colon stands for itself.
            Nobody asks for a class as key without having imported it, so such a key is known by its name.
    """

    def __init__(self, content: Mapping[Any, Any], later: Mapping[str, str]) -> None:
        super().__init__(content)
        self._later = dict(later)

    def _load(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._later.get(key)
            if path is not None:
                self.setdefault(load_class(key) if ":" in key else key, load_class(path))
                self._later.pop(key, None)  # last: another thread may be here too, and must not miss it

    def _load_all(self) -> None:
        self._load(list(self._later))

    def __contains__(self, key: object) -> bool:
        self._load([_name(key)])
        return super().__contains__(key)

    def __missing__(self, key: Any) -> Any:
        if key in self:
            return self[key]
        raise KeyError(key)

    def get(self, key: Any, default: Any = None) -> Any:  # noqa: D102  (a dictionary's, as those below)
        self._load([_name(key)])
        return super().get(key, default)

    def __iter__(self) -> Iterator[Any]:
        self._load_all()
        return super().__iter__()

    def __len__(self) -> int:
        self._load_all()
        return super().__len__()

    def keys(self) -> Any:  # noqa: D102
        self._load_all()
        return super().keys()

    def values(self) -> Any:  # noqa: D102
        self._load_all()
        return super().values()

    def items(self) -> Any:  # noqa: D102
        self._load_all()
        return super().items()

    def copy(self) -> dict[Any, Any]:  # noqa: D102
        return dict(self.items())

    def __reduce__(self) -> tuple[type[dict[Any, Any]], tuple[dict[Any, Any]]]:
        return dict, (self.copy(),)


def _name(key: object) -> str:
    """How `later` writes a key, or what it never holds."""
    if isinstance(key, type):
        package, _, module = key.__module__.partition(".")
        return f"{module}:{key.__qualname__}" if package == "ehrseq" else ""
    return key if isinstance(key, str) else ""


def registrations() -> dict[str, Callable[[ModuleType], None]]:
    """Name of a module -> what to do with it once it is imported: transformers' tables and the package's classes.

    transformers itself is among them for threads that import it at once (`ehrseq/_on_import.py`).
    """
    return {
        "transformers": lambda module: None,
        f"{_AUTO}.configuration_auto": _register_configs,
        f"{_AUTO}.modeling_auto": _register_models,
        f"{_AUTO}.tokenization_auto": _register_tokenizers,
        f"{_AUTO}.feature_extraction_auto": _register_feature_extractors,
        "transformers.pipelines": _register_pipelines,
        **{f"ehrseq.{path.split(':')[0]}": _push_with_cards for path in registered_classes()},
    }


def register_all() -> None:
    """Import every module of `registrations` and register what `import ehrseq` does by itself. Safe to call twice."""
    for name, register in registrations().items():
        register(import_module(name))


def _register_configs(module: ModuleType) -> None:
    _add(module.CONFIG_MAPPING, {model_type: family.config for model_type, family in FAMILIES.items()})


def _register_models(module: ModuleType) -> None:
    for auto in {auto for family in FAMILIES.values() for auto in family.models}:
        classes = {family.config: family.models[auto] for family in FAMILIES.values() if auto in family.models}
        _add(getattr(module, auto)._model_mapping, classes)


def _register_tokenizers(module: ModuleType) -> None:
    key = f"{__name__.removeprefix('ehrseq.')}:{NamedInCheckpoint.__name__}"
    for tokenizer in {family.tokenizer for family in FAMILIES.values() if family.tokenizer is not None}:
        _add(module.TOKENIZER_MAPPING, {key: tokenizer})


def _register_feature_extractors(module: ModuleType) -> None:
    extractors = {family.config: family.feature_extractor for family in FAMILIES.values() if family.feature_extractor}
    _add(module.FEATURE_EXTRACTOR_MAPPING, extractors)


def _add(mapping: Any, classes: Mapping[str, str]) -> None:
    """Let one of transformers' tables import classes when it is asked for them; what a user registered stays."""
    mapping._extra_content = LazyItems(mapping._extra_content, classes)


def _register_pipelines(module: ModuleType) -> None:
    for task, entry in PIPELINES.items():
        module.PIPELINE_REGISTRY.supported_tasks.setdefault(task, _pipeline_entry(entry))


def _pipeline_entry(entry: RegisteredPipeline) -> LazyItems:
    auto_module = sys.modules[f"{_AUTO}.modeling_auto"]  # which transformers.pipelines has imported
    content = {
        "pt": tuple(getattr(auto_module, name) for name in entry.auto_models),
        "default": {"model": (entry.default, None)},  # a folder has no revision
        "type": "multimodal",
    }
    # Not by `register_pipeline`: it needs the class, and marks it in a way that makes `pipe.save_pretrained` leave
    # `custom_pipelines` on the model's config, for which transformers would ask for trust from then on. The model
    # writes that field itself, for whoever lacks the package (modeling/hub_mixin.py).
    return LazyItems(content, {"impl": entry.pipeline})


def _push_with_cards(module: ModuleType) -> None:
    """Let `push_to_hub` of a module's classes carry the package's card instead of transformers' generic one."""
    for path in registered_classes():
        name, pushed = path.split(":")
        if module.__name__ == f"ehrseq.{name}":
            _push_with_card(getattr(module, pushed))


def _push_with_card(pushed_class: Any) -> None:
    upload = pushed_class._upload_modified_files
    if hasattr(upload, "carries_card") and "_upload_modified_files" in vars(pushed_class):
        return

    @wraps(upload)
    def upload_with_card(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        from ehrseq.hub.push import ensure_card

        ensure_card(working_dir, self, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    upload_with_card.carries_card = True  # type: ignore[attr-defined]
    pushed_class._upload_modified_files = upload_with_card

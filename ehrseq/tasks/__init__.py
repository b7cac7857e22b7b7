"""Clinical tasks: one YAML file each (`definitions/`), one labelling engine. Attributes are loaded when first used."""

from importlib import import_module
from typing import Any

# Name -> module of this package that defines it.
_EXPORTS = {
    "LabelResult": "labelling",
    "REASONS": "labelling",
    "label_events": "labelling",
    "list_tasks": "registry",
    "load_task": "registry",
    "Task": "schema",
    "read_labels": "storage",
    "write_labels": "storage",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})

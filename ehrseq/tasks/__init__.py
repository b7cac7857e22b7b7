"""Clinical tasks: one YAML file each (`definitions/`), one labelling engine. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

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
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

"""Events in (FHIR, MEDS, simulation), datasets on disk, batches out. Attributes are loaded when first used."""

from importlib import import_module
from typing import Any

# Name -> module of this package that defines it.
_EXPORTS = {
    "EventDataset": "dataset",
    "load_events": "dataset",
    "write_dataset": "dataset",
    "patient_from_bundle": "fhir",
    "read_fhir": "fhir",
    "read_meds": "meds",
    "ConversionReport": "report",
    "EVENT_COLUMNS": "schema",
    "EVENT_SCHEMA": "schema",
    "LABEL_SCHEMA": "schema",
    "validate_events": "schema",
    "validate_labels": "schema",
    "assign_splits": "splits",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})

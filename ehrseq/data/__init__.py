"""Events in (FHIR, MEDS, simulation), datasets on disk, batches out. Attributes are loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ehrseq.data.dataset import EventDataset, load_events, write_dataset
    from ehrseq.data.fhir import patient_from_bundle, read_fhir
    from ehrseq.data.meds import read_meds
    from ehrseq.data.report import ConversionReport
    from ehrseq.data.schema import EVENT_COLUMNS, EVENT_SCHEMA, LABEL_SCHEMA, validate_events, validate_labels
    from ehrseq.data.splits import assign_splits

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

__all__ = list(_EXPORTS)  # noqa: PLE0604  (the names are strings; the linter cannot see it)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})

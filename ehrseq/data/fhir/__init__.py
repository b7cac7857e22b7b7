"""FHIR R4 as events: NDJSON files, Bundles, one patient. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "events_from_bundle": "reader",
    "fhir_files": "plan",
    "patient_from_bundle": "reader",
    "read_fhir": "reader",
    "size_of": "plan",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

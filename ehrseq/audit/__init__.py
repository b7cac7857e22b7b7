"""Leakage audit: does anything that a model reads, or was fitted on, know the answer? Loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "Accepted": "findings",
    "AuditReport": "findings",
    "Finding": "findings",
    "KINDS": "findings",
    "audit_dataset": "run",
    "read_accepted": "findings",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

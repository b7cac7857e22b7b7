"""Risks of many patients from a checkpoint: tables, stays, datasets in files. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "predict_risks": "risks",
    "predict_dataset": "datasets",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

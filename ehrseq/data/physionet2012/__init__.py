"""The PhysioNet challenge 2012 as events and stays. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "OUTCOME_SCHEMA": "reader",
    "Physionet2012": "reader",
    "load_physionet2012": "reader",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

"""One table of every system on one dataset: `ehrseq benchmark`. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "BUDGETS": "budget",
    "Budget": "budget",
    "SYSTEMS": "systems",
    "System": "systems",
    "run_benchmark": "run",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

"""From records to risks in a few minutes: `ehrseq demo`."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "DemoResult": "run",
    "run_demo": "run",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

"""A page of plots and tables about a prepared dataset. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "DatasetStatistics": "counting",
    "count_dataset": "counting",
    "hide_few": "privacy",
    "write_statistics": "page",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

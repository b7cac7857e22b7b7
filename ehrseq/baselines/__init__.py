"""What HyMaTE is held against: models on summary statistics, and a GRU. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "BoostedSummaries": "summary_models",
    "HourlyGRU": "recurrent",
    "LogisticSummaries": "summary_models",
    "SUMMARIES": "summary_statistics",
    "summarise": "summary_statistics",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

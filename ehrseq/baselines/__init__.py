"""What the models are held against and is no `PreTrainedModel`: boosting and logistic regression on token counts
(EhrMamba) and on summary statistics (HyMaTE), and a GRU. Attributes are loaded when first used.
"""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "BoostedCounts": "count_models",
    "BoostedSummaries": "summary_models",
    "HourlyGRU": "recurrent",
    "LogisticCounts": "count_models",
    "LogisticSummaries": "summary_models",
    "SUMMARIES": "summary_statistics",
    "count_tokens": "token_counts",
    "summarise": "summary_statistics",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

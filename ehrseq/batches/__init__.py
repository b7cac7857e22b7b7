"""From encoded rows to batches: collation, packing, masking, prompts. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "DataCollatorForNextToken": "collation",
    "DataCollatorForPrompts": "collation",
    "DataCollatorForMaskedEvents": "masking",
    "PackableRows": "packing",
    "DataCollatorForPackedNextToken": "packing",
    "DataCollatorForPackedPrompts": "packing",
    "evaluation_order": "packing",
    "prompted_dataset": "prompts",
    "score": "scoring",
    "score_rows": "scoring",
    "score_stays": "scoring",
    "BalancedSample": "balance",
    "TaskSample": "balance",
    "balance_rows": "balance",
    "DataCollatorForSharedPrompts": "shared_prompts",
    "SharedPromptDataset": "shared_prompts",
    "EpochOfRows": "triplet_rows",
    "ForecastRows": "triplet_rows",
    "TripletRows": "triplet_rows",
    "forecast_baselines": "triplet_rows",
    "DataCollatorForPackedTriplets": "triplet_collation",
    "DataCollatorForTriplets": "triplet_collation",
    "PackableTriplets": "triplet_collation",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

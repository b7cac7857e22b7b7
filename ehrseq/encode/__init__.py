"""A dataset of any size as a tokenizer and encoded rows, file by file. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "EncodedDataset": "dataset",
    "encode_dataset": "shards",
    "is_encoded": "dataset",
    "fit_tokenizer": "fitting",
    "tokenize_dataset": "run",
    "HistoryWindows": "rows",
    "PromptedDataset": "rows",
    "PHYSIONET2012": "triplets",
    "TripletTable": "triplets",
    "build_triplets": "triplets",
    "select_variables": "triplets",
    "variable_units": "triplets",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

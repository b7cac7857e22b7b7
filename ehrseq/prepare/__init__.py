"""Any source as a prepared dataset: streaming, in bounded memory, restartable. Attributes load when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "PreparationReport": "run",
    "prepare_dataset": "run",
    "split_dataset": "resplit",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

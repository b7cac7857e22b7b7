"""What a model makes of patients beyond a risk: vectors, groups of alike patients, probes. Loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "embed_dataset": "embeddings",
    "find_phenotypes": "phenotypes",
    "probe_tasks": "probe",
    "read_embeddings": "embedding_files",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

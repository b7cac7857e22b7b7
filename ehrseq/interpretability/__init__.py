"""Why a model gives the risk that it gives: what each event of a record contributes, by methods that are tested against
their equations. Attributes are loaded when first used.

    question = read_question(load_checkpoint("my-checkpoint"), patient, "mortality_30d")
    prefix_deltas(question, by="visit").top(5)
    explain(load_checkpoint("my-checkpoint"), patient, "mortality_30d")        # the model's recommended method

All contributions are in log-odds of the risk.
"""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "Attribution": "explanation",
    "Explanation": "explanation",
    "Question": "questions",
    "explain": "methods",
    "methods_of": "methods",
    "prefix_deltas": "prefix_deltas",
    "read_question": "questions",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

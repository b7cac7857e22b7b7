"""Why a model gives the risk that it gives: what each event of a record contributes, by methods that are tested against
their equations. Attributes are loaded when first used.

    question = read_question(load_checkpoint("my-checkpoint"), patient, "mortality_30d")
    prefix_deltas(question, by="visit").top(5)
    explain(load_checkpoint("my-checkpoint"), patient, "mortality_30d")        # the model's recommended method
    explain_dataset("my-checkpoint", "my-dataset", "contributions.parquet")    # of many patients
    cohort_contributions("contributions.parquet")                              # what each code contributes on average

All contributions are in log-odds of the risk.
"""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "AttentionWeights": "attention_weights",
    "Attribution": "explanation",
    "Comparison": "cohort",
    "Explanation": "explanation",
    "Question": "questions",
    "attentions": "attention_weights",
    "cohort_contributions": "cohort",
    "compare": "cohort",
    "explain": "methods",
    "explain_dataset": "datasets",
    "explain_subjects": "subjects",
    "fusion_weights": "attention_weights",
    "gradient_times_input": "gradients",
    "hidden_attention": "mamba_attention",
    "integrated_gradients": "gradient_integrals",
    "methods_of": "methods",
    "occlusion": "counterfactuals",
    "prefix_deltas": "record_prefixes",
    "random_contributions": "gradients",
    "read_question": "questions",
    "relevance": "relevance_propagation",
    "save_picture": "picture",
    "scan_attention": "scan_weights",
    "token_relevance": "relevance_propagation",
    "write_cohort_page": "cohort_page",
    "write_page": "page",
    "write_pages": "subjects",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

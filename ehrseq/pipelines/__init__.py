"""Pipelines of the package: `pipeline("ehr-risk")`."""

import transformers  # noqa: F401  (before its parts, as in ehrseq.modeling)

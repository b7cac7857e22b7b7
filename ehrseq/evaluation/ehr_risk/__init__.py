"""`ehr_risk`, a Hugging Face `evaluate` module, as a class and as a file that `evaluate.load` takes."""

from ehrseq.evaluation.ehr_risk.ehr_risk import EhrRisk

__all__ = ["EhrRisk"]

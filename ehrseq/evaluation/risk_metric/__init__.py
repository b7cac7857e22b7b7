"""`ehr_risk`, a Hugging Face `evaluate` module, as a class and as a file that `evaluate.load` takes."""

from ehrseq.evaluation.risk_metric.risk_metric import EhrRisk

__all__ = ["EhrRisk"]

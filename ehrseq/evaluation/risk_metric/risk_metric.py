"""A Hugging Face `evaluate` module: discrimination and calibration of risks, with intervals over patients.

import evaluate
from ehrseq.evaluation import ehr_risk_path

metric = evaluate.load(ehr_risk_path())          # offline; or ehrseq.evaluation.risk_metric.EhrRisk()
metric.compute(predictions=[0.1, 0.8, 0.3], references=[0, 1, 0], subject_ids=[1, 2, 2], num_resamples=200)
"""

from typing import Any

import datasets
import evaluate

_DESCRIPTION = """AUROC, AUPRC, F1, Brier score, expected calibration error, calibration slope and calibration in the
large of predicted risks. Each has a 95 % interval under bootstrap resamples of patients, not of rows, as `<name>_low`
and `<name>_high`."""
_INPUTS = """
Args:
    predictions: P(positive) of each row, in [0, 1].
    references: 0 or 1 of each row.
    subject_ids: Patient of each row; by default every row is a patient of its own.
    threshold: Score from which on F1 counts a row as predicted positive; choose it on tuning rows.
    num_resamples: Bootstrap resamples.
    num_bins: Bins of equal mass of the calibration error.
    seed: Seed of the bootstrap.
Returns:
    name -> value, None where it is not estimable; `not_estimable` maps the name to the reason.
"""
_CITATION = ""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class EhrRisk(evaluate.Metric):  # type: ignore[misc]
    """See the module's text."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        subject_ids: Any = None,
        threshold: float = 0.5,
        num_resamples: int = 1000,
        num_bins: int = 10,
        seed: int = 0,
    ) -> dict[str, Any]:
        import polars as pl

        from ehrseq.evaluation.assessment import METRIC_TITLES, assess

        subjects = list(range(len(references))) if subject_ids is None else list(subject_ids)
        if len(subjects) != len(references):
            raise ValueError(f"subject_ids has {len(subjects)} entries, references {len(references)}: one each.")
        if not set(references) <= {0, 1}:
            raise ValueError(f"references must be 0 or 1, got {sorted(set(references))[:5]}.")
        table = pl.DataFrame(
            {"subject_id": subjects, "label": [bool(each) for each in references], "score": list(predictions)},
            schema_overrides={"score": pl.Float64},
        )
        assessment = assess(
            table, "risk", threshold=threshold, num_bins=num_bins, num_resamples=num_resamples, seed=seed
        )
        result: dict[str, Any] = {}
        for name in METRIC_TITLES:
            interval = assessment.metrics.get(name)
            result[name] = interval and interval.value
            result[f"{name}_low"], result[f"{name}_high"] = (interval.low, interval.high) if interval else (None, None)
        return result | {"not_estimable": dict(assessment.missing)}

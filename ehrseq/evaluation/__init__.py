"""Are the scores good, for whom, and for how long? Every number with its interval over patients."""

from ehrseq.evaluation.assessment import RiskAssessment, assess
from ehrseq.evaluation.bootstrap import Interval, bootstrap_interval, bootstrap_intervals, patient_weights
from ehrseq.evaluation.calibration import (
    Calibration,
    CalibrationCurve,
    brier_score,
    calibration_curve,
    expected_calibration_error,
)
from ehrseq.evaluation.comparisons import SeedTest, paired_difference, seed_test
from ehrseq.evaluation.decisions import AlertBurden, DecisionCurve, alert_burden, decision_curve
from ehrseq.evaluation.metrics import (
    Ranking,
    auroc,
    average_precision,
    best_f1_threshold,
    f1_score,
)
from ehrseq.evaluation.predictions import (
    match_predictions,
    read_predictions,
    to_meds_predictions,
    write_meds_predictions,
)
from ehrseq.evaluation.reports import TaskMetrics, choose_thresholds, evaluate_tasks, metrics_table
from ehrseq.evaluation.subgroups import Subgroup, assess_subgroups, row_attributes, subgroup_table
from ehrseq.evaluation.trainer_metrics import ComputeTaskMetrics, positive_probabilities

__all__ = [
    "AlertBurden",
    "Calibration",
    "CalibrationCurve",
    "ComputeTaskMetrics",
    "DecisionCurve",
    "Interval",
    "Ranking",
    "RiskAssessment",
    "SeedTest",
    "Subgroup",
    "TaskMetrics",
    "alert_burden",
    "assess",
    "assess_subgroups",
    "auroc",
    "average_precision",
    "best_f1_threshold",
    "bootstrap_interval",
    "bootstrap_intervals",
    "brier_score",
    "calibration_curve",
    "choose_thresholds",
    "decision_curve",
    "ehr_risk_path",
    "evaluate_tasks",
    "expected_calibration_error",
    "f1_score",
    "match_predictions",
    "metrics_table",
    "paired_difference",
    "patient_weights",
    "positive_probabilities",
    "read_predictions",
    "row_attributes",
    "seed_test",
    "subgroup_table",
    "to_meds_predictions",
    "write_meds_predictions",
]


def ehr_risk_path() -> str:
    """File of the Hugging Face `evaluate` module: `evaluate.load(ehr_risk_path())` needs no network."""
    from pathlib import Path

    return str(Path(__file__).parent / "risk_metric" / "risk_metric.py")

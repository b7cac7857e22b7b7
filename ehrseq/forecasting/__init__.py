"""What comes next: futures drawn from a pretrained model, how well they foretell, and whole records made of them.
Attributes are loaded when first used.

    forecast_patients("model/pretrained", events, outcomes={"death": "death"}, horizon="30d")    # of a table
    forecast_dataset("model/pretrained", "dataset", "parts", tasks=["readmission_30d"])          # of a dataset in files
    evaluate_forecast_files("model/pretrained", "dataset", out="report")                         # how good they are
    synthesize("model/pretrained", "dataset", 500, "synthetic")                                  # records nobody lived
    forecast_stays("hymate/pretrained", events)                                                  # values of a stay

One patient: `pipeline("ehr-forecast")`; the futures themselves: `EhrMambaForCausalLM.trajectories`.
"""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "ForecastSettings": "prompts",
    "ForecastTables": "datasets",
    "TaskForecast": "task_forecast",
    "aalen_johansen": "incidence_calibration",
    "assess_medications": "medications",
    "calibrate_incidence": "incidence_calibration",
    "compare_cohorts": "synthesis_report",
    "compare_futures": "plausibility",
    "evaluate_forecast": "evaluation",
    "evaluate_forecast_files": "evaluation_files",
    "evaluate_stay_forecasts": "value_evaluation",
    "fidelity": "fidelity",
    "forecast_dataset": "datasets",
    "forecast_patients": "datasets",
    "forecast_stay_dataset": "stay_datasets",
    "forecast_stays": "stay_values",
    "load_forecaster": "prompts",
    "medication_questions": "medications",
    "synthesize": "synthesis",
    "task_outcome": "task_outcomes",
    "write_forecast_page": "page",
    "write_trajectories": "trajectory_files",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

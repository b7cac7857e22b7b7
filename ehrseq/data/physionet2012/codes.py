"""Codes, units and plausible ranges of the PhysioNet/CinC Challenge 2012."""

from __future__ import annotations

from datetime import datetime

ADMISSION_TIME = datetime(2012, 1, 1)
"""When every stay begins: the challenge's year, and nothing else is meant by it."""

WINDOW_HOURS = 48
"""Hours that the challenge gives of each stay; the death is to be foretold at their end."""

TASK = "in_hospital_mortality"
TASK_CONFIG = {
    "name": TASK,
    "horizon": "the rest of the hospital stay",
    "definition": f"Death in hospital, foretold {WINDOW_HOURS} hours after the admission to intensive care.",
    "positive_label": "death in hospital",
}
"""The task as a model's `config.tasks` has it."""

ADMISSION_CODE = "VISIT_START//ICU"
SYSTEM = "PHYSIONET2012"
AGE_CODE = f"DEMOGRAPHIC//{SYSTEM}//Age"
HEIGHT_CODE = f"DEMOGRAPHIC//{SYSTEM}//Height"
GENDER_CODES = ("GENDER//F", "GENDER//M")
ICU_TYPES = {
    1: "Coronary care unit",
    2: "Cardiac surgery recovery unit",
    3: "Medical intensive care unit",
    4: "Surgical intensive care unit",
}
ICU_TYPE_CODES = tuple(f"DEMOGRAPHIC//{SYSTEM}//ICUType//{number}" for number in ICU_TYPES)

# Parameter -> (kind, unit, lowest and highest value that a living adult could have, description).
SERIES: dict[str, tuple[str, str, float, float, str]] = {
    "ALP": ("LAB", "IU/L", 1, 5000, "Alkaline phosphatase"),
    "ALT": ("LAB", "IU/L", 1, 20000, "Alanine transaminase"),
    "AST": ("LAB", "IU/L", 1, 40000, "Aspartate transaminase"),
    "Albumin": ("LAB", "g/dL", 0.5, 7, "Albumin"),
    "BUN": ("LAB", "mg/dL", 0.5, 300, "Blood urea nitrogen"),
    "Bilirubin": ("LAB", "mg/dL", 0.05, 90, "Bilirubin"),
    "Cholesterol": ("LAB", "mg/dL", 20, 1000, "Cholesterol"),
    "Creatinine": ("LAB", "mg/dL", 0.05, 40, "Serum creatinine"),
    "DiasABP": ("VITAL", "mmHg", 5, 200, "Invasive diastolic arterial blood pressure"),
    "FiO2": ("VITAL", "1", 0.2, 1, "Fractional inspired oxygen"),
    "GCS": ("VITAL", "{score}", 3, 15, "Glasgow coma score"),
    "Glucose": ("LAB", "mg/dL", 5, 2000, "Serum glucose"),
    "HCO3": ("LAB", "mmol/L", 2, 70, "Serum bicarbonate"),
    "HCT": ("LAB", "%", 5, 75, "Hematocrit"),
    "HR": ("VITAL", "bpm", 10, 300, "Heart rate"),
    "K": ("LAB", "mEq/L", 1, 12, "Serum potassium"),
    "Lactate": ("LAB", "mmol/L", 0.1, 40, "Lactate"),
    "MAP": ("VITAL", "mmHg", 10, 250, "Invasive mean arterial blood pressure"),
    "MechVent": ("VITAL", "1", 0, 1, "Mechanical ventilation"),
    "Mg": ("LAB", "mmol/L", 0.2, 10, "Serum magnesium"),
    "NIDiasABP": ("VITAL", "mmHg", 5, 200, "Non-invasive diastolic arterial blood pressure"),
    "NIMAP": ("VITAL", "mmHg", 10, 250, "Non-invasive mean arterial blood pressure"),
    "NISysABP": ("VITAL", "mmHg", 20, 330, "Non-invasive systolic arterial blood pressure"),
    "Na": ("LAB", "mEq/L", 90, 200, "Serum sodium"),
    "PaCO2": ("LAB", "mmHg", 5, 200, "Partial pressure of arterial carbon dioxide"),
    "PaO2": ("LAB", "mmHg", 15, 700, "Partial pressure of arterial oxygen"),
    "Platelets": ("LAB", "cells/nL", 1, 3000, "Platelets"),
    "RespRate": ("VITAL", "bpm", 2, 100, "Respiration rate"),
    "SaO2": ("LAB", "%", 10, 100, "Oxygen saturation in hemoglobin"),
    "SysABP": ("VITAL", "mmHg", 20, 330, "Invasive systolic arterial blood pressure"),
    "Temp": ("VITAL", "Cel", 20, 45, "Temperature"),
    "TroponinI": ("LAB", "ug/L", 0, 100, "Troponin-I"),
    "TroponinT": ("LAB", "ug/L", 0, 100, "Troponin-T"),
    "Urine": ("VITAL", "mL", 0, 5000, "Urine output"),
    "WBC": ("LAB", "cells/nL", 0.05, 500, "White blood cell count"),
    "Weight": ("VITAL", "kg", 20, 350, "Weight"),
    "pH": ("LAB", "[pH]", 6.3, 8, "Arterial pH"),
}
VARIABLES: dict[str, str] = {name: f"{entry[0]}//{SYSTEM}//{name}" for name, entry in SERIES.items()}
"""Parameter of the challenge -> code of its rows; the order is that of the variable ids in the triplet view."""


def descriptions() -> dict[str, str]:
    """Code -> what it means."""
    return {
        **{VARIABLES[name]: entry[4] for name, entry in SERIES.items()},
        AGE_CODE: "Age in years",
        HEIGHT_CODE: "Height",
        **{code: ICU_TYPES[number] for number, code in zip(ICU_TYPES, ICU_TYPE_CODES, strict=True)},
        ADMISSION_CODE: "Admission to the intensive care unit",
    }

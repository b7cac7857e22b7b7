"""Vocabulary of the simulator: signal channels, chronic diseases, the three condition tasks' codes, and a Zipf
background.

Channels and chronic diseases carry real LOINC, RxNorm, SNOMED CT and ICD-10-CM codes. The background is syntactically
valid codes without meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LARGEST_RANK = 640
"""Background codes; code of rank r has probability proportional to 1 / r."""


@dataclass(frozen=True)
class Channel:
    """A quantity whose latest state carries risk: a measurement, or a pair of treatments of which one came last.

    Attributes:
        name: Short name, used by the weights of the scores.
        codes: One code for a measurement; two for a pair, the first stands for state -1, the second for +1.
        location: Value at z = 0 (measurements).
        scale: Value of one z, or of one z on the log scale where `logarithmic`.
        logarithmic: Whether log(value) is linear in z.
        decimals: Decimals that the first unit is reported with.
        units: (UCUM unit, factor from the first unit, decimals), the first one canonical.
        measured: Probability of a measurement per phase of a stay in a patient without chronic disease.
    """

    name: str
    codes: tuple[str, ...]
    location: float = 0.0
    scale: float = 1.0
    logarithmic: bool = False
    units: tuple[tuple[str, float, int], ...] = ()
    measured: float = 0.8

    @property
    def is_pair(self) -> bool:
        """Whether the channel is a pair of treatments."""
        return len(self.codes) == 2


def _lab(code: str) -> tuple[str, ...]:
    return (f"LAB//LOINC//{code}",)


def _drugs(first: str, second: str) -> tuple[str, ...]:
    return (f"MEDICATION//RXNORM//{first}", f"MEDICATION//RXNORM//{second}")


MEASUREMENTS: tuple[Channel, ...] = (
    Channel("creatinine", _lab("2160-0"), 1.2, 0.30, True, (("mg/dL", 1.0, 2), ("umol/L", 88.42, 0))),
    Channel("crp", _lab("1988-5"), 18.0, 0.80, True, (("mg/L", 1.0, 1),), measured=0.6),
    Channel("potassium", _lab("2823-3"), 4.2, 0.45, False, (("mmol/L", 1.0, 2),)),
    Channel("glucose", _lab("2345-7"), 130.0, 0.25, True, (("mg/dL", 1.0, 0), ("mmol/L", 1 / 18.0156, 1))),
    Channel("lactate", _lab("2524-7"), 1.8, 0.40, True, (("mmol/L", 1.0, 2),), measured=0.6),
    Channel("sodium", _lab("2951-2"), 138.0, 3.5, False, (("mmol/L", 1.0, 1),)),
    Channel("hemoglobin", _lab("718-7"), 11.5, 1.4, False, (("g/dL", 1.0, 1),)),
    Channel("ldl", _lab("13457-7"), 115.0, 0.25, True, (("mg/dL", 1.0, 0), ("mmol/L", 0.02586, 2))),
    Channel("sbp", ("VITAL//LOINC//8480-6",), 132.0, 14.0, False, (("mm[Hg]", 1.0, 0),), measured=0.9),
    Channel("heart_rate", ("VITAL//LOINC//8867-4",), 84.0, 13.0, False, (("/min", 1.0, 0),), measured=0.9),
    Channel("diuretic", _drugs("9997", "4603")),  # spironolactone, furosemide
    Channel("rate_control", _drugs("6918", "17767")),  # metoprolol, amlodipine
    Channel("statin", _drugs("617318", "259255")),  # atorvastatin 20 mg, 80 mg
    Channel("anticoagulant", ("MEDICATION//RXNORM//1364430", "PROCEDURE//SNOMED//182840001")),  # apixaban, stopped
)
"""The order of the channels is the order of every state array of the process."""
IS_PAIR = np.array([channel.is_pair for channel in MEASUREMENTS])
IS_LOGARITHMIC = np.array([channel.logarithmic for channel in MEASUREMENTS])
LOCATIONS = np.array([channel.location for channel in MEASUREMENTS])
LOG_LOCATIONS = np.log(np.where(IS_LOGARITHMIC, LOCATIONS, 1.0))
SCALES = np.array([channel.scale for channel in MEASUREMENTS])

DISPOSITIONS = ("home", "snf", "hosp", "exp")
"""Where a discharged patient goes; the last one has died."""


CHANNEL_INDEX = {channel.name: k for k, channel in enumerate(MEASUREMENTS)}

CHRONIC: tuple[tuple[str, str, float], ...] = (
    ("heart_failure", "I50.9", 0.22),
    ("copd", "J44.9", 0.18),
    ("diabetes", "E11.9", 0.28),
    ("kidney", "N18.30", 0.20),
    ("cancer", "C34.90", 0.12),
    ("atrial_fibrillation", "I48.91", 0.18),
    ("dementia", "F03.90", 0.10),
    ("liver", "K74.60", 0.08),
    ("obesity", "E66.9", 0.25),
    ("depression", "F32.9", 0.20),
)
"""(name, ICD-10-CM code, share of patients)."""


CONDITION_TASKS: tuple[str, ...] = ("hypertension", "fluid_disorder", "lipid_disorder")

CONDITION_CODES: dict[str, tuple[tuple[str, float], ...]] = {
    "hypertension": (("I10", 1.0),),
    "fluid_disorder": (("E87.1", 0.35), ("E87.5", 0.2), ("E87.6", 0.25), ("E87.70", 0.2)),
    "lipid_disorder": (("E78.5", 0.6), ("E78.00", 0.25), ("E78.2", 0.15)),
}
"""ICD-10-CM codes of the condition tasks with their shares."""

CULTURE_CODE = "LAB//LOINC//600-7"
"""Blood culture: a text result, reported after the blood was drawn, often after discharge."""

RACES: tuple[tuple[str, str, float], ...] = (
    ("2106-3", "White", 0.62),
    ("2054-5", "Black or African American", 0.18),
    ("2028-9", "Asian", 0.08),
    ("2131-1", "Other Race", 0.12),
)
"""(OMB category, its name, share); the event code is `RACE//<NAME>`. Race bears on nothing."""

VACCINES = ("IMMUNIZATION//CVX//140", "IMMUNIZATION//CVX//33")


@dataclass(frozen=True)
class Vocabulary:
    """Every code of the simulator with an integer id.

    Attributes:
        codes: Code of each id.
        index: Id of each code.
        background: int64 `[LARGEST_RANK]`, id of the background code of each rank.
        background_is_lab: bool `[LARGEST_RANK]`, whether that code comes with a number.
        cumulative: float64 `[LARGEST_RANK]`, cumulative Zipf probabilities.
    """

    codes: tuple[str, ...]
    index: dict[str, int]
    background: np.ndarray
    background_is_lab: np.ndarray
    cumulative: np.ndarray


def _background_code(rank: int) -> str:
    """A valid code of a kind that depends on the rank; no code of a channel, a chronic disease or a task."""
    kind = rank % 10
    if kind in (0, 3, 5, 8):
        # Letters without I and E, which hold the codes of the condition tasks, and without the chronic diseases'
        # categories.
        letter = "ABDGHLMNRST"[rank % 11]
        category = (rank * 7) % 90 + (4 if letter == "N" else 0)
        category = 31 if letter == "N" and category == 18 else category
        suffix = "" if rank % 4 == 0 else f".{rank % 10}"
        return f"DIAGNOSIS//ICD10CM//{letter}{category:02d}{suffix}"
    if kind in (1, 4, 7):
        return f"MEDICATION//RXNORM//{200_000 + 137 * rank}"
    if kind in (2, 6):
        return f"LAB//LOINC//{20_000 + 11 * rank}-{rank % 10}"
    return f"PROCEDURE//SNOMED//{70_000_000 + 1_003 * rank}"


def build_vocabulary() -> Vocabulary:
    """The vocabulary, the same in every run."""
    codes = ["MEDS_BIRTH", "MEDS_DEATH", "GENDER//F", "GENDER//M"]
    codes += [f"RACE//{name.upper()}" for _, name, _ in RACES]
    codes += [f"VISIT_START//{name}" for name in ("IMP", "ACUTE", "EMER", "AMB")]
    codes += [f"VISIT_END//{name}" for name in ("home", "snf", "hosp", "exp", "ACUTE", "EMER", "AMB")]
    codes += [code for channel in MEASUREMENTS for code in channel.codes]
    codes += [f"DIAGNOSIS//ICD10CM//{code}" for _, code, _ in CHRONIC]
    codes += [f"DIAGNOSIS//ICD10CM//{code}" for task in CONDITION_TASKS for code, _ in CONDITION_CODES[task]]
    codes += [CULTURE_CODE, *VACCINES]
    background = [_background_code(rank) for rank in range(1, LARGEST_RANK + 1)]
    codes += background
    index = {code: number for number, code in enumerate(codes)}
    if len(index) != len(codes):
        raise ValueError("the simulator's vocabulary holds a code twice; background codes must differ from each other")
    weights = 1.0 / np.arange(1, LARGEST_RANK + 1)
    return Vocabulary(
        codes=tuple(codes),
        index=index,
        background=np.array([index[code] for code in background], dtype=np.int64),
        background_is_lab=np.array([code.startswith("LAB//") for code in background]),
        cumulative=np.cumsum(weights) / weights.sum(),
    )


VOCABULARY = build_vocabulary()

"""Small trained checkpoints of every family, in float64, with patients to ask them about."""

from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoModelForSequenceClassification, AutoTokenizer

import ehrseq  # noqa: F401  (registers the classes)
from ehrseq.hub.checkpoints import Checkpoint
from tests.checkpoints.patients import make_patient
from tests.checkpoints.stays import make_stay

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
EVENT_FAMILIES = ("ehrmamba", "ehr_lstm", "cehrbert", "ehr_bigbird")
FAMILIES = (*EVENT_FAMILIES, "hymate")


@cache
def checkpoint_of(family: str) -> Checkpoint:
    """The committed checkpoint of a family, in float64."""
    encoder = AutoFeatureExtractor if family == "hymate" else AutoTokenizer
    model = AutoModelForSequenceClassification.from_pretrained(CHECKPOINTS / family)
    return Checkpoint(model.double().eval(), encoder.from_pretrained(CHECKPOINTS / family))


def patient_of(family: str, subject_id: int = 2) -> dict[str, Any]:
    return make_stay(subject_id) if family == "hymate" else make_patient(subject_id, seed=2)


def task_of(family: str) -> str:
    name: str = (checkpoint_of(family).model.config.tasks or [])[0]["name"]
    return name

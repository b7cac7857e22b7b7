"""What the pipelines of patients share: whom they take, in which form, and what they refuse alike."""

from collections.abc import Collection, Mapping
from typing import Any


def check_rows_at_once(batch_size: Any) -> None:
    """Refuse what transformers and torch would fail on with words of their own.

    Raises:
        ValueError: No whole number of at least 1.
    """
    is_number = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if batch_size is not None and (not is_number or batch_size < 1):
        raise ValueError(f"batch_size got {batch_size!r}; expected a whole number of at least 1.")


def is_fhir(patient: Any) -> bool:
    """Whether `patient` is a FHIR resource as a dict."""
    return isinstance(patient, dict) and "resourceType" in patient


def patient_from_fhir(bundle: dict[str, Any]) -> dict[str, Any]:
    """Read a FHIR R4 Bundle of one patient.

    Raises:
        ValueError: It is another resource, or the Bundle does not hold exactly one Patient.
        ImportError: The package is not installed: the reader does not travel with a checkpoint.
    """
    if bundle["resourceType"] != "Bundle":
        raise ValueError(
            f"Got a FHIR {bundle['resourceType']!r}, expected a Bundle that holds one patient's whole record "
            f"(Patient/$everything, or all resources in Bundle.entry)."
        )
    try:
        from ehrseq.data import patient_from_bundle
    except ImportError as error:
        raise ImportError(
            "FHIR Bundles are read by the package ehrseq, which is not installed here: pip install ehrseq, or give the "
            'patient as {"subject_id": ..., "events": [{"time": ..., "code": ...}, ...]}.'
        ) from error
    patient: dict[str, Any] = patient_from_bundle(bundle)
    return patient


def subject_of(patient: Any) -> str:
    """The subject in words, "?" where the patient is no dict."""
    return str(patient.get("subject_id")) if isinstance(patient, dict) else "?"


def nothing_is_known(special_ids: Collection[int], patient: Any, row: Mapping[str, Any]) -> str | None:
    """What to warn of where no event of a patient could be read: the risk is a guess. None where one could.

    Args:
        special_ids: Tokens that are no event, [UNK] among them.
        patient: Whose row it is.
        row: `input_ids` and `visit_orders`, [l].
    """
    in_visits = row["input_ids"][row["visit_orders"] > 0]
    if not set(in_visits.tolist()) <= set(special_ids):
        return None
    return (
        f"Subject {subject_of(patient)} has no event of a known code up to the prediction time: the risk says "
        f"nothing about this patient. Check prediction_time, and the codes with tokenizer.coverage(events)."
    )

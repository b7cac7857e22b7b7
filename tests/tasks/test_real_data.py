"""Labels on the open MIMIC-IV demo (100 patients), held to the naive twin fed from the raw files."""

from collections import Counter
from datetime import datetime, timedelta

import polars as pl
import pytest

from ehrseq.data import read_fhir, read_meds
from ehrseq.tasks import label_events, list_tasks, load_task
from tests.tasks.naive import naive_labels

BOUNDARIES = {
    "HOSPITAL_ADMISSION": ("start", "IMP"),
    "HOSPITAL_DISCHARGE": ("end", "IMP"),
    "ED_REGISTRATION": ("start", "EMER"),
    "ED_OUT": ("end", "EMER"),
    "ICU_ADMISSION": ("start", "ICU"),
    "ICU_DISCHARGE": ("end", "ICU"),
}
CODES = {
    "hypertension": ("9//401", "10//I10"),
    "fluid_disorder": ("9//276", "10//E87"),
    "lipid_disorder": ("9//272", "10//E78"),
}
END = datetime(2202, 12, 31)
END_OF_DAY = timedelta(days=1) - timedelta(microseconds=1)


@pytest.fixture(scope="module")
def folder(ehr_data):
    path = ehr_data / "mimic-iv-demo-meds" / "0.0.1"
    if not path.is_dir():
        pytest.skip(f"{path} is absent: the MIMIC-IV demo as MEDS is needed")
    return path


def _raw_patients(folder) -> dict[int, dict]:
    """What the twin needs, straight from the Parquet files: boundaries by hadm_id, nothing of ehrseq in between."""
    columns = ["subject_id", "time", "code", "hadm_id"]
    raw = pl.concat(pl.read_parquet(file, columns=columns) for file in sorted((folder / "data").rglob("*.parquet")))
    patients: dict[int, dict] = {
        subject: {"starts": [], "ends": [], "deaths": [], "expired": [], "diagnoses": []}
        for subject in raw["subject_id"].unique()
    }
    for subject, time, code, hadm_id in raw.sort("subject_id", "time").unique(maintain_order=True).iter_rows():
        patient, visit_id = patients[subject], None if hadm_id is None else str(hadm_id)
        kind = BOUNDARIES.get(code.split("//")[0])
        if kind:
            patient[f"{kind[0]}s"].append((time, kind[1], visit_id))
            if code == "HOSPITAL_DISCHARGE//DIED":
                patient["expired"].append(time)
        elif code == "MEDS_DEATH":
            # MIMIC-IV knows deaths to the day, as midnight: the design puts them at the end of it
            patient["deaths"].append(time + END_OF_DAY if time.time() == time.min.time() else time)
        elif code.startswith("DIAGNOSIS//ICD//"):
            patient["diagnoses"].append((time, code.removeprefix("DIAGNOSIS//ICD//"), visit_id))
    return patients


def _encounters(patient: dict) -> list[dict]:
    """Starts with the first end at or after them of the same class and hadm_id."""
    ends, encounters = list(patient["ends"]), []
    for start, kind, visit_id in patient["starts"]:
        end = next((e for e in ends if e[0] >= start and e[1:] == (kind, visit_id)), None)
        if end:
            ends.remove(end)
        encounters.append({"visit_id": visit_id, "encounter_class": kind, "start": start, "end": end and end[0]})
    assert not ends
    return encounters


def test_mimic_iv_meds_demo_equals_the_naive_twin_on_the_raw_files(folder):
    result = label_events(read_meds(folder), list_tasks(), end_of_data=END)
    assert set(result.candidates.values()) == {272}  # 275 hadm_ids, three of them transfers on the same day
    patients = sorted(_raw_patients(folder).items())
    for name in list_tasks():
        task = load_task(name)
        expected, dropped, competing = [], Counter(), Counter()
        for subject, patient in patients:
            codes = [
                (time, visit)
                for time, code, visit in patient["diagnoses"]
                if code.startswith(CODES.get(name, ("none",)))
            ]
            labels, why, competes = naive_labels(
                _encounters(patient), patient["deaths"], patient["expired"], codes, task, END
            )
            expected += [(subject, time, label) for time, label in labels]
            dropped += why
            competing += competes
        assert result.labels[name].rows() == expected
        assert {reason: count for reason, count in result.report[name].items() if count} == dict(dropped)
        assert {event: count for event, count in result.competing[name].items() if count} == dict(competing)
        assert expected


@pytest.mark.slow
def test_the_same_patients_as_fhir_have_the_same_admissions_and_outcomes(folder, ehr_data):
    fhir = ehr_data / "mimic-iv-fhir-demo" / "2.1.0" / "fhir"
    if not fhir.is_dir():
        pytest.skip(f"{fhir} is absent: the MIMIC-IV demo as FHIR is needed")
    names = ["mortality_30d", "long_stay_7d", "readmission_30d"]
    as_meds = label_events(read_meds(folder), names, end_of_data=END)
    as_fhir = label_events(read_fhir(fhir, progress=False)[0], names, end_of_data=END)
    assert as_fhir.candidates == as_meds.candidates
    for name in names:
        for count in ("labels", "positives"):
            both = [result.summary().filter(pl.col("task") == name)[count].item() for result in (as_meds, as_fhir)]
            # A death known to the day is the day's end in FHIR and its midnight in this MEDS dataset; clocks change.
            assert abs(both[0] - both[1]) <= 2
    assert as_fhir.report["readmission_30d"] == as_meds.report["readmission_30d"]

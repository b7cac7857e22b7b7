"""Simulated patients: a seeded cohort as MEDS rows or FHIR R4, with every patient's true risk.

    cohort = simulate(2000, seed=7)
    events = cohort.events()                               # the MEDS table
    cohort.write_fhir("fhir/")                             # the same as NDJSON, with duplicates
    cohort.true_risk("mortality_30d", subject_ids, times)  # P(positive label | what is recorded up to then)

The disease process is documented in `process` (what happens), `risk` (with which probability) and `history` (what a
risk at any time means). Patient k of a seed is the same whatever the number of patients.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ehrseq.data.simulate.fhir import write_fhir
from ehrseq.data.simulate.history import RecordedHistory
from ehrseq.data.simulate.process import DiseaseProcess
from ehrseq.data.simulate.random import PatientStreams
from ehrseq.data.simulate.risk import SCORES
from ehrseq.data.simulate.state import EXTRACTION, SimulatedBlock
from ehrseq.data.simulate.tables import block_admissions, block_events
from ehrseq.tokenization.ehr_codes import MINUTE_US
from ehrseq.work.progress import progress_bar

logger = logging.getLogger(__name__)

SIMULATOR_VERSION = "1.0"
"""Changes whenever a seed gives other patients."""

SIMULATED_TASKS = SCORES
"""Tasks whose true risk is known."""

_EPOCH = datetime(1970, 1, 1)
_NAME = "ehrseq-simulated-seed-"


def simulate(
    num_patients: int, seed: int = 0, *, first_patient: int = 0, chunk_size: int = 2000, progress: bool = True
) -> Simulation:
    """A cohort of simulated patients; nothing is computed before it is asked for.

    Args:
        num_patients: Number of patients.
        seed: Seed; with the number of a patient it fixes that patient.
        first_patient: Number of the first patient, so that cohorts of one seed can be drawn disjoint. The subject_id
            is the number + 1.
        chunk_size: Patients simulated at a time; it changes memory and speed only.
        progress: Whether long work shows a progress bar.

    Returns:
        The cohort.

    Raises:
        ValueError: A number is negative, not an integer, or no patient is asked for.
    """
    for name, value, least in (
        ("num_patients", num_patients, 1),
        ("seed", seed, 0),
        ("first_patient", first_patient, 0),
        ("chunk_size", chunk_size, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} got {value!r}; expected an integer of at least {least}.")
    return Simulation(int(num_patients), int(seed), int(first_patient), int(chunk_size), progress)


def simulated_name(seed: int) -> str:
    """Name of a dataset of simulated patients, from which `simulated_seed` tells them again."""
    return f"{_NAME}{seed}"


def simulated_seed(dataset_name: str) -> int | None:
    """Seed of the patients of a dataset of this name, None where they are not simulated."""
    seed = dataset_name.removeprefix(_NAME)
    return int(seed) if seed != dataset_name and seed.isdecimal() else None


def simulated_cohort(dataset: str | Path) -> Simulation | None:
    """The simulation behind a dataset whose name says that it is one, None behind any other.

    Args:
        dataset: Folder of a MEDS dataset with splits.
    """
    from ehrseq.data.dataset import EventDataset

    events = EventDataset(dataset)
    seed = simulated_seed(str(events.metadata.get("dataset_name", "")))
    if seed is None or events.splits.is_empty():
        return None
    last: Any = events.splits["subject_id"].max()
    return simulate(int(last), seed, progress=False)


def true_risks(
    cohort: Simulation, tasks: Sequence[str], subject_ids: np.ndarray, prediction_times: np.ndarray
) -> np.ndarray:
    """`[n]` true risk of every row, each of a task of its own; NaN for a task whose risk is not known."""
    truth, names = np.full(len(subject_ids), np.nan), np.asarray(tasks)
    for task in np.unique(names):
        rows = np.flatnonzero(names == task)
        if task in SIMULATED_TASKS:
            truth[rows] = cohort.true_risk(str(task), subject_ids[rows], prediction_times[rows])
    return truth


class Simulation:
    """A simulated cohort, see `simulate`.

    Attributes:
        num_patients: Number of patients.
        seed: Seed.
        first_patient: Number of the first patient.
        end_of_data: The extraction date; pass it to the labelling engine as the end of follow-up.
    """

    def __init__(self, num_patients: int, seed: int, first_patient: int, chunk_size: int, progress: bool) -> None:
        self.num_patients = num_patients
        self.seed = seed
        self.first_patient = first_patient
        self.chunk_size = chunk_size
        self.progress = progress
        self.end_of_data = _EPOCH + timedelta(minutes=EXTRACTION)
        self._admissions: pl.DataFrame | None = None
        self._histories: dict[int, RecordedHistory] = {}

    def __repr__(self) -> str:
        return f"Simulation(num_patients={self.num_patients}, seed={self.seed}, first_patient={self.first_patient})"

    def iter_blocks(self) -> Iterator[tuple[np.ndarray, SimulatedBlock]]:
        """(subject_ids int64 `[n]`, block) for each chunk of patients."""
        chunks = range(-(-self.num_patients // self.chunk_size))
        tables = []
        for chunk in self._in_sight(chunks):
            subject_ids, block = self._chunk(chunk)
            tables.append(block_admissions(subject_ids, block))
            yield subject_ids, block
        self._admissions = pl.concat(tables)

    def _chunk(self, chunk: int) -> tuple[np.ndarray, SimulatedBlock]:
        """subject_ids and block of one chunk of patients."""
        first = self.first_patient + chunk * self.chunk_size
        patients = np.arange(first, min(first + self.chunk_size, self.first_patient + self.num_patients))
        return patients + 1, DiseaseProcess(PatientStreams(self.seed, patients), len(patients)).run()

    def _in_sight(self, chunks: Sequence[int]) -> Iterable[int]:
        """The chunks under a progress bar, where there are several."""
        hidden = not self.progress or len(chunks) <= 1
        shown: Iterable[int] = progress_bar(chunks, desc="Simulating", unit="chunk", disable=hidden)
        return shown

    def iter_events(self) -> Iterator[pl.DataFrame]:
        """The MEDS table chunk by chunk: nobody need hold a large cohort in memory."""
        for subject_ids, block in self.iter_blocks():
            yield block_events(subject_ids, block)

    def events(self) -> pl.DataFrame:
        """The MEDS table of the cohort in the contract's order, without the duplicates of the FHIR files."""
        return pl.concat(list(self.iter_events()), rechunk=True)

    def admissions(self) -> pl.DataFrame:
        """One row an admission, with the true risks.

        Returns:
            `subject_id`, `visit_start` (of the overlapping emergency visit, else of the admission), `start`, `end`,
            `alive` (discharged alive before the extraction), and a column per task: the probability of the positive
            label at 24 hours (long_stay_7d) or at the discharge (the others), null where there is no label.
        """
        if self._admissions is None:
            for _ in self.iter_blocks():
                pass
        if self._admissions is None:
            raise RuntimeError("the simulation ended before its last patient; ask again for admissions()")
        return self._admissions

    def true_risk(
        self,
        task: str,
        subject_ids: Sequence[int] | np.ndarray | pl.Series,
        times: Sequence[datetime] | np.ndarray | pl.Series,
    ) -> np.ndarray:
        """P(positive label of the question asked at t | everything recorded up to t), in closed form, at any time.

        At a task's own prediction times (a discharge alive; 24 hours after an admission) this is the exact risk of the
        label. At another time t the question is asked as `history` defines it: the discharge tasks as if the
        latest admission ended at t with a discharge alive, `long_stay_7d` as if the first 24 hours were over at t, or,
        after them, given that the stay goes on. So a line through the times of a patient meets the risk of every label,
        moves with each row that bears on it, and is what a model that is asked at t can be held against.

        The asked patients' chunks are simulated once and about 5 kB a patient are kept for further questions.

        Args:
            task: One of `SIMULATED_TASKS`.
            subject_ids: `[n]`, patients of this cohort.
            times: `[n]`, UTC (naive, or with a time zone); read to the whole minute, the simulator's clock.

        Returns:
            float64 `[n]`, NaN where there is no answer: from the patient's death on, after `end_of_data`, before the
            first admission begins, for a new condition from its first diagnosis on, and for long_stay_7d outside of an
            admission and where the stay has lasted 168 hours.

        Raises:
            ValueError: An unknown task, lengths that differ, somebody who is not in the cohort, or no time.
        """
        if task not in SIMULATED_TASKS:
            raise ValueError(f"true_risk got task {task!r}; expected one of {list(SIMULATED_TASKS)}.")
        patients, minutes = self._asked(subject_ids, times)
        chunks = (patients - self.first_patient) // self.chunk_size
        asked = np.unique(chunks)
        for chunk in self._in_sight([chunk for chunk in asked.tolist() if chunk not in self._histories]):
            ids, block = self._chunk(chunk)
            self._histories[chunk] = RecordedHistory(block.events, len(ids))
        risks = np.full(len(patients), np.nan)
        for chunk in asked.tolist():
            here = np.flatnonzero(chunks == chunk)
            rows = patients[here] - self.first_patient - chunk * self.chunk_size
            risks[here] = self._histories[chunk].risk(task, rows, minutes[here])
        return risks

    def _asked(self, subject_ids: Any, times: Any) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the patients and whole minutes since 1970, int64 `[n]` each."""
        subjects, moments = pl.Series("subject_id", subject_ids), pl.Series("time", times)
        if len(moments) != len(subjects):
            raise ValueError(
                f"true_risk got {len(subjects)} subject_ids and {len(moments)} times; expected as many of each."
            )
        if len(subjects) == 0:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        if not subjects.dtype.is_integer() or subjects.null_count():
            raise ValueError(f"true_risk got subject_ids of type {subjects.dtype}; expected integers without nulls.")
        if not isinstance(moments.dtype, pl.Datetime) or moments.null_count():
            raise ValueError(
                f"true_risk got times of type {moments.dtype}, {moments.null_count()} of {len(moments)} null; expected "
                "a date and a time each (datetime, datetime64 or polars Datetime)."
            )
        patients = subjects.cast(pl.Int64).to_numpy() - 1
        unknown = (patients < self.first_patient) | (patients >= self.first_patient + self.num_patients)
        if unknown.any():
            raise ValueError(
                f"true_risk got {np.unique(patients[unknown]).size} subject_ids that are not in this cohort, the "
                f"first: {patients[unknown][0] + 1}; expected {self.first_patient + 1} to "
                f"{self.first_patient + self.num_patients}."
            )
        return patients, moments.dt.epoch("us").to_numpy() // MINUTE_US

    def write_fhir(self, folder: str | Path, *, compress: bool = False) -> Path:
        """Write the cohort as FHIR R4 NDJSON, see `ehrseq.data.simulate.fhir.write_fhir`."""
        return write_fhir(self.iter_blocks(), folder, compress=compress)

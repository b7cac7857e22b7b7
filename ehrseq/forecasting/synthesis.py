"""Whole patients that nobody lived, drawn from a model of next tokens: a dataset as `ehrseq prepare` writes it.

    report = synthesize("model", "dataset", 500, "synthetic", seed=0)
    print(report)

1. Who they are is drawn from the shape of a real cohort (`cohort_shape.py`), apart from each other: static facts with
   the age, when the record begins, how long it is observed.
2. What happens to them is drawn from the model, from [CLS], the static tokens and the first [VS] on, up to the end of
   the observation or the death (`EhrMambaForCausalLM.trajectories`).
3. The tokens become events (`token_events.py`).
4. Who shares a longer run of events with a training patient than is natural (`copies.py`) is drawn anew.

Patients are drawn in parts that can be stopped; patient k of a seed is the same whoever draws it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np
import polars as pl

from ehrseq.data.dataset import EventDataset, make_folder, write_metadata, write_parquet
from ehrseq.data.metadata import DatasetSettings, read_settings
from ehrseq.data.schema import EVENT_SCHEMA, arrow_schema, validate_events
from ehrseq.data.splits import assign_splits
from ehrseq.forecasting.cohort_shape import AGE_BAND, CohortShape, shape_of
from ehrseq.forecasting.copies import EventRuns, RunIndex, allowed_run, read_runs, run_lengths
from ehrseq.forecasting.prompts import kept_forecaster
from ehrseq.forecasting.synthesis_report import SynthesisReport, compare_cohorts, write_synthesis_report
from ehrseq.forecasting.token_events import DrawnEvent, RecordWriter, meanings_of_tokens
from ehrseq.hub.checkpoints import checkpoint_digest
from ehrseq.modeling.ehr_trajectories import ForecastPrompt, TrajectoryEnd, TrajectoryRequest
from ehrseq.prepare.run import prepare_dataset
from ehrseq.tasks.labelling import resolve_tasks
from ehrseq.tokenization.ehr_codes import DAY_US, HOUR_US, MINUTE_US, YEAR_US
from ehrseq.tokenization.ehr_outcomes import death_ids
from ehrseq.tokenization.ehr_sequence import EPOCH, subjects_digest
from ehrseq.tokenization.ehr_vocabulary import VS
from ehrseq.work.engine import Engine, get_engine
from ehrseq.work.files import check_apart, remove, write_text, write_whole
from ehrseq.work.parts import RecordedPart, run_parts, settings_key

if TYPE_CHECKING:
    from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

PATIENTS_OF_A_PART = 64
ATTEMPTS = 5
"""Times that a patient is drawn before nobody is written in its place."""
MOST_TOKENS = 4096
_HELD_OUT = "held_out"
_TOGETHER = 32
_LEAST_COVERED = 0.5
_DAYS_OF_A_YEAR = 365.25
_FACTS = ("diagnosis", "procedure", "medication", "lab", "vital", "other")


class DrawnCounts(TypedDict):
    """What was drawn of one part.

    Attributes:
        patients: Written.
        refused: Draws that were refused as copies.
        missing: Patients of whom every draw was refused.
        events: Rows.
        tokens: Drawn tokens.
        ends: Why trajectories ended -> patients.
        notes: What was left out or mended.
        longest: Longest run that each written patient shares with a training patient.
        longest_refused: The same of refused draws.
    """

    patients: int
    refused: int
    missing: int
    events: int
    tokens: int
    ends: dict[str, int]
    notes: dict[str, int]
    longest: list[int]
    longest_refused: list[int]


@dataclass(frozen=True)
class SynthesisPart(RecordedPart[DrawnCounts]):
    """Some synthetic patients.

    Attributes:
        folder: Folder of all parts.
        number: Of this one.
        first, patients: Numbers of its patients.
        checkpoint: Folder or name of the model.
        shape: JSON file of the cohort's shape.
        runs: File of the training patients' events.
        most_copied: Longest shared run that is written; None = any.
        seed: Of the call.
        max_years: Longest observation.
    """

    folder: str
    number: int
    first: int
    patients: int
    checkpoint: str
    shape: str
    runs: str
    most_copied: int | None
    seed: int
    max_years: float | None

    @property
    def name(self) -> str:
        """The patients, in messages."""
        return f"synthetic patients {self.first + 1} to {self.first + self.patients}"

    @property
    def record(self) -> Path:
        """See `RecordedPart.record`."""
        return Path(self.folder) / f"{self.number}.json"

    def make(self) -> DrawnCounts:
        """See `RecordedPart.make`."""
        model, tokenizer = _model_and_tokenizer(self.checkpoint, checkpoint_digest(self.checkpoint))
        shape = CohortShape.from_json(Path(self.shape).read_text(encoding="utf-8"))
        drawer = PatientDrawer(model, tokenizer, shape, self.seed, self.max_years)
        index = read_runs(self.runs)
        counts: DrawnCounts = {
            "patients": 0,
            "refused": 0,
            "missing": 0,
            "events": 0,
            "tokens": 0,
            "ends": {},
            "notes": {},
            "longest": [],
            "longest_refused": [],
        }
        ends, notes = Counter[str](), Counter[str]()
        kept: list[pl.DataFrame] = []
        waiting = list(range(self.first, self.first + self.patients))
        for attempt in range(ATTEMPTS):
            if not waiting:
                break
            drawn = drawer.draw(waiting, attempt)
            longest = index.longest(EventRuns.of(tokenizer.encode_histories(_table(drawn))))
            again = []
            for patient, run in zip(drawn, longest.tolist(), strict=True):
                if self.most_copied is not None and run > self.most_copied:
                    counts["refused"] += 1
                    counts["longest_refused"].append(run)
                    again.append(patient.number)
                    continue
                kept.append(_table([patient]))
                counts["longest"].append(run)
                counts["tokens"] += patient.tokens
                ends[patient.end.name.lower()] += 1
                notes.update(patient.notes)
            waiting = again
        counts["missing"] = len(waiting)
        counts["patients"] = len(kept)
        events = validate_events(pl.concat([pl.DataFrame(schema=EVENT_SCHEMA), *kept]), source="synthetic events")
        counts["events"] = events.height
        counts["ends"], counts["notes"] = dict(sorted(ends.items())), dict(sorted(notes.items()))
        if events.height:
            table = events.to_arrow().cast(arrow_schema())
            write_whole(self.beside(".parquet"), lambda path: write_parquet(table, path))
        return counts


@dataclass
class DrawnPatient:
    """One synthetic patient.

    Attributes:
        number: Its number; the subject_id is one more.
        events: Its rows.
        notes: What was left out or mended.
        tokens: Tokens that were drawn.
        end: Why the trajectory ended.
    """

    number: int
    events: list[DrawnEvent]
    notes: Counter[str]
    tokens: int
    end: TrajectoryEnd


@dataclass
class PatientDrawer:
    """Draws whole patients.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        shape: What patients are.
        seed: Of the call.
        max_years: Longest observation, None = any.
    """

    model: EhrMambaForCausalLM
    tokenizer: EhrTokenizer
    shape: CohortShape
    seed: int
    max_years: float | None = None
    _meanings: list[Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._meanings = meanings_of_tokens(self.tokenizer.vocabulary, self.shape.texts)
        self._deaths = death_ids(self.tokenizer.vocabulary)

    def draw(self, numbers: list[int], attempt: int = 0) -> list[DrawnPatient]:
        """The patients of these numbers; another attempt gives others."""
        beginnings = [_Beginning.of(self.shape, self.seed, number, attempt, self.max_years) for number in numbers]
        patients: dict[int, DrawnPatient] = {}
        # Those who are observed for about as long together: a trajectory is the same whatever the horizon, up to it.
        beginnings.sort(key=lambda beginning: beginning.days)
        for first in range(0, len(beginnings), _TOGETHER):
            group = beginnings[first : first + _TOGETHER]
            request = TrajectoryRequest(
                horizon_days=group[-1].days,
                num=1,
                first=attempt,
                seed=self.seed,
                death_ids=self._deaths,
                keep_tokens=True,
                max_tokens=MOST_TOKENS,
            )
            prompts = [ForecastPrompt(self._inputs(beginning), 0.0, beginning.number) for beginning in group]
            drawn = self.model.trajectories(prompts, request, slots=_TOGETHER)
            patients |= {own.number: self._patient(own, each) for own, each in zip(group, drawn, strict=True)}
        return [patients[number] for number in numbers]

    def _inputs(self, beginning: _Beginning) -> Mapping[str, Any]:
        """[CLS], the static tokens, and the [VS] of the first visit, with the age at its time."""
        import torch

        at = EPOCH + timedelta(microseconds=beginning.start)
        events: list[dict[str, Any]] = [{"time": None, "code": code} for code in beginning.statics]
        if beginning.birth is not None:
            events.append({"time": EPOCH + timedelta(microseconds=beginning.birth), "code": "MEDS_BIRTH"})
        vocabulary = self.tokenizer.vocabulary
        facts = (code for code in self.shape.codes if vocabulary.kind(code)[0] in _FACTS)
        first = next(code for code in facts if vocabulary.token_type(code))
        row = self.tokenizer.encode_patient({"subject_id": 0, "events": [*events, {"time": at, "code": first}]})
        length = int(np.flatnonzero(row["input_ids"] == vocabulary.token_ids[VS])[0]) + 1
        return {name: torch.from_numpy(channel[None, :length].copy()) for name, channel in row.items()}

    def _patient(self, beginning: _Beginning, trajectories: Any) -> DrawnPatient:
        tokens, days = trajectories.tokens[0], trajectories.days[0]
        end = TrajectoryEnd(int(trajectories.ends[0]))
        later = np.flatnonzero(days > beginning.days)
        if len(later):
            tokens, days, end = tokens[: later[0]], days[: later[0]], TrajectoryEnd.HORIZON
        writer = RecordWriter(
            beginning.number + 1, beginning.start, self._meanings, self.shape.values, beginning.random
        )
        writer.static(beginning.statics, beginning.birth)
        writer.open_visit()
        writer.write(tokens, days)
        notes = writer.notes
        if end is TrajectoryEnd.LENGTH:
            notes[f"records cut at {MOST_TOKENS:,} tokens"] += 1
        return DrawnPatient(beginning.number, writer.finish(), notes, len(tokens), end)


@dataclass(frozen=True)
class _Beginning:
    """Who a patient is, when the record begins and how long it is observed.

    Attributes:
        number: Of the patient.
        statics: Static codes.
        birth, start: Microseconds.
        days: Observed.
        random: What is left to draw of this patient.
    """

    number: int
    statics: tuple[str, ...]
    birth: int | None
    start: int
    days: float
    random: np.random.Generator

    @classmethod
    def of(cls, shape: CohortShape, seed: int, number: int, attempt: int, max_years: float | None) -> _Beginning:
        """Drawn from a cohort's shape."""
        random = np.random.Generator(np.random.Philox(key=np.asarray([seed, number << 8 | attempt], np.uint64)))
        weights = np.asarray([profile.patients for profile in shape.profiles], np.float64)
        profile = shape.profiles[int(random.choice(len(weights), p=weights / weights.sum()))]
        share = np.linspace(0.0, 1.0, len(shape.starts))
        day = int(np.interp(random.random(), share, shape.starts)) // DAY_US * DAY_US
        hours = np.asarray(shape.hours, np.float64)
        hour = int(random.choice(24, p=hours / hours.sum()))
        start = day + hour * HOUR_US + int(random.integers(60)) * MINUTE_US
        days = float(np.interp(random.random(), np.linspace(0.0, 1.0, len(shape.observed)), shape.observed))
        days = min(days, (shape.end_of_data - start) / DAY_US)
        if max_years is not None:
            days = min(days, max_years * _DAYS_OF_A_YEAR)
        birth = None
        if profile.ages:
            counts = np.asarray([count for _, count in profile.ages], np.float64)
            band = profile.ages[int(random.choice(len(counts), p=counts / counts.sum()))][0]
            age = band + AGE_BAND * random.random()
            birth = min(int(start - age * YEAR_US), start) // DAY_US * DAY_US
        return cls(number, profile.codes, birth, start, max(days, 1.0 / 24), random)


def synthesize(
    model: str | Path,
    like: str | Path,
    num_patients: int,
    output: str | Path,
    *,
    seed: int = 0,
    max_years: float | None = None,
    until_end: bool = False,
    max_copied: int | None = None,
    allow_copies: bool = False,
    tasks: tuple[str, ...] = (),
    fhir: bool = False,
    engine: Engine | None = None,
) -> SynthesisReport:
    """Write synthetic patients and what is to be said about them.

    Args:
        model: Checkpoint (folder, or owner/name) of an `EhrMambaForCausalLM` with its tokenizer.
        like: Prepared dataset with splits: who the patients are like, and against whom they are compared. Everybody
            outside of `held_out` counts as a patient that the model was trained on.
        num_patients: How many.
        output: Folder to make: a dataset, and in it `synthesis/` with the report; with `fhir` also `fhir/`.
        seed: Equal seeds give equal bytes, whoever works.
        max_years: Longest observation.
        until_end: Observe everybody until the dataset's last event, see `shape_of`.
        max_copied: Longest run of events that a patient may share with a training patient, see `allowed_run`.
        allow_copies: Write patients whatever run they share.
        tasks: Tasks (packaged names) for training on synthetic and testing on real patients.
        fhir: Write FHIR R4 too.
        engine: Where to work; default all cores of this machine.

    Returns:
        The report, as it stands in `synthesis/report.json`.

    Raises:
        ValueError: A number out of range, no forecasting model, a dataset without splits or of other codes, an output
            that holds something.
    """
    _check_numbers(num_patients, seed, max_years)
    output = Path(output)
    check_apart(output, like)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; give a new folder, so that nothing is overwritten.")
    if tasks:
        resolve_tasks(tasks)
    if allow_copies and max_copied is not None:
        raise ValueError("max_copied and allow_copies exclude each other; give one of them.")
    digest = checkpoint_digest(model)
    network, tokenizer = _model_and_tokenizer(str(model), digest)
    dataset = EventDataset(like)
    training, held_out = _split(dataset)
    settings = read_settings(dataset.path)
    _check_codes(tokenizer, training, dataset.path)
    shape = shape_of(training, code_map=settings.rules, until_end=until_end)
    trained = EventRuns.of(tokenizer.encode_histories(training))
    index = RunIndex(trained)
    natural = index.longest(EventRuns.of(tokenizer.encode_histories(held_out)))
    allowed = allowed_run(natural, max_copied)
    make_folder(output.absolute().parent)
    settled = [digest, shape.to_json(), hashlib.sha256(trained.tokens.tobytes()).hexdigest()]
    key = settings_key([*settled, num_patients, seed, max_years, allowed, allow_copies, tasks, fhir])
    folder = output.absolute().parent / f".{output.absolute().name}.synthesizing-{key}"
    drawn = folder / "drawn"
    write_text(folder / "shape.json", shape.to_json())
    trained.write(folder / "runs.npz")
    parts = [
        SynthesisPart(
            str(drawn / "data"),
            number,
            first,
            min(PATIENTS_OF_A_PART, num_patients - first),
            str(model),
            str(folder / "shape.json"),
            str(folder / "runs.npz"),
            None if allow_copies else allowed,
            seed,
            max_years,
        )
        for number, first in enumerate(range(0, num_patients, PATIENTS_OF_A_PART))
    ]
    workers = engine or get_engine()
    counts = list(run_parts(parts, desc="Drawing patients", folder=folder, engine=workers))
    totals = _add(counts)
    if not totals["patients"]:
        remove(folder)
        raise ValueError(
            f"nobody is left to write: all {totals['refused']} draws share more than {allowed} events in a row with a "
            "training patient. The model repeats its training records; train it on more patients, or for fewer epochs."
        )
    prepared = folder / "dataset"
    if not (prepared / "metadata" / "dataset.json").is_file():
        remove(prepared)
        _prepare(drawn, prepared, settings, seed, workers)
    made = EventDataset(prepared).events()
    if fhir:
        from ehrseq.forecasting.synthesis_fhir import write_events_as_fhir

        remove(prepared / "fhir")
        totals["notes"] |= write_events_as_fhir(made, prepared / "fhir")
    last = EPOCH + timedelta(microseconds=shape.end_of_data)
    compared = compare_cohorts(made, training, held_out, tasks=tasks, code_map=settings.rules, end_of_data=last)
    report = SynthesisReport(
        model=Path(model).name,
        notice=str(getattr(network.config, "notice", None) or ""),
        like=dataset.path.resolve().name,
        seed=seed,
        asked=num_patients,
        patients=totals["patients"],
        refused=totals["refused"],
        missing=totals["missing"],
        events=totals["events"],
        tokens=totals["tokens"],
        ends=totals["ends"],
        notes={**totals["notes"], **shape.notes},
        allowed_run=None if allow_copies else allowed,
        copied=run_lengths(np.asarray(totals["longest"], np.int64)),
        natural=run_lengths(natural),
        refused_runs=run_lengths(np.asarray(totals["longest_refused"], np.int64)),
        fitted_on_training=_fitted_on(tokenizer, dataset),
        **compared,
    )
    remove(prepared / "synthesis")
    write_synthesis_report(report, prepared / "synthesis")
    if output.is_dir():
        output.rmdir()
    os.replace(prepared, output)
    remove(folder)
    return report


# -- what is read ------------------------------------------------------------------------------------------------------


def _model_and_tokenizer(checkpoint: str, digest: str) -> tuple[EhrMambaForCausalLM, EhrTokenizer]:
    forecaster = kept_forecaster(checkpoint, digest)
    return cast("EhrMambaForCausalLM", forecaster.model), cast("EhrTokenizer", forecaster.tokenizer)


def _split(dataset: EventDataset) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events of those that the model may have seen, and of those that it has not."""
    names = dataset.splits["split"].unique().sort().to_list()
    if _HELD_OUT not in names or len(names) < 2:
        raise ValueError(
            f"{dataset.path} has the splits {names}; expected {_HELD_OUT!r} beside others: what a copy is, only "
            "patients say that the model has not seen. `ehrseq prepare` makes splits."
        )
    return dataset.events([name for name in names if name != _HELD_OUT]), dataset.events(_HELD_OUT)


def _check_codes(tokenizer: EhrTokenizer, events: pl.DataFrame, path: Path) -> None:
    coverage = tokenizer.coverage(events)
    if not coverage["events"] or 1.0 - coverage["lost"] < _LEAST_COVERED:
        raise ValueError(
            f"the model knows {1 - coverage['lost']:.0%} of the events of {path}; expected at least "
            f"{_LEAST_COVERED:.0%}: its tokenizer was fitted on other codes. Give the dataset that it was trained on."
        )


def _fitted_on(tokenizer: EhrTokenizer, dataset: EventDataset) -> bool:
    """Whether the tokenizer was fitted on the dataset's own training patients."""
    splits = dataset.splits
    fitted = splits.filter(pl.col("split").is_in(["pretrain", "train"]))["subject_id"].to_list()
    digests = {subjects_digest(fitted)}
    for name in ("pretrain", "train"):
        digests.add(subjects_digest(splits.filter(pl.col("split") == name)["subject_id"].to_list()))
    return tokenizer.fitted_subjects_digest in digests


def _check_numbers(num_patients: int, seed: int, max_years: float | None) -> None:
    for name, value, least in (("num_patients", num_patients, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} got {value!r}; expected a whole number of at least {least}.")
    if max_years is not None and not 0 < max_years < np.inf:
        raise ValueError(f"max_years got {max_years!r}; expected a number of years above 0.")


# -- what is written ---------------------------------------------------------------------------------------------------


def _prepare(drawn: Path, prepared: Path, settings: DatasetSettings, seed: int, engine: Engine) -> None:
    """The drawn parts as a dataset, by the way of every MEDS dataset."""
    files = sorted((drawn / "data").glob("*.parquet"))
    subjects = pl.concat([pl.read_parquet(file, columns=["subject_id"]) for file in files])["subject_id"].unique()
    codes = pl.concat([pl.read_parquet(file, columns=["code"]) for file in files])["code"].unique().sort()
    remove(drawn / "metadata")
    write_metadata(
        drawn / "metadata",
        dataset_name="synthetic",
        codes=codes.to_list(),
        splits=assign_splits(subjects, seed=seed),
        report=None,
    )
    prepare_dataset(
        drawn,
        prepared,
        engine=engine,
        seed=seed,
        dataset_name=f"ehrseq-synthetic-seed-{seed}",
        code_map=settings.code_map or None,
        timezone=settings.timezone,
    )


def _table(patients: list[DrawnPatient]) -> pl.DataFrame:
    """The rows of patients as an event table, sorted."""
    rows = [event for patient in patients for event in patient.events]
    columns: dict[str, Any] = dict(zip(DrawnEvent._fields, zip(*rows, strict=True), strict=True)) if rows else {}
    frame = pl.DataFrame(
        {
            name: pl.Series(name, columns.get(name, ()), pl.Int64() if name == "time" else dtype)
            for name, dtype in EVENT_SCHEMA.items()
        }
    )
    return validate_events(frame.with_columns(pl.col("time").cast(pl.Datetime("us"))), source="synthetic events")


def _add(counts: list[DrawnCounts]) -> dict[str, Any]:
    total: dict[str, Any] = {name: sum(each[name] for each in counts) for name in _SUMS}  # type: ignore[literal-required]
    for name in ("ends", "notes"):
        total[name] = dict(sorted(sum((Counter(each[name]) for each in counts), Counter[str]()).items()))
    for name in ("longest", "longest_refused"):
        total[name] = [run for each in counts for run in each[name]]  # type: ignore[literal-required]
    return total


_SUMS = ("patients", "refused", "missing", "events", "tokens")


__all__ = ["PatientDrawer", "SynthesisPart", "synthesize"]

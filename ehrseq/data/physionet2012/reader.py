"""The PhysioNet/CinC Challenge 2012 (Silva et al. 2012: mortality of ICU patients) as MEDS events and labels.

    stays = load_physionet2012("physionet2012/set-a.tar.gz")      # or a folder, or a folder of archives
    print(stays.report)                                           # what was read, what was left out and why
    dataset = stays.write("set-a-meds")                           # data/, metadata/, labels/in_hospital_mortality/

| of the challenge | here |
|---|---|
| a stay (`RecordID`) | a subject; admitted to the unit at `ADMISSION_TIME`, since the data hold no dates |
| Age, Gender, Height, ICUType | static rows: `DEMOGRAPHIC//PHYSIONET2012//Age`, `GENDER//F` ... |
| the 37 series, Weight among them | `VITAL//PHYSIONET2012//HR`, `LAB//PHYSIONET2012//pH` ... with their units |
| In-hospital_death | label table `in_hospital_mortality`, predicted 48 hours after the admission |
| Length_of_stay, SAPS-I, SOFA, Survival | `metadata/outcomes.parquet`, -1 = null |

Kept are values >= 0 (as STraTS does: -1 means missing in Height, Weight and Gender, and no temperature lies below 0);
several different values of one parameter at one minute are all kept, repeated ones once. Values far from anything
physiological (a pH of 735) are kept and counted: clipping is the feature extractor's job, on training stays.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import polars as pl

from ehrseq.data.dataset import EventDataset, write_dataset
from ehrseq.data.physionet2012.codes import (
    ADMISSION_CODE,
    ADMISSION_TIME,
    AGE_CODE,
    GENDER_CODES,
    HEIGHT_CODE,
    ICU_TYPE_CODES,
    ICU_TYPES,
    SERIES,
    TASK,
    TASK_CONFIG,
    VARIABLES,
    WINDOW_HOURS,
    descriptions,
)
from ehrseq.data.physionet2012.files import ChallengeFiles, find_files, parse_stays
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import EVENT_COLUMNS, EVENT_SCHEMA, LABEL_SCHEMA, sort_events, validate_labels
from ehrseq.work.files import write_whole

logger = logging.getLogger(__name__)

_STATIC = ("Age", "Gender", "Height", "ICUType")
_OUTCOME_COLUMNS = {"SAPS-I": "saps_i", "SOFA": "sofa", "Length_of_stay": "length_of_stay_days", "Survival": "survival"}
_DEATH = "In-hospital_death"
OUTCOME_SCHEMA: dict[str, Any] = {
    "subject_id": pl.Int64,
    "set": pl.String,
    **dict.fromkeys((*_OUTCOME_COLUMNS.values(), "in_hospital_death"), pl.Int64),
}


@dataclass(frozen=True)
class Physionet2012:
    """Stays of the challenge.

    Attributes:
        events: Event table (see `ehrseq.data.schema`).
        labels: Label table of `TASK`: prediction_time is 48 hours after the admission; empty without an outcomes file.
        outcomes: One row a stay: subject_id, set (the folder or archive it came from), saps_i, sofa,
            length_of_stay_days, survival (days from admission to death where one is recorded), in_hospital_death; null
            where the challenge gives -1 or no outcomes.
        report: What was read and left out.
    """

    events: pl.DataFrame
    labels: pl.DataFrame
    outcomes: pl.DataFrame
    report: ConversionReport

    def splits_by_set(self) -> pl.DataFrame:
        """(subject_id, split) with each stay's set as its split, to train on one and report on the other."""
        return self.outcomes.select("subject_id", pl.col("set").alias("split"))

    def write(
        self,
        path: str | Path,
        *,
        dataset_name: str = "physionet2012",
        splits: pl.DataFrame | None = None,
        overwrite: bool = False,
    ) -> EventDataset:
        """Write a MEDS dataset: events, `metadata/outcomes.parquet` and, where there are labels, `labels/<TASK>/`.

        The folder appears whole or not at all.

        Args:
            path: Folder to create.
            dataset_name: Name kept in the metadata.
            splits: (subject_id, split), e.g. `splits_by_set()`; default: drawn by patient, see `assign_splits`.
            overwrite: Replace an existing dataset.

        Raises:
            ValueError: `path` exists and `overwrite` is off, or a subject has no split.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())) and not overwrite:
            raise ValueError(f"{path} exists; give another path, remove it, or pass overwrite=True.")

        def write(folder: Path) -> None:
            write_dataset(self.events, folder, dataset_name=dataset_name, splits=splits, report=self.report)
            self.write_beside(folder)

        write_whole(path, write)
        return EventDataset(path)

    def write_beside(self, dataset: Path) -> None:
        """Write what goes beside the events into the folder of a dataset: outcomes, and labels where there are any."""
        (dataset / "metadata").mkdir(parents=True, exist_ok=True)
        self.outcomes.write_parquet(dataset / "metadata" / "outcomes.parquet")
        if self.labels.height:
            folder = dataset / "labels" / TASK
            folder.mkdir(parents=True, exist_ok=True)
            self.labels.write_parquet(folder / "labels.parquet")
            (folder / "report.json").write_text(json.dumps(_task_report(self.labels), indent=2) + "\n", "utf-8")


def load_physionet2012(
    path: str | Path, outcomes: str | Path | None = None, *, on_error: str = "raise"
) -> Physionet2012:
    """Read stays of the challenge.

    Args:
        path: A folder (searched with its subfolders; archives in it are opened), an archive (`.tar.gz`, `.tgz`, `.tar`,
            `.zip`) or one stay's text file.
        outcomes: Outcomes file; default: every `Outcomes*.txt` found there, and `Outcomes-<x>.txt` or `Outcomes.txt`
            beside an archive or folder `set-<x>`. Without any there are events only, and a warning.
        on_error: "raise": a malformed line is an error with file and line; "skip": it is counted and left out.

    Returns:
        Events, labels, outcomes and the report.

    Raises:
        ValueError: Nothing to read, a damaged archive, a malformed line, a stay that stands twice, an outcomes file
            without the challenge's columns.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
    path = Path(path)
    files = find_files(path)
    if outcomes is not None:
        if not Path(outcomes).is_file():
            raise ValueError(f"no outcomes file {outcomes}; give the challenge's Outcomes-<set>.txt.")
        files.outcomes = [(str(outcomes), Path(outcomes).read_bytes())]
    report = ConversionReport(source=path.name, format="physionet2012", files=len(files.stays) + len(files.outcomes))
    report.bytes_read = sum(len(content) for *_, content in files.stays)
    if files.others:
        report.notes["other text files, not read"] += files.others
    rows = parse_stays(files, report, on_error=on_error)
    subjects = _subjects(files, rows)
    rows = rows.with_columns(pl.Series("subject_id", subjects[rows["file"].to_numpy()], dtype=pl.Int64))
    events = _events(rows, subjects, report)
    table = _outcomes(files, subjects, report)
    labels = _labels(table)
    report.events_written, report.subjects = events.height, len(subjects)
    report.code_descriptions = descriptions()
    return Physionet2012(events, labels, table, report)


def _subjects(files: ChallengeFiles, rows: pl.DataFrame) -> np.ndarray:
    """RecordID of each file: that of its own row, which must agree with a file name that is a number."""
    named = [PurePosixPath(name.replace("\\", "/")).stem for _, name, _ in files.stays]
    recorded: dict[int, float] = {}
    for file, line, value in rows.filter(pl.col("parameter") == "RecordID").select("file", "line", "value").iter_rows():
        if value != int(value) or value < 0 or recorded.setdefault(file, value) != value:
            raise ValueError(
                f"{files.stays[file][1]}, line {line}: got RecordID {value:g}; expected one whole number a file."
            )
    ids: list[int] = []
    seen: dict[int, str] = {}
    for file, name in enumerate(named):
        in_row = int(recorded[file]) if file in recorded else None
        by_name = int(name) if re.fullmatch(r"[0-9]{1,18}", name) else None
        shown = files.stays[file][1]
        if in_row is None and by_name is None:
            raise ValueError(f"{shown} has no RecordID row and is not named by a number; give it one of them.")
        if in_row is not None and by_name is not None and in_row != by_name:
            raise ValueError(f"{shown}: its RecordID row says {in_row}; expected {by_name}, as the file is named.")
        subject = in_row if in_row is not None else int(by_name or 0)
        if subject in seen:
            raise ValueError(f"RecordID {subject} stands in {seen[subject]} and in {shown}; give every stay once.")
        seen[subject] = shown
        ids.append(subject)
    return np.asarray(ids, np.int64)


def _events(rows: pl.DataFrame, subjects: np.ndarray, report: ConversionReport) -> pl.DataFrame:
    """Rows of the event table, sorted; every subject has its admission row."""
    parameter = pl.col("parameter")
    backwards = rows.filter(pl.col("minute") < pl.col("minute").shift().over("file")).height
    if backwards:
        report.notes["rows earlier than the one before them, sorted"] += backwards
    late = rows.filter(pl.col("minute") > WINDOW_HOURS * 60).height
    if late:
        report.notes[f"rows later than {WINDOW_HOURS} hours after admission, kept"] += late

    # 1. What is no measurement.
    report.notes["RecordID rows"] += rows.filter(parameter == "RecordID").height
    rows = rows.filter(parameter != "RecordID")
    report.skipped["rows with an empty Parameter"] += rows.filter(parameter == "").height
    rows = rows.filter(parameter != "")
    unknown = rows.filter(~parameter.is_in([*VARIABLES, *_STATIC]))
    for name, count in unknown.group_by("parameter").len().sort("parameter").iter_rows():
        report.skipped[f"unknown parameter {name[:40]}"] += count
    rows = rows.filter(parameter.is_in([*VARIABLES, *_STATIC]))

    # 2. Missing (-1) and negative values.
    negative = rows.filter(pl.col("value") < 0)
    for name, missing, count in (
        negative.group_by("parameter", (pl.col("value") == -1).alias("missing")).len().sort("parameter").iter_rows()
    ):
        may_be_missing = missing and name in ("Height", "Weight", "Gender", "Age", "ICUType")
        report.skipped[f"{name} missing (-1)" if may_be_missing else f"negative {name}"] += count
    rows = rows.filter(pl.col("value") >= 0)

    # 3. The same again, and others at the same minute.
    distinct = rows.unique(["subject_id", "minute", "parameter", "value"], keep="first", maintain_order=True)
    report.duplicates_dropped += rows.height - distinct.height
    static, series = (distinct.filter(is_static) for is_static in (parameter.is_in(_STATIC), ~parameter.is_in(_STATIC)))
    at_once = series.height - series.select(pl.struct("subject_id", "minute", "parameter").n_unique()).item()
    if at_once:
        report.notes["further values of a parameter at one minute, kept"] += at_once

    parts = [_admissions(subjects), _static_events(static, report), _series_events(series, report)]
    without = len(subjects) - series["subject_id"].n_unique()
    if without:
        report.notes["stays without time series"] += without
    return sort_events(pl.concat(parts))


def _admissions(subjects: np.ndarray) -> pl.DataFrame:
    frame = pl.DataFrame({"subject_id": np.sort(subjects)})
    return _as_events(frame, time=pl.lit(ADMISSION_TIME), code=pl.lit(ADMISSION_CODE))


def _static_events(rows: pl.DataFrame, report: ConversionReport) -> pl.DataFrame:
    """Age, Gender, Height and ICUType without time; the first value of a stay counts."""
    first = rows.unique(["subject_id", "parameter"], keep="first", maintain_order=True)
    if first.height < rows.height:
        report.skipped["further values of a static parameter"] += rows.height - first.height
    name, value = pl.col("parameter"), pl.col("value")
    is_code = name.is_in(["Gender", "ICUType"])
    code = (
        pl.when(name == "Age")
        .then(pl.lit(AGE_CODE))
        .when(name == "Height")
        .then(pl.lit(HEIGHT_CODE))
        .when(name == "Gender")
        .then(value.replace_strict([0.0, 1.0], list(GENDER_CODES), default=None, return_dtype=pl.String))
        .otherwise(
            value.replace_strict(
                [float(number) for number in ICU_TYPES], list(ICU_TYPE_CODES), default=None, return_dtype=pl.String
            )
        )
    )
    coded = first.with_columns(code.alias("code"))
    for parameter, count in coded.filter(pl.col("code").is_null()).group_by("parameter").len().iter_rows():
        report.skipped[f"{parameter} of unknown meaning"] += count
    coded = coded.filter(pl.col("code").is_not_null()).sort("subject_id", "code")
    return _as_events(
        coded,
        time=pl.lit(None),
        code=pl.col("code"),
        value=pl.when(~is_code).then(value),
        unit=name.replace_strict(["Age", "Height"], ["a", "cm"], default=None, return_dtype=pl.String),
        in_visit=False,
    )


def _series_events(rows: pl.DataFrame, report: ConversionReport) -> pl.DataFrame:
    names = list(SERIES)
    limits = pl.DataFrame(
        {"parameter": names, "low": [float(e[2]) for e in SERIES.values()], "high": [e[3] for e in SERIES.values()]},
        schema_overrides={"high": pl.Float64},
    )
    outside = rows.join(limits, on="parameter").filter(~pl.col("value").is_between("low", "high"))
    for name, count in outside.group_by("parameter").len().sort("parameter").iter_rows():
        report.notes[f"values beyond physiology, kept: {name}"] += count
    parameter = pl.col("parameter")
    return _as_events(
        rows,
        time=pl.lit(ADMISSION_TIME).cast(pl.Datetime("us")) + pl.duration(minutes=pl.col("minute")),
        code=parameter.replace_strict(names, list(VARIABLES.values()), return_dtype=pl.String),
        value=pl.col("value"),
        unit=parameter.replace_strict(names, [e[1] for e in SERIES.values()], return_dtype=pl.String),
    )


def _as_events(
    rows: pl.DataFrame,
    *,
    time: pl.Expr,
    code: pl.Expr,
    value: pl.Expr | None = None,
    unit: pl.Expr | None = None,
    in_visit: bool = True,
) -> pl.DataFrame:
    """The columns of the event table; timed rows belong to the one visit of their subject."""
    none = pl.lit(None)
    columns = {
        "subject_id": pl.col("subject_id"),
        "time": time,
        "code": code,
        "numeric_value": none if value is None else value,
        "text_value": none,
        "visit_id": pl.col("subject_id").cast(pl.String) if in_visit else none,
        "unit": none if unit is None else unit,
    }
    return rows.select(columns[name].cast(EVENT_SCHEMA[name]).alias(name) for name in EVENT_COLUMNS)


def _outcomes(files: ChallengeFiles, subjects: np.ndarray, report: ConversionReport) -> pl.DataFrame:
    """One row a stay, in order of subject; outcomes of other stays are counted."""
    stays = pl.DataFrame({"subject_id": subjects, "set": [name for name, *_ in files.stays]}).sort("subject_id")
    if not files.outcomes:
        logger.warning(
            f"No outcomes file for {report.source}: the stays have events, but no labels. Put Outcomes-<set>.txt "
            "beside them, or pass outcomes=."
        )
        report.notes["stays without outcomes"] += stays.height
        missing = [pl.lit(None, dtype=dtype).alias(n) for n, dtype in OUTCOME_SCHEMA.items() if n not in stays.columns]
        return stays.with_columns(missing)
    tables = [_read_outcomes(name, content) for name, content in files.outcomes]
    table = pl.concat(tables)
    repeated = table.filter(pl.col("subject_id").is_duplicated())
    if repeated.height:
        raise ValueError(
            f"RecordID {repeated['subject_id'][0]} has several rows in {[name for name, _ in files.outcomes]}; "
            "give one."
        )
    joined = stays.join(table, on="subject_id", how="left", maintain_order="left").select(list(OUTCOME_SCHEMA))
    others = table.filter(~pl.col("subject_id").is_in(stays["subject_id"].implode())).height
    if others:
        report.notes["outcomes of stays that were not given"] += others
    without = joined["in_hospital_death"].null_count()
    if without:
        report.notes["stays without outcomes"] += without
    return joined


def _read_outcomes(name: str, content: bytes) -> pl.DataFrame:
    try:
        raw = pl.read_csv(content.replace(b"\r\n", b"\n"), infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{name} cannot be read as an outcomes file: {error}") from error
    raw = raw.rename({column: column.strip().lstrip("\ufeff") for column in raw.columns})
    wanted = ["RecordID", *_OUTCOME_COLUMNS, _DEATH]
    missing = [column for column in ("RecordID", _DEATH) if column not in raw.columns]
    if missing:
        raise ValueError(f"{name} lacks the column(s) {missing}; it has {raw.columns}, expected {wanted}.")
    columns = []
    for column in [column for column in wanted if column in raw.columns]:
        text = raw[column].str.strip_chars()
        number = text.cast(pl.Int64, strict=False)
        is_key = column == "RecordID"
        bad = number.is_null() & (text.is_not_null() & (text != "") | is_key)
        if column == _DEATH:
            bad |= number.is_not_null() & ~number.is_in([-1, 0, 1])
        if bad.any():
            row = int(bad.arg_true()[0])
            expected = "0 or 1 (-1 = unknown)" if column == _DEATH else "a whole number"
            raise ValueError(f"{name}, line {row + 2}: {column} got {raw[column][row]!r}; expected {expected}.")
        new = {**_OUTCOME_COLUMNS, "RecordID": "subject_id", _DEATH: "in_hospital_death"}[column]
        # A death before the admission (Survival -23, in set b) is the source's own; -1 alone means none recorded.
        columns.append(number.alias(new) if is_key else number.set(number == -1, None).alias(new))
    frame = pl.DataFrame(columns)
    absent = [n for n in OUTCOME_SCHEMA if n not in frame.columns and n != "set"]
    frame = frame.with_columns(pl.lit(None, dtype=pl.Int64).alias(column) for column in absent)
    return frame.select([column for column in OUTCOME_SCHEMA if column != "set"])


def _labels(outcomes: pl.DataFrame) -> pl.DataFrame:
    known = outcomes.filter(pl.col("in_hospital_death").is_not_null())
    prediction_time = pl.lit(ADMISSION_TIME + timedelta(hours=WINDOW_HOURS))
    return validate_labels(
        known.select(
            "subject_id",
            prediction_time.cast(LABEL_SCHEMA["prediction_time"]).alias("prediction_time"),
            (pl.col("in_hospital_death") == 1).alias("boolean_value"),
        )
    )


def _task_report(labels: pl.DataFrame) -> dict[str, Any]:
    return {
        "task": TASK_CONFIG | {"source": "PhysioNet/CinC Challenge 2012, In-hospital_death"},
        "labels": labels.height,
        "positives": int(labels["boolean_value"].sum()),
    }

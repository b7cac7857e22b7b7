"""Reading MEDS datasets (0.3 and 0.4) of any origin: a folder, a Parquet file or a CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import polars as pl

from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import EVENT_COLUMNS, REQUIRED_COLUMNS, sort_events, validate_events
from ehrseq.data.splits import SPLIT_SCHEMA

_OLD_NAMES = {"patient_id": "subject_id", "timestamp": "time"}  # MEDS before 0.3
_VISIT_COLUMNS = ("visit_id", "hadm_id", "encounter_id", "visit_occurrence_id")
_UNIT_COLUMNS = ("unit", "units", "valueuom")


def read_meds(path: str | Path) -> pl.DataFrame:
    """Read a MEDS dataset as an event table.

    Categorical codes become strings, times of any unit microseconds. Extra columns are left out but for these: the
    first present of `visit_id`, `hadm_id`, `encounter_id`, `visit_occurrence_id` becomes `visit_id`, the first of
    `unit`, `units`, `valueuom` becomes `unit`. Rows equal to an earlier one in every column of the event table are
    dropped (`read_meds_with_report` counts them). A foreign dataset's deaths at midnight are dates: they move to the
    end of their day.

    Args:
        path: Folder with `data/**/*.parquet` (or Parquet files anywhere below), or one `.parquet` or `.csv` file.

    Returns:
        Events sorted by subject_id, time (static first), rank.

    Raises:
        ValueError: Nothing to read, a column absent or of a wrong type.
    """
    return read_meds_with_report(path)[0]


def read_meds_with_report(path: str | Path) -> tuple[pl.DataFrame, ConversionReport]:
    """`read_meds`, with the counts of what was read and dropped, and the dataset's own splits and code descriptions."""
    path = Path(path)
    files = meds_files(path)
    frames = [read_meds_file(file) for file in files]
    rows = pl.concat(frames, how="vertical")
    events = validate_events(rows, source=str(path))
    kept = events.unique(maintain_order=True)
    report = ConversionReport(source=path.name, format="meds", files=len(files))
    report.duplicates_dropped = events.height - kept.height
    if not written_by_us(path):
        kept, report.notes["deaths known to the day"] = deaths_at_the_end_of_their_day(kept)
    report.events_written = kept.height
    report.subjects = kept["subject_id"].n_unique()
    report.notes["static rows"] = kept["time"].null_count()
    report.source_splits = read_splits(path)
    report.code_descriptions = read_descriptions(path)
    return kept, report


def meds_files(path: Path) -> list[Path]:
    """The data files of a MEDS dataset, sorted by name.

    Raises:
        ValueError: There is none.
    """
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; give a MEDS folder (with data/**/*.parquet) or a .parquet or .csv file."
        )
    if path.is_file():
        if path.suffix not in (".parquet", ".csv"):
            raise ValueError(f"{path} is not a MEDS file; expected .parquet or .csv.")
        return [path]
    root = path / "data" if (path / "data").is_dir() else path
    files = sorted(file for file in root.rglob("*.parquet") if "metadata" not in file.relative_to(root).parts)
    if not files:
        raise ValueError(f"{path} holds no MEDS data; expected Parquet files below {root}.")
    return files


def read_splits(path: Path) -> pl.DataFrame | None:
    """`metadata/subject_splits.parquet` of a dataset (subject_id, split), None where there is none."""
    file = path / "metadata" / "subject_splits.parquet"
    if not file.is_file():
        return None
    splits = read_parquet(file)
    if not set(SPLIT_SCHEMA) <= set(splits.columns):
        raise ValueError(f"{file} has columns {splits.columns}; expected subject_id and split.")
    try:
        return splits.select(pl.col("subject_id").cast(pl.Int64), pl.col("split").cast(pl.String)).sort("subject_id")
    except pl.exceptions.PolarsError as error:
        types = {name: str(splits.schema[name]) for name in SPLIT_SCHEMA}
        raise ValueError(f"{file} has the types {types}; expected whole numbers and names of splits.") from error


def read_parquet(file: Path) -> pl.DataFrame:
    """A table of a dataset's metadata.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        return pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet ({error}); mend it, or take it away.") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a dataset's metadata.

    Raises:
        ValueError: The file is damaged, or holds something else.
    """
    try:
        content = orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); mend it, or take it away.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; expected a JSON object.")
    return content


def read_meds_file(file: Path) -> pl.DataFrame:
    """One file of a MEDS dataset as a sorted event table, repeated rows included.

    Raises:
        ValueError: It cannot be read, or a column is absent or of a wrong type.
    """
    return validate_events(collect_meds(scan_meds_file(file), file), source=str(file))


def scan_meds_file(file: Path) -> pl.LazyFrame:
    """The columns of a MEDS file that an event table has, under their names there, lazily and as they are.

    Raises:
        ValueError: It cannot be read, or a column is absent.
    """
    try:
        if file.suffix == ".csv":
            lazy = pl.scan_csv(
                file,
                infer_schema_length=10_000,
                schema_overrides={"code": pl.String, "time": pl.String, "text_value": pl.String},
            )
        else:
            lazy = pl.scan_parquet(file, hive_partitioning=False)
        names = lazy.collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{file} cannot be read as a MEDS table: {error}") from error
    lazy = lazy.rename({old: new for old, new in _OLD_NAMES.items() if old in names and new not in names})
    names = lazy.collect_schema().names()
    missing = [name for name in REQUIRED_COLUMNS if name not in names]
    if missing:
        raise ValueError(
            f"{file}: column(s) {missing} are absent (got {names}); a MEDS table needs subject_id, time and code."
        )
    for target, candidates in (("visit_id", _VISIT_COLUMNS), ("unit", _UNIT_COLUMNS)):
        present = [name for name in candidates if name in names]
        if present and present[0] != target:
            lazy = lazy.with_columns(pl.col(present[0]).alias(target))
            names = [*names, target]
    return lazy.select([name for name in EVENT_COLUMNS if name in names])


def collect_meds(lazy: pl.LazyFrame, file: Path) -> pl.DataFrame:
    """Rows of a MEDS file, or of a part of it, before they are checked.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        frame = lazy.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{file} cannot be read as a MEDS table: {error}") from error
    # A whole-number id stored as float (pandas, where some are null) reads 123.0: as a string it must be "123".
    if "visit_id" in frame.columns and frame["visit_id"].dtype.is_float():
        frame = frame.with_columns(pl.col("visit_id").cast(pl.Int64))
    return frame


def read_metadata(path: str | Path) -> dict[str, Any]:
    """`metadata/dataset.json` of a dataset; empty where there is none."""
    file = Path(path) / "metadata" / "dataset.json"
    return read_json(file) if file.is_file() else {}


def written_by_us(path: Path) -> bool:
    """Whether this package wrote a dataset."""
    return read_metadata(path).get("etl_name") == "ehrseq"


def deaths_at_the_end_of_their_day(events: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """A death at 00:00:00 is a date (MIMIC-IV's `dod`), and a death known to the day is the end of that day.

    At its first instant it would stand before everything of the patient's last day, and be known before it happened.

    Returns:
        The events, sorted again, and the number of deaths that were moved.
    """
    is_date = (pl.col("code") == "MEDS_DEATH") & (pl.col("time") == pl.col("time").dt.truncate("1d"))
    moved = events.select(is_date.sum()).item()
    if not moved:
        return events, 0
    end_of_day = pl.col("time") + pl.duration(days=1) - pl.duration(microseconds=1)
    return sort_events(events.with_columns(pl.when(is_date).then(end_of_day).otherwise("time").alias("time"))), moved


def read_descriptions(path: Path) -> dict[str, str]:
    """Code -> description of a dataset's `metadata/codes.parquet`; empty where there is none."""
    file = path / "metadata" / "codes.parquet"
    if not file.is_file():
        return {}
    codes = read_parquet(file)
    if not {"code", "description"} <= set(codes.columns):
        return {}
    named = codes.select(pl.col("code").cast(pl.String), pl.col("description").cast(pl.String)).drop_nulls()
    return dict(zip(named["code"].to_list(), named["description"].to_list(), strict=True))

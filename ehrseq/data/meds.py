"""Reading MEDS datasets (0.3 and 0.4) of any origin: a folder, a Parquet file or a CSV file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from ehrseq.data.meds_mending import mend_rows
from ehrseq.data.metadata import CodeMap, read_settings, written_by_us
from ehrseq.data.parquet import check_parquet, has_unknown_zone
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import (
    EVENT_COLUMNS,
    EVENT_SCHEMA,
    REQUIRED_COLUMNS,
    cast_time,
    sort_events,
    texts_without_zone,
    validate_events,
)
from ehrseq.data.splits import SPLIT_SCHEMA
from ehrseq.data.unread_codes import unread_deaths
from ehrseq.tokenization.ehr_codes import TIMEZONE

_OLD_NAMES = {"patient_id": "subject_id", "timestamp": "time"}  # MEDS before 0.3
_VISIT_COLUMNS = ("visit_id", "hadm_id", "encounter_id", "visit_occurrence_id")
_UNIT_COLUMNS = ("unit", "units", "valueuom")
_END = "end"
_END_COLUMNS = ("end", "end_time", "end_datetime", "visit_end_datetime")  # meds_etl: when what begins at `time` ended
_TEXTS = ("code", "time", *_END_COLUMNS, "timestamp", "text_value", *_VISIT_COLUMNS, *_UNIT_COLUMNS)
"""Columns of a CSV file that are read as text: a number would lose the zeros in front."""
_DUPLICATES = "repeated rows"
_BY_PRODUCTS = (".", "_")  # how the names of files begin that tools leave beside data (`._0.parquet`, `_SUCCESS`)


def read_meds(path: str | Path) -> pl.DataFrame:
    """Read a MEDS dataset as an event table.

    Categorical codes become strings, times of any unit microseconds. Extra columns are left out but for these: the
    first present of `visit_id`, `hadm_id`, `encounter_id`, `visit_occurrence_id` becomes `visit_id`, the first of
    `unit`, `units`, `valueuom` becomes `unit`. Rows equal to an earlier one in every column of the event table are
    dropped (`read_meds_with_report` counts them). What other converters write otherwise is mended, see
    `ehrseq.data.meds_mending`. The hospital's zone of `metadata/dataset.json` comes along, in a row of every patient
    (`with_zone`).

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
    report = ConversionReport(source=path.name, format="meds", files=len(files))
    settings = read_settings(path)
    report.settings = settings.to_dict()
    events, notes = read_meds_files(
        files, ours=written_by_us(path), code_map=settings.rules, timezone=settings.timezone
    )
    report.duplicates_dropped = notes.pop(_DUPLICATES, 0)
    report.notes.update(notes)
    report.events_written = events.height
    report.subjects = events["subject_id"].n_unique()
    report.notes.update(unread_deaths(events.lazy(), events["code"].unique(), settings.rules))
    report.notes["static rows"] = events["time"].null_count()
    report.files_not_read.update(unread_files(path, files))
    report.source_splits = read_splits(path)
    report.code_descriptions = read_descriptions(path)
    return events, report


def read_meds_files(
    files: Sequence[Path], *, ours: bool, code_map: CodeMap | None = None, timezone: str | None = None
) -> tuple[pl.DataFrame, Counter[str]]:
    """Some files of a MEDS dataset as one event table, sorted, each row once.

    Args:
        files: The files, which hold whole patients.
        ours: Whether this package wrote them: then there is nothing to mend.
        code_map: As of `read_meds_rows`.
        timezone: The hospital's zone, as of `with_zone`.

    Returns:
        The table, and what was mended, counted; repeated rows under `repeated rows`.
    """
    notes: Counter[str] = Counter()
    frames = [pl.DataFrame(schema=EVENT_SCHEMA)]
    for file in files:
        rows, mended = read_meds_rows(scan_meds_file(file), file, ours=ours, code_map=code_map)
        frames.append(rows)
        notes.update(mended)
    rows = sort_events(with_zone(pl.concat(frames), timezone, notes))
    events = rows.unique(maintain_order=True)
    notes[_DUPLICATES] = rows.height - events.height
    return events, notes


def with_zone(
    events: pl.DataFrame, timezone: str | None, notes: Counter[str], *, replace: bool = False
) -> pl.DataFrame:
    """The rows, and a static row `TIMEZONE//<zone>` of every patient who has none: whoever is given the table alone
    then counts the days of the hospital, too.

    Args:
        events: Rows of whole patients.
        timezone: What a dataset's metadata say; None: nothing, and nothing is added.
        notes: Counts the rows that are added.
        replace: Whether the zone counts for everybody, whatever the rows say.

    Returns:
        The rows, the added ones at the end.
    """
    if timezone is None:
        return events
    names_zone = pl.col("code").str.starts_with(TIMEZONE)
    if replace:
        others = names_zone & (pl.col("code") != f"{TIMEZONE}{timezone}")
        replaced = int(events.select(others.sum()).item())
        notes["zones in rows of the source, replaced by the one that was given"] += replaced
        events = events.filter(~others) if replaced else events
    has_zone = events.filter(names_zone & pl.col("visit_id").is_null())
    without = events.select("subject_id").unique(maintain_order=True).join(has_zone, on="subject_id", how="anti")
    if without.is_empty():
        return events
    notes["patients whose zone the dataset's metadata name"] += without.height
    rows = without.with_columns(
        pl.lit(f"{TIMEZONE}{timezone}" if name == "code" else None, dtype).alias(name)
        for name, dtype in EVENT_SCHEMA.items()
        if name != "subject_id"
    )
    return pl.concat([events, rows.select(events.columns)])


def read_meds_rows(
    lazy: pl.LazyFrame, file: Path, *, ours: bool, code_map: CodeMap | None = None
) -> tuple[pl.DataFrame, Counter[str]]:
    """Rows of a MEDS file, or of a part of it, checked and mended, in the order of the file.

    Args:
        lazy: Of `scan_meds_file`.
        file: The file, for messages.
        ours: Whether this package wrote it: then there is nothing to mend.
        code_map: What tells which rows are visits; default `DEFAULT_CODE_MAP`.

    Returns:
        The rows, and what was mended, counted.

    Raises:
        ValueError: It cannot be read, or a column is of a wrong type.
    """
    rows = collect_meds(lazy, file)
    events = validate_events(rows, source=str(file), sort=False)
    notes: Counter[str] = Counter()
    if not ours:
        ends = cast_time(rows[_END], str(file)) if _END in rows.columns else None
        events, notes = mend_rows(events, ends, code_map)
        if without_zone := texts_without_zone(rows["time"]):
            notes["times as text that state no zone, read as UTC"] += without_zone
    if "numeric_value" in rows.columns and rows["numeric_value"].dtype.is_float():
        lost = (~rows["numeric_value"].cast(pl.Float32, strict=False).is_finite()).sum()
        notes["values that are NaN, infinite or beyond float32, read as missing"] += int(lost)
    return events, notes


def unread_files(path: Path, files: Sequence[Path]) -> Counter[str]:
    """Files of a folder that are neither data that were read nor metadata or labels of the dataset."""
    if path.is_file():
        return Counter()
    known = set(files)
    others = (
        file
        for file in path.rglob("*")
        if file.is_file() and file not in known and not {"metadata", "labels"} & set(file.relative_to(path).parts[:-1])
    )
    return Counter(str(file.relative_to(path)) for file in sorted(others))


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
    files = sorted(file for file in root.rglob("*.parquet") if _is_data(file.relative_to(root)))
    if not files:
        raise ValueError(f"{path} holds no MEDS data; expected Parquet files below {root}.")
    return files


def _is_data(file: Path) -> bool:
    """Whether a Parquet file of a dataset holds events: no metadata, no labels, no by-product of a tool."""
    beside = {"metadata", "labels"} & set(file.parts[:-1])
    return not beside and not any(part.startswith(_BY_PRODUCTS) for part in file.parts)


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
    check_parquet(file)
    try:
        return pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet ({error}); mend it, or take it away.") from error


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
                schema_overrides=dict.fromkeys(_TEXTS, pl.String),
            )
        else:
            schema = check_parquet(file, (*EVENT_COLUMNS, *_OLD_NAMES, *_VISIT_COLUMNS, *_UNIT_COLUMNS, *_END_COLUMNS))
            unknown = has_unknown_zone(schema)
            lazy = _in_utc(file).lazy() if unknown else pl.scan_parquet(file, hive_partitioning=False, glob=False)
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
    for target, candidates in (("visit_id", _VISIT_COLUMNS), ("unit", _UNIT_COLUMNS), (_END, _END_COLUMNS)):
        present = [name for name in candidates if name in names]
        if present and present[0] != target:
            lazy = lazy.with_columns(pl.col(present[0]).alias(target))
            names = [*names, target]
    return lazy.select([name for name in (*EVENT_COLUMNS, _END) if name in names])


def _in_utc(file: Path) -> pl.DataFrame:
    """A Parquet file whose times have a zone that polars refuses: the zone is but a name, and goes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    for place, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.tz is not None:
            utc = table.column(place).cast(pa.timestamp(field.type.unit, "UTC"))
            table = table.set_column(place, field.name, utc)
    return pl.DataFrame(table)


def collect_meds(lazy: pl.LazyFrame, file: Path) -> pl.DataFrame:
    """Rows of a MEDS file, or of a part of it, before they are checked.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        frame = lazy.collect()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise ValueError(f"{file} cannot be read as a MEDS table: {error}") from error
    # A whole-number id stored as float (pandas, where some are null) reads 123.0: as a string it must be "123".
    if "visit_id" in frame.columns and frame["visit_id"].dtype.is_float():
        ids = frame["visit_id"].fill_nan(None)
        whole = ids.cast(pl.Int64, strict=False)
        lost = ids.is_not_null() & (whole.is_null() | (whole.cast(pl.Float64) != ids)).fill_null(value=True)
        if lost.any():
            raise ValueError(
                f"{file}: column 'visit_id' holds {ids.filter(lost)[0]!r} in row {lost.arg_true()[0]}; expected whole "
                "numbers, or text."
            )
        frame = frame.with_columns(whole.alias("visit_id"))
    elif file.suffix == ".csv" and "visit_id" in frame.columns:
        frame = frame.with_columns(pl.col("visit_id").str.replace(r"^(\d+)\.0$", "$1"))
    return frame


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

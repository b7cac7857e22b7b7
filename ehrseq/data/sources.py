"""Which format a folder or file has, and its events, whatever the format."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from ehrseq.data.fhir.plan import fhir_files
from ehrseq.data.fhir.reader import read_fhir
from ehrseq.data.meds import read_descriptions, read_meds_with_report
from ehrseq.data.metadata import written_by_us
from ehrseq.data.physionet2012.files import is_challenge_data
from ehrseq.data.physionet2012.reader import load_physionet2012
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import validate_events
from ehrseq.data.shards import Shard, dataset_shards

logger = logging.getLogger(__name__)


def load_events(
    path: str | Path,
    *,
    on_error: str = "raise",
    progress: bool = True,
    timezone: str | None = None,
    encounter_classes: Mapping[str, str] | None = None,
) -> tuple[pl.DataFrame, ConversionReport]:
    """Read FHIR, MEDS or the PhysioNet challenge 2012, whichever `path` holds.

    Args:
        path: Folder or file. Parquet or CSV is read as MEDS; `.ndjson`, `.jsonl` and `.json` (also gzipped) as FHIR R4;
            text files of the challenge, or an archive of them, as `load_physionet2012` does.
        on_error: FHIR and the challenge only, see `read_fhir`.
        progress: Show a progress bar where reading takes long.
        timezone: FHIR only: the hospital's zone, see `read_fhir`.
        encounter_classes: FHIR only: what unknown classes of encounters mean, see `read_fhir`.

    Returns:
        Events and the report of the conversion (with `source_splits` where the source has its own splits). The zone of
        a dataset's metadata stands in static rows `TIMEZONE//<zone>`; its `code_map` is in `report.settings`, for
        `label_events(code_map=[*pairs, *DEFAULT_CODE_MAP])`.

    Raises:
        ValueError: `path` holds none of them, or an argument is none of what is named here.
    """
    if not isinstance(path, str | Path) or not str(path).strip():
        raise ValueError(f"path got {path!r}; expected the name of a folder or file of FHIR R4 or MEDS.")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; give a folder or file of FHIR R4 (NDJSON, Bundles) or MEDS (Parquet)."
        )
    kind = source_format(path)
    if kind != "fhir" and (timezone is not None or encounter_classes):
        raise ValueError(
            f"timezone and encounter_classes say how FHIR is read; {path} holds {kind}, whose times and codes are "
            "taken as they are. Say them to label_events(timezone=..., code_map=...), or to `ehrseq prepare`."
        )
    if kind == "meds":
        events, report = read_meds_with_report(path)
        # JSON lies beside MEDS data as metadata; NDJSON is somebody's records.
        beside = [] if path.is_file() else [file for file in path.rglob("*.ndjson*") if fhir_files(file)]
        if beside:
            report.notes["FHIR files beside the MEDS data, not read"] = len(beside)
            logger.warning(f"{path} holds MEDS data, which were read, and {len(beside)} NDJSON files, which were not.")
        return events, report
    if kind == "fhir":
        return read_fhir(
            path, on_error=on_error, progress=progress, timezone=timezone, encounter_classes=encounter_classes
        )
    stays = load_physionet2012(path, on_error=on_error)
    return stays.events, stays.report


def source_format(path: Path) -> str:
    """`meds`, `fhir` or `physionet2012`: what a folder or file holds.

    Raises:
        ValueError: None of them.
    """
    if path.is_file():
        is_meds = path.suffix in (".parquet", ".csv")
    else:
        is_meds = (
            next((path / "data").rglob("*.parquet"), None) is not None or next(path.glob("*.parquet"), None) is not None
        )
    if is_meds:
        return "meds"
    if fhir_files(path):
        return "fhir"
    if is_challenge_data(path):
        return "physionet2012"
    endings = sorted(
        {
            "".join(file.suffixes[-2:]) or file.name
            for file in ([path] if path.is_file() else path.rglob("*"))
            if file.is_file()
        }
    )
    raise ValueError(
        f"{path} holds neither FHIR (.ndjson, .jsonl, .json, each also .gz) nor MEDS (data/**/*.parquet); it holds "
        f"{endings[:8] or 'no files'}. "
        "Convert MIMIC-IV or OMOP tables to MEDS first (MIMIC_IV_MEDS, meds_etl)."
    )


def read_source(
    data: str | Path | pl.DataFrame, splits: Sequence[str] | None, on_error: str, *, purpose: str
) -> tuple[pl.DataFrame | None, list[Shard], ConversionReport]:
    """What a command of many patients works on: events that were read, or the files of a prepared dataset.

    Args:
        data: Folder of a prepared dataset; FHIR or MEDS (folder or file); or an event table.
        splits: Splits of a prepared dataset, None = all.
        on_error: See `load_events`.
        purpose: What nobody is there for, in the message of an empty source ("explain").

    Returns:
        `(events, shards, report)`: events sorted by subject, and no files; or None, and the files.

    Raises:
        ValueError: Splits of what is no dataset in files, a source without events, or what `load_events` refuses.
    """
    named = str(data) if isinstance(data, str | Path) else "the table"
    if not isinstance(data, pl.DataFrame) and written_by_us(Path(data)):
        shards = dataset_shards(data, splits)
        report = ConversionReport(source=str(data), format="meds", files=len(shards))
        report.code_descriptions = read_descriptions(Path(data))
        return None, shards, report
    if splits:
        raise ValueError(f"splits need a dataset in files, which `ehrseq prepare` makes; {named} is none.")
    if isinstance(data, pl.DataFrame):
        events, report = validate_events(data), ConversionReport()
    else:
        events, report = load_events(data, on_error=on_error)
    if events.is_empty():
        raise ValueError(f"the data hold no event, so there is nobody to {purpose}. What was read:\n{report}")
    return events.sort("subject_id", maintain_order=True), [], report

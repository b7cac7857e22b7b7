"""FHIR R4 in: folders of Bulk Data NDJSON, Bundles and single resources, as events.

What each resource becomes stands in `ehrseq.data.fhir.resources`, how codes are named in `codes`, how references are
followed in `references`, how dates are read in `ehrseq.data.instants`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.data.fhir.assemble import Assembler
from ehrseq.data.fhir.blocks import Block, block_of, read_task
from ehrseq.data.fhir.elements import MALFORMED, what_is_wrong
from ehrseq.data.fhir.plan import ENDINGS, count_unread, fhir_files, plan_reading, size_of, sort_files
from ehrseq.data.fhir.resources import Extractor
from ehrseq.data.fhir.subjects import JOINED
from ehrseq.data.metadata import DatasetSettings
from ehrseq.data.report import ConversionReport
from ehrseq.data.unread_codes import unread_deaths, warn_of_encounters_without_admissions
from ehrseq.work.engine import available_cores, get_engine

_PARALLEL_FROM = 64 << 20  # bytes: below, starting workers takes longer than it saves
_PART_BYTES = 64 << 20  # of a plain file: what one worker reads at a time
_OVER_SHARE = 0.25  # of a worker's share: what it rather reads in addition than has decompressed twice
_PROGRESS_FROM = 100 << 20  # about a second of reading
_MAX_WORKERS = 8


def read_fhir(
    path: str | Path,
    *,
    on_error: str = "raise",
    progress: bool = True,
    num_workers: int | None = None,
    timezone: str | None = None,
    encounter_classes: Mapping[str, str] | None = None,
) -> tuple[pl.DataFrame, ConversionReport]:
    """Read FHIR R4 as events.

    Args:
        path: A folder (searched with its subfolders) or file of NDJSON (`.ndjson`, `.jsonl`) or JSON (`.json`: a
            Bundle, one resource or a list), each perhaps gzipped (`.gz`).
        on_error: `raise`: a line that is no FHIR resource is an error that names file and line; `skip`: it is counted
            and left out.
        progress: Show a progress bar where reading takes longer than about a second.
        num_workers: Processes that read; default: as many as there are cores (up to 8), one where there is little to
            read.
        timezone: The hospital's zone (`Europe/Berlin`, `-07:00`), of dates and times that state none. Default: that of
            the encounter that they belong to, else of the patient's latest encounter, else UTC.
        encounter_classes: What the classes of encounters mean that are not known: code, `system|code` or display ->
            class of v3-ActCode (`IMP`: an admission), or `ICU`.

    Returns:
        Events (see `ehrseq.data.schema`), and the report of what was read, skipped and not resolved.

    Raises:
        ValueError: Nothing to read, a malformed line or file, no Patient, no such zone or class.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a folder or file of FHIR R4 NDJSON or Bundles.")
    settings = DatasetSettings.of(timezone, encounter_classes)
    files, unread = sort_files(path) if path.is_dir() else (fhir_files(path), [])
    if not files:
        raise ValueError(f"{path} holds no FHIR files; expected {', '.join(ENDINGS)}, each perhaps with .gz.")
    report = ConversionReport(source=path.name, format="fhir", files=len(files), settings=settings.to_dict())
    count_unread(unread, path, report)
    sizes = [size_of(file) for file in files]
    workers = _worker_count(num_workers, sum(sizes))
    share = max(1, sum(sizes) // workers)

    def stripes_of(size: int) -> int:
        # What is more than a worker's share is parsed by several; each of them decompresses all of it.
        return max(1, min(workers, math.ceil(size / share - _OVER_SHARE))) if size > _PART_BYTES // 2 else 1

    tasks = plan_reading(
        files,
        sizes,
        part_bytes=_PART_BYTES,
        stripes_of=stripes_of,
        skip_errors=on_error == "skip",
        settings=settings,
    )
    if workers > 1:
        tasks.sort(key=lambda task: -task.cost)
    blocks = get_engine(num_workers=workers).stream(read_task, tasks, desc="Reading FHIR")
    assembler = Assembler(report, settings=settings)
    for block in _with_progress(blocks, sizes, progress):
        assembler.add(block)
    events = assembler.events()
    report.notes.update(unread_deaths(events.lazy(), events["code"].unique()))
    warn_of_encounters_without_admissions(events, report.notes, str(path))
    return events, report


def events_from_bundle(
    bundle: dict[str, Any], *, timezone: str | None = None, encounter_classes: Mapping[str, str] | None = None
) -> tuple[pl.DataFrame, ConversionReport]:
    """Events of one Bundle in memory; `timezone` and `encounter_classes` as of `read_fhir`.

    Raises:
        ValueError: It is no Bundle, holds no Patient, or an entry is malformed.
    """
    if not isinstance(bundle, dict) or bundle.get("resourceType") != "Bundle":
        got = (
            bundle.get("resourceType", "an object without resourceType")
            if isinstance(bundle, dict)
            else type(bundle).__name__
        )
        raise ValueError(f"Expected a FHIR R4 Bundle (a dict with resourceType 'Bundle'), got {got!r}.")
    settings = DatasetSettings.of(timezone, encounter_classes)
    report = ConversionReport(source="Bundle", format="fhir", settings=settings.to_dict())
    extractor = Extractor(settings=settings)
    try:
        extractor.read(bundle)
    except MALFORMED as error:
        raise ValueError(f"Bundle: {what_is_wrong(error)}") from error
    assembler = Assembler(report, settings=settings)
    assembler.add(block_of(extractor))
    return assembler.events(), report


def patient_from_bundle(
    bundle: dict[str, Any], *, timezone: str | None = None, encounter_classes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The one patient of a Bundle as a patient dict, ready for the tokenizer and `pipeline("ehr-risk")`.

    Args:
        bundle: A FHIR R4 Bundle with exactly one Patient (or several that `Patient.link` makes one).
        timezone, encounter_classes: As of `read_fhir`.

    Returns:
        `{"subject_id", "events": [{"time": datetime | None, "code", "numeric_value"?, "text_value"?, "visit_id"?,
        "unit"?}]}`, sorted; the events are those of `read_fhir`. What is left out or not resolved is a warning.

    Raises:
        ValueError: No Bundle, no Patient or several, a malformed entry.
    """
    events, report = events_from_bundle(bundle, timezone=timezone, encounter_classes=encounter_classes)
    subjects = events["subject_id"].unique().to_list()
    patients = report.resources_read["Patient"] - report.notes[JOINED]
    if patients != 1:
        raise ValueError(
            f"The Bundle holds {patients} Patient resources; expected exactly one. Read several with read_fhir."
        )
    if not subjects:
        raise ValueError("The Bundle holds no event of its Patient (no birth date, gender or dated resource).")
    left_out = {**report.skipped, **report.unresolved_references}
    without = "bundle entries without a resource"
    if report.notes[without]:
        left_out[without] = report.notes[without]
    if left_out:
        import logging

        logging.getLogger(__name__).warning(f"Bundle of subject {subjects[0]}, left out or not resolved: {left_out}.")
    rows = events.drop("subject_id").to_dicts()
    return {
        "subject_id": subjects[0],
        "events": [{name: value for name, value in row.items() if value is not None or name == "time"} for row in rows],
    }


def _worker_count(num_workers: int | None, size: int) -> int:
    if num_workers is not None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}.")
        return num_workers
    if size < _PARALLEL_FROM:
        return 1
    return min(available_cores(), _MAX_WORKERS)


def _with_progress(blocks: Iterator[Block], sizes: list[int], progress: bool) -> Iterator[Block]:
    """The blocks, with a bar in bytes of uncompressed text; reading mends what was estimated of gzip files."""
    if not progress or sum(sizes) < _PROGRESS_FROM:
        yield from blocks
        return
    from ehrseq.work.progress import progress_bar

    read = [0] * len(sizes)
    with progress_bar(total=sum(sizes), unit="B", unit_scale=True, desc="FHIR") as bar:
        for block in blocks:
            yield block
            file = block.order[0]
            before, read[file] = read[file], read[file] + block.bytes_read
            bar.total += max(0, read[file] - max(sizes[file], before))
            bar.update(block.bytes_read)
        bar.total = sum(read)
        bar.refresh()

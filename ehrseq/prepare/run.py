"""`ehrseq prepare`: FHIR, MEDS or the challenge of 2012 as a sharded dataset, in bounded memory, restartable.

    report = prepare_dataset("export/", "dataset/")
    print(report)

Two stages. 1. Each part of the source (a file, some bytes of a large one, some small ones) is read and its rows are put
into partitions, by a hash of the patient, on disk. 2. Each partition, which holds whole patients and fits into memory,
is put together, sorted and written as shards. Every finished part and partition is recorded in a hidden folder beside
the dataset; a run that was stopped goes on from there. The dataset appears under its name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from ehrseq.data.dataset import make_folder, write_metadata
from ehrseq.data.fhir.plan import count_unread, fhir_files, sort_files
from ehrseq.data.meds import meds_files, read_descriptions, read_splits, unread_files
from ehrseq.data.metadata import DatasetSettings, read_settings, written_by_us
from ehrseq.data.physionet2012.reader import load_physionet2012
from ehrseq.data.report import ConversionReport
from ehrseq.data.sources import source_format
from ehrseq.data.splits import DEFAULT_FRACTIONS, assign_splits
from ehrseq.data.unread_codes import (
    count_codes,
    unread_deaths,
    warn_of_unread_deaths,
    warn_without_admissions,
    without_admissions,
)
from ehrseq.prepare import fhir_parts, fhir_patients, meds_parts
from ehrseq.prepare.shard_files import ShardPlan, ShardReport, add_shards, write_shards, written_splits
from ehrseq.version import __version__
from ehrseq.work.engine import Engine, get_engine
from ehrseq.work.files import remove, write_json, write_whole
from ehrseq.work.parts import Part, run_parts

_Report = TypeVar("_Report", bound=Mapping[str, object])

DEFAULT_SHARD_ROWS = 750_000
"""Rows of a partition: a worker then takes about half a gigabyte, and two of them with their parent stay below two."""

_LAYOUT = 4  # of the hidden folder: one that another version began is not continued


@dataclass
class PreparationReport:
    """What was read, what was left out and why, and what the dataset holds.

    Attributes:
        conversion: Counts of the conversion.
        whole: `codes` (number), `units` (unit -> events), `first` and `last` time, `visits`, `splits` (name -> patients
            and events), `shards`.
    """

    conversion: ConversionReport
    whole: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        whole = self.whole
        lines = [str(self.conversion)]
        lines += [_line(name, whole[name]) for name in ("visits", "codes", "shards")]
        lines.append(_line("units", len(whole["units"])))
        common = sorted(whole["units"].items(), key=lambda item: (-item[1], item[0]))[:5]
        lines += [_line(f"  {unit}", count) for unit, count in common]
        lines.append(f"{'from':<49} {whole['first'] or 'no time':>23}")
        lines.append(f"{'to':<49} {whole['last'] or 'no time':>23}")
        lines += [
            _line(f"split {name}: patients", counts["patients"]) + f", {counts['events']:,} events"
            for name, counts in whole["splits"].items()
        ]
        return "\n".join(lines)


def _line(label: str, value: int) -> str:
    return f"{label:<58} {value:>14,}"


def prepare_dataset(
    source: str | Path,
    output: str | Path,
    *,
    engine: Engine | None = None,
    on_error: str = "stop",
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    shard_rows: int = DEFAULT_SHARD_ROWS,
    dataset_name: str | None = None,
    timezone: str | None = None,
    encounter_classes: Mapping[str, str] | None = None,
    code_map: Sequence[Sequence[str]] | None = None,
) -> PreparationReport:
    """Turn a source of any size into a prepared dataset; equal to what `load_events` reads, row for row.

    Args:
        source: FHIR R4 (folder or file of NDJSON, Bundles, each perhaps gzipped), a MEDS dataset of any origin, or
            files or archives of the PhysioNet challenge 2012.
        output: Folder to make.
        engine: Where to work; default: all cores of this machine.
        on_error: `stop`: what cannot be read is an error with file and line; `skip`: it is left out, counted and
            listed.
        fractions: Split -> share. Default: `ehrseq.data.splits.DEFAULT_FRACTIONS`, on top of a MEDS source's own
            splits.
        seed: Seed of the splits.
        shard_rows: Rows of a partition, about: what one worker holds at once. A partition is a file in each split.
        dataset_name: Name kept in the metadata. Default: the source's name.
        timezone: Zone of the hospital, kept in the metadata and in a static row of every patient: its days tell a
            transfer from a readmission. FHIR: also that of dates and times that state none, as of `read_fhir`. MEDS: it
            replaces zones in the source's rows; default: what the source's metadata say, of patients without such rows.
        encounter_classes: FHIR only, as of `read_fhir`; kept in the metadata.
        code_map: MEDS only: [regular expression, kind] pairs of codes that are not known, tried before
            `DEFAULT_CODE_MAP`; kept in the metadata for whoever labels, counts, audits or tokenizes the dataset.
            Default: what the source's metadata say.

    Returns:
        The report, as `metadata/conversion_report.json` keeps it.

    Raises:
        ValueError: Nothing to read, `output` holds something, an argument is none of what is named here, or (with
            `on_error="stop"`) something cannot be read.
        OSError: The disk is full.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}.")
    if isinstance(shard_rows, bool) or not isinstance(shard_rows, int) or shard_rows < 1:
        raise ValueError(f"shard_rows must be a whole number from 1 on, got {shard_rows!r}.")
    source, output = Path(source), Path(output)
    settings = DatasetSettings.of(timezone, encounter_classes, code_map)
    if not source.exists():
        raise ValueError(f"{source} does not exist; give a folder or file of FHIR R4, MEDS or the challenge 2012.")
    assign_splits([], fractions=fractions, seed=seed)  # refuses what cannot be shares and seeds
    work = _Preparation(
        source.resolve(),
        output,
        engine or get_engine(),
        on_error == "skip",
        dict(DEFAULT_FRACTIONS if fractions is None else fractions),
        seed,
        shard_rows,
        dataset_name or source.resolve().name,
        settings,
        zone_said=timezone is not None,
    )
    for name, only, takes in (
        ("encounter_classes", "fhir", "say it by code_map"),
        ("code_map", "meds", "say what classes of encounters mean by encounter_classes"),
    ):
        if name in settings.to_dict() and work.format != only:
            raise ValueError(f"{name} is for {only.upper()}; {source} holds {work.format}: {takes}.")
    if work.format == "meds":
        work.settings = settings.over(read_settings(source))
    return work.run()


@dataclass
class _Preparation:
    """One run, or the rest of one that was stopped."""

    source: Path
    output: Path
    engine: Engine
    skip_errors: bool
    fractions: dict[str, float]
    seed: int
    shard_rows: int
    dataset_name: str
    settings: DatasetSettings
    zone_said: bool

    def __post_init__(self) -> None:
        self.format = source_format(self.source)
        self.folder = self.output.absolute().parent / f".{self.output.absolute().name}.preparing"
        self.spill = self.folder / "spill"

    def run(self) -> PreparationReport:
        """Prepare what is not prepared yet."""
        files = self._files()
        settings = self._settings(files)
        kept = self.folder / "settings.json"
        same = kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) == settings
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            done = self.folder / "report.json"
            if same and done.is_file():  # it was stopped after the dataset was moved
                finished = _report_from(json.loads(done.read_text(encoding="utf-8")))
                remove(self.folder)
                return finished
            raise ValueError(
                f"{self.output} exists and is not empty; give a new folder, so that nothing is overwritten."
            )
        make_folder(self.folder.parent)
        if self.folder.exists() and not same:
            remove(self.folder)
        if not same:
            write_json(kept, settings)
        report = ConversionReport(
            source=self.source.name, format=self.format, files=len(files), settings=self.settings.to_dict()
        )
        plan = self._plan()
        if self.format == "fhir":
            shards = self._fhir(files, plan, report)
        elif self.format == "meds":
            shards = self._meds(files, plan, report)
        else:
            shards = self._challenge(plan, report)
        return self._finish(shards, plan, report)

    def _files(self) -> list[Path]:
        if self.format == "fhir":
            return fhir_files(self.source)
        if self.format == "meds":
            return meds_files(self.source)
        return sorted(file for file in self.source.rglob("*") if file.is_file()) or [self.source]

    def _settings(self, files: Sequence[Path]) -> dict[str, Any]:
        """What decides the bytes of the dataset: a run that was stopped is continued only where all of it agrees."""
        beside = sorted((self.source / "metadata").glob("*")) if self.format == "meds" else []
        states = [(str(file), stat.st_size, stat.st_mtime_ns) for file in [*files, *beside] for stat in [file.stat()]]
        return {
            "layout": _LAYOUT,
            "versions": [__version__, pl.__version__],
            "format": self.format,
            "files": hashlib.sha256(json.dumps(states).encode()).hexdigest(),
            "skip_errors": self.skip_errors,
            "fractions": [[name, share] for name, share in self.fractions.items()],
            "seed": self.seed,
            "shard_rows": self.shard_rows,
            "dataset_name": self.dataset_name,
            "said": [self.settings.to_dict(), self.zone_said],
        }

    def _plan(self) -> ShardPlan:
        splits = read_splits(self.source) if self.format == "meds" else None
        file = self.folder / "source_splits.parquet"
        if splits is not None:
            write_whole(file, splits.write_parquet)
        return ShardPlan(
            str(self.folder / "dataset" / "data"),
            str(self.folder / "records"),
            tuple(self.fractions.items()),
            self.seed,
            "" if splits is None else str(file),
        )

    def _run(self, parts: Sequence[Part[_Report]], desc: str) -> Iterator[_Report]:
        return run_parts(parts, desc=desc, folder=self.folder, engine=self.engine)

    def _fhir(self, files: Sequence[Path], plan: ShardPlan, report: ConversionReport) -> Iterator[ShardReport]:
        parts, partitions = fhir_parts.fhir_parts(
            files,
            self.spill,
            shard_rows=self.shard_rows,
            skip_errors=self.skip_errors,
            settings=self.settings,
        )
        if self.source.is_dir():
            count_unread(sort_files(self.source)[1], self.source, report)
        read = zip(parts, self._run(parts, "Reading FHIR"), strict=True)
        fhir_patients.index_patients(self.spill, read, partitions, report)
        return self._run(
            [fhir_patients.FhirPartition(number, str(self.spill), plan, self.settings) for number in range(partitions)],
            "Writing shards",
        )

    def _meds(self, files: Sequence[Path], plan: ShardPlan, report: ConversionReport) -> Iterator[ShardReport]:
        parts, partitions = meds_parts.meds_parts(
            files,
            self.spill,
            shard_rows=self.shard_rows,
            skip_errors=self.skip_errors,
            ours=written_by_us(self.source),
            code_map=self.settings.rules,
        )
        report.files_not_read.update(unread_files(self.source, files))
        meds_parts.index_parts(self.spill, self._run(parts, "Reading MEDS"), report)
        report.code_descriptions = read_descriptions(self.source)
        return self._run(
            [
                meds_parts.MedsPartition(number, str(self.spill), plan, self.settings.timezone, self.zone_said)
                for number in range(partitions)
            ],
            "Writing shards",
        )

    def _challenge(self, plan: ShardPlan, report: ConversionReport) -> Iterator[ShardReport]:
        stays = load_physionet2012(self.source, on_error="skip" if self.skip_errors else "raise")
        stays.write_beside(self.folder / "dataset")
        read = stays.report
        report.files, report.bytes_read, report.errors = read.files, read.bytes_read, read.errors
        report.code_descriptions = read.code_descriptions
        for name in ("skipped", "notes"):
            getattr(report, name).update(getattr(read, name))
        report.duplicates_dropped = read.duplicates_dropped
        yield write_shards(stays.events, ConversionReport(), plan, 0)

    def _finish(self, shards: Iterable[ShardReport], plan: ShardPlan, report: ConversionReport) -> PreparationReport:
        """Metadata, and the dataset under its name."""
        whole: dict[str, Any] = {"codes": set(), "units": Counter(), "first": None, "last": None}
        whole |= {"visits": 0, "splits": {}, "shards": 0}
        for written in shards:
            add_shards(written, report, whole)
        if not report.events_written:
            raise ValueError(f"{self.source} gives no event to write; see what it holds: {report.to_dict()}.")
        for name in ("first", "last"):
            whole[name] = pl.Series([whole[name]], dtype=pl.Int64).cast(pl.Datetime("us")).cast(pl.String)[0]
        codes = sorted(whole["codes"])
        self._warn_of_unread_codes(codes, report)
        whole["codes"] = len(codes)
        known = report.code_descriptions
        report.code_descriptions = {code: known[code] for code in codes if code in known}
        order = [*self.fractions, *sorted(set(whole["splits"]) - set(self.fractions))]
        whole["splits"] = {name: whole["splits"][name] for name in order if name in whole["splits"]}
        whole["units"] = dict(sorted(whole["units"].items()))
        metadata = self.folder / "dataset" / "metadata"
        challenge = metadata / "outcomes.parquet"
        outcomes = challenge.read_bytes() if challenge.is_file() else None
        remove(metadata)
        splits = written_splits(plan)
        write_metadata(metadata, dataset_name=self.dataset_name, codes=codes, splits=splits, report=report, more=whole)
        if outcomes is not None:
            challenge.write_bytes(outcomes)
        content = {"conversion": report.to_dict(), "whole": whole}
        write_json(self.folder / "report.json", content)
        if self.output.is_dir():
            self.output.rmdir()
        os.replace(self.folder / "dataset", self.output)
        remove(self.folder)
        return PreparationReport(report, whole)

    def _warn_of_unread_codes(self, codes: list[str], report: ConversionReport) -> None:
        """Say what the codes may mean and are not read as; of the challenge's stays they are known."""
        if self.format not in ("fhir", "meds"):
            return
        rules, rows = (
            self.settings.rules,
            pl.scan_parquet(self.folder / "dataset" / "data" / "**" / "*.parquet", hive_partitioning=False),
        )
        report.notes.update(unread_deaths(rows, codes, rules))
        warn_of_unread_deaths(report.notes)
        if without_admissions(pl.DataFrame({"code": codes, "rows": [1] * len(codes)}), rules):
            warn_without_admissions(count_codes(rows), rules, notes=report.notes, source=str(self.source))


def _report_from(content: Mapping[str, Any]) -> PreparationReport:
    report = ConversionReport()
    for name, value in content["conversion"].items():
        current = getattr(report, name)
        if isinstance(current, dict):
            current.update(value)
        else:
            setattr(report, name, value)
    return PreparationReport(report, dict(content["whole"]))

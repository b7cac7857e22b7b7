"""What a conversion read, wrote and left out: nothing is dropped silently."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import polars as pl


@dataclass
class ConversionReport:
    """Counters of a conversion to events, with what a dataset's metadata keeps of its source.

    Attributes:
        source: Where the events came from.
        format: `fhir`, `meds` or `physionet2012`.
        files: Files read.
        files_not_read: File beside those -> 1, or kind of files -> number: other formats, by-products of tools.
        bytes_read: Bytes of (uncompressed) text read.
        resources_read: Type -> number of resources, FHIR only.
        resources_not_used: Type -> number of resources of types that yield no events.
        entered_in_error: Type -> number of resources marked as errors by their source.
        skipped: Reason -> number of facts left out.
        unresolved_references: What was referenced -> number of references to nothing that was given.
        time_from_encounter_end: Type -> number of rows whose time is the end of their encounter, for want of a time of
            their own.
        notes: Other things counted that change no row's presence (`dates without zone`, `values with a comparator`).
        errors: The first lines that could not be read, with file and line (`on_error="skip"`).
        duplicates_dropped: Rows equal to an earlier one in every column.
        events_written: Rows of the result.
        subjects: Subjects of the result.
        subject_ids: Source id -> subject_id where the source's ids are not subject_ids themselves.
        code_descriptions: Code -> the source's display text.
        source_splits: The source's own splits (subject_id, split), None where it has none.
    """

    source: str = ""
    format: str = "fhir"
    files: int = 0
    bytes_read: int = 0
    files_not_read: Counter[str] = field(default_factory=Counter)
    resources_read: Counter[str] = field(default_factory=Counter)
    resources_not_used: Counter[str] = field(default_factory=Counter)
    entered_in_error: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    unresolved_references: Counter[str] = field(default_factory=Counter)
    time_from_encounter_end: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    duplicates_dropped: int = 0
    events_written: int = 0
    subjects: int = 0
    subject_ids: dict[str, int] = field(default_factory=dict, repr=False)
    code_descriptions: dict[str, str] = field(default_factory=dict, repr=False)
    source_splits: pl.DataFrame | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The counters as plain JSON types (without the id mapping, descriptions and splits)."""
        return {
            "source": self.source,
            "format": self.format,
            "files": self.files,
            "bytes_read": self.bytes_read,
            **{name: dict(sorted(getattr(self, name).items())) for name in _TABLES},
            "errors": list(self.errors),
            "duplicates_dropped": self.duplicates_dropped,
            "events_written": self.events_written,
            "subjects": self.subjects,
        }

    def __str__(self) -> str:
        lines = [f"{self.format.upper()} -> events: {self.source}"]
        lines.append(_line("files", self.files))
        if self.bytes_read:  # not known of Parquet
            lines.append(_line("megabytes of text", round(self.bytes_read / 1e6, 1)))
        for name in _TABLES:
            counts = Counter({key: count for key, count in getattr(self, name).items() if count})
            if counts:
                lines.append(_line(name.replace("_", " "), sum(counts.values())))
                lines += [_line(f"  {key}", count) for key, count in counts.most_common()]
        lines += [
            _line("duplicates dropped", self.duplicates_dropped),
            _line("subjects", self.subjects),
            _line("events", self.events_written),
        ]
        lines += [f"  ! {error}" for error in self.errors]
        return "\n".join(lines)


_TABLES = (
    "files_not_read",
    "resources_read",
    "resources_not_used",
    "entered_in_error",
    "skipped",
    "unresolved_references",
    "time_from_encounter_end",
    "notes",
)


def _line(label: str, value: float) -> str:
    return f"{label:<58} {value:>14,}"

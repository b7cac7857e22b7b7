"""Work in parts that can be stopped: what every command that works file by file stands on.

A killed run, or one that met a full disk, goes on where it was; changed settings or sources begin anew. Each part is
done by itself, by whatever worker, and keeps its result in files of its own. It is done again unless these say that
they were made of the same sources (`provenance`) with the same settings (which name the folder, see `kept_parts`).

    with kept_parts("out/.parts", settings={"seed": 0}) as folder:
        parts = [CountPart(source, str(folder)) for source in sources]
        for part, report in zip(parts, run_parts(parts, desc="Counting", folder=folder)):
            ...
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ehrseq.version import __version__
from ehrseq.work.engine import Engine, get_engine
from ehrseq.work.files import remove, remove_unfinished, write_json

if TYPE_CHECKING:
    import polars as pl

Report = TypeVar("Report", bound=Mapping[str, object])


class Part(ABC, Generic[Report]):
    """One part, and what was counted while it was done (`Report`: what JSON holds, small; tables stay on disk).

    A subclass is a frozen dataclass of paths and settings, by which a worker finds everything else.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What it works on, in messages."""

    @abstractmethod
    def provenance(self) -> Mapping[str, object]:
        """What decides the result beside the settings: digests of the sources."""

    @abstractmethod
    def read(self, provenance: Mapping[str, object]) -> Report | None:
        """The report of a part that is done; None where it is not, or was made of something else."""

    @abstractmethod
    def write(self, provenance: Mapping[str, object]) -> Report:
        """Do the part, so that `read` finds it done after its last step and not before."""


class RecordedPart(Part[Report]):
    """A part with a record: a JSON file, written last, that holds its provenance and its report."""

    @property
    @abstractmethod
    def record(self) -> Path:
        """The record, `<name>.json`."""

    @abstractmethod
    def make(self) -> Report:
        """Write the part's files, each whole (`ehrseq.work.files.write_whole`); returns what was counted."""

    def provenance(self) -> Mapping[str, object]:
        """See `Part.provenance`; nothing where the settings say everything."""
        return {}

    def beside(self, suffix: str) -> Path:
        """A file beside the record: its name with another ending."""
        return self.record.with_suffix(suffix)

    def read(self, provenance: Mapping[str, object]) -> Report | None:
        """See `Part.read`."""
        try:
            content = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        report: Report | None = content["report"] if content.get("provenance") == _as_json(provenance) else None
        return report

    def write(self, provenance: Mapping[str, object]) -> Report:
        """See `Part.write`."""
        remove(self.record)  # killed half-way, files of these sources would stand beside the record of others
        content = _as_json({"provenance": provenance, "report": self.make()})
        write_json(self.record, content)
        report: Report = content["report"]
        return report


def run_parts(
    parts: Sequence[Part[Report]], *, desc: str, folder: str | Path, engine: Engine | None = None
) -> Iterator[Report]:
    """Do what is not done yet.

    Args:
        parts: The parts.
        desc: What is being done, for the progress bar and for messages.
        folder: Folder below which they write; what killed runs left there half-written is removed.
        engine: Where to work, default all cores of this machine.

    Yields:
        The reports of all parts, in their order.

    Raises:
        Exception: The first error of a part, with a note that names it; what is done stays.
    """
    remove_unfinished(Path(folder))
    yield from (engine or get_engine()).map(do_part, parts, desc=desc)


def do_part(part: Part[Report]) -> Report:
    """Do one part, if it is not done yet; returns its report."""
    provenance = part.provenance()
    report = part.read(provenance)
    return part.write(provenance) if report is None else report


@contextmanager
def kept_parts(folder: str | Path | None, settings: object) -> Iterator[Path]:
    """The folder for the parts of one piece of work: removed when the block ends, kept where an error ends it.

    Args:
        folder: Its path, to which a key of the settings is added: runs with other settings do not meet. None: a
            temporary folder, so that a run that was stopped begins anew.
        settings: What decides the results of all parts, see `settings_key`.

    Yields:
        The folder; whatever writes into it makes it.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="ehrseq-") as temporary:
            yield Path(temporary)
        return
    kept = Path(f"{folder}-{settings_key(settings)}")
    yield kept
    remove(kept)


def settings_key(settings: object) -> str:
    """A name for settings: equal where these and the version of the package are.

    Args:
        settings: What JSON holds; anything else counts by its `repr`.
    """
    text = json.dumps([__version__, settings], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def table_digest(table: pl.DataFrame) -> str:
    """SHA-256 over the rows of a table, in whatever order they stand."""
    return hashlib.sha256(table.hash_rows().sort().to_numpy().tobytes()).hexdigest()


def _as_json(content: Mapping[str, object]) -> dict[str, Any]:
    """As a file gives it back: lists for tuples, text for the keys of a mapping."""
    stored: dict[str, Any] = json.loads(json.dumps(content))
    return stored

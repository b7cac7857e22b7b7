"""The files of the PhysioNet/CinC Challenge 2012: found, read and parsed, with file and line of whatever is wrong.

A stay is one text file `<RecordID>.txt` of the lines `Time,Parameter,Value` (time `HH:MM` since the admission to the
unit). A set is a folder or archive of such files, beside `Outcomes-<set>.txt`.
"""

from __future__ import annotations

import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import polars as pl

from ehrseq.data.report import MAX_ERRORS, ConversionReport

ARCHIVE_ENDINGS = (".tar.gz", ".tgz", ".tar", ".zip")
HEADER = b"Time,Parameter,Value"

_CORRUPT = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError)
_MOST_BYTES = 16 << 20  # of one file in an archive; the longest of the challenge has 240,000
_TIME = re.compile(r"(\d{1,4}):([0-5]\d)")
_OUTCOMES = re.compile(r"outcomes.*\.(?:txt|csv)", re.IGNORECASE)


@dataclass
class ChallengeFiles:
    """What was found at a path.

    Attributes:
        stays: (set, file name as errors shall show it, content) of every stay, sorted by set and name.
        outcomes: (file name, content) of every outcomes file.
        others: Text files that are neither.
    """

    stays: list[tuple[str, str, bytes]] = field(default_factory=list)
    outcomes: list[tuple[str, bytes]] = field(default_factory=list)
    others: int = 0


def is_challenge_data(path: Path) -> bool:
    """Whether `path` looks like files of the challenge: an archive, or text files with the challenge's header."""
    if path.is_file():
        return path.name.lower().endswith(ARCHIVE_ENDINGS) or (path.suffix == ".txt" and _has_header(path))
    for file in _files_below(path):
        if file.name.lower().endswith(ARCHIVE_ENDINGS) or (file.suffix == ".txt" and _has_header(file)):
            return True
    return False


def find_files(path: Path) -> ChallengeFiles:
    """Read every stay and outcomes file at a path.

    Args:
        path: A folder (searched with its subfolders, archives in it are opened), an archive or one stay's file. Beside
            an archive, a set's folder or a stay's file, the set's own `Outcomes-<set>.txt` is read as well.

    Raises:
        ValueError: Nothing there, an archive that cannot be read.
    """
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; give a folder or archive ({', '.join(ARCHIVE_ENDINGS)}) of the challenge's files."
        )
    files = ChallengeFiles()
    for file in [path] if path.is_file() else _files_below(path):
        if file.name.lower().endswith(ARCHIVE_ENDINGS):
            set_name = _stem(file.name)
            for name, content in _members(file):
                _sort_in(files, PurePosixPath(name).parent.name or set_name, name, f"{file.name}/{name}", content)
        elif file.suffix.lower() in (".txt", ".csv"):
            try:
                content = file.read_bytes()
            except OSError as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
            _sort_in(files, file.parent.name, file.name, str(file), content)
    if not files.stays:
        raise ValueError(
            f"{path} holds no stays of the PhysioNet challenge 2012; expected text files that begin with the line "
            f"{HEADER.decode()!r}, or an archive of them ({', '.join(ARCHIVE_ENDINGS)})."
        )
    sets = {name for name, *_ in files.stays}
    known = {PurePosixPath(name).name for name, _ in files.outcomes}
    # The distribution keeps a set's outcomes beside its archive.
    for file in sorted(path.parent.iterdir()) if path.is_file() or not files.outcomes else []:
        if _OUTCOMES.fullmatch(file.name) and file.name not in known and _belongs(file, sets) and file.is_file():
            files.outcomes.append((str(file), file.read_bytes()))
    files.stays.sort(key=lambda stay: stay[:2])
    return files


def parse_stays(files: ChallengeFiles, report: ConversionReport, *, on_error: str = "raise") -> pl.DataFrame:
    """All stays' lines as one table.

    Args:
        files: What `find_files` returned.
        report: Takes the counts of blank, valueless and, with `on_error="skip"`, malformed lines.
        on_error: "raise": a malformed line is an error that names file and line; "skip": it is counted and left out.

    Returns:
        Columns file (Int32, position in `files.stays`), line (Int32, from 1), minute (Int64), parameter (String, "" =
        none), value (Float64, finite), in file order.

    Raises:
        ValueError: A malformed line (no `Time,Parameter,Value`, a time that is no `HH:MM`, a value that is no number),
            a file without header or that is no UTF-8.
    """
    bodies, counts = _bodies(files)
    rows = sum(counts)
    text = b"".join(bodies)
    file = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    first = np.repeat(np.cumsum([0, *counts[:-1]]), counts)
    line = (np.arange(rows) - first + 2).astype(np.int32)
    problems = _Problems(files, report, on_error)

    # 1. Every line has three fields; where that is not plain from the number of commas, look at each line.
    frame = None if text.count(b",") != 2 * rows else _read_csv(text, rows)
    if frame is None:
        text, kept = _whole_lines(text, file, line, problems)
        file, line = file[kept], line[kept]
        frame = _read_csv(text, len(kept))
        if frame is None:
            raise ValueError(f"{report.source}: the lines of the stays cannot be read as Time,Parameter,Value.")
    frame = frame.with_columns(pl.Series("file", file), pl.Series("line", line))

    # 2. Times: at most some thousand different ones.
    times = frame["time"].unique()
    minutes = [int(m[1]) * 60 + int(m[2]) if (m := _TIME.fullmatch(text)) else None for text in times.to_list()]
    minute = pl.col("time").replace_strict(times, pl.Series(minutes, dtype=pl.Int64), default=None)
    frame = frame.with_columns(minute.alias("minute"), pl.col("text").cast(pl.Float64, strict=False).alias("value"))
    frame = problems.without(frame, pl.col("minute").is_null(), "time", "HH:MM since the admission")

    # 3. Values.
    empty = int((frame["text"] == "").sum())
    if empty:
        report.skipped["rows without a value"] += empty
        frame = frame.filter(pl.col("text") != "")
    frame = problems.without(frame, pl.col("value").is_null(), "text", "a number")
    not_finite = int((~frame["value"].is_finite()).sum())
    if not_finite:
        report.skipped["values that are NaN or infinite"] += not_finite
        frame = frame.filter(pl.col("value").is_finite())
    return frame.select("file", "line", "minute", "parameter", "value")


@dataclass
class _Problems:
    """What happens to malformed lines: an error that names the first, or a count."""

    files: ChallengeFiles
    report: ConversionReport
    on_error: str

    def add(self, file: int, line: int, got: str, expected: str) -> None:
        message = f"{self.files.stays[file][1]}, line {line}: got {got[:80]!r}; expected {expected}."
        if self.on_error != "skip":
            raise ValueError(f"{message} Correct the line, or read with on_error='skip' to leave such lines out.")
        self.report.skipped["malformed lines"] += 1
        if len(self.report.errors) < MAX_ERRORS:
            self.report.errors.append(message)

    def without(self, frame: pl.DataFrame, is_bad: pl.Expr, column: str, expected: str) -> pl.DataFrame:
        bad = frame.filter(is_bad)
        if bad.is_empty():
            return frame
        for file, line, got in bad.select("file", "line", column).iter_rows():
            self.add(file, line, got, f"{expected} as the {'time' if column == 'time' else 'value'}")
        return frame.filter(~is_bad)


def _bodies(files: ChallengeFiles) -> tuple[list[bytes], list[int]]:
    """Each file's lines below the header, every line ended, and their numbers."""
    bodies, counts = [], []
    for _, name, content in files.stays:
        header, _, body = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").partition(b"\n")
        if header.strip() != HEADER:
            raise ValueError(
                f"{name}, line 1: got {header[:80].decode('utf-8', 'replace')!r}; expected the header "
                f"{HEADER.decode()!r}."
            )
        if body and not body.endswith(b"\n"):
            body += b"\n"
        bodies.append(body)
        counts.append(body.count(b"\n"))
    return bodies, counts


def _read_csv(text: bytes, rows: int) -> pl.DataFrame | None:
    """time, parameter, text (strings, "" where empty) of well-formed lines; None where they are not."""
    schema = {"time": pl.String, "parameter": pl.String, "text": pl.String}
    if not rows:
        return pl.DataFrame(schema=schema)
    try:
        frame = pl.read_csv(io.BytesIO(text), has_header=False, schema=schema, quote_char=None)
    except pl.exceptions.PolarsError:
        return None
    if frame.height != rows:
        return None
    return frame.with_columns(pl.all().fill_null("").str.strip_chars())


def _whole_lines(
    text: bytes, file: np.ndarray, line: np.ndarray, problems: _Problems
) -> tuple[bytes, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """The lines of three fields, and their positions; blank ones are counted, others are problems."""
    kept_lines, kept = [], []
    for position, content in enumerate(text.split(b"\n")[:-1]):
        try:
            words = content.decode("utf-8")
        except UnicodeDecodeError:
            problems.add(int(file[position]), int(line[position]), content.decode("utf-8", "replace"), "UTF-8")
            continue
        if not words.strip():
            problems.report.notes["blank lines"] += 1
        elif words.count(",") != 2:
            problems.add(int(file[position]), int(line[position]), words, "Time,Parameter,Value")
        else:
            kept_lines.append(content)
            kept.append(position)
    return b"".join(content + b"\n" for content in kept_lines), np.asarray(kept, np.int64)


def _files_below(folder: Path) -> Iterable[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))


def _has_header(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.readline(64).removeprefix(b"\xef\xbb\xbf").strip() == HEADER


def _stem(name: str) -> str:
    ending = next(ending for ending in ARCHIVE_ENDINGS if name.lower().endswith(ending))
    return name[: -len(ending)]


def _belongs(outcomes: Path, sets: set[str]) -> bool:
    """Whether a file beside a set holds its outcomes: `Outcomes-a.txt` those of `set-a`."""
    marks = {name.rsplit("-", 1)[-1].lower() for name in sets if "-" in name}
    return outcomes.stem.lower() in {"outcomes", *(f"outcomes-{mark}" for mark in marks)}


def _sort_in(files: ChallengeFiles, set_name: str, name: str, shown: str, content: bytes) -> None:
    """Put one text file where it belongs."""
    base = PurePosixPath(name).name
    if _OUTCOMES.fullmatch(base):
        files.outcomes.append((shown, content))
    elif base.endswith(".txt") and (base[:-4].isdigit() or content.lstrip(b"\xef\xbb\xbf").startswith(HEADER)):
        files.stays.append((set_name, shown, content))
    else:
        files.others += 1


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each text file of an archive, read in memory: nothing is unpacked onto the disk."""
    try:
        if zipfile.is_zipfile(archive) or archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as opened:
                for info in opened.infolist():
                    if _is_wanted(info.filename) and not info.is_dir():
                        with opened.open(info) as packed:
                            yield info.filename, _content(packed, archive, info.filename)
            return
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                if member.isfile() and _is_wanted(member.name):
                    stream = tar.extractfile(member)
                    if stream is not None:
                        yield member.name, _content(stream, archive, member.name)
    except _CORRUPT as error:
        raise ValueError(
            f"{archive} cannot be read as an archive ({type(error).__name__}: {error}); it is damaged or cut short. "
            "Download it again."
        ) from error
    except RuntimeError as error:  # how zipfile says that a member is encrypted
        raise ValueError(f"{archive} cannot be read: {error}. Give an archive without a password.") from error


def _content(stream: IO[bytes], archive: Path, name: str) -> bytes:
    """What a member holds.

    Raises:
        ValueError: It unpacks to more than any file of the challenge: it was made to fill the memory.
    """
    content = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(
            f"{archive}: {name} unpacks to more than {_MOST_BYTES:,} bytes; a stay of the challenge has some thousand. "
            "Download the archive again, or take the file out of it."
        )
    return content


def _is_wanted(name: str) -> bool:
    base = PurePosixPath(name).name
    return base.lower().endswith((".txt", ".csv")) and not base.startswith(".")

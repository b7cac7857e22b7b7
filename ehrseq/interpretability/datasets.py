"""Contributions of many patients, in one Parquet file: worked out in parts, by many processes, stopped and gone on.

A part is a few patients of one file, so that a stopped run loses little. Neither the events nor the contributions of
all patients are ever held together.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import polars as pl
import pyarrow.parquet as pq

from ehrseq.batches.requests import TaskNames, check_request, read_request
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import EVENT_COLUMNS, LABEL_KEYS
from ehrseq.data.shards import Shard, scan_shard
from ehrseq.data.sources import read_source
from ehrseq.hub.checkpoints import checkpoint_digest, kept_checkpoint
from ehrseq.interpretability.explanation import CONTRIBUTION_SCHEMA, Explanation
from ehrseq.interpretability.patients import Answer, Ways, explain_events, ways_of
from ehrseq.tasks.moments import LabelSource
from ehrseq.work.engine import Engine
from ehrseq.work.files import file_digest, remove, write_json, write_whole
from ehrseq.work.parts import RecordedPart, kept_parts, run_parts, table_digest

EXPLAINED_SCHEMA: dict[str, Any] = {
    "subject_id": pl.Int64(),
    "prediction_time": pl.Datetime("us"),
    "task": pl.String(),
    "method": pl.String(),
    "score": pl.Float64(),
    "log_odds": pl.Float64(),
    "baseline": pl.Float64(),
    "remainder": pl.Float64(),
    "reason": pl.String(),
    **CONTRIBUTION_SCHEMA,
}
"""Columns of a table of contributions: what was asked and answered, then what contributed, a row each. A question
without any contribution has one row, whose contribution is null.
"""

SUBJECTS_OF_A_PART = 32


class ExplainedCounts(TypedDict):
    """What was read of one part."""

    events: int
    subjects: int
    answers: int
    notes: dict[str, int]


@dataclass(frozen=True)
class ExplainedPart(RecordedPart[ExplainedCounts]):
    """Contributions of a few patients of one file.

    Attributes:
        shard: The file.
        folder: Folder for what is made of all parts.
        number: Of the part within the file.
        first: Their smallest subject_id.
        last: Their largest.
        checkpoint: Folder or name of the checkpoint.
        ways: How answers are explained.
        moments: Parquet file of subject_id, prediction_time, task; None = all tasks at the ends.
        displays: JSON file of code -> description.
    """

    shard: Shard
    folder: str
    number: int
    first: int
    last: int
    checkpoint: str
    ways: Ways
    moments: str | None
    displays: str

    @property
    def name(self) -> str:
        """The file and the part, in messages."""
        return f"{self.shard.path}, patients {self.first} to {self.last}"

    @property
    def record(self) -> Path:
        """See `RecordedPart.record`."""
        return Path(self.folder) / f"{self.shard.split}-{self.shard.number}-{self.number}.json"

    def make(self) -> ExplainedCounts:
        """See `RecordedPart.make`."""
        checkpoint = kept_checkpoint(self.checkpoint, checkpoint_digest(self.checkpoint))
        displays = json.loads(Path(self.displays).read_text(encoding="utf-8"))
        these = pl.col("subject_id").is_between(self.first, self.last)
        events = scan_shard(self.shard).filter(these).select(EVENT_COLUMNS).collect()
        moments = None
        if self.moments is not None:  # between the ids of a file stand those of other splits
            here = events["subject_id"].unique().implode()
            moments = pl.read_parquet(self.moments).filter(pl.col("subject_id").is_in(here))
        notes: Counter[str] = Counter()
        answers = 0
        frames = [pl.DataFrame(schema=EXPLAINED_SCHEMA)]
        for answer in explain_events(checkpoint, events, moments, self.ways, notes, displays):
            frames.append(contributions_of(answer, self.ways))
            answers += 1
        write_whole(self.beside(".parquet"), pl.concat(frames).write_parquet)
        return {
            "events": events.height,
            "subjects": events["subject_id"].n_unique(),
            "answers": answers,
            "notes": dict(+notes),
        }


def explain_dataset(
    checkpoint: str | Path,
    data: str | Path | pl.DataFrame,
    out: str | Path,
    *,
    tasks: TaskNames = None,
    methods: Sequence[str] | str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    prediction_times: str | Path | pl.DataFrame | None = None,
    labels: LabelSource | None = None,
    splits: Sequence[str] | None = None,
    parts: str | Path | None = None,
    on_error: str = "raise",
    engine: Engine | None = None,
) -> ConversionReport:
    """Write what contributed to the risks of many patients.

    Args:
        checkpoint: Folder of a finetuned checkpoint with its encoder, or `owner/name` on the Hub.
        data: Folder of a prepared dataset; FHIR or MEDS (folder or file); or an event table.
        out: Parquet file to write, in the columns of `EXPLAINED_SCHEMA`; it appears whole or not at all.
        tasks: Names of the tasks, or one name; None = all of the checkpoint.
        methods: Names of methods, or one name; None = the model's recommended one.
        settings: Method -> its settings.
        prediction_times: Table (or Parquet or CSV file) of subject_id, prediction_time; None = the end of each record,
            or of each stay's window. Nothing later than it is read.
        labels: Labels whose times are the prediction times, each task at its own.
        splits: Splits of a prepared dataset whose patients are explained, None = all.
        parts: Folder for the contributions of each part: a run that was stopped goes on where it was. Removed at the
            end. None: a temporary one, so that it begins anew.
        on_error: FHIR only: "raise" or "skip" (counted in the report).
        engine: Where to work, default all cores of this machine.

    Returns:
        What was read, and what was left out.

    Raises:
        ValueError: An unknown task, method, setting, patient or split; unreadable data; nobody to explain.
    """
    check_request(data, tasks, prediction_times, labels)
    out = Path(out)
    digest = checkpoint_digest(checkpoint)
    loaded = kept_checkpoint(str(checkpoint), digest)
    request = read_request(loaded.model, checkpoint, tasks, prediction_times, labels)
    ways = ways_of(loaded, list(request.tasks), methods, settings, weights=False)
    events, shards, report = read_source(data, splits, on_error, purpose="explain")
    report.notes.update(request.notes)
    source = [table_digest(events)] if events is not None else [file_digest(shard.path) for shard in shards]
    key = [source, [shard.name for shard in shards], digest, ways, _asked(request.moments), report.code_descriptions]
    with kept_parts(None if parts is None else Path(parts) / "contributions", key) as folder:
        if events is not None:
            shards = [Shard(str(folder / "events.parquet"), "all", "0")]
            write_whole(shards[0].path, events.write_parquet)
        ranges = {shard: _ranges(shard) for shard in shards}
        subjects = pl.concat([pl.Series("subject_id", [], pl.Int64), *(known for known, _ in ranges.values())])
        moments = request.moments_of(subjects)
        moments_file = None if moments is None else str(folder / "moments.parquet")
        if moments is not None:
            write_whole(folder / "moments.parquet", moments.write_parquet)
        write_json(folder / "displays.json", report.code_descriptions)
        asked = None if moments is None else moments["subject_id"].unique()
        work = [
            ExplainedPart(
                shard, str(folder), number, first, last, str(checkpoint), ways, moments_file,
                str(folder / "displays.json"),
            )
            for shard, (_, spans) in ranges.items()
            for number, (first, last) in enumerate(spans)
            if asked is None or asked.is_between(first, last).any()
        ]  # fmt: skip
        answers = 0
        report.events_written, report.subjects = 0, 0
        for counts in run_parts(work, desc="Explaining", folder=folder, engine=engine):
            report.events_written += counts["events"]
            report.subjects += counts["subjects"]
            report.notes.update(counts["notes"])
            answers += counts["answers"]
        if not answers:
            raise ValueError(f"{_named(data)} holds nobody to explain. What was read:\n{report}")
        write_whole(out, lambda file: _join([part.beside(".parquet") for part in work], file))
    if parts is not None:
        remove(Path(parts))
    return report


def contributions_of(answer: Answer, ways: Ways) -> pl.DataFrame:
    """An answer's contributions, in the columns of `EXPLAINED_SCHEMA`."""
    subject, at, task = answer.moment
    if answer.reason is not None:
        rows = [
            {"subject_id": subject, "prediction_time": at, "task": task, "method": name, "reason": answer.reason}
            for name in ways.methods
        ]
        return pl.concat([pl.DataFrame(schema=EXPLAINED_SCHEMA), pl.DataFrame(rows)], how="diagonal_relaxed")
    return pl.concat([_table(each, subject, at) for each in answer.explanations])


def _table(explanation: Explanation, subject: int, at: Any) -> pl.DataFrame:
    rows = explanation.contributions
    if rows.is_empty():
        rows = pl.DataFrame({name: [None] for name in CONTRIBUTION_SCHEMA}, schema=CONTRIBUTION_SCHEMA)
    has_score = explanation.log_odds == explanation.log_odds  # not NaN
    numbers = {
        "score": explanation.score,
        "log_odds": explanation.log_odds,
        "baseline": explanation.baseline,
        "remainder": explanation.remainder,
    }
    return rows.with_columns(
        subject_id=pl.lit(subject, pl.Int64),
        prediction_time=pl.lit(at, pl.Datetime("us")),
        task=pl.lit(explanation.task, pl.String),
        method=pl.lit(explanation.method, pl.String),
        reason=pl.lit(explanation.reason, pl.String),
        **{name: pl.lit(number if has_score else None, pl.Float64) for name, number in numbers.items()},
    ).select(pl.col(name).cast(kind) for name, kind in EXPLAINED_SCHEMA.items())


def _ranges(shard: Shard) -> tuple[pl.Series, list[tuple[int, int]]]:
    """The subjects of a file, and the smallest and largest one of each part."""
    subjects = scan_shard(shard).select(pl.col("subject_id").unique().sort()).collect()["subject_id"]
    starts = range(0, len(subjects), SUBJECTS_OF_A_PART)
    parts = [subjects.slice(start, SUBJECTS_OF_A_PART) for start in starts]
    return subjects, [(int(part[0]), int(part[-1])) for part in parts]


def _asked(moments: pl.DataFrame | None) -> str | None:
    return None if moments is None else table_digest(moments.select(*LABEL_KEYS, "task"))


def _join(parts: Sequence[Path], file: Path) -> None:
    """The rows of many files as one, never all at once."""
    schema = pl.DataFrame(schema=EXPLAINED_SCHEMA).to_arrow().schema
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in parts:
            table = pl.read_parquet(part, hive_partitioning=False).to_arrow().cast(schema)
            if table.num_rows:
                writer.write_table(table)


def _named(data: object) -> str:
    return str(data) if isinstance(data, str | Path) else "the table"

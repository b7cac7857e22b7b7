"""Risks of a prepared dataset of any size, file by file: what `predict_risks` gives for the whole, on many cores.

A file is read in blocks of whole patients, so that neither the events nor their encoding are ever held together; the
risks are. Batches are formed within a block: a score is that of `predict_risks` up to the rounding of float32, and the
same to the last bit whoever works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

import polars as pl

from ehrseq.data.report import ConversionReport
from ehrseq.data.shards import ShardPart, dataset_shards, read_blocks, scan_shard
from ehrseq.encode.triplets import NoStayError
from ehrseq.hub.checkpoints import checkpoint_digest, load_checkpoint
from ehrseq.prediction.risks import (
    RISK_SCHEMA,
    asked_tasks,
    check_known,
    check_request,
    checked_risks,
    checked_times,
    score_events,
)
from ehrseq.work.engine import Engine
from ehrseq.work.files import remove, write_whole
from ehrseq.work.parts import kept_parts, run_parts, table_digest


class RiskCounts(TypedDict):
    """What was read of one file."""

    events: int
    subjects: int
    notes: dict[str, int]


@dataclass(frozen=True)
class RiskPart(ShardPart[RiskCounts]):
    """Risks of the patients of one file.

    Attributes:
        checkpoint: Folder or name of the checkpoint.
        tasks: Tasks to score.
        times: Parquet file of the prediction times that are asked for, None = the ends.
        batch_size: Rows in one forward pass.
    """

    checkpoint: str
    tasks: tuple[str, ...]
    times: str | None
    batch_size: int

    def make(self) -> RiskCounts:
        """See `RecordedPart.make`."""
        model, encoder = _load(self.checkpoint, checkpoint_digest(self.checkpoint))
        tasks = asked_tasks(model, self.checkpoint, self.tasks)
        times = None if self.times is None else pl.read_parquet(self.times)
        report = ConversionReport()
        frames = [pl.DataFrame(schema=RISK_SCHEMA)]
        for events in read_blocks(self.shard):
            subjects = events["subject_id"].unique()
            report.events_written += events.height
            report.subjects += len(subjects)
            asked = None if times is None else times.filter(pl.col("subject_id").is_in(subjects.implode()))
            if asked is None or not asked.is_empty():
                frames.append(_score_block(model, encoder, events, asked, tasks, report, self.batch_size))
        write_whole(self.beside(".parquet"), pl.concat(frames).write_parquet)
        return {"events": report.events_written, "subjects": report.subjects, "notes": dict(report.notes)}


def predict_dataset(
    checkpoint: str | Path,
    dataset: str | Path,
    parts: str | Path,
    *,
    tasks: Sequence[str] | str | None = None,
    prediction_times: str | Path | pl.DataFrame | None = None,
    batch_size: int = 32,
    engine: Engine | None = None,
) -> tuple[pl.DataFrame, ConversionReport]:
    """Score the patients of a prepared dataset.

    Args:
        checkpoint: As of `predict_risks`.
        dataset: Folder of a prepared dataset.
        parts: Folder for the risks of each file: a run that was stopped goes on where it was. Removed at the end.
        tasks: As of `predict_risks`.
        prediction_times: As of `predict_risks`.
        batch_size: As of `predict_risks`.
        engine: Where to work, default all cores of this machine.

    Returns:
        As `predict_risks`.

    Raises:
        ValueError: No prepared dataset, or what `predict_risks` refuses.
    """
    check_request(dataset, tasks, prediction_times, batch_size)
    shards = dataset_shards(dataset)
    model, _ = _load(str(checkpoint), checkpoint_digest(checkpoint))
    asked = asked_tasks(model, checkpoint, tasks)
    times = None if prediction_times is None else checked_times(prediction_times)
    if times is not None:
        subjects = [scan_shard(shard).select(pl.col("subject_id").unique()).collect() for shard in shards]
        check_known(times, pl.concat(subjects)["subject_id"])
    settings = [str(Path(dataset).resolve()), checkpoint_digest(checkpoint), list(asked), batch_size]
    settings.append(None if times is None else table_digest(times))
    report = ConversionReport(source=str(dataset), format="meds", files=len(shards))
    frames = []
    with kept_parts(Path(parts) / "risks", settings) as folder:
        times_file = None if times is None else str(folder / "times.parquet")
        if times is not None:
            write_whole(folder / "times.parquet", times.write_parquet)
        work = [RiskPart(shard, str(folder), str(checkpoint), tuple(asked), times_file, batch_size) for shard in shards]
        reports = run_parts(work, desc="Scoring", folder=parts, engine=engine)
        for part, counts in zip(work, reports, strict=True):
            frames.append(pl.read_parquet(part.beside(".parquet"), hive_partitioning=False))
            report.events_written += counts["events"]
            report.subjects += counts["subjects"]
            report.notes.update(counts["notes"])
        risks = checked_risks(pl.concat(frames), checkpoint)
        if risks.is_empty():
            raise ValueError(f"{dataset} holds nobody to score. What was read:\n{report}")
    remove(Path(parts))
    return risks, report


def _score_block(
    model: Any,
    encoder: Any,
    events: pl.DataFrame,
    times: pl.DataFrame | None,
    tasks: dict[str, Any],
    report: ConversionReport,
    batch_size: int,
) -> pl.DataFrame:
    try:
        risks = score_events(model, encoder, events, times, tasks, report=report, batch_size=batch_size, progress=False)
    except NoStayError:
        # An error of a whole dataset; that none of these patients has a stay is nothing special.
        if times is None:
            report.notes["patients without a stay, not scored"] += events["subject_id"].n_unique()
            return pl.DataFrame(schema=RISK_SCHEMA)
        from ehrseq.prediction.stays import REASONS

        report.notes[f"risks not given: {REASONS['no_stay']}"] += times.height
        labels = [(name, task.get("positive_label")) for name, task in tasks.items()]
        named = pl.DataFrame(labels, schema={"task": pl.String, "label": pl.String}, orient="row")
        risks = times.join(named, how="cross", maintain_order="left_right").with_columns(
            score=pl.lit(None, pl.Float64), reason=pl.lit("no_stay")
        )
    return risks.match_to_schema(pl.Schema(RISK_SCHEMA))


@lru_cache(maxsize=1)
def _load(checkpoint: str, _: str) -> tuple[Any, Any]:
    """Model and encoder; a worker loads them once."""
    return load_checkpoint(checkpoint)

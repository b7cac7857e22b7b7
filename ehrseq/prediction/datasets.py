"""Risks of a prepared dataset of any size, file by file: what `predict_risks` gives for the whole, on many cores.

A file is read in blocks of whole patients, so that neither the events nor their encoding are ever held together; the
risks are. Batches are formed within a block: a score is that of `predict_risks` up to the rounding of float32, and the
same to the last bit whoever works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import polars as pl

from ehrseq.batches.requests import TaskNames, check_request, read_request, requested_tasks
from ehrseq.batches.scoring import check_batch_size
from ehrseq.data.report import ConversionReport
from ehrseq.data.shards import ShardPart, dataset_shards, read_blocks, scan_shard
from ehrseq.hub.checkpoints import checkpoint_digest, kept_checkpoint
from ehrseq.prediction.risks import checked_risks
from ehrseq.prediction.scoring import RISK_SCHEMA, score_events
from ehrseq.tasks.moments import LabelSource
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
        moments: Parquet file of subject_id, prediction_time, task; None = all tasks at the ends.
        batch_size: Rows in one forward pass.
    """

    checkpoint: str
    tasks: tuple[str, ...]
    moments: str | None
    batch_size: int

    def make(self) -> RiskCounts:
        """See `RecordedPart.make`."""
        checkpoint = kept_checkpoint(self.checkpoint, checkpoint_digest(self.checkpoint))
        tasks = requested_tasks(checkpoint.model, self.checkpoint, self.tasks)
        moments = None if self.moments is None else pl.read_parquet(self.moments)
        report = ConversionReport()
        frames = [pl.DataFrame(schema=RISK_SCHEMA)]
        for events in read_blocks(self.shard):
            subjects = events["subject_id"].unique()
            report.events_written += events.height
            report.subjects += len(subjects)
            here = None if moments is None else moments.filter(pl.col("subject_id").is_in(subjects.implode()))
            if here is None or not here.is_empty():
                risks = score_events(
                    checkpoint,
                    events,
                    here,
                    tasks,
                    notes=report.notes,
                    batch_size=self.batch_size,
                    progress=False,
                    is_part=True,
                )
                frames.append(risks)
        write_whole(self.beside(".parquet"), pl.concat(frames).write_parquet)
        return {"events": report.events_written, "subjects": report.subjects, "notes": dict(report.notes)}


def predict_dataset(
    checkpoint: str | Path,
    dataset: str | Path,
    parts: str | Path,
    *,
    tasks: TaskNames = None,
    prediction_times: str | Path | pl.DataFrame | None = None,
    labels: LabelSource | None = None,
    splits: Sequence[str] | None = None,
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
        labels: As of `predict_risks`.
        splits: Splits whose patients are scored, None = all.
        batch_size: As of `predict_risks`.
        engine: Where to work, default all cores of this machine.

    Returns:
        As `predict_risks`.

    Raises:
        ValueError: No prepared dataset, an unknown split, or what `predict_risks` refuses.
    """
    check_batch_size(batch_size)
    check_request(dataset, tasks, prediction_times, labels)
    shards = dataset_shards(dataset, splits)
    digest = checkpoint_digest(checkpoint)
    request = read_request(kept_checkpoint(str(checkpoint), digest).model, checkpoint, tasks, prediction_times, labels)
    moments = None
    if request.moments is not None:
        subjects = [scan_shard(shard).select(pl.col("subject_id").unique()).collect() for shard in shards]
        moments = request.moments_of(pl.concat(subjects)["subject_id"])
    names = tuple(request.tasks)
    settings = [str(Path(dataset).resolve()), digest, names, batch_size]
    settings.append(None if moments is None else table_digest(moments))
    report = ConversionReport(source=str(dataset), format="meds", files=len(shards), notes=request.notes)
    frames = []
    with kept_parts(Path(parts) / "risks", settings) as folder:
        moments_file = None if moments is None else str(folder / "moments.parquet")
        if moments is not None:
            write_whole(folder / "moments.parquet", moments.write_parquet)
        work = [RiskPart(shard, str(folder), str(checkpoint), names, moments_file, batch_size) for shard in shards]
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

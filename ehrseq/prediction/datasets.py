"""Risks of a prepared dataset of any size, file by file: what `predict_risks` gives for the whole, on many cores.

A file is read in blocks of whole patients, so that neither the events nor their encoding are ever held together; the
risks are. Batches are formed within a block: a score is that of `predict_risks` up to the rounding of float32, and the
same to the last bit whoever works.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.data.report import ConversionReport
from ehrseq.data.shards import Shard, dataset_shards, read_blocks, scan_shard
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
from ehrseq.version import __version__
from ehrseq.work.engine import Engine, get_engine
from ehrseq.work.files import file_digest, remove, remove_unfinished, write_whole

_KEY = b"ehrseq.risks"


@dataclass(frozen=True)
class ScoreWork:
    """One file to score.

    Attributes:
        shard: The file.
        part: Where its risks go.
        checkpoint: Folder or name of the checkpoint.
        tasks: Tasks to score, None = all.
        times: Parquet file of the prediction times that are asked for, None = the ends.
        batch_size: Rows in one forward pass.
    """

    shard: Shard
    part: str
    checkpoint: str
    tasks: tuple[str, ...] | None
    times: str | None
    batch_size: int

    @property
    def name(self) -> str:
        """The file, in messages."""
        return self.shard.path


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
    folder = Path(parts)
    request = [__version__, checkpoint_digest(checkpoint), list(asked), batch_size]
    request.append(None if times is None else times.hash_rows().sort().to_list())
    key = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]
    times_file = None
    if folder.is_dir():
        remove_unfinished(folder)
    if times is not None:
        times_file = folder / f"times-{key}.parquet"
        asked_for = times
        write_whole(times_file, lambda path: asked_for.write_parquet(path))
    work = [
        ScoreWork(
            shard=shard,
            part=str(folder / f"{shard.split}-{shard.number}-{key}.parquet"),
            checkpoint=str(checkpoint),
            tasks=tuple(asked),
            times=None if times_file is None else str(times_file),
            batch_size=batch_size,
        )
        for shard in shards
    ]
    report = ConversionReport(source=str(dataset), format="meds", files=len(shards))
    frames = []
    for part in (engine or get_engine()).map(score_shard, work, desc="Scoring"):
        frames.append(pl.read_parquet(part, hive_partitioning=False))
        counts = _read_counts(part)
        report.events_written += counts["events"]
        report.subjects += counts["subjects"]
        report.notes.update(counts["notes"])
    risks = checked_risks(pl.concat(frames), checkpoint)
    if risks.is_empty():
        raise ValueError(f"{dataset} holds nobody to score. What was read:\n{report}")
    remove(folder)
    return risks, report


def score_shard(work: ScoreWork) -> str:
    """Score one file, if its risks are not there already; returns their file."""
    import pyarrow.parquet as pq

    source = file_digest(work.shard.path)
    part = Path(work.part)
    if part.is_file() and _read_counts(work.part).get("source") == source:
        return work.part
    model, encoder = _load(work.checkpoint, checkpoint_digest(work.checkpoint))
    tasks = asked_tasks(model, work.checkpoint, work.tasks)
    times = None if work.times is None else pl.read_parquet(work.times)
    report = ConversionReport()
    frames = [pl.DataFrame(schema=RISK_SCHEMA)]
    for events in read_blocks(work.shard):
        subjects = events["subject_id"].unique()
        report.events_written += events.height
        report.subjects += len(subjects)
        own = None if times is None else times.filter(pl.col("subject_id").is_in(subjects.implode()))
        if own is not None and own.is_empty():
            continue
        frames.append(_score_block(model, encoder, events, own, tasks, report, work.batch_size))
    counts = {
        "source": source,
        "events": report.events_written,
        "subjects": report.subjects,
        "notes": dict(report.notes),
    }
    table = pl.concat(frames).to_arrow().replace_schema_metadata({_KEY: json.dumps(counts)})
    write_whole(part, lambda path: pq.write_table(table, path, compression="zstd"))
    return work.part


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


def _read_counts(part: str) -> dict[str, Any]:
    import pyarrow.parquet as pq

    return json.loads((pq.read_schema(part).metadata or {}).get(_KEY, b"{}"))


@lru_cache(maxsize=1)
def _load(checkpoint: str, _: str) -> tuple[Any, Any]:
    """Model and encoder; a worker loads them once."""
    return load_checkpoint(checkpoint)
